"""Drawing from a trained run: independence of the batch, files with their settings, and one line for each
wrong input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.dataset.schema import Family
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.config import TEXT_IDENTITY, TextConfig
from pipeline import sample
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.inference.images import make_grid, read_settings, save_png
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.text.prompts import load_llm
from tests.helpers import sampling_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_sampler import MAX_TOKENS, make_sampler

PROMPTS = ["a red cat", "two dogs", "", "a very blue house", "tea", "a red cat", "snow", "rain"]
DRAWING = SamplingParams(steps=3, guidance=3.0, height=16, width=24)


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_batches_of_one_three_and_eight_draw_the_same_pictures_bit_for_bit(objective, dtype):
    sampler = make_sampler(objective, dtype)

    def drawn(batch, order):
        latents = [
            sampler.latents(
                [PROMPTS[place] for place in order[start : start + batch]],
                order[start : start + batch],
                DRAWING,
            )
            for start in range(0, 8, batch)
        ]
        return torch.cat(latents)[torch.tensor(order).argsort()]

    alone = drawn(1, list(range(8)))
    assert alone.std(0).min() > 1e-3
    for batch, order in (
        (3, list(range(8))),
        (8, list(range(8))),
        (3, [5, 2, 7, 0, 6, 1, 4, 3]),
        (8, [5, 2, 7, 0, 6, 1, 4, 3]),
    ):
        assert torch.equal(drawn(batch, order), alone)


def test_prompt_seed_guidance_negative_prompt_and_order_matter(sampler):
    def one(prompt="a red cat", seed=1, **changes):
        return sampler.latents([prompt], [seed], SamplingParams(**{**vars(DRAWING), **changes}))

    reference = one()
    assert torch.equal(reference, one())
    changed = [
        one("a blue cat"),
        one(seed=2),
        one(guidance=1.0),
        one(negative="dogs"),
        one(steps=4),
        one(scheduler="dpm"),
    ]
    changed += [one(instruction=False), one(without=("first",)), one(without=("second",))]
    assert all((each - reference).abs().max() > 1e-4 for each in changed)


def test_the_quantisations_round_trip_changes_little(sampler):
    plain, taken = (
        sampler.latents(["a red cat"], [1], SamplingParams(**{**vars(DRAWING), "quantised": q}))
        for q in (False, True)
    )
    assert 0 < (plain - taken).abs().max() < 0.1 * plain.std()


def test_a_prompt_is_read_once_by_each_llm():
    sampler = make_sampler()
    sampler.latents(PROMPTS, range(8), DRAWING)
    sampler.latents(PROMPTS[:3], range(3), DRAWING)
    assert [llm.encoded for llm in sampler.reader.llms.values()] == [6, 6]


def test_llms_can_be_freed_after_reading():
    sampler = make_sampler()
    sampler.reader.read(PROMPTS, keep_llms=False)
    assert not sampler.reader.llms
    sampler.latents(PROMPTS[:2], [0, 1], DRAWING)
    assert not sampler.reader.llms


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        (SamplingParams(height=20, width=24), "multiple of 8"),
        (SamplingParams(height=0, width=24), "multiple of 8"),
        (SamplingParams(height=16, width=24, steps=0), "between 1 and 1000"),
        (SamplingParams(height=16, width=24, scheduler="ddim"), "take one of"),
    ],
)
def test_wrong_settings_are_found_before_an_llm_is_loaded(drawing, message):
    sampler = make_sampler()
    with pytest.raises(UserError, match=message):
        sampler.check(drawing)
    assert not sampler.reader.llms


def test_a_prompt_that_is_too_long_is_refused(sampler):
    with pytest.raises(UserError, match=f"longer than the {MAX_TOKENS} tokens of first"):
        sampler.reader.read(["x" * (MAX_TOKENS + 1)])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(Sampler, "from_run", lambda *_: make_sampler())
    monkeypatch.setattr("sys.argv", ["sample", *map(str, arguments)])
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    sample.main()


def test_the_command_writes_pictures_with_settings_an_index_and_a_grid(monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.txt"
    # with a byte order mark and line ends of Windows
    prompts.write_text("two dogs\r\n\r\nein Haus – schön\r\n", encoding="utf-8-sig", newline="")
    out = tmp_path / "out"
    run_main(
        monkeypatch,
        "run",
        "--prompt",
        "a red cat",
        "--prompts",
        prompts,
        "--images",
        2,
        "--batch",
        4,
        "--out",
        out,
    )
    index = [json.loads(line) for line in (out / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in index] == [
        p for p in ("a red cat", "two dogs", "ein Haus – schön") for _ in range(2)
    ]
    assert [record["seed"] for record in index] == [5, 6] * 3
    for record in index:
        assert read_settings(out / record["file"]) == record
        with Image.open(out / record["file"]) as image:
            assert image.size == (24, 16)
            assert image.info["prompt"] == record["prompt"]
    assert (out / "grid.png").is_file()
    again = tmp_path / "again"
    run_main(monkeypatch, "run", "--prompt", "two dogs", "--seed", 6, "--out", again)
    first, second = (np.asarray(Image.open(path)) for path in (out / "00001_01.png", again / "00000_00.png"))
    assert (first == second).all()


def test_files_are_the_same_bytes_in_batches_of_one_three_and_eight(monkeypatch, tmp_path):
    for batch in (1, 3, 8):
        prompts = [each for prompt in PROMPTS if prompt for each in ("--prompt", prompt)]
        run_main(monkeypatch, "run", *prompts, "--batch", batch, "--out", tmp_path / str(batch))
    one, *others = (
        {path.name: path.read_bytes() for path in (tmp_path / str(batch)).iterdir()} for batch in (1, 3, 8)
    )
    assert len(one) == 7 + 2
    assert all(files == one for files in others)


def test_a_batch_computed_together_has_nearly_the_same_images_and_says_so(monkeypatch, tmp_path):
    prompts = [each for prompt in PROMPTS if prompt for each in ("--prompt", prompt)]
    for name, options in (("alone", ()), ("together", ("--together",))):
        run_main(monkeypatch, "run", *prompts, *options, "--out", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "alone").glob("*_*.png"))
    assert len(files) == 7
    for file in files:
        alone, together = (
            np.asarray(Image.open(tmp_path / name / file)).astype(int) for name in ("alone", "together")
        )
        assert abs(alone - together).max() <= 2
        assert "together" not in read_settings(tmp_path / "alone" / file)
        assert read_settings(tmp_path / "together" / file)["together"] is True


def test_two_processes_share_the_pictures_and_draw_the_same_as_one(tmp_path):
    arguments = ("--prompt", "a red cat", "--prompt", "two dogs", "--prompt", "tea", "--images", 2, "--out")
    written = {
        world: on_ranks(world, sampling_tasks.draw, *arguments, str(tmp_path / str(world)))
        for world in (1, 2)
    }
    one, two = (
        [json.loads(line) for line in (tmp_path / str(world) / "index.jsonl").read_text().splitlines()]
        for world in (1, 2)
    )
    assert one == two
    names = [record["file"] for record in one]
    assert (written[1], written[2]) == ([names], [names[0::2], names[1::2]])
    for name in [*names, "grid.png"]:
        first, second = (tmp_path / str(world) / name for world in (1, 2))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompt", "a", "--size", "64"), "height x width"),
        (("--prompt", "a", "--size", "63x64"), "multiple of 8"),
        (("--prompt", "a", "--scheduler", "magic"), "magic"),
        (("--prompt", "a", "--images", "0"), "at least 1"),
        (("--prompt", "a" * 99), "longer than"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, "run", "--out", tmp_path / "out", *arguments)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "index.jsonl").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no stage\.yaml"):
        Sampler.from_run(tmp_path, "ema", torch.device("cpu"), torch.float32)


def test_an_llm_that_is_missing_is_one_line():
    settings_of = {name: getattr(TextConfig(), name) for name in TEXT_IDENTITY} | {
        "llm": "package:no_such_llm",
        "prefix": "",
    }
    with pytest.raises(UserError, match="no_such_llm"):
        load_llm(Family("first", "text", settings_of), torch.device("cpu"))


def test_a_checkpoint_of_another_format_is_named_as_such(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_000000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 7}))
    for path in (tmp_path, checkpoint):
        with pytest.raises(UserError, match="format 7, this version reads format 1"):
            load_weights(path, "ema")


@given(st.integers(1, 12), st.text(max_size=80), st.sampled_from([(8, 8), (64, 40), (200, 300)]))
@settings(deadline=None, max_examples=10)
def test_a_grid_holds_any_number_of_pictures_and_any_caption(count, caption, size):
    grid = make_grid([Image.new("RGB", size, "red")] * count, [caption] * count)
    pixels = np.asarray(grid).reshape(-1, 3)
    red = (pixels == [255, 0, 0]).all(1).sum()
    factor = max(1, -(-128 // max(size)))
    assert red >= 0.9 * count * size[0] * size[1] * factor**2


@given(
    st.dictionaries(st.text(max_size=8), st.text() | st.integers() | st.booleans(), max_size=4),
    st.text(max_size=60),
)
@settings(deadline=None, max_examples=15)
def test_a_picture_carries_its_settings(tmp_path_factory, fields, prompt):
    path = tmp_path_factory.mktemp("png") / "picture.png"
    settings_of = {**fields, "prompt": prompt}
    save_png(Image.new("RGB", (8, 8)), path, settings_of)
    assert read_settings(path) == settings_of


def test_a_relative_store_that_is_not_here_says_where_here_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"store runs/demo/store: does not exist in {tmp_path}: correct"):
        open_store("runs/demo/store")
    with pytest.raises(UserError, match=f"store {tmp_path}/store: does not exist: correct"):
        open_store(str(tmp_path / "store"))
