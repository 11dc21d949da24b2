"""Check that a run has learned: its loss against an untrained network's, and with shuffled captions.

python -m pipeline.learned runs/demo
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import torch

from model.common.dtypes import DTYPES
from model.common.errors import command
from model.dit import LIDiT
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.data.loader import TrainingData
from pipeline.diffusion.objective import make_objective
from pipeline.engine.network import build_network, network_sizes
from pipeline.reporting.extra import Learned
from pipeline.stage.corpus import resolve_run
from pipeline.training.inputs import NetworkInputs
from pipeline.training.validation import FIXED_TIMESTEPS, losses_at_fixed_timesteps

PAIRS = 256


def measure(run: Path, pairs: int = PAIRS) -> Learned:
    """Measure the loss at eight fixed timesteps on fixed training pairs, in three ways.

    `right`: the averaged weights, each image with its caption; `shuffled`: each image with another one's
    caption; `untrained`: fresh weights. A network that learned nothing has `right` = `untrained`; one that
    ignores its text has `right` = `shuffled`.

    Raises:
        UserError: if the folder is not a run's, or has no good checkpoint.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, corpus = resolve_run(run)
    # a dropped caption would be the null caption in all three measurements
    stage.data.caption_drop = 0.0
    dtype = DTYPES[stage.engine.precision]
    data = TrainingData(stage, corpus, 0, 1, device)
    # the same inputs as in training, so that the losses are comparable with the run's own
    inputs = NetworkInputs(stage, corpus, data.constants, dtype)
    sizes, _ = network_sizes(stage, corpus)
    objective = make_objective(stage.objective, sizes.patch_shape)

    measured = []
    try:
        # whole batches, so there may be a few more pairs than asked for
        for batch, _ in itertools.islice(data.batches(None), math.ceil(pairs / stage.global_batch)):
            moved = batch.to(device)
            # kept and used three times: the differences then come from the network alone
            measured.append((inputs.clean_latents(moved), moved.noise, inputs.condition(moved, moved.u)))
    finally:
        # after an error too, so that the loader's processes do not outlive the measurement
        data.close()

    def losses(network: LIDiT, shuffle_captions: bool) -> list[float]:
        network.to(device, dtype).eval()
        return losses_at_fixed_timesteps(network, measured, objective, dtype, shuffle_captions).tolist()

    # untrained first, since the trained weights then replace those of the same network
    torch.manual_seed(stage.data.seed)
    network = build_network(stage, corpus)
    record: dict[str, Any] = {"untrained": losses(network, False)}
    # the averages are fp32; `losses` rounds them to the run's precision
    network.float().load_state_dict(load_weights(run, "ema"))
    record |= {
        "right": losses(network, False),
        "shuffled": losses(network, True),
        "timesteps": FIXED_TIMESTEPS,
    }
    for way in ("untrained", "right", "shuffled"):
        record[f"{way}_mean"] = sum(record[way]) / len(record[way])
    seen = sum(len(clean) for clean, _, _ in measured)
    record["note"] = (
        f"Averaged weights on {seen} training pairs with fixed noise, mean squared error at 8 fixed "
        "timesteps."
    )
    return cast(Learned, record)


@command
def main() -> None:
    """Entry of `python -m pipeline.learned`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.learned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo")
    print(json.dumps(measure(parser.parse_args().run), indent=2))


if __name__ == "__main__":
    main()
