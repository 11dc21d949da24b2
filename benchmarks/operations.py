"""Counting operations on tensors: the same numbers on any machine, where times are not."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations on tensors inside of its context."""

    def __init__(self, views: bool = False) -> None:
        """Start at zero; `views` = count also those that only make a view, which launch nothing on a GPU."""
        super().__init__()
        self.count, self._views = 0, views

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Count one, and run it."""
        self.count += self._views or not function.is_view
        return function(*args, **(kwargs or {}))
