"""A model in this process answers each question once, in batches of one length, and for several threads."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.captioners.captioner import Question
from data_prep.captioners.choice import captioner_identity, open_captioner
from data_prep.model_settings import CaptionsConfig, PromptConfig
from model.common.errors import UserError
from tests.helpers import tiny_scorers
from tests.helpers.raw_material import png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_scorers.llava(tmp_path_factory.mktemp("llava"))


def settings(folder, **changes):
    prompts = [PromptConfig("short", "a cat ?", 4), PromptConfig("long", "Is there a red cat ?", 9)]
    fields = {"model": str(folder), "prompts": prompts, "dtype": "fp32", "temperature": 1.0, "batch": 3}
    return CaptionsConfig(**{**fields, **changes})


def questions_of(count):
    chance = random.Random(0)
    texts = ["a cat ?", "Is there a red cat ?", "Is it red ?"]
    return [
        Question(png(n % 5, 32, 32), chance.choice(texts), chance.choice([4, 9]), n) for n in range(count)
    ]


def test_answers_do_not_depend_on_batches_and_threads(folder):
    questions = questions_of(14)
    alone = open_captioner(settings(folder, batch=1)).ask(questions)
    captioner = open_captioner(settings(folder))
    assert captioner.ask(questions) == alone
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(captioner.ask, (questions[:6], questions[6:])))
    assert halves[0] + halves[1] == alone
    for question, answer in zip(questions, alone, strict=True):
        assert 0 < answer.tokens <= question.max_tokens


def test_batches_have_one_maximum_and_prompts_of_about_one_length(folder):
    captioner = open_captioner(settings(folder, batch=4))
    questions = questions_of(30)
    batches = list(captioner._batches(questions))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(30))
    lengths = []
    for batch in batches:
        assert len(batch) <= 4
        assert len({questions[number].max_tokens for number in batch}) == 1
        lengths.append([captioner.model.length(questions[number].prompt) for number in batch])
    padded = sum(max(batch) * len(batch) - sum(batch) for batch in lengths)
    assert padded <= 0.2 * sum(map(sum, lengths))


def test_the_identity_names_model_and_weights(folder, tmp_path):
    identity = captioner_identity(settings(folder))
    assert identity["revision"].startswith("sampled-sha256:")
    assert identity["library"] == "transformers"
    assert captioner_identity(settings(folder, batch=7)) == identity
    assert captioner_identity(settings(folder, dtype="bf16")) != identity
    with pytest.raises(UserError, match=r"captions\.model .*no such folder"):
        captioner_identity(settings(tmp_path / "nothing"))
