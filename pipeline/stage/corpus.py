"""The datasets that a stage reads: one, or a mixture of several by weight."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.dataset.schema import Bucket, Family, Snapshot
from data_prep.dataset.snapshot_reader import check_payloads, read_snapshot
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from pipeline.stage.config import DatasetShare, StageConfig, load_run

ENCODER = ("weights", "encoder", "layer")
"""Fields of a text family's identity that have to be the same for images and clips."""


@dataclass(frozen=True)
class Source:
    """One dataset, at one snapshot."""

    dataset: Store
    snapshot: Snapshot
    weight: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """All that a stage reads. The first dataset's constants of text families hold for all."""

    sources: list[Source]

    @property
    def families(self) -> dict[str, Family]:
        """Family by name, the same in all datasets where the stage reads it."""
        families: dict[str, Family] = {}
        for source in reversed(self.sources):
            families |= source.snapshot.families
        return families

    @property
    def rows(self) -> dict[str, int]:
        """Bucket -> samples in all datasets together."""
        counted: Counter[str] = Counter()
        # Buckets differ between datasets: one that lacks a bucket adds nothing to it.
        for source in self.sources:
            counted.update(
                {bucket: int(record["rows"]) for bucket, record in source.snapshot.buckets.items()}
            )
        return dict(counted)

    @property
    def caption_kinds(self) -> list[str]:
        """Kinds of captions in any of the datasets."""
        return list(dict.fromkeys(kind for source in self.sources for kind in source.snapshot.caption_kinds))

    @property
    def id(self) -> str:
        """All that decides which samples there are: the snapshot's id; of a mixture, all of them with their
        weights."""
        # The plain id, which positions in checkpoints of runs without a mixture contain.
        if len(self.sources) == 1:
            return self.sources[0].snapshot.id
        return " + ".join(
            f"{source.weight:g} {source.snapshot.dataset}@{source.snapshot.id}" for source in self.sources
        )

    def __str__(self) -> str:
        """In words, with the share of each dataset."""
        total = sum(source.weight for source in self.sources)
        named = [
            (source.weight / total, f"snapshot {source.snapshot.id} of {source.snapshot.dataset}")
            for source in self.sources
        ]
        return named[0][1] if len(named) == 1 else ", ".join(f"{share:.3g} x {name}" for share, name in named)


def shares(stage: StageConfig) -> dict[str, DatasetShare]:
    """Return the datasets of the mixture by name; a stage without a mixture has one.

    Raises:
        UserError: if the stage names no store or dataset.
    """
    data = stage.data
    if not data.datasets and not data.dataset:
        raise UserError(
            "data.dataset is empty: set it in the stage, or give data.dataset=... on the command line"
        )
    # One dataset is a mixture of one, so that callers have a single case.
    datasets = data.datasets or {data.dataset: DatasetShare(snapshot=data.snapshot)}
    datasets = {name: replace(share, store=share.store or data.store) for name, share in datasets.items()}
    if not all(share.store for share in datasets.values()):
        raise UserError(
            "data.store is empty: set it in the stage, or give data.store=... on the command line"
        )
    return datasets


def open_datasets(stage: StageConfig) -> list[Store]:
    """Open the stage's datasets, in order.

    Raises:
        UserError: if the stage names no store or dataset, or a store does not exist.
    """
    return [open_store(share.store).sub(name) for name, share in shares(stage).items()]


def open_corpus(stage: StageConfig) -> Corpus:
    """Read the stage's snapshots, and check them against the stage and against one another.

    Raises:
        UserError: if there is no such store or snapshot, or a family is missing, or was made in another way
        than the stage says or than in another dataset of the mixture.
    """
    sources = []
    for dataset, share in zip(open_datasets(stage), shares(stage).values(), strict=True):
        sources.append(Source(dataset, read_snapshot(dataset, share.snapshot), share.weight))
        check_families(stage, sources[-1].snapshot)

    # One network reads all datasets, with the constants of the first: the others must have been made alike.
    for name in read_families(stage):
        readers = [source for source in sources if name in families_read(stage, source.snapshot.buckets)]

        if not readers:
            kind = "clips" if name in stage.fusion.clip_families else "images"
            raise UserError(
                f"the data has no {kind}, for which the stage names the family `{name}`: leave "
                "out fusion.clip_families, and name what is there as fusion.families"
            )

        first, *others = readers
        for other in others:
            family, same = first.snapshot.families[name], other.snapshot.families[name]
            if (family.hash, _shared_info(family)) != (same.hash, _shared_info(same)):
                raise UserError(
                    f"family `{name}` was made in one way in {first.snapshot.dataset} ({family.hash}) and "
                    "in another in "
                    f"{other.snapshot.dataset} ({same.hash}): encode one of them again like the other, or "
                    "leave it out"
                )

    corpus = Corpus(sources)
    _check_instructions(stage, corpus)
    return corpus


