"""LI-DiT as a diffusers pipeline: `LIDiTPipeline.from_pretrained(folder)`, with the usual call.

The arithmetic is that of `pipeline.sample`: the same functions read the prompts, follow the scheduler and
decode.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for it in this module
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.encoders.latent_spaces import LatentSpace
from model.encoders.vae import VAE
from model.ragged import Rows
from pipeline.checkpoint.weights import apply_umask
from pipeline.diffusion.solvers import find_objective, scheduler_misfit
from pipeline.inference.call import (
    DenoisingLoop,
    check_embeds,
    check_output_type,
    choose_solver,
    list_prompts,
    make_noise,
    objective_of,
    place_texts,
    plan_steps,
    refuse_attention_kwargs,
    to_output,
    whole_number,
)
from pipeline.inference.encoding import PromptEncoding
from pipeline.inference.parts import CONSTANTS, SharedStates, StrictModel, warn_of_pickle
from pipeline.inference.pipeline_adapters import AdapterLoading
from pipeline.inference.sampler import SamplingParams, decode_each, extra_conditions, sample_latent_shape
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants

FORMAT = 1
"""Format of an exported folder."""
PARTS = {
    "transformer": ["pipeline.diffusers_pipeline", "LIDiTModel"],
    "text": ["pipeline.diffusers_pipeline", "LIDiTText"],
}
"""Parts that an exported folder names besides a scheduler and a VAE; diffusers imports whatever a folder
names."""
CARD = ("README.md", "samples.png")
"""The model card and its image, which are copied from folder to folder."""


class LIDiTModel(LIDiT, StrictModel, ConfigMixin, PeftAdapterMixin):
    """The network as a diffusers model; its weights have the names that they have in training."""

    _supports_gradient_checkpointing = True
    # for `device_map`, which keeps each of them on one device, as it does the blocks
    _no_split_modules = [  # noqa: RUF012 - as diffusers has it
        "PositionBlock",
        "VideoPositionBlock",
        "TextFusion",
        "FinalLayer",
    ]
    # layers whose type the network gives to its inputs, and norms, which have no fp8 kernels
    _skip_layerwise_casting_patterns = (
        "patch_embedding", "projections", "time_embedding", "conditions", "norm", "final",
    )  # fmt: skip

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
        # another package may have registered the block after this module was imported
        block = type(self.blocks[0]).__name__
        self._repeated_blocks, self._no_split_modules = [block], [block, *self._no_split_modules]

    def forward(  # type: ignore[override]
        self, latents: Tensor, condition: Condition, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict as `LIDiT.forward`, and return the prediction as diffusers' models do."""
        sample = super().forward(latents, condition)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @property
    def gradient_checkpointing(self) -> bool:
        """True if every block is computed again in the backward pass: the switch that diffusers sets."""
        return self.checkpoint_every > 0

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpoint_every = int(enabled)

    def recompute(self, block: nn.Module, *inputs: Tensor | Rows | int | None) -> Tensor:
        """Run a block by the function that `enable_gradient_checkpointing` was given."""
        function: Any = self._gradient_checkpointing_func
        return function(block, *inputs)


