"""The application: which path does what, and what every request goes through."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from larosa.errors import LarosaError
from larosa.runtime import Event
from larosa.serve.body import read_json
from larosa.serve.chat import Chat
from larosa.serve.completions import Completion
from larosa.serve.errors import ApiError
from larosa.serve.metrics import Metrics
from larosa.serve.model import ServedModel
from larosa.serve.run import ClientGoneError, Run
from larosa.serve.schema import ChatRequest, CommonRequest, CompletionRequest

#: What the page may do: nothing but its own script and style, and to ask this server.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Args:
        seconds: a request may take, waiting included.
        body_bytes: of a request.
    """

    seconds: float = 600.0
    body_bytes: int = 4 << 20


class Server:
    """The endpoints over some models.

    Args:
        models: the first is shown first.
        api_key: that requests to /v1 must bear; None for none.
    """

    def __init__(self, models: list[ServedModel], api_key: str | None = None, limits: Limits | None = None) -> None:
        self._models = {model.name: model for model in models}
        self._api_key = api_key
        self._limits = limits or Limits()
        self._metrics = Metrics()

    def app(self) -> ASGIApp:
        """The ASGI application; it closes the schedulers when it ends."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/completions", self._endpoint(CompletionRequest, Completion), methods=["POST"]),
            Route("/v1/chat/completions", self._endpoint(ChatRequest, Chat), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: lambda _, error: ApiError(error.status_code, error.detail).response(),
            ApiError: lambda _, error: error.response(),
            ClientGoneError: lambda _, error: Response(status_code=499),
            Exception: lambda _, error: ApiError.of(error).response(),
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return _Gate(app, self._api_key, self._metrics)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        for model in self._models.values():
            await asyncio.to_thread(model.scheduler.close)

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(
            resources.files("larosa.serve").joinpath("page.html").read_text("utf-8"),
            headers={"Content-Security-Policy": _PAGE_POLICY},
        )

    async def _health(self, _: Request) -> Response:
        alive = all(model.scheduler.alive for model in self._models.values())
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _show_metrics(self, _: Request) -> Response:
        text = self._metrics.text({name: model.scheduler for name, model in self._models.items()})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.card() for model in self._models.values()]})

    async def _show_model(self, request: Request) -> Response:
        return JSONResponse(self._model(request.path_params["name"]).card())

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"the model '{name[:200]}' does not exist: {known}", "model", "model_not_found")
        return self._models[name]

    def _endpoint(self, schema: type[CommonRequest], answer: type[Completion] | type[Chat]) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            content = await read_json(request, self._limits.body_bytes)
            try:
                body = schema.model_validate(content)
            except ValueError as error:
                raise ApiError.of(error) from None
            model = self._model(body.model)
            # Tokenizing a long text takes a while, in which others want to be served.
            form: Any = await asyncio.to_thread(answer, model, body)
            try:
                run = Run(model.scheduler, form.requests, request, self._limits.seconds, self._metrics)
            except LarosaError as error:
                raise ApiError.of(error) from None
            if body.stream:
                return _Stream(run, form, body.wants_usage)
            events: list[list[Event]] = [[] for _ in form.requests]
            async with aclosing(run.events()) as coming:
                async for index, event in coming:
                    events[index].append(event)
            return JSONResponse(form.whole(events, run.usage()))

        return endpoint


class _Stream(Response):
    """Server-sent events: one for each piece of an answer, as it comes."""

    def __init__(self, run: Run, form: Any, wants_usage: bool) -> None:
        self._run, self._form, self._wants_usage = run, form, wants_usage
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body(content: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._run.events()) as coming:
                async for index, event in coming:
                    pieces = self._form.pieces(index, event)
                    if text := "".join(_sse(piece) for piece in pieces):
                        await body(text)
            if self._wants_usage:
                await body(_sse(self._form.last(self._run.usage())))
            await body("data: [DONE]\n\n", more=False)
        except ApiError as error:
            await body(_sse(error.body()), more=False)
        except (ClientGoneError, OSError):
            return


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Gate:
    """What every request passes: the key, and the count of answers."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A path that a client made up is no name for a metric.
                path = scope["path"] if scope["path"] in _PATHS else "other"
                self._metrics.responses[path, message["status"]] += 1
            await send(message)

        if scope["path"].startswith("/v1") and not self._allowed(scope):
            await ApiError(401, "give the API key: Authorization: Bearer KEY", code="invalid_api_key").response()(
                scope, receive, counted
            )
            return
        await self._app(scope, receive, counted)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is None or hmac.compare_digest(given, self._expected)
