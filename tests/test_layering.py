"""The shape of the code base, held: one direction of imports, fenced packages, bounded files and functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "data_prep", "pipeline", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "model": {"model"},
    "data_prep": {"model", "data_prep"},
    "pipeline": {"model", "data_prep", "pipeline"},
    "benchmarks": {"model", "data_prep", "pipeline", "benchmarks"},
}
FENCES = {
    "deepspeed": {"pipeline/engine.py"},
    "boto3": {"data_prep/store_s3.py"},
    "botocore": {"data_prep/store_s3.py"},
    "streaming": {"pipeline/streaming_snapshot.py", "pipeline/joined_reader.py"},
}
"""Outside `benchmarks`, a third-party package is imported only in these files."""
FROM_DATA_PREP = {"schema", "store", "snapshot_reader", "buckets", "scenes", "scene_drawing", "scene_captions", "parts"}
"""What the training code may take from data preparation; the scenes' grammar, because the scorer reads with what draws."""


def imports(path):
    """(top package, dotted module) of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0], node.module


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path):
    ours = path.relative_to(ROOT).parts[0]
    for top, module in imports(path):
        assert top not in PACKAGES or top in MAY_IMPORT[ours], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path).split("/")[0] != "benchmarks"], ids=name)
def test_fenced_packages_stay_in_their_files(path):
    for top, module in imports(path):
        assert name(path) in FENCES.get(top, {name(path)}), f"{name(path)} imports {module}"
        if top == "transformers":
            assert name(path).startswith("model/") or name(path) == "pipeline/export.py", f"{name(path)} imports {module}"


TRAINING_CODE_THAT_PREPARES_DATA = {"pipeline/train_vae.py", "pipeline/demo.py", "pipeline/online.py"}


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path).startswith("pipeline/")], ids=name)
def test_training_takes_only_the_stores_view_of_the_data(path):
    if name(path) in TRAINING_CODE_THAT_PREPARES_DATA:
        return
    for top, module in imports(path):
        assert top != "data_prep" or module.split(".")[1] in FROM_DATA_PREP, f"{name(path)} imports {module}"


def test_no_import_cycles():
    ours = {name(path)[:-3].replace("/", "."): {module for _, module in imports(path)} for path in SOURCES}
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


@pytest.mark.parametrize("path", SOURCES + sorted((ROOT / "tests").rglob("*.py")), ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{name(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 100, f"{name(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_swallowed_exceptions_and_no_unsafe_loading(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            assert not (silent and broad), f"{name(path)}:{node.lineno} swallows every exception"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{name(path)}:{node.lineno} calls {called}"
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("trust_remote_code", "False") == "False", f"{name(path)}:{node.lineno} trusts remote code"
            lenient = options.get("strict") == "False" and called != "zip"
            assert not lenient, f"{name(path)}:{node.lineno} loads with strict=False"
            if called == "torch.load":
                assert options.get("weights_only") == "True", f"{name(path)}:{node.lineno} unpickles"
