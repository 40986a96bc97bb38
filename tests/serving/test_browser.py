"""The page in a real browser, where one and playwright are installed."""

import base64
import io
import re
import shutil
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_masks

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

from cascade_det.serving.app import DetectionService, Limits, create_app  # noqa: E402
from cascade_det.serving.detection import ImageDetection  # noqa: E402
from cascade_det.serving.exit_settings import ExitSettings  # noqa: E402
from cascade_det.serving.server import open_socket, page_address  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# Without them it looks for its maker's servers.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]

pytestmark = [
    pytest.mark.needs_browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def address(cfg_with, predictor_of):
    """The page of the detector whose class names try to be markup, in a thread."""
    cfg = cfg_with("MODEL.CASCADE.EXIT.THRESHOLDS", "(0.6, 0.7)")
    predictor = predictor_of(cfg)
    service = DetectionService(
        ImageDetection(cfg, predictor),
        ExitSettings(cfg, predictor.detector),
        predictor.class_names,
        Limits(upload_bytes=200_000),
    )
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, ws="none"))
    with open_socket("127.0.0.1", 0) as bound:
        bound.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield page_address(bound)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The loaded page; whatever it complains of is an error at the end."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, complaints = context.new_page(), []
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append("a script of a name ran"))
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("#setting:not(:empty)")
    yield page
    context.close()
    assert complaints == []
    assert all(url.startswith((address, "blob:")) for url in requested)


def choose(page, name, content):
    """Choose a file, and return the server's answer when it is shown."""
    with page.expect_response(re.compile("/detect")) as response:
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
    answer = response.value.json()
    page.wait_for_selector("#status:empty", state="attached")
    return answer


def rows(page):
    return page.locator("#table tbody tr").all_inner_texts()


def set_score(page, value):
    page.locator("#score").fill(str(value))


def test_what_is_found_is_shown_as_text(page, image):
    answer = choose(page, "<b>x.png", image()[0])
    set_score(page, 0)
    found = answer["detections"]
    assert len(found) > 5
    shown = [row.split("\t") for row in rows(page)]
    assert [row[0] for row in shown] == [d["label"] for d in found]
    assert [float(row[1]) for row in shown] == pytest.approx([d["score"] for d in found], abs=6e-4)
    assert [int(row[2]) for row in shown] == [d["exit_stage"] for d in found]
    assert len({d["exit_stage"] for d in found}) == 2
    for words, part in (
        ("left after stage 0", "#legend"),
        ("stage 1", "#regions"),
        ("confident", "#regions"),
        ("gate 1", "#times"),
        ("backbone", "#times"),
    ):
        assert words in page.locator(part).inner_text()
    page.locator('input[value="class"]').check()
    assert found[0]["label"] in page.locator("#legend").inner_text()
    assert page.locator("main img").count() == 0  # none of the names became one


def test_the_score_threshold_needs_no_request(page, image):
    answer = choose(page, "a.png", image()[0])
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    for least in (0, 0.35, 0.6, 1):
        set_score(page, least)
        wanted = [d["label"] for d in answer["detections"] if d["score"] >= least]
        assert [row.split("\t")[0] for row in rows(page)] == wanted
    assert requests == []


def test_the_slider_of_exits_by_keyboard(page, image):
    choose(page, "a.png", image()[0])
    slider = page.locator("#exits")
    assert slider.get_attribute("aria-valuetext") == "exits of the configuration"
    slider.focus()
    for key, setting, stages in (("Home", "off", 3), ("End", "mobile", 2)):
        with page.expect_response(re.compile(f"setting={setting}")) as response:
            page.keyboard.press(key)
        answer = response.value.json()
        page.wait_for_selector("#status:empty", state="attached")
        entered = page.locator("#regions .number").all_inner_texts()
        assert [int(n) for n in entered[1:]] == [s["entered"] for s in answer["stages"]]
        assert len(entered) == 1 + stages
    assert slider.get_attribute("aria-valuetext") == "preset mobile"


