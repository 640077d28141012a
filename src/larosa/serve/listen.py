"""From models to a server that listens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from larosa.errors import LarosaError

#: Seconds that requests have to end in when the server is told to, and that a connection may idle.
_GRACE_SECONDS, _IDLE_SECONDS = 30, 30


def listen(app: ASGIApp, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until interrupted or terminated; requests that are being answered are finished first.

    Args:
        on_ready: called with the address once clients can connect.

    Raises:
        LarosaError: nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise LarosaError(f"--host {host} --port {port}: {error.strerror or error}") from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        with suppress(KeyboardInterrupt):  # raised again once everything has ended
            uvicorn.Server(config).run(sockets=[listener])
