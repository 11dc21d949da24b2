"""The shape of the code base: which sub-package may import which, which package is fenced in where, how long
a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "data_prep", "pipeline")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LAYERS = (
    "model.common",
    "model",
    "model.elastic",
    "model.adapters",
    "model.encoders",
    "model.scorers",
    "model.captioners",
    "data_prep.engines",
    "data_prep.store",
    "data_prep.dataset",
    "data_prep.scenes",
    "data_prep.images",
    "data_prep.clips",
    "data_prep.model_settings",
    "data_prep.config",
    "data_prep.workers",
    "data_prep.sources",
    "data_prep.plan",
    "data_prep.annotators",
    "data_prep.pairs",
    "data_prep.captioners",
    "data_prep.families",
    "data_prep",
    "pipeline.runtime",
    "pipeline.stage",
    "pipeline.text",
    "pipeline.data",
    "pipeline.diffusion",
    "pipeline.engine",
    "pipeline.checkpoint",
    "pipeline.vae",
    "pipeline.inference",
    "pipeline.following",
    "pipeline.evaluation",
    "pipeline.training",
    "pipeline.operations",
    "pipeline.reporting",
    "pipeline.ablation",
    "pipeline.speedruns",
    "pipeline.demonstration",
    "pipeline",
)
"""Sub-packages, lowest first: each imports only from those before it. `model`, `data_prep` and `pipeline` are
the files at the top of a package: the network, the preparation's command line, and the commands."""

AT_THE_TOP = {
    "pipeline.diffusers_pipeline": "pipeline.inference",
    "pipeline.diffusers_video_pipeline": "pipeline.inference",
}
"""Modules at the top that belong to a sub-package: their path is written in every export's
model_index.json."""

FROM_DATA_PREP = {
    "data_prep.dataset",
    "data_prep.store",
    "data_prep.images",
    "data_prep.clips",
    "data_prep.scenes",
}
"""The only sub-packages of data preparation that `pipeline` imports: what is stored, and the scenes that its
scorer reads."""
PREPARES_DATA = {
    "pipeline/demo.py",
    "pipeline/demonstration/emoji.py",
    "pipeline/demonstration/moving.py",
    "pipeline/demonstration/scenes.py",
    "pipeline/init.py",
    "pipeline/train_vae.py",
    "pipeline/text/online.py",
    "pipeline/vae/clips.py",
}
"""Files of `pipeline` that prepare data or read a dataset's YAML themselves, so they may import all of
`data_prep`."""

FENCES = {
    "deepspeed": ("pipeline/engine/",),
    "av": ("data_prep/clips/video.py",),
    "boto3": ("data_prep/store/s3.py",),
    "botocore": ("data_prep/store/s3.py",),
    "obstore": ("data_prep/store/fast_reads.py",),
    "streaming": ("pipeline/data/streaming.py",),
    "transformers": ("model/encoders/", "model/scorers/", "model/captioners/"),
    "httpx": ("data_prep/captioners/endpoint.py",),
    "diffusers": (
        "model/encoders/vae.py",
        "model/encoders/video_vae.py",
        "pipeline/diffusion/",
        "pipeline/inference/parts.py",
        "pipeline/inference/source.py",
        "pipeline/diffusers_pipeline.py",
        "pipeline/diffusers_video_pipeline.py",
    ),
    "gradio": ("pipeline/web.py",),
    "spacy": ("model/scorers/noun_phrases.py",),
    "torch_fidelity": ("model/scorers/inception.py",),
    "ray": ("data_prep/engines.py",),
    "faiss": ("data_prep/plan/semantic.py",),
}
"""Third-party package -> the only files or folders that import it."""


def imports(path, types=True):
    """Dotted modules that a file imports, with or without those that only the type checker sees."""
    tree = ast.parse(path.read_text())
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    hidden = [] if types else [inner for block in blocks for inner in ast.walk(block)]
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                module if (ROOT / module.replace(".", "/")).with_suffix(".py").exists() else node.module
                for module in modules
            )


def name(path):
    return str(path.relative_to(ROOT))


def layer(module):
    """The entry of `LAYERS` that a module belongs to."""
    if module in AT_THE_TOP:
        return AT_THE_TOP[module]
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in LAYERS else parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path):
    ours = layer(name(path)[:-3].replace("/", "."))
    for module in imports(path):
        if module.split(".")[0] in PACKAGES:
            theirs = layer(module)
            assert LAYERS.index(theirs) <= LAYERS.index(ours), (
                f"{name(path)} imports {module}, which is above {ours}"
            )
        assert module.split(".")[0] not in ("benchmarks", "tests"), f"{name(path)} imports {module}"


def test_every_folder_is_a_layer():
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts[:-1]
        assert ".".join(parts) in LAYERS, f"{name(path)} is in a sub-package that LAYERS does not name"


def test_tests_have_the_same_tree():
    """Each sub-package has a folder of tests; whole commands are tested at the top of their package's."""
    packages = [
        file.parent
        for package in ("model", "data_prep", "pipeline")
        for file in (ROOT / package).rglob("__init__.py")
    ]
    for folder in packages:
        assert (ROOT / "tests" / folder.relative_to(ROOT)).is_dir(), folder


def test_commands_only_at_the_top_of_pipeline():
    for path in (ROOT / "pipeline").glob("*.py"):
        if path.name == "__init__.py" or f"pipeline.{path.stem}" in AT_THE_TOP:
            continue
        assert '__name__ == "__main__"' in path.read_text(), (
            f"{name(path)} is no command: move it into a sub-package"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_fenced_packages_stay_in_their_files(path):
    for module in imports(path):
        fence = FENCES.get(module.split(".")[0])
        assert fence is None or name(path).startswith(fence), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path).startswith("pipeline/")], ids=name)
def test_training_takes_only_the_stores_view_of_the_data(path):
    for module in imports(path):
        allowed = (
            not module.startswith("data_prep")
            or layer(module) in FROM_DATA_PREP
            or name(path) in PREPARES_DATA
        )
        assert allowed, f"{name(path)} imports {module}"


def test_no_import_cycles():
    ours = {name(path)[:-3].replace("/", "."): set(imports(path, types=False)) for path in SOURCES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, "import cycle: " + " -> ".join([*open_, module])
        if module in done or module not in ours:
            return
        open_.append(module)
        for target in ours[module]:
            visit(target)
        open_.pop()
        done.add(module)

    for module in ours:
        visit(module)


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS, *TESTS], ids=name)
def test_files_classes_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500, f"{name(path)} has {text.count(chr(10))} lines"
    limits = {ast.FunctionDef: 100, ast.AsyncFunctionDef: 100, ast.ClassDef: 300}
    for node in ast.walk(ast.parse(text)):
        if type(node) in limits:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limits[type(node)], f"{name(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS], ids=name)
def test_no_swallowed_exceptions_and_no_unsafe_loading(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            assert not (silent and broad), f"{name(path)}:{node.lineno} swallows every exception"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), (
                f"{name(path)}:{node.lineno} calls {called}"
            )
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("trust_remote_code", "False") == "False", (
                f"{name(path)}:{node.lineno} trusts remote code"
            )
            lenient = options.get("strict") == "False" and called != "zip"
            assert not lenient, f"{name(path)}:{node.lineno} loads with strict=False"
            if called == "torch.load":
                assert options.get("weights_only") == "True", f"{name(path)}:{node.lineno} unpickles"
