"""Export a run and draw with the export: `python -m tests.helpers.export_and_draw RUN FOLDER`.

It prints the latents of one prompt and the versions of the packages that drew them, as one line of JSON.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from model.encoders.vae import VAE
from pipeline import diffusers_pipeline, export
from pipeline.inference import sampler
from tests.helpers import fake_snapshot
from tests.helpers.tiny_sampler import LetterLLM


def make_vae(*_):
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": fake_snapshot.CHANNELS, "norm_num_groups": 4}
    module = AutoencoderKL(
        down_block_types=down, up_block_types=up, layers_per_block=1, mid_block_add_attention=False, **sizes
    )
    return VAE(module.eval().requires_grad_(False), "")


def main(run, folder):
    with patch.object(sampler, "load_vae", make_vae):
        export.export(Path(run), Path(folder), "ema", "fp32", "5GB")
    with patch.object(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(family.info["width"])):
        pipeline = diffusers_pipeline.LIDiTPipeline.from_pretrained(folder)
        latents = pipeline(["a red cat"], seed=5, num_inference_steps=3, output_type="latent").images
    versions = {name: version(name) for name in ("diffusers", "huggingface_hub", "torch", "transformers")}
    print(json.dumps({"versions": versions, "latents": latents.flatten().tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
