"""A stand-in for the hub on localhost that the real clients talk to: dataset repositories are folders under `root`."""

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub(ThreadingHTTPServer):
    """`commit` is the head of every branch; `fault(handler, path)` may answer a request itself and return True."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.commit, self.requests = root, "a" * 40, []
        self.fault: Callable = lambda handler, path: False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *exc_info) -> None:
        self.shutdown()
        super().__exit__(*exc_info)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.fault(self, path):
            return
        for pattern, method in (
            (rf"/api/datasets/{REPO}/paths-info/[^/]+", self.paths_info),
            (rf"/api/datasets/{REPO}/tree/[^/]+/?(?P<path>.*)", self.tree),
            (rf"/api/datasets/{REPO}(/revision/.+)?", self.dataset),
            (rf"/datasets/{REPO}/resolve/[^/]+/(?P<path>.+)", self.file),
        ):
            if match := re.fullmatch(pattern, path):
                self.folder = self.server.root / match["repo"]
                return method(match.groupdict().get("path"), posted)
        self.reply(404)

    do_GET = do_HEAD = do_POST = answer

    def paths_info(self, _, posted):
        names = (
            json.loads(posted)["paths"]
            if posted.startswith(b"{")
            else urllib.parse.parse_qs(posted.decode())["paths"]
        )
        self.reply_json(
            [self.info(self.folder / name) for name in names if (self.folder / name).exists()]
        )

    def tree(self, path, _):
        folder = self.folder / path
        files = (
            folder.rglob("*")
            if "recursive=true" in self.path.lower()
            else folder.iterdir()
            if folder.is_dir()
            else ()
        )
        self.reply_json([self.info(file) for file in sorted(files)])

    def dataset(self, *_):
        if not self.folder.is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        files = [self.info(file) for file in sorted(self.folder.rglob("*")) if file.is_file()]
        self.reply_json(
            {
                "id": str(self.folder.relative_to(self.server.root)),
                "sha": self.server.commit,
                "tags": [],
                "private": False,
                "gated": False,
                "siblings": [{"rfilename": file["path"]} | file for file in files],
            }
        )

    def file(self, path, _):
        file = self.folder / path
        if not file.is_file():
            return self.reply(
                404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit}
            )
        content, status = file.read_bytes(), 200
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.server.commit,
            "Accept-Ranges": "bytes",
        }
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        self.reply(status, content, headers)

    def info(self, file: Path) -> dict:
        path = str(file.relative_to(self.folder))
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40}
        sha256, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
        return {
            "type": "file",
            "path": path,
            "oid": sha256[:40],
            "size": size,
            "lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130},
        }

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(
        self,
        status: int,
        content: bytes = b"",
        headers: dict | None = None,
        send: int | None = None,
    ):
        """Answer; with `send`, drop the connection after that many bytes of the content."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:send])
        if send is not None:
            self.close_connection = True

    def log_message(self, *_):
        pass
