"""The addresses of the page: answers, limits, and requests that are refused."""

import asyncio
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_masks

pytest.importorskip("starlette")
testclient = pytest.importorskip("starlette.testclient")

from cascade_det.core.structures import CascadeStats  # noqa: E402
from cascade_det.serving.app import DetectionService, Limits, create_app  # noqa: E402
from cascade_det.serving.detection import ImageDetection, describe_stats  # noqa: E402
from cascade_det.serving.exit_settings import ExitSettings  # noqa: E402
from cascade_det.serving.queue import BoundedQueue  # noqa: E402
from cascade_det.serving.uploads import FORMATS, UploadError  # noqa: E402

PAGE = Path(__file__).parents[2] / "cascade_det" / "serving" / "page"
LIMITS = Limits(upload_bytes=50_000, pixels=20_000, waiting=1, upload_seconds=1.0)


@pytest.fixture(scope="module")
def served(cfg_with, predictor_of):
    """The configuration, its predictor and settings."""
    cfg = cfg_with()
    predictor = predictor_of(cfg)
    return cfg, predictor, ExitSettings(cfg, predictor.detector)


@pytest.fixture
def make_client(served):
    """``make_client(detection=None, limits=LIMITS, host_names=())``."""
    cfg, predictor, settings = served
    started = []

    def make(detection=None, *, limits=LIMITS, host_names=(), raises=True):
        detection = detection or ImageDetection(cfg, predictor)
        service = DetectionService(detection, settings, predictor.class_names, limits)
        client = testclient.TestClient(
            create_app(service, host_names),
            base_url="http://127.0.0.1:8080",
            raise_server_exceptions=raises,
        )
        started.append(client.__enter__())
        return client

    yield make
    for client in started:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client):
    return make_client()


class TestAnswers:
    def test_detections_are_those_of_the_predictor(self, client, served, image):
        _, predictor, settings = served
        content, pixels = image()
        answer = client.post("/detect?setting=off", content=content).json()
        settings.get("off").apply(predictor.detector)
        wanted = predictor(pixels)
        assert len(wanted) > 3
        assert (answer["width"], answer["height"]) == (96, 80)
        assert [d["box"] for d in answer["detections"]] == wanted.boxes.tolist()
        assert [d["label"] for d in answer["detections"]] == [
            predictor.class_names[index] for index in wanted.classes.tolist()
        ]
        drawn = [coco_masks.decode(d["mask"]) for d in answer["detections"]]
        np.testing.assert_array_equal(drawn, wanted.paste(80, 96).numpy())

    def test_the_configured_setting_is_the_first(self, client, image):
        content, _ = image()
        assert client.post("/detect", content=content).json()["setting"] == "configuration"
        settings = client.get("/settings").json()
        assert settings["initial"] == "configuration"
        assert [s["name"] for s in settings["settings"]] == ["off", "configuration", "mobile"]
        assert [s["stages"] for s in settings["settings"]] == [3, 3, 2]
        assert settings["limits"] == {"upload_bytes": 50_000, "pixels": 20_000}

    def test_regions_add_up(self, client, image):
        answer = client.post("/detect?setting=mobile", content=image()[0]).json()
        stages = [answer["proposals"], *answer["stages"]]
        counts = [stages[0]["count"], *(stage["entered"] for stage in stages[1:]), 0]
        for stage, before, after in zip(stages, counts, counts[1:], strict=False):
            assert before - sum(stage["left"].values()) == after

    def test_tiles_where_a_gate_counted_some(self):
        stats = CascadeStats([0], [{}], tiles=850, tiles_open=85, tiles_computed=216)
        assert describe_stats(stats)["tiles"] == {"count": 850, "open": 85, "computed": 216}
        assert "tiles" not in describe_stats(CascadeStats([0], [{}]))

    @pytest.mark.parametrize("kind", FORMATS)
    def test_formats_by_content(self, client, image, kind):
        sent = {"content-type": "text/html"}
        answer = client.post("/detect", content=image(kind)[0], headers=sent)
        assert (answer.status_code, answer.json()["width"]) == (200, 96)

    def test_a_turned_webp_says_so(self, client, image):
        from PIL import Image

        exif = Image.Exif()
        exif[274] = 6
        for kind, orientation in (("WEBP", 6), ("JPEG", 1)):
            answer = client.post("/detect", content=image(kind, exif=exif)[0]).json()
            assert (answer["width"], answer["height"]) == (80, 96)
            assert answer["webp_orientation"] == orientation

    def test_a_body_in_chunks(self, client, image):
        content, _ = image()
        answer = client.post("/detect", content=iter([content[:100], content[100:]]))
        assert answer.json()["width"] == 96


def png_header(width, height):
    """A PNG that claims a size, with hardly any content."""
    chunks = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return chunks


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


