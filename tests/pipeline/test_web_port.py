"""The port of the web page."""

import socket

import pytest

from model.common.errors import UserError
from pipeline import web
from pipeline.inference.studio import InteractiveSampler, Limits
from tests.helpers.tiny_sampler import make_sampler


def test_a_port_that_another_program_has_is_one_line(tmp_path):
    pytest.importorskip("gradio")
    studio = InteractiveSampler({"tiny": make_sampler()}, tmp_path / "web", Limits())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError) as error:
            web.serve(studio, "127.0.0.1", port, prevent_thread_lock=True, quiet=True)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"port {port} of 127.0.0.1: ")
    assert line.endswith(": choose another by --port")
