"""From a stage to what it is made of: the snapshot that it reads, the families in it, the network that fits them."""

from dataclasses import replace

from data_prep.schema import Family, Snapshot
from data_prep.snapshot_reader import read_snapshot
from data_prep.store import Store, open_store
from model.config import DiTConfig
from model.dit import LIDiT
from model.errors import UserError
from pipeline.config import StageConfig
from pipeline.distributed import Ranks


def open_dataset(stage: StageConfig) -> Store:
    """The stage's dataset in its store.

    Raises:
        UserError: the stage names no store or dataset, or the store does not exist.
    """
    for key in ("store", "dataset"):
        if not getattr(stage.data, key):
            raise UserError(f"data.{key} is empty: set it in the stage, or give data.{key}=... on the command line")
    return open_store(stage.data.store).sub(stage.data.dataset)


def resolve(stage: StageConfig) -> tuple[StageConfig, Snapshot]:
    """The stage with `latest` replaced by the snapshot's id, and that snapshot, checked against the stage.

    Raises:
        UserError: no such store or snapshot, a family is missing from it, or was made in another way than the stage says.
    """
    dataset = open_dataset(stage)
    snapshot = read_snapshot(dataset, stage.data.snapshot)
    check_families(stage, snapshot)
    return replace(stage, data=replace(stage.data, snapshot=snapshot.id)), snapshot


def check_families(stage: StageConfig, snapshot: Snapshot) -> None:
    """Hold the snapshot's families against what the stage names.

    Raises:
        UserError: a family is missing, of the wrong kind, or its identity differs from `fusion.expect`.
    """
    if not stage.fusion.families:
        raise UserError("fusion.families is empty: name at least one text family of the snapshot")
    wanted = [(stage.data.latents, "latents")]
    if stage.fusion.encode == "families":
        wanted += [(name, "text") for name in stage.fusion.families]
    for name, kind in wanted:
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


def latents_family(stage: StageConfig, snapshot: Snapshot) -> Family:
    """The latents family that the stage trains on."""
    return snapshot.families[stage.data.latents]


def text_families(stage: StageConfig, snapshot: Snapshot) -> dict[str, Family]:
    """The text families in fusion order: the snapshot's, or those of the run's own encoders."""
    if stage.fusion.encode == "families":
        return {name: snapshot.families[name] for name in stage.fusion.families}
    from pipeline.online import online_families  # imports transformers, which loader processes do without

    return online_families(stage)


def open_texts(stage: StageConfig) -> Store:
    """Where the constants of the text families lie: in the dataset, or in the run that encodes online.

    Raises:
        UserError: there is no such store.
    """
    return open_dataset(stage) if stage.fusion.encode == "families" else open_store(str(stage.text_folder))


def prepare_texts(stage: StageConfig, ranks: Ranks) -> None:
    """Before a network is built: make what a run that encodes online has in place of families; nothing for the others."""
    if stage.fusion.encode == "online":
        from pipeline.online import register_encoders  # as above

        register_encoders(stage, open_dataset(stage), ranks.device)


def network_sizes(stage: StageConfig, snapshot: Snapshot) -> tuple[DiTConfig, list[int]]:
    """Sizes of the DiT and widths of the text families in fusion order."""
    dit = stage.dit(int(latents_family(stage, snapshot).info["channels"]))
    return dit, [int(family.info["width"]) for family in text_families(stage, snapshot).values()]


def build_network(stage: StageConfig, snapshot: Snapshot) -> LIDiT:
    """The stage's network with fresh weights."""
    dit, widths = network_sizes(stage, snapshot)
    return LIDiT(dit, stage.fusion, widths, checkpoint_every=stage.model.checkpoint_every)
