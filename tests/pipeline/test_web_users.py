"""Users on the page and at its endpoint: a choice from the list, which reaches the images; no paths."""

import numpy as np
import pytest
from PIL import Image

from pipeline import web
from pipeline.inference.images import read_settings
from pipeline.inference.studio import InteractiveSampler, Limits
from tests.helpers.tiny_sampler import make_sampler, sampler_with_users

pytest.importorskip("gradio")
NAMES = ["anna", "berta", "carla"]
SIZES = {"height": 16, "width": 24, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sampler = sampler_with_users(3)
    sampler.users.list_names, sampler.users.number_of = (lambda: NAMES), NAMES.index
    return web.build_page(InteractiveSampler({"run": sampler}, tmp_path_factory.mktemp("web"), Limits()))


@pytest.fixture(scope="module")
def generate(page):
    (endpoint,) = [function.fn for function in page.fns.values() if function.api_name == "generate"]

    def run(**arguments):
        (file,) = endpoint("a red cat", **SIZES, **arguments)
        with Image.open(file["path"]) as image:
            return np.asarray(image).astype(int), read_settings(file["path"])

    return run


def is_shown(block):
    """True if neither the block nor what it is in is hidden."""
    while block is not None and getattr(block, "visible", True):
        block = block.parent
    return block is None


def test_a_page_with_users_has_the_choice_and_one_without_hides_it(page, tmp_path):
    plain = web.build_page(InteractiveSampler({"run": make_sampler()}, tmp_path, Limits()))
    for built, names in ((page, NAMES), (plain, [])):
        (choice,) = [block for block in built.blocks.values() if block.elem_id == "user"]
        assert [value for _, value in choice.choices] == ["", *names]
        assert is_shown(choice) == bool(names)


def test_the_choice_reaches_the_image_and_its_record(generate):
    nobody, record = generate()
    assert "user" not in record
    anna, record = generate(user="anna", user_guidance=2.0)
    assert (record["user"], record["user_guidance"]) == ("0", 2.0)
    berta, _ = generate(user="berta", user_guidance=2.0)
    assert np.abs(anna - nobody).max() > 1
    assert np.abs(anna - berta).max() > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"user": "/etc/anna.safetensors"}, "choose one of the page's list"),
        ({"user": "1"}, "choose one of the page's list"),
        ({"user": "anna", "user_guidance": 31.0}, "choose 0 to 30"),
        ({"user": ["anna"]}, "give a text"),
    ],
)
def test_the_endpoint_has_the_limits_of_the_page(generate, wrong, message):
    with pytest.raises(Exception, match=message):
        generate(**wrong)
