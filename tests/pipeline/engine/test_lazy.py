"""A step of a table: elements without a gradient stay, and the others move as if they were alone."""

import pytest
import torch

from pipeline.engine.lazy import LAZY, hold_absent_rows

SIZE = 37


class Table:
    """A parameter with its optimizer."""

    def __init__(self, values, fused, lazy):
        self.values = torch.nn.Parameter(values.clone())
        group = {"params": [self.values], LAZY: lazy}
        self.optimizer = torch.optim.AdamW([group], lr=0.1, weight_decay=0.0, fused=fused)
        if lazy:
            hold_absent_rows(self.optimizer)

    def step(self, gradient):
        self.values.grad = gradient.clone()
        self.optimizer.step()
        assert torch.equal(self.values.grad, gradient)

    def tensors(self):
        state = self.optimizer.state[self.values]
        return [self.values.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("fused", [True, False])
def test_elements_without_a_gradient_stay_and_the_others_move_as_alone(fused):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SIZE, generator=generator)
    lazy, plain = Table(start, fused, True), Table(start, fused, False)
    for first, last in ((3, 9), (5, 20), (0, 0), (0, SIZE), (30, SIZE)):
        present = torch.zeros(SIZE, dtype=torch.bool)
        present[first:last] = True
        gradient = torch.randn(SIZE, generator=generator) * present
        before = [tensor.clone() for tensor in plain.tensors()] if plain.optimizer.state else None
        plain.step(gradient)
        lazy.step(gradient)
        # What moved without a gradient is put back.
        for tensor, old in zip(plain.tensors(), before or [start, *torch.zeros(2, SIZE)], strict=True):
            tensor[~present] = old[~present]
        for ours, expected in zip(lazy.tensors(), plain.tensors(), strict=True):
            assert ours.shape == (SIZE,)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(ours[~present], expected[~present])


def test_the_tensors_that_others_hold_are_the_same_after_a_step():
    table = Table(torch.randn(SIZE), True, True)
    gradient = torch.randn(SIZE)
    table.step(gradient)
    held = table.values.data, *table.tensors()[1:]
    table.step(gradient)
    now = table.values.data, *table.tensors()[1:]
    assert [tensor.data_ptr() for tensor in held] == [tensor.data_ptr() for tensor in now]
