r"""Show detections on a web page: drop an image, move the slider of the exits.

cascade-det serve --config-file cells.yaml MODEL.WEIGHTS output/model_final.pth
cascade-det serve --config-file cells.yaml --front output/exits MODEL.WEIGHTS output/model_final.pth
curl --data-binary @photo.jpg 'http://127.0.0.1:8080/detect?setting=off'

The slider has no exits, the exits of the configuration, the default rules and the presets of
configs/exits; with --front, the points that cascade-det calibrate found.

Anyone who can reach the address may use it: there is no password. By default that is only this
machine.
"""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from cascade_det.commands.arguments import config_parser, real, whole
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError, ConfigError

logger = logging.getLogger(__name__)

_LIBRARIES = ("starlette", "uvicorn")


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__)
    parser.add_argument("--address", default="127.0.0.1", help="of this machine (127.0.0.1)")
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8080, help="0 for any free one (8080)"
    )
    parser.add_argument(
        "--front",
        type=Path,
        metavar="FILE",
        help="front.csv of cascade-det calibrate, or its folder: the settings of the slider",
    )
    parser.add_argument(
        "--max-upload-mib", type=real(0.001, 1024), default=20.0, help="of a file (20)"
    )
    parser.add_argument(
        "--max-megapixels", type=real(0.0001, 1000), default=50.0, help="of an image (50)"
    )
    parser.add_argument(
        "--queue", type=whole(0, 1000), default=8, help="images that wait while one is detected (8)"
    )
    parser.add_argument(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="under which browsers reach this machine, besides localhost and numeric addresses",
    )
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status, 128 plus the number of the signal that ended it."""
    args = _parse(argv, prog)
    from cascade_det.engine.log import setup_logging

    try:
        from cascade_det.serving.server import is_loopback, open_socket
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise CascadeDetError(
            f"serve needs {' and '.join(_LIBRARIES)} ({error}): pip install "
            f"{' '.join(_LIBRARIES)}, the extra [serve] of cascade_det"
        ) from error
    setup_logging()
    # Before the weights are read, so that a port in use is told at once.
    with open_socket(args.address, args.port) as bound:
        if not is_loopback(bound):
            logger.warning(
                "--address %s: everyone who can reach this machine there can use the detector, "
                "and sees what others do not encrypt. There is no password.",
                args.address,
            )
        return _serve(args, bound)


def _serve(args: argparse.Namespace, bound: socket.socket) -> int:
    from cascade_det import config
    from cascade_det.serving.app import DetectionService, Limits, create_app
    from cascade_det.serving.detection import ImageDetection
    from cascade_det.serving.exit_settings import ExitSettings
    from cascade_det.serving.server import serve
    from cascade_det.standalone import Predictor

    cfg = config.load_config(args.config_file, args.opts)
    config.check_config(cfg)
    config.require_detector(cfg)
    if cfg.CASCADE.SHADOW_SHARE > 0:
        raise ConfigError(
            f"CASCADE.SHADOW_SHARE is {cfg.CASCADE.SHADOW_SHARE:g}, but serve changes the exits "
            "from image to image and monitors none: set it to 0"
        )
    predictor = Predictor(cfg)
    settings = ExitSettings(cfg, predictor.detector, args.front)
    detection = ImageDetection(cfg, predictor)
    for setting in settings:
        detection.warm_up(setting)
    limits = Limits(
        upload_bytes=int(args.max_upload_mib * 2**20),
        pixels=int(args.max_megapixels * 1e6),
        waiting=args.queue,
    )
    service = DetectionService(detection, settings, predictor.class_names, limits)
    return serve(create_app(service, args.host_name), bound)
