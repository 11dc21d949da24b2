"""The datasets that a stage reads: one, or a mixture of several by weight."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.dataset.schema import Family, Snapshot
from data_prep.dataset.snapshot_reader import check_payloads, read_snapshot
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from pipeline.stage.config import DatasetShare, StageConfig, load_run


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
    first, *others = sources
    for other in others:
        for name in read_families(stage):
            family, same = first.snapshot.families[name], other.snapshot.families[name]
            if (family.hash, _shared_info(family)) != (same.hash, _shared_info(same)):
                raise UserError(
                    f"family `{name}` was made in one way in {first.snapshot.dataset} ({family.hash}) and "
                    "in another in "
                    f"{other.snapshot.dataset} ({same.hash}): encode one of them again like the other, or "
                    "leave it out"
                )
    return Corpus(sources)


def _shared_info(family: Family) -> dict[str, object]:
    """Return the fields that readers take from one dataset's record for all datasets."""
    # The rest of `info` may differ from dataset to dataset.
    latents = ("channels", "downsampling", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
    keys = (*latents, "width", "prefix_tokens", "quantisation")
    return {key: family.info[key] for key in keys if key in family.info}


def read_families(stage: StageConfig) -> list[str]:
    """Return the families that the stage reads from the store: latents, and texts unless it encodes them
    itself."""
    return [stage.data.latents, *(stage.fusion.families if stage.fusion.encode == "families" else [])]


def check_files(stage: StageConfig, corpus: Corpus) -> None:
    """Check that the stores have all files that the stage reads; once for a job, since it lists them all.

    Raises:
        StoreError: if one is missing.
    """
    for source in corpus.sources:
        check_payloads(source.dataset, source.snapshot, read_families(stage))


def check_families(stage: StageConfig, snapshot: Snapshot) -> None:
    """Check the snapshot's families against the stage.

    Raises:
        UserError: if a family is missing or of the wrong kind, or its identity differs from `fusion.expect`.
    """
    if not stage.fusion.families:
        raise UserError("fusion.families is empty: name at least one text family of the snapshot")
    for name in read_families(stage):
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
        if name not in stage.fusion.families or family is None:
            raise UserError(
                f"fusion.expect names `{name}`, which is not one of fusion.families: "
                f"{', '.join(stage.fusion.families)}"
            )
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
