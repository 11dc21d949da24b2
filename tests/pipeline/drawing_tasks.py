"""What the ranks of the test of drawing do."""

import sys
from unittest.mock import patch

from pipeline import sample
from tests.pipeline.tiny_sampler import make_sampler


def draw(*arguments):
    """`python -m pipeline.sample` on this rank, in the process group that it already has; names of the files that it wrote."""
    files = []

    def save_png(image, path, settings):
        files.append(path.name)
        real(image, path, settings)

    real = sample.save_png
    with (
        patch.object(sys, "argv", ["sample", "run", *map(str, arguments)]),
        patch.object(sample, "load_source", lambda *_: make_sampler()),
        patch.object(sample, "save_png", save_png),
        patch.object(sample.dist, "init_process_group"),
        patch.object(sample.dist, "destroy_process_group"),
    ):
        sample.main()
    return files
