"""A web server on this machine that can be told to fail."""

import hashlib
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        status: instead of 200 or 206.
        cut: bytes of the body after which the connection breaks.
        length: the Content-Length, whatever the body; -1 for none at all.
        body: other bytes than the file's.
        headers: more headers, or other values.
        ignores_range: the whole file is sent, whatever was asked for.
        stall: seconds of silence before the body.
        until: what the body waits for, at most a minute.
        chunked: the body comes in chunks, without a length.
    """

    status: int = 0
    cut: int | None = None
    length: int | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    ignores_range: bool = False
    stall: float = 0
    until: Event | None = None
    chunked: bool = False


class WebServer(ThreadingHTTPServer):
    """Serves ``files``; each request takes the next of ``faults``, if there are any.

    Attributes:
        files: path to content.
        faults: consumed from the front.
        requests: path and headers of each request, in order.
        etag: whether answers have one.
        knows_if_range: whether the header is obeyed.
        sent: bytes of bodies.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.etag = True
        self.knows_if_range = True
        self.sent = 0

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def handle_error(self, request, client_address):
        """The client may go away at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        fault = server.faults.pop(0) if server.faults else Fault()
        content = server.files.get(self.path.split("?")[0])
        status = fault.status or (404 if content is None else 200)
        body = (fault.body if fault.body is not None else content) or b""
        headers = {"Content-Type": "application/octet-stream"}
        if server.etag:
            headers["ETag"] = '"' + hashlib.sha256(body).hexdigest()[:8] + '"'
        if status == 200 and not fault.ignores_range:
            status, body, headers = self._part(body, headers)
        self._send(status, body, {**headers, **fault.headers}, fault)

    def _part(self, body, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        version = self.headers.get("If-Range", headers.get("ETag"))
        if not wanted or (self.server.knows_if_range and version != headers.get("ETag")):
            return 200, body, headers
        start = int(wanted[1])
        if start >= len(body):
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(body)}"}
        extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return 206, body[start:], {**headers, "Content-Range": extent}

    def _send(self, status, body, headers, fault):
        if fault.chunked:
            self.protocol_version = "HTTP/1.1"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in body) + b"0\r\n\r\n"
        elif fault.length != -1:
            self.send_header("Content-Length", len(body) if fault.length is None else fault.length)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.flush()
        time.sleep(fault.stall)
        if fault.until is not None:
            fault.until.wait(60)
        body = body[: fault.cut]
        self.server.sent += len(body)
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        """Be quiet."""


def serving():
    """A web server that runs in a thread of its own."""
    return in_thread(WebServer())


@contextmanager
def in_thread(server):
    """Any server, running in a thread of its own."""
    with server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
