"""The network under DeepSpeed ZeRO: the only sub-package that imports deepspeed."""

import os

import torch

if not torch.cuda.is_available():  # read when deepspeed is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Importing an optimizer's file registers it.
from pipeline.engine import adamw, muon  # noqa: F401
