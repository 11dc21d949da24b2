"""The pages of the site are true: commands parse, YAML loads, code is ours, messages and numbers exist."""

import ast
import importlib
import re
from dataclasses import fields
from textwrap import dedent

import pytest
import yaml

from data_prep.config import DatasetConfig, load_dataset
from docs import make_messages, make_settings
from model.common.errors import UserError
from model.common.settings import read_settings
from pipeline.operations.planning import Setup, make_plan
from pipeline.stage.config import STAGES, StageConfig, load_stage
from tests.helpers.pages import ROOT, commands, parse, read_blocks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
# Without the names of variables and files that a reader replaces.
PLACEHOLDERS = ("DATASET.yaml", "STAGE", "my_dataset.yaml")


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def files(request, tmp_path):
    """The YAML blocks of the page that have a file's name, as files."""
    written = {}
    for block in read_blocks(request.getfixturevalue("page").read_text()):
        if block.language == "yaml" and block.title:
            written[block.title] = tmp_path / block.title
            written[block.title].write_text(block.text)
    # pages refer to the dataset of another page
    for block in read_blocks((ROOT / "docs" / "own_images.md").read_text()):
        if block.language == "yaml" and block.title and block.title not in written:
            written[block.title] = tmp_path / block.title
            written[block.title].write_text(block.text)
    return written


def check_dataset(given, overrides, files):
    if given not in PLACEHOLDERS:
        load_dataset(files.get(given, ROOT / given), overrides)


def check_stage(given, overrides, files):
    if given not in PLACEHOLDERS:
        load_stage(str(files.get(given, given)), overrides)


def check_script(words, files):
    script = next(word for word in words if word.startswith("cluster/") and word.endswith(".sh"))
    assert (ROOT / script).exists(), script
    rest = [word for word in words[words.index(script) + 1 :] if not word.startswith("-")]
    overrides = [word for word in rest if "=" in word]
    for word in rest:
        if word.endswith(".yaml") and word not in PLACEHOLDERS and "stage" not in word:
            check_dataset(word, [], files)
        elif not re.search(r"[=\[\]]", word):
            check_stage(word, overrides, files)


def check_module(words, files):
    at = words.index("-m")
    parsed = parse(words[at + 1], words[at + 2 :])
    if parsed is None:
        return
    assert not parsed.unknown, f"{words[at + 1]} has no {parsed.unknown}"
    given = vars(parsed.namespace)
    settings = [*(given.get("overrides") or given.get("settings") or []), *parsed.settings]
    if "dataset" in given:
        check_dataset(str(given["dataset"]), settings, files)
    elif "stage" in given and "bench" not in given:
        settings = [word for word in settings if not word.startswith("families.")]
        check_stage(given["stage"], settings, files)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses_and_its_settings_exist(page, files):
    for words in commands(page.read_text()):
        if "make" in words:
            target = words[words.index("make") + 1]
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        elif "-m" in words:
            check_module(words, files)
        else:
            check_script(words, files)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_yaml_is_a_dataset_or_a_stage(page, tmp_path):
    for block in read_blocks(page.read_text()):
        if block.language != "yaml" or "apiVersion" in block.text:
            continue
        path = tmp_path / "block.yaml"
        path.write_text(block.text)
        keys = set(yaml.safe_load(block.text))
        schemas = [
            each for each in (DatasetConfig, StageConfig) if keys <= {field.name for field in fields(each)}
        ]
        assert schemas, f"neither a dataset nor a stage has all of {keys}"
        for schema in schemas:
            if block.title and "sources" not in keys:
                load_stage(str(path))
            else:
                read_settings(schema, path, [])


