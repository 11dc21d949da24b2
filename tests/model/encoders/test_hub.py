"""Models from the hub, here a small server like it: pinned, safetensors only, one line when it fails."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

from model.common.errors import UserError
from model.encoders.text_encoder import check_identity, load_encoder, relative_error
from tests.helpers import tiny_llm

CPU = torch.device("cpu")
FIRST, SECOND, PICKLED = (digit * 40 for digit in "abc")
CAPTIONS = ["a cat", "", "two dogs"]


@contextmanager
def serve(revisions):
    """Serve folders, one per commit of `org/tiny`, like the hub; yields the URL and the requested paths."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            path = self.path.partition("?")[0]
            for commit, folder in revisions.items():
                names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                if path == f"/api/models/org/tiny/revision/{commit}":
                    record = {
                        "id": "org/tiny",
                        "sha": commit,
                        "siblings": [{"rfilename": name} for name in names],
                    }
                    return self.answer(200, json.dumps(record).encode(), commit)
                name = path.removeprefix(f"/org/tiny/resolve/{commit}/")
                if name in names:
                    return self.answer(200, (folder / name).read_bytes(), commit, f"{commit}-{name}")
            return self.answer(404, b"", error="RevisionNotFound")

        def answer(self, status, body, commit="", etag="", error=""):
            self.send_response(status)
            headers = {
                "Content-Length": len(body),
                "X-Repo-Commit": commit,
                "ETag": f'"{etag}"',
                "X-Error-Code": error,
            }
            for header, value in headers.items():
                if value not in ("", '""'):
                    self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    """Two sets of weights under one name, with the usual other files, and one set of pickles only."""
    folder = tmp_path_factory.mktemp("hub")
    folders = {commit: folder / commit for commit in (FIRST, SECOND, PICKLED)}
    for seed, commit in enumerate((FIRST, SECOND)):
        torch.manual_seed(seed)
        tiny_llm.save(folders[commit], tiny_llm.llama())
        (folders[commit] / "pytorch_model.bin").write_bytes(b"pickled")
        (folders[commit] / "modeling_tiny.py").write_text("raise SystemExit('ran code of the repository')")
        shutil.copy(folders[commit] / "model.safetensors", folders[commit] / "consolidated.safetensors")
    tiny_llm.save(folders[PICKLED], tiny_llm.llama(), safe=False)
    return folders


@pytest.fixture
def hub(revisions, tmp_path, monkeypatch):
    """Point the client at the server, with an empty cache; yields the requested paths."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with serve(revisions) as (url, asked):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        reset_sessions()
        yield asked
        reset_sessions()


def reset_sessions():
    """Forget open connections: huggingface-hub 1 renamed the function."""
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()


def config(revision):
    return tiny_llm.TextConfig(name="tiny", llm="org/tiny", revision=revision, suffix="<end>", dtype="fp32")


def states(encoder):
    return torch.cat(encoder.encode(encoder.tokenize(CAPTIONS)))


def test_the_pinned_revision_is_read(revisions, hub):
    encoders = {commit: load_encoder(config(commit), CPU) for commit in (FIRST, SECOND)}
    for commit, encoder in encoders.items():
        local = load_encoder(replace(config(None), llm=str(revisions[commit])), CPU)
        assert relative_error(states(encoder), states(local)) < 1e-6
        assert encoder.identity["weights"] == f"commit:{commit}"
    assert relative_error(states(encoders[FIRST]), states(encoders[SECOND])) > 0.1
    with pytest.raises(UserError, match=rf"revision: '{FIRST}' in the family, '{SECOND}' here"):
        check_identity(encoders[SECOND], "f", encoders[FIRST].identity)
    fetched = {path.rpartition("/")[2] for path in hub if "/resolve/" in path}
    assert fetched >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not fetched & {"pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"}
    assert all(FIRST in path or SECOND in path for path in hub)


def test_downloaded_files_are_read_without_the_hub(hub, monkeypatch):
    online = states(load_encoder(config(FIRST), CPU))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    asked = len(hub)
    assert torch.equal(states(load_encoder(config(FIRST), CPU)), online)
    assert len(hub) == asked
    with pytest.raises(UserError, match="org/tiny: cannot be downloaded") as raised:
        load_encoder(config(SECOND), CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("revision", "says"),
    [
        (PICKLED, "has no safetensors"),
        ("d" * 40, "cannot be downloaded"),
        ("main", "40-digit commit hash"),
        (None, "40-digit commit hash"),
    ],
)
def test_an_error_is_one_line(hub, revision, says):
    with pytest.raises(UserError, match=says) as raised:
        load_encoder(config(revision), CPU)
    assert "\n" not in str(raised.value)
    assert not any(path.endswith(".bin") for path in hub)
