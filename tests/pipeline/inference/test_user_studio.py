"""Users on the web page: a choice from the list alone, since a path would be read as a file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.common.errors import UserError
from pipeline.inference.images import read_settings
from pipeline.inference.studio import GenerationRequest, InteractiveSampler, Limits
from tests.helpers.tiny_sampler import make_sampler

REQUEST = GenerationRequest("a red cat", "", 16, 24, 2, 3.0, 7, 1, "euler")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    sampler = make_sampler()
    attach_adapters(
        sampler.network, UsersConfig(count=2, tokens=2, width=8, heads=2, blocks=1, rank=4), LoRAConfig()
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sampler.network.adapters.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    sampler.users.list_names = lambda: ["anna", None, "carla"]
    sampler.users.number_of = ["anna", None, "carla"].index
    return InteractiveSampler({"run": sampler}, tmp_path_factory.mktemp("web"), Limits())


def test_the_list_has_the_names_of_the_tables_users(studio):
    assert studio.users == ["anna"]  # one is deleted, and the table has no row for another
    assert InteractiveSampler({"run": make_sampler()}, studio.out, Limits()).users == []


def test_a_chosen_user_is_in_the_images_record(studio):
    (column,) = studio.generate(replace(REQUEST, user="anna", user_guidance=2.0))
    record = read_settings(column.files[0])
    # The number, since the record outlives the list of names.
    assert (record["user"], record["user_guidance"], record["evaluations"]) == ("0", 2.0, 6)
    assert b"anna" not in column.files[0].read_bytes()
    (plain,) = studio.generate(REQUEST)
    assert "user" not in read_settings(plain.files[0])


@pytest.mark.parametrize("user", ["carla", "0", "/etc/passwd.safetensors"])
def test_anybody_else_is_refused(studio, user):
    with pytest.raises(UserError, match="choose one of the page's list"):
        studio.generate(replace(REQUEST, user=user))
    with pytest.raises(UserError, match="user_guidance=31"):
        studio.generate(replace(REQUEST, user="anna", user_guidance=31.0))
    with pytest.raises(UserError, match="user_guidance='2': give a number"):
        studio.generate(replace(REQUEST, user="anna", user_guidance="2"))


def test_user_guidance_0_is_nobody_and_none_that_of_the_text_as_in_the_command(studio):
    images = []
    for user, scale in (("", None), ("anna", 0.0), ("anna", None), ("anna", 3.0)):
        (column,) = studio.generate(replace(REQUEST, user=user, user_guidance=scale))
        images.append(np.asarray(Image.open(column.files[0])).astype(int))
    nobody, zero, text, three = images
    # To rounding, since a batch of three branches has other shapes than one of two.
    assert np.abs(zero - nobody).max() <= 1
    assert np.array_equal(text, three)
    assert np.abs(text - nobody).max() > 1
