"""The page and its two addresses of data, ``GET /settings`` and ``POST /detect``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cascade_det import __version__
from cascade_det.serving.detection import ImageDetection
from cascade_det.serving.exit_settings import ExitSetting, ExitSettings
from cascade_det.serving.guard import Guard
from cascade_det.serving.queue import BoundedQueue
from cascade_det.serving.uploads import UploadError, check_image, read_at_most

logger = logging.getLogger(__name__)

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/picture.js": ("picture.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_CLIENT_GONE = 499  # as nginx logs it; no one receives it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        upload_bytes: of a file.
        pixels: of an image.
        waiting: requests that wait while one runs.
        upload_seconds: for the whole body of a request.
    """

    upload_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    waiting: int = 8
    upload_seconds: float = 60.0


class DetectionService:
    """Answers requests for data.

    Args:
        detection: runs in a thread of its own, one image at a time.
        settings: of the exits.
        class_names: K.
        limits: of requests.
    """

    def __init__(
        self,
        detection: ImageDetection,
        settings: ExitSettings,
        class_names: Collection[str],
        limits: Limits,
    ) -> None:
        self._settings, self._names, self._limits = settings, list(class_names), limits
        self.queue = BoundedQueue(detection, limits.waiting)

    async def describe(self, request: Request) -> Response:
        """``GET /settings``: classes, settings of the exits from accurate to fast, limits."""
        return JSONResponse(
            {
                "version": __version__,
                "class_names": self._names,
                "settings": [
                    {
                        "name": setting.name,
                        "title": setting.title,
                        "summary": setting.summary,
                        "stages": setting.cascade.num_stages,
                    }
                    for setting in self._settings
                ],
                "initial": self._settings.initial,
                "limits": {
                    "upload_bytes": self._limits.upload_bytes,
                    "pixels": self._limits.pixels,
                },
            }
        )

    async def detect(self, request: Request) -> Response:
        """``POST /detect?setting=NAME``, whose body is an image file: what is found in it."""
        try:
            return await self._detect(request)
        except asyncio.CancelledError:
            # At a second Ctrl-C, or of a request that outlasts the grace after the first.
            return JSONResponse({"error": "The server was ended."}, 503)

    async def _detect(self, request: Request) -> Response:
        setting = self._setting(request)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise UploadError(
                415, "Send the image itself as the body: curl --data-binary @image.jpg"
            )
        with self.queue.place():
            content = await self._read(request)
            check_image(content, self._limits.pixels)
            result = self.queue.submit(content, setting)
            del content
            if not await _done_before_gone(result, request):
                return Response(status_code=_CLIENT_GONE)
            answer = result.result()
        logger.info(
            "%d x %d px, exits %s: %d detections in %.0f ms",
            answer["width"],
            answer["height"],
            setting.name,
            len(answer["detections"]),
            sum(answer["milliseconds"].values()),
        )
        return JSONResponse(answer)

    def _setting(self, request: Request) -> ExitSetting:
        name = request.query_params.get("setting", self._settings.initial)
        setting = self._settings.get(name)
        if setting is None:
            known = ", ".join(s.name for s in self._settings)
            raise UploadError(400, f"There is no such setting. There are {known}.")
        return setting

    async def _read(self, request: Request) -> bytes:
        announced = request.headers.get("content-length")
        reading = read_at_most(request.stream(), announced, self._limits.upload_bytes)
        try:
            return await asyncio.wait_for(reading, self._limits.upload_seconds)
        except asyncio.TimeoutError:
            raise UploadError(408, "The image did not arrive in time.") from None


async def _done_before_gone(result: asyncio.Future[Any], request: Request) -> bool:
    """Wait for a result; drop it, and return false, if the client hangs up before."""
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not result.done():
            result.cancel()
    return not result.cancelled()


def create_app(service: DetectionService, host_names: Collection[str] = ()) -> ASGIApp:
    """The application, see ASGI.

    Args:
        service: answers requests for data.
        host_names: names of this machine, see ``Guard``.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            pass  # At a second Ctrl-C the server does not ask to end: it is no failure.
        finally:
            service.queue.close()

    routes = [_file_route(path, *file) for path, file in _PAGE.items()]
    routes += [
        Route("/settings", service.describe, methods=["GET"]),
        Route("/detect", service.detect, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        UploadError: _refused,
        HTTPException: _http_error,
        ClientDisconnect: _hung_up,
        Exception: _failed,
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return Guard(app, host_names)


def _file_route(path: str, name: str, media_type: str) -> Route:
    """A route to a file of the package, which is read once."""
    content = files("cascade_det.serving").joinpath("page").joinpath(name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(path, answer, methods=["GET"])


async def _refused(request: Request, error: UploadError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else {}
    # The rest of a body that is too large is not read: the connection cannot be used again.
    return JSONResponse({"error": str(error)}, error.status, {**headers, "Connection": "close"})


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _hung_up(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The detection failed; the log has the reason."}, 500)
