import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import COMMANDS, main, make_parser, parse
from data_prep.config import load_dataset
from data_prep.dataset.parts import register_family
from data_prep.dataset.schema import Family
from data_prep.families.encode import encode_family
from data_prep.images.buckets import make_buckets
from data_prep.plan.filters import Filters
from data_prep.store.store import open_store
from model.common.progress import Progress
from model.common.share import Share
from model.config import TextConfig
from tests.helpers import tiny_llm
from tests.helpers.fake_dataset import encoder
from tests.helpers.raw_material import png, sample_members, write_tar

SHIPPED = sorted((Path(__file__).parent.parent.parent / "data_prep/datasets").glob("*.yaml"))


@pytest.fixture
def settings(tmp_path):
    write_tar(
        tmp_path / "in",
        "a.tar",
        [m for n in range(5) for m in sample_members(str(n), png(n), {"caption": f"c{n}"})],
    )
    path = tmp_path / "dataset.yaml"
    path.write_text(
        f"name: ds\nstore: {tmp_path}/store\nworkers: 0\npart_rows: 2\nimage_format: png\n"
        f"buckets: {{resolution: 32, max_aspect: 1, step: 16}}\nsources:\n  - {{path: {tmp_path}/in}}\n"
    )
    return str(path)


def failed(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        main(list(argv))
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_plan_pairs_report_verify_gc(settings, tmp_path, capsys):
    main(["plan", settings, "--gpu-tflops", "100"])
    assert "5 rows read, 5 planned in 3 parts of 1 buckets" in capsys.readouterr().out
    main(["pairs", settings, "--task", "0/2", "workers=0"])
    main(["pairs", settings])
    main(["verify", settings, "--deep"])
    main(["gc", settings])
    main(["report", settings, "--out", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").exists()


def test_a_plan_estimates_the_cost_of_the_text(settings, tmp_path, capsys):
    """5 captions of 2 letters and a suffix of 5: 1.75 tokens of 48 values and a scale each; 5 blocks of 4 w^2
    + 3 w f weights."""
    tiny_llm.make(tmp_path / "llm", tiny_llm.llama)
    entries = [
        f"{{name: one, llm: {tmp_path}/llm, suffix: <end>}}",
        f"{{name: half, llm: {tmp_path}/llm, quantisation: bf16}}",
    ]
    main(
        ["plan", settings, f"text=[{','.join(entries)}, {{name: away, llm: org/model}}]", "--gpu-tflops", "2"]
    )
    lines = capsys.readouterr().out.splitlines()
    one, half, away = (
        next(line for line in lines if f"text family {name}:" in line) for name in ("one", "half", "away")
    )
    tokens, weights = (2 + 5) / 4, 5 * (4 * 48 * 48 + 3 * 48 * 64)
    per_caption = f"{tokens * 52 / 1e3:,.1f} kB per caption (2 tokens x 48, int8)"
    assert f"{per_caption}, {5 * tokens * 52 / 1e12:.3g} TB in all" in one
    assert f"{2 * 5 * tokens * weights / 2e12 / 3600:.3g} GPU-hours at 2 TFLOP/s" in one
    assert f"{0.5 * 96 / 1e3:,.1f} kB per caption (0 tokens x 48, bf16)" in half
    assert "no estimate" in away


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name):
    parser = make_parser()._subparsers._group_actions[0].choices[name]
    example = COMMANDS[name][1]
    assert f"example: python -m data_prep {example}" in parser.format_help()
    assert parse(example.split()).command == name


def test_errors_are_one_line_with_a_way_out(settings, capsys, tmp_path):
    assert "write I/N" in failed(capsys, "pairs", settings, "--task", "3")
    assert "does not exist" in failed(capsys, "pairs", settings)
    assert "no such file" in failed(capsys, "plan", str(tmp_path / "absent.yaml"))
    assert "part_row" in failed(capsys, "plan", settings, "part_row=3")
    assert "not understood" in failed(capsys, "plan", settings, "--wrong")
    assert "no such filter" in failed(capsys, "plan", settings, "filters=[{name: tall}]")
    assert "no pairs left of 5 rows read" in failed(
        capsys, "plan", settings, "filters=[{name: min_side, value: 999}]"
    )
    assert "no plan yet" in failed(capsys, "pairs", settings)
    main(["plan", settings])
    assert "`seed` was 0, is 1" in failed(capsys, "pairs", settings, "seed=1")
    assert "no text family" in failed(capsys, "text", settings)
    assert "no latents family other" in failed(capsys, "latents", settings, "--family", "other")


def test_a_plan_of_many_pairs_advises_larger_parts(settings, capsys, monkeypatch):
    main(["plan", settings])
    assert "advice" not in capsys.readouterr().out
    monkeypatch.setattr("data_prep.plan.budget.MANY_ROWS", 4)
    main(["plan", settings])
    lines = [line for line in capsys.readouterr().out.splitlines() if "advice" in line]
    assert lines == [
        "advice: for 5 pairs, `part_rows: 4096` takes fewer requests and records than 2: set it and plan "
        "under another `name` before you run `pairs`"
    ]
    main(["plan", settings, "part_rows=4096", "name=large"])
    assert "advice" not in capsys.readouterr().out


def test_wrong_evaluation_sets_and_lists_are_one_line(settings, tmp_path, capsys):
    for override, says in (
        ("dedupe.against=[]", "dedupe.against: 0 sources"),
        (f"dedupe.against=[{{path: {tmp_path}/in}}]", "dedupe.against[0] is sources[0]"),
        (f"dedupe.against=[{{path: {tmp_path}/none}}]", f"dedupe.against: store {tmp_path}/none"),
        ("dedupe.against=[{kind: folder}]", "dedupe.against[0].path is empty"),
        (f"dedupe.drop={tmp_path}/none.parquet", f"dedupe.drop: {tmp_path}/none.parquet: no such file"),
        ("dedupe.drop=ids.csv", "name a .parquet file"),
    ):
        line = failed(capsys, "plan", settings, override)
        assert says in line

    # Nothing of them is left: the corrected dataset has the same name.
    failed(capsys, "plan", settings, f"sources.0.path={tmp_path}/none")
    main(["plan", settings])
    assert "5 planned" in capsys.readouterr().out


def test_overrides_can_be_anywhere():
    arguments = parse(["pairs", "x.yaml", "seed=1", "--task", "1/4", "workers=3"])
    assert arguments.overrides == ["seed=1", "workers=3"]
    assert arguments.task == Share(1, 4)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_datasets_are_sound(path):
    config = load_dataset(path, [])
    Filters(config.filters)
    assert make_buckets(config.buckets)
    assert len({family.name for family in [*config.latents, *config.text]}) == len(config.latents) + len(
        config.text
    )


def test_plan_and_pairs_do_not_import_torch(settings):
    code = "import sys, data_prep.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("model.common.progress.LINE_SECONDS", 0.0)
    with Progress("pairs", 4) as progress:
        progress.advance(3, "written")
        progress.advance(1, "dropped")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("pairs: 4/4 rows, ")
    assert lines[-1].endswith("| written 3, dropped 1")


def test_commands_with_nothing_to_encode_or_to_plan_import_no_torch(settings, tmp_path):
    main(["plan", settings])
    main(["pairs", settings])
    dataset = open_store(f"{tmp_path}/store").sub("ds")
    info = {"vae": "v", "revision": None}
    identity = {"vae": "AutoencoderKL", "moments": "bf16"}
    family = register_family(dataset, Family("latents", "latents", identity, info), None)
    encode_family(dataset, family, encoder(family), Share())
    entry = TextConfig(name="llm", llm="m")
    info = {"width": 2, "prefix_tokens": 0, "quantisation": entry.quantisation}
    family = register_family(dataset, Family("llm", "text", entry.identity, info), None)
    encode_family(dataset, family, encoder(family), Share())
    latents, text = "latents=[{vae: v}]", "text=[{name: llm, llm: m}]"
    program = "import sys; from data_prep.__main__ import main; main(sys.argv[1:])"
    program += "; assert 'torch' not in sys.modules"
    for words in (["plan", settings], ["latents", settings, latents], ["text", settings, text]):
        run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        assert ("all parts of this task are encoded" in run.stdout) == (words[0] != "plan")
