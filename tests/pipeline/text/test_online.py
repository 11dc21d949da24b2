"""Captions encoded in the trainer: the numbers of stored families, from pairs and latents alone, exact when
resumed."""

import itertools
from dataclasses import replace

import pytest
import torch

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import committed, register_family
from data_prep.dataset.schema import PAIRS
from data_prep.dataset.snapshot import take_snapshot
from data_prep.families.encode import encode_family
from data_prep.families.text import run_text
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from model.condition import Condition
from pipeline import learned, train
from pipeline.diffusion.objective import make_objective
from pipeline.engine.network import build_network
from pipeline.export import export
from pipeline.inference import sampler
from pipeline.inference.sampler import Sampler
from pipeline.inference.source import load_export
from pipeline.runtime.run_log import read_events
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import dump_stage
from pipeline.stage.corpus import resolve
from pipeline.text.online import register_encoders
from pipeline.text.texts import to_text
from pipeline.training.inputs import NetworkInputs
from pipeline.training.validation import losses_at_fixed_timesteps
from tests.helpers import fake_dataset, fake_snapshot, tiny_llm, tiny_sampler, trainer_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.fake_ranks import open_data

CPU = torch.device("cpu")
BUCKETS = {"32x32": [20, 20, 9, 16], "32x64": [24, 11]}
WORDS = ["a red cat", "two dogs", "", "一只猫 😀", "a bird on a wire", "the sea"]


