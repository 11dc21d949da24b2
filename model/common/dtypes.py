"""Number formats by the names that settings and options give them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
