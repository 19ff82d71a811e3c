"""A local stand-in for the Hugging Face hub: the routes that huggingface_hub calls to list and to download, for tests
through HF_ENDPOINT.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` (name -> bytes) of the repository `name`, and each at /plain/NAME.SUFFIX. Use as a context
    manager; `url` is its address.

    cut: the first so many answers to GET end after half of what they announced.
    said: name -> what the hub says instead of the file's SHA-256.
    commit: what the hub says is the commit, in its list and in headers. etag: what it says is the tag of every file.
    list: what it answers instead of the list. listed: extra names in the list. token: what every request must carry.
    requests: (method, path, Range) of each request, in order.
    """

    def __init__(self, name: str, files: dict[str, bytes]):
        self.name, self.files = name, files
        self.cut, self.said, self.listed, self.token = 0, {}, [], None
        self.commit, self.etag, self.list = COMMIT, "", b""
        self.requests: list[tuple[str, str, str | None]] = []
        self.uploads: list[dict] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha256(self, name: str) -> str:
        return self.said.get(name) or hashlib.sha256(self.files[name]).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(request, 401, json.dumps({"error": "no token"}).encode(), {"X-Error-Code": "GatedRepo"})
        if re.fullmatch(rf"/api/models/{re.escape(self.name)}(/revision/[^/]+)?", path):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": "0" * 40,
                    "lfs": {"sha256": self.sha256(name), "size": len(content), "pointerSize": 134},
                }
                for name, content in self.files.items()
            ]
            siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in self.listed]
            listing = {"id": self.name, "modelId": self.name, "sha": self.commit, "siblings": siblings}
            return self.send(request, 200, self.list or json.dumps(listing).encode())
        match = re.fullmatch(rf"/{re.escape(self.name)}/resolve/[^/]+/(.+)", path)
        if match and match[1] in self.files:
            return self.send_file(request, match[1])
        plain = re.fullmatch(r"/plain/(\w+)\.\w+", path)
        if plain and plain[1] in self.files:
            return self.send_file(request, plain[1])
        if request.command == "POST":
            return self.accept(request, path, body)
        return self.send(request, 404, json.dumps({"error": "not found"}).encode(), {"X-Error-Code": "EntryNotFound"})

    def accept(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        """The routes of an upload: create, preupload (all files go with the commit), commit."""
        if path == "/api/repos/create":
            return self.send(request, 200, json.dumps({"url": f"{self.url}/{self.name}"}).encode())
        if path == "/api/validate-yaml":
            return self.send(request, 200, json.dumps({"errors": [], "warnings": []}).encode())
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send(request, 200, json.dumps({"files": files}).encode())
        if path.endswith("/commit/main"):
            self.uploads = [json.loads(line) for line in body.splitlines()]
            done = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{self.name}/commit/{COMMIT}"}
            return self.send(request, 200, json.dumps(done).encode())
        return self.send(request, 404, json.dumps({"error": path}).encode())

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content, start = self.files[name], 0
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
        etag = f'"{self.etag or self.sha256(name)}"'
        headers = {
            "ETag": etag,
            "X-Linked-Etag": etag,
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": self.commit,
            "Accept-Ranges": "bytes",
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(request, 206 if asked else 200, content[start:], headers, may_cut=True)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        may_cut: bool = False,
    ) -> None:
        request.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if may_cut and self.cut > 0 and len(body) > 1:
            self.cut -= 1
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(body)
