"""The endpoints of the Hugging Face Hub that uploads and downloads of files take, in memory.

As its library calls them with ``HF_ENDPOINT``, and with ``HF_HUB_DISABLE_XET``: small files are in
the commit itself, safetensors are sent as large ones.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from web_server import in_thread


class HubServer(ThreadingHTTPServer):
    """Repositories of files.

    Attributes:
        repositories: content by "owner/name" and file name.
        large: content by SHA-256.
        asked: method and path of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {}
        self.large = {}
        self.asked = []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, name):
        files = sorted(
            (k, hashlib.sha256(v).hexdigest()) for k, v in self.repositories[name].items()
        )
        return hashlib.sha1(repr(files).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "me", asked["name"]]))
            self.server.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif re.fullmatch(r"/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.endpoint}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": "unknown"}, 404)

    def _commit(self, name, lines):
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commit = self.server.commit_of(name)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def do_PUT(self):
        self._note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/large/{hashlib.sha256(content).hexdigest()}"
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_GET(self):
        self._file()

    def do_HEAD(self):
        self._file()

    def _file(self):
        self._note()
        found = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([\w.]+)", self.path.split("?")[0])
        files = self.server.repositories.get(found[1]) if found else None
        if files is None:
            self._json({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif found[3] not in files:
            self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            content = files[found[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(
                200, content, {"ETag": etag, "X-Repo-Commit": self.server.commit_of(found[1])}
            )

    def _json(self, value, status=200, headers=()):
        self._send(status, json.dumps(value).encode(), dict(headers))

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _note(self):
        self.server.asked.append((self.command, self.path))

    def log_message(self, *_):
        """Be quiet."""


def hub():
    """A hub that runs in a thread of its own."""
    return in_thread(HubServer())
