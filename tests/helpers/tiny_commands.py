"""Programs as from the shell, with a VAE and LLMs that need no files."""

from pipeline import diffusers_pipeline
from pipeline.inference import sampler
from pipeline.text import families as text_families
from tests.helpers.export_and_draw import make_vae
from tests.helpers.tiny_sampler import LetterLLM


def commands(monkeypatch):
    """Return a function that runs a program with its arguments."""
    monkeypatch.setattr(sampler, "load_vae", make_vae)
    for module in (text_families, diffusers_pipeline):
        monkeypatch.setattr(module, "load_llm", lambda family, device: LetterLLM(family.info["width"]))
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)

    def run(program, *arguments):
        monkeypatch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
        program.main()

    return run