class TestHostileUploads:
    @pytest.mark.parametrize(
        ("content", "status", "words"),
        [
            (b"", 400, "empty"),
            (b"<script>alert(1)</script>", 415, "not an image"),
            (b"\xff\xd8\xff", 415, "not an image"),
            (EPS, 415, "JPEG, PNG, WebP"),
            (b"/etc/passwd", 415, "not an image"),
            (png_header(30_000, 30_000), 413, "0.02 million pixels"),
            (png_header(100_000, 100_000), 413, "0.02 million pixels"),
            (png_header(2**31 - 1, 2**31 - 1), 413, "0.02 million pixels"),
            (png_header(201, 100), 413, "0.02 million pixels"),
            (png_header(100, 100), 422, "damaged"),
            (b"\0" * 50_001, 413, "MiB"),
        ],
    )
    def test_are_refused_with_a_reason(self, client, content, status, words):
        answer = client.post("/detect", content=content)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert words in answer.json()["error"]
        assert b"/" not in answer.json()["error"].encode()  # no path of the server

    def test_a_truncated_image(self, client, image):
        content = image("JPEG")[0]
        assert client.post("/detect", content=content[: len(content) // 2]).status_code == 422

    def test_an_endless_body_is_not_read(self, client):
        sent = []

        def endless():
            while True:
                sent.append(1)
                yield b"\xff" * 10_000

        # The test client joins the chunks first, so a server is asked for them one by one here.
        from cascade_det.serving.uploads import read_at_most

        async def chunks():
            for chunk in endless():
                yield chunk

        with pytest.raises(UploadError, match="larger"):
            asyncio.run(read_at_most(chunks(), None, 50_000))
        assert len(sent) == 6

    def test_a_length_that_is_no_number(self, client, image):
        for length in ("-1", "1e3", "9" * 5000):
            answer = client.post(
                "/detect", content=image()[0], headers={"content-length": length}
            ).status_code
            assert answer == (413 if length.isdecimal() else 200)

    def test_a_form_is_told_what_to_send(self, client):
        answer = client.post("/detect", files={"../../etc/passwd": b"x"})
        assert (answer.status_code, "--data-binary" in answer.text) == (415, True)

    @pytest.mark.parametrize("name", ["", "../off", "front1", "off%00", "<b>", "x" * 3000])
    def test_settings_that_do_not_exist(self, client, image, name):
        answer = client.post("/detect", params={"setting": name}, content=image()[0])
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            "There is no such setting. There are off, configuration, mobile."
        )

    @pytest.mark.parametrize(
        "path", ["/page/index.html", "/../app.py", "/%2e%2e/app.py", "/etc/passwd", "/settings/"]
    )
    def test_paths_that_do_not_exist(self, client, path):
        assert client.get(path).status_code == 404

    def test_methods(self, client):
        assert client.get("/detect").status_code == 405
        assert client.post("/").status_code == 405

    def test_an_error_of_the_detector_tells_nothing(self, make_client, image):
        def fail(content, setting):
            raise RuntimeError("secret /path")

        client = make_client(fail, raises=False)
        answer = client.post("/detect", content=image()[0])
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


class TestOtherSites:
    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "localhost@evil",
            "",
            "a b",
        ],
    )
    def test_names_that_are_not_ours(self, client, host):
        for method, path in (("GET", "/"), ("GET", "/settings"), ("POST", "/detect")):
            answer = client.request(method, path, headers={"host": host})
            assert answer.status_code == 421

    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST:99", "127.0.0.1:8080", "[::1]:8080", "192.168.0.7", "box"]
    )
    def test_names_that_are_ours(self, make_client, host):
        client = make_client(host_names=["Box"])
        assert client.get("/settings", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "http://127.0.0.1:9090", "null", "http://127.0.0.1"]
    )
    def test_a_post_from_another_origin(self, client, image, origin):
        answer = client.post("/detect", content=image()[0], headers={"origin": origin})
        assert answer.status_code == 403

    def test_a_post_from_our_own(self, client, image):
        for origin in ("http://127.0.0.1:8080", "https://127.0.0.1:8080"):
            answer = client.post("/detect", content=image()[0], headers={"origin": origin})
            assert answer.status_code == 200


class TestPage:
    def test_files_are_those_of_the_package_with_their_types(self, client):
        kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
        for file in PAGE.iterdir():
            is_page = file.name == "index.html"
            answer = client.get("/" if is_page else f"/{file.name}")
            assert answer.content == file.read_bytes()
            kind = "text/html" if is_page else kinds[file.suffix]
            assert answer.headers["content-type"].startswith(kind)

    def test_nothing_is_loaded_from_elsewhere_or_inline(self, client):
        policy = client.get("/").headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        for file in PAGE.iterdir():
            text = file.read_text().replace("http://www.w3.org/2000/svg", "")
            for bad in ("http:", "https:", "//cdn", "innerHTML", "style=", "onclick", "eval("):
                assert bad not in text, (file.name, bad)

    def test_every_answer_has_the_headers(self, client):
        for answer in (client.get("/"), client.get("/none"), client.post("/detect", content=b"x")):
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["cache-control"] == "no-store"
            assert "access-control-allow-origin" not in answer.headers


class TestQueue:
    def test_one_at_a_time_and_a_bounded_number_waits(self, make_client, image):
        begin, running, most = threading.Event(), [], []

        def detect(content, setting):
            running.append(1)
            most.append(len(running))
            begin.wait(10)
            running.pop()
            return {"width": 1, "height": 1, "detections": [], "milliseconds": {}}

        client = make_client(detect)
        statuses = []

        def post():
            statuses.append(client.post("/detect", content=image()[0]).status_code)

        threads = [threading.Thread(target=post) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(statuses) == 3)
        assert statuses == [503] * 3
        begin.set()
        for thread in threads:
            thread.join(10)
        assert sorted(statuses) == [200, 200, 503, 503, 503]
        assert set(most) == {1}
        post()
        assert statuses[-1] == 200

    def test_a_place_is_free_again(self):
        queue = BoundedQueue(lambda: None, 0)
        for _ in range(3):
            with queue.place(), pytest.raises(UploadError, match="Too many"), queue.place():
                pass
        queue.close()

    def test_a_request_that_is_given_up_is_not_begun(self):
        calls, begin = [], threading.Event()

        def work(name):
            calls.append(name)
            begin.wait(10)

        async def run():
            queue = BoundedQueue(work, 3)
            first, second, third = (queue.submit(name) for name in "abc")
            second.cancel()
            await asyncio.sleep(0)  # the event loop passes the cancellation on
            begin.set()
            await asyncio.gather(first, third)
            queue.close()

        asyncio.run(run())
        assert calls == ["a", "c"]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
