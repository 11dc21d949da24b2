"""The partitions of one world size fill those of another, each element once, for any sizes and groups."""

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.layout import Layout, moves

SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=8)


@st.composite
def layouts(draw, shapes):
    """The same parameters in any order and grouping, over any number of ranks."""
    parameters = draw(st.permutations([(f"p{index}", shape) for index, shape in enumerate(shapes)]))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(parameters) - 1)), max_size=2)))
    groups = [list(parameters[a:b]) for a, b in zip([0, *cuts], [*cuts, len(parameters)], strict=True)]
    groups = [group for group in groups if group]
    world = draw(st.integers(1, 9))
    if draw(st.booleans()):
        return Layout(
            world,
            "parameter",
            groups,
            [sum(-(-prod(shape) // world) for _, shape in group) for group in groups],
        )
    align = draw(st.integers(1, 4)) * world
    lengths = [-(-sum(prod(shape) for _, shape in group) // align) * align // world for group in groups]
    return Layout(world, "flat", groups, lengths)


@st.composite
def pairs(draw):
    shapes = draw(SHAPES)
    return draw(layouts(shapes)), draw(layouts(shapes))


def partition(layout):
    """What each rank's flat tensors hold, None = padding."""
    flats = {
        (rank, group): [None] * length
        for rank in range(layout.world)
        for group, length in enumerate(layout.lengths)
    }
    for rank in range(layout.world):
        for extent in layout.extents_of_rank(rank):
            assert extent.rank == rank
            for inside in range(extent.length):
                assert flats[rank, extent.group][extent.offset + inside] is None
                flats[rank, extent.group][extent.offset + inside] = (extent.name, extent.start + inside)
    return flats


@given(SHAPES.flatmap(layouts))
def test_every_element_is_on_one_rank_and_is_found_there(layout):
    flats = partition(layout)
    elements = sorted(element for flat in flats.values() for element in flat if element is not None)
    assert elements == sorted(
        (name, index) for name, shape in layout.shapes.items() for index in range(prod(shape))
    )
    for name, shape in layout.shapes.items():
        position = 0
        for extent in layout.extents(name):
            assert extent.start == position
            position += extent.length
            values = flats[extent.rank, extent.group][extent.offset : extent.offset + extent.length]
            assert values == [(name, extent.start + inside) for inside in range(extent.length)]
        assert position == prod(shape)


@given(pairs())
def test_moves_rebuild_the_partitions_of_any_other_layout(layouts_):
    old, new = layouts_
    source_flats = partition(old)
    rebuilt = {key: [None] * len(flat) for key, flat in partition(new).items()}
    for rank in range(new.world):
        for source, target in moves(old, new, rank):
            assert (source.name, source.start, source.length) == (target.name, target.start, target.length)
            values = source_flats[source.rank, source.group][source.offset : source.offset + source.length]
            into = rebuilt[rank, target.group]
            assert into[target.offset : target.offset + target.length] == [None] * target.length
            into[target.offset : target.offset + target.length] = values
    assert rebuilt == partition(new)


@given(SHAPES.flatmap(layouts))
def test_a_layout_survives_its_manifest(layout):
    assert Layout.from_json(layout.to_json()) == layout
    flats = partition(layout)
    assert sum(len(flat) for flat in flats.values()) == layout.world * sum(layout.lengths)
