"""A local HTTP server with the hub's routes for uploads: who am I, repositories, LFS files, commits."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_thewritetokenofthetests"


class Hub:
    """What the server knows, and what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.role = "write"
        self.may_create = True
        self.repositories: dict[str, dict[str, Any]] = {}
        """By hub id: `visibility`, and `files` by path."""
        self.objects: dict[str, bytes] = {}
        """Uploaded large files by their sha256."""
        self.requests: list[str] = []

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Answer a request with a status and JSON."""
        self.requests.append(f"{method} {path}")
        if method == "PUT":  # large files go to storage without the token
            self.objects[path.removeprefix("/storage/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            orgs = [{"name": "our-group"}]
            return 200, {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            if not self.may_create:
                return 403, {"error": "You have reached your quota"}
            asked = json.loads(body)
            hub_id = f"{asked['organization']}/{asked['name']}"
            self.repositories[hub_id] = {"visibility": asked.get("visibility"), "files": {}}
            return 200, {"url": f"{self.url}/{hub_id}"}
        if path == "/api/validate-yaml":
            return self._check_card(json.loads(body)["content"])
        hub_id = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        if hub_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        there = self.repositories[hub_id]
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._place(o) for o in json.loads(body)["objects"]],
            }
        if path.endswith("/commit/main"):
            self._commit(there["files"], [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{hub_id}/commit/1", "commitOid": "1", "success": True}
        if "/tree/main" in path:
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in there["files"].items()
            ]
        private = there["visibility"] == "private"
        return 200, {"id": hub_id, "private": private, "sha": "0", "siblings": []}

    def _check_card(self, text: str) -> tuple[int, Any]:
        """Check the front matter of a README.md as the hub does: YAML, with models by their hub ids."""
        front = yaml.safe_load(text.split("---\n")[1])
        base = front.get("base_model")
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        errors = [{"message": f"base_model {base} is no hub id"}] if wrong else []
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/storage/{asked['oid']}"
        return {"oid": asked["oid"], "size": asked["size"], "actions": {"upload": {"href": href}}}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            if line["key"] == "deletedFile":
                del files[value["path"]]


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self._read()
            path = urlsplit(self.path).path
            status, found = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            data = json.dumps(found).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *unused: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
