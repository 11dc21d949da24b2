"""Rotary positions: relative, of the published split, the same for an image and a clip of one frame."""

import pytest
import torch

from model.common.errors import UserError
from model.condition import Condition
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.flops import count_parameters
from model.rotary import axis_widths, rotate, rotation_table
from tests.helpers.networks import WIDTHS, close, normal, random_inputs, random_network


def test_the_split_is_the_published_one():
    assert axis_widths(128) == (16, 56, 56)
    for head in (8, 16, 32, 64, 72):
        widths = axis_widths(head)
        assert sum(widths) == head
        assert not any(width % 2 for width in widths)


def test_products_depend_on_the_distance_alone():
    table = rotation_table((3, 4, 5), 32)
    one, other = normal(1, 1, 1, 32), normal(1, 1, 1, 32, seed=1)
    q, k = (rotate(x.expand(1, 60, 1, 32), table)[0, :, 0].double() for x in (one, other))
    products = q @ k.T
    # from (0, 0, 0) to (1, 2, 3), and from (1, 1, 1) to (2, 3, 4)
    assert products[0, 20 + 2 * 5 + 3] == pytest.approx(products[26, 40 + 3 * 5 + 4].item(), abs=1e-4)
    assert products[0, 33] != pytest.approx(products[0, 34].item(), abs=1e-4)
    torch.testing.assert_close(q.norm(dim=-1), one.norm().expand(60).double())


def test_an_image_is_a_clip_of_one_frame_bit_for_bit():
    image = random_network(position="rope")
    clips = LIDiT(random_network(position="rope", axes=3).sizes, FusionConfig(), WIDTHS[:2]).double().eval()
    clips.load_state_dict(image.state_dict())
    latents, timesteps, texts = random_inputs()
    condition = Condition(timesteps, texts)
    assert torch.equal(clips(latents.unsqueeze(2), condition).squeeze(2), image(latents, condition))


def test_the_place_of_a_patch_matters_and_parameters_are_counted():
    network = random_network(position="rope", axes=3)
    _, timesteps, texts = random_inputs()
    condition, clip = Condition(timesteps, texts), normal(2, 4, 3, 4, 6)
    assert not close(network(clip.flip(2), condition).flip(2), network(clip, condition))
    counts = count_parameters(network.sizes, FusionConfig(), WIDTHS[:2])
    assert counts["total"] == sum(parameter.numel() for parameter in network.parameters())


def test_what_cannot_turn_is_refused():
    with pytest.raises(UserError, match="rope turns pairs of channels"):
        DiTConfig(width=30, heads=2, position="rope")
