"""Small objects per second that a process reads from a bucket: through obstore, and through boto3 as before.

    python -m benchmarks.small_gets [--reads 20000] [--threads 32] [--tiny]

The endpoint is a process on this machine, which answers each GET with one record of 1 KiB and its hash. It
has no latency, so what is measured is the client's own work. The two ways take turns; each counts seconds
and processor seconds per read. Every body is checked against its hash, as in use.

Then rows of a parquet file that names its images by path are read, as `plan` does, from an endpoint that
answers after 20 ms, and whose objects another program wrote: with `READ_AHEAD` images at once, and one at a
time.
"""

import argparse
import asyncio
import io
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.config import SourceConfig
from data_prep.sources import files
from data_prep.sources.parquet import ParquetSource
from data_prep.store.s3 import S3Bucket

GOAL = 5000
LATENCY, GOAL_AHEAD = 0.02, 20
"""Seconds until the slow endpoint answers, and how many times as many rows are wanted with reads ahead."""
BODY = b"r" * 1024
HEAD = (
    b"Content-Type: binary/octet-stream\r\nLast-Modified: Sun, 29 Nov 2026 12:00:00 GMT\r\n"
    b'ETag: "0123456789abcdef0123456789abcdef"\r\nAccept-Ranges: bytes\r\n'
)
HASH = b"x-amz-meta-xxh64: " + xxhash.xxh64_hexdigest(BODY).encode() + b"\r\n"


def answer_to(request: bytes, table: bytes) -> bytes:
    """Return the answer to a request: a part of `table`, or `BODY` with or without its hash."""
    if b".parquet" not in request:
        # The images are objects of another program.
        field = b"" if b".png" in request else HASH
        return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (HEAD + field, len(BODY), BODY)
    if request.startswith(b"HEAD"):
        return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (HEAD, len(table))
    fields = dict(line.lower().split(b": ", 1) for line in request.split(b"\r\n")[1:])
    first, last = map(int, fields[b"range"].removeprefix(b"bytes=").split(b"-"))
    data = table[first : last + 1]
    place = b"Content-Range: bytes %d-%d/%d\r\n" % (first, first + len(data) - 1, len(table))
    head = b"HTTP/1.1 206 Partial Content\r\n%sContent-Length: %d\r\n\r\n" % (HEAD + place, len(data))
    return head + data


class Endpoint(asyncio.Protocol):
    """Answers each request that has no body."""

    def __init__(self, table: bytes, latency: float) -> None:
        self._table, self._latency = table, latency

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.waiting = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are complete."""
        *requests, self.waiting = (self.waiting + data).split(b"\r\n\r\n")
        answers = b"".join(answer_to(request, self._table) for request in requests)
        if self._latency:
            asyncio.get_running_loop().call_later(self._latency, self.transport.write, answers)
        else:
            self.transport.write(answers)


def serve(port: Connection, table: bytes = b"", latency: float = 0.0) -> None:
    """Run the endpoint, and send its port."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: Endpoint(table, latency), "127.0.0.1", 0
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def measure(bucket: S3Bucket, reads: int, threads: int) -> tuple[float, float]:
    """Return reads per second, and processor milliseconds per read."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(bucket.read, ["warm"] * threads))
        began, cpu = time.perf_counter(), time.process_time()
        for body in pool.map(bucket.read, (f"commits/{number:08d}.json" for number in range(reads))):
            assert body == BODY
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return reads / seconds, 1e3 * cpu / reads


def start(*arguments: object) -> BaseProcess:
    """Start an endpoint in a process of its own, and point the store's settings to it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(sender, *arguments), daemon=True
    )
    server.start()
    os.environ["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{receiver.recv()}"
    return server


def rows_per_second(rows: int, at_once: int) -> float:
    """Return the rows per second of a file that names its images by path."""
    source = ParquetSource(SourceConfig("parquet", "s3://bucket/in"))
    with mock.patch.object(files, "READ_AHEAD", at_once):
        samples = source.read("a.parquet", [])
        assert next(samples).image == BODY  # connections, and the table's footer
        began = time.perf_counter()
        for _ in range(rows):
            assert next(samples).image == BODY
        seconds = time.perf_counter() - began
        samples.close()  # pyright: ignore[reportAttributeAccessIssue]
    return rows / seconds


def path_only_rows(rows: int, turns: int) -> tuple[float, float]:
    """Return the median rows per second with reads ahead, and one at a time."""
    sink = io.BytesIO()
    names = [f"{number:06d}.png" for number in range(2 * rows)]
    pq.write_table(pa.table({"image": names}), sink)
    server = start(sink.getvalue(), LATENCY)
    ahead, alone = [], []
    for _ in range(turns):
        ahead.append(rows_per_second(rows, files.READ_AHEAD))
        alone.append(rows_per_second(max(1, rows // files.READ_AHEAD), 1))
    server.terminate()
    return statistics.median(ahead), statistics.median(alone)


def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m benchmarks.small_gets`."""
    from benchmarks.reporting import at_least, conditions, print_goals  # imports torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reads", type=int, default=20_000, help="of each turn; a tenth of it through boto3")
    parser.add_argument("--rows", type=int, default=3200, help="of each turn, with 20 ms per request")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few reads, to see that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.reads, options.rows, options.turns = 200, 64, 1

    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    server = start()
    ways = {"obstore": S3Bucket("bucket"), "boto3": S3Bucket("bucket")}
    ways["boto3"]._connected.fast._store = None

    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(options.turns):
        for way, bucket in ways.items():
            reads = options.reads if way == "obstore" else max(options.threads, options.reads // 10)
            found[way].append(measure(bucket, reads, options.threads))
    server.terminate()

    print(f"\n{conditions()}; {options.threads} threads, {options.turns} turns\n")
    print("| client | GETs per second | processor ms per GET |\n|---|---|---|")
    medians = {}
    for way, turns in found.items():
        rate, cpu = (statistics.median(values) for values in zip(*turns, strict=True))
        medians[way] = rate
        print(f"| {way} | {rate:,.0f} | {cpu:.2f} |")
    ahead, alone = path_only_rows(options.rows, options.turns)
    print(f"\nRows that name their image by path, {LATENCY * 1e3:.0f} ms per request:\n")
    print("| images read at once | rows per second |\n|---|---|")
    print(
        f"| {files.READ_AHEAD} | {ahead:,.0f} |\n| 1 | {alone:,.0f} |\n\n{ahead / alone:.1f} times as many."
    )
    goals = {
        "small_gets_per_second": at_least(medians["obstore"], GOAL),
        "path_only_rows_at_20ms": at_least(ahead / alone, GOAL_AHEAD),
    }
    print_goals("small_gets", goals, over_boto3=round(medians["obstore"] / medians["boto3"], 2))


if __name__ == "__main__":
    main()
