"""What goes wrong, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from larosa.errors import LarosaError
from larosa.runtime import ClosedError, DeadlineError, QueueFullError
from larosa.serve.schema import FORMS


class ApiError(Exception):
    """An answer other than what was asked for.

    Args:
        status: HTTP status.
        message: one line, with the mend.
        param: of the request, that it is about.
        code: OpenAI's name for it, where there is one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """What an exception means for a client; one that nobody foresaw says nothing about itself."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"] if part not in FORMS)
            message = first["msg"].removeprefix("Value error, ")
            return cls(400, f"{where}: {message}" if where else message, where or None)
        if isinstance(error, QueueFullError):
            return cls(503, str(error), code="overloaded")
        if isinstance(error, ClosedError):
            return cls(503, "the server is shutting down")
        if isinstance(error, DeadlineError):
            return cls(504, str(error), code="timeout")
        if isinstance(error, LarosaError):
            return cls(500, str(error))
        return cls(500, "internal error; the server's log says more")

    def body(self) -> dict[str, Any]:
        """The JSON form."""
        if self.status == 401:
            kind = "authentication_error"
        else:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP form."""
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse(self.body(), self.status, headers)