def _check_instructions(stage: StageConfig, corpus: Corpus) -> None:
    """Check that the text families of clips differ from those of images by what is read with a caption.

    Raises:
        UserError: if they have another LLM or layer, which one network cannot read alike.
    """
    if stage.fusion.encode != "families":
        return
    for pair in zip(stage.fusion.families, stage.fusion.families_of(clips=True), strict=True):
        image, clip = (corpus.families[name] for name in pair)

        for key in ENCODER:
            made = [family.identity.get(key) for family in (image, clip)]
            if made[0] != made[1]:
                raise UserError(
                    f"family `{clip.name}` of clips was made with {key}={made[1]}, `{image.name}` of images "
                    f"with {key}={made[0]}: only their instructions may differ"
                )


def _shared_info(family: Family) -> dict[str, object]:
    """Return the fields that readers take from one dataset's record for all datasets."""
    # The rest of `info` may differ from dataset to dataset.
    latents = ("channels", "downsampling", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
    keys = (*latents, "width", "prefix_tokens", "quantisation")
    return {key: family.info[key] for key in keys if key in family.info}


def read_families(stage: StageConfig) -> list[str]:
    """Return the families that the stage reads from the stores: latents, and texts unless it encodes them
    itself."""
    texts = [*stage.fusion.families, *stage.fusion.clip_families]
    return [stage.data.latents, *(dict.fromkeys(texts) if stage.fusion.encode == "families" else [])]


def families_read(stage: StageConfig, buckets: Iterable[str]) -> list[str]:
    """Return those of `read_families` that the stage reads in buckets of images or of clips."""
    texts: list[str] = []
    # A dataset without a row yet counts as one of images.
    for clips in sorted({is_clip(bucket) for bucket in buckets} or {False}):
        texts += stage.fusion.families_of(clips)
    return [name for name in read_families(stage) if name == stage.data.latents or name in texts]


def is_clip(bucket: str) -> bool:
    """True if a bucket has clips, and not images."""
    return Bucket.parse(bucket).frames > 1


def check_files(stage: StageConfig, corpus: Corpus) -> None:
    """Check that the stores have all files that the stage reads; once for a job, since it lists them all.

    Raises:
        StoreError: if one is missing.
    """
    for source in corpus.sources:
        check_payloads(source.dataset, source.snapshot, families_read(stage, source.snapshot.buckets))


def check_families(stage: StageConfig, snapshot: Snapshot) -> None:
    """Check the snapshot's families against the stage.

    Raises:
        UserError: if a family is missing or of the wrong kind, or its identity differs from `fusion.expect`.
    """
    if not stage.fusion.families:
        raise UserError("fusion.families is empty: name at least one text family of the snapshot")
    names_read = families_read(stage, snapshot.buckets)
    for name in names_read:
        # A family of the wrong kind would otherwise fail only in the loader, by its columns.
        kind = "latents" if name == stage.data.latents else "text"
        family = snapshot.families.get(name)
        if family is None or family.kind != kind:
            names = sorted(other.name for other in snapshot.families.values() if other.kind == kind)
            raise UserError(
                f"snapshot {snapshot.id} of {snapshot.dataset} has no {kind} family `{name}`: "
                f"it has {', '.join(names) or 'none'}"
            )

    # A family's name says little about its making: two datasets may use one name for different LLMs.
    for name, fields in stage.fusion.expect.items():
        family = snapshot.families.get(name)
        if name not in {*stage.fusion.families, *stage.fusion.clip_families}:
            raise UserError(
                f"fusion.expect names `{name}`, which is not one of fusion.families: "
                f"{', '.join(stage.fusion.families)}"
            )
        if family is None or name not in names_read:
            continue  # a family of clips, in a dataset of images, or the other way round
        for key, value in fields.items():
            made = family.identity.get(key)
            # As text, because YAML may read `1` or `true` where the identity has a string.
            if str(made) != str(value):
                raise UserError(
                    f"family `{name}` of snapshot {snapshot.id} was made with {key}={made}, the stage "
                    f"expects {value}: "
                    f"encode a new family, or change fusion.expect.{name}.{key}"
                )


def resolve(stage: StageConfig) -> tuple[StageConfig, Corpus]:
    """Return the stage with `latest` replaced by the snapshots' ids, and its datasets, checked against the
    stage.

    Raises:
        UserError: if the stage and its datasets do not fit, as in `open_corpus`.
    """
    corpus = open_corpus(stage)
    # Pinned, so that a restart of the run reads the same data although the dataset has grown.
    ids = [source.snapshot.id for source in corpus.sources]
    mixed = stage.data.datasets
    # `replace` and not assignment: the caller's stage stays as it was written.
    if mixed:
        datasets = {name: replace(mixed[name], snapshot=id) for name, id in zip(mixed, ids, strict=True)}
        return replace(stage, data=replace(stage.data, datasets=datasets)), corpus
    return replace(stage, data=replace(stage.data, snapshot=ids[0])), corpus


def resolve_run(run: Path) -> tuple[StageConfig, Corpus]:
    """`resolve` the stage of a run, whose folder may have been moved since."""
    stage, corpus = resolve(load_run(run))
    stage.runs, stage.name = str(run.absolute().parent), run.absolute().name
    return stage, corpus


def latents_family(stage: StageConfig, corpus: Corpus) -> Family:
    """Return the latents family that the stage trains on."""
    return corpus.families[stage.data.latents]
