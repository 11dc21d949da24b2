"""The shape of the code base: which sub-package may import which, which package is fenced in where, how long
a file may be."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

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


class Facts(NamedTuple):
    """What the rules ask of a file, so that it is parsed once."""

    imports: list[str]
    """Dotted modules."""
    imports_when_it_runs: list[str]
    """Without those that only the type checker sees."""
    lines: int
    definitions: list[tuple[str, int, int, int]]
    """Name, line, length and its limit of each class and function."""
    dangers: list[str]
    """Swallowed exceptions and unsafe loading, with their lines."""


@cache
def facts(path):
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    blocks = [
        node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    hidden = {id(inner) for block in blocks for inner in ast.walk(block)}
    lengths = [node for node in nodes if type(node) in LIMITS]
    dangers = [f"{name(path)}:{node.lineno} {danger}" for node in nodes for danger in dangers_of(node)]
    return Facts(
        [module for node in nodes for module in imported(path, node)],
        [module for node in nodes if id(node) not in hidden for module in imported(path, node)],
        text.count("\n"),
        [(node.name, node.lineno, node.end_lineno - node.lineno + 1, LIMITS[type(node)]) for node in lengths],
        dangers,
    )


LIMITS = {ast.FunctionDef: 100, ast.AsyncFunctionDef: 100, ast.ClassDef: 300}


def imported(path, node):
    """Dotted modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{path}: relative import"
    modules = [f"{node.module}.{alias.name}" for alias in node.names]
    return [module if is_file(module) else node.module for module in modules]


@cache
def is_file(module):
    return (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def dangers_of(node):
    """Yield what is wrong with an expression or an exception's handler."""
    if isinstance(node, ast.ExceptHandler):
        silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
        broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
        if silent and broad:
            yield "swallows every exception"
    if not isinstance(node, ast.Call):
        return

    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in ("eval", "exec", "pickle.load", "pickle.loads"):
        yield f"calls {called}"
    if options.get("trust_remote_code", "False") != "False":
        yield "trusts remote code"
    if options.get("strict") == "False" and called != "zip":
        yield "loads with strict=False"
    if called == "torch.load" and options.get("weights_only") != "True":
        yield "unpickles"


def name(path):
    return str(path.relative_to(ROOT))


def layer(module):
    """The entry of `LAYERS` that a module belongs to."""
    if module in AT_THE_TOP:
        return AT_THE_TOP[module]
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in LAYERS else parts[0]


def all_imports():
    """Yield each file of the packages with each module that it imports."""
    for path in SOURCES:
        for module in facts(path).imports:
            yield path, module


def test_imports_point_one_way():
    wrong = []
    for path, module in all_imports():
        package = module.split(".")[0]
        ours = layer(name(path)[:-3].replace("/", "."))
        if package in PACKAGES and LAYERS.index(layer(module)) > LAYERS.index(ours):
            wrong.append(f"{name(path)} imports {module}, which is above {ours}")
        if package in ("benchmarks", "tests"):
            wrong.append(f"{name(path)} imports {module}")
    assert not wrong


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


def test_fenced_packages_stay_in_their_files():
    fences = [(path, module, FENCES.get(module.split(".")[0])) for path, module in all_imports()]
    assert not [
        f"{name(path)} imports {module}"
        for path, module, fence in fences
        if fence is not None and not name(path).startswith(fence)
    ]


def test_training_takes_only_the_stores_view_of_the_data():
    assert not [
        f"{name(path)} imports {module}"
        for path, module in all_imports()
        if name(path).startswith("pipeline/")
        and name(path) not in PREPARES_DATA
        and module.startswith("data_prep")
        and layer(module) not in FROM_DATA_PREP
    ]


def test_no_import_cycles():
    ours = {name(path)[:-3].replace("/", "."): set(facts(path).imports_when_it_runs) for path in SOURCES}
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


def test_files_classes_and_functions_are_short():
    long = []
    for path in [*SOURCES, *BENCHMARKS, *TESTS]:
        found = facts(path)
        long += [f"{name(path)} has {found.lines} lines"] if found.lines > 500 else []
        long += [
            f"{name(path)}:{line} {definition} has {lines} lines"
            for definition, line, lines, limit in found.definitions
            if lines > limit
        ]
    assert not long


def test_no_swallowed_exceptions_and_no_unsafe_loading():
    assert not [danger for path in [*SOURCES, *BENCHMARKS] for danger in facts(path).dangers]


def test_a_danger_is_found():
    code = """
try:
    torch.load(path)
except Exception:
    pass
model.load_state_dict(weights, strict=False)
load(name, trust_remote_code=yes)
pickle.loads(text)
torch.load(path, weights_only=True), zip(a, b, strict=False)
"""
    found = [danger for node in ast.walk(ast.parse(code)) for danger in dangers_of(node)]
    assert sorted(found) == sorted(
        [
            "swallows every exception",
            "unpickles",
            "loads with strict=False",
            "trusts remote code",
            "calls pickle.loads",
        ]
    )
