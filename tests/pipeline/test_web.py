"""The web page in a real browser, where gradio and Chromium are there."""

import importlib
import shutil
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from pipeline import web
from pipeline.inference.studio import NO_INSTRUCTION, InteractiveSampler, Limits
from tests.helpers.tiny_sampler import make_sampler

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["web", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        web.main()
    assert exit_info.value.code == 2
    assert ".[web]" in capsys.readouterr().err


@pytest.fixture
def address(tmp_path):
    pytest.importorskip("gradio")
    page, address = web.serve(
        InteractiveSampler({"tiny": make_sampler()}, tmp_path / "web", Limits(side=64, steps=10, images=4)),
        "127.0.0.1",
        None,
        prevent_thread_lock=True,
        quiet=True,
    )
    yield address
    page.close()


def type_in(view, field, text):
    """Type until it stays: gradio sets the fields once more when the page has loaded, and a person is not
    that quick."""
    for _ in range(40):
        view.locator(field).fill(text)
        view.wait_for_timeout(250)
        if view.locator(field).input_value() == text:
            return
    raise AssertionError(f"{field} does not keep what is typed")


@pytest.fixture
def view(address):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1500, "height": 1100})
        view.hosts = set()
        view.on("request", lambda request: view.hosts.add(urlparse(request.url).hostname))
        view.goto(address)
        type_in(view, "#prompt textarea", "x")
        yield view
        browser.close()


def click_draw(view):
    """Click until the page has sent its request: gradio attaches the button's handler some time after the
    button can be clicked."""
    playwright = importlib.import_module("playwright.sync_api")
    for _ in range(18):
        try:
            with view.expect_request("**/queue/join*", timeout=10_000):
                view.locator("#draw").click()
            return
        except playwright.TimeoutError:
            continue
    raise AssertionError("no click on #draw sends a request")


def wait_for_pictures(view, gallery, count):
    """Wait until a gallery holds `count` pictures that have arrived whole."""
    view.wait_for_function(
        "([id, count]) => { const all = [...document.querySelectorAll(`#${id} .thumbnail-item img, #${id} "
        "img`)];"
        " return all.length >= count && all.every(image => image.complete && image.naturalWidth > 0); }",
        arg=[gallery, count],
        timeout=180_000,
    )


def test_a_person_draws_and_compares(view, tmp_path):
    view.locator("#prompt textarea").fill("a red cat")
    view.locator("#seed input").fill("7")
    click_draw(view)
    wait_for_pictures(view, "pictures", 1)
    picture = view.locator("#pictures img").first
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [24, 16]
    picture.screenshot(path=str(tmp_path / "picture.png"))
    with Image.open(tmp_path / "picture.png") as shot:
        assert np.asarray(shot.convert("L"), dtype=float).std() > 3
    assert not view.locator("#words").is_visible()

    view.locator("#attention input[type=number]").fill("2")
    view.locator("#compare input").click()
    view.get_by_role("option", name=NO_INSTRUCTION).click()
    click_draw(view)
    wait_for_pictures(view, "compared-words", 3)
    assert view.locator("#words").get_by_text("cat").first.is_visible()
    wait_for_pictures(view, "compared", 1)
    wait_for_pictures(view, "history", 3)
    assert view.locator("#prompt textarea").input_value() == "a red cat"
    assert view.locator("#seed input").input_value() == "7"
    assert view.locator("#attention input[type=number]").input_value() == "2"
    assert len(list((tmp_path / "web").glob("*.png"))) == 3
    view.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert view.hosts == {"127.0.0.1"}


def test_a_wrong_prompt_is_one_line_on_the_page(view):
    click_draw(view)
    wait_for_pictures(view, "pictures", 1)
    view.locator("#prompt textarea").fill("x" * 30)
    click_draw(view)
    view.get_by_text("longer than the 24 tokens of first").first.wait_for(timeout=180_000)
    view.get_by_text("processing").first.wait_for(state="hidden", timeout=180_000)
    assert view.locator("#pictures img").first.is_visible()
