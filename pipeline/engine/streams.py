"""The order of ZeRO-3's work on the device, without waiting for the device.

DeepSpeed is imported by those who train: what reads a checkpoint imports this module without it.
"""

from typing import Any


def order_gathers(optimizer: Any) -> None:
    """Let the next gathers wait for the weights that were just written.

    DeepSpeed 0.19.8 gathers on a stream of its own and never makes it wait for the stream that wrote the
    weights. Its throughput timer, which stopped the host until the device was idle, hid that.

    Args:
        optimizer: DeepSpeed's for ZeRO-3.
    """
    from deepspeed.accelerator import get_accelerator

    # Read under its mangled name, so that a version without this stream fails here and not by wrong weights.
    stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    # A CPU has no streams.
    if stream is not None:
        accelerator: Any = get_accelerator()
        stream.wait_stream(accelerator.current_stream())


def disable_ranges() -> None:
    """Turn off DeepSpeed's NVTX ranges: about 4,750 pairs of calls per step of the 1B network."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
