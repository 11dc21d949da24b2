"""A trained run, ready to draw: the network, the LLMs that read prompts as its families were made, and the VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_prep.schema import Family
from model.dit import LIDiT
from model.errors import UserError
from model.fusion import Text
from model.quantise import quantise
from model.text_encoder import TextEncoder, check_identity, config_from_identity, load_encoder
from model.vae import VAE
from pipeline.assembly import build_network, latents_family, open_dataset, resolve
from pipeline.checkpoint import load_weights
from pipeline.config import StageConfig, load_stage
from pipeline.sampling import draw, make_scheduler, set_steps
from pipeline.texts import PackedText, TextConstants, text_from_states, to_text

STAGE = "stage.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Drawing:
    """How to draw; every field changes the picture."""

    steps: int = 30
    guidance: float = 4.0
    height: int = 256
    width: int = 256
    scheduler: str = ""
    negative: str = ""
    """Prompt to steer away from; empty = the null caption of training."""
    quantised: bool = False
    """Take the LLM's states through the family's quantisation, as training saw them."""


class Sampler:
    """Draws pictures with one network; LLMs and the VAE are loaded when they are first needed."""

    def __init__(
        self,
        stage: StageConfig,
        network: LIDiT,
        families: dict[str, Family],
        constants: dict[str, TextConstants],
        load_vae: Callable[[], VAE],
        load_llm: Callable[[Family], TextEncoder],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.stage = stage
        self.network = network.eval().requires_grad_(False).to(device, dtype)
        self.families = families
        self.constants = constants
        self.device = device
        self.dtype = dtype
        self._load_vae = load_vae
        self._load_llm = load_llm
        self._vae: VAE | None = None
        self._llms: dict[str, TextEncoder] = {}
        self._known: dict[str, dict[str, Tensor]] = {name: {} for name in families}

    @classmethod
    def from_run(cls, run: Path, weights: Literal["ema", "raw"], device: torch.device, dtype: torch.dtype) -> "Sampler":
        """Load the newest checkpoint of a run.

        Raises:
            UserError: no run there, no checkpoint in it, or something that it was made with is gone or has changed.
        """
        if not (run / STAGE).is_file():
            raise UserError(f"{run}: no {STAGE}: name the folder of a run, such as runs/demo")
        stage, snapshot = resolve(load_stage(str(run / STAGE), []))
        network = build_network(stage, snapshot)
        try:
            network.load_state_dict(load_weights(run, ema=0 if weights == "ema" else None))
        except RuntimeError as error:
            raise UserError(f"{run}: its weights are those of another network than its {STAGE} describes: {error}") from error
        latents = latents_family(stage, snapshot)
        families = {name: snapshot.families[name] for name in stage.fusion.families}
        dataset = open_dataset(stage)
        constants = {name: TextConstants.load(dataset, family, device) for name, family in families.items()}
        return cls(
            stage, network, families, constants,
            lambda: _load_vae(stage, latents, device), lambda family: _load_llm(family, device), device, dtype,
        )  # fmt: skip

    @property
    def vae(self) -> VAE:
        """The VAE that made the latents."""
        if self._vae is None:
            self._vae = self._load_vae()
        return self._vae

    def read(self, prompts: Sequence[str], keep_llms: bool = True) -> None:
        """Run each LLM on the prompts that are new to it; `keep_llms=False` frees each one's memory before the next.

        Raises:
            UserError: a prompt is longer than the LLM's families were made for.
        """
        for name, family in self.families.items():
            known = self._known[name]
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip() and prompt not in known]
            if not new:
                continue
            if name not in self._llms:
                self._llms[name] = self._load_llm(family)
            llm = self._llms[name]
            for prompt in new:  # one by one, so that a prompt's states do not depend on the others
                known[prompt] = llm.encode([_tokenise(llm, name, prompt)])[0]
            if not keep_llms:
                del self._llms[name], llm

    def texts(self, prompts: Sequence[str], quantised: bool = False) -> list[Text]:
        """The prompts as the network reads them, one `Text` per LLM; an empty prompt is the null caption."""
        self.read(prompts)
        texts: list[Text] = []
        for name in self.families:
            states = [self._known[name][prompt] if prompt.strip() else None for prompt in prompts]
            make = _quantised_text if quantised else text_from_states
            texts.append(make(states, self.constants[name], self.dtype))
        return texts

    def check(self, drawing: Drawing) -> None:
        """Find what is wrong with the settings before the LLMs are loaded.

        Raises:
            UserError: a size that does not divide, an unknown scheduler, steps out of range.
        """
        self.latent_shape(drawing)
        set_steps(make_scheduler(self.stage.objective, drawing.scheduler), drawing.steps, torch.device("cpu"))

    def latent_shape(self, drawing: Drawing) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture.

        Raises:
            UserError: the size does not divide.
        """
        patch, factor = self.network.config.patch, self.vae.downsampling
        if drawing.height < 1 or drawing.width < 1 or drawing.height % (factor * patch) or drawing.width % (factor * patch):
            raise UserError(f"size {drawing.height}x{drawing.width}: each side has to be a multiple of {factor * patch}")
        return self.network.config.channels, drawing.height // factor, drawing.width // factor

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        drawing: Drawing,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one picture's normalised latents per prompt and seed: fp32 [B, C, h, w]."""
        shape = self.latent_shape(drawing)
        texts = self.texts(prompts, drawing.quantised)
        nulls = self.texts([drawing.negative] * len(prompts), drawing.quantised)
        objective = self.stage.objective
        return draw(
            self.network, objective, texts, nulls, shape, seeds, drawing.steps, drawing.guidance,
            self.device, self.dtype, drawing.scheduler, on_step,
        )  # fmt: skip

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W] in [-1, 1] of latents, decoded one by one: large pictures fit, and none depends on another."""
        return torch.cat([self.vae.decode(latent) for latent in latents.split(1)])


def _tokenise(llm: TextEncoder, name: str, prompt: str) -> list[int]:
    before = llm.truncated
    ids = llm.tokenise([prompt])[0]
    if llm.truncated > before:
        raise UserError(f"prompt {prompt[:40]!r}...: longer than the {llm.config.max_tokens} tokens of {name}: shorten it")
    return ids


def _quantised_text(states: Sequence[Tensor | None], constants: TextConstants, dtype: torch.dtype) -> Text:
    """`text_from_states`, with the states taken through the family's quantisation first."""
    lengths = torch.tensor([0 if each is None else len(each) for each in states], dtype=torch.int32, device=constants.mean.device)
    empty = constants.mean.new_zeros(0, constants.width)
    tokens = torch.cat([empty, *(each.to(empty.device).float() for each in states if each is not None)])
    values, scales, _ = quantise(tokens, constants.quantisation, constants.mean, constants.spread)
    return to_text(PackedText(values, scales, lengths), constants, dtype)


def _load_vae(stage: StageConfig, latents: Family, device: torch.device) -> VAE:
    source = stage.vae or str(latents.info["vae"])
    vae = VAE.load(source, None if stage.vae else latents.info["revision"], device)
    if any(latents.identity.get(key) != value for key, value in vae.identity.items()):
        raise UserError(f"VAE {source} is not the one that wrote the family `{latents.name}`: name that one by vae= in the stage")
    return vae


def _load_llm(family: Family, device: torch.device) -> TextEncoder:
    llm = load_encoder(config_from_identity(family.identity), device)
    check_identity(llm, family.name, family.identity)
    return llm
