"""The noise that latents families of means alone lack, from the counts in the commits of their parts."""

from data_prep.dataset.parts import committed
from data_prep.dataset.schema import MEAN_ALONE
from data_prep.dataset.snapshot_reader import read_families
from data_prep.store.store import Store


def missing_noise(dataset: Store) -> dict[str, float]:
    """Return, for each latents family of means alone, the noise of the posterior that training lacks.

    It is the noise's root mean square as a share of the latents' own std, over all committed parts.
    """
    found = {}
    for name, family in read_families(dataset).items():
        if family.kind != "latents" or family.identity.get("moments") != MEAN_ALONE:
            continue

        square = rows = 0.0
        for commit in committed(dataset, name).values():
            square += commit.rows * float(commit.counts.get("posterior_std", 0.0)) ** 2
            rows += commit.rows

        if rows:
            found[name] = (square / rows) ** 0.5

    return found


def print_missing_noise(dataset: Store, name: str) -> None:
    """Print one line about a family of means alone; nothing about any other."""
    noise = missing_noise(dataset)

    if name in noise:
        print(
            f"latents family {name}: means alone; the posterior's noise, which training lacks, is "
            f"{noise[name]:.2%} of the latents' std"
        )
