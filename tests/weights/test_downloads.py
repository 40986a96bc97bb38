"""A download is the file, whole and right, or an error that names the address."""

import hashlib
import http.client
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from urllib import request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.errors import DownloadError
from cascade_det.weights import downloads, transfer
from cascade_det.weights.downloads import download
from tests.reference.web_server import Fault, serving

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
PROGRAM = """
import logging, sys
from pathlib import Path
from cascade_det.weights.downloads import download
logging.basicConfig(level=logging.INFO)
download(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        server.files["/a.bin"] = CONTENT
        yield server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "a.bin"


def fetch(web, path, **arguments):
    arguments = {"attempts": 3, "pause": 0.001, "timeout": 5, **arguments}
    download(web.address("/a.bin"), path, **arguments)


def left_beside(path):
    return sorted(name for name in os.listdir(path.parent) if name != path.name + ".lock")


def test_a_file_is_fetched_once(web, path):
    for _ in range(2):
        fetch(web, path, sha256=DIGEST)
    assert path.read_bytes() == CONTENT
    assert len(web.requests) == 1
    assert left_beside(path) == ["a.bin"]


@pytest.mark.parametrize("digits", [64, 8])
def test_a_file_that_is_there_is_held_against_its_checksum(web, path, digits):
    path.parent.mkdir()
    path.write_bytes(OTHER)
    fetch(web, path)
    fetch(web, path, sha256=hashlib.sha256(OTHER).hexdigest()[:digits])
    with pytest.raises(DownloadError, match=rf"^{path}: its SHA-256 is .* Delete it"):
        fetch(web, path, sha256=DIGEST[:digits])
    assert path.read_bytes() == OTHER
    assert web.requests == []
    path.unlink()
    fetch(web, path, sha256=DIGEST[:digits])
    assert path.read_bytes() == CONTENT


def test_what_another_process_fetched_meanwhile_is_checked_too(web, path):
    web.faults = [Fault(stall=0.3)]
    other = Thread(target=fetch, args=(web, path))
    other.start()
    while not web.requests:
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="Delete it"):
        fetch(web, path, sha256=hashlib.sha256(OTHER).hexdigest())
    other.join()
    assert path.read_bytes() == CONTENT


def test_an_empty_file(web, path):
    web.files["/a.bin"] = b""
    fetch(web, path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("cuts", [[0], [1], [5000], [len(CONTENT) - 1], [100, 200, 300, 400, 500]])
def test_a_broken_transfer_goes_on_where_it_broke(web, path, cuts):
    web.faults = [Fault(cut=cut) for cut in cuts]
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert web.sent == len(CONTENT)
    starts = [sum(cuts[:i]) for i in range(1, len(cuts) + 1)]
    assert web.ranges == [None, *(f"bytes={start}-" if start else None for start in starts)]


def test_the_next_call_goes_on_as_well(web, path):
    web.faults = [Fault(cut=6000), Fault(cut=0), Fault(cut=0)]
    with pytest.raises(
        DownloadError, match=r"a\.bin: the transfer broke off .* 6,000 bytes, which"
    ):
        fetch(web, path)
    assert not path.exists()
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert web.sent == len(CONTENT)
    assert left_beside(path) == ["a.bin"]


def test_what_is_whole_but_has_no_name_yet_is_not_fetched_again(web, path):
    web.faults = [Fault(cut=6000)] * 3
    with pytest.raises(DownloadError):
        fetch(web, path, attempts=1)
    Path(f"{path}.part").write_bytes(CONTENT)  # killed between the last byte and the name
    before = len(web.requests)
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert len(web.requests) == before


def test_a_server_without_ranges_starts_over(web, path):
    web.faults = [Fault(cut=3000, ignores_range=True), Fault(cut=9000, ignores_range=True)]
    web.faults += [Fault(ignores_range=True)]
    fetch(web, path)
    assert path.read_bytes() == CONTENT


def test_breaking_at_the_same_place_forever_ends(web, path):
    web.faults = [Fault(cut=3000, ignores_range=True)] * 20
    with pytest.raises(DownloadError, match="broke off"):
        fetch(web, path)
    assert len(web.requests) == 3


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("etag", [True, False])
@pytest.mark.parametrize("sha256", ["", hashlib.sha256(OTHER).hexdigest()])
def test_halves_of_two_files_are_never_one(web, path, etag, knows_if_range, sha256):
    web.etag, web.knows_if_range = etag, knows_if_range
    web.faults = [Fault(cut=6000)]
    with pytest.raises(DownloadError):
        fetch(web, path, attempts=1)
    web.files["/a.bin"] = OTHER
    fetch(web, path, sha256=sha256)
    assert path.read_bytes() == OTHER


def test_last_modified_serves_where_there_is_no_strong_etag(web, path):
    date = {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT", "ETag": 'W/"weak"'}
    web.knows_if_range = False
    web.faults = [Fault(cut=6000, headers=date), Fault(headers=date)]
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert web.requests[1][1]["If-Range"] == date["Last-Modified"]
    assert web.sent == len(CONTENT)


@pytest.mark.parametrize("sha256", ["", DIGEST])
def test_nothing_is_written_through_a_planted_link(web, path, sha256):
    """As in a shared cache."""
    path.parent.mkdir()
    theirs = path.with_name("theirs")
    theirs.write_bytes(b"theirs")
    Path(f"{path}.part").symlink_to(theirs)
    if sha256:  # What is there could be the beginning of the file.
        with pytest.raises(DownloadError, match="cannot be stored"):
            fetch(web, path, sha256=sha256)
    else:
        fetch(web, path)
        assert path.read_bytes() == CONTENT
        assert not path.is_symlink()
    assert theirs.read_bytes() == b"theirs"


def test_a_part_longer_than_the_file_is_given_up(web, path):
    web.faults = [Fault(body=CONTENT * 2, cut=15_000)]
    with pytest.raises(DownloadError):
        fetch(web, path, attempts=1)
    web.etag = False  # the server has the shorter file now, and would not notice
    fetch(web, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("tag", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 3}'])
def test_a_damaged_tag_costs_the_part(web, path, tag):
    path.parent.mkdir()
    Path(f"{path}.part").write_bytes(OTHER[:100])
    Path(f"{path}.part.json").write_bytes(tag)
    fetch(web, path)
    assert path.read_bytes() == CONTENT


def test_more_promised_than_sent(web, path):
    web.faults = [Fault(length=20_000), *[Fault(status=503)] * 2]
    with pytest.raises(DownloadError, match="503"):
        fetch(web, path)
    assert not path.exists()


def test_less_promised_than_sent_is_found_by_the_checksum(web, path):
    web.faults = [Fault(length=5000)]
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(web, path, sha256=DIGEST)
    assert left_beside(path) == []


def test_wrong_bytes_are_no_file(web, path):
    web.faults = [Fault(body=OTHER)]
    with pytest.raises(DownloadError, match=f"a.bin: the SHA-256.*should be {DIGEST[:8]};"):
        fetch(web, path, sha256=DIGEST[:8])
    assert left_beside(path) == []
    assert len(web.requests) == 1


def test_wrong_bytes_in_the_first_half_are_mended(web, path):
    web.etag = False
    web.faults = [Fault(body=OTHER, cut=5000)]
    fetch(web, path, sha256=DIGEST)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_troubles_pass(web, path, status):
    web.faults = [Fault(status=status, body=b"busy")] * 2
    fetch(web, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusals_are_final(web, path, status):
    web.faults = [Fault(status=status)]
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1.*a\.bin: the server answers {status}"):
        fetch(web, path)
    assert len(web.requests) == 1


def test_a_server_that_never_recovers(web, path, monkeypatch):
    pauses = []
    monkeypatch.setattr(downloads.time, "sleep", pauses.append)
    web.faults = [Fault(status=500)] * 10
    with pytest.raises(DownloadError, match=r"a\.bin: the server answers 500"):
        fetch(web, path, attempts=4, pause=1)
    assert len(web.requests) == 4
    assert [pause for pause in pauses if pause] == [1, 2, 4]


def test_no_server_at_all(web, path):
    web.server_close()
    with pytest.raises(DownloadError, match=r"a\.bin: no answer.*refused"):
        fetch(web, path)


def test_a_silent_server(web, path):
    web.faults = [Fault(stall=0.5)] * 2
    with pytest.raises(DownloadError, match="timed out"):
        fetch(web, path, timeout=0.05, attempts=2)


def test_redirects_to_the_web_are_followed(web, path):
    web.files["/b.bin"] = OTHER
    web.faults = [Fault(status=302, headers={"Location": "/b.bin"}), Fault(cut=3000)]
    web.faults += [Fault(status=307, headers={"Location": web.address("/b.bin")})]
    fetch(web, path)
    assert path.read_bytes() == OTHER
    assert web.sent == len(OTHER) + 2 * len(CONTENT)  # the redirects of this server have bodies


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.bin", "data:,abc"])
def test_redirects_elsewhere_are_refused(web, path, target):
    web.faults = [Fault(status=302, headers={"Location": target})]
    with pytest.raises(DownloadError, match=rf"a\.bin.*{target[:4]}"):
        fetch(web, path)
    assert left_beside(path) == []
    assert len(web.requests) == 1


class HttpsWithoutEncryption(request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(http.client.HTTPConnection, req)


@pytest.mark.parametrize("sha256", ["", DIGEST])
def test_redirects_do_not_leave_encryption(web, path, monkeypatch, sha256):
    opener = request.build_opener(transfer._WebRedirects, HttpsWithoutEncryption)
    monkeypatch.setattr(transfer, "_OPENER", opener)
    plain = web.address("/b.bin")
    safe = plain.replace("http://", "https://")
    web.files["/b.bin"] = CONTENT
    web.faults = [Fault(status=302, headers={"Location": target}) for target in (safe, plain)]
    with pytest.raises(DownloadError, match=f"redirects to {plain}"):
        download(safe, path, sha256=sha256)
    assert left_beside(path) == []
    web.faults = [Fault(status=302, headers={"Location": safe})]
    download(safe, path, sha256=sha256)
    assert path.read_bytes() == CONTENT


def test_redirects_in_a_circle(web, path):
    web.faults = [Fault(status=302, headers={"Location": "/a.bin"})] * 50
    with pytest.raises(DownloadError, match="redirect"):
        fetch(web, path)


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "ftp://h/a", "data:,abc", "/etc/passwd", "http:/a", "http://", ""],
)
def test_other_schemes_are_refused(path, address):
    with pytest.raises(DownloadError, match="only http"):
        download(address, path)
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "address", ["http://h:port/a", "http://a b/c", "http://[::1/a", "http://ä/ä"]
)
def test_broken_addresses(path, address):
    with pytest.raises(DownloadError, match="not a valid address"):
        download(address, path)


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        (Fault(headers={"Content-Type": "text/html; charset=utf-8"}), "web page"),
        (Fault(headers={"Content-Encoding": "gzip"}), "gzip"),
        (Fault(length=-1), "give the length"),
        (Fault(status=204), "204"),
    ],
)
def test_answers_that_are_no_file(web, path, fault, wanted):
    web.faults = [fault]
    with pytest.raises(DownloadError, match=rf"a\.bin.*{wanted}"):
        fetch(web, path)
    assert left_beside(path) == []


def test_a_length_is_not_needed_beside_a_checksum(web, path):
    web.faults = [Fault(length=-1, cut=5000), Fault(length=-1)]
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(web, path, sha256=DIGEST)
    fetch(web, path, sha256=DIGEST)
    assert path.read_bytes() == CONTENT


def test_chunks(web, path):
    web.faults = [Fault(chunked=True, cut=6 * 3000), Fault(chunked=True, ignores_range=True)]
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert web.ranges == [None, "bytes=3000-"]


def test_a_full_disk_is_seen_before(web, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9000))
    with pytest.raises(DownloadError, match=r"a\.bin: 10,240 more bytes.*9,000 are free"):
        fetch(web, path)
    assert left_beside(path) == []


def test_a_part_needs_room_for_the_rest_alone(web, path, monkeypatch):
    web.faults = [Fault(cut=6000)]
    with pytest.raises(DownloadError):
        fetch(web, path, attempts=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 4240))
    fetch(web, path)
    assert path.read_bytes() == CONTENT


def test_a_disk_that_fills_up_on_the_way(web, path):
    content = web.files["/a.bin"] = CONTENT * 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DownloadError, match=r"a\.bin: cannot be stored as .*File too large"):
            fetch(web, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    fetch(web, path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"a\.bin: cannot be stored as"):
        fetch(web, tmp_path / "file" / "a.bin")


def process(web, path):
    command = [sys.executable, "-c", PROGRAM, web.address("/a.bin"), str(path)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_downloads_and_the_other_waits(web, path):
    is_waiting = Event()
    web.faults = [Fault(until=is_waiting)]
    processes = [process(web, path) for _ in range(2)]
    said = []

    def listen(stderr):
        for line in stderr:
            said.append(line)
            if "waiting for it" in line:
                is_waiting.set()

    threads = [Thread(target=listen, args=(p.stderr,)) for p in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.wait() for p in processes] == [0, 0], said
    assert path.read_bytes() == CONTENT
    assert len(web.requests) == 1
    assert "".join(said).count("waiting for it") == 1


def test_a_killed_process_leaves_a_part_that_another_continues(web, path):
    web.faults = [Fault(cut=6000, length=len(CONTENT)), Fault(stall=60)]
    killed = process(web, path)
    try:
        deadline = time.monotonic() + 30
        while len(web.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert not path.exists()
    fetch(web, path)
    assert path.read_bytes() == CONTENT
    assert web.ranges == [None, "bytes=6000-", "bytes=6000-"]


def test_threads_share_a_download_too(web, path):
    web.faults = [Fault(stall=0.2)]
    threads = [Thread(target=fetch, args=(web, path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT
    assert len(web.requests) == 1


FAULTS = st.builds(
    Fault,
    status=st.sampled_from([0, 0, 0, 500, 503]),
    cut=st.none() | st.integers(0, 60),
    length=st.none() | st.integers(0, 90) | st.just(-1),
    ignores_range=st.booleans(),
    body=st.none() | st.binary(max_size=60),
)


@settings(max_examples=60)
@given(
    faults=st.lists(FAULTS, max_size=6),
    etag=st.booleans(),
    knows_if_range=st.booleans(),
    content=st.binary(min_size=1, max_size=60),
)
def test_whatever_fails_the_file_is_right_or_not_there(
    web_of_module, tmp_path_factory, faults, etag, knows_if_range, content
):
    web, path = web_of_module, tmp_path_factory.mktemp("any") / "a.bin"
    web.files["/a.bin"], web.faults = content, list(faults)
    web.etag, web.knows_if_range = etag, knows_if_range
    for _ in range(3):
        try:
            fetch(web, path, sha256=hashlib.sha256(content).hexdigest(), attempts=2, pause=0)
        except DownloadError as error:
            assert "/a.bin" in str(error)  # noqa: PT017 - some faults are survived
            assert not path.exists()
    if path.exists():
        assert path.read_bytes() == content
        assert left_beside(path) == ["a.bin"]


@pytest.fixture(scope="module")
def web_of_module():
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        patch.setenv("no_proxy", "*")
        yield server


def test_the_tag_is_readable(web, path):
    web.faults = [Fault(cut=10)]
    with pytest.raises(DownloadError):
        fetch(web, path, attempts=1)
    tag = json.loads(Path(f"{path}.part.json").read_text())
    assert tag == {"version": f'"{DIGEST[:8]}"', "size": len(CONTENT)}