def test_a_manifest_of_kubernetes_runs_a_command_of_ours():
    blocks = read_blocks((ROOT / "docs" / "beyond_slurm.md").read_text())
    (manifest,) = (yaml.safe_load(block.text) for block in blocks if "apiVersion" in block.text)
    spec = manifest["spec"]
    words = spec["entrypoint"].split()
    parsed = parse(words[2], words[3:])
    assert (parsed.unknown, parsed.namespace.engine) == ([], "ray")
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}" in pins
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    images = {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert len(images) == 1, "driver and workers have the same code"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_is_ours(page):
    for block in read_blocks(page.read_text()):
        if block.language == "python" and block.title:
            assert block.text in (ROOT / block.title).read_text(), f"not in {block.title}:\n{block.text}"
        elif block.language == "python":
            for node in ast.walk(ast.parse(dedent(block.text))):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize(
    ("loads", "html"),
    [
        (True, '<script src="https://example.com/a.js"></script>'),
        (True, '<img alt="x" src="//example.com/x.png">'),
        (True, '<link rel="stylesheet" href="https://example.com/a.css">'),
        (False, '<script src="assets/a.js"></script><a href="https://example.com">a link</a>'),
        (False, '<link rel="stylesheet" href="../assets/a.css"><link rel="canonical" href="https://a.b">'),
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(loads, html):
    hooks = pytest.importorskip("docs.hooks")  # needs the extra docs
    assert bool(hooks.LOADS.search(html)) == loads


# -- settings ------------------------------------------------------------------------------------------------


def test_the_reference_of_settings_is_current():
    for file, text in make_settings.pages().items():
        found = (ROOT / "docs" / "settings" / file).read_text()
        assert found == text, f"docs/settings/{file} is out of date: run `python -m docs.make_settings`"


@pytest.mark.parametrize("schema", [DatasetConfig, StageConfig])
def test_every_setting_is_there_with_its_meaning(schema, tmp_path):
    listed, bare = set(), []
    for section in make_settings.sections(schema):
        assert section.meaning, f"{section.path}: no text"
        for row in section.settings:
            listed.add(f"{section.path}.{row.key}".strip("."))
            bare += [f"{section.path}.{row.key}"] if not row.meaning else []
    assert not bare, f"write a docstring below {bare}"

    # whatever the shipped files set is listed: the two are found in different ways
    shipped = (
        STAGES.glob("*.yaml") if schema is StageConfig else (ROOT / "data_prep" / "datasets").glob("*.yaml")
    )
    for path in shipped:
        assert set(leaves(yaml.safe_load(path.read_text()))) <= listed, path


def leaves(node, path=""):
    """Yield the keys of values as the reference writes them; a free mapping is one key."""
    for key, value in node.items():
        inner = f"{path}.{key}".strip(".")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                yield from leaves(entry, f"{inner}[]")
        elif inner == "data.datasets":
            # the names of datasets are free
            for entry in value.values():
                yield from leaves(entry, f"{inner}.NAME")
        elif isinstance(value, dict) and key not in ("captions", "caption_weights", "settings", "expect"):
            yield from leaves(value, inner)
        else:
            yield inner


def test_an_undocumented_setting_is_found():
    assert make_settings.field_docstrings(StageConfig)["samples"] == "Length of the stage."
    assert "depth" in make_settings.field_docstrings(type(load_stage("demo").model))
    texts = {row.key: row for section in make_settings.sections(StageConfig) for row in section.settings}
    assert texts["precision"].kind == "`bf16` or `fp32`"
    assert texts["micro_batch"].default == "`null`"
    assert texts["caption_drop"].allowed == "0 to 1"


# -- messages ------------------------------------------------------------------------------------------------


def code_texts():
    """Return the texts of the code, with … in place of values, and the scripts."""
    texts = []
    for folder in ("model", "data_prep", "pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                    )
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    texts += [path.read_text() for path in (ROOT / "cluster").glob("*.sh")]
    return "\n".join(texts).replace("`", "")


def test_every_quoted_message_is_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 40
    texts = code_texts()
    for message in messages:
        pattern = "[^\n]*?".join(map(re.escape, message.strip("…").split("…")))
        assert re.search(pattern, texts), f"no such message: {message}"


def test_the_page_of_all_messages_has_every_one():
    page = make_messages.page()
    lines = set(page.splitlines())
    for room in ("model", "data_prep", "pipeline"):
        for path in (ROOT / room).rglob("*.py"):
            calls = len(re.findall(r"(?<![\w`.])UserError\(", path.read_text()))
            if calls == 0:
                continue
            found = list(make_messages.messages(path))
            assert {make_messages.row(*message) for message in found} <= lines
            assert len(found) + len(list(unworded(path))) == calls, path
    assert all(f"`{text.replace('`', '')}`" in page for text in make_messages.script_messages())
    assert len(make_messages.script_messages()) >= 10


def unworded(path):
    """Yield what a file passes to `UserError` in place of a text of its own, and its class statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            if not re.search(r"\w", make_messages.literal(node.args[0])):
                yield node
        elif isinstance(node, ast.ClassDef) and node.name == "UserError":
            yield node


def test_a_message_comes_with_what_the_code_says_about_it(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SAMPLE)
    assert list(make_messages.messages(path)) == [
        ("…: no such `file`: check …", "if it does not exist."),
        ("two parts", "A class."),
    ]


SAMPLE = '''"""A module."""
def read(path, name):
    """Read.

    Raises:
        UserError: if it does
            not exist.
        ValueError: never.
    """
    raise UserError(f"{path}: no such `file`: check {name!r}")
class One:
    """A class.

    More.
    """
    def two(self, text):
        raise UserError(text) from UserError("two " + "parts")
'''


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "gpus", "overrides"),
    [
        ("li_dit_1b_256", 8, []),
        ("li_dit_1b_256", 64, []),
        ("li_dit_10b_512", 8, []),
        ("li_dit_10b_512", 64, []),
        ("li_dit_10b_1024", 64, []),
    ],
)
def test_sizes_of_the_cluster_page_are_the_estimate(stage, gpus, overrides):
    settings = load_stage(stage, overrides)
    plan = make_plan(settings, Setup(gpus, height=settings.sample.height, width=settings.sample.width))
    row = (
        f"| `{stage}` | {gpus} | {plan.local_batch} | {plan.micro_batch} | {plan.total_memory / 1e9:.1f} | "
        f"{plan.samples_per_second:,.0f} | {plan.days:.1f} | {plan.store_bytes / 1e12:.1f} |"
    )
    assert row in (ROOT / "docs" / "cluster.md").read_text()


def test_rates_of_the_tour_are_the_estimate(tmp_path):
    page = (ROOT / "docs" / "own_images.md").read_text()
    (block,) = (block for block in read_blocks(page) if block.title == "flowers_stage.yaml")
    path = tmp_path / block.title
    path.write_text(block.text)
    sizes = {"llm_widths": (576, 640), "captions": 1, "caption_tokens": 20, "pairs": 2000}
    for side, unit in ((128, "samples/s: half of"), (256, "samples/s and")):
        setup = Setup(1, mfu=0.5, peak_tflops=0.22, height=side, width=side, **sizes)
        plan = make_plan(load_stage(str(path)), setup)
        assert f"{plan.samples_per_second:.0f} {unit}" in page
        assert f"{plan.bytes_per_pair / 1e3:.0f} kB per pair" in page


def test_the_parser_check_refuses_what_a_command_does_not_know():
    with pytest.raises(AssertionError, match="refuses"):
        parse("pipeline.estimate", ["demo", "--gpu", "x"])
    assert parse("data_prep", ["plan", "a.yaml", "--nonsense"]).unknown == ["--nonsense"]
    with pytest.raises(UserError, match=r"optim\.lrr"):
        check_stage("demo", ["optim.lrr=1"], {})
