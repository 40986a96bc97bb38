"""The command as a user runs it: a real server, signals, and errors at the start."""

import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from cascade_det.commands import serve
from cascade_det.errors import CascadeDetError
from cascade_det.serving.server import is_loopback, open_socket, page_address

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def arguments(cfg_with, tmp_path_factory):
    """A configuration file with that detector."""
    path = tmp_path_factory.mktemp("serve") / "config.yaml"
    path.write_text(cfg_with().dump())
    return ["--config-file", str(path)]


@contextmanager
def running(arguments):
    """The process, its port, and a list that gets the rest of its output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade_det", "serve", "--port", "0", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A parent that ignores Ctrl-C would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    rest = []
    try:
        port = None
        while port is None:
            line = process.stdout.readline()
            assert line, "".join(rest)
            rest.append(line)
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            port = int(found[1]) if found else None
        yield process, port, rest
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_it_serves_until_a_signal(arguments, image, number, status):
    with running(arguments) as (process, port, rest):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/detect?setting=mobile", body=image()[0])
        answer = connection.getresponse()
        assert (answer.status, b'"setting":"mobile"' in answer.read()) == (200, True)
        mebibytes, refusal = send_without_end(port)
        assert refusal.startswith(b"HTTP/1.1 413 ")
        assert mebibytes < 25  # of which the limit is 20, and sockets hold some
        # An open connection does not hold it up.
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == status
        assert "Traceback" not in "".join(rest) + output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_request_without_a_traceback(arguments, image):
    body = image(width=3000, height=2000)[0]
    with running(arguments) as (process, port, rest):
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(8)]
        for connection in connections:
            connection.request("POST", "/detect", body=body)
        # One that is answered shows that the others wait for the detector.
        assert connections[0].getresponse().status == 200
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)  # two signals at the same time count once
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in "".join(rest) + output
        assert connections[-1].getresponse().status == 503


def send_without_end(port):
    """Send an upload of unknown length until the server answers; the MiB sent, and the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"POST /detect HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"\xff" * 0x10000 + b"\r\n"
        sent = 0
        while sent < 1000 and not select.select([connection], [], [], 0.01)[0]:
            connection.sendall(chunk)
            sent += 1
        return sent / 16, connection.recv(100)


def test_a_port_in_use_is_told_before_the_weights_are_read(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        missing = ["--config-file", str(tmp_path / "missing.yaml"), "--port", str(port)]
        assert serve.main(missing) == 1
    error = capfd.readouterr().err
    assert f"--port {port}: cannot be used" in error
    assert "give another --port" in error


def test_other_bad_arguments(tmp_path, capfd, arguments):
    for more, words in (
        (["--address", "203.0.113.77"], "--address 203.0.113.77"),
        (["--front", str(tmp_path / "none.csv")], "none.csv"),
        (["CASCADE.SHADOW_SHARE", "0.5"], "CASCADE.SHADOW_SHARE is 0.5"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    ):
        assert serve.main([*arguments, "--port", "0", *more]) == 1
        assert words in capfd.readouterr().err
    for more in (["--max-upload-mib", "0"], ["--port", "70000"], ["--queue", "-1"]):
        with pytest.raises(SystemExit):
            serve.main([*arguments, *more])
    segmenter = ["--config-file", "cascade_det://quick_schedules/segment_shapes.yaml"]
    assert serve.main([*segmenter, "--port", "0"]) == 1
    assert "this is for detectors" in capfd.readouterr().err


def test_addresses():
    with open_socket("127.0.0.1", 0) as bound:
        assert is_loopback(bound)
        assert page_address(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/"
    with open_socket("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)
    with pytest.raises(CascadeDetError, match="--address"):
        open_socket("no such name", 0)


def test_without_the_libraries_the_extra_is_named(monkeypatch, capfd, arguments):
    for name in ("starlette", "starlette.types"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "cascade_det.serving.server")
    assert serve.main(arguments) == 1
    assert "pip install starlette uvicorn, the extra [serve]" in capfd.readouterr().err
