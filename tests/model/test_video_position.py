"""A network of clips is the image network on one frame, and knows the order of several."""

import pytest
import torch
import torch.nn.functional as F

from model.condition import Condition
from model.config import FusionConfig
from model.dit import LIDiT
from model.layers import SelfAttention
from model.video_position import TemporalConvolution
from pipeline.engine.master_weights import check_names
from tests.helpers.networks import WIDTHS, close, normal, random_inputs, random_network, randomise

NEW = ["position.temporal.weight", "position.frame_embedding.weight", "position.frame_embedding.bias"]


def video_network(image, dtype=torch.float64):
    """A network of clips that starts from an image network's weights, as a stage starts it."""
    network = LIDiT(random_network(axes=3).sizes, FusionConfig(), WIDTHS[:2])
    shapes = {name: tuple(value.shape) for name, value in image.state_dict().items()}
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert check_names(wanted, shapes, "weights", LIDiT.new_branches) == NEW
    network.load_state_dict(image.state_dict(), strict=False)
    return network.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_frame_is_an_image_bit_for_bit(dtype):
    image = random_network().to(dtype)
    latents, timesteps, texts = random_inputs()
    condition = Condition(timesteps, texts)
    expected = image(latents.to(dtype), condition)
    predicted = video_network(image, dtype)(latents.to(dtype).unsqueeze(2), condition)
    assert torch.equal(predicted.squeeze(2), expected)


def test_each_frame_is_an_image_if_frames_do_not_see_one_another(monkeypatch):
    frames, image = 3, random_network()
    network = video_network(image)
    _, timesteps, texts = random_inputs()
    clip = normal(2, 4, frames, 4, 6)
    condition = Condition(timesteps, texts)
    expected = torch.stack([image(clip[:, :, number], condition) for number in range(frames)], dim=2)
    assert not close(network(clip, condition), expected)

    attend = SelfAttention.forward

    def inside_frames(self, x, *rest, **named):
        of_frames = x.unflatten(1, (frames, -1)).flatten(0, 1)
        return attend(self, of_frames, *rest, **named).unflatten(0, (len(x), frames)).flatten(1, 2)

    for block in network.blocks:
        monkeypatch.setattr(
            block.self_attention, "forward", inside_frames.__get__(block.self_attention, SelfAttention)
        )
    assert close(network(clip, condition), expected)


def test_the_convolution_over_frames_is_torchs():
    layer = randomise(TemporalConvolution(5))
    x = normal(2, 4, 3, 2, 5)
    kernel = layer.weight.T.reshape(5, 1, 3, 1, 1)
    expected = F.conv3d(x.movedim(-1, 1), kernel, padding=(1, 0, 0), groups=5).movedim(1, -1)
    assert close(layer(x), expected)


def test_the_order_of_frames_matters_once_trained():
    _, timesteps, texts = random_inputs()
    condition = Condition(timesteps, texts)
    clip = normal(2, 4, 4, 4, 6)
    for network, matters in ((video_network(random_network()), False), (random_network(axes=3), True)):
        turned = network(clip.flip(2), condition).flip(2)
        assert close(turned, network(clip, condition)) is not matters


def test_all_layers_over_frames_learn_from_one_frame():
    network = random_network(axes=3).train()
    latents, timesteps, texts = random_inputs()
    network(latents.unsqueeze(2), Condition(timesteps, texts)).square().mean().backward()
    for name in NEW:
        assert network.get_parameter(name).grad.any()
