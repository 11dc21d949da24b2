"""The choice of torch's attention kernels for a run."""

import torch

BACKENDS = {
    "auto": {"flash", "cudnn"},
    "cudnn": {"cudnn"},
    "flash": {"flash"},
    "efficient": set(),
}
"""`engine.attention` -> kernels that torch may take besides those that every case needs: the memory-efficient
one, since Flash takes no mask, and the plain one."""


def choose_attention(name: str) -> None:
    """Let torch take only the kernels of `engine.attention`, in the whole process.

    Not by a context around the forward pass: a checkpointed block runs its attention again in the backward
    pass.
    """
    torch.backends.cuda.enable_flash_sdp("flash" in BACKENDS[name])
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in BACKENDS[name])
