"""Threads that fetch files."""

import multiprocessing
from multiprocessing.pool import Pool, ThreadPool


class Threads(ThreadPool):
    """A thread pool that never blocks shutdown.

    Its threads are not joined on an exception, on Ctrl-C or at exit. A download may be retried for minutes.
    The pools of concurrent.futures would be joined, however long that takes.
    """

    def __init__(self, count: int) -> None:
        """Start `count` threads."""
        # ThreadPool's own constructor creates named semaphores in processes of a fork server, and these names
        # remain in the system after a kill; the context "fork" has none.
        Pool.__init__(self, count, context=multiprocessing.get_context("fork"))
