"""The web page: what it draws, what it refuses, and the page itself in a real browser where gradio and Chromium are there."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sampler import make_sampler

from model.errors import UserError
from pipeline import web
from pipeline.pictures import read_settings
from pipeline.web import NO_INSTRUCTION, NOTHING, OTHER, Limits, Request, Studio, build_page

REQUEST = Request("a red cat", "", 16, 24, 2, 3.0, 7, 2, "euler")


@pytest.fixture
def studio(tmp_path):
    return Studio({"tiny": make_sampler()}, tmp_path / "web", Limits(side=64, steps=10, images=4))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def test_a_request_gives_pictures_with_their_settings(studio):
    left, right = studio.draw(REQUEST)
    assert right == []
    assert [read_settings(path)["seed"] for path in left] == [7, 8]
    assert all(read_settings(path)["prompt"] == "a red cat" for path in left)
    again, _ = studio.draw(replace(REQUEST, images=1))
    assert abs(pixels(again[0]) - pixels(left[0])).max() <= 1
    assert len(list(studio.out.glob("*.png"))) == 3


def test_the_second_column_differs_in_one_thing(studio):
    assert studio.comparisons == [NOTHING, NO_INSTRUCTION, "without first", "without second"]
    for compare in studio.comparisons[1:]:
        left, right = studio.draw(replace(REQUEST, compare=compare, images=1))
        ours, theirs = read_settings(left[0]), read_settings(right[0])
        assert [key for key in ours if ours[key] != theirs[key]] == ["instruction" if compare == NO_INSTRUCTION else "without"]
        assert (pixels(left[0]) != pixels(right[0])).any()


def test_other_weights_can_be_compared(tmp_path):
    studio = Studio({"one": make_sampler(), "two": make_sampler()}, tmp_path, Limits())
    left, right = studio.draw(replace(REQUEST, compare=OTHER))
    assert [read_settings(path)["source"] for path in (left[0], right[0])] == ["one", "two"]
    assert (pixels(left[0]) == pixels(right[0])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x" * 5000}, "shorten"),
        ({"prompt": "x" * 30}, "longer than"),
        ({"height": 128}, "1 to 64"),
        ({"height": 20}, "multiple of 8"),
        ({"steps": 99}, "1 to 10"),
        ({"images": 5}, "1 to 4"),
        ({"guidance": -1.0}, "0 to 30"),
        ({"seed": -1}, "whole number"),
        ({"scheduler": "ddim"}, "take one of"),
        ({"compare": "without third"}, "choose nothing"),
    ],
)
def test_what_is_out_of_bounds_is_refused_and_nothing_is_drawn(studio, change, message):
    with pytest.raises(UserError, match=message):
        studio.draw(replace(REQUEST, **change))
    assert not list(studio.out.glob("*.png"))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["web", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        web.main()
    assert exit_info.value.code == 2
    assert ".[web]" in capsys.readouterr().err


def test_a_person_draws_in_a_real_browser(studio, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium")
    page = build_page(studio)
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        allowed_paths=[str(studio.out)],
        show_api=False,
    )
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1400, "height": 1000})
            view.goto(address)
            view.locator("#prompt textarea").fill("a red cat")
            view.locator("#seed input").fill("7")
            view.locator("#draw").click()
            picture = view.locator("#pictures img").first
            picture.wait_for(timeout=60_000)
            view.wait_for_function("document.querySelector('#pictures img').naturalWidth > 0", timeout=30_000)
            assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [24, 16]
            shot = tmp_path / "picture.png"
            picture.screenshot(path=str(shot))
            assert pixels(shot).std() > 3
            assert view.locator("#prompt textarea").input_value() == "a red cat"
            assert view.locator("#seed input").input_value() == "7"
            assert view.locator("#history img").count() == 1
            view.screenshot(path=str(tmp_path / "page.png"))
            view.locator("#prompt textarea").fill("x" * 30)
            view.locator("#draw").click()
            view.get_by_text("longer than").first.wait_for(timeout=30_000)
            browser.close()
    finally:
        page.close()
