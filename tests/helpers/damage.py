"""Damage of a file, as hypothesis strategies: cuts, flipped bits, foreign bytes, edited fields."""

import copy

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, data):
    """Return other bytes than `data`."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "random", "deep", "double"]))
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:place]
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
    if kind == "deep":
        depth = draw(st.sampled_from([150, 900, 200_000]))
        return b'{"a":' * depth + data + b"}" * draw(st.sampled_from([0, depth]))
    return data * 2 if kind == "double" else draw(st.binary(max_size=50))


def _places(value, path=()):
    """Yield the path of each value inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _places(inner, (*path, name))


@st.composite
def edited(draw, record):
    """Return a JSON object of which one field is removed, added or replaced."""
    record = copy.deepcopy(record)
    *path, name = draw(st.sampled_from(list(_places(record))))
    holder = record
    for step in path:
        holder = holder[step]
    kind = draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "remove":
        del holder[name]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8))] = draw(VALUES)
    else:
        holder[name] = draw(VALUES)
    return record
