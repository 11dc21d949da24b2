"""The C library's heap, which all tensors on a CPU are made in."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation, and return none to the system.

    By default the memory of a large tensor goes back to the system with the tensor, so that every step
    touches new pages, each by a page fault. The process then stays as large as it ever was. Other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
