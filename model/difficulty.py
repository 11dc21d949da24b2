"""The head of difficulty: how large an error each patch's prediction is expected to have."""

from torch import Tensor, nn

from model.layers import ZeroLinear

LOG_VARIANCES = (-30.0, 20.0)
"""Range of the predicted log-variance; beyond it, its exponential would leave the range of fp32 products."""


class DifficultyHead(nn.Module):
    """Log-variance of the error of each patch, from the tokens that the prediction is made of.

    It starts at zero, which is variance 1, so it can be added to a finished network. The value is one per
    patch: the variance that fits best is then the mean squared error of the patch.
    """

    def __init__(self, width: int, detached: bool) -> None:
        """Build the head.

        Args:
            width: of the tokens.
            detached: True = the head's loss trains the head alone, not the layers below it.
        """
        super().__init__()
        self.detached = detached
        self.linear = ZeroLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized tokens [B, N, D] to log-variances [B, N]."""
        return self.linear(x.detach() if self.detached else x).squeeze(-1).clamp(*LOG_VARIANCES)
