"""Bases of the parts of an exported folder: how weights are loaded and saved, and how constants are kept."""

from functools import wraps
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from torch import Tensor, nn

from model.common.errors import UserError

CONSTANTS = {"prefix": "prefix", "null": "null", "mean": "mean", "spread": "std"}
"""Parameter of an exported text part -> field of `TextConstants`."""
LOG = logging.get_logger(__name__)


class StrictModel(ModelMixin):
    """A diffusers model that refuses weights which do not fit, where diffusers would warn and make some
    up."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load.

        Raises:
            UserError: if weights are missing, left over or of other shapes.
        """

        # diffusers 0.39 only logs a warning about weights that do not fit; the loading info names them
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
        if wrong:
            raise UserError(
                f"{pretrained_model_name_or_path}: the weights do not fit the config, such as {wrong[0]}: "
                "export again"
            )
        return model

    # a pipeline looks at the signature for what it may pass on
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as any diffusers model, but always as safetensors: a pickle could not be loaded again."""
        warn_of_pickle(kwargs.get("safe_serialization", True))
        # Adapters have files of their own: the folder is that of the network that they were loaded into.
        adapters = self._modules.pop("adapters", None)
        try:
            super().save_pretrained(save_directory, **{**kwargs, "safe_serialization": True})
        finally:
            if adapters is not None:
                self._modules["adapters"] = adapters


def warn_of_pickle(safe_serialization: bool) -> None:
    """Warn that a pickle was asked for and is not written."""
    if not safe_serialization:
        LOG.warning("safe_serialization=False is not followed: pickles are never loaded, so none is written")


class SharedStates(nn.Module):
    """Constants that all captions share under one LLM.

    It is read by a call, before which any kind of offloading puts the parameters on the device.
    """

    def __init__(self, prefix: int, null: int, width: int) -> None:
        """Make room for `prefix` and `null` tokens of `width`."""
        super().__init__()
        for name, shape in zip(CONSTANTS, ((prefix, width), (null, width), (width,), (width,)), strict=True):
            # parameters, though nothing trains them: diffusers' offloading asks for a part's first parameter
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self) -> dict[str, Tensor]:
        """Return the tensors by the fields of `TextConstants`."""
        return {field: self.get_parameter(name).detach() for name, field in CONSTANTS.items()}
