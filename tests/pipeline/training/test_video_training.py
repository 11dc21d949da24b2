"""Training on clips and images together, from scratch and from an image network."""

import pytest
import torch

from pipeline.checkpoint.checkpoints import load_weights
from pipeline.runtime.stopping import EXIT_AGAIN
from tests.helpers import fake_snapshot as fake
from tests.helpers import trainer_tasks
from tests.helpers.distributed import on_ranks

IMAGES = {"32x32": [20, 12]}
BOTH = {**IMAGES, "32x32x5": [18]}
PLAIN = {"log__validate_every_samples": 0, "data__validation_parts": 0, "samples": 8 * 6}
FAMILIES = [fake.CLIPS, *fake.TEXTS.values()]
NEW = ["position.frame_embedding.bias", "position.frame_embedding.weight", "position.temporal.weight"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, family, buckets in (
        ("images", fake.LATENTS, IMAGES),
        ("frames", fake.CLIPS, IMAGES),
        ("both", fake.CLIPS, BOTH),
    ):
        fake.make(folder / name, buckets, folder, families=[family, *fake.TEXTS.values()])
    return {name: str(folder / name) for name in ("images", "frames", "both")}


@pytest.fixture(scope="module")
def image_run(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    ((code, _),) = on_ranks(1, trainer_tasks.train, stores["images"], str(folder), None, PLAIN)
    assert code == 0
    return folder / "small"


def test_both_train_in_one_run_on_two_ranks(stores, tmp_path):
    settings = {**PLAIN, "data__tokens_per_batch": 16 * 8, "data__batch_multiple": 4}
    ranks = on_ranks(2, trainer_tasks.train, stores["both"], str(tmp_path), None, settings)
    assert [code for code, _ in ranks] == [0, 0]
    reports = ranks[0][1]
    assert all(report["loss"] > 0 for report in reports)
    weights = load_weights(tmp_path / "small", "raw")
    assert set(NEW) <= set(weights)
    assert all(weights[name].any() for name in weights)


def test_an_image_network_goes_on_with_clips_from_the_same_loss(stores, image_run, tmp_path):
    settings = {**PLAIN, "start_from": str(image_run), "start_weights": "raw", "name": "next"}
    ((code, warned),) = on_ranks(1, trainer_tasks.start_next_stage, stores["both"], str(tmp_path), settings)
    assert code == EXIT_AGAIN
    assert all(name in warned[0] for name in NEW)
    before, now = load_weights(image_run, "raw"), load_weights(tmp_path / "next", "raw")
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert sorted(set(now) - set(before)) == NEW

    losses = []
    for store in ("images", "frames"):
        one = {**settings, "samples": 8, "name": f"one_{store}"}
        ((code, reports),) = on_ranks(1, trainer_tasks.train, stores[store], str(tmp_path), None, one)
        assert code == 0
        losses.append(reports[0]["loss"])
    assert losses[0] == losses[1]


def test_stages_go_from_images_to_short_and_then_to_long_clips_on_two_ranks(stores, image_run, tmp_path):
    fake.make(tmp_path / "long", {**IMAGES, "32x32x9": [18]}, tmp_path, families=FAMILIES)
    both = {"data__tokens_per_batch": 16 * 12, "data__batch_multiple": 4, "objective__shift_positions": 16}
    last, losses = image_run, {}
    for name, store in (("short", stores["both"]), ("long", str(tmp_path / "long"))):
        settings = {**PLAIN, **both, "start_from": str(last), "start_weights": "raw", "name": name}
        codes = on_ranks(2, trainer_tasks.start_next_stage, store, str(tmp_path), settings)
        assert {code for code, _ in codes} == {EXIT_AGAIN}
        before, now = load_weights(last, "raw"), load_weights(tmp_path / name, "raw")
        assert all(torch.equal(now[weight], before[weight]) for weight in before)
        assert sorted(set(now) - set(before)) == (NEW if name == "short" else [])

        # The same run goes on, now to its end.
        ranks = on_ranks(2, trainer_tasks.train, store, str(tmp_path), None, settings)
        assert [code for code, _ in ranks] == [0, 0]
        losses[name] = {key for report in ranks[0][1] for key in report if key.startswith("loss_32")}
        last = tmp_path / name
    assert losses == {"short": {"loss_32x32", "loss_32x32x5"}, "long": {"loss_32x32", "loss_32x32x9"}}
    changed = load_weights(last, "raw")
    assert all((changed[name] != now[name]).any() for name in NEW)
