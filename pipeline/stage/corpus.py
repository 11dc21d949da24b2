"""The datasets that a stage reads: one, or a mixture of several by weight."""

from collections import Counter
from dataclasses import dataclass, replace

from data_prep.dataset.schema import Family, Snapshot
from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from pipeline.stage.config import DatasetShare, StageConfig


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
        return self.sources[0].snapshot.families

    @property
    def rows(self) -> dict[str, int]:
        """Bucket -> samples in all datasets together."""
        counted: Counter[str] = Counter()
        for source in self.sources:
            counted.update({bucket: int(record["rows"]) for bucket, record in source.snapshot.buckets.items()})
        return dict(counted)

    @property
    def caption_kinds(self) -> list[str]:
        """Kinds of captions in any of the datasets."""
        return list(dict.fromkeys(kind for source in self.sources for kind in source.snapshot.caption_kinds))

    @property
    def id(self) -> str:
        """All that decides which samples there are: the snapshot's id; of a mixture, all of them with their weights."""
        if len(self.sources) == 1:
            return self.sources[0].snapshot.id
        return " + ".join(f"{source.weight:g} {source.snapshot.dataset}@{source.snapshot.id}" for source in self.sources)

    def __str__(self) -> str:
        """In words, with the share of each dataset."""
        total = sum(source.weight for source in self.sources)
        named = [
            (source.weight / total, f"snapshot {source.snapshot.id} of {source.snapshot.dataset}") for source in self.sources
        ]
        return named[0][1] if len(named) == 1 else ", ".join(f"{share:.3g} x {name}" for share, name in named)


def shares(stage: StageConfig) -> dict[str, DatasetShare]:
    """Dataset -> its place in the mixture; a stage without a mixture has one dataset.

    Raises:
        UserError: the stage names no store or dataset.
    """
    data = stage.data
    if not data.datasets and not data.dataset:
        raise UserError("data.dataset is empty: set it in the stage, or give data.dataset=... on the command line")
    found = data.datasets or {data.dataset: DatasetShare(snapshot=data.snapshot)}
    found = {name: replace(share, store=share.store or data.store) for name, share in found.items()}
    if not all(share.store for share in found.values()):
        raise UserError("data.store is empty: set it in the stage, or give data.store=... on the command line")
    return found


def open_datasets(stage: StageConfig) -> list[Store]:
    """The stage's datasets, in order.

    Raises:
        UserError: the stage names no store or dataset, or a store does not exist.
    """
    return [open_store(share.store).sub(name) for name, share in shares(stage).items()]


def open_corpus(stage: StageConfig) -> Corpus:
    """The stage's snapshots, checked against what it names and against one another.

    Raises:
        UserError: no such store or snapshot; a family is missing, or was made in another way than the stage says or than
            in another dataset of the mixture.
    """
    corpus = Corpus(
        [
            Source(dataset, read_snapshot(dataset, share.snapshot), share.weight)
            for dataset, share in zip(open_datasets(stage), shares(stage).values(), strict=True)
        ]
    )
    for source in corpus.sources:
        check_families(stage, source.snapshot)
    first, *others = corpus.sources
    for other in others:
        for name in read_families(stage):
            ours, theirs = first.snapshot.families[name], other.snapshot.families[name]
            if (ours.hash, _fixed(ours)) != (theirs.hash, _fixed(theirs)):
                raise UserError(
                    f"family `{name}` was made in one way in {first.snapshot.dataset} ({ours.hash}) and in another in "
                    f"{other.snapshot.dataset} ({theirs.hash}): encode one of them anew as the other, or leave it out"
                )
    return corpus


def _fixed(family: Family) -> dict[str, object]:
    """What readers take from one dataset's record for all."""
    latents = ("channels", "downsampling", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
    keys = (*latents, "width", "prefix_tokens", "quantisation")
    return {key: family.info[key] for key in keys if key in family.info}


def read_families(stage: StageConfig) -> list[str]:
    """Families of the store that the stage reads: latents, and texts unless they are encoded while training."""
    return [stage.data.latents, *(stage.fusion.families if stage.fusion.encode == "families" else [])]


def check_families(stage: StageConfig, snapshot: Snapshot) -> None:
    """Hold the snapshot's families against what the stage names.

    Raises:
        UserError: a family is missing, of the wrong kind, or its identity differs from `fusion.expect`.
    """
    if not stage.fusion.families:
        raise UserError("fusion.families is empty: name at least one text family of the snapshot")
    for name in read_families(stage):
        kind = "latents" if name == stage.data.latents else "text"
        family = snapshot.families.get(name)
        if family is None or family.kind != kind:
            there = ", ".join(sorted(name for name, other in snapshot.families.items() if other.kind == kind)) or "none"
            raise UserError(f"snapshot {snapshot.id} of {snapshot.dataset} has no {kind} family `{name}`: it has {there}")
    for name, fields in stage.fusion.expect.items():
        family = snapshot.families.get(name)
        if name not in stage.fusion.families or family is None:
            raise UserError(
                f"fusion.expect names `{name}`, which is not one of fusion.families: {', '.join(stage.fusion.families)}"
            )
        for key, value in fields.items():
            made = family.identity.get(key)
            if str(made) != str(value):
                raise UserError(
                    f"family `{name}` of snapshot {snapshot.id} was made with {key}={made}, the stage expects {value}: "
                    f"encode a new family, or change fusion.expect.{name}.{key}"
                )


def resolve(stage: StageConfig) -> tuple[StageConfig, Corpus]:
    """The stage with `latest` replaced by the snapshots' ids, and these snapshots, checked against the stage.

    Raises:
        UserError: no such store or snapshot, a family is missing from it, or was made in another way than the stage says.
    """
    corpus = open_corpus(stage)
    ids = [source.snapshot.id for source in corpus.sources]
    data = replace(
        stage.data,
        snapshot=stage.data.snapshot if stage.data.datasets else ids[0],
        datasets={name: replace(share, snapshot=id) for (name, share), id in zip(stage.data.datasets.items(), ids, strict=False)},
    )
    return replace(stage, data=data), corpus


def latents_family(stage: StageConfig, corpus: Corpus) -> Family:
    """The latents family that the stage trains on."""
    return corpus.families[stage.data.latents]
