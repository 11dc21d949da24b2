"""Drawing with the weights shared out over processes (ZeRO-3): the pictures of one, half of the weights on
each of two."""

import pytest
import torch

from pipeline.diffusion.solvers import initial_noise
from pipeline.export import build_pipeline
from pipeline.inference.elastic import ChosenParts
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers import sampling_tasks as drawing_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_sampler import sampler_with_families

PROMPTS = ["a red cat", "two dogs", "tea", "snow", "a very blue house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tmp_path_factory.mktemp("exports") / "tiny"
    build_pipeline(sampler_with_families()).save_pretrained(saved)
    return saved


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (5, 2)])
def test_two_processes_with_half_of_the_weights_each_draw_the_pictures_of_one(folder, tmp_path, count, batch):
    prompts = [each for prompt in PROMPTS[:count] for each in ("--prompt", prompt)]
    arguments = ("sample", folder, *prompts, "--batch", batch, "--out")
    assert on_ranks(1, drawing_tasks.draw_export, *arguments, tmp_path / "one") == [None]
    shares = on_ranks(2, drawing_tasks.draw_export, *arguments, tmp_path / "two", "--zero3")
    for held, whole in shares:
        assert whole / 2 <= held < 0.51 * whole
    assert len(files(tmp_path / "one")) == count + 2
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_benchmark_is_drawn_with_shared_weights(folder, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    arguments = (
        "evaluate",
        folder,
        "--bench",
        "fid",
        "--stage",
        "images",
        "--prompts",
        tmp_path / "captions.txt",
        "--batch",
        2,
    )
    on_ranks(1, drawing_tasks.draw_export, *arguments, "--out", tmp_path / "one")
    for _ in range(
        2
    ):  # the second time nothing is missing, and the settings with the weights' hash are the same
        on_ranks(2, drawing_tasks.draw_export, *arguments, "--out", tmp_path / "two", "--zero3")
    assert len(list((tmp_path / "one" / "images").iterdir())) == len(PROMPTS)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    (tmp_path / "two" / "images" / "000003.png").unlink()  # of rank 1: rank 0 has none to draw
    on_ranks(2, drawing_tasks.draw_export, *arguments, "--out", tmp_path / "two", "--zero3")
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_runs_checkpoint_is_read_into_shards(tmp_path):
    fake_snapshot.make(tmp_path / "store", {"32x32": [20]}, tmp_path)
    settings = {"samples": 32, "data__validation_parts": 0, "log__validate_every_samples": 0}
    codes = on_ranks(2, trainer_tasks.train, str(tmp_path / "store"), str(tmp_path), None, settings)
    assert [code for code, _ in codes] == [0, 0]
    run, prompts = str(tmp_path / "small"), ["a cat", "two", "three"]
    whole = drawing_tasks.latents_of_run(run, False, prompts)
    noise = initial_noise(whole.shape[1:], [len(prompt) for prompt in prompts])
    assert (whole - noise).abs().max() > 0.01  # the weights matter
    (first, second) = on_ranks(2, drawing_tasks.latents_of_run, run, True, prompts)
    assert torch.equal(first, whole)
    assert torch.equal(second, whole)


@pytest.mark.slow
def test_a_part_of_an_elastic_run_is_sampled_with_shared_weights(tmp_path):
    fake_snapshot.make(tmp_path / "store", {"32x32": [20]}, tmp_path)
    settings = {"samples": 32, "data__validation_parts": 0, "log__validate_every_samples": 0}
    settings |= {"model__depth": 4, "elastic__depths": [4, 2], "elastic__patches": [2, 4]}
    codes = on_ranks(2, trainer_tasks.train, str(tmp_path / "store"), str(tmp_path), None, settings)
    assert [code for code, _ in codes] == [0, 0]
    run, prompts = str(tmp_path / "small"), ["a cat", "two", "three"]
    whole = drawing_tasks.latents_of_run(run, False, prompts)
    for parts in (ChosenParts(depth=2), ChosenParts(depth=2, patch=4), ChosenParts(null_depth=2)):
        alone = drawing_tasks.latents_of_run(run, False, prompts, parts)
        assert not torch.equal(alone, whole)
        for shared in on_ranks(2, drawing_tasks.latents_of_run, run, True, prompts, parts):
            assert torch.equal(shared, alone)
