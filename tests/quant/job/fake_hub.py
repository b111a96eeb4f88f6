"""A Hugging Face hub on localhost that serves one repository, and fails when it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `folder` as `name`. `fail(path, start)` may return a status to answer, or how many bytes to send of those
    asked for: with a Content-Length that promises all (`"drop"`). `requests`: (method, file, first byte) in order."""

    def __init__(self, folder: Path, name: str = "org/model") -> None:
        self.folder, self.name = folder, name
        self.fail: Callable[[str, int], int | tuple[str, int] | None] = lambda path, start: None
        self.requests: list[tuple[str, str, int]] = []
        self.revisions: set[str] = set()
        self.commit = COMMIT
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, True)

            def do_HEAD(self) -> None:
                hub.answer(self, False)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, file: str) -> list[int]:
        """First bytes of the GETs for a file."""
        return [start for method, path, start in self.requests if method == "GET" and path == file]

    def answer(self, to: BaseHTTPRequestHandler, body: bool) -> None:
        path = to.path.split("?")[0]
        if match := re.fullmatch(rf"/api/models/{self.name}(?:/revision/([^/]+))?", path):
            return self._send(to, body, json.dumps(self._info(match[1])).encode(), {"Content-Type": "application/json"})
        if match := re.fullmatch(rf"/api/models/{self.name}/tree/([^/]+)", path):
            return self._send(to, body, json.dumps(self._tree()).encode(), {"Content-Type": "application/json"})
        match = re.fullmatch(rf"/{self.name}/resolve/([^/]+)/(.+)", path)
        if not match or not (self.folder / match[2]).is_file():
            error = {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"}
            return self._send(to, body, b"", error, 404)
        data = (self.folder / match[2]).read_bytes()
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", to.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else 0
        stop = min(int(ranged[2]) + 1, len(data)) if ranged and ranged[2] else len(data)
        self.requests.append((to.command, match[2], start))
        self.revisions.add(match[1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        headers["Accept-Ranges"] = "bytes"
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        failure = self.fail(match[2], start) if to.command == "GET" else None
        if isinstance(failure, int):
            return self._send(to, body, b"", {}, failure)
        self._send(to, body, data[start:stop], headers, 206 if ranged else 200, failure)

    def _send(
        self,
        to: BaseHTTPRequestHandler,
        body: bool,
        data: bytes,
        headers: dict[str, str],
        status: int = 200,
        failure: tuple[str, int] | None = None,
    ) -> None:
        how, count = failure or ("", len(data))
        if how == "corrupt":
            data = bytes(b ^ 255 for b in data)
            count = len(data)
        to.send_response(status)
        for key, value in headers.items():
            to.send_header(key, value)
        to.send_header("Content-Length", str(count if how == "short" else len(data)))
        to.end_headers()
        if body:
            to.wfile.write(data[:count])
        if how == "drop":
            to.close_connection = True
            to.wfile.flush()
            to.connection.close()

    def _files(self) -> list[tuple[str, bytes]]:
        return [(p.name, p.read_bytes()) for p in sorted(self.folder.iterdir()) if p.is_file()]

    def _info(self, revision: str | None) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": len(data)} | self._lfs(name, data) for name, data in self._files()]
        commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else self.commit
        return {"id": self.name, "modelId": self.name, "sha": commit, "siblings": siblings, "tags": []}

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            | self._lfs(name, data)
            for name, data in self._files()
        ]

    def _lfs(self, name: str, data: bytes) -> dict[str, Any]:
        if not name.endswith(".safetensors"):
            return {}
        digest = hashlib.sha256(data).hexdigest()
        return {"lfs": {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}}
