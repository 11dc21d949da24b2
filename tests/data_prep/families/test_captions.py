"""A captions family: each pair's answers once, whatever fails in between, and read by text families."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.captioners.answers import CUT, EQUAL, REFUSED, REPEATS, RULES
from data_prep.captioners.captioner import Answer
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import committed, committed_parts, read_commit, read_plan, register_family
from data_prep.dataset.schema import PAIRS, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.families import captions as step_module
from data_prep.families.captions import CaptionsStep, captions_family, run_captions
from data_prep.families.captions_report import captions_reports
from data_prep.families.generated import read_captions_family, read_rows
from data_prep.model_settings import CaptionsConfig, PromptConfig
from data_prep.plan.captions import CONTROL, EMPTY
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers import tiny_llm
from tests.helpers.endpoint import Endpoint, answer_to
from tests.helpers.fake_dataset import ALONE, make_pairs, plan, sample_ids
from tests.helpers.raw_material import png, sample_members, write_tar

PROMPTS = [PromptConfig("short", "Name it."), PromptConfig("long", "Describe it, {caption}.", 50)]


def settings(**changes):
    fields = {"name": "vlm", "model": "m", "endpoint": "http://unused/v1", "prompts": PROMPTS}
    return CaptionsConfig(**{**fields, **changes})


class Scripted:
    """A captioner whose answers are a function of the question."""

    def __init__(self, answer):
        self.answer, self.asked, self.closed = answer, [], False

    def ask(self, questions):
        self.asked += questions
        return [self.answer(question) for question in questions]

    def close(self):
        self.closed = True


@pytest.fixture
def dataset(tmp_path):
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    plan(dataset, {"64x64": [3, 3, 1], "32x96": [2]})
    make_pairs(dataset)
    return dataset


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that makes a scripted captioner the one that is opened."""

    def use(answer=lambda question: Answer(f"{question.image.decode()}: {question.prompt}")):
        captioner = Scripted(answer)
        monkeypatch.setattr(step_module, "open_captioner", lambda _: captioner)
        return captioner

    return use


def rows_of(dataset, name="vlm"):
    family = read_captions_family(dataset, name)
    rows = {}
    for part, commit in committed(dataset, name).items():
        for row in read_rows(dataset, family, commit):
            assert row["id"] not in rows, "a row came twice"
            rows[row["id"]] = json.loads(row["captions"]), json.loads(row["dropped"])
        assert commit.ids_xxh64 == read_commit(dataset, PAIRS, part).ids_xxh64
    return rows


def all_ids(dataset):
    return [id for part in read_plan(dataset).parts for id in sample_ids(dataset, part)]


def test_each_image_is_asked_each_prompt_once(dataset, scripted):
    captioner = scripted()
    run_captions(settings(), dataset, ALONE)
    rows = rows_of(dataset)
    assert sorted(rows) == sorted(all_ids(dataset))
    for id, (captions, dropped) in rows.items():
        expected = [("short", f"image {id}: Name it."), ("long", f"image {id}: Describe it, caption {id}.")]
        assert ([(each["kind"], each["text"]) for each in captions], dropped) == (expected, [])
    assert len(captioner.asked) == 2 * len(rows)
    assert {question.max_tokens for question in captioner.asked} == {256, 50}
    # Each answer has random numbers of its own.
    assert len({question.seed for question in captioner.asked}) == len(captioner.asked)
    assert captioner.closed
    assert verify(dataset, deep=True).problems == []
    run_captions(settings(), dataset, ALONE)
    assert len(captioner.asked) == 2 * len(rows)


