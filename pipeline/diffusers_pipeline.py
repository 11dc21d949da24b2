"""LI-DiT as a diffusers pipeline: `LIDiTPipeline.from_pretrained(folder)`, with the usual call.

The arithmetic is that of `pipeline.sample`: the same functions read the prompts, follow the scheduler and
decode.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.encoders.vae import VAE
from pipeline.checkpoint.weights import apply_umask
from pipeline.diffusion.solvers import denoise, initial_noise
from pipeline.inference.images import to_images
from pipeline.inference.sampler import SamplingParams, decode_each, extra_conditions, latent_shape
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants

FORMAT = 1
"""Format of an exported folder."""
PARTS = {
    "transformer": ["pipeline.diffusers_pipeline", "LIDiTModel"],
    "text": ["pipeline.diffusers_pipeline", "LIDiTText"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""Parts that an exported folder names besides a scheduler; diffusers imports whatever a folder names."""
CARD = ("README.md", "samples.png")
"""The model card and its image, which are copied from folder to folder."""
CONSTANTS = {"prefix": "prefix", "null": "null", "mean": "mean", "spread": "std"}
"""Parameter of an exported text part -> field of `TextConstants`."""


class StrictModel(ModelMixin):
    """A diffusers model that refuses weights which do not fit, where diffusers would warn and make some
    up."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load.

        Raises:
            UserError: if weights are missing, left over or of other shapes.
        """

        # diffusers 0.39 only logs a warning about weights that do not fit; the loading info names them
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
        if wrong:
            raise UserError(
                f"{pretrained_model_name_or_path}: the weights do not fit the config, such as {wrong[0]}: "
                "export again"
            )
        return model


class LIDiTModel(LIDiT, StrictModel, ConfigMixin):
    """The network as a diffusers model; its weights have the names that they have in training."""

    @register_to_config
    def __init__(
        self, dit_config: Mapping[str, Any], fusion_config: Mapping[str, Any], text_widths: Sequence[int]
    ) -> None:
        """Build it.

        Args:
            dit_config: fields of `DiTConfig`. (A key must not be the name of a submodule: diffusers would
                take it for that.)
            fusion_config: fields of `FusionConfig`.
            text_widths: width of each LLM's states.
        """
        # plain mappings, since diffusers writes the arguments of this function to config.json
        super().__init__(DiTConfig(**dit_config), FusionConfig(**fusion_config), text_widths)


