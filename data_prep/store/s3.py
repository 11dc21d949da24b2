"""A store in a bucket of any S3-compatible endpoint. The only file that imports boto3.

The endpoint is `S3_ENDPOINT_URL` or `AWS_ENDPOINT_URL`; credentials, region and profile come from the usual
AWS variables and files.
"""

import base64
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from data_prep.store.entry import Entry
from data_prep.store.fast_reads import FastReads
from data_prep.store.faults import (
    DamagedError,
    StoreError,
    TooLargeError,
    TransientError,
    retry_seconds,
    retrying,
)
from data_prep.store.s3_answers import (
    exception_for,
    object_size,
    own_object,
    own_page,
    own_time,
    status_of,
)
from model.common.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
MAX_PUT_BYTES = 5 << 30
# As many as there are threads that read commits (`THREADS` in data_prep/dataset/parts.py); botocore keeps 10.
MAX_CONNECTIONS = 32
# The most that S3 returns per request.
PAGE_KEYS = 1000
FALLBACK_SETTLE_SECONDS = 2.0
"""Seconds between a put and the read that checks it, where the endpoint ignores `If-None-Match`."""
HASH_FIELD = "xxh64"
_UNCONDITIONAL = (
    "%s: the endpoint ignores `If-None-Match: *`: commits are read again after %.0f s instead. A commit "
    "always names complete files, but two tasks that finish one part at the same moment may both report "
    "success: do not run two jobs on one dataset at once here"
)

Result = TypeVar("Result")


