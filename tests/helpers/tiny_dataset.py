"""A dataset and a stage of minimum size, for tests that run the real programs one after the other."""

from model.encoders.vae import small_vae
from tests.helpers import tiny_llm

DATASET = """
name: set
store: {here}/store
sources: [{source}]
caption_kinds: [{kind}]
buckets: {{resolution: 32, max_aspect: 1.0, step: 16}}
part_rows: 8
image_format: png
workers: 0
latents: [{{name: latents, vae: {here}/vae}}]
text: [{text}]
"""
CAUSAL = 'prefix: "{instruction} ", suffix: "<end>"'
STAGE = """
runs: {here}/runs
samples: 16
global_batch: 8
data: {{store: {here}/store, dataset: set, workers: 0}}
fusion: {{families: [{families}], mode: none, width: 32, heads: 2}}
model: {{depth: 1, width: 32, heads: 2, patch: 1}}
engine: {{reduce_bucket: 100000, prefetch_bucket: 100000, overlap_comm: false}}
sample: {{steps: 2, height: 32, width: 32}}
log: {{tensorboard: false, every_steps: 1}}
"""


def write_dataset(folder, source, kind, families=None):
    """Write `set.yaml` to `folder`: captions of `kind` from `source`, encoded by random LLMs.

    `families` maps names to the builder and the settings of their LLM.
    """
    text = []
    for name, (build, settings) in (families or {"tiny": (tiny_llm.llama, CAUSAL)}).items():
        llm = folder / build.__name__
        if not llm.exists():
            tiny_llm.make(llm, build, tiny_llm.tokenizer("<bos>", "<eos>") if "encoder" in settings else None)
        text.append(f"{{name: {name}, llm: {llm}, dtype: fp32, {settings}}}")
    small_vae().save_pretrained(folder / "vae")
    path = folder / "set.yaml"
    path.write_text(DATASET.format(here=folder, source=source, kind=kind, text=", ".join(text)))
    return path


def write_stage(folder, name, family="tiny", **settings):
    """Write `NAME.yaml` to `folder`, a stage that trains on that dataset."""
    path = folder / f"{name}.yaml"
    more = "".join(f"{key}: {value}\n" for key, value in settings.items())
    path.write_text(STAGE.format(here=folder, families=family) + more)
    return path
