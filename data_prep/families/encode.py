"""Encode the committed pairs into a family, part by part: read ahead, encode, commit behind."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, committed_parts, read_commit, read_plan
from data_prep.dataset.rollups import write_committed
from data_prep.dataset.schema import PAIRS, Commit, Family, Part
from data_prep.dataset.snapshot_reader import read_family
from data_prep.engines import Do, Outcome, Step, run
from data_prep.families.generated import GeneratedCaptions
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.share import Share

SHARD = "shard.00000.mds"

EncodedRows = tuple[list[dict[str, Any]], dict[str, float]]
"""A row per sample, with the family's columns; and counts for the part's commit."""
Encoder = tuple[Family, Callable[[list[Pair]], EncodedRows]]
"""A family, as returned by `register_family`, and a function that maps the pairs of a part to their rows, in
the same order, and to counts."""


def encode_family(
    dataset: Store, family: Family, encode_part: Callable[[list[Pair]], EncodedRows], share: Share
) -> None:
    """Encode the parts of a share that a family lacks, with an encoder that is there (`encode_parts`)."""
    encode_parts(dataset, family.name, partial(nullcontext, (family, encode_part)), share)


def encode_parts(
    dataset: Store, name: str, open_encoder: Callable[[], AbstractContextManager[Encoder]], share: Share
) -> None:
    """Encode the parts of a share that a family lacks; running it again encodes only what is missing.

    Args:
        dataset: the dataset's store.
        name: the family's name.
        open_encoder: loads the encoder and registers the family, once per worker.
        share: this task's share of the parts.

    Raises:
        UserError: if the family is registered as something else, or parts of the share have no pairs yet (all
            others are encoded before).
    """
    step = FamilyStep(dataset, name, open_encoder)
    without_pairs = run(step, share).notes
    # All other parts are encoded by now: another run has only these left to do.
    if without_pairs:
        first = min(without_pairs)
        has_pairs = Part.parse(first) in committed_parts(dataset, PAIRS)
        lacking, command = ("generated captions", "captions") if has_pairs else ("pairs", "pairs")
        raise UserError(
            f"{dataset.uri}: {len(without_pairs)} of {len(share.owns(step.units))} parts of this task have "
            f"no {lacking} yet ({first} is the first): finish `python -m data_prep {command}`, then run "
            "this again"
        )


class FamilyStep(Step):
    """The encoding of all parts; its units are their names."""

    noun = "parts"
    # While one part is encoded, the next one is read and the previous one is written and committed.
    overlap = 2
    gpus = 1
    checks = True

    def __init__(
        self, dataset: Store, name: str, open_encoder: Callable[[], AbstractContextManager[Encoder]]
    ) -> None:
        """Encode nothing yet.

        Args:
            dataset: the dataset's store.
            name: the family's name.
            open_encoder: loads the encoder and registers the family.
        """
        self.title = name
        plan = read_plan(dataset)
        self.units = [str(part) for part in plan.parts]
        self._caption_kinds = plan.caption_kinds
        self._dataset = dataset
        self._open_encoder = open_encoder

    def missing(self) -> set[str]:
        """Return the parts that the family lacks."""
        return set(self.units) - {str(part) for part in committed_parts(self._dataset, self.title)}

    def exists(self, unit: str) -> bool:
        """True if the family has a part."""
        return self._dataset.exists(Part.parse(unit).commit_key(self.title))

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Load the encoder.

        Raises:
            UserError: if the family is registered as something else.
        """
        with self._open_encoder() as (family, encode_part):
            if read_family(self._dataset, family.name) != family:
                raise UserError(
                    f"{self._dataset.uri}: family `{family.name}` changed while it was encoded: start again"
                )
            generated = GeneratedCaptions(self._dataset, family)
            turn = threading.Lock()

            def encode(pairs: list[Pair]) -> EncodedRows:
                # A worker of a cluster does two parts at once, but its encoder one.
                with turn:
                    return encode_part(pairs)

            yield lambda units: self._do(family, generated, encode, units)

    def _do(
        self,
        family: Family,
        generated: GeneratedCaptions,
        encode_part: Callable[[list[Pair]], EncodedRows],
        units: Sequence[str],
    ) -> Iterator[Outcome]:
        """Encode and commit some parts, of which three are in memory; those without pairs are notes."""
        # One thread reads and one commits, while this one encodes.
        with TemporaryDirectory(prefix="li-dit-") as folder, ThreadPoolExecutor(2) as pool:
            commit: Future[Commit] | None = None
            made: list[Future[Commit]] = []
            for unit, pairs in _read_ahead(pool, partial(self._read, generated), units):
                if pairs is None:
                    yield Outcome(notes=[unit])
                    continue
                # A part that lost all of its pairs is committed as well, so that the family becomes complete.
                rows, counts = encode_part(pairs) if pairs else ([], {})
                # wait for the previous commit first, so that no more than three parts are in memory
                yield from _finish(commit)
                ids = [pair.id for pair in pairs]
                part = Part.parse(unit)
                commit = pool.submit(
                    commit_rows, self._dataset, family, part, ids, rows, counts, Path(folder)
                )
                made.append(commit)
            yield from _finish(commit)
        write_committed(self._dataset, family.name, [commit.result() for commit in made])

    def _read(self, generated: GeneratedCaptions, unit: str) -> list[Pair] | None:
        """Return the pairs of a part, with their generated captions; None if they are not there yet."""
        part = Part.parse(unit)
        try:
            commit = read_commit(self._dataset, PAIRS, part)
            captions = generated.commits(part)
        except FileNotFoundError:
            return None
        return generated.add(captions, read_pairs(self._dataset, commit, self._caption_kinds))


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], list[Pair] | None], units: Sequence[str]
) -> Iterator[tuple[str, list[Pair] | None]]:
    """Yield each part with its pairs, while a thread reads the next part."""
    ahead = pool.submit(read, units[0]) if units else None
    for unit, following in zip_longest(units, units[1:]):
        assert ahead is not None
        pairs = ahead.result()
        ahead = pool.submit(read, following) if following else None
        yield unit, pairs


def _finish(commit: "Future[Commit] | None") -> Iterator[Outcome]:
    """Wait for the commit of a part, if there is one."""
    if commit:
        # Raises the error of the upload, if there was one.
        commit.result()
        yield Outcome(Counter(encoded=1))


def commit_rows(
    dataset: Store,
    family: Family,
    part: Part,
    ids: list[int],
    rows: list[dict[str, Any]],
    counts: dict[str, float],
    folder: Path,
) -> Commit:
    """Write and commit the rows of a part; a part without rows has no file."""
    # A shard with other rows than its commit names would pair images with the wrong latents or captions.
    if [row["id"] for row in rows] != ids:
        raise ValueError(f"{family.name} {part}: the encoder returned other rows than it was given")

    files = {SHARD: folder / SHARD} if rows else {}
    for path in files.values():
        with naming_full_disk(path):
            write_mds(path, family.columns, rows)

    commit = commit_part(dataset, family.name, part, files, ids, counts, family.hash)
    # The next part writes its shard under the same name.
    for path in files.values():
        path.unlink()
    return commit
