import pytest
import torch
from torch import nn

from model import functional
from model.layers import Conv2d, Linear, ZeroLinear
from tests.helpers.networks import normal

LAYERS = {
    "linear": (Linear, nn.Linear, {"in_features": 8, "out_features": 5}, (3, 4, 8)),
    "zero_linear": (ZeroLinear, nn.Linear, {"in_features": 8, "out_features": 5}, (3, 4, 8)),
    "conv2d": (Conv2d, nn.Conv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (2, 4, 5, 3)),
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_bf16_products_round_once_with_and_without_the_instructions(name, native, monkeypatch):
    monkeypatch.setattr(functional, "CPU_HAS_BF16", native)
    kind, torchs_kind, sizes, shape = LAYERS[name]
    layer, exact = kind(**sizes).bfloat16(), torchs_kind(**sizes).double()
    exact.load_state_dict(layer.state_dict())

    def values(layer, x):
        x.requires_grad_()
        out = layer(x)
        out.backward(normal(*out.shape, seed=1).bfloat16().to(out.dtype))
        return out, x.grad, layer.weight.grad, layer.bias.grad

    x = normal(*shape).bfloat16()
    for value, wanted in zip(values(layer, x), values(exact, x.detach().double()), strict=True):
        assert value.dtype == torch.bfloat16
        # bf16 keeps 8 bits; a sum of terms that cancel is judged by the largest one
        assert (value - wanted).abs().max() <= 2**-7 * wanted.abs().max()


@pytest.mark.parametrize("native", [False, True])
def test_only_bf16_on_a_cpu_without_bf16_is_computed_in_fp32(native, monkeypatch):
    monkeypatch.setattr(functional, "CPU_HAS_BF16", native)
    assert functional.product_dtype(torch.zeros(1)) == torch.float32
    assert functional.product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert functional.product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    expected = torch.bfloat16 if native else torch.float32
    assert functional.product_dtype(torch.zeros(1, dtype=torch.bfloat16)) == expected
