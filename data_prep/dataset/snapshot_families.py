"""Families of a snapshot: which ones it has, and the kinds of captions on which they agree."""

from collections.abc import Sequence

from data_prep.dataset.schema import CAPTIONS, Family, Manifest
from data_prep.dataset.snapshot_reader import read_families, read_family
from data_prep.store.store import Store
from model.common.errors import UserError


def choose_families(dataset: Store, names: Sequence[str] | None) -> dict[str, Family]:
    """Return the families of these names.

    None = all that are registered, but those of captions: they are in the text families that read them.

    Raises:
        UserError: if there is none.
    """
    if names:
        return {name: read_family(dataset, name) for name in names}
    every = read_families(dataset)
    chosen = {name: family for name, family in every.items() if family.kind != CAPTIONS}
    if not chosen:
        raise UserError(f"{dataset.uri}: no families: run `python -m data_prep latents` and `text` first")
    return chosen


def common_caption_kinds(dataset: Store, plan: Manifest, families: dict[str, Family]) -> list[str]:
    """Return the names of the kinds of captions, by their number in all text families.

    Raises:
        UserError: if a number means one kind in one family and another kind in another.
    """
    kinds = plan.caption_kinds
    for family in families.values():
        # Families that read no captions families have the plan's.
        own = family.info.get("caption_kinds", plan.caption_kinds)
        shorter, longer = sorted((kinds, own), key=len)
        if longer[: len(shorter)] != shorter:
            raise UserError(
                f"{dataset.uri}: family `{family.name}` has captions of the kinds {', '.join(own)}, others "
                f"{', '.join(kinds)}: choose families with the same `captions` by --families"
            )
        kinds = longer
    return kinds
