"""A Hub of one's own on loopback: repositories in memory, the protocol as far as pushing and loading go.

Imports no equipoise. Uploads come as plain files (no LFS, no Xet): the server asks for that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub:
    """Files by repository and path; the address to give as HF_ENDPOINT."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.address = ""


@contextmanager
def serve() -> Generator[Hub]:
    """The server, for the time of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.requests.append(f"POST {self.path}")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
                hub.files.setdefault(name, {})
                return self.answer({"url": f"{hub.address}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            name = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                return self.answer({"files": modes})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[name][line["value"]["path"]] = content
                url = f"{hub.address}/{name}/commit/{COMMIT}"
                return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
            return self.answer({"error": "not here"}, 404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            owner, name, *rest = self.path.lstrip("/").split("/")
            if rest[:1] == ["resolve"]:
                content = hub.files.get(f"{owner}/{name}", {}).get("/".join(rest[2:]))
                if content is not None:
                    return self.send(content, {
                        "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                    })  # fmt: skip
                code = "EntryNotFound" if f"{owner}/{name}" in hub.files else "RepoNotFound"
                return self.send(b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, 404)
            return self.answer({"error": "not here"}, 404)

        def answer(self, value: Any, status: int = 200) -> None:
            self.send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

        def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
