"""A model hub and a Ray dashboard of our own, and how the chart's scripts are run against them."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ROOT / "helm" / "whalepod" / "files"
REPOSITORY, REVISION = "deepseek-ai/tiny", "abc/1"


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FILES / script), *arguments]
    paths = {"PYTHONPATH": str(ROOT / "src"), "RETRY_S": "0"}
    # No proxy may come between the script and this machine.
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **paths, **env}
    )


class Hub:
    """Hugging Face's and ModelScope's answers about a folder, with faults on demand.

    A repository's files come from a store on another host name, as on the real hubs.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        self.break_after: dict[str, int] = {}  # once: the connection ends after so many bytes
        self.rotten: set[str] = set()
        self.token = ""
        self.asked: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}/store/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlparse(request.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        token = request.headers.get("Authorization")
        self.asked.append((url.path, request.headers.get("Range"), token))
        if url.path.startswith("/store/"):
            self._send(request, url.path.removeprefix("/store/"))
        elif self.token and token != f"Bearer {self.token}":
            self._reply(request, 401, {}, b"no")
        elif url.path == f"/api/models/{REPOSITORY}/tree/abc%2F1":
            self._tree(request, query.get("cursor"))
        elif url.path.startswith(f"/{REPOSITORY}/resolve/abc%2F1/"):
            place = self.store + url.path.rpartition("/")[2]
            self._reply(request, 302, {"Location": place}, b"")
        elif url.path == f"/api/v1/models/{REPOSITORY}/repo/files":
            assert query == {"Revision": REVISION, "Recursive": "true"}
            files = [self._scope(name) for name in sorted(self.files)]
            body = {"Code": 200, "Data": {"Files": [{"Path": "d", "Type": "tree"}, *files]}}
            self._reply(request, 200, {}, json.dumps(body).encode())
        elif url.path == f"/api/v1/models/{REPOSITORY}/repo":
            self._send(request, query["FilePath"])
        else:
            self._reply(request, 404, {}, b"")

    def _tree(self, request: http.server.BaseHTTPRequestHandler, cursor: str | None) -> None:
        names = sorted(self.files)
        half = names[len(names) // 2 :] if cursor else names[: len(names) // 2]
        link = {} if cursor else {"Link": f'<{self.url}{request.path}&cursor=2>; rel="next"'}
        body = [{"type": "directory", "path": "d", "oid": "", "size": 0}] if cursor else []
        self._reply(request, 200, link, json.dumps(body + [self._face(n) for n in half]).encode())

    def _face(self, name: str) -> dict[str, object]:
        data = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith(".safetensors"):
            entry |= {"oid": "0" * 40, "lfs": {"oid": hashlib.sha256(data).hexdigest()}}
        return entry

    def _scope(self, name: str) -> dict[str, object]:
        data = self.files[name]
        digest = hashlib.sha256(data).hexdigest()
        return {"Path": name, "Type": "blob", "Size": len(data), "Sha256": digest}

    def _send(self, request: http.server.BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        if name in self.rotten:
            data = bytes([data[0] ^ 1]) + data[1:]
        begin = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        stop = self.break_after.pop(name, len(data))
        status = 206 if "Range" in request.headers else 200
        request.send_response(status)
        request.send_header("Content-Length", str(len(data) - begin))
        request.end_headers()
        request.wfile.write(data[begin:stop])
        request.close_connection = True

    def _reply(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes,
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body)

    def download(self, hub: str, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
        where = ["--repository", REPOSITORY, "--revision", REVISION, "--endpoint", self.url]
        return run("download_model.py", "--hub", hub, *where, str(target), **env)


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Not up at first, then takes a configuration from whoever has the token."""

    tries: list[tuple[str, str | None, bytes]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers.get("Authorization")
        self.tries.append((self.path, token, body))
        status = 503 if len(self.tries) == 1 else 200 if token == "Bearer t" else 401
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
