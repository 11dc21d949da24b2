"""The meaning of an S3 endpoint's answers: exceptions for refusals, and whether an answer is of S3 at all.

Proxies and endpoints in trouble answer 200 with pages of their own; those count as faults that may pass.
"""

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from data_prep.store.faults import DamagedError, StoreError, TransientError
from model.common.errors import UserError

MAX_CLOCK_DIFFERENCE = 300.0
"""Seconds; S3 refuses requests whose date differs by more than fifteen minutes."""
# Faults that may pass, although most of them come with status 400, which is otherwise final.
TRANSIENT_CODES = {
    "BadDigest",
    "ExpiredToken",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "TokenRefreshRequired",
    "XAmzContentSHA256Mismatch",
}


def status_of(error: Any) -> int:
    """Return the HTTP status of an error response."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def exception_for(uri: str, error: Any) -> Exception:
    """Choose our exception for an error response of the endpoint."""
    status, code = status_of(error), error.response.get("Error", {}).get("Code", "")
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
    # Before 404, its status: a missing bucket is not a missing object. (The answer to a HEAD has no code, so
    # `check` gets a plain 404.)
    if code == "NoSuchBucket":
        return UserError(f"{uri}: there is no such bucket: create it, or correct the URI")
    if status == 404:
        return FileNotFoundError(uri)
    if status == 416:  # a resumed download that starts past the object's end
        return DamagedError("the object is shorter than its commit says")

    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region", "")
    if status in (301, 400) and re.fullmatch("[a-z0-9-]+", region):
        return UserError(f"{uri}: the bucket is in another region: set AWS_REGION={region}")
    # The answer to a HEAD has no body to say why it is refused: 400 is what an expired token gets.
    unexplained = status == 400 and error.operation_name.startswith("Head")
    # 501 means that the endpoint does not know the request, see `_probe`; 409, that two conditional puts met.
    passing = (status >= 500 and status != 501) or status in (408, 409, 429) or code in TRANSIENT_CODES
    if passing or unexplained:
        hint = " (an expired token?)" if unexplained else ""
        return TransientError(f"{status} {code}{hint}", _retry_after(headers))

    if status in (401, 403):
        behind = _clock_difference(headers)
        if code == "RequestTimeTooSkewed" or abs(behind) > MAX_CLOCK_DIFFERENCE:
            return UserError(
                f"{uri}: {status} {code}: this machine's clock is {behind:+,.0f} s from the endpoint's: "
                "set the clock, for instance by NTP"
            )
        return UserError(
            f"{uri}: {status} {code}: check the credentials (AWS variables, profile) and their rights"
        )
    return StoreError(f"{uri}: {status} {code} from {error.operation_name}: the endpoint refuses the request")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a response asks to wait: given as a number, or as a date."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}", value, re.ASCII):
        return float(value)
    date = _date(value)
    return 0.0 if date is None else max(0.0, date - time.time())


def _clock_difference(headers: Mapping[str, str]) -> float:
    """Return the seconds that this machine's clock is ahead of the endpoint's; 0 if that is unknown."""
    date = _date(headers.get("date", ""))
    return 0.0 if date is None else time.time() - date


def _date(text: str) -> float | None:
    """Return a date of an HTTP header in seconds since 1970; None if it is not one."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def own_object(response: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a GET or HEAD of an object.

    Raises:
        TransientError: if it is a page of a proxy, which has no date of an object.
    """
    if "LastModified" not in response:
        raise TransientError("the answer is not an object")
    return response


def object_size(response: Mapping[str, Any], start: int) -> int:
    """Return the size of the object of which a range was asked for.

    Args:
        response: the answer.
        start: first byte of the range.

    Raises:
        TransientError: if the answer is not that range.
    """
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.get("ContentRange", ""), re.ASCII)
    if match and int(match[1]) == start:
        return int(match[2])
    # Of a range from the first byte on, an endpoint may return the whole object.
    if start == 0 and "ContentRange" not in response:
        return response["ContentLength"]
    raise TransientError("the endpoint ignores ranges, or answers with another one")


def own_time(headers: Mapping[str, str]) -> float:
    """Return the endpoint's time, in seconds since 1970.

    Raises:
        TransientError: if the answer has none.
    """
    date = _date(headers.get("date", ""))
    if date is None:
        raise TransientError("the answer has no date")
    return date


def own_page(page: dict[str, Any], query: Mapping[str, Any]) -> dict[str, Any]:
    """Return one page of a listing.

    Raises:
        TransientError: if it is no listing, or one of other keys.
    """
    more = page.get("IsTruncated")
    token = page.get("NextContinuationToken")
    # The same token again would list the same page without an end.
    if more is None or (more and (not token or token == query.get("ContinuationToken"))):
        raise TransientError("the answer is not a listing")
    keys = [entry.get("Key") for entry in page.get("Contents", [])]
    for key in keys + [entry.get("Prefix") for entry in page.get("CommonPrefixes", [])]:
        if not key or not key.startswith(query["Prefix"]):
            raise TransientError(f"the listing names {str(key)[:200]!r}, which is outside of the prefix")
    return page
