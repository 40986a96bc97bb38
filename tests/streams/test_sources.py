"""What names stand for, images of a server, cameras and folders that are watched."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from PIL import Image
from small_videos import make_video

from cascade_det.data.watched_folder import WatchedFolders
from cascade_det.data.web_images import WebImage
from cascade_det.errors import DatasetError
from cascade_det.streams import camera
from cascade_det.streams.camera import CameraSource
from cascade_det.streams.frames import BadFrame, Frame
from cascade_det.streams.images import ImageSource, WatchedSource
from cascade_det.streams.sources import find_sources, watch
from cascade_det.streams.video import VideoSource


def image(path, grey=100, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), grey, np.uint8)).save(path)
    return path.read_bytes()


@pytest.fixture
def server(tmp_path):
    """An address, and the answers that it gives: (status, headers, content) by path."""
    answers, seen = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            status, headers, content = answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}", answers, seen
    httpd.shutdown()
    httpd.server_close()


def test_images_of_a_server(server, tmp_path):
    place, answers, seen = server
    content = image(tmp_path / "a.png")
    answers["/a%20b.png?x=1"] = (200, {}, content)
    answers["/moved"] = (302, {"Location": "/a%20b.png?x=1"}, b"")
    plain = WebImage(f"http://{place}/a%20b.png?x=1")
    assert (plain.stem, str(plain)) == ("a b", f"http://{place}/a%20b.png?x=1")
    assert (plain.read() == 100).all()
    secret = WebImage(f"http://me:p%40ss@{place}/moved")
    assert str(secret) == f"http://{place}/moved"
    assert "ss" not in repr(secret)
    assert secret.read().shape == (20, 30, 3)
    # Not sent to where it was redirected.
    basic = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert seen[-2:] == [("/moved", basic), ("/a%20b.png?x=1", None)]


def test_what_a_server_should_not_send(server, tmp_path):
    place, answers, _ = server
    content = image(tmp_path / "a.png")
    (tmp_path / "secret.png").write_bytes(content)
    answers["/text"] = (200, {}, b"<html>")
    answers["/video"] = (200, {"Content-Type": "multipart/x-mixed-replace"}, content)
    answers["/file"] = (302, {"Location": f"file://{tmp_path}/secret.png"}, b"")
    answers["/ftp"] = (302, {"Location": "ftp://127.0.0.1/a.png"}, b"")
    answers["/eps"] = (200, {}, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    answers["/short"] = (200, {"Content-Length": str(len(content) + 9)}, content)
    for path, reason in (
        ("missing", "404|Not Found"),
        ("text", "cannot be read as an image"),
        ("eps", "UnidentifiedImageError"),
        ("video", r"write video\+ before"),
        *(
            ("file", "cannot be fetched"),
            ("ftp", "is not followed"),
            ("short", "ended after|fetched"),
        ),
    ):
        with pytest.raises(DatasetError, match=reason) as error:
            WebImage(f"http://user:password@{place}/{path}").read(timeout=5)
        assert "password" not in str(error.value)
    answers["/big"] = (200, {}, content)
    with pytest.raises(DatasetError, match="has more than 50 bytes"):
        WebImage(f"http://{place}/big").read(most_bytes=50)
    with pytest.raises(DatasetError, match="cannot be fetched"):
        WebImage("http://127.0.0.1:1/a.png").read(timeout=5)


@pytest.mark.parametrize(
    "address", ["http://[::1", "https://me:secret@host:port/a.png", "rtsp://:99999/x", "http:///a"]
)
def test_what_is_no_address_is_told(address):
    with pytest.raises(DatasetError, match="is not an address") as error:
        find_sources([address])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("path", ["/..%2F..%2Fetc%2Fpasswd", "/%2e%2e", "/", "/a%00%0ab.png"])
def test_an_address_names_no_file_outside_the_folder(path):
    stem = WebImage(f"http://host{path}").stem
    assert stem not in ("", ".", "..")
    assert not set(stem) & {"/", "\\", "\0", "\n"}


def test_names_stand_for_files_addresses_and_lists(tmp_path, monkeypatch, server):
    place, answers, _ = server
    monkeypatch.chdir(tmp_path)
    content = image(tmp_path / "in" / "b.png", 20)
    image(tmp_path / "in" / "a.png", 10)
    (tmp_path / "7").write_bytes(content)
    answers["/w.png"] = (200, {}, content)
    listed = ["in/a.png\n", "\n", " \r\n", f"http://{place}/w.png\n", "in/a.png\r\n"]
    (source,) = find_sources(["in/b.png", "-", "in", "7"], listed)
    assert isinstance(source, ImageSource)
    assert [str(o) for o in source.origins] == [
        "in/b.png",
        "in/a.png",
        f"http://{place}/w.png",
        "7",
    ]
    assert source.length == 4
    frames = list(source.frames())
    assert [int(f.pixels[0, 0, 0]) for f in frames] == [20, 10, 20, 20]
    with pytest.raises(DatasetError, match="--input -: the list has no names"):
        find_sources(["-"], ["\n"])
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "x*.png", "nothing.mp4"):
        with pytest.raises(DatasetError, match="is neither an existing file"):
            find_sources([missing])


def test_videos_and_images_keep_their_order(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    make_video(tmp_path / "v1.mp4", frames=2)
    make_video(tmp_path / "v2.avi", frames=3)
    sources = find_sources(["a.png", "v?.*", "b.png", "v1.mp4"])
    assert [type(s) for s in sources] == [ImageSource, VideoSource, VideoSource, ImageSource]
    assert [f.name for s in sources for f in s.frames()] == [
        *("a.png", "v1.mp4#0", "v1.mp4#1", "v2.avi#0", "v2.avi#1", "v2.avi#2", "b.png")
    ]


def test_videos_of_a_server(server, tmp_path):
    pytest.importorskip("av")
    place, answers, seen = server
    make_video(tmp_path / "a.mkv", codec="libx264", frames=4)
    answers["/a.mkv"] = (200, {}, (tmp_path / "a.mkv").read_bytes())
    (source,) = find_sources([f"http://me:secret@{place}/a.mkv"])
    assert not seen  # opened when it is its turn
    assert [f.name for f in source.frames()] == [f"http://{place}/a.mkv#{i}" for i in range(4)]
    assert (source.live, source.length, source.stem) == (False, None, "a")
    # A camera that sends one image after the other.
    _, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))
    part = b"--x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
    kind = {"Content-Type": "multipart/x-mixed-replace; boundary=x"}
    answers["/live"] = (200, kind, 3 * (part % (len(jpeg), jpeg.tobytes())) + b"--x--\r\n")
    (camera,) = find_sources([f"video+http://{place}/live"])
    frames = [frame for frame in camera.frames() if isinstance(frame, Frame)]
    assert len(frames) >= 2
    assert all(abs(frame.pixels.astype(int) - 90).max() < 4 for frame in frames)
    (gone,) = find_sources([f"http://me:secret@{place}/gone.mp4"])
    (bad,) = gone.frames()
    assert bad.reason.startswith("cannot be opened as a video")
    assert "secret" not in f"{bad.origin} {bad.reason}"


def test_a_camera_until_it_is_taken_away(monkeypatch):
    calls = []

    class Capture:
        def __init__(self, index):
            assert index < 2**31  # otherwise OpenCV fails
            self.index, self.left = index, 3

        def isOpened(self):
            return self.index == 2

        def get(self, key):
            return 15.0 if key == cv2.CAP_PROP_FPS else 0.0

        def read(self):
            self.left -= 1
            return self.left >= 0, np.full((4, 6, 3), max(self.left, 0), np.uint8)

        def release(self):
            calls.append("released")

    monkeypatch.setattr(camera.cv2, "VideoCapture", Capture)
    for number in ("0", str(2**31)):
        with pytest.raises(DatasetError, match=f"--input {number}: there is no camera"):
            find_sources([number])
    (source,) = find_sources(["2"])
    assert isinstance(source, CameraSource)
    assert (source.live, source.rate, str(source), source.stem) == (
        True,
        15,
        "camera 2",
        "camera_2",
    )
    *frames, last = source.frames()
    assert [(f.number, int(f.pixels[0, 0, 0])) for f in frames] == [(0, 2), (1, 1), (2, 0)]
    assert [f.seconds for f in frames] == sorted(f.seconds for f in frames)
    assert isinstance(last, BadFrame)
    assert calls == ["released"]


class Watched:
    """A watched folder whose clock and sleep are those of the test."""

    def __init__(self, folder, patience=5.0):
        self.now = 0.0
        folders = WatchedFolders(
            [folder], patience=patience, clock=lambda: self.now, sleep=self.sleep
        )
        self.frames = WatchedSource(folders).frames()

    def sleep(self, seconds):
        self.now += seconds

    def look(self, times=1):
        """The frames of so many looks."""
        found = []
        for _ in range(times):
            while (frame := next(self.frames)) is not None:
                found.append(frame)
        return found


def test_a_watched_image_comes_once_and_whole(tmp_path):
    content = image(tmp_path / "there.png", 1)
    watched = Watched(tmp_path)
    assert watched.look() == []
    assert [f.name for f in watched.look()] == [str(tmp_path / "there.png")]
    assert watched.look(5) == []
    with (tmp_path / "grows.png").open("wb", buffering=0) as file:
        for start in range(0, len(content), 40):
            file.write(content[start : start + 40])
            assert watched.look() == []
    (tmp_path / "half.png").write_bytes(content[:60])
    (tmp_path / ".hidden.png").write_bytes(content)
    (tmp_path / "a.png.part").write_bytes(content)
    found = watched.look(4)
    assert [f.name for f in found] == [str(tmp_path / "grows.png")]
    assert (found[0].pixels == 1).all()
    with (tmp_path / "half.png").open("ab") as file:
        file.write(content[60:])
    assert [type(f) for f in watched.look(3)] == [Frame]
    # A new file may have the name of one that was removed.
    (tmp_path / "half.png").unlink()
    assert watched.look() == []
    image(tmp_path / "half.png", 9)
    (again,) = watched.look(2)
    assert (again.pixels == 9).all()


def test_a_watched_file_that_stays_broken_is_told_once(tmp_path):
    watched = Watched(tmp_path, patience=5)
    (tmp_path / "a.png").write_bytes(b"no image")
    (bad,) = watched.look(40)
    assert isinstance(bad, BadFrame)
    assert "cannot be read as an image" in bad.reason
    assert watched.now >= 5
    # A slow writer was only waiting.
    image(tmp_path / "a.png", 1)
    (found,) = watched.look(9)
    assert (found.pixels == 1).all()


def test_a_folder_that_is_away_for_a_while_has_nothing_new(tmp_path):
    folder = tmp_path / "net"
    image(folder / "a.png")
    watched = Watched(folder)
    assert len(watched.look(3)) == 1
    folder.rename(tmp_path / "away")
    assert watched.look(2) == []
    (tmp_path / "away").rename(folder)
    assert watched.look(3) == []
    with pytest.raises(DatasetError, match="only folders are watched"):
        watch([str(folder / "a.png")])
