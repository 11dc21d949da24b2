"""Small objects per second that a process reads from a bucket: through obstore, and through boto3 as before.

    python -m benchmarks.small_gets [--reads 20000] [--threads 32] [--tiny]

The endpoint is a process on this machine, which answers each GET with one record of 1 KiB and its hash. It
has no latency, so what is measured is the client's own work. The two ways take turns; each counts seconds
and processor seconds per read. Every body is checked against its hash, as in use.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import xxhash

from benchmarks.reporting import at_least, conditions, print_goals
from data_prep.store.s3 import S3Bucket

GOAL = 5000
BODY = b"r" * 1024
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: binary/octet-stream\r\n"
    b"Last-Modified: Sun, 29 Nov 2026 12:00:00 GMT\r\n"
    b'ETag: "0123456789abcdef0123456789abcdef"\r\nAccept-Ranges: bytes\r\nx-amz-meta-xxh64: '
    + xxhash.xxh64_hexdigest(BODY).encode()
    + b"\r\nContent-Length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)


class Endpoint(asyncio.Protocol):
    """Answers each request that has no body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.waiting = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are complete."""
        *requests, self.waiting = (self.waiting + data).split(b"\r\n\r\n")
        self.transport.write(ANSWER * len(requests))


def serve(port: Connection) -> None:
    """Run the endpoint, and send its port."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Endpoint, "127.0.0.1", 0)
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


def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m benchmarks.small_gets`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reads", type=int, default=20_000, help="of each turn; a tenth of it through boto3")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few reads, to see that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.reads, options.turns = 200, 1

    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{receiver.recv()}"
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
    goals = {"small_gets_per_second": at_least(medians["obstore"], GOAL)}
    print_goals("small_gets", goals, over_boto3=round(medians["obstore"] / medians["boto3"], 2))


if __name__ == "__main__":
    main()
