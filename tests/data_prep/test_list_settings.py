"""Entries of a dataset's lists, set from the command line."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import DatasetConfig, load_dataset
from model.common.errors import UserError

SOURCES = [{"kind": "webdataset", "path": "/a"}, {"kind": "folder", "path": "/b", "limit": 3}]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "ds.yaml"
    path.write_text(yaml.safe_dump({"name": "ds", "store": "/store", "sources": SOURCES}))
    return path


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 1), st.sampled_from(["path", "image", "limit"])),
        st.integers(1, 99),
        max_size=4,
    ),
    st.sampled_from(["sources.{}.{}={}", "sources[{}].{}={}"]),
)
def test_an_entry_of_the_files_list_is_set_and_no_other(file, values, form):
    config = load_dataset(file, [form.format(index, key, value) for (index, key), value in values.items()])
    expected = [dict(source) for source in SOURCES]
    for (index, key), value in values.items():
        expected[index][key] = value if key == "limit" else str(value)
    file_of_expected = file.with_name("expected.yaml")
    file_of_expected.write_text(yaml.safe_dump({"name": "ds", "store": "/store", "sources": expected}))
    assert config == load_dataset(file_of_expected, [])


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["sources.0.limit=7", "sources.0.limit="], lambda config: config.sources[0].limit is None),
        (["sources.0.path=/${name}/x"], lambda config: config.sources[0].path == "/ds/x"),
        (
            ["sources.0.captions.original=txt"],
            lambda config: config.sources[0].captions == {"original": "txt"},
        ),
        (
            ["sources.1.path=/q", "sources=[{path: /x}, {path: /y}]"],
            lambda config: config.sources[1].path == "/q",
        ),
        (["filters=[{name: min_side}]", "filters.0.value=3"], lambda config: config.filters[0].value == 3),
        (["dedupe.against=[{path: /e}]"], lambda config: config.dedupe.against[0].path == "/e"),
    ],
)
def test_entries_take_what_other_settings_take(file, overrides, read):
    assert read(load_dataset(file, overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.2.path=/q", r"sources\.2\.path: no such entry: `sources` has 2, .*'sources=\[\.\.\.\]'"),
        ("sources.-1.path=/q", r"sources\.-1\.path: no such entry: `sources` has 2"),
        ("sources.path=/q", r"sources\.path: no such entry: `sources` has 2"),
        ("filters.0.value=3", r"filters\.0\.value: the file has no list `filters`: .*'filters=\[\.\.\.\]'"),
        ("text[0].name=x", r"the file has no list `text`"),
        ("dedupe.against.0.path=/e", r"set a list as a whole"),
        ("sources.0.nonsense=3", r"Key 'nonsense' not in 'SourceConfig'"),
        ("sources.0.path=", r"sources\[0\]\.path is empty"),
        ("sources.0.limit=0", r"sources\[0\]\.limit=0: set a number from 1"),
        ("sources.0.path=${oc.env:HOME}", r"is not evaluated"),
    ],
)
def test_what_cannot_be_set_is_one_line_with_a_way_out(file, override, message):
    with pytest.raises(UserError, match=message) as error:
        load_dataset(file, [override])
    assert str(error.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(st.text("sourcefiltxda.[]0123-=", max_size=14).map(lambda text: f"sources{text}"))
def test_no_key_is_more_than_one_line(file, override):
    try:
        result = load_dataset(file, [override])
    except UserError as error:
        result = str(error)
    assert isinstance(result, DatasetConfig) or result.isprintable()
