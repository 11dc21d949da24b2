"""Small reads from a bucket through obstore, at a tenth of boto3's processor time per request.

Only what went well counts: a complete object, whose hash matches if it is ours, or all bytes of a range.
Everything else (a missing object, a refusal, a broken connection, a page of a proxy) is None, and the caller
asks again through boto3, which retries and explains. So no fault has a second treatment here. While reads
fail, boto3 is asked at once; `LI_DIT_S3_CLIENT=boto3` leaves all reads to it.
"""

import logging
import os
import threading
from datetime import timedelta
from time import monotonic
from typing import Any

import xxhash

from model.common.errors import UserError

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures in a row after which a process reads through boto3 alone for a while: proxies or certificates may
not fit, or the endpoint asks for less."""
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 5.0, 600.0
"""Seconds of the first such pause, and the most: each is twice as long as the one before, until a read
succeeds."""
_PAST_THE_END = "status code: 416 "
_runtime_of = 0
"""Process that has obstore's threads; 0 = none yet. A fork inherits this number, but no threads."""
CREDENTIALS_SECONDS = 60
"""Seconds after which credentials are asked for again; botocore renews those that expire."""


class FastReads:
    """Reads of one bucket by this process. Safe to use from several threads."""

    def __init__(
        self, bucket: str, client: Any, session: Any | None, hash_field: str, timeout: float
    ) -> None:
        """Prepare the reads; nothing is connected yet.

        Args:
            bucket: its name.
            client: boto3's, from which address and region are taken.
            session: boto3's, which gives the credentials; None = requests are not signed.
            hash_field: field of an object's metadata that holds the xxh64 of its body.
            timeout: seconds that a request may take.
        """
        self._bucket, self._hash_field = bucket, hash_field
        self._lock = threading.Lock()
        self._failures = 0
        self._pause, self._paused_until = PAUSE_SECONDS, 0.0
        self._store = _open(bucket, client, session, timeout)

    @property
    def active(self) -> bool:
        """True if reads go through obstore at this moment."""
        return self._store is not None and monotonic() >= self._paused_until

    def read(self, key: str, max_bytes: int | None) -> bytes | None:
        """Return an object's bytes; None if they are not all, or not those of the hash that it has."""
        if not self.active:
            return None
        try:
            answer = self._store.get(key)
            expected, size = answer.attributes.get(self._hash_field), answer.meta["size"]
            # A page of a proxy has no date, for which obstore gives the first second of 1970.
            is_object = expected or answer.meta["last_modified"].timestamp() > 0
            if not is_object or (max_bytes is not None and size > max_bytes):
                return None
            data = bytes(answer.bytes())
        except Exception as error:
            # Of whatever class: the ordinary way finds out what it means.
            return self._failed(error)

        self._succeeded()
        # Objects that other programs wrote have no hash.
        is_whole = xxhash.xxh64_hexdigest(data) == expected if expected else len(data) == size
        return data if is_whole else None

    def read_range(self, key: str, start: int, length: int) -> bytes | None:
        """Return `length` bytes from `start` on, fewer only at its end; None if that is not certain."""
        if not self.active:
            return None
        try:
            answer = self._store.get(key, options={"range": (start, start + length)})
            expected = min(length, answer.meta["size"] - start)
            data = bytes(answer.bytes())
        except Exception as error:
            # The object ends before `start`.
            return b"" if _PAST_THE_END in str(error) else self._failed(error)

        self._succeeded()
        return data if answer.range[0] == start and len(data) == expected else None

    def _succeeded(self) -> None:
        self._failures, self._pause = 0, PAUSE_SECONDS

    def _failed(self, error: Exception) -> None:
        from obstore import exceptions

        # An object that does not exist, or a right that is missing, says nothing about the way.
        if isinstance(error, exceptions.NotFoundError | exceptions.PermissionDeniedError):
            return

        with self._lock:
            # Reads of other threads that began before the pause say no more.
            if monotonic() < self._paused_until:
                return
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                log.info(
                    "s3://%s: reads go through boto3 alone for %.0f s: %s",
                    self._bucket,
                    self._pause,
                    type(error).__name__,
                )
                # `_failures` stays, so that one more failure after the pause begins the next one.
                self._paused_until = monotonic() + self._pause
                self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)


def _open(bucket: str, client: Any, session: Any | None, timeout: float) -> Any:
    """Return obstore's store of a bucket; None if it cannot be used here.

    Raises:
        UserError: if `LI_DIT_S3_CLIENT` names no client.
    """
    global _runtime_of
    chosen = os.environ.get("LI_DIT_S3_CLIENT", "")
    if chosen not in ("", "boto3"):
        raise UserError("LI_DIT_S3_CLIENT: not a client: write boto3, or unset it")
    if chosen:
        return None
    # A read would wait forever for threads that only the parent has.
    if _runtime_of not in (0, os.getpid()):
        return None

    endpoint = client.meta.endpoint_url
    # Certificates that botocore alone reads.
    bundles = [name for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE") if os.environ.get(name)]
    if bundles and endpoint.startswith("https:"):
        return None

    # Imported here because local stores do not need it.
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    options: dict[str, Any] = {
        "endpoint": endpoint,
        "region": client.meta.region_name or "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {"timeout": timedelta(seconds=timeout), "allow_http": endpoint.startswith("http:")},
        # Retries are the caller's, so that waiting times do not multiply.
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=timeout)},
    }
    if session is None:
        options["skip_signature"] = True
    elif session.get_credentials() is None:
        return None
    else:
        ttl = timedelta(seconds=CREDENTIALS_SECONDS)
        options["credential_provider"] = Boto3CredentialProvider(session, ttl=ttl)

    _runtime_of = os.getpid()
    try:
        return S3Store(bucket, **options)
    except Exception as error:
        log.info("s3://%s: reads go through boto3 alone: %s", bucket, type(error).__name__)
        return None
