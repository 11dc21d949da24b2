"""Whether a run has learned anything: its loss against an untrained network's, and with shuffled captions.

python -m pipeline.learned runs/demo
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch

from model.common.dtypes import DTYPES
from model.common.errors import command
from model.dit import LIDiT
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.data.loader import TrainingData
from pipeline.engine.network import build_network
from pipeline.stage.config import load_run
from pipeline.stage.corpus import latents_family, resolve
from pipeline.training.inputs import batch_texts, clean_latents
from pipeline.training.validation import FIXED_TIMESTEPS, losses_at_fixed_timesteps

PAIRS = 256


def measure(run: Path, pairs: int = PAIRS) -> dict[str, Any]:
    """Losses at eight fixed timesteps on fixed training pairs, three ways.

    `right`: the averaged weights, each image with its caption; `shuffled`: each image with another one's caption;
    `untrained`: fresh weights. A network that learned nothing has `right` = `untrained`; one that ignores its text has
    `right` = `shuffled`.

    Raises:
        UserError: the folder is not a run's, or holds no good checkpoint.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, corpus = resolve(load_run(run))
    stage.runs, stage.name = str(run.absolute().parent), run.absolute().name  # where it lies now
    stage.data.caption_drop = 0.0
    dtype = DTYPES[stage.engine.precision]
    data = TrainingData(stage, corpus, 0, 1, device)
    latents = latents_family(stage, corpus)
    try:
        held = []
        for batch, _ in itertools.islice(data.batches(None), math.ceil(pairs / stage.global_batch)):
            moved = batch.to(device)
            texts = batch_texts(moved, stage.fusion.families, data.constants, dtype)
            held.append((clean_latents(moved, latents), moved.noise, texts))
    finally:
        data.close()

    def losses(network: LIDiT, shuffle_captions: bool) -> list[float]:
        network.to(device, dtype).eval()
        return losses_at_fixed_timesteps(network, held, stage.objective, dtype, shuffle_captions).tolist()

    torch.manual_seed(stage.data.seed)
    network = build_network(stage, corpus)
    record: dict[str, Any] = {"untrained": losses(network, False)}
    network.float().load_state_dict(load_weights(run, "ema"))
    record |= {"right": losses(network, False), "shuffled": losses(network, True), "timesteps": FIXED_TIMESTEPS}
    for way in ("untrained", "right", "shuffled"):
        record[f"{way}_mean"] = sum(record[way]) / len(record[way])
    seen = sum(len(clean) for clean, _, _ in held)
    record["note"] = f"Averaged weights on {seen} training pairs with fixed noise, mean squared error at 8 fixed timesteps."
    return record


@command
def main() -> None:
    """Entry of `python -m pipeline.learned`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.learned", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo")
    print(json.dumps(measure(parser.parse_args().run), indent=2))


if __name__ == "__main__":
    main()
