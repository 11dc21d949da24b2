"""A store in a bucket of any S3-compatible endpoint. The only file that imports boto3.

The endpoint is `S3_ENDPOINT_URL` or `AWS_ENDPOINT_URL`; credentials, region and profile are the usual AWS variables and files.
"""

import base64
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from data_prep.store.faults import DamagedError, StoreError, TransientError, retry_seconds, retrying
from model.common.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
MAX_PUT_BYTES = 5 << 30
CONNECTIONS = 32
PAGE = 1000
FALLBACK_SETTLE_SECONDS = 2.0
HASH_FIELD = "xxh64"
TRANSIENT_CODES = {"BadDigest", "ExpiredToken", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"}

Result = TypeVar("Result")


class S3Bucket:
    """Objects of one bucket. Every call is retried here (botocore's own retries are off, so that times do not multiply).

    An object carries the hash of its body as metadata, and is sent with its MD5: a body that changes on the way is seen on
    both ways and sent again. A client belongs to the process that made it: a fork gets its own connections.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._client: tuple[int, Any] | None = None
        self._conditional: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def uri(self) -> str:
        """Where the store lies, for messages."""
        return f"s3://{self.bucket}"

    def local_path(self, key: str) -> Path | None:
        """No object is a local file."""
        return None

    def read(self, key: str) -> bytes:
        """The object's bytes, checked against the hash that it was written with."""

        def get() -> bytes:
            response = self.client.get_object(Bucket=self.bucket, Key=key)
            data = response["Body"].read()
            expected = response["Metadata"].get(HASH_FIELD)
            if expected and expected != xxhash.xxh64_hexdigest(data):
                raise DamagedError("the body does not match its hash")
            return data

        return self._retried(key, get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Some of the object's bytes; fewer only at its end."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        end = min(start + length, size)
        if end <= start:
            return b""

        def get() -> bytes:
            response = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            data = response["Body"].read()
            if len(data) != end - start:
                raise TransientError(f"{len(data)} bytes came where {end - start} were asked for")
            return data

        return self._retried(key, get)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """The object's bytes from `start` on, in chunks; not retried: whoever checks the bytes must also start again.

        Raises:
            TransientError: the connection broke.
        """
        with _translated(f"{self.uri}/{key}"):
            wanted = {"Range": f"bytes={start}-"} if start else {}
            response = self.client.get_object(Bucket=self.bucket, Key=key, **wanted)
            if start and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise DamagedError("the endpoint ignores ranges")
            yield from response["Body"].iter_chunks(CHUNK)

    def size(self, key: str) -> int | None:
        """The object's bytes; None if absent."""
        try:
            return self._retried(key, lambda: self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object with one request, so that it is there whole or not at all."""
        self._retried(key, lambda: self._put(key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists, with `If-None-Match: *`.

        Where the endpoint ignores that header (probed once a process), fall back: look, put, wait, read again. Then the object
        that stays is always one whole writer's; but two writers at the same moment may both be told that they won.
        """
        if self._conditional is None:
            self._conditional = self._probe(f"{key.rpartition('/')[0]}/.probe-{secrets.token_hex(8)}")
        if self._conditional:
            return self._put_if_none_match(key, data)
        if self.size(key) is not None:
            return self.read(key) == data
        self.put(key, data)
        time.sleep(min(FALLBACK_SETTLE_SECONDS, retry_seconds() / 20))
        return self.read(key) == data

    def _put_if_none_match(self, key: str, data: bytes) -> bool:
        tries, condition = 0, {"IfNoneMatch": "*"}

        def put() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._put(key, data, **condition)
            except DamagedError:
                condition.clear()  # the key is ours, but holds bytes that changed on their way
                raise
            except self.client.exceptions.ClientError as error:
                if _status(error) != 412:
                    raise
                return False
            return True

        # After a try whose answer was lost, the object that exists may be our own.
        return self._retried(key, put) or (tries > 1 and self.read(key) == data)

    def _probe(self, key: str) -> bool:
        """Whether the endpoint keeps `If-None-Match`: of two conditional puts the first must win and the second fail."""
        try:
            kept = self._put_if_none_match(key, b"1") and not self._put_if_none_match(key, b"2")
        except StoreError as error:
            if "NotImplemented" not in str(error) and "InvalidArgument" not in str(error):
                raise
            kept = False
        self.delete(key)
        if not kept:
            log.warning(
                "%s: the endpoint ignores `If-None-Match: *`: commits are read again after %.0f s instead. A commit always names "
                "complete files, but two tasks that finish one part at the same moment may both report success: do not "
                "run two jobs on one dataset at once here",
                self.uri,
                FALLBACK_SETTLE_SECONDS,
            )
        return kept

    def _put(self, key: str, data: bytes | Path, **condition: str) -> None:
        if isinstance(data, Path):
            if data.stat().st_size > MAX_PUT_BYTES:
                raise UserError(f"{data}: larger than the 5 GiB of one S3 request: make parts with fewer rows")
            with data.open("rb") as file:
                md5, hexdigest = _digests(file)
                file.seek(0)
                self._send(key, file, md5, hexdigest, condition)
        else:
            md5 = hashlib.md5(data, usedforsecurity=False).digest()
            self._send(key, data, md5, xxhash.xxh64_hexdigest(data), condition)

    def _send(self, key: str, body: Any, md5: bytes, hexdigest: str, condition: dict[str, str]) -> None:
        response = self.client.put_object(
            Bucket=self.bucket,
            Key=key,
            Body=body,
            ContentMD5=base64.b64encode(md5).decode(),
            Metadata={HASH_FIELD: hexdigest},
            **condition,
        )
        # Not every endpoint checks Content-MD5, and not every ETag is the MD5: where they differ, read again.
        encrypted = response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
        if response["ETag"].strip('"') != md5.hex() and not encrypted:
            arrived = xxhash.xxh64()
            for chunk in self.stream(key, 0):
                arrived.update(chunk)
            if arrived.hexdigest() != hexdigest:
                raise DamagedError("the body changed on its way up")

    def entries(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Keys that start with `prefix`, sorted, with the time of their last change."""
        for page in self._pages(prefix):
            for entry in page.get("Contents", []):
                yield entry["Key"], entry["LastModified"].timestamp()

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below `prefix`, sorted."""
        names: list[str] = []
        for page in self._pages(prefix, Delimiter="/"):
            names += [entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", [])]
        return names

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        while True:
            query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": prefix, "MaxKeys": PAGE, **options}
            page = self._retried(prefix, lambda query=query: self.client.list_objects_v2(**query))
            yield page
            if not page["IsTruncated"]:
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._retried(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=key))

    def check(self, create: bool) -> bool:
        """Whether the bucket is there; a bucket is never made here, since its owner decides on region and access."""
        try:
            self._retried("", lambda: self.client.head_bucket(Bucket=self.bucket))
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Drop the connections; the next call opens new ones."""
        if self._client and self._client[0] == os.getpid():
            self._client[1].close()
        self._client = None

    @property
    def client(self) -> Any:
        """This process's client; safe to use from several threads."""
        held = self._client
        if held is None or held[0] != os.getpid():
            held = self._client = (os.getpid(), _connect())
        return held[1]

    def _retried(self, key: str, call: Callable[[], Result]) -> Result:
        what = f"{self.uri}/{key}"

        def once() -> Result:
            with _translated(what):
                return call()

        return retrying(what)(once)


def _connect() -> Any:
    from boto3.session import Session
    from botocore.config import Config

    # A stall must cost a part of the time that is set aside for retries, not all of it.
    timeout = min(60.0, max(0.5, retry_seconds() / 10))
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(10.0, timeout),
        read_timeout=timeout,
        max_pool_connections=CONNECTIONS,
        # Newer checksum headers are refused by many endpoints; size, MD5 and our own hash are checked instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    return Session().client("s3", endpoint_url=endpoint, config=config)


def _digests(file: BinaryIO) -> tuple[bytes, str]:
    md5, xxh64 = hashlib.md5(usedforsecurity=False), xxhash.xxh64()
    while chunk := file.read(CHUNK):
        md5.update(chunk)
        xxh64.update(chunk)
    return md5.digest(), xxh64.hexdigest()


def _status(error: Any) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn botocore's exceptions into ours: absent, may pass, or for the user to put right. No message holds a credential."""
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError

    may_pass = (
        aws.HTTPClientError,
        aws.IncompleteReadError,
        aws.ResponseStreamingError,
        aws.ReadTimeoutError,
        aws.ChecksumError,
        aws.CredentialRetrievalError,
        ResponseParserError,
    )
    try:
        yield
    except aws.ClientError as error:
        status, code = _status(error), error.response.get("Error", {}).get("Code", "")
        if code == "NoSuchBucket":
            raise UserError(f"{what}: there is no such bucket: make it, or correct the URI") from error
        if status == 404:
            raise FileNotFoundError(what) from error
        if status == 416:  # a download that is continued behind the object's end
            raise DamagedError("the object is shorter than its commit says") from error
        if (status >= 500 and status != 501) or status in (408, 409, 429) or code in TRANSIENT_CODES:
            raise TransientError(f"{status} {code}") from error
        if status in (401, 403):
            raise UserError(
                f"{what}: {status} {code}: check the credentials (AWS variables, profile) and their rights"
            ) from error
        raise StoreError(f"{what}: {status} {code} from {error.operation_name}: the endpoint refuses the request") from error
    except may_pass as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound, aws.NoRegionError) as error:
        raise UserError(f"{what}: {error}: set the usual AWS variables, or AWS_PROFILE") from error
