"""Reports in a real browser: Chromium of the system, where there is one."""

import shutil

import cv2
import numpy as np
import pytest
from reported_runs import HOSTILE, make_data, noisy_results, write_run

from cascade_det.report.pages.evaluation import write_evaluation_page
from cascade_det.report.pages.page import Grid, Section, render

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield browser
        browser.close()


class Opened:
    """A page that is open, and what it did."""

    def __init__(self, browser, file, *, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(120_000)
        self.page = context.new_page()
        self.requests, self.dialogs, self.messages = [], [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog), dialog.dismiss()))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.goto(file.as_uri(), wait_until="load")

    def __getitem__(self, expression):
        return self.page.evaluate(expression)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data")
    names = [*HOSTILE, "n" * 250]
    content = make_data(data, names, images=12)
    for image, name in zip(content["images"], names, strict=False):
        image["file_name"] = name
    more = {
        "notes": list(HOSTILE),
        "data": {"name": HOSTILE[2], "json_file": HOSTILE[0]},
        "config": {name: [HOSTILE[1], HOSTILE[2]] for name in HOSTILE},
    }
    write_run(folder, data, content, noisy_results(content), **more)
    grey = cv2.cvtColor(np.full((90, 120), 128, np.uint8), cv2.COLOR_GRAY2BGR)
    return write_evaluation_page(folder, read_image=lambda _: grey)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_hostile_names_run_nothing_and_load_nothing(browser, hostile, width, scheme):
    opened = Opened(browser, hostile, width=width, scheme=scheme)
    opened.page.wait_for_timeout(200)
    assert opened["window.hit"] is None
    assert opened.dialogs == opened.messages == []
    # Pictures are in the page.
    others = [url for url in opened.requests if not url.startswith("data:image/webp")]
    assert others == [hostile.as_uri()]
    assert opened["document.scripts.length"] == 0
    assert opened["document.title"] == f"Evaluation on {HOSTILE[2]}"
    shown = opened["document.body.textContent"]
    assert all(name in shown for name in HOSTILE if "\u202e" not in name)
    loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    opened["document.querySelectorAll('details').forEach(d => d.open = true)"]
    assert opened[loaded]
    # Tables scroll, the page does not.
    assert opened["document.documentElement.scrollWidth"] == width
    light = sum(
        map(int, opened["getComputedStyle(document.body).backgroundColor"][4:-1].split(","))
    )
    assert (light > 600) == (scheme == "light")
    drawn = opened["getComputedStyle(document.querySelector('svg text')).fill"]
    assert (sum(map(int, drawn[4:-1].split(","))) < 400) == (scheme == "light")


def test_the_policy_stops_what_a_template_would_let_through(browser, tmp_path):
    """Were a text not escaped, the browser would still run and load nothing."""
    page = render("t", [], [Section("a", "b", [Grid("", ("PLACE",), [])])])
    attack = (
        "<script>window.hit = 1</script><img src='x' onerror='window.hit = 2'>"
        "<img src='http://127.0.0.1:9/a.png'><iframe src='http://127.0.0.1:9/'></iframe>"
        "<link rel='stylesheet' href='http://127.0.0.1:9/a.css'>"
    )
    file = tmp_path / "page.html"
    file.write_text(page.replace("PLACE", attack))
    opened = Opened(browser, file)
    opened.page.wait_for_timeout(200)
    assert opened["window.hit"] is None
    assert any("Content Security Policy" in message for message in opened.messages)
    file.write_text(page.replace("PLACE", attack).replace("Content-Security-Policy", "x"))
    assert Opened(browser, file)["window.hit"] in (1, 2)


def test_paper_is_white_for_a_dark_screen_too(browser, hostile):
    opened = Opened(browser, hostile, scheme="dark")
    opened.page.emulate_media(media="print")
    assert opened["getComputedStyle(document.body).backgroundColor"] == "rgb(255, 255, 255)"


def test_links_of_the_contents_lead_to_their_sections(browser, hostile):
    opened = Opened(browser, hostile, width=380)
    opened.page.click("nav a[href='#latency']")
    assert -1 <= opened["document.getElementById('latency').getBoundingClientRect().top"] < 400
    assert opened.requests[1:] == [u for u in opened.requests[1:] if u.startswith("data:")]
