"""The cost of a layer by formula: parameters, and multiplications per sample."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCost:
    """A linear layer or convolution with its bias, or the gain of a norm."""

    weights: int
    """Parameters that multiply each row."""
    others: int
    """Parameters that cost next to nothing: biases and gains."""
    rows: float
    """Vectors per sample that go through."""
    products: float = 0.0
    """Multiplications per sample of activations by one another."""


def linear(inputs: int, outputs: int, rows: float) -> LayerCost:
    """Return the cost of a linear layer with bias that `rows` vectors per sample go through."""
    return LayerCost(inputs * outputs, outputs, rows)


def gains(*widths: int) -> LayerCost:
    """Return the cost of norms' gains of these widths."""
    return LayerCost(0, sum(widths), 0)


def level_spread(levels: int, width: int, vectors: int, patches: int) -> LayerCost:
    """Return the cost of giving each patch `vectors` vectors of its level; of one level, none."""
    return LayerCost(0, 0, 0, products=float(levels * width * vectors * patches) if levels > 1 else 0.0)


def feed_forward(width: int, mlp_ratio: float, rows: float) -> list[LayerCost]:
    """Return the costs of the two layers of a feed-forward layer."""
    # Rounded as the blocks round it, so that the counts are exact.
    hidden = int(mlp_ratio * width)
    return [linear(width, hidden, rows), linear(hidden, width, rows)]
