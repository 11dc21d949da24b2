"""Settings from strangers: absurd numbers, secrets, names that are paths, YAML made to crash its parser."""

import math
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import DatasetConfig, load_dataset
from model.common import settings as reader
from model.common.errors import UserError
from pipeline.stage.config import StageConfig, dump_stage, load_stage

DATASET = "name: ds\nstore: /nowhere\nsources: [{kind: openmoji}]\nlatents: [{name: a}]\ntext: [{name: b}]\n"
SECRET = "hunter2-hunter2"
DEEP = 100_000


def types(hint):
    """All classes that a type hint names."""
    inner = [each for argument in get_args(hint) for each in types(argument)]
    return inner if get_origin(hint) else [hint, *inner]


def numbers(schema, path=""):
    """Yield the key, the range, and the way to give it one value, of each number of a settings dataclass."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        key, named = path + field.name, types(hint)
        inner = [each for each in named if is_dataclass(each)]
        if {int, float} & set(named):
            origin = get_origin(hints[field.name])
            shape = "{x: %s}" if origin is dict else "[%s, %s]" if origin is tuple else "%s"
            shape = "[%s]" if origin is list else shape
            yield key, field.metadata.get("range"), shape
        elif inner and {list, dict} & {get_origin(each) for each in (hint, *get_args(hint))}:
            continue  # their keys are given with a whole entry, see below
        elif inner:
            yield from numbers(inner[0], f"{key}.")


STAGE_NUMBERS = list(numbers(StageConfig))
DATASET_NUMBERS = list(numbers(DatasetConfig))


@pytest.mark.parametrize("schema", [StageConfig, DatasetConfig])
def test_every_number_has_a_range(schema):
    seen = set()

    def visit(each):
        if each in seen:
            return
        seen.add(each)
        hints = get_type_hints(each)
        for field in fields(each):
            named = types(hints[field.name])
            if {int, float} & set(named):
                assert isinstance(field.metadata.get("range"), reader.Range), f"{each.__name__}.{field.name}"
            for inner in filter(is_dataclass, named):
                visit(inner)

    visit(schema)
    assert len(seen) > 5


def outside(allowed):
    whole = isinstance(allowed.low, int)
    far = [allowed.low - 1, allowed.high + 1, 10 * allowed.high + 1, -(10**15), 10**19]
    # In floats, the largest bounds plus one are those bounds.
    far = [number for number in far if not allowed.low <= number <= allowed.high]
    return st.sampled_from(far if whole else [*far, math.nan, math.inf, -math.inf])


def as_yaml(value):
    return str(value).replace("nan", ".nan").replace("inf", ".inf")


@settings(max_examples=10, deadline=None)
@given(data=st.data(), number=st.sampled_from(STAGE_NUMBERS))
def test_a_stage_with_an_absurd_number_is_refused_with_its_range(data, number):
    key, allowed, shape = number
    value = data.draw(outside(allowed))
    given_as = shape.replace("%s", as_yaml(value))
    with pytest.raises(UserError) as refused:
        load_stage("demo", [f"{key}={given_as}"])
    assert f"{key}" in str(refused.value)
    assert str(refused.value).endswith(f": set a number from {allowed}")


@settings(max_examples=15, deadline=None)
@given(data=st.data(), number=st.sampled_from(DATASET_NUMBERS))
def test_a_dataset_with_an_absurd_number_is_refused_with_its_range(data, number, tmp_path_factory):
    key, allowed, shape = number
    path = tmp_path_factory.mktemp("dataset") / "ds.yaml"
    path.write_text(DATASET)
    given_as = shape.replace("%s", as_yaml(data.draw(outside(allowed))))
    with pytest.raises(UserError, match=f"{key}.*: set a number from"):
        load_dataset(path, [f"{key}={given_as}"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.datasets={a: {weight: .nan}, b: {}}", "data.datasets.a.weight=nan: set a number from"),
        ("text=[{name: a, max_tokens: 0}]", "text[0].max_tokens=0: set a number from 1 to 1,000,000"),
        ("optim.betas=[0.9,-1]", "optim.betas[1]=-1.0: set a number from 0 to 1"),
        ("model.heads=0", "model.heads=0: set a number from 1 to"),
        ("data.canonical_nodes=0", "data.canonical_nodes=0: set a number from 1 to"),
    ],
)
def test_numbers_inside_lists_and_mappings_have_their_ranges_too(override, says):
    with pytest.raises(UserError) as refused:
        load_stage("demo", [override])
    assert says in str(refused.value)


def test_numbers_of_evaluation_sets_have_their_ranges_too(tmp_path):
    path = tmp_path / "ds.yaml"
    path.write_text(DATASET)
    with pytest.raises(UserError, match=r"dedupe\.against\[0\]\.limit=0: set a number from 1 to"):
        load_dataset(path, ["dedupe.against=[{path: /e, limit: 0}]"])


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "/a", "a\nb", "x" * 101, "a b", "\x1b[2J"])
def test_a_name_is_no_path(name):
    with pytest.raises(UserError, match="names a folder"):
        load_stage("demo", [f"name={name!r}"])


REFERENCES = [
    "${oc.env:SECRET}",
    "${ oc.env:SECRET,none}",
    "s3://${oc.env:SECRET}/x",
    "${oc.decode:${oc.env:SECRET}}",
    "${oc.${vae}:SECRET}",
    "${name}${oc.env:SECRET}",
]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("key", ["data.store", "sample.prompts", "objective.settings", "data.datasets"])
def test_variables_of_the_environment_are_never_read(tmp_path, monkeypatch, reference, key):
    monkeypatch.setenv("SECRET", SECRET)
    shape = {"sample.prompts": "['%s']", "objective.settings": "{a: {b: '%s'}}"}.get(key, "'%s'")
    shape = "{a: {store: '%s'}, b: {}}" if key == "data.datasets" else shape
    path = tmp_path / "stage.yaml"
    path.write_text("name: small\nvae: env\n" + "".join(
        f"{'  ' * depth}{part}:\n" for depth, part in enumerate(key.split("."))
    ).rstrip() + " " + shape.replace("%s", reference) + "\n")  # fmt: skip
    for read in (
        lambda: load_stage(str(path)),
        lambda: load_stage("demo", ["vae=env", f"{key}={shape.replace('%s', reference)}"]),
    ):
        with pytest.raises(UserError, match="is not evaluated, since settings are stored") as refused:
            read()
        assert SECRET not in str(refused.value)
        assert reference in str(refused.value)


def test_a_dataset_reads_no_variables_either(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    path = tmp_path / "ds.yaml"
    path.write_text(DATASET + "filters: [{name: expression, value: 'width > ${oc.env:SECRET}'}]\n")
    with pytest.raises(UserError, match="is not evaluated") as refused:
        load_dataset(path, [])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("text", ["costs $5: cheap", r"a sign that says \${x:y}", "{a: b}", "$", "${name}"])
def test_other_text_stays_as_it_is(text):
    stage = load_stage("demo", [f"sample.prompts=['{text}']"])
    shown = {"${name}": "demo", r"a sign that says \${x:y}": "a sign that says ${x:y}"}.get(text, text)
    assert stage.sample.prompts == [shown]


NESTED: dict[str, Any] = {
    "lists": "[" * DEEP + "]" * DEEP,
    "open lists": "[" * DEEP,
    "mappings": "{a: " * DEEP,
    "blocks": "\n".join(" " * depth + "a:" for depth in range(1000)),
    "items": "- " * DEEP,
    "keys": "? " * DEEP,
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED)
def test_deep_yaml_is_one_line_and_no_crash(tmp_path, text):
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    for read in (lambda: load_stage(str(path)), lambda: load_stage("demo", [f"vae={text}"])):
        with pytest.raises(UserError, match="inside one another"):
            read()


def test_a_deep_key_is_one_short_line():
    with pytest.raises(UserError, match="inside one another") as refused:
        load_stage("demo", ["a." * DEEP + "b=1"])
    assert len(str(refused.value)) < 200


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_stage_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("stage") / "stage.yaml"
    path.write_bytes(content)
    with suppress(UserError):
        dump_stage(load_stage(str(path)))


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/nowhere.yaml"])
def test_what_is_no_file_of_settings_is_one_line(tmp_path, path):
    link = tmp_path / "stage.yaml"
    link.symlink_to(path)
    with pytest.raises(UserError, match=r"stage\.yaml: "):
        load_stage(str(link))