class LIDiTText(StrictModel, ConfigMixin):
    """The text side before the network: what all captions share, and by which name and revision each LLM is
    found.

    The LLMs are not part of the folder. Each is loaded when the first prompt comes, checked against the
    family's identity (weights, template, layer), and dropped when the pipeline moves to another device.
    """

    @register_to_config
    def __init__(
        self, families: Sequence[Mapping[str, Any]], clip_families: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Make room for the constants.

        Args:
            families: in fusion order: `name`, `identity` and `info` of the family, and `tokens`: how many the
                prefix and the null caption have.
            clip_families: likewise those that read prompts of clips, under the names of `families`; none =
                the same.
        """
        super().__init__()
        self.constants, self.clip_constants = nn.ModuleDict(), nn.ModuleDict()
        for records, constants in ((families, self.constants), (clip_families, self.clip_constants)):
            for family in records:
                tokens, width = family["tokens"], family["info"]["width"]
                constants[family["name"]] = SharedStates(tokens["prefix"], tokens["null"], width)
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
    def from_reader(cls, reader: PromptReader) -> "LIDiTText":
        """Build the part from what reads a run's prompts."""
        readers = {"constants": reader}
        if reader.clips is not None:
            readers["clip_constants"] = reader.clips

        text = cls(*map(_records, readers.values()))
        states: dict[str, Tensor] = {}
        for part, own in readers.items():
            for name, constants in own.constants.items():
                for key, field in CONSTANTS.items():
                    states[f"{part}.{name}.{key}"] = getattr(constants, field)

        text.load_state_dict(states)
        return text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LIDiTText":
        """Move to a device and stay fp32: a std in bf16 would shift every state."""
        # the reader's constants and LLMs are on the old device
        self._reader = None
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    @property
    def reader(self) -> PromptReader:
        """Reads prompts on the device where the constants are when they are read."""
        made = self._made_reader(self.config["families"], self.constants)
        device = _device_of(made.constants)
        if self._reader is None or _device_of(self._reader.constants) != device:
            if records := self.config["clip_families"]:
                made.clips = self._made_reader(records, self.clip_constants)
            self._reader = made
        return self._reader

    def _made_reader(self, records: Sequence[Mapping[str, Any]], states: nn.ModuleDict) -> PromptReader:
        constants, families = {}, {}
        for record in records:
            name, info = record["name"], record["info"]
            tensors = states.get_submodule(name)()
            constants[name] = TextConstants(**tensors, quantization=info["quantisation"], width=info["width"])
            families[name] = Family(name, "text", record["identity"], info)

        device = _device_of(constants)
        return PromptReader(families, constants, lambda family: load_llm(family, device))

    def forward(
        self,
        *batches: Sequence[str],
        dtype: torch.dtype = torch.float32,
        keep_llms: bool = True,
        frames: int = 1,
    ) -> list[list[Text]]:
        """Read batches of prompts as the network does.

        Args:
            batches: an empty prompt is the null caption.
            dtype: of the hidden states.
            keep_llms: False frees each LLM as soon as it has read its prompts.
            frames: of what is generated.

        Returns:
            For each batch one `Text` per LLM.
        """
        reader = self.reader.of(frames)
        # all at once, so that no LLM is loaded twice
        reader.read([prompt for batch in batches for prompt in batch], keep_llms)
        return [reader.texts(batch, dtype) if batch else [] for batch in batches]


def _records(reader: PromptReader) -> list[dict[str, Any]]:
    records = []
    for name, family in reader.families.items():
        constants = reader.constants[name]
        tokens = {"prefix": len(constants.prefix), "null": len(constants.null)}
        records.append({"name": name, "identity": family.identity, "info": family.info, "tokens": tokens})
    return records


def _device_of(constants: Mapping[str, TextConstants]) -> torch.device:
    return next(iter(constants.values())).mean.device


class LIDiTPipeline(PromptEncoding, AdapterLoading, DenoisingLoop, DiffusionPipeline):
    """Text to image with LI-DiT."""

    # the order of use: `enable_model_cpu_offload` moves each part to the GPU when its turn comes
    model_cpu_offload_seq = "text->transformer->vae"
    vae_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    """Classes of diffusers that an exported folder may name as its VAE."""
    num_frames = 1
    """Frames of a call's clips; an image has 1."""
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: LIDiTModel,
        scheduler: Any,
        vae: AutoencoderKL,
        text: LIDiTText,
        height: int = 256,
        width: int = 256,
        steps: int = 30,
        guidance: float = 4.0,
        format: int = FORMAT,
        objective: str = "",
        patch_times: Mapping[str, Any] | None = None,
        solver: str = "",
        adaptive: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            transformer: the network.
            scheduler: of the kind that the network was trained for.
            vae: decodes the latents.
            text: reads the prompts.
            height: default of a call, as the next three.
            width: default.
            steps: default.
            guidance: default.
            format: version of the exported folder.
            objective: what the network was trained to predict; empty = what the scheduler reads.
            patch_times: fields of `PatchTimesConfig` in training; None = one time per sample.
            solver: default of a call.
            adaptive: fields of `AdaptiveConfig`, the settings of `solver`.

        Raises:
            UserError: if no objective has such a scheduler.
        """
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text=text)
        # diffusers' users leave out parts that they do not need, such as all but the text part
        if scheduler is not None:
            objective = objective or find_objective(scheduler)
        # in the pipeline's config, so that an export keeps the sampling settings of its stage
        self.register_to_config(
            height=height, width=width, steps=steps, guidance=guidance, format=format, objective=objective,
            patch_times=dict(patch_times or {}), solver=solver, adaptive=dict(adaptive or {}),
        )  # fmt: skip
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
        others = others or index.get("vae") not in [["diffusers", name] for name in cls.vae_classes]
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

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Make a pipeline of another one's parts, as any diffusers pipeline; the model card comes along."""
        made = super().from_pipe(pipeline, **kwargs)
        made.card = dict(getattr(pipeline, "card", {}))
        return made

    def save_pretrained(
        self, save_directory: Any, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as any diffusers pipeline, but always as safetensors; the model card comes along, the place
        that it was loaded from does not."""
        warn_of_pickle(safe_serialization)
        # diffusers records in every config where it was loaded from, which may be a private path
        for part in (self, *self.components.values()):
            part._internal_dict = FrozenDict(
                {key: value for key, value in part.config.items() if key != "_name_or_path"}
            )
        super().save_pretrained(save_directory, True, *args, **kwargs)
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
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
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
        prompt_embeds: list[Text] | None = None,
        negative_prompt_embeds: list[Text] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        solver: str | None = None,
        user_guidance: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one or several.
            negative_prompt: to steer away from: one for all prompts or one each; None or empty = the null
                caption of training.
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
                new latents, and set the pipeline's `_interrupt` or `_guidance_scale`.
            conditions: values of the network's further conditions by name; None = their defaults.
            prompt_embeds: what `encode_prompt` returns, instead of `prompt`.
            negative_prompt_embeds: what `encode_prompt` returns, instead of `negative_prompt`.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            sigmas: noise level of each step, instead of `num_inference_steps`.
            timesteps: instead of `sigmas`.
            cross_attention_kwargs, attention_kwargs: None, since there are no attention processors.
            solver: `dual_loop` or `look_ahead`, which follow the difficulty of patches at the scheduler's
                times; empty = the scheduler itself; None = the pipeline's default.
            user_guidance: scale of the user of `load_user` by itself; None = that of the text.

        Raises:
            UserError: if an argument is wrong or does not fit another, or the scheduler does not fit the
                network.
        """
        # diffusers' own callbacks say which tensors they read
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        # all that can be wrong is found before the LLMs are loaded, which can take minutes
        check_output_type(output_type)
        self._check_call(names)
        config, device = self.config, self._execution_device
        sides = {"height": height, "width": width}
        size = tuple(whole_number(name, side, config[name]) for name, side in sides.items())
        refuse_attention_kwargs(
            cross_attention_kwargs=cross_attention_kwargs, attention_kwargs=attention_kwargs
        )
        per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        known = check_embeds("prompt_embeds", prompt_embeds)
        images = per_prompt * (len(known[0].mask) if known else len(list_prompts(prompt)))
        vae = self.space
        shape = sample_latent_shape(self.transformer, vae.downsampling, size[0], size[1], self.num_frames)
        noise = make_noise(shape, images, per_prompt, generator, seed, latents)
        plan = plan_steps(self.scheduler, num_inference_steps, config["steps"], sigmas, timesteps, device)
        follower = choose_solver(solver, config, self.scheduler, self.transformer.sizes)
        params = SamplingParams(height=size[0], width=size[1], conditions=conditions or {})
        extra = extra_conditions(self.transformer, params, images, device)

        embeds = self.encode_prompt(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        dtype = self.transformer.dtype
        # placeholders for the times: `Guided` sets that of each step
        times, users = torch.zeros(images, device=device), self.find_users(images, device)
        condition, null_condition = (
            Condition(times, place_texts(texts, per_prompt, device, dtype), extra, users=users)
            for texts in embeds
        )
        guidance = config["guidance"] if guidance_scale is None else guidance_scale
        self.user_guidance = user_guidance
        sampled = self.denoise(
            condition, null_condition, noise.to(device), follower, plan, guidance, callback_on_step_end, names
        )
        finished = sampled
        if output_type != "latent":
            finished = self.finish(decode_each(vae, sampled), output_type)
        # moves the last part off the GPU, if parts are offloaded
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=finished) if return_dict else (finished,)  # type: ignore[arg-type]

    @property
    def space(self) -> LatentSpace:
        """The VAE as a latent space."""
        return VAE(self.vae, "")

    def finish(self, pixels: Tensor, output_type: str) -> Any:
        """Return decoded pixels as an output type other than `latent`."""
        return to_output(pixels, output_type)

    def _check_call(self, names: Sequence[str]) -> None:
        if missing := [name for name in ("transformer", "scheduler", "vae") if getattr(self, name) is None]:
            raise UserError(f"the pipeline has no {missing[0]}: load it with that part")
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs: {min(unknown)!r} is not one of "
                f"{', '.join(self._callback_tensor_inputs)}"
            )
        if misfit := scheduler_misfit(self.scheduler, objective_of(self.config, self.scheduler)):
            raise UserError(
                f"scheduler {type(self.scheduler).__name__}: the network was trained for objective "
                f"{self.config['objective']}: take {misfit}"
            )
