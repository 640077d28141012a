"""A request's body, read and looked at before anybody works on it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from larosa.serve.errors import ApiError
from larosa.serve.run import ClientGoneError

#: Seconds for a client to send its body.
_BODY_SECONDS = 30.0


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a client sends.

    Raises:
        ApiError: it is none, too large, too slow, or of another type, which pages of other sites could send.
        ClientGoneError: the client has left.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    return content


async def _read(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise ApiError(413, f"the body is larger than {max_bytes} bytes")
    return b"".join(parts)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
