"""Layout of a dataset in a store: keys, records, columns. Every reader and writer uses this file.

<store>/<dataset>/
  dataset.json                        settings that decide which pairs the dataset holds
  manifest.json                       the plan: how many rows each part has
  manifest/<bucket>/000000.parquet    the plan: which sample is which row
  pairs/<bucket>/00012/<attempt>/pairs.tar, pairs.parquet
  pairs/README.md                     how `datasets.load_dataset` reads the pairs
  families/<family>/family.json, constants-<xxh64>.safetensors
  families/<family>/<bucket>/00012/<attempt>/shard.00000.mds
  commits/<pairs or family>/<bucket>/00012.json             the object that makes a part exist
  rollups/<pairs or family>/<xxh64>.parquet                 copies of many commits, checked with the listing
  users/names.json, index.parquet                           names of users; which sample is whose, by number
  dropped/<source file>.parquet                             samples that the plan left out, and why
  snapshots/<id>/snapshot.json, <bucket>-<xxh64>.parquet    immutable: what a training run reads
  snapshots/history/000007.json                             snapshots in order; the last is `latest`
"""

import hashlib
import itertools
import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.store.store import StoredFile
from model.common.records import STRICT, Count, Hash, Name, NoHash, canonical_json, parse_record, seal

FORMAT: Literal[1] = 1
PAIRS = "pairs"
CLAIM = "collected"
"""Name of the object beside an attempt's payload by which `gc` claims it."""
TABLE = "pairs.parquet"
"""File of a part of the pairs: one row per sample, with its captions."""

LATENT_COLUMNS = {"id": "int", "mean": "bytes", "std": "bytes"}
"""MDS columns of a latents family: sample id; moments of the VAE, each bf16 [C, h, w], or [C, T, h, w] of a
space of clips."""
MEAN_COLUMNS = {"id": "int", "mean": "bytes"}
"""Those of a family that has the means alone."""
MEAN_ALONE = "bf16 mean"
"""`moments` in the identity of such a family."""
TEXT_COLUMNS = {"id": "int", "kinds": "bytes", "tokens": "bytes", "values": "bytes", "scales": "bytes"}
"""MDS columns of a text family, for K captions per sample: the kind of each caption, uint8 [K], an index into
the dataset's `caption_kinds`; its number of tokens, int32 [K]; the hidden states of all captions,
concatenated, in the family's quantization, [sum of tokens, bytes per token]; an fp32 scale per token, [sum of
tokens] (empty for bf16)."""
CAPTIONS = "captions"
"""Kind of the families of generated captions; and, in the identity of a text family that reads some, their
hashes by name."""

CAPTION_COLUMNS = {"id": "int", "captions": "str", "dropped": "str"}
"""MDS columns of a captions family: sample id; its captions as JSON, a list of `kind` and `text`; and the
answers that were no captions, a list of `kind`, `reason` and the start of the `text`."""
COLUMNS = {"latents": LATENT_COLUMNS, "text": TEXT_COLUMNS, "captions": CAPTION_COLUMNS}
"""Kind of a family -> its columns."""

FamilyKind = Literal["latents", "text", "captions"]


class Part(NamedTuple):
    """The unit of work: a fixed number of rows of one bucket."""

    bucket: str
    number: int

    def __str__(self) -> str:
        # Padded with zeros, so that a listing of keys has the parts in order.
        return f"{self.bucket}/{self.number:05d}"

    @classmethod
    def parse(cls, name: str) -> "Part":
        """Return the part of a name, as `str` gives it."""
        bucket, _, number = name.partition("/")
        return cls(bucket, int(number))

    def commit_key(self, kind: str) -> str:
        """Key of the object that makes this part of `kind` (`pairs` or a family's name) exist."""
        return f"commits/{kind}/{self}.json"

    def payload_key(self, kind: str, attempt: str, name: str) -> str:
        """Key of one payload file; private to one attempt, so that nothing is ever overwritten."""
        root = PAIRS if kind == PAIRS else f"families/{kind}"
        return f"{root}/{self}/{attempt}/{name}"


