"""A sampler of the real classes with random weights, and an LLM that only counts letters: what tests of
drawing need."""

from dataclasses import replace

import torch

from data_prep.dataset.schema import Family
from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.config import DiTConfig, FusionConfig, TextConfig
from model.dit import LIDiT
from model.elastic.config import ElasticConfig
from model.elastic.network import ElasticLIDiT
from model.encoders.vae import VAE, small_vae
from pipeline.inference.sampler import Sampler
from pipeline.stage.config import ModelConfig, StageConfig
from pipeline.stage.sampling import SamplingConfig
from pipeline.text.prompts import PromptReader
from pipeline.text.texts import TextConstants

CPU = torch.device("cpu")
WIDTHS = {"first": 6, "second": 4}
MAX_TOKENS = 24


class LetterLLM:
    """Stands for an LLM: a token a letter, whose state follows from the letter alone."""

    def __init__(self, width: int, longest: int = MAX_TOKENS) -> None:
        self.config = TextConfig(max_tokens=longest)
        self.width = width
        self.truncated = 0
        self.encoded = 0

    def tokenize(self, captions):
        longest = self.config.max_tokens
        self.truncated += sum(len(caption) > longest for caption in captions)
        return [[ord(letter) for letter in caption[:longest]] for caption in captions]

    def spans(self, caption):
        return [(place, place + 1) for place in range(len(caption))]

    def encode(self, token_ids):
        self.encoded += len(token_ids)
        channels = torch.arange(1, self.width + 1)
        return [torch.sin(torch.tensor(ids).view(-1, 1) * channels.float()) for ids in token_ids]


def make_constants(width: int) -> TextConstants:
    rng = torch.Generator().manual_seed(width)
    prefix, null, mean = (torch.randn(*shape, generator=rng) for shape in ((3, width), (1, width), (width,)))
    return TextConstants(prefix, null, mean, torch.ones(width) * 0.7, "int8", width)


def make_network(fusion: FusionConfig) -> LIDiT:
    torch.manual_seed(0)
    dit = DiTConfig(depth=2, width=32, heads=4, patch=1, channels=16, frequency_width=16)
    network = LIDiT(dit, fusion, [WIDTHS[name] for name in fusion.families])
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():  # gates and outputs that start at zero would hide everything
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return network


def make_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(small_vae().eval().requires_grad_(False), "0" * 64)


def make_stage(objective: str = "flow") -> StageConfig:
    stage = StageConfig(
        name="tiny",
        fusion=FusionConfig(families=list(WIDTHS), refiner_blocks=1, width=16, heads=2),
        model=ModelConfig(preset="tiny", depth=2, width=32, heads=4, patch=1),
        sample=SamplingConfig(steps=3, guidance=3.0, height=16, width=24, seed=5),
    )
    stage.objective.name = objective
    return stage


def make_sampler(
    objective: str = "flow", dtype: torch.dtype = torch.float32, longest: int = MAX_TOKENS
) -> Sampler:
    stage = make_stage(objective)
    families = {name: Family(name, "text", {}, {"width": width}) for name, width in WIDTHS.items()}
    constants = {name: make_constants(width) for name, width in WIDTHS.items()}
    network = make_network(stage.fusion)
    reader = PromptReader(families, constants, lambda family: LetterLLM(WIDTHS[family.name], longest))
    return Sampler(network, reader, make_vae, stage.objective, stage.sample, CPU, dtype)


def sampler_with_users(count: int) -> Sampler:
    """A sampler whose network knows `count` users, with adapters of random weights."""
    sampler = make_sampler()
    torch.manual_seed(3)
    config = UsersConfig(count=count, tokens=2, width=8, heads=2, blocks=1, rank=4)
    attach_adapters(sampler.network, config, LoRAConfig())
    with torch.no_grad():
        for parameter in sampler.network.adapters.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    sampler.network.requires_grad_(False)
    return sampler


def sampler_with_families(objective="flow", dtype=torch.float32):
    sampler = make_sampler(objective, dtype)
    info = {"quantisation": "int8", "prefix_tokens": 3}
    sampler.reader.families = {
        name: Family(name, "text", {"llm": "letters", "layer": "-3"}, {**info, "width": width})
        for name, width in WIDTHS.items()
    }
    return sampler


def with_head(network: LIDiT) -> LIDiT:
    """Return a copy of a network with a difficulty head of random weights."""
    sizes = replace(network.sizes, difficulty="attached")
    made = LIDiT(sizes, network.fusion.config, list(WIDTHS.values()))
    made.load_state_dict(network.state_dict(), strict=False)
    torch.nn.init.normal_(made.final.difficulty.linear.weight)
    return made.eval().requires_grad_(False)


def elastic_sampler(dtype=torch.float32, position="convolution", **settings):
    """A sampler of a network of several depths and sizes of patches, with random weights."""
    sampler = sampler_with_families(dtype=dtype)
    plain = sampler.network
    sizes = replace(plain.sizes, depth=3, position=position)
    elastic = ElasticConfig(**{"depths": [3, 2], "patches": [1, 2], **settings})
    torch.manual_seed(0)
    network = ElasticLIDiT(sizes, plain.fusion.config, list(WIDTHS.values()), elastic)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    sampler.network = network.to(dtype).eval().requires_grad_(False)
    return sampler
