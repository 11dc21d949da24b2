"""Agreement of all ranks on a question with the answer yes or no, such as whether to stop."""

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """All ranks learn whether any of them said yes."""

    def __init__(self, device: torch.device, world: int, late: bool | None = None) -> None:
        """Ask nothing yet.

        Args:
            device: of the collective.
            world: number of ranks.
            late: True = the answer is that of the call before, so that the host never waits for the device;
                None = on a GPU.
        """
        self._device, self._world = device, world
        self._late = device.type == "cuda" if late is None else late
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def ask(self, yes: bool) -> bool:
        """Return True if any rank said yes: all get the same answer from the same call. Collective."""
        if self._world == 1:
            return yes

        before, self._asked = self._asked, self._ask(yes)
        if not self._late:
            return _read(self._asked)
        return before is not None and _read(before)

    def _ask(self, yes: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """Queue the collective, and the copy of its result to the host."""
        # Filled on the device: a copy of a number from the host would wait.
        wanted = torch.full((1,), float(yes), device=self._device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return wanted, None

        answer = torch.empty(1, pin_memory=True).copy_(wanted, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return answer, copied


def _read(asked: tuple[Tensor, torch.cuda.Event | None]) -> bool:
    answer, copied = asked
    if copied is not None:
        # A whole step ago, so it is done.
        copied.synchronize()
    return bool(answer.item())
