"""A stub of the Hugging Face hub on loopback: datasets at commits, read by listing and by range."""

import json
import re
from urllib.parse import unquote, urlsplit

from tests.helpers.stub_server import Stub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Stub):
    """A running stub; `fault` returns, for the number of a request and its path, what goes wrong."""

    def __init__(self, name, files, fault=lambda number, path: ""):
        self.name, self.files, self.fault = name, files, fault
        self.requests, self.bytes = [], 0
        super().__init__()

    def handle(self, handler, body):
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(path)
        fault = self.fault(len(self.requests), path)
        if fault == "cut":
            self.cut(handler)
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
