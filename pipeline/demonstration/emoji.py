"""The end of the demo on emoji: images of training captions are compared with all training images."""

import io
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import open_store
from model.encoders.latent_spaces import load_latent_space
from pipeline.demonstration.ending import Ending, to_tensor
from pipeline.evaluation.recognition import Recognition, recognition
from pipeline.reporting.extra import Tile
from pipeline.stage.config import StageConfig

ENCODED_AT_ONCE = 64


class EmojiEnding(Ending):
    """Generates images of training captions, and counts those that are nearest to their own."""

    note: ClassVar[str] = "Right: the training image of that caption."

    def __init__(self, stage: StageConfig, dataset: DatasetConfig, images: int) -> None:
        """Choose the captions, evenly over the dataset, since neighboring rows are similar."""
        super().__init__(stage)
        # the stored pairs and not the latents, so that the report has the original images
        self.vae, self.pairs = dataset.latents[0].vae, read_all_pairs(stage)
        self.captions = [pair.captions[0][1] for pair in self.pairs]
        count = min(images, len(self.pairs))
        self.chosen = [index * len(self.pairs) // count for index in range(count)]
        self.drawn = stage.run / "samples"

    def sample_images(self) -> None:
        """Generate an image of each chosen caption."""
        prompts = self.stage.run / "prompts.txt"
        prompts.write_text("".join(self.captions[index] + "\n" for index in self.chosen))
        self.sample(prompts)

    def measure(self) -> dict[str, Any]:
        """Return the recognition in pixels and in the VAE's latents."""
        references = to_tensor([Image.open(io.BytesIO(pair.image)) for pair in self.pairs])
        images = to_tensor([Image.open(self.drawn / record["file"]) for record in self.records()])
        chosen = [self.captions[index] for index in self.chosen]
        own = torch.zeros(len(chosen), len(self.captions), dtype=torch.bool)
        for row, caption in zip(own, chosen, strict=True):
            row[:] = torch.tensor([caption == other for other in self.captions])

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        space = load_latent_space(self.vae, None, device)

        def encode(pixels: Tensor) -> Tensor:
            parts = (pixels / 127.5 - 1.0).split(ENCODED_AT_ONCE)
            return torch.cat([space.encode(part)[0].cpu() for part in parts])

        return {
            "pixels": asdict(recognition(images, references, own)),
            "latents": asdict(recognition(encode(images), encode(references), own)),
        }

    def tiles(self, measured: dict[str, Any]) -> list[Tile]:
        """Return both recognitions, with interval and chance."""
        tiles: list[Tile] = []
        for features, values in measured.items():
            result = Recognition(**values)
            label = (
                f"recognized by {features} among {result.references:,} training images "
                f"(95 %: {result.low:.1%} to {result.high:.1%} of {result.images}, "
                f"chance {result.chance:.2%})"
            )
            tiles.append({"label": label, "value": f"{result.share:.1%}"})

        return tiles

    def details(self, number: int, image: Path) -> dict[str, Any]:
        """Write the training image next to the prompts, and return its path."""
        real = self.stage.run / "pairs" / f"{number:03d}.png"
        real.parent.mkdir(exist_ok=True)
        real.write_bytes(self.pairs[self.chosen[number]].image)
        return {"real": self.relative(real)}


def read_all_pairs(stage: StageConfig) -> list[Pair]:
    """Return all pairs of a stage's dataset, in order."""
    dataset = open_store(stage.data.store).sub(stage.data.dataset)
    kinds = read_plan(dataset).caption_kinds
    commits = [commit for _, commit in sorted(committed(dataset, PAIRS).items())]
    return list(itertools.chain.from_iterable(read_pairs(dataset, commit, kinds) for commit in commits))
