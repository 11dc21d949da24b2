"""Regions: parts of the network that are gathered whole under ZeRO-3 and compiled as one graph each."""

from typing import Any, ClassVar

from torch import nn


class Region(nn.Module):
    """A repeated part of the network, such as a block.

    As a leaf of ZeRO-3 it is gathered by one hook instead of one for each of its layers, so `forward` takes
    tensors whose gradients show when it may be released: each output depends on each parameter, and each
    parameter is used before the last input has its gradient. `forward` compiles to one graph without breaks.
    """

    text_axes: ClassVar[dict[int, int]] = {}
    """Argument of `forward` -> its axis that has the length of a text, the one size that differs from batch
    to batch."""

    cuts_prefix: ClassVar[bool] = False
    """True if `forward` may cut off an LLM's prefix, whose length is then a constant of the graph."""

    def example_inputs(
        self, samples: int, patches: int, text_tokens: int, padded: bool, prefix: int = 0
    ) -> tuple[Any, ...]:
        """Return arguments for `forward`, all zeros, as training passes them: the region is compiled with
        them.

        Args:
            samples: samples of a micro-batch.
            patches: patches of each sample.
            text_tokens: text tokens of each sample.
            padded: True for a batch whose text is padded, so that there is a mask.
            prefix: tokens of an LLM's prefix that are cut off.
        """
        raise NotImplementedError