def test_a_row_by_keyboard_marks_its_box(page, image):
    choose(page, "a.png", image()[0])
    set_score(page, 0)
    page.locator("#table tbody tr").first.focus()
    drawn = []
    for key in ("ArrowDown", "ArrowDown", "End"):
        page.keyboard.press(key)
        assert page.locator("tr.chosen").count() == 1
        drawn.append(page.evaluate("document.getElementById('canvas').toDataURL()"))
    assert len(set(drawn)) == 3


def test_boxes_are_drawn_where_they_are(page, image):
    answer = choose(page, "a.png", image()[0])
    for option in ("#labels", "#masks"):
        page.locator(option).uncheck()
    best = answer["detections"][0]
    set_score(page, int(best["score"] * 100) / 100)
    before = canvas(page)
    set_score(page, 1)
    changed = np.flatnonzero((canvas(page) != before).any(axis=2))
    down, across = np.unravel_index(changed, before.shape[:2])
    scale = before.shape[1] / 96
    near = [across.min() / scale, down.min() / scale, across.max() / scale, down.max() / scale]
    line = 4 / scale
    inside = np.clip(best["box"], 0, [96, 80, 96, 80])
    assert np.abs(np.array(near) - inside).max() < line + 1


def canvas(page):
    """The pixels of the canvas, uint8 ``[h, w, 3]``."""
    address = page.evaluate("document.getElementById('canvas').toDataURL()")
    file = io.BytesIO(base64.b64decode(address.partition(",")[2]))
    return np.asarray(Image.open(file).convert("RGB"))


def test_masks_are_read_as_pycocotools_reads_them(page):
    generator = np.random.default_rng(0)
    masks = [generator.random((37, 53)) < share for share in (0, 0.02, 0.5, 0.98, 1)]
    masks.append(np.kron(generator.random((4, 5)) < 0.5, np.ones((300, 200))) > 0)
    for mask in masks:
        counts = coco_masks.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        runs = page.evaluate(
            "async (counts) => (await import('/picture.js')).runsOf(counts)", counts
        )
        flat = np.repeat(np.arange(len(runs)) % 2, runs)
        np.testing.assert_array_equal(flat, mask.flatten(order="F"))


def test_images_are_shown_as_the_detector_sees_them(page, image):
    turned = [("JPEG", 6), ("PNG", 6), *(("WEBP", orientation) for orientation in range(1, 9))]
    set_score(page, 1)
    for kind, orientation in turned:
        exif = Image.Exif()
        exif[274] = orientation
        content, _ = image(kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        choose(page, "a", content)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        shown = Image.fromarray(canvas(page)).resize(wanted.size)
        difference = np.asarray(shown).astype(int) - np.asarray(wanted)
        assert np.abs(difference).mean() < 6, (kind, orientation)


def test_what_is_wrong_is_said(page, image):
    def complaint(content):
        page.set_input_files("#file", {"name": "a", "mimeType": "image/png", "buffer": content})
        page.wait_for_selector("#error:not([hidden])")
        return page.locator("#error").inner_text()

    assert "not an image" in complaint(b"<script>alert(1)</script>")
    assert "larger than" in complaint(b"\0" * 200_001)
    choose(page, "good.png", image()[0])
    page.wait_for_selector("#error", state="hidden")


def test_an_image_can_be_dropped(page, image):
    content = list(image()[0])
    with page.expect_response(re.compile("/detect")):
        page.evaluate(
            """(content) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(content)], "x.png", { type: "image/png" }));
              const target = document.getElementById("drop");
              for (const name of ["dragover", "drop"]) {
                const options = { bubbles: true, cancelable: true, dataTransfer: data };
                target.dispatchEvent(new DragEvent(name, options));
              }
            }""",
            content,
        )
    page.wait_for_selector("#table tbody tr", state="attached")


def test_nothing_is_wider_than_the_window(page, image):
    choose(page, "a.png", image(width=160)[0])
    set_score(page, 0)
    for width in (1400, 800, 380, 320):
        page.set_viewport_size({"width": width, "height": 800})
        # Twice: the picture is drawn in its new size before the second one.
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown, room = page.evaluate(
            "[canvas, canvas.parentElement].map((e) => e.getBoundingClientRect().width)"
        )
        assert 0 < shown <= room