class S3Bucket:
    """Objects of one bucket.

    Every call is retried here; botocore's own retries are off, so that waiting times do not multiply. An
    object carries the hash of its body as metadata, and is sent with its MD5. A body that changes in transit
    is therefore noticed in both directions and sent again. A client belongs to the process that made it: a
    fork opens its own connections.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._connection: _Connection | None = None
        self._conditional: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process must not share the connections.
        return {**self.__dict__, "_connection": None}

    @property
    def uri(self) -> str:
        """Address of the bucket, for messages."""
        return f"s3://{self.bucket}"

    def local_path(self, key: str) -> Path | None:
        """Return None: no object is a local file."""
        return None

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the object's bytes, if not too many, checked against the hash they were written with."""
        if (data := self._connected.fast.read(key, max_bytes)) is not None:
            return data

        def get() -> bytes:
            response = own_object(self.client.get_object(Bucket=self.bucket, Key=key))
            if max_bytes is not None and response["ContentLength"] > max_bytes:
                response["Body"].close()
                raise TooLargeError(f"{self.uri}/{key}: {response['ContentLength']} bytes")
            data = response["Body"].read()
            # Objects that other programs wrote have no hash.
            expected = response["Metadata"].get(HASH_FIELD)
            if expected and expected != xxhash.xxh64_hexdigest(data):
                raise DamagedError("the body does not match its hash")
            return data

        return self._retried(key, get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer only at the object's end.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        if length <= 0:
            return b""
        if (data := self._connected.fast.read_range(key, start, length)) is not None:
            return data
        part = f"bytes={start}-{start + length - 1}"  # HTTP ranges include their last byte

        def get() -> bytes:
            try:
                response = own_object(self.client.get_object(Bucket=self.bucket, Key=key, Range=part))
            except self.client.exceptions.ClientError as error:
                if status_of(error) != 416:
                    raise
                return b""  # the object ends before `start`

            # The answer says how long the object is, so nobody has to ask for that first.
            expected = min(length, object_size(response, start) - start)
            data = response["Body"].read()
            if len(data) != expected:
                raise TransientError(f"the endpoint returned {len(data)} of {expected} bytes")
            return data

        return self._retried(key, get)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """Yield the object's bytes from `start` on, in chunks. Not retried: the caller resumes.

        Raises:
            TransientError: if the connection broke.
        """
        with _translated(f"{self.uri}/{key}"):
            # An empty object has no byte 0, so a range from there on would be refused.
            options = {"Range": f"bytes={start}-"} if start else {}
            response = own_object(self.client.get_object(Bucket=self.bucket, Key=key, **options))
            # Any other status means the whole object, which would be appended to the bytes that are there.
            if start and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise DamagedError("the endpoint ignores ranges")
            yield from response["Body"].iter_chunks(CHUNK)

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes; None if it does not exist."""
        head = self._head(key)
        return None if head is None else head["ContentLength"]

    def version(self, key: str) -> str | None:
        """Return the object's size and ETag; None if it does not exist."""
        head = self._head(key)
        return None if head is None else f"{head['ContentLength']} bytes, {head.get('ETag', '')}"

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._retried(
                key, lambda: own_object(self.client.head_object(Bucket=self.bucket, Key=key))
            )
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object with one request, so that it exists completely or not at all."""
        self._retried(key, lambda: self._put(key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists, with `If-None-Match: *`.

        If the endpoint ignores that header (probed once per process), fall back to look, put, wait and read
        again. The object that remains is then always complete and from one writer, but two writers at the
        same moment may both get True.

        Returns:
            True if this call wrote the object.
        """
        if self._conditional is None:
            # A hidden name: listings skip it, and `gc` removes it if this process is killed.
            self._conditional = _obeys_conditions(
                self, f"{key.rpartition('/')[0]}/.probe-{secrets.token_hex(8)}"
            )
        if self._conditional:
            return self._put_if_none_match(key, data)

        # Equal bytes count as ours: two writers of the same record may both win without harm.
        if self.size(key) is not None:
            return self.read(key) == data
        # Of two puts at once the later one replaces the earlier, so look again after the other writer had
        # time to put.
        self.put(key, data)
        time.sleep(min(FALLBACK_SETTLE_SECONDS, retry_seconds() / 20))
        return self.read(key) == data

    def _put_if_none_match(self, key: str, data: bytes) -> bool:
        tries = 0
        condition = {"IfNoneMatch": "*"}

        def put() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._put(key, data, **condition)
            except DamagedError:
                condition.clear()  # our put created the key, but its bytes changed in transit: replace them
                raise
            except self.client.exceptions.ClientError as error:
                if status_of(error) != 412:
                    raise
                if tries > 1 and _is_damaged(self, key, xxhash.xxh64_hexdigest(data)):
                    condition.clear()
                    raise DamagedError("the body changed during an upload whose answer was lost") from error
                return False
            return True

        created = self._retried(key, put)
        # After a try whose answer was lost, the object that exists may be our own.
        return created or (tries > 1 and self.read(key) == data)

    def _put(self, key: str, data: bytes | Path, **condition: str) -> None:
        if isinstance(data, Path):
            # Larger objects need a multipart upload, which has no MD5 of the whole object to check.
            if data.stat().st_size > MAX_PUT_BYTES:
                raise UserError(
                    f"{data}: larger than the 5 GiB of one S3 request: make parts with fewer rows"
                )

            with data.open("rb") as file:
                # Read twice, because the hashes are headers and so are sent before the body.
                md5, hexdigest = _digests(file)
                file.seek(0)
                self._send(key, file, md5, hexdigest, condition)
        else:
            # Against damage, not against attacks; systems in FIPS mode refuse MD5 without the argument.
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

        # Not every endpoint checks Content-MD5, not every ETag is the MD5, and an answer without one may be
        # that of a proxy which has stored nothing: if they differ, read the object again.
        # With a key of KMS or of the customer the ETag is never the MD5, so it says nothing.
        encrypted = (
            response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
        )
        etag = response.get("ETag", "").strip('"')
        if etag != md5.hex() and not (etag and encrypted):
            stored = xxhash.xxh64()
            try:
                for chunk in self.stream(key, 0):
                    stored.update(chunk)
            except FileNotFoundError as error:
                raise TransientError("the endpoint took the upload and has no such object") from error
            if stored.hexdigest() != hexdigest:
                raise DamagedError("the body changed during the upload")

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys start with `prefix`, sorted, each once."""
        entries: dict[str, Entry] = {}
        for page in self._pages(prefix):
            for found in page.get("Contents", []):
                key, version = found["Key"], found.get("ETag", "")
                entries[key] = Entry(key, found["LastModified"].timestamp(), found["Size"], version)
        # Directory buckets and some other endpoints list in no order, or repeat keys between pages.
        for _, entry in sorted(entries.items()):
            yield entry

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`, sorted."""
        names: set[str] = set()
        for page in self._pages(prefix, Delimiter="/"):
            for entry in page.get("CommonPrefixes", []):
                names.add(entry["Prefix"].removeprefix(prefix).rstrip("/"))
        return sorted(names)

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        while True:
            query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **options}
            # Each page is retried by itself, so that a long listing does not start over.
            page = self._retried(prefix, lambda q=query: own_page(self.client.list_objects_v2(**q), q))
            yield page
            if not page["IsTruncated"]:
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._retried(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=key))

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects, as many per request as S3 takes."""
        for start in range(0, len(keys), PAGE_KEYS):
            _delete_page(self, keys[start : start + PAGE_KEYS])

    def check(self, create: bool) -> bool:
        """True if the bucket exists. It is never created, since its owner decides on region and access."""
        try:
            self._retried("", lambda: self.client.head_bucket(Bucket=self.bucket))
        except FileNotFoundError:
            return False
        return True

    def now(self) -> float:
        """Return the time by the endpoint's clock."""

        def ask() -> float:
            response = self.client.head_bucket(Bucket=self.bucket)
            return own_time(response["ResponseMetadata"]["HTTPHeaders"])

        return self._retried("", ask)

    def close(self) -> None:
        """Drop the connections; the next call opens new ones."""
        # After a fork the connections belong to the parent process, which still uses them.
        if self._connection and self._connection.process == os.getpid():
            self._connection.client.close()
        self._connection = None

    @property
    def client(self) -> Any:
        """Client of this process, safe to use from several threads."""
        return self._connected.client

    @property
    def _connected(self) -> "_Connection":
        owned = self._connection
        if owned is None or owned.process != os.getpid():
            owned = self._connection = _connect(self.bucket)
        return owned

    def _retried(self, key: str, call: Callable[[], Result]) -> Result:
        uri = f"{self.uri}/{key}"

        def call_once() -> Result:
            with _translated(uri):
                return call()

        return retrying(uri)(call_once)


