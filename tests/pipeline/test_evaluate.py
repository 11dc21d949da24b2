"""The public benchmarks as commands: chance and truth, layouts, resuming and sharing, and one line for each
wrong input."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from model.common.errors import UserError
from model.common.share import Share
from model.scorers.files import download_data, find_scorer
from pipeline import evaluate
from pipeline.evaluation.common import read_json, read_text
from pipeline.inference.images import read_settings
from pipeline.runtime.distributed import free_port
from tests.helpers import evaluate_tasks
from tests.helpers.distributed import CONTEXT
from tests.helpers.fake_bench import WORLDS, Judges, Oracle, make_judges
from tests.helpers.tiny_sampler import make_sampler

CHANCE = {
    # right by guessing: one object 1/2, two 1/4, a count of two never, a colour 1/20, a place 1/16, two
    # colours 1/400
    "geneval": (np.mean([1 / 2, 1 / 4, 0, 1 / 20, 1 / 16, 1 / 400]), 0.13),
    # 1/2, a child of it 1/4, and 1/2
    "dpg": (100 * (1 / 2 + 1 / 4 + 1 / 2) / 3, 14),
    "genai_bench": (1 / 2, 0.14),
    # colour: two chunks of 1/2; place: both objects 1/4, their place 1/4, worth 0.95 / 2 + 1 / 2
    "t2i_compbench": ((1 / 4 + 1 / 16 * 0.975) / 2, 0.1),
}


def grey(world):
    """FID has no level of guessing. A model that knows nothing of the reference is about as far from it as
    pictures with nothing on them, whose distance is the reference's variance and that of its mean from
    grey."""
    paths = sorted((world.folder / "truth" / "images").glob("*.png"))
    reference = Judges(world.world).features([Image.open(path) for path in paths]).double().numpy()
    return float(((reference.mean(0) - 127.5) ** 2).sum() + reference.var(0, ddof=1).sum())


class Place:
    """A benchmark's world, and its command."""

    def __init__(self, bench, folder, monkeypatch):
        self.bench, self.folder, self.monkeypatch = bench, folder, monkeypatch
        folder.mkdir()
        self.prompts, self.world = WORLDS[bench](folder)
        self.out = folder / "out"
        for name in ("RANK", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID"):
            monkeypatch.delenv(name, raising=False)

    def words(self, *arguments, out=None):
        given = ["--prompts", self.prompts, "--steps", 2, "--batch", 40, "--out", out or self.out]
        if self.bench == "fid":
            given += ["--reference", self.folder / "truth" / "images"]
        return list(map(str, ["run", "--bench", self.bench, *given, *arguments]))

    def run(self, sampler, *arguments, out=None):
        self.monkeypatch.setattr(evaluate, "load_source", lambda *_: sampler)
        self.monkeypatch.setattr(evaluate, "ScorerModels", lambda *_: make_judges(self.world))
        self.monkeypatch.setattr("sys.argv", ["evaluate", *self.words(*arguments, out=out)])
        evaluate.main()

    def run_on_two(self, *arguments, out, killed=({}, {})):
        """The same on two processes that meet as torchrun's do; `killed`: when each of them is. Returns their
        exit codes."""
        words, port = self.words(*arguments, out=out), free_port()
        processes = [
            CONTEXT.Process(
                target=evaluate_tasks.run,
                args=(rank, 2, port, self.world, words),
                kwargs=killed[rank],
                daemon=True,
            )
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    def result(self, out=None):
        return json.loads(((out or self.out) / "result.json").read_text())


@pytest.fixture
def place(tmp_path, monkeypatch):
    return lambda bench: Place(bench, tmp_path / bench, monkeypatch)


@pytest.fixture(scope="module")
def untrained():
    return make_sampler()


@pytest.mark.parametrize("bench", sorted(WORLDS))
def test_the_truth_scores_everything_and_random_weights_score_at_chance(place, untrained, bench):
    world = place(bench)
    truth = world.folder / "truth"
    if bench == "fid":
        world.run(Oracle(world.world), "--stage", "images", out=truth)
    more = ("--images", 3) if bench in ("genai_bench", "t2i_compbench") else ()
    world.run(Oracle(world.world), *more)
    result = world.result()
    best = {"dpg": 100.0, "fid": 0.0}.get(bench, 1.0)
    assert result["scores"]["overall"] == pytest.approx(best, abs=1e-6)
    for group in ("tags", "skills", "categories"):
        assert set(result["scores"].get(group, {"": best}).values()) == {best}
    assert all(each["revision"] == "of the test" for each in result["scorer"]["models"].values())
    world.run(untrained, *more, out=world.folder / "untrained")
    value = world.result(world.folder / "untrained")["scores"]["overall"]
    chance, near = (grey(world), 0.15 * grey(world)) if bench == "fid" else CHANCE[bench]
    assert value == pytest.approx(chance, abs=near)


LAYOUTS = {
    "geneval": [
        "00000/metadata.jsonl",
        *(f"00000/samples/{j:05d}.png" for j in range(4)),
        "00023/samples/00003.png",
    ],
    "dpg": ["0.png", "24.png"],
    "genai_bench": ["00000.jpeg", "00023.jpeg"],
    "t2i_compbench": [
        "color/samples/a cat, a dog_000000.png",
        "spatial/samples/cat on the left of cow_000019.png",
    ],
    "fid": ["000000.png", "000023.png"],
}


@pytest.mark.parametrize("bench", sorted(WORLDS))
def test_layouts_are_those_of_the_benchmarks_own_tools(place, bench):
    world = place(bench)
    world.run(Oracle(world.world), "--stage", "images", "--seed", 7)
    images = world.out / "images"
    assert all((images / name).is_file() for name in LAYOUTS[bench])
    files = [path for path in images.rglob("*") if path.suffix in (".png", ".jpeg")]
    assert len(files) == {"geneval": 96, "dpg": 25, "genai_bench": 24, "t2i_compbench": 240, "fid": 24}[bench]
    with Image.open(images / LAYOUTS[bench][-1]) as image:
        assert image.size == ((48, 32) if bench == "dpg" else (24, 16))
        assert image.format == ("JPEG" if bench == "genai_bench" else "PNG")
    if bench == "geneval":
        lines = world.prompts.read_text().splitlines()
        assert json.loads((images / "00023/metadata.jsonl").read_text()) == json.loads(lines[23])
        assert read_settings(images / "00023/samples/00003.png")["seeds"] == [10]


def test_only_what_is_missing_is_drawn_and_asked(place):
    world = place("genai_bench")
    oracle = Oracle(world.world)
    world.run(oracle)
    before = world.result()
    images, (answers,) = world.out / "images", (world.out / "answers").glob("*.jsonl")
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:20]) + lines[20][:25])  # killed while it wrote
    (images / "00003.jpeg").unlink()
    drawn, asked = [], Judges.asked
    oracle.latents = lambda prompts, *rest: drawn.extend(prompts) or Oracle.latents(oracle, prompts, *rest)
    world.run(oracle)
    assert drawn == [list(world.world)[3]]
    assert Judges.asked - asked == 4
    assert world.result() == before
    asked = Judges.asked
    world.run(oracle, "untagged=true")
    assert Judges.asked == asked
    assert world.result()["rules"] == {"untagged": True}


