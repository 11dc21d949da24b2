"""Clips whose first frame is given, in training and in sampling."""

import pytest
import torch

from model.common.errors import UserError
from model.condition import Condition
from pipeline.diffusion.first_frame import GivenFirstFrame
from pipeline.diffusion.objective import make_objective
from pipeline.stage.config import load_stage
from pipeline.stage.objective import ObjectiveConfig
from tests.helpers.networks import close, normal, random_inputs, random_network

PATCH = (1, 2, 2)


def example(share, clips=64, frames=3):
    objective = make_objective(ObjectiveConfig(first_frame=share), PATCH)
    clean, noise = (normal(clips, 4, frames, 4, 6, seed=seed).float() for seed in (0, 1))
    numbers = normal(clips, 1, seed=2).float()
    made = objective.training_example(clean, noise, torch.rand(clips), lambda name, shape: numbers)
    return objective, clean, noise, made


def test_given_frames_are_clean_at_time_0_and_do_not_move():
    _, clean, _, made = example(0.3)
    given = (made.levels.places[:, 0] == 0).nonzero()[:, 0]
    assert 10 < len(given) < 30
    assert torch.equal(made.noisy[given][:, :, 0], clean[given][:, :, 0])
    assert not made.target[given][:, :, 0].any()
    assert (made.levels.places[given][:, :6] == 0).all()
    assert (made.levels.places[:, 6:] == 1).all()
    assert not made.timesteps[:, 0].any()
    assert torch.equal(made.timesteps[:, 1], made.levels.sample_times)


def test_all_other_frames_are_those_without_it():
    _, clean, noise, made = example(0.3)
    plain = make_objective(ObjectiveConfig(), PATCH)
    noisy, target = plain.add_noise(clean, noise, made.levels.sample_times)
    assert torch.equal(made.noisy[:, :, 1:], noisy[:, :, 1:])
    assert torch.equal(made.target[:, :, 1:], target[:, :, 1:])
    rest = (made.levels.places[:, 0] == 1).nonzero()[:, 0]
    assert torch.equal(made.noisy[rest], noisy[rest])


def test_an_image_is_never_given():
    _, _, _, made = example(1.0, frames=1)
    assert (made.levels.places == 1).all()


def test_the_network_reads_the_given_frame_and_leaves_it_as_it_is():
    network = random_network(axes=3, time_levels=2)
    _, timesteps, texts = random_inputs()
    condition, clip = Condition(timesteps, texts), normal(2, 4, 3, 4, 6)
    frame = normal(1, 4, 1, 4, 6, seed=3)
    function = GivenFirstFrame(network, network.sizes, frame)
    prediction = function(clip, condition)
    assert not prediction[:, :, 0].any()
    assert torch.equal(function.with_frame(clip)[:, :, :1], frame.expand(2, -1, -1, -1, -1))
    other = GivenFirstFrame(network, network.sizes, frame + 1)
    assert not close(other(clip, condition)[:, :, 1:], prediction[:, :, 1:])
    # what was at the place of the frame is not read
    changed = clip.clone()
    changed[:, :, 0] = 0
    assert torch.equal(function(changed, condition), prediction)


@pytest.mark.parametrize("setting", ["model.patch_frames=2", "objective.name=ddpm"])
def test_settings_that_contradict_it_are_one_line(setting):
    with pytest.raises(UserError, match=r"objective\.first_frame gives single frames"):
        load_stage("demo", ["objective.first_frame=0.3", setting])