class LIDiTText(StrictModel, ConfigMixin):
    """The text side before the network: what all captions share, and by which name and revision each LLM is
    found.

    The LLMs are not part of the folder. Each is loaded when the first prompt comes, checked against the
    family's identity (weights, template, layer), and dropped when the pipeline moves to another device.
    """

    @register_to_config
    def __init__(self, families: Sequence[Mapping[str, Any]]) -> None:
        """Make room for the constants.

        Args:
            families: in fusion order: `name`, `identity` and `info` of the family, and `tokens`: how many the
            prefix and the null caption have.
        """
        super().__init__()
        self.constants = nn.ModuleDict()
        for family in families:
            width = family["info"]["width"]
            shapes = (
                (family["tokens"]["prefix"], width),
                (family["tokens"]["null"], width),
                (width,),
                (width,),
            )
            holder = nn.Module()
            for name, shape in zip(CONSTANTS, shapes, strict=True):
                # Parameters, though nothing trains them: diffusers' offloading asks for a part's first
                # parameter.
                holder.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
            self.constants[family["name"]] = holder
        # made at the first prompt, so that a pipeline can be loaded and saved without any LLM
        self._reader: PromptReader | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load in fp32, whatever the network's type: rounded to bf16, mean and std would shift every
        state."""
        return super().from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "torch_dtype": torch.float32}
        )

    @classmethod
    def from_parts(
        cls, families: Mapping[str, Family], constants: Mapping[str, TextConstants]
    ) -> "LIDiTText":
        """Build the part from families and constants of a run."""
        records = [
            {
                "name": name,
                "identity": family.identity,
                "info": family.info,
                "tokens": {"prefix": len(constants[name].prefix), "null": len(constants[name].null)},
            }
            for name, family in families.items()
        ]
        text = cls(records)
        text.load_state_dict(
            {
                f"constants.{name}.{key}": getattr(constants[name], field)
                for name in families
                for key, field in CONSTANTS.items()
            }
        )
        return text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LIDiTText":
        """Move to a device and stay fp32: a std in bf16 would shift every state."""
        # the reader's constants and LLMs are on the old device
        self._reader = None
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    @property
    def reader(self) -> PromptReader:
        """Reads prompts on the device where the constants are."""
        if self._reader is None:
            families = {}
            for record in self.config["families"]:
                families[record["name"]] = Family(record["name"], "text", record["identity"], record["info"])
            constants = {name: self._constants(name, family) for name, family in families.items()}
            device = next(self.parameters()).device
            self._reader = PromptReader(families, constants, lambda family: load_llm(family, device))
        return self._reader

    def _constants(self, name: str, family: Family) -> TextConstants:
        prefix, null, mean, std = (
            self.constants.get_submodule(name).get_parameter(key).detach() for key in CONSTANTS
        )
        return TextConstants(prefix, null, mean, std, family.info["quantisation"], family.info["width"])

    def forward(self, prompts: Sequence[str], dtype: torch.dtype) -> list[Text]:
        """Return the prompts as the network reads them, one `Text` per LLM; an empty prompt is the null
        caption."""
        return self.reader.texts(prompts, dtype)


class LIDiTPipeline(DiffusionPipeline):
    """Text to image with LI-DiT."""

    # the order of use: `enable_model_cpu_offload` moves each part to the GPU when its turn comes
    model_cpu_offload_seq = "text->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: LIDiTModel,
        scheduler: Any,
        vae: Any,
        text: LIDiTText,
        height: int = 256,
        width: int = 256,
        steps: int = 30,
        guidance: float = 4.0,
        format: int = FORMAT,
    ) -> None:
        """Put the parts together; `height`, `width`, `steps` and `guidance` are defaults of a call."""
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text=text)
        # in the pipeline's config, so that an export keeps the sampling settings of its stage
        self.register_to_config(height=height, width=width, steps=steps, guidance=guidance, format=format)
        self.card: dict[str, bytes] = {}

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read the names of the folder's parts, before any of them is imported or loaded.

        Raises:
            UserError: if the folder is of another model or of another format version.
        """
        config: Any = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        # diffusers returns a tuple if it is also asked for unused arguments
        index = config[0] if isinstance(config, tuple) else config
        folder, kind, version = pretrained_model_name_or_path, index.get("_class_name"), index.get("format")
        package, scheduler = index.get("scheduler") or ("", "")
        # a folder names the classes to import, so another name could run a stranger's code
        others = any(index.get(part) != value for part, value in PARTS.items())
        if others or package != "diffusers" or "Scheduler" not in scheduler:
            raise UserError(
                f"{folder} holds a {kind} of other parts than pipeline.export writes: name another folder"
            )
        if version != FORMAT:
            raise UserError(
                f"{folder}: an export of format {version}, this version reads format {FORMAT}: export the "
                "run again"
            )
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as any diffusers pipeline, from safetensors alone; the model card comes along.

        Raises:
            UserError: if the folder is of another model or format version, or its weights do not fit.
        """
        # safetensors alone: a pickle can run code when it is loaded
        pipeline = super().from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True}
        )
        pipeline.card = {
            file: path.read_bytes()
            for file in CARD
            if (path := Path(pretrained_model_name_or_path, file)).is_file()
        }
        return pipeline

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as any diffusers pipeline; the model card comes along, the place that it was loaded from does
        not."""
        # diffusers records in every config where it was loaded from, which may be a private path
        for part in (self, *self.components.values()):
            part._internal_dict = FrozenDict(
                {key: value for key, value in part.config.items() if key != "_name_or_path"}
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        # safetensors 0.8 makes files that only their owner can read
        apply_umask(Path(save_directory))
        self._write_card(save_directory)

    def _write_card(self, folder: Any) -> None:
        for file, data in self.card.items():
            Path(folder, file).write_bytes(data)

    def _upload_folder(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """The last step of `push_to_hub`, before which diffusers has put a generated card in place of the
        run's own."""
        self._write_card(working_dir)
        return super()._upload_folder(working_dir, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        conditions: Mapping[str, str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one or several.
            negative_prompt: to steer away from; empty = the null caption of training.
            height: in pixels; None = the pipeline's default, as for the next three.
            width: in pixels.
            num_inference_steps: evaluations of the network per image.
            guidance_scale: 1 = no guidance.
            num_images_per_prompt: images of each prompt, one after another.
            generator: of the noise: one for all images or one per image.
            seed: instead of generators: the j-th image of each prompt has seed + j, as in `pipeline.sample`.
            latents: the noise itself, [B, C, h, w].
            output_type: `pil`, `np`, `pt` (in [0, 1]) or `latent` (normalized).
            return_dict: an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as (pipeline, step from 0, timestep, {"latents": ...}); may return
            new latents.
            conditions: values of the network's further conditions by name; None = their defaults.

        Raises:
            UserError: if a size does not divide, a prompt is too long, or the output type or number of
            generators is wrong.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type!r}: take pil, np, pt or latent")
        # not `self.device`, which is the CPU while parts are offloaded
        config, device, dtype = self.config, self._execution_device, self.transformer.dtype
        distinct = [prompt] if isinstance(prompt, str) else prompt
        # the images of a prompt one after another, as in `pipeline.sample`
        prompts = [text for text in distinct for _ in range(num_images_per_prompt)]

        vae = VAE(self.vae, "")
        size: tuple[int, int] = (height or config["height"], width or config["width"])
        shape = latent_shape(self.transformer, vae.downsampling, *size)
        # with `seed`, the noise is made on the CPU in fp32, so that it is the same on any device
        if latents is None:
            latents = _noise(shape, len(prompts), num_images_per_prompt, generator, seed)
        steps = num_inference_steps or config["steps"]
        guidance = config["guidance"] if guidance_scale is None else guidance_scale
        asked = SamplingParams(height=size[0], width=size[1], conditions=conditions or {})
        extra = extra_conditions(self.transformer, asked, len(prompts), device)
        # placeholders: `denoise` sets the time of each step
        timesteps = torch.zeros(len(prompts), device=device)
        condition = Condition(timesteps, self.text(prompts, dtype), extra)
        null_condition = Condition(timesteps, self.text([negative_prompt] * len(prompts), dtype), extra)

        progress: Any = self.progress_bar
        with progress(total=steps) as bar:

            def on_step(number: int, now: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return now
                timestep = self.scheduler.timesteps[number - 1]
                return (callback_on_step_end(self, number - 1, timestep, {"latents": now}) or {}).get(
                    "latents", now
                )

            noise = latents.to(device)
            sampled = denoise(
                self.transformer,
                self.scheduler,
                condition,
                null_condition,
                noise,
                steps,
                guidance,
                dtype,
                on_step,
            )
        images = sampled if output_type == "latent" else _finish(decode_each(vae, sampled), output_type)
        # moves the last part off the GPU, if parts are offloaded
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]


def _noise(shape: tuple[int, ...], images: int, per_prompt: int, generator: Any, seed: int | None) -> Tensor:
    """Return the noise of `seed` or of the generators: fp32 [images, *shape] on the CPU."""
    if generator is None:
        # a random seed, so that two calls without one differ
        first = int(torch.randint(2**31, ())) if seed is None else seed
        return initial_noise(shape, [first + number % per_prompt for number in range(images)])
    generators = generator if isinstance(generator, list) else [generator] * images
    if len(generators) != images:
        raise UserError(f"{len(generators)} generators for {images} images: give one, or one per image")
    # torch samples with a generator only on that generator's own device
    return torch.stack([torch.randn(*shape, generator=own, device=own.device).cpu() for own in generators])


def _finish(pixels: Tensor, output_type: str) -> Any:
    """Return pixels [B, 3, H, W] in [-1, 1] as the output type."""
    if output_type == "pil":
        return to_images(pixels)
    unit = (pixels + 1.0) / 2.0
    return unit if output_type == "pt" else np.asarray(unit.permute(0, 2, 3, 1).cpu())
