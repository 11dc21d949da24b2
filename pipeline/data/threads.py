"""Threads that fetch: what they do may be retried for minutes, and nobody waits for that at the end."""

import multiprocessing
from multiprocessing.pool import Pool, ThreadPool


class Threads(ThreadPool):
    """A pool of threads that an exception, Ctrl-C and the end of the process leave behind.

    Those of concurrent.futures are joined, however long they go on.
    """

    def __init__(self, number: int) -> None:
        """Start them.

        Args:
            number: of threads.
        """
        # ThreadPool's own way gives semaphores names in the processes of a fork server, and the names outlive what kills those.
        Pool.__init__(self, number, context=multiprocessing.get_context("fork"))
