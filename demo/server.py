"""The web page's HTTP server: answers this address alone, limits uploads and the queue, keeps no files.

GET /, /page.js, /page.css    the page           GET /about      what it builds its form from (JSON)
POST /crop                    a picture file     POST /generate  settings (JSON) -> one JSON line per sampling step
"""

import contextlib
import ipaddress
import json
import os
import select
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from demo.studio import Studio
from util.json_reader import check_schema, parse_json
from util.log import first_line, get_logger

logger = get_logger()

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
MAX_BODY = 10_000_000  # bytes of an upload
MAX_WAITING = 8  # jobs in the queue besides the one that runs
MAX_CONNECTIONS = 64
PATIENCE = 30  # seconds that a connection may be silent
LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def log_failure(error: BaseException) -> None:
    """One line, or the traceback with TOKENBRIDGE_DEBUG=1."""
    debug = bool(os.environ.get("TOKENBRIDGE_DEBUG"))
    logger.error("a request of the page failed: %s: %s", type(error).__name__, first_line(error), exc_info=debug)


class PageClosed(ConnectionError):
    """Nobody waits for the answer any more."""


class Turns:
    """One job at a time, in the order of their arrival, at most MAX_WAITING behind it."""

    def __init__(self) -> None:
        self.jobs, self.changed = [], threading.Condition()

    @contextlib.contextmanager
    def turn(self, waits: Callable[[int], None]) -> Iterator[None]:
        """Wait for one's turn; waits(jobs before it) is called each second and may raise. ValueError if it is full."""
        job = object()
        with self.changed:
            if len(self.jobs) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} others are waiting already: try again in a moment")
            self.jobs.append(job)
        try:
            while before := self.jobs.index(job):
                waits(before)
                with self.changed:
                    self.changed.wait_for(lambda: self.jobs.index(job) < before, timeout=1)
            yield
        finally:
            with self.changed:
                self.jobs.remove(job)
                self.changed.notify_all()


def plain_address(host: str) -> str:
    """An IP address in its usual form (::ffff:1.2.3.4 is 1.2.3.4); a name as it is, in lower case."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    return str(getattr(address, "ipv4_mapped", None) or address)


class Server(ThreadingHTTPServer):
    """Bound to an address at once, so that a port in use is an error before a model is loaded.

    `studio` must be set before `serve_forever`.
    """

    daemon_threads, block_on_close = True, False
    studio: Studio

    def __init__(self, host: str, port: int):
        """ValueError if the page cannot be served there. Port 0: a free one."""
        self.host, self.turns, self.places = host, Turns(), threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.decoding = threading.Lock()  # one uploaded picture at a time: it may take some hundred MB
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ValueError(f"cannot serve at {host}:{port} (--host, --port): {error}") from error

    def server_bind(self) -> None:
        """Without HTTPServer's request for the machine's name."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}"

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        """In a thread of its own; a connection over MAX_CONNECTIONS is closed."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        """Then its place is free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """Errors are logged; a connection that ended early is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log_failure(error)


class Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with the answer."""

    server: Server
    timeout = PATIENCE

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        """The page's files, and what it builds its form from."""
        path = urlsplit(self.path).path
        if not self.allowed():
            return
        if path == "/about":
            self.answer(200, json.dumps(self.server.studio.about() | {"upload": MAX_BODY}))
        elif path in FILES:
            name, kind = FILES[path]
            self.answer(200, (PAGE / name).read_text(), kind)
        else:
            self.refuse(404, "there is no such page")

    def do_POST(self) -> None:
        """An upload to crop, or settings to generate with."""
        if not self.allowed():
            return
        length = self.headers.get("Content-Length") or ""
        if not length.isdecimal() or len(length) > 18:
            return self.refuse(411, "the request does not say how long it is")
        if int(length) > MAX_BODY:
            return self.refuse(413, f"the picture is too large: at most {MAX_BODY // 10**6} MB")
        body = self.rfile.read(int(length))
        if self.path == "/crop":
            return self.reply(lambda: self.crop(body))
        if self.path == "/generate":
            self.start(200, "application/x-ndjson")
            return self.reply(lambda: self.generate(body))
        return self.refuse(404, "there is no such page")

    def allowed(self) -> bool:
        """Whether Host is the address bound to, and Origin the page's own; answers 403 otherwise.

        So other sites can neither send requests nor read answers, also by a name of theirs that points here.
        """
        host, origin = (self.headers.get(name, "").lower() for name in ("Host", "Origin"))
        bound = plain_address(self.connection.getsockname()[0])
        names = {plain_address(self.server.host), bound, *(LOCAL if ipaddress.ip_address(bound).is_loopback else ())}
        try:
            good = plain_address(urlsplit(f"//{host}").hostname or "") in names
            good = good and (not origin or urlsplit(origin).netloc == host)
        except ValueError:
            good = False
        if not good:
            name = (urlsplit(self.server.url).hostname, "--host NAME serves under another name")
            self.refuse(403, f"this page answers as {name[0]} only ({name[1]}), and only its own requests")
        return good

    def reply(self, action: Callable[[], None]) -> None:
        """Run the action; what goes wrong is answered as a sentence, unless the page is closed."""
        try:
            action()
        except ValueError as error:
            message = str(error)
        except (ConnectionError, TimeoutError):
            return
        except Exception as error:
            log_failure(error)
            message = f"this failed ({type(error).__name__}): the terminal of demo.app says more"
        else:
            return
        with contextlib.suppress(OSError):
            self.refuse(400, message) if self.path == "/crop" else self.line({"error": message})

    def crop(self, body: bytes) -> None:
        """Answer with the middle square of a picture. ValueError if it is none."""
        with self.server.decoding:
            answer = self.server.studio.crop(body)
        self.answer(200, json.dumps(answer))

    def generate(self, body: bytes) -> None:
        """Wait for a turn, then a line per step. ValueError for bad settings; PageClosed when nobody reads on."""
        try:
            check_schema(request := parse_json(body), dict)
        except ValueError as error:
            raise ValueError(f"the request is no JSON object: {error}") from error
        with self.server.turns.turn(lambda before: self.line({"waiting": before})):
            for event in self.server.studio.generate(request):
                self.line(event)

    def line(self, event: dict) -> None:
        """Send a line of JSON. PageClosed if the connection was closed from the other side."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise PageClosed
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def refuse(self, status: int, message: str) -> None:
        """An answer with an error as a sentence."""
        self.answer(status, json.dumps({"error": message}))

    def answer(self, status: int, text: str, kind: str = "application/json") -> None:
        """A whole answer."""
        self.start(status, kind)
        self.wfile.write(text.encode())

    def start(self, status: int, kind: str) -> None:
        """Status and headers."""
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
