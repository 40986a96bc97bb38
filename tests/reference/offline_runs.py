"""A small detector with masks on drawn weights, and images of all kinds."""

import io
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_det.config import load_config
from cascade_det.offline.images import list_images
from cascade_det.standalone import build_detector

INSTANT = str(
    Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
)
OPTIONS = (
    "MODEL.MASK_ON",
    True,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    0.1,
    "MODEL.DEVICE",
    "cpu",
    "TEST.DETECTIONS_PER_IMAGE",
    8,
)


def write_images(folder, count):
    """Small images in a new folder, which is returned."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(drawn(number))
    return folder


def drawn(seed, suffix=".png", orientation=None):
    """The content of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, {".png": "PNG", ".jpg": "JPEG"}[suffix], exif=exif)
    return file.getvalue()


@pytest.fixture(scope="session")
def detector_weights(tmp_path_factory):
    """A file of drawn weights that name their classes, not from 1 on."""
    torch.manual_seed(0)
    cfg = load_config(INSTANT, list(OPTIONS))
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    run = {"class_names": [f"thing {i}" for i in range(count)]}
    run["category_ids"] = [3 * i + 5 for i in range(count)]
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = build_detector(cfg).state_dict()
    for name in state:
        if name.endswith("cls_score.weight"):
            state[name] *= 30  # so that scores differ
    torch.save({"model": state, "run": run}, path)
    return path


@pytest.fixture
def detector_cfg(detector_weights):
    """``detector_cfg(*options)``: the configuration of that detector."""
    return lambda *options: load_config(
        INSTANT, [*OPTIONS, "MODEL.WEIGHTS", str(detector_weights), *options]
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with images: turned, of odd and of equal names, broken, and repeated."""
    folder = tmp_path_factory.mktemp("photos")
    files = {
        "a.png": drawn(1),
        "b turned.jpg": drawn(2, ".jpg", orientation=6),
        "c broken.png": drawn(3)[:200],
        "d \N{SNOWMAN} ñ.png": drawn(4),
        "e again.png": drawn(1),
        "night/a.png": drawn(5),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no image")
    return folder


@contextmanager
def served(folder, before=lambda: None):
    """The address of a server of a folder's files; ``before()`` is called before each answer."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            before()
            super().do_GET()

        def log_message(self, *_):
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients are killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def with_other_weights(source, target):
    """Copy a checkpoint with other values."""
    content = torch.load(source)
    next(value for value in content["model"].values() if value.dtype.is_floating_point).add_(1)
    torch.save(content, target)


def in_this_process(job, parts):
    """An engine without processes."""
    # Here, since tests of other rooms are collected where pyarrow is absent.
    from cascade_det.offline.worker import PartWorker

    yield from map(PartWorker(job).run, parts)


def detect(cfg, images, output, engine=in_this_process, part_size=2, **others):
    """``detect_in_parts`` in images given as ``predict`` takes them."""
    from cascade_det.offline.run import detect_in_parts

    entries = list_images([str(image) for image in images], others.pop("root", None))
    return detect_in_parts(
        cfg, entries, str(output), engine, part_size=part_size, readers=2, **others
    )


def rows_of(output):
    """All rows of a run on this machine, in the order of its parts, without milliseconds."""
    from cascade_det.offline.parquet import read_rows

    files = sorted((Path(output) / "parts").iterdir())
    rows = [row for file in files for row in read_rows(str(file))]
    assert all((row.pop("milliseconds") is None) == (row["error"] is not None) for row in rows)
    return rows
