"""diffusers' own tests of pipelines and models, run on ours.

The wheel and the source distribution of diffusers come without them, so name a checkout of the installed
version:
`DIFFUSERS_CHECKOUT=../diffusers pytest -m slow tests/pipeline/inference/test_diffusers_mixins.py`.
"""

import importlib
import importlib.util
import os
import sys
import unittest
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import diffusers
import pytest
import torch

from model.condition import Condition
from pipeline import diffusers_pipeline
from pipeline.diffusers_pipeline import LIDiTModel, LIDiTPipeline
from pipeline.export import build_pipeline
from tests.helpers.tiny_sampler import WIDTHS, LetterLLM, make_network, make_stage, sampler_with_families

CHECKOUT = Path(os.environ.get("DIFFUSERS_CHECKOUT", "/nonexistent"))
PACKAGE = "tests_of_diffusers"
"""Their package is called `tests`, as ours is."""

TEXT_STAYS_EXACT = "the text part stays fp32 in every type: a mean in bf16 would shift all states"
NO_IMAGES = "no argument of the call is an image"
NO_PROCESSORS = "attention is torch's own, no processor can be set"
NOT_APPLICABLE = {
    "test_to_dtype": TEXT_STAYS_EXACT,
    "test_torch_dtype_dict": TEXT_STAYS_EXACT,
    "test_pt_np_pil_inputs_equivalent": NO_IMAGES,
    "test_latents_input": NO_IMAGES,
    "test_multi_vae": "their small VAEs have 4 channels, the network reads 16",
    "test_save_load_optional_components": "no part is optional",
    "test_StableDiffusionMixin_component": "the pipeline has no UNet",
    "test_xformers_attention_forwardGenerator_pass": NO_PROCESSORS,
}
"""Tests of the pipeline's mixins that fail by design, or return before they test anything -> the reason."""
NOT_APPLICABLE_MIXINS = {
    "AttentionTesterMixin": NO_PROCESSORS,
    "IPAdapterTesterMixin": NO_PROCESSORS,
    "LoraTesterMixin": "weights are trained whole, and no adapters are read or written",
    "LoraHotSwappingForModelTesterMixin": "as LoraTesterMixin",
    "CacheTesterMixin": "`enable_cache` skips blocks of diffusers' own classes, and changes the numbers",
    "ContextParallelTesterMixin": "one network is sampled on several GPUs by ZeRO-3 (`--zero3`)",
    "SingleFileTesterMixin": "an export is a folder",
    "AttentionBackendTesterMixin": NO_PROCESSORS,
    "ContextParallelAttentionBackendsTesterMixin": NO_PROCESSORS,
    "QuantizationCompileTesterMixin": "as QuantizationTesterMixin",
    "QuantizationTesterMixin": "no layer is one of a quantization package's",
}
"""Mixins of models that are not run -> the reason."""
NO_PICKLES = {"test_disk_offload_without_safetensors": "pickles are never written"}


def load(name):
    """Import a module of diffusers' tests, or skip this file."""
    if importlib.util.find_spec(PACKAGE) is None and PACKAGE not in sys.modules:
        version = (CHECKOUT / "src/diffusers/__init__.py").read_text() if CHECKOUT.is_dir() else ""
        if f'__version__ = "{diffusers.__version__}"' not in version:
            pytest.skip(
                f"DIFFUSERS_CHECKOUT names no checkout of diffusers {diffusers.__version__}, whose packages "
                "come without tests",
                allow_module_level=True,
            )
        folder = CHECKOUT / "tests"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")


for needed in ("parameterized", "requests_mock"):
    pytest.importorskip(needed)
common = load("pipelines.test_pipelines_common")
parameters = load("pipelines.pipeline_params")
models = load("models.testing_utils")
torch_device = load("testing_utils").torch_device

pytestmark = pytest.mark.slow


def without(reasons):
    """Return a class decorator that skips tests, each with its reason."""

    def skip(cls):
        for name, reason in reasons.items():
            assert hasattr(cls, name), f"{name} is no test of diffusers {diffusers.__version__}"
            setattr(cls, name, lambda self, reason=reason: pytest.skip(reason))
        return cls

    return skip


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    # their longest prompt has 900 letters
    llm = lambda family, device: LetterLLM(WIDTHS[family.name], longest=1000)  # noqa: E731
    monkeypatch.setattr(diffusers_pipeline, "load_llm", llm)


@without(NOT_APPLICABLE)
class TestPipeline(common.PipelineLatentTesterMixin, common.PipelineTesterMixin, unittest.TestCase):
    pipeline_class = LIDiTPipeline
    params = parameters.TEXT_TO_IMAGE_PARAMS
    batch_params = parameters.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = frozenset()
    image_latents_params = frozenset()
    test_layerwise_casting = True
    test_group_offloading = True

    def test_encode_prompt_works_in_isolation(self):
        # it looks for the class in diffusers itself
        with patch.object(diffusers.pipelines, "LIDiTPipeline", LIDiTPipeline, create=True):
            super().test_encode_prompt_works_in_isolation()

    def get_dummy_components(self):
        return build_pipeline(sampler_with_families()).components

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a red cat",
            "negative_prompt": "two dogs",
            "generator": torch.Generator("cpu").manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "height": 16,
            "width": 24,
            "output_type": "np",
        }


class ModelConfig(models.BaseModelTesterConfig):
    model_class = LIDiTModel
    main_input_name = "latents"
    output_shape = (16, 4, 6)

    def get_init_dict(self):
        network = make_network(make_stage().fusion)
        return {
            "dit_config": asdict(network.sizes),
            "fusion_config": asdict(network.fusion.config),
            "text_widths": list(WIDTHS.values()),
        }

    def get_dummy_inputs(self):
        rng = torch.Generator().manual_seed(0)
        texts = sampler_with_families().reader.texts(["a red cat", "tea"], torch.float32)
        return {
            "latents": torch.randn(2, *self.output_shape, generator=rng).to(torch_device),
            "condition": Condition(torch.full((2,), 0.5), texts).to(torch_device),
        }


class TestModel(ModelConfig, models.ModelTesterMixin):
    pass


class TestModelTraining(ModelConfig, models.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"LIDiTModel"})


@without(NO_PICKLES)
@pytest.mark.skipif(
    torch_device == "cpu", reason="they offload from an accelerator; test_call.py does it on a CPU"
)
class TestModelOffloading(ModelConfig, models.CPUOffloadTesterMixin, models.GroupOffloadTesterMixin):
    pass


class TestModelLayerwiseCasting(ModelConfig, models.LayerwiseCastingTesterMixin):
    pass


class TestModelCompile(ModelConfig, models.TorchCompileTesterMixin):
    pass


def test_every_mixin_of_models_is_run_or_has_its_reason():
    ours = (TestModel, TestModelTraining, TestModelOffloading, TestModelLayerwiseCasting, TestModelCompile)
    known = {base.__name__ for test in ours for base in test.__mro__} | NOT_APPLICABLE_MIXINS.keys()
    for name in [name for name in models.__all__ if name.endswith("TesterMixin")]:
        # Those of one cache or one quantization package are special cases of a mixin that is named.
        assert known & {base.__name__ for base in getattr(models, name).__mro__}, name
