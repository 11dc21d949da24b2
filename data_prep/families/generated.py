"""Generated captions: the rows of captions families, joined to the pairs whose images they describe."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import committed_parts, read_commit
from data_prep.dataset.schema import CAPTIONS, PAIRS, Commit, Family, Part
from data_prep.dataset.snapshot_reader import read_family
from data_prep.pairs.pairs import Pair
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError


class GeneratedCaptions:
    """The captions families that a text family reads; other families read none."""

    def __init__(self, dataset: Store, family: Family | None) -> None:
        """Read the captions families that `family` names.

        Raises:
            UserError: if one does not exist, or is another one than the text family was registered with.
        """
        self._dataset = dataset
        self._families: list[Family] = []
        if family is None:
            return
        hashes: dict[str, str] = family.identity.get(CAPTIONS, {})
        for name, hash in hashes.items():
            self._families.append(read_captions_family(dataset, name))
            if self._families[-1].hash != hash:
                raise UserError(
                    f"{dataset.uri}: family `{family.name}` reads captions {name} of {hash}, and they are "
                    f"{self._families[-1].hash} now: encode them under another family name"
                )

    def ready_parts(self) -> set[Part]:
        """Return the parts that have pairs and all captions."""
        ready = committed_parts(self._dataset, PAIRS)
        for family in self._families:
            ready &= committed_parts(self._dataset, family.name)
        return ready

    def commits(self, part: Part) -> list[Commit]:
        """Return the commits of a part's captions.

        Raises:
            FileNotFoundError: if some are not made yet.
        """
        return [read_commit(self._dataset, family.name, part) for family in self._families]

    def add(self, commits: Sequence[Commit], pairs: list[Pair]) -> list[Pair]:
        """Return the pairs of a part with the generated captions after their own.

        Raises:
            StoreError: if the captions are missing, damaged, or of other samples.
        """
        for family, commit in zip(self._families, commits, strict=True):
            rows = read_rows(self._dataset, family, commit)
            if [row["id"] for row in rows] != [pair.id for pair in pairs]:
                raise StoreError(
                    f"{self._dataset.uri}: {family.name} {commit.part}: of other samples than the pairs: "
                    "delete its commit and make the captions again"
                )
            pairs = [
                replace(pair, captions=[*pair.captions, *_captions_of(row)])
                for pair, row in zip(pairs, rows, strict=True)
            ]
        return pairs


def read_captions_family(dataset: Store, name: str) -> Family:
    """Return a captions family.

    Raises:
        UserError: if no family has that name, or it is of another kind.
    """
    family = read_family(dataset, name)
    if family.kind != CAPTIONS:
        raise UserError(f"{dataset.uri}: family `{name}` has {family.kind}, no captions: correct the name")
    return family


def read_rows(dataset: Store, family: Family, commit: Commit) -> list[dict[str, Any]]:
    """Return the rows of one part of a captions family (`CAPTION_COLUMNS`).

    Raises:
        StoreError: if its file is missing or damaged.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="li-dit-") as folder:
        for file in commit.files:
            path = Path(folder) / "shard"
            dataset.fetch(file, path)
            rows += Shard(path, family.columns)
    return rows


def _captions_of(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    # The shard's hash was checked, so this is what `to_row` wrote.
    for caption in json.loads(row["captions"]):
        yield caption["kind"], caption["text"]


def to_row(
    id: int, captions: Sequence[tuple[str, str]], dropped: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Return a row of a captions family.

    Args:
        id: the sample.
        captions: kind and text of each caption.
        dropped: kind, reason and start of the text of each answer that is none.
    """
    return {
        "id": id,
        "captions": _to_json([{"kind": kind, "text": text} for kind, text in captions]),
        "dropped": _to_json(
            [{"kind": kind, "reason": reason, "text": text} for kind, reason, text in dropped]
        ),
    }


def _to_json(entries: list[dict[str, str]]) -> str:
    return json.dumps(entries, ensure_ascii=False)