def captions(id):
    """None to three captions of a sample, some equal, some empty."""
    return [(0, f"{WORDS[(id + place) % len(WORDS)]} {id % 7 or ''}") for place in range(id % 4)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset with a snapshot of latents alone and one with text families too; and the encoders'
    settings."""
    folder = tmp_path_factory.mktemp("online")
    dataset = open_store(str(folder / "store"), create=True).sub("ds")
    fake_dataset.plan(dataset, BUCKETS)
    fake_dataset.make_pairs(dataset, captions=captions)
    latents = register_family(dataset, fake_snapshot.LATENTS, None)

    def encode(pairs):
        return [fake_snapshot.latents_row(pair.id, sorted(BUCKETS)[pair.id >> 32]) for pair in pairs], {}

    encode_family(dataset, latents, encode, Share())
    alone = take_snapshot(dataset)
    texts = [
        tiny_llm.make(folder / "llama", tiny_llm.llama, name="first", instruction="Describe: "),
        tiny_llm.make(
            folder / "gemma", tiny_llm.gemma3, name="second", instruction="Say it: ", quantisation="bf16"
        ),
    ]
    for text in texts:
        run_text(DatasetConfig(name="ds"), text, dataset, Share())
    return str(folder / "store"), {"online": alone.id, "families": take_snapshot(dataset).id}, texts


def settings(prepared, encode, **more):
    _, snapshots, texts = prepared
    names = [text.name for text in texts]
    return {
        "data__snapshot": snapshots[encode],
        "data__caption_drop": 0.2,
        "fusion__families": names,
        "fusion__encode": encode,
        "samples": 8 * 6,
        "log__validate_every_samples": 8 * 3,
        "text": texts if encode == "online" else [],
        **more,
    }


def run(prepared, runs, encode, stop_at=None, **more):
    (code, reports), _ = on_ranks(
        2, trainer_tasks.train, prepared[0], str(runs), stop_at, settings(prepared, encode, **more)
    )
    assert code == (0 if stop_at is None else EXIT_AGAIN)
    return reports


@pytest.fixture(scope="module")
def online_run(prepared, tmp_path_factory):
    runs = tmp_path_factory.mktemp("online_run")
    return runs / "small", run(prepared, runs, "online")


def losses(reports):
    return torch.tensor([report["loss"] for report in reports])


def texts_of(batch, constants):
    return [to_text(batch.texts[name], constants[name], torch.float32) for name in ("first", "second")]


def make_losses(stage, snapshot, texts, batch):
    """Losses of a network whose gates are open, so that its text matters; and with shuffled captions."""
    torch.manual_seed(0)
    network = build_network(stage, snapshot).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    inputs = NetworkInputs(stage, snapshot, {}, torch.float32)
    measured = [(inputs.clean_latents(batch), batch.noise, Condition(batch.u, texts))]
    objective = make_objective(stage.objective)
    return [
        losses_at_fixed_timesteps(network, measured, objective, torch.float32, shuffle)
        for shuffle in (False, True)
    ]


def test_batches_and_losses_are_those_of_the_stored_families(prepared, tmp_path):
    store = prepared[0]
    data = {}
    for encode in ("online", "families"):
        stage = trainer_tasks.stage(store, tmp_path / encode, **settings(prepared, encode))
        stage.data.workers = 1 if encode == "online" else 0
        if encode == "online":
            register_encoders(stage, open_store(store).sub("ds"), CPU)
        data[encode] = open_data(stage)
    ways = [(one.batches(), one.validation()) for one in data.values()]
    batches = [
        [*(batch for batch, _ in itertools.islice(training, 12)), *validation]
        for training, validation in ways
    ]
    for one in data.values():
        one.close()
    constants, lengths = data["families"].constants, set()
    for online, stored in zip(*batches, strict=True):
        assert torch.equal(online.ids, stored.ids)
        fresh, read = (texts_of(batch, constants) for batch in (online, stored))
        for ours, theirs in zip(fresh, read, strict=True):
            assert torch.equal(ours.mask, theirs.mask)
            torch.testing.assert_close(ours.states, theirs.states, atol=0.03, rtol=0.02)
        lengths.update(online.texts["first"].counts)
        assert online.texts["first"].counts == stored.texts["first"].counts
    assert 0 in lengths  # the null caption
    assert len(lengths) > 3
    stage, snapshot = data["families"].stage, data["families"].corpus
    (right, shuffled), (expected, _) = (
        make_losses(stage, snapshot, texts, stored) for texts in (fresh, read)
    )
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(shuffled, expected, rtol=1e-3, atol=0)


def test_the_trainer_sees_the_same_losses(prepared, online_run, tmp_path):
    expected = losses(run(prepared, tmp_path, "families"))
    torch.testing.assert_close(losses(online_run[1]), expected, rtol=2e-3, atol=0)


def test_a_resumed_run_repeats_an_uninterrupted_one(prepared, online_run, tmp_path):
    run(prepared, tmp_path, "online", stop_at=3)
    reports = run(prepared, tmp_path, "online")
    folder, expected = online_run
    assert losses(reports).tolist() == losses(expected).tolist()
    validations = [
        [event["loss"] for event in read_events(where, "validation")]
        for where in (tmp_path / "small", folder)
    ]
    assert validations[0] == validations[1] != []


def test_what_comes_after_training_reads_prompts_alike(prepared, online_run, tmp_path, monkeypatch):
    folder, _ = online_run
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        monkeypatch.setattr(sampler, "load_vae", lambda *_: tiny_sampler.make_vae())
        drawing = Sampler.from_run(moved, "ema", CPU, torch.float32)
        prompts = ["a red cat", "", "two dogs"]
        texts = drawing.reader.texts(prompts, torch.float32)
        export(moved, tmp_path / "exported", "ema", "fp32", "5GB")
        exported = load_export(tmp_path / "exported", CPU, torch.float32).reader.texts(prompts, torch.float32)
        for ours, theirs in zip(texts, exported, strict=True):
            torch.testing.assert_close(ours.states, theirs.states)
        assert learned.measure(moved, pairs=8)["right"] != learned.measure(moved, pairs=8)["shuffled"]
    finally:
        moved.rename(folder)


def test_a_changed_encoder_is_refused(prepared, tmp_path):
    store, _, texts = prepared
    stage = trainer_tasks.stage(store, tmp_path, **settings(prepared, "online"))
    register_encoders(stage, open_store(store).sub("ds"), CPU)
    stage.text = [replace(texts[0], layer="-2"), texts[1]]
    with pytest.raises(
        UserError, match=r"family first was made by another encoder \(layer: '-3' in the family, '-2' here"
    ):
        open_data(stage)


def test_captions_that_are_gone_are_named(prepared, tmp_path):
    store, _, _ = prepared
    stage = trainer_tasks.stage(store, tmp_path, **settings(prepared, "online"))
    dataset = open_store(store).sub("ds")
    register_encoders(stage, dataset, CPU)
    data = open_data(stage)
    tables = [
        dataset.local_path(file.key) for commit in committed(dataset, PAIRS).values() for file in commit.files
    ]
    tables = [path for path in tables if path.suffix == ".parquet"]
    whole = {path: path.read_bytes() for path in tables}
    try:
        damages = {
            "damaged": lambda path: path.write_bytes(whole[path][:-1]),
            "missing": lambda path: path.unlink(),
        }
        for word, damage in damages.items():
            for path in tables:
                damage(path)
            with pytest.raises(UserError, match=rf"pairs.*{word}"):
                next(data.batches())
    finally:
        for path, content in whole.items():
            path.write_bytes(content)
        data.close()


def test_families_made_in_another_way_are_refused(prepared, tmp_path):
    store, _, texts = prepared
    stage = trainer_tasks.stage(store, tmp_path, **settings(prepared, "families"))
    right = {"llm": texts[0].llm, "revision": None, "layer": "-3", "prefix": "Describe:  "}
    stage.fusion.expect = {"first": right}
    resolve(stage)
    for key, value in {"llm": "org/other", "revision": "a" * 40, "layer": -2, "prefix": ""}.items():
        stage.fusion.expect = {"first": {**right, key: value}}
        with pytest.raises(UserError, match=rf"family `first` .* was made with {key}="):
            resolve(stage)


def test_a_dry_run_and_settings_that_lack_something(prepared, tmp_path, monkeypatch, capsys):
    stage = trainer_tasks.stage(prepared[0], tmp_path, **settings(prepared, "online"))
    (tmp_path / "stage.yaml").write_text(dump_stage(stage))

    def say(*arguments):
        monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "stage.yaml"), "--dry-run", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    code, printed = say()
    assert code == 0
    assert "LLM widths [48, 48]" in printed
    assert not stage.run.exists()
    assert "no encoder named third" in say("fusion.families=[first,third]")[1]
    assert "fusion.expect is about stored families" in say("fusion.expect.first.layer=-3")[1]
    assert "no latents family" in say("data.latents=other")[1]
