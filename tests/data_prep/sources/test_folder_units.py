"""Units of a folder source that are listed by themselves: the same files, and few requests of a task."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.plan.plan import run_plan
from data_prep.store import s3 as s3_store
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.sources.test_accounts import folder_of, trees, write_tree
from tests.helpers.raw_material import config_of, png

FOLDERS, IMAGES, TASKS = 12, 4, 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trees, st.sampled_from(["", "metadata.jsonl", "a/metadata.jsonl", "a/c/metadata.csv", "b/metadata.csv"])
)
def test_a_unit_alone_has_the_files_that_it_has_in_the_whole_listing(tmp_path_factory, tree, metadata):
    root = tmp_path_factory.mktemp("tree")
    write_tree(root, tree | ({metadata} if metadata else set()))
    whole = folder_of(root)
    try:
        names = whole.inventory().names
    except UserError:
        return  # nothing in it is a row
    for name in names:
        alone, listed = folder_of(root), whole._unit(name)
        assert alone._unit(name) == listed
        assert alone.version(name) == whole.version(name)
        assert alone.fingerprint(name) == whole.fingerprint(name)
        assert name == "." or "_units" not in alone.__dict__


def test_a_folder_that_is_gone_or_became_a_link_has_no_rows(tmp_path):
    write_tree(tmp_path / "in", ["a/1.png", "b/1.png"])
    write_tree(tmp_path / "secret", ["1.png"])
    (tmp_path / "in/c").symlink_to(tmp_path / "secret")
    for name in ("c", "d", "../secret"):
        with pytest.raises(FileNotFoundError):
            list(folder_of(tmp_path / "in").read(name, []))


def test_a_task_lists_the_folders_of_its_share(s3, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "120")  # a slow answer is not asked for again
    monkeypatch.setattr(s3_store, "PAGE_KEYS", 2 * IMAGES)
    images = open_store(s3).sub("images")
    for folder in range(FOLDERS):
        for image in range(IMAGES):
            images.put(f"{folder:02d}/{image}.png", png(folder * IMAGES + image))
            images.put(f"{folder:02d}/{image}.txt", b"a caption")
    config = config_of(tmp_path, ("folder", f"{s3}/images"), store=s3, workers=0)
    dataset = open_store(config.store).sub("ds")

    def listings(task):
        proxy.requests.clear()
        run_plan(config, dataset, Share(task, TASKS))
        lists = [path for _, path, _ in proxy.requests if "list-type" in path]
        return sum("images%2F" in path for path in lists)

    # A page holds the files of one folder.
    whole = FOLDERS
    # The first one makes the list, and looks for large folders.
    assert listings(0) <= 2 * whole + FOLDERS // TASKS
    assert listings(1) <= FOLDERS // TASKS
    # The last one has nothing to list besides, for the plan is finished from tables.
    assert listings(2) <= FOLDERS // TASKS
