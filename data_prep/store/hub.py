"""Datasets of the Hugging Face hub as a store that can only be read: `hf://OWNER/NAME@COMMIT/path`.

Files are streamed by ranged requests, so a source on the hub needs no download before the plan. A commit hash
pins them: with a branch, files would change under a running job.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from data_prep.store.entry import Entry
from data_prep.store.faults import StoreError, TooLargeError, TransientError, retrying
from model.common.errors import UserError, first_line
from model.common.hub import is_commit

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<name>[\w-][\w.-]*/[\w.-]+)@(?P<revision>[^/@]+)(?:/(?P<prefix>.*))?")
SECONDS = 60
"""Time of one request."""
CHUNK = 8 << 20
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


@dataclass
class HubDataset:
    """One dataset of the hub, at one commit."""

    name: str
    revision: str
    _sizes: dict[str, Entry] = field(default_factory=dict, repr=False)
    """Objects that a listing or a request has shown."""

    @property
    def uri(self) -> str:
        """Address: `hf://OWNER/NAME@COMMIT`."""
        return f"{SCHEME}{self.name}@{self.revision}"

    def local_path(self, key: str) -> Path | None:
        """None: nothing is on this machine."""
        return None

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return a whole file.

        Raises:
            FileNotFoundError: if it does not exist.
            TooLargeError: if it is larger than `max_bytes`.
        """
        entry = self._entry(key)
        if entry is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        if max_bytes is not None and entry.bytes > max_bytes:
            raise TooLargeError(f"{self.uri}/{key}: {entry.bytes:,} bytes, more than {max_bytes:,}")
        return b"".join(self.stream(key, 0))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer only at the file's end.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        if length <= 0:
            return b""
        return retrying(f"{self.uri}/{key}")(self._request_range, key, start, length)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """Yield the file from `start` on."""
        while data := self.read_range(key, start, CHUNK):
            yield data
            start += len(data)

    def size(self, key: str) -> int | None:
        """Return the size of a file; None if it does not exist."""
        entry = self._entry(key)
        return None if entry is None else entry.bytes

    def version(self, key: str) -> str | None:
        """Return the hash of a file's content; None if it does not exist."""
        entry = self._entry(key)
        return None if entry is None else f"{entry.bytes} bytes, {entry.version}"

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield the files whose names start with `prefix`, sorted."""
        folder = prefix.rpartition("/")[0]
        found = retrying(f"{self.uri}/{prefix}")(self._list, folder)
        self._sizes.update((entry.key, entry) for entry in found)
        yield from sorted(entry for entry in found if entry.key.startswith(prefix))

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`."""
        names = {entry.key.removeprefix(prefix).partition("/") for entry in self.entries(prefix)}
        return sorted(name for name, slash, _ in names if slash)

    def check(self, create: bool) -> bool:
        """True if the dataset exists at that commit.

        Raises:
            UserError: if it needs permission, or the hub cannot be reached.
        """
        return retrying(self.uri)(self._exists)

    def now(self) -> float:
        """0: nothing on the hub gets older."""
        return 0.0

    def close(self) -> None:
        """There is nothing to close."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Refuse to write."""
        self._refuse()

    def put_new(self, key: str, data: bytes) -> bool:
        """Refuse to write."""
        self._refuse()

    def delete(self, key: str) -> None:
        """Refuse to write."""
        self._refuse()

    def delete_many(self, keys: Sequence[str]) -> None:
        """Refuse to write."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(f"{self.uri}: datasets of the hub are only read: give the store another address")

    def _entry(self, key: str) -> Entry | None:
        if key not in self._sizes:
            for entry in retrying(f"{self.uri}/{key}")(self._paths, [key]):
                self._sizes[entry.key] = entry
        return self._sizes.get(key)

    # -- requests; each raises `TransientError` for what may pass

    def _request_range(self, key: str, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,  # pyright: ignore[reportPrivateImportUsage]
            get_session,  # pyright: ignore[reportPrivateImportUsage]
        )

        url = hf_hub_url(self.name, key, repo_type="dataset", revision=self.revision, endpoint=_endpoint())
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}"}
        try:
            response = get_session().get(url, headers=headers, timeout=SECONDS)
        except OSError as error:
            raise TransientError(f"{type(error).__name__}: {first_line(error)}") from error

        status = response.status_code
        if status == 416:
            return b""
        if status == 404:
            raise FileNotFoundError(f"{self.uri}/{key}")
        if status in TRANSIENT:
            raise TransientError(f"HTTP {status}", _asked_wait(response.headers.get("Retry-After", "")))
        if status not in (200, 206):
            raise self._denied(f"HTTP {status}")
        data = response.content
        # A server that ignores the range sends the whole file.
        return data[start : start + length] if status == 200 else data[:length]

    def _list(self, folder: str) -> list[Entry]:
        from huggingface_hub.hf_api import RepoFile

        api = self._api()
        try:
            tree = api.list_repo_tree(
                self.name, folder or None, recursive=True, revision=self.revision, repo_type="dataset"
            )
            return [_entry(file) for file in tree if isinstance(file, RepoFile)]
        except Exception as error:
            self._explain(error, f"{self.uri}/{folder}")
            return []

    def _paths(self, keys: list[str]) -> list[Entry]:
        from huggingface_hub.hf_api import RepoFile

        try:
            found = self._api().get_paths_info(self.name, keys, revision=self.revision, repo_type="dataset")
            return [_entry(file) for file in found if isinstance(file, RepoFile)]
        except Exception as error:
            self._explain(error, self.uri)
            return []

    def _exists(self) -> bool:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            self._api().dataset_info(self.name, revision=self.revision, timeout=SECONDS)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            # A repository that needs permission looks like one that does not exist.
            raise self._denied(first_line(error)) from error
        except Exception as error:
            self._explain(error, self.uri)
        return True

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=_endpoint())

    def _explain(self, error: Exception, where: str) -> None:
        """Raise what an error of the hub's client means; return if there is no such folder."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        if isinstance(error, EntryNotFoundError):
            return
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status is not None and status not in TRANSIENT:
            raise self._denied(first_line(error)) from error
        if isinstance(error, OSError | HfHubHTTPError):
            raise TransientError(f"{type(error).__name__}: {first_line(error)}") from error
        raise StoreError(f"{where}: {type(error).__name__}: {first_line(error)}: run again") from error

    def _denied(self, said: str) -> UserError:
        return UserError(
            f"{self.uri}: {said}: check name and commit; if the dataset asks for permission, accept its "
            "terms and log in with `hf auth login`"
        )


def open_hub(uri: str) -> tuple[HubDataset, str]:
    """Return the dataset that an address names, and the folder in it.

    Raises:
        UserError: if the address has another form, or no commit hash.
    """
    match = ADDRESS.fullmatch(uri.rstrip("/"))
    if match is None or not is_commit(match["revision"]):
        raise UserError(
            f"{uri}: write hf://OWNER/NAME@COMMIT/path with the 40-digit commit, which pins the files"
        )
    return HubDataset(match["name"], match["revision"]), match["prefix"] or ""


def _endpoint() -> str | None:
    import os

    return os.environ.get("HF_ENDPOINT") or None


def _entry(file: Any) -> Entry:
    return Entry(file.path, 0.0, file.size, file.blob_id)


def _asked_wait(value: str) -> float:
    return float(value) if value.isdecimal() else 0.0
