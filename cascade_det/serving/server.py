"""Serves the application until a signal ends it."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from cascade_det.errors import CascadeDetError
from cascade_det.parallel.signals import handled

logger = logging.getLogger(__name__)

_MOST_CONNECTIONS = 64
_GRACE_SECONDS = 10


def open_socket(address: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 is any free one.

    Raises:
        CascadeDetError: the port is in use or forbidden, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(target)
            return bound
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise CascadeDetError(
            f"--address {address} --port {port}: cannot be used ({error.strerror}). If another "
            "program uses the port, give another --port, or 0 for any free one."
        ) from error


def page_address(bound: socket.socket) -> str:
    """What to open in a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def serve(app: ASGIApp, bound: socket.socket) -> int:
    """Answer requests until SIGINT or SIGTERM; a request that runs is finished.

    Args:
        app: see ASGI.
        bound: from :func:`open_socket`; closed at the end.

    Returns:
        The exit status, 128 plus the number of the signal.
    """
    ended_by: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        ended_by.append(number)

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    # uvicorn takes these signals while it runs, and raises them again when it has ended.
    with handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), remember)), bound:
        bound.listen()  # before the address is shown; connections wait for the server
        logger.info("Open %s in a browser; Ctrl-C ends it.", page_address(bound))
        uvicorn.Server(config).run(sockets=[bound])
    return 128 + ended_by[0] if ended_by else 0
