"""A stub of the Hugging Face hub on loopback: datasets at commits, read by listing and by range."""

import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A running stub; `fault` returns, for the number of a request and its path, what goes wrong."""

    def __init__(self, name, files, fault=lambda number, path: ""):
        self.name, self.files, self.fault = name, files, fault
        self.requests, self.bytes = [], 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.handle(self, b"")

            def do_POST(self):
                hub.handle(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass  # a connection that the stub has cut

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler, body):
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(path)
        fault = self.fault(len(self.requests), path)
        if fault == "cut":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        if fault:
            self.send(handler, fault, b"{}", {"Retry-After": "0"})
            return

        api, plain = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/{COMMIT}/"
        if path == f"{api}/revision/{COMMIT}":
            self.send_json(handler, {"id": self.name, "sha": COMMIT, "siblings": [], "tags": []})
        elif match := re.fullmatch(rf"{api}/tree/{COMMIT}/?(.*)", path):
            self.send_json(handler, [self.entry(name) for name in self.files if name.startswith(match[1])])
        elif path == f"{api}/paths-info/{COMMIT}":
            wanted = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body)["paths"]
            names = [unquote(name) for name in wanted]
            self.send_json(handler, [self.entry(name) for name in names if name in self.files])
        elif path.startswith(plain) and path.removeprefix(plain) in self.files:
            self.send_range(handler, self.files[path.removeprefix(plain)])
        else:
            self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name):
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": f"{hash(name):x}"}

    def send_range(self, handler, data):
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            self.send(handler, 416, b"")
            return
        part = data[first : last + 1]
        self.bytes += len(part)
        self.send(handler, 206, part)

    def send_json(self, handler, value):
        self.send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def send(handler, status, data, headers=()):
        handler.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