def test_answers_that_are_no_captions_are_dropped_and_counted(dataset, scripted):
    kinds = {
        0: Answer("I'm sorry, I can't see it."),
        1: Answer(" \n "),
        2: Answer("a red cat on a blue mat and " * 20),
        3: Answer("A long answer that", is_complete=False),
        4: Answer("a \x1b[31m red house"),
        5: Answer("", "answer: none from the endpoint"),
    }

    def answer(question):
        number = int(question.image.split()[1]) - (1 << 32)
        return kinds.get(number, Answer('"A house."', prompt_tokens=7, tokens=3, requests=2))

    captioner = scripted(answer)
    prompts = [PromptConfig("long", "Describe it."), PromptConfig("long", "Describe it again.")]
    run_captions(settings(prompts=prompts), dataset, ALONE)
    rows = rows_of(dataset)
    bucket = sorted(read_plan(dataset).buckets).index("64x64") << 32
    reasons = [REFUSED, EMPTY, REPEATS, CUT, CONTROL, "answer: none from the endpoint"]
    for number, reason in enumerate(reasons):
        captions, dropped = rows[bucket + number]
        assert captions == []
        assert [each["reason"] for each in dropped] == [reason, reason]
        assert all("\x1b" not in each["text"] and len(each["text"]) <= 210 for each in dropped)
    # The quotation marks around a whole answer are the model's, and an equal caption is stored once.
    captions, dropped = rows[bucket + 6]
    assert captions == [{"kind": "long", "text": "A house."}]
    assert [each["reason"] for each in dropped] == [EQUAL]

    (report,) = captions_reports(dataset)
    assert sum(report.captions.values()) + sum(report.dropped.values()) == len(captioner.asked)
    assert report.captions == {"long": len(rows) - len(reasons)}
    assert report.without == len(reasons)
    answered = [answer(question) for question in captioner.asked]
    assert report.requests == sum(one.requests for one in answered)
    assert report.repeated == report.requests - len(answered)
    assert (report.prompt_tokens, report.tokens) == (
        sum(one.prompt_tokens for one in answered),
        sum(one.tokens for one in answered),
    )
    for word in ("answers dropped", "cost", str(report.count)):
        assert word in str(report)


def test_other_settings_are_another_family(dataset, scripted, monkeypatch):
    scripted()
    run_captions(settings(), dataset, ALONE)
    base = captions_family(settings()).hash
    for changes in (
        {"model": "other"},
        {"revision": "2"},
        {"prompts": PROMPTS[:1]},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 1},
        {"max_letters": 100},
        {"refusals": ["no"]},
    ):
        assert captions_family(settings(**changes)).hash != base
        with pytest.raises(UserError, match="is another encoding"):
            run_captions(settings(**changes), dataset, ALONE)
    # The server may move, and its load is no matter of the captions.
    moved = settings(endpoint="http://elsewhere/v1", concurrency=5, batch=2, timeout_seconds=5.0)
    assert captions_family(moved).hash == base
    run_captions(moved, dataset, ALONE)


def test_parts_without_pairs_are_named_and_the_others_are_done(tmp_path, scripted):
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    plan(dataset, {"64x64": [2, 2]})
    make_pairs(dataset, drop={0, 1})
    dataset.delete(Part("64x64", 1).commit_key(PAIRS))
    scripted()
    with pytest.raises(UserError, match=r"1 of 2 parts .* no pairs yet \(64x64/00001"):
        run_captions(settings(), dataset, ALONE)
    assert committed_parts(dataset, "vlm") == {Part("64x64", 0)}
    assert rows_of(dataset) == {}  # all of its images were damaged


def test_an_error_ends_the_command_and_keeps_the_parts_that_are_done(dataset, scripted):
    def answer(question):
        if question.image.endswith(b" 4294967299"):
            raise UserError("the endpoint is down")
        return Answer("A house.")

    captioner = scripted(answer)
    with pytest.raises(UserError, match="the endpoint is down"):
        run_captions(settings(), dataset, ALONE)
    assert captioner.closed
    done = committed_parts(dataset, "vlm")
    assert len(done) < 4
    scripted()
    run_captions(settings(), dataset, ALONE)
    assert done < committed_parts(dataset, "vlm")
    assert verify(dataset, deep=True).problems == []


