"""Which parameters may be missing from the weights that a stage starts from."""

import pytest

from model.common.errors import UserError
from pipeline.engine.master_weights import check_names

NETWORK = {
    "blocks.0.weight": (4, 4),
    "fusion.refiners.0.weight": (4, 2),
    "fusion.refiners.1.weight": (4, 3),
    "fusion.refiners.1.bias": (4,),
    "fusion.gate.weight": (1,),
    "toy.weight": (2, 2),
    "toy.bias": (2,),
    "position.scale": (4,),
    "position.shift": (4,),
}


def without(*prefixes):
    return {name: shape for name, shape in NETWORK.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("absent", "branches"),
    [
        (["toy."], ["toy"]),
        (["toy."], ["fusion", "toy"]),
        (["toy.", "fusion.refiners.1."], ["fusion", "toy"]),
        (["fusion.gate."], ["fusion"]),
        (["fusion."], ["fusion"]),
        (["position.scale"], ["position.scale"]),
        ([], []),
    ],
    ids=str,
)
def test_whole_branches_below_the_given_modules_may_be_new(absent, branches):
    expected = [name for name in NETWORK if name.startswith(tuple(absent))] if absent else []
    given = without(*absent) if absent else NETWORK
    assert check_names(NETWORK, given, "weights", branches) == expected


@pytest.mark.parametrize(
    ("absent", "branches"),
    [
        ("toy.", ["fusion"]),
        ("toy.", ["to"]),
        ("toy.bias", ["toys"]),
        ("fusion.refiners.1.bias", ["fusion"]),
        ("position.scale", ["position.shift"]),
    ],
)
def test_a_part_of_a_branch_or_another_module_may_not(absent, branches):
    with pytest.raises(UserError, match=f"weights: lacks {absent}"):
        check_names(NETWORK, without(absent), "weights", branches)
