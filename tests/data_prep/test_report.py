import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import DedupeConfig, FilterConfig, SourceConfig
from data_prep.dataset.parts import committed
from data_prep.images.images import ImageError
from data_prep.pairs import make_images
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.report import write_report
from data_prep.store.store import open_store
from model.common.share import Share
from tests.helpers.raw_material import ALONE, config_of, png, sample_members, write_tar


@pytest.fixture
def config(tmp_path):
    members = [
        m
        for n in range(12)
        for m in sample_members(str(n), png(n), {"caption": ["<b>fox</b> & co", f"c{n}"], "score": n})
    ]
    write_tar(
        tmp_path / "in",
        "a.tar",
        [*members, *sample_members("again", png(3), {"caption": "x", "score": 9}), ("bad.png", b"?")],
    )
    filters = [FilterConfig("min_value", 4, "score"), FilterConfig("caption_without", ["c7"])]
    return config_of(tmp_path, ("webdataset", tmp_path / "in"), filters=filters, dedupe=DedupeConfig(True, 2))


def test_the_page_shows_counts_images_and_reasons(config, tmp_path):
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, ALONE)
    write_report(config, dataset, tmp_path / "page/report.html")
    page = (tmp_path / "page/report.html").read_text()
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))
    for text in (
        "14 rows read",
        "9 pairs committed",
        "5 dropped, each with a reason",
        "min_value: score below 4",
        "image: not a known",
    ):
        assert text in words
    assert "&lt;b&gt;fox&lt;/b&gt; &amp; co" in page
    assert (
        page.count('<img src="data:image/jpeg;base64,') == 4 + 4
    )  # the first part's, and those that the filter dropped
    assert "caption_without: c7 1" in words
    assert "not made yet" in words


def test_the_page_names_evaluation_sets_and_listed_rows_in_the_order_of_their_steps(config, tmp_path):
    write_tar(tmp_path / "set", "a.tar", sample_members("0", png(5), {}))
    pq.write_table(pa.table({"id": [6, 77]}), tmp_path / "ids.parquet")
    source = SourceConfig("webdataset", str(tmp_path / "set"))
    config.dedupe = DedupeConfig(True, 2, [source], drop=str(tmp_path / "ids.parquet"))
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, ALONE)
    write_report(config, dataset, tmp_path / "report.html")
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (tmp_path / "report.html").read_text()))
    steps = ["min_value: score", f"dedupe: same file as in {source.path}", "dedupe: listed in dedupe.drop"]
    places = [words.index(step) for step in steps]
    assert places == sorted(places)
    assert f"evaluation set {source.path} are left out: it has 1 images, 0 of them unreadable" in words
    assert "dedupe.drop has 2 ids, and 1 of them match no row" in words


def test_the_page_is_the_same_whether_or_not_commits_keep_their_counts(config, tmp_path, monkeypatch):
    calls, real = itertools.count(), make_images.fit_bucket

    def fail_some(data, bucket):
        if next(calls) % 3 == 0:
            raise ImageError("image: damaged", "late")
        return real(data, bucket)

    monkeypatch.setattr(make_images, "fit_bucket", fail_some)
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, ALONE)
    read = []

    def watched(dataset, kind, shrink):
        read.extend(commits := committed(dataset, kind, shrink))
        assert not any(commit.counts for commit in commits.values())
        return commits

    def keeping(dataset, kind, shrink):
        return committed(dataset, kind, lambda commit: (shrink(commit), commit)[1])

    pages = []
    for number, reader in enumerate((watched, keeping)):
        monkeypatch.setattr("data_prep.report.committed", reader)
        write_report(config, dataset, tmp_path / f"{number}.html")
        pages.append((tmp_path / f"{number}.html").read_text())
    assert read
    assert pages[0] == pages[1]
    assert "(at full decode)" in pages[0]


def test_the_page_of_an_unfinished_job(config, tmp_path):
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, Share(1, 3))
    write_report(config, dataset, tmp_path / "report.html")
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (tmp_path / "report.html").read_text()))
    assert "4 pairs committed" in words
    assert "5 planned, not made yet" in words
    assert "1 / 3 parts committed" in words
