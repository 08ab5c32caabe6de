"""A local HTTP server of shards that can fail, break off, be gone, and look like the hub with a data set."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c" * 40
HUB_ID = "our-group/our-texts"


@dataclass
class Shards:
    """What the server has, what it does wrong, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Content by path, without the leading slash."""
    failures: dict[str, int] = field(default_factory=dict)
    """How often a file is refused with status 503 before it is given."""
    cuts: dict[str, int] = field(default_factory=dict)
    """How often a file breaks off in its middle, with its whole length announced, before it is given."""
    gone: set[str] = field(default_factory=set)
    """Files that are listed and are not there."""
    requests: list[str] = field(default_factory=list)
    """Paths of files that were asked for by GET."""
    url: str = ""

    def answer(self, path: str) -> tuple[int, Any]:
        """Answer what is not a file as the hub does: a status and JSON."""
        at = f"/api/datasets/{HUB_ID}"
        if path == at or path.startswith(f"{at}/revision/"):
            return 200, {"id": HUB_ID, "sha": COMMIT, "private": False, "siblings": [], "tags": []}
        if found := re.fullmatch(rf"{at}/tree/\w+(/.*)?", path):
            folder = (found[1] or "").strip("/")
            below = [name for name in self.files if name.startswith(f"{folder}/" if folder else "")]
            inside = {name: name[len(folder) :].strip("/").split("/") for name in below}
            entries = [self._entry(name) for name, parts in inside.items() if len(parts) == 1]
            folders = {f"{folder}/{parts[0]}".strip("/") for parts in inside.values() if len(parts) > 1}
            return 200, entries + [{"type": "directory", "path": name, "oid": "0"} for name in folders]
        return 404, {"error": "Entry not found"}

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def serve() -> Iterator[Shards]:
    """Serve shards on this machine."""
    shards = Shards()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            path = urlsplit(self.path).path
            name = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")[2] or path.removeprefix("/")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if name not in shards.files or name in shards.gone:
                status, found = shards.answer(path)
                self._send(status, json.dumps(found).encode())
                return
            data = shards.files[name]
            if self.command == "HEAD":
                self._send(200, data)
                return
            shards.requests.append(name)
            if shards.failures.get(name):
                shards.failures[name] -= 1
                self._send(503, b"busy")
            elif shards.cuts.get(name):
                shards.cuts[name] -= 1
                self._send(200, data[: len(data) // 2], announced=len(data))
                self.close_connection = True
            else:
                self._send(200, data)

        def _send(self, status: int, data: bytes, announced: int | None = None) -> None:
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("Content-Length", str(announced or len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _do

        def log_message(self, *unused: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    shards.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield shards
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