def _obeys_conditions(bucket: S3Bucket, key: str) -> bool:
    """True if the endpoint obeys `If-None-Match`: of two conditional puts only the first succeeds."""
    try:
        # Other bytes the second time: equal ones would count as our own after an answer was lost.
        obeyed = bucket._put_if_none_match(key, b"1") and not bucket._put_if_none_match(key, b"2")
    except StoreError as error:
        if "NotImplemented" not in str(error) and "InvalidArgument" not in str(error):
            raise
        obeyed = False
    bucket.delete(key)
    if not obeyed:
        log.warning(_UNCONDITIONAL, bucket.uri, FALLBACK_SETTLE_SECONDS)
    return obeyed


def _is_damaged(bucket: S3Bucket, key: str, hexdigest: str) -> bool:
    """True if an object was sent with this hash, and its body has another one."""
    response = own_object(bucket.client.get_object(Bucket=bucket.bucket, Key=key))
    with response["Body"] as body:
        found = xxhash.xxh64_hexdigest(body.read())
    return response["Metadata"].get(HASH_FIELD) == hexdigest != found


def _delete_page(bucket: S3Bucket, keys: Sequence[str]) -> None:
    """Remove as many objects as one request takes, and by themselves those that it did not remove."""
    query = {"Objects": [{"Key": key} for key in keys]}

    def remove() -> set[str]:
        answer = bucket.client.delete_objects(Bucket=bucket.bucket, Delete=query)
        return {entry.get("Key", "") for entry in answer.get("Deleted", [])}

    removed: set[str] = set()
    try:
        removed = bucket._retried(keys[0], remove)
    except StoreError as error:
        # An endpoint that does not know this request, or wants another checksum with it.
        log.warning("%s: removing objects one by one: %s", bucket.uri, error)
    for key in keys:
        if key not in removed:
            bucket.delete(key)


@dataclass(frozen=True)
class _Connection:
    """Clients of one process."""

    process: int
    client: Any
    """boto3's, for everything."""
    fast: FastReads


def _connect(bucket: str) -> _Connection:
    # Imported here because boto3 is slow to import and local stores do not need it.
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    # A stall must cost only a part of the time that is set aside for retries.
    timeout = min(60.0, max(0.5, retry_seconds() / 10))
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(10.0, timeout),
        read_timeout=timeout,
        max_pool_connections=MAX_CONNECTIONS,
        # Many endpoints refuse the newer checksum headers; size, MD5 and our own hash are checked instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    unsigned = os.environ.get("LI_DIT_S3_UNSIGNED") == "1"
    if unsigned:
        config = config.merge(Config(signature_version=UNSIGNED))  # a public bucket needs no credentials
    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    session = Session()
    try:
        client = session.client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:  # the value stays out of the message, because it may hold a password
        raise UserError("S3_ENDPOINT_URL or AWS_ENDPOINT_URL: not a URL: write https://host:port") from error

    # A password in the address signs nothing, but each message of botocore would print it.
    plain = re.sub("//[^/]*@", "//", client.meta.endpoint_url)
    if plain != client.meta.endpoint_url:
        log.warning("the S3 endpoint's address holds a user name: it is not used, set the AWS variables")
        client = session.client("s3", endpoint_url=plain, config=config)
    fast = FastReads(bucket, client, None if unsigned else session, HASH_FIELD, timeout)
    return _Connection(os.getpid(), client, fast)


def _digests(file: BinaryIO) -> tuple[bytes, str]:
    md5, xxh64 = hashlib.md5(usedforsecurity=False), xxhash.xxh64()
    while chunk := file.read(CHUNK):
        md5.update(chunk)
        xxh64.update(chunk)
    return md5.digest(), xxh64.hexdigest()


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn botocore's exceptions into ours: absent, transient, or for the user to fix.

    No message contains a credential.
    """
    # Imported here for the reason in `_connect`.
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError

    transient = (
        aws.ConnectionError,  # refused, DNS, TLS, timeouts
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
        raise exception_for(uri, error) from error
    except transient as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error
    except aws.BotoCoreError as error:  # no credentials, no region, no such profile
        raise UserError(
            f"{uri}: {error}: set the usual AWS variables, or AWS_PROFILE; "
            "or LI_DIT_S3_UNSIGNED=1 for a public bucket"
        ) from error