def test_shares_of_an_array_make_what_one_task_makes(place, untrained, capsys):
    world = place("dpg")
    world.run(untrained, "--images", 1)
    shared = world.folder / "shared"
    for task in (2, 0, 1):
        assert not (shared / "result.json").exists()
        world.run(untrained, "--images", 1, "--task", f"{task}/3", out=shared)
    assert "other shares are not done" in capsys.readouterr().out
    assert world.result(shared) == world.result()
    assert len(list((shared / "answers").glob("*.jsonl"))) == 3
    for path in (world.out / "images").iterdir():
        assert path.read_bytes() == (shared / "images" / path.name).read_bytes()  # however they were batched


def answered(folder):
    """Process -> the pictures that it answered about."""
    files = sorted((folder / "answers").glob("*.jsonl"))
    return [[json.loads(line)["file"] for line in file.read_text().splitlines()] for file in files]


def test_two_processes_that_are_killed_and_started_again_make_what_one_makes(place, untrained):
    world = place("dpg")
    arguments = ("--images", 1, "--batch", 1)
    world.run(untrained, *arguments)
    shared = world.folder / "shared"
    assert world.run_on_two(*arguments, out=shared, killed=({"answers": 5}, {"images": 3})) == [-9, -9]
    (files,) = answered(world.out)
    shares = [Share(rank, 2).owns(files) for rank in (0, 1)]
    drawn = {path.name: path.stat().st_mtime_ns for path in (shared / "images").iterdir()}
    assert drawn.keys() == {*shares[0], *shares[1][:3]}
    assert answered(shared) == [shares[0][:5]]
    assert world.run_on_two(*arguments, out=shared) == [0, 0]
    assert answered(shared) == shares
    assert all((shared / "images" / name).stat().st_mtime_ns == time for name, time in drawn.items())
    assert world.result(shared) == world.result()