def test_a_unit_is_done_once_whoever_does_it(dataset, scripted):
    captioner = scripted()
    family = register_family(dataset, captions_family(settings()), None)
    step = CaptionsStep(settings(), dataset, family)
    assert len(step.missing()) == 4
    unit = step.units[0]
    with step.setup() as do:
        assert [outcome.counts["captioned"] for outcome in do([unit])] == [1]
        first = dataset.read(Part.parse(unit).commit_key("vlm"))
        assert [outcome.counts["captioned"] for outcome in do([unit])] == [1]
    assert dataset.read(Part.parse(unit).commit_key("vlm")) == first
    assert unit not in step.missing()
    assert step.exists(unit)
    assert captioner.closed


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Return the settings of a dataset of 23 real images, without endpoint and store."""
    folder = tmp_path_factory.mktemp("raw")
    members = []
    for number in range(23):
        members += sample_members(str(number), png(number, 40, 40), {"caption": f"thing {number}"})
    write_tar(folder / "in", "a.tar", members)
    tiny_llm.save(folder / "llm", tiny_llm.llama())
    return {
        "name": "ds",
        "workers": 0,
        "part_rows": 3,
        "image_format": "png",
        "buckets": {"resolution": 32, "max_aspect": 1, "step": 32},
        "sources": [{"path": str(folder / "in")}],
        "text": [
            {"name": "plain", "llm": str(folder / "llm"), "suffix": "<end>", "dtype": "fp32"},
            {
                "name": "both",
                "llm": str(folder / "llm"),
                "suffix": "<end>",
                "dtype": "fp32",
                "captions": ["vlm"],
            },
        ],
    }


def write_yaml(raw, folder, url):
    prompts = [{"kind": "short", "text": "Name it."}, {"kind": "long", "text": "Describe it, {caption}."}]
    captions = {"name": "vlm", "model": "m", "endpoint": url, "prompts": prompts, "timeout_seconds": 2}
    path = folder / "ds.yaml"
    path.write_text(json.dumps({**raw, "store": str(folder / "store"), "captions": [captions]}))
    return path


def test_stopped_before_or_after_any_write_and_run_again_nothing_is_lost_or_twice(
    tmp_path, scripted, monkeypatch
):
    for writes in range(0, 40, 3):
        dataset = open_store(str(tmp_path / f"store{writes}"), create=True).sub("ds")
        plan(dataset, {"64x64": [2, 2]})
        make_pairs(dataset)
        captioner = scripted()
        left = iter(range(writes))
        complete = True
        for name in ("put", "put_new", "delete"):
            real = getattr(type(dataset), name)

            def stopping(store, *arguments, real=real, left=left, before=writes % 2 == 0):
                done = None if before else real(store, *arguments)
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return real(store, *arguments) if before else done

            monkeypatch.setattr(type(dataset), name, stopping)
        try:
            run_captions(settings(), dataset, ALONE)
        except KeyboardInterrupt:
            complete = False
        monkeypatch.undo()

        assert verify(dataset, deep=True).problems == []
        captioner = scripted()
        run_captions(settings(), dataset, ALONE)
        assert not (complete and captioner.asked)
        rows = rows_of(dataset)
        assert sorted(rows) == sorted(all_ids(dataset))
        assert all(len(captions) == 2 for captions, _ in rows.values())
        collect_garbage(dataset, -1, True)
        assert verify(dataset, deep=True).problems == []
        if complete:
            return
    raise AssertionError("no run was complete: give it more writes")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_beside_faults_nothing_is_lost_or_twice(raw, tmp_path, monkeypatch):
    """Two processes do the same work, and both are killed again and again, while the endpoint has faults."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "60")
    chance = random.Random(3)
    faults = ["", "", "", "cut", 500, 429, "not json", "wrong json"]
    with closing(Endpoint(lambda *_: chance.choice(faults), delay=0.05)) as stub:
        path = write_yaml(raw, tmp_path, stub.url)
        main(["plan", str(path)])
        main(["pairs", str(path)])
        dataset = open_store(str(tmp_path / "store")).sub("ds")
        command = [sys.executable, "-m", "data_prep", "captions", str(path)]
        kills = 0
        for _ in range(40):
            before = sum(stub.requests.values())
            tasks = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
            # From the first requests on, since before them there is nothing to lose.
            while sum(stub.requests.values()) == before and any(task.poll() is None for task in tasks):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.8) if kills < 6 else 100)
            with suppress(ProcessLookupError):
                for task in tasks:
                    if task.poll() is None:
                        task.send_signal(signal.SIGKILL)
                        kills += 1
            codes = [task.wait() for task in tasks]
            assert set(codes) <= {0, -signal.SIGKILL}
            assert verify(dataset, deep=True).problems == []
            if 0 in codes:
                break
        assert kills >= 2

    rows = rows_of(dataset)
    assert len(rows) == 23
    served = {answer_to(question) for question in stub.served}
    for captions, dropped in rows.values():
        assert len(captions) + len(dropped) == 2
        assert all(each["text"] in served for each in captions)
        # Every answer is a function of image and prompt here, so a lost one would show.
        assert {each["reason"] for each in dropped} <= {REFUSED, EMPTY, REPEATS}
    assert Path(tmp_path / "store").is_dir()
    collect_garbage(dataset, -1, True)
    assert verify(dataset, deep=True).problems == []


