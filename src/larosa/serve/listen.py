"""From models to a server that listens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from larosa.errors import LarosaError

#: Seconds that requests have to end in when the server is told to, and that a connection may idle.
GRACE_SECONDS, _IDLE_SECONDS = 30, 30

#: Connections that the system keeps until they are taken.
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, where nobody can connect yet.

    Args:
        port: 0 takes a free one.

    Raises:
        LarosaError: there is no such address, or somebody else is there.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise LarosaError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return bound


def listen(
    app: ASGIApp, bound: socket.socket, on_ready: Callable[[str], None], grace_seconds: int = GRACE_SECONDS
) -> None:
    """Serve until interrupted or terminated; requests that are being answered are finished first.

    Args:
        bound: by `bind`; it is closed.
        on_ready: called with the address once clients can connect.
        grace_seconds: that they have for it.
    """
    with bound:
        bound.listen(_BACKLOG)
        host, port = bound.getsockname()[:2]
        on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=grace_seconds,
        )
        with suppress(KeyboardInterrupt):  # raised again once everything has ended
            uvicorn.Server(config).run(sockets=[bound])