@dataclass(frozen=True, slots=True)
class Commit:
    """The record of one part of one kind; the part exists if and only if the record is in the store."""

    __pydantic_config__ = STRICT

    kind: Name
    bucket: Name
    number: Count
    rows: Annotated[int, Field(ge=0, lt=1 << 32)]
    attempt: Hash
    ids_xxh64: Hash
    """Hash of the sample ids in row order: families of one part must agree on it."""
    files: list[StoredFile]
    family_hash: Annotated[str, Field(pattern="^[0-9a-z]{0,64}$")] = ""
    counts: dict[str, int | float] = field(default_factory=dict)
    """Numbers that the writer counted: tokens, outliers, seconds."""
    format: Literal[1] = FORMAT

    @property
    def part(self) -> Part:
        """The part that this commit makes exist."""
        return Part(self.bucket, self.number)

    def to_json(self) -> bytes:
        """Canonical JSON bytes, sealed."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Commit":
        """Read back what `to_json` wrote.

        Raises:
            ValueError: if it is damaged.
        """
        commit = parse_record(cls, data)
        if commit.rows and not commit.files:
            raise ValueError(f"{commit.rows} rows in no file")

        # A payload elsewhere would be another part's, or no part of the store at all.
        folder = commit.part.payload_key(commit.kind, commit.attempt, "")
        for file in commit.files:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file.key.removeprefix(folder)):
                raise ValueError("files: a payload that is not of this attempt")
        return commit


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the parts that the plan asks for.

    A part may end with fewer rows than planned (if an image turns out to be damaged), never with more.
    """

    __pydantic_config__ = STRICT

    dataset: str
    caption_kinds: list[str]
    buckets: dict[Name, list[Count]]
    """Bucket name -> planned rows of its parts 0, 1, 2, ..."""
    format: Literal[1] = FORMAT

    KEY: ClassVar[str] = "manifest.json"

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order in which array tasks share them.

        They follow the source, if each bucket's rows are distributed evenly over it: neighbors in this
        list, of any bucket, were cut from the same stretch of the source.
        """
        parts: list[Part] = []
        for bucket in sorted(self.buckets):
            parts += map(Part, itertools.repeat(bucket), range(len(self.buckets[bucket])))

        # The middle of part k of n is at (2 k + 1) / 2 n of the source.
        counts = {bucket: len(rows) for bucket, rows in self.buckets.items()}
        return sorted(parts, key=lambda part: (2 * part.number + 1) / counts[part.bucket])

    def to_json(self) -> bytes:
        """Canonical JSON bytes, sealed."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read back what `to_json` wrote.

        Raises:
            ValueError: if it is damaged.
        """
        return parse_record(cls, data)


class FileCounts(TypedDict):
    """Rows of one source file that the plan read, kept and dropped."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    number: Count
    label: str
    rows: Count
    kept: Count
    dropped: dict[str, Count]
    """Rows by the reason why they were dropped."""


class CaptionCounts(TypedDict):
    """Captions that the plan kept and refused."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    kept: dict[str, Count]
    """Captions by kind."""
    letters: dict[str, Count]
    """Letters by kind."""
    refused: dict[str, Count]
    """Captions by the reason why they were refused."""
    bracketed: NotRequired[Count]
    """Captions that begin with a bracket. Plans of earlier versions have neither this nor examples."""
    examples: NotRequired[list[str]]


class SourceCounts(TypedDict):
    """Files below the path of one source."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    files: Count
    ignored: dict[str, Count]
    """Files that no row comes from, by suffix or reason."""


class EvaluationCounts(TypedDict):
    """Images of one evaluation set that pairs were compared with."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    name: str
    images: Count
    unreadable: Count
    """Rows of the set with which no pair could be compared."""
    files: Count
    ignored: dict[str, Count]
    """Files that no image comes from, by suffix or reason."""


class DropListCounts(TypedDict):
    """Ids of the file that `dedupe.drop` names."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    ids: Count
    unmatched: Count
    """Ids that no row has."""


class PlanRecord(TypedDict):
    """`manifest/plan.json`: the plan's counts, and the hashes of its files."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    files: list[FileCounts]
    captions: CaptionCounts
    sources: NotRequired[list[SourceCounts]]
    """In the order of the dataset's YAML; plans of earlier versions have none."""
    against: NotRequired[list[EvaluationCounts]]
    """In the order of `dedupe.against`; missing without that key."""
    drop: NotRequired[DropListCounts]
    """Missing without the key `dedupe.drop`."""
    manifest: dict[str, Hash]
    """xxh64 of each manifest file by key."""


class FamilyRecord(TypedDict):
    """A family as JSON."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    name: Name
    kind: FamilyKind
    identity: dict[str, Any]
    info: dict[str, Any]
    constants_xxh64: Hash | NoHash
    format: Literal[1]
    hash: Hash


class BucketRecord(TypedDict):
    """One bucket of a snapshot."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    parts: Count
    rows: Count
    content: str
    """SHA-256 over the parts' content."""
    index_xxh64: Hash


class SnapshotRecord(TypedDict):
    """A snapshot as JSON."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    dataset: str
    caption_kinds: list[str]
    families: dict[Name, FamilyRecord]
    buckets: dict[Name, BucketRecord]
    left_out: dict[str, Count]
    format: Literal[1]


@dataclass(frozen=True)
class Taken:
    """An entry of the snapshots' history."""

    __pydantic_config__ = STRICT

    id: Hash
    taken: str
    """Time in UTC."""