@pytest.mark.timeout(300)
def test_text_families_read_generated_captions_and_snapshots_name_their_kinds(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with closing(Endpoint()) as stub:
        path = write_yaml(raw, tmp_path, stub.url)
        main(["plan", str(path)])
        main(["pairs", str(path)])
        with pytest.raises(SystemExit):  # there is no captions family yet
            main(["text", str(path), "--family", "both"])
        main(["captions", str(path)])
    main(["text", str(path)])
    main(["text", str(path)])
    dataset = open_store(str(tmp_path / "store")).sub("ds")
    rows = rows_of(dataset)

    kinds = {}
    for name in ("plain", "both"):
        for part, commit in committed(dataset, name).items():
            dataset.fetch(commit.files[0], tmp_path / "shard")
            for row in Shard(tmp_path / "shard", read_family_columns(dataset, name)):
                kinds.setdefault(row["id"], {})[name] = np.frombuffer(row["kinds"], np.uint8).tolist()
                assert len(np.frombuffer(row["tokens"], np.int32)) == len(kinds[row["id"]][name]), part
    names = ["original", "short", "long"]
    for id, found in kinds.items():
        assert found["plain"] == [0]
        assert [names[kind] for kind in found["both"]] == [
            "original",
            *(each["kind"] for each in rows[id][0]),
        ]

    # Captions families are in a snapshot only if they are named.
    both = take_snapshot(dataset, ["both"])
    assert (both.caption_kinds, sorted(both.families)) == (names, ["both"])
    assert take_snapshot(dataset, ["plain"]).caption_kinds == ["original"]
    assert sorted(take_snapshot(dataset).families) == ["both", "plain"]
    assert "vlm" in take_snapshot(dataset, ["both", "vlm"]).families
    main(["report", str(path), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "Captions families" in page
    assert REFUSED in page


def read_family_columns(dataset, name):
    from data_prep.dataset.snapshot_reader import read_family

    return read_family(dataset, name).columns


def test_settings_that_name_no_captions_are_refused():
    from data_prep.config import DatasetConfig, TextFamilyConfig

    with pytest.raises(UserError, match="captions 'vlm' is not in the dataset's YAML"):
        DatasetConfig(text=[TextFamilyConfig(name="t", captions=["vlm"])])
    for changes, message in (
        ({"model": ""}, "`model` is empty"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [PromptConfig("", "a")]}, "set both `kind` and `text`"),
        ({"template": "a"}, "it needs {prompt}"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**changes)
    assert RULES == 1
