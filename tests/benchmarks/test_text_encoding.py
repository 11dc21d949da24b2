"""The GPU part of `benchmarks/text_encoding.py` on a small model: the code that a GPU runs, without one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.captions import dense_captions, short_captions
from benchmarks.text_encoding import GOALS, encoding_flops, measure_shape, random_encoder

CPU = torch.device("cpu")


def test_a_model_of_random_weights_is_compared():
    captions = {"short": short_captions(8), "dense": dense_captions(2)}
    rows = list(measure_shape("tiny", CPU, captions, rounds=1))
    assert [list(goals) for _, goals in rows] == [["tiny short"], ["tiny dense"]]
    for (row, goals), kind in zip(rows, captions, strict=True):
        (reached,) = goals.values()
        assert reached.goal == GOALS[kind]
        assert reached.met == (reached.value >= reached.goal)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 13
        assert float(cells[11]) < 0.05  # the same states, up to bf16


def test_counted_work_is_what_is_run():
    encoder, whole = random_encoder("tiny", CPU)
    ids = encoder.tokenize(short_captions(20) + dense_captions(2))
    with FlopCounterMode(display=False) as counter:
        encoder.encode(ids)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
    attention = encoding_flops(encoder, whole, ids) - products
    assert attention > 0
    tokens = sum(map(len, ids))
    longest = len(encoder.prefix_ids) + max(map(len, ids))
    assert attention <= 2 * 4 * 64 * tokens * longest
    assert encoding_flops(encoder, whole, ids[:1]) == pytest.approx(
        encoding_flops(encoder, whole, ids[:1] * 2) / 2
    )
