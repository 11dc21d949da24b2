"""A toy of each kind that a researcher may add, registered from outside the packages, as a file of theirs
would do it."""

import math
from typing import ClassVar

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from data_prep.dataset.schema import Bucket
from model.blocks import BLOCKS, Block
from model.common.errors import UserError
from model.conditions import CONDITIONS, ExtraCondition
from model.costs import feed_forward, linear
from model.functional import modulate, residual
from model.layers import MLP, CrossAttention, Modulation, ZeroLinear
from pipeline.diffusion.objective import OBJECTIVES, Objective, TrainingExample


@BLOCKS.register("toy_text_only")
class TextOnlyBlock(Block):
    """Cross-attention and feed-forward layer, without self-attention."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.look = CrossAttention(sizes.width, sizes.heads)
        self.mlp = MLP(sizes.width, int(sizes.mlp_ratio * sizes.width))
        self.modulation = Modulation(sizes.width, 6)

    def forward(self, x, text, text_mask, c, places=None):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c, places)
        x = residual(x, self.look(modulate(x, shift, scale), text, text_mask), gate)
        return residual(x, self.mlp(modulate(x, mlp_shift, mlp_scale)), mlp_gate)

    def text_attention(self):
        return self.look

    @classmethod
    def costs(cls, sizes, patches, text_tokens):
        width = sizes.width
        yield linear(width, 6 * width, 1)
        yield linear(width, width, patches)
        yield linear(width, 2 * width, text_tokens)
        yield linear(width, width, patches)
        yield linear(2 * (width // sizes.heads) - 1, 1, 0)  # the gains of two norms
        yield from feed_forward(width, sizes.mlp_ratio, patches)

    @classmethod
    def attention(cls, sizes, patches, text_tokens):
        return sizes.width * patches * text_tokens

    @classmethod
    def activations(cls, sizes, patches, text_tokens, budget=None):
        return sizes.width * (30 * patches + 8 * text_tokens)


class ToyFlow(Objective):
    """The clean latents as target; and the loss is an absolute error."""

    schedulers: ClassVar = {"toy": lambda config: FlowMatchEulerDiscreteScheduler(shift=2.0)}

    def sample_timesteps(self, u):
        return u.float() ** self.config.settings.get("power", 1.0)

    def add_noise(self, clean, noise, timesteps):
        mix = self.per_position(timesteps.float(), clean)
        return (1 - mix) * clean.float() + mix * noise.float(), clean.float()

    def loss(self, prediction, target):
        return (prediction - target).abs().flatten(1).mean(1)


OBJECTIVES.register("toy_clean")(ToyFlow)


@OBJECTIVES.register("toy_patch_times")
class PatchTimes(ToyFlow):
    """A time of its own for each patch, from (seed, epoch, sample id)."""

    def training_example(self, clean, noise, u, normal):
        patches = math.prod(clean.shape[2:]) // math.prod(self.patch)
        timesteps = torch.sigmoid(normal("toy patch times", (patches,)))
        noisy, target = self.add_noise(clean, noise, timesteps)
        return TrainingExample(noisy, timesteps, target)


@CONDITIONS.register("toy_size")
class SizeCondition(ExtraCondition):
    """Height and width of the image, in units of 256 pixels."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.linear = ZeroLinear(2, sizes.width)

    def forward(self, values):
        return self.linear(values.to(self.linear.weight.dtype))

    @classmethod
    def costs(cls, sizes):
        yield linear(2, sizes.width, 1)

    @classmethod
    def from_batch(cls, batch):
        bucket = Bucket.parse(batch.bucket)
        return torch.tensor([[bucket.height / 256, bucket.width / 256]], device=batch.u.device).repeat(
            len(batch.ids), 1
        )

    @classmethod
    def for_sampling(cls, height, width, given):
        if given is not None:
            try:
                height, width = (int(side) for side in given.split("x"))
            except ValueError as error:
                raise UserError(f"toy_size={given}: write HEIGHTxWIDTH") from error
        return torch.tensor([height / 256, width / 256])