@dataclass(frozen=True)
class Family:
    """One encoding of the pairs: VAE latents at one resolution, the hidden states of one LLM, or captions
    that a model wrote."""

    name: str
    kind: FamilyKind
    identity: dict[str, Any]
    """Everything that decides the numbers: model, revision, layer, template, maximum tokens, quantization."""
    info: dict[str, Any] = field(default_factory=dict)
    """Other facts that readers need. Text: `width`, `prefix_tokens`, `quantisation`, and `caption_kinds` if
    it reads captions families. Latents: `channels`, `downsampling`, and either `scaling_factor` and
    `shift_factor` or `latents_mean` and `latents_std`."""
    constants_xxh64: str = ""
    """Hash of the constants, empty if there are none. Text families: the hidden states of the prefix and of
    the null caption, channel mean and std."""
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """Identity of the family, 16 hex digits; two families with one hash hold the same numbers."""
        # Without `info`, which describes the numbers but does not decide them.
        record = {"format": self.format, "kind": self.kind, **self.identity}
        return hashlib.sha256(canonical_json(record)).hexdigest()[:16]

    @property
    def key(self) -> str:
        """Key of the record that registers the family."""
        return f"families/{self.name}/family.json"

    @property
    def constants_key(self) -> str:
        """Key of the constants; named by content, so that two tasks cannot mix them up."""
        return f"families/{self.name}/constants-{self.constants_xxh64}.safetensors"

    @property
    def columns(self) -> dict[str, str]:
        """MDS columns of the family's shards."""
        is_mean_alone = self.kind == "latents" and self.identity.get("moments") == MEAN_ALONE
        return MEAN_COLUMNS if is_mean_alone else COLUMNS[self.kind]

    def to_json(self) -> bytes:
        """Canonical JSON bytes, sealed."""
        return seal({**asdict(self), "hash": self.hash})

    @classmethod
    def from_json(cls, data: bytes) -> "Family":
        """Read back what `to_json` wrote.

        Raises:
            ValueError: if it is damaged.
        """
        return cls.from_record(parse_record(FamilyRecord, data))

    @classmethod
    def from_record(cls, record: FamilyRecord) -> "Family":
        """Return the family of a checked record.

        Raises:
            ValueError: if its hash is not that of its identity.
        """
        content: dict[str, Any] = {**record}
        digest = content.pop("hash")
        family = cls(**content)
        if family.hash != digest:
            raise ValueError("its identity does not match its hash")
        return family


@dataclass(frozen=True)
class Bucket:
    """One aspect ratio, size in pixels and number of frames; every image or clip of the bucket has exactly
    these."""

    height: int
    width: int
    frames: int = 1

    @property
    def name(self) -> str:
        """Name in keys, height first: `320x192` for images, `320x192x17` for clips of 17 frames."""
        size = f"{self.height}x{self.width}"
        return size if self.frames == 1 else f"{size}x{self.frames}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """Read back `name`.

        Raises:
            ValueError: if the name does not have that form.
        """
        bucket = cls(*map(int, name.split("x"))) if re.fullmatch(r"\d+x\d+(x\d+)?", name) else None
        # `64x64x1` would be a second name for the images of `64x64`.
        if bucket is None or (bucket.frames < 2 and name.count("x") > 1):
            raise ValueError(f"not a bucket's name: {name!r}")
        return bucket


@dataclass(frozen=True)
class Snapshot:
    """An immutable view of a dataset: the parts that exist in all of its families, and their payload files.

    Each bucket has a columnar index of its own, with one row per part, ordered by `number`: `number`, `rows`,
    `ids_xxh64`, and for each family `<family>.key`, `<family>.bytes`, `<family>.xxh64`. Parts without rows
    are not in it. If the dataset has users, `users` has the number of each row's user, -1 = nobody.

    Two snapshots with one id hold the same bytes in the same order, so they are interchangeable for training:
    the id covers the families (identity and constants) and, through `content`, the sample ids and the payload
    hash of every part. It does not cover payload keys: they contain the random name of the attempt that won,
    which differs when the work is repeated.
    """

    dataset: str
    caption_kinds: list[str]
    families: dict[str, Family]
    buckets: dict[str, BucketRecord]
    left_out: dict[str, int]
    """Rows of the plan that the snapshot lacks, by reason; empty unless the snapshot is partial."""
    format: int = FORMAT

    @property
    def id(self) -> str:
        """Identity of everything that a training run reads, 16 hex digits."""
        record = self._record()
        for bucket in record["buckets"].values():
            bucket.pop("index_xxh64", None)  # hash of a file that contains payload keys
        return hashlib.sha256(canonical_json(record)).hexdigest()[:16]

    @property
    def key(self) -> str:
        """Key of the snapshot's record."""
        return f"snapshots/{self.id}/snapshot.json"

    def index_key(self, bucket: str) -> str:
        """Key of the index of one bucket; named by content, so that an index is never overwritten."""
        return f"snapshots/{self.id}/{bucket}-{self.buckets[bucket]['index_xxh64']}.parquet"

    def _record(self) -> dict[str, Any]:
        record = asdict(self)
        for name, family in self.families.items():
            # `asdict` leaves properties out, and `Family.from_json` expects the hash as in the family's own
            # record.
            record["families"][name]["hash"] = family.hash
        return record

    def to_json(self) -> bytes:
        """Canonical JSON bytes, sealed."""
        return seal(self._record())

    @classmethod
    def from_json(cls, data: bytes) -> "Snapshot":
        """Read back what `to_json` wrote.

        Raises:
            ValueError: if it is damaged.
        """
        record = parse_record(SnapshotRecord, data)
        families = {name: Family.from_record(family) for name, family in record["families"].items()}
        buckets, left_out = record["buckets"], record["left_out"]
        return cls(record["dataset"], record["caption_kinds"], families, buckets, left_out)