def test_a_share_asks_about_its_own_pictures_while_others_are_being_drawn(place, untrained):
    world = place("fid")
    world.run(Oracle(world.world), "--stage", "images", out=world.folder / "truth")
    world.run(untrained)
    shared = world.folder / "shared"
    for task in (0, 1):  # a reference beside the drawn pictures must not move the shares
        world.run(untrained, "--task", f"{task}/2", out=shared)
    result = world.result(shared)
    assert result["scores"]["overall"] == pytest.approx(world.result()["scores"]["overall"], rel=0.01)
    assert (result["pictures"], result["prompts"]) == (24, 24)


def test_the_formula_alone_and_the_answers_alone_can_be_redone(place, untrained):
    world = place("dpg")
    world.run(untrained, "--stage", "images", "--images", 1)
    world.run(untrained, "--stage", "answers")
    world.run(untrained, "--stage", "score")
    first = world.result()
    assert first["scores"]["left_out"] == ["0"]
    shutil.rmtree(world.out / "images")
    world.run(untrained, "--stage", "score", "skip_first_row=false")
    second = world.result()
    assert second["scores"]["left_out"] == []
    assert second["rules"] == {**first["rules"], "skip_first_row": False}


def fails(world, capsys, message, *arguments, sampler=None):
    with pytest.raises(SystemExit) as exit_info:
        world.run(sampler or Oracle(world.world), *arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "missing.csv"), "no such file"),
        (("--images", "5"), "at most 4"),
        (("--images", "0"), "at least 1"),
        (("--task", "3/3"), "numbered from 0"),
        (("--task", "a"), "I/N"),
        (("--size", "64"), "height x width"),
        (("skip_row=true",), "skip_first_row"),
        (("skip_first_row=perhaps",), "skip_first_row"),
        (("skip_first_row",), "key=value"),
        (("--question", "what?"), "{}"),
        (("--stage", "answers"), "--stage images first"),
        (("--stage", "score"), "--stage answers first"),
    ],
)
def test_wrong_input_is_one_line(place, capsys, arguments, message):
    fails(place("dpg"), capsys, message, *arguments)


def test_other_weights_settings_and_benchmarks_are_not_mixed(place, capsys):
    world = place("dpg")
    world.run(Oracle(world.world), "--stage", "images")
    fails(world, capsys, "seed", "--stage", "images", "--seed", 8)
    other = Oracle(world.world)
    next(other.network.parameters()).data += 1
    fails(world, capsys, "weights_hash", "--stage", "images", sampler=other)
    (world.out / "images" / "3.png").unlink()
    fails(world, capsys, "3.png", "--stage", "answers")
    (world.out / "images" / "3.png").write_bytes(b"x")
    fails(world, capsys, "not an image", "--stage", "answers")
    fails(world, capsys, "answers are missing", "--stage", "score")
    world.bench = "genai_bench"
    fails(world, capsys, "has the images of dpg", "--stage", "answers")


@pytest.mark.parametrize(
    ("bench", "name", "text", "message"),
    [
        ("geneval", "evaluation_metadata.jsonl", '{"tag": "x"}', "line 1"),
        ("geneval", "evaluation_metadata.jsonl", "", "no prompt"),
        (
            "geneval",
            "evaluation_metadata.jsonl",
            '{"tag": "x", "prompt": "", "include": [{"class": "a"}]}',
            "line 1",
        ),
        ("dpg", "dpg_bench.csv", "item_id,text\n1,a", "dpg_bench.csv"),
        ("genai_bench", "genai_skills.json", '{"basic": [99]}', "genai_skills.json"),
        ("genai_bench", "genai_skills.json", "{", "not JSON"),
        ("t2i_compbench", "color_val.txt", "a/b", "file's name"),
        ("fid", "captions.txt", "", "no prompt"),
    ],
)
def test_other_files_than_the_benchmarks_are_one_line(place, capsys, bench, name, text, message):
    world = place(bench)
    (world.folder / name).write_text(text)
    fails(world, capsys, message)


def test_scorers_and_prompts_are_named_by_folder_or_by_commit(tmp_path, capsys, place):
    for source in ("missing", "owner/name", "owner/name@main", "../owner/name"):
        with pytest.raises(UserError, match="40-digit commit"):
            find_scorer(source, "--vqa")
        with pytest.raises(UserError, match="40-digit commit"):
            download_data(source, "--prompts")
    with pytest.raises(UserError, match="no safetensors"):
        find_scorer(str(tmp_path), "--vqa")
    models = evaluate.ScorerModels({"vqa": None, "phrases": "x"}, None, "", "", None)
    with pytest.raises(UserError, match=r"needs --vqa.*published with"):
        models.identity({"vqa"})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="No such file"):
        read_text(tmp_path / "y")
