"""The web page in a real browser, where gradio and Chromium are there."""

import importlib
import json
import shutil
import threading
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
from PIL import Image

from model.common import extras
from model.common.errors import UserError
from pipeline import web
from pipeline.inference.images import read_settings
from pipeline.inference.studio import NO_INSTRUCTION, NOTHING, InteractiveSampler, Limits
from tests.helpers.tiny_sampler import elastic_sampler, make_sampler

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["web", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        web.main()
    assert exit_info.value.code == 2
    assert ".[web]" in capsys.readouterr().err


@contextmanager
def serve(folder):
    pytest.importorskip("gradio")
    page, address = web.serve(
        InteractiveSampler({"tiny": make_sampler()}, folder, Limits(side=64, steps=10, images=4)),
        "127.0.0.1",
        None,
        prevent_thread_lock=True,
        quiet=True,
    )
    yield address
    page.close()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (elastic_sampler, ["depth3_patch1", "depth2_patch1", "depth3_patch2", "depth2_patch2"]),
        (partial(elastic_sampler, segments=[0.6]), ["depth3", "depth2"]),
        (make_sampler, [""]),
    ],
)
def test_the_page_has_a_choice_of_the_parts_of_an_elastic_network(tmp_path, make, parts):
    pytest.importorskip("gradio")
    studio = InteractiveSampler({"tiny": make()}, tmp_path, Limits(side=64, steps=10, images=4))
    page = web.build_page(studio)
    (choice,) = [block for block in page.blocks.values() if block.elem_id == "part"]
    assert [value for _, value in choice.choices] == parts
    assert choice.value == parts[0]
    assert choice.visible == (len(parts) > 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of the images of the page that the tests share."""
    return tmp_path_factory.mktemp("web") / "web"


@pytest.fixture(scope="module")
def address(images):
    with serve(images) as address:
        yield address


@pytest.fixture(scope="module")
def browser(address):
    """One window for all tests, which so loads the scripts of the page once."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context(viewport={"width": 1500, "height": 1100})
        browser.close()


@pytest.fixture
def view(browser, address):
    """The page in a tab of its own, so without what other tests have generated."""
    view = browser.new_page()
    # tests share few processors
    view.set_default_timeout(180_000)
    view.hosts = set()
    view.on("request", lambda request: view.hosts.add(urlparse(request.url).hostname))
    view.goto(address)
    yield view
    view.close()


FIELDS = {
    "prompt": "#prompt textarea",
    "seed": "#seed input",
    "attention": "#attention input[type=number]",
}


def asks_for_images(request):
    # the sliders send requests too, of two values, also while the page loads
    return "queue/join" in request.url and len(request.post_data_json["data"]) > 2


def click_draw(view, **fields):
    """Type into fields and click until the page has sent what was typed.

    gradio attaches the button's handler after the button can be clicked, and sets all fields to their
    defaults once more when the page has loaded.
    """
    playwright = importlib.import_module("playwright.sync_api")
    for _ in range(6):
        for field, text in fields.items():
            view.locator(FIELDS[field]).fill(text)
        try:
            with view.expect_request(asks_for_images, timeout=30_000) as sent:
                view.locator("#draw").click()
        except playwright.TimeoutError:
            continue
        values = [str(value) for value in sent.value.post_data_json["data"]]
        if all(text in values for text in fields.values()):
            return
    raise AssertionError(f"no click on #draw sends {fields}")


def wait_for_pictures(view, gallery, count):
    """Wait until a gallery holds `count` pictures that have arrived whole."""
    view.wait_for_function(
        "([id, count]) => { const all = [...document.querySelectorAll(`#${id} .thumbnail-item img, #${id} "
        "img`)];"
        " return all.length >= count && all.every(image => image.complete && image.naturalWidth > 0); }",
        arg=[gallery, count],
        timeout=180_000,
    )


def test_a_person_draws_and_compares(view, images, tmp_path):
    before = set(images.glob("*.png"))
    click_draw(view, prompt="a red cat", seed="7")
    wait_for_pictures(view, "pictures", 1)
    picture = view.locator("#pictures img").first
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [24, 16]
    picture.screenshot(path=str(tmp_path / "picture.png"))
    with Image.open(tmp_path / "picture.png") as shot:
        assert np.asarray(shot.convert("L"), dtype=float).std() > 3
    assert not view.locator("#maps").is_visible()

    view.locator("#compare input").click()
    view.get_by_role("option", name=NO_INSTRUCTION).click()
    click_draw(view, attention="2")
    wait_for_pictures(view, "compared-maps", 3)
    assert view.locator("#maps").get_by_text("cat").first.is_visible()
    wait_for_pictures(view, "compared", 1)
    wait_for_pictures(view, "history", 3)
    assert view.locator("#prompt textarea").input_value() == "a red cat"
    assert view.locator("#seed input").input_value() == "7"
    assert view.locator("#attention input[type=number]").input_value() == "2"
    assert len(set(images.glob("*.png")) - before) == 3
    view.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert view.hosts == {"127.0.0.1"}


def test_a_wrong_prompt_is_one_line_on_the_page(view):
    click_draw(view, prompt="x")
    wait_for_pictures(view, "pictures", 1)
    click_draw(view, prompt="x" * 30)
    view.get_by_text("longer than the 24 tokens of first").first.wait_for(timeout=180_000)
    view.get_by_text("processing").first.wait_for(state="hidden", timeout=180_000)
    assert view.locator("#pictures img").first.is_visible()


def test_markup_in_a_prompt_is_shown_as_text(view):
    for prompt in ("<img src=x>", "<img src=x><b>far too long</b>"):
        click_draw(view, prompt=prompt)
        if prompt == "<img src=x>":
            wait_for_pictures(view, "history", 1)
    view.get_by_text("<img src=x><b>far too long</b>").last.wait_for(timeout=180_000)
    assert view.locator("img[src='x']").count() == 0


@pytest.fixture(scope="module")
def client(address):
    return importlib.import_module("gradio_client").Client(address, verbose=False)


def test_scripts_have_one_endpoint_with_the_limits_of_the_page(client, capfd):
    (endpoint,) = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    files = client.predict("a red apple", seed=3, images=2, api_name=endpoint)
    settings = [read_settings(Path(file)) for file in files]
    assert [each["seed"] for each in settings] == [3, 4]
    assert {each["prompt"] for each in settings} == {"a red apple"}
    capfd.readouterr()
    for wrong in (
        {"height": "abc"},
        {"height": True},
        {"height": 10},
        {"width": 1024},
        {"steps": 2.5},
        {"steps": 11},
        {"images": 5},
        {"seed": [1]},
        {"negative": 7},
        {"guidance": "x"},
        {"scheduler": {}},
        {"prompt": None},
        {"prompt": ["tea"]},
        {"prompt": "x" * 30},
    ):
        (name,) = wrong
        with pytest.raises(Exception, match=name if name not in ("height", "width") else "size|height|width"):
            client.predict(**{"prompt": "tea", **wrong}, api_name=endpoint)
    assert "Traceback" not in "".join(capfd.readouterr())


def send(address, data, name="run"):
    """Send values to an event of the page as a browser does, and return the messages of the log."""
    events = httpx.get(f"{address}config").json()["dependencies"]
    number = next(event["id"] for event in events if event["api_name"] == name)
    base, session = f"{address}gradio_api/queue", uuid.uuid4().hex
    body = {"data": data, "fn_index": number, "session_hash": session}
    httpx.post(f"{base}/join", json=body).raise_for_status()
    messages = []
    with httpx.stream("GET", f"{base}/data?session_hash={session}", timeout=60) as stream:
        for line in filter(None, stream.iter_lines()):
            message = json.loads(line.removeprefix("data:"))
            messages.append(message.get("log", ""))
            if message["msg"] == "process_completed":
                return [text for text in messages if text]
    raise AssertionError("the event does not end")


PAGE_VALUES = [None, "tea", "", 16, 24, 2, 3.0, 7, 1, "euler", NOTHING, 0, False, "", "", 0.0]


def test_a_forged_value_of_the_page_is_answered_in_words(address, capfd):
    assert send(address, PAGE_VALUES) == []
    capfd.readouterr()
    for place, value in (
        (1, 7),
        (2, {"a": 1}),
        (3, "abc"),
        (5, 2.5),
        (6, None),
        (7, "x"),
        (9, 5),
        (10, []),
        (12, 1),
    ):
        values = [*PAGE_VALUES[:place], value, *PAGE_VALUES[place + 1 :]]
        (message,) = send(address, values)
        assert ": give " in message
    send(address, ["x", None], "limit_step")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_no_route_goes_past_the_queue(address):
    for name in ("run", "generate", "limit_step"):
        for route in ("run", "api"):
            answer = httpx.post(f"{address}gradio_api/{route}/{name}", json={"data": PAGE_VALUES[1:]})
            assert answer.status_code == 404, (route, name)


@pytest.fixture
def own_address(tmp_path):
    with serve(tmp_path / "web") as address:
        yield address


def test_the_queue_is_bounded(own_address, monkeypatch):
    address = own_address
    started, go_on = threading.Event(), threading.Event()

    def wait(studio, request):
        started.set()
        go_on.wait(30)
        raise UserError("done")

    monkeypatch.setattr(InteractiveSampler, "generate", wait)
    events = httpx.get(f"{address}config").json()["dependencies"]
    numbers = [event["id"] for event in events if event["api_name"] in ("run", "generate")]
    codes = []
    for session in range(web.MAX_QUEUE + 4):
        number = numbers[session % 2]
        data = PAGE_VALUES if session % 2 == 0 else [*PAGE_VALUES[1:10], ""]
        body = {"data": data, "fn_index": number, "session_hash": str(session)}
        codes.append(httpx.post(f"{address}gradio_api/queue/join", json=body).status_code)
        if session == 0:
            assert started.wait(30)
    called = httpx.post(f"{address}gradio_api/call/generate", json={"data": PAGE_VALUES[1:10]})
    go_on.set()
    assert called.status_code == 503
    assert codes == [200] * (web.MAX_QUEUE + 1) + [503] * 3


def test_no_file_of_the_folder_is_served_by_its_name(address, client, images):
    before = set(images.iterdir()) if images.exists() else set()
    (file,) = client.predict("tea", api_name="/generate")
    (images / ".hidden").write_text("secret")
    stored = [path for path in set(images.iterdir()) - before if path.is_file()]
    assert len(stored) == 2
    for path in stored:
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403
    assert Path(file).read_bytes() in [path.read_bytes() for path in stored]


def test_the_page_starts_under_a_proxy_that_is_gone(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    studio = InteractiveSampler({"tiny": make_sampler()}, tmp_path, Limits())
    page, _ = web.serve(studio, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    page.close()
    assert web.os.environ["no_proxy"].startswith("example.org,")


def test_help_says_how_to_serve_the_page_below_a_path(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["web", "--help"])
    with pytest.raises(SystemExit):
        web.main()
    assert "GRADIO_ROOT_PATH" in capsys.readouterr().out
