"""A real S3 API on loopback, and a proxy in front of it that imitates faults of networks and endpoints."""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "test-bucket"
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "host", "expect"}

STALL_SECONDS = 3
CODES = {
    "503": "SlowDown",
    "500": "InternalError",
    "409": "ConditionalRequestConflict",
    "403": "AccessDenied",
}


@contextmanager
def s3_server():
    """Run moto's server, and yield its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@dataclass
class Fault:
    """A fault that happens to matching requests.

    Args:
        do: a status (`503`, `500`, `409`, `403`), `reset` (disconnect in the middle of the body), `stall`
            (half the body, then silence), `short` (half the body with a Content-Length to match), `flip` (one
            byte), `flip_upload` (one byte of the request's body), `lose_answer` (the request succeeds, the
            connection breaks), `flip_upload_lose_answer` (both), `answer` (what `answer` is), `edit` (the
            body through `edit`), `ignore_condition` (drop `If-None-Match`), `refuse_condition` (501, as
            endpoints without that header do).
        method: HTTP method; empty = any.
        path: regular expression, searched in the path and query.
        times: number of requests; None = all.
        seconds: duration after the first hit; None = forever.
        answer: status, headers and body of an answer that upstream never sees the request for.
        edit: changes the body of upstream's answer.
    """

    do: str
    method: str = ""
    path: str = ""
    times: int | None = None
    seconds: float | None = None
    hits: int = 0
    first: float = field(default=0.0)
    answer: tuple[int, list[tuple[str, str]], bytes] | None = None
    edit: Callable[[bytes], bytes] | None = None

    def strikes(self, method, path):
        if (self.method and method != self.method) or not re.search(self.path, path):
            return False
        self.first = self.first or time.monotonic()
        if self.times is not None and self.hits >= self.times:
            return False
        if self.seconds is not None and time.monotonic() - self.first > self.seconds:
            return False
        self.hits += 1
        return True


class FaultProxy:
    """A proxy for `upstream` that applies the first matching one of `faults`.

    `requests` lists (method, path, fault).
    """

    def __init__(self, upstream):
        self.upstream = upstream.removeprefix("http://")
        self.faults = []
        self.requests = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def choose(self, method, path):
        with self.lock:
            fault = next((fault for fault in self.faults if fault.strikes(method, path)), None)
            self.requests.append((method, path, fault.do if fault else ""))
        return fault

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *arguments):
        pass

    def handle(self):
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def forward(self):
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        struck = self.proxy.choose(self.command, self.path)
        fault = struck.do if struck else ""
        if fault == "answer":
            self.answer(*struck.answer)
            return
        if fault in CODES:
            self.answer(
                int(fault), [], f"<Error><Code>{CODES[fault]}</Code><Message>fault</Message></Error>".encode()
            )
            return
        if fault == "refuse_condition" and self.headers.get("If-None-Match"):
            self.answer(501, [], b"<Error><Code>NotImplemented</Code><Message>header</Message></Error>")
            return
        if fault.startswith("flip_upload") and body:
            body = flipped(body)
        status, headers, data = self.ask(
            body, drop={"if-none-match"} if fault == "ignore_condition" else set()
        )
        if fault.endswith("lose_answer"):
            self.disconnect()
        elif fault in ("reset", "stall"):
            self.answer(status, headers, data[: len(data) // 2], length=len(data))
            if fault == "stall":
                time.sleep(STALL_SECONDS)
            self.disconnect()
        elif fault == "short":
            self.answer(status, headers, data[: len(data) // 2])
        elif fault == "edit":
            self.answer(status, headers, struck.edit(data))
        elif fault == "flip" and data:
            self.answer(status, headers, flipped(data))
        else:
            self.answer(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def ask(self, body, drop):
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP | drop
        }
        connection.request(
            self.command,
            self.path,
            body,
            {**headers, "Host": self.headers["Host"], "Content-Length": str(len(body))},
        )
        response = connection.getresponse()
        data = response.read()
        returned = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
        if self.command == "HEAD":
            returned.append(("Content-Length", response.getheader("Content-Length") or "0"))
        connection.close()
        return response.status, returned, data

    def answer(self, status, headers, data, length=None):
        self.send_response_only(status)
        if not any(name.lower() == "date" for name, _ in headers):
            self.send_header("Date", self.date_time_string())
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" or not headers:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.wfile.flush()

    def disconnect(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
