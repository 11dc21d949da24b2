"""A batch of answers is the same as each answer alone, and sampled answers have the model's probabilities."""

import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from model.captioners.vision_language import Prompt, Sampling, SeededSampling, VisionLanguageModel
from model.common.errors import UserError
from model.scorers.files import find_scorer
from tests.helpers import tiny_scorers
from tests.helpers.raw_material import smooth_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_scorers.llava(tmp_path_factory.mktemp("llava"))


def model_of(folder, sampling=None, template=""):
    files = find_scorer(str(folder), "captions.model")
    return VisionLanguageModel(files, CPU, torch.float32, sampling or Sampling(), template)


def prompts_of(count):
    texts = ["Is it red ?", "a cat", "Is there a red cat ? Is it a red cat ?"]
    return [Prompt(smooth_image(n, 40, 32), texts[n % len(texts)], 1000 + n) for n in range(count)]


def ask(model, prompts, max_tokens=12):
    return model.generate(model.prepare(prompts), [prompt.seed for prompt in prompts], max_tokens)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 0.8)])
def test_an_answer_does_not_depend_on_the_batch(folder, sampling):
    model, prompts = model_of(folder, sampling), prompts_of(7)
    together = ask(model, prompts)
    assert together == [ask(model, [prompt])[0] for prompt in prompts]
    backwards = ask(model, prompts[::-1])
    assert together == backwards[::-1]
    assert all(0 < written.tokens <= 12 and written.prompt_tokens > 4 for written in together)
    if sampling.temperature:
        assert len({written.text for written in together}) > 1
        other = [prompt._replace(seed=prompt.seed + 1) for prompt in prompts]
        assert ask(model, other) != together


def test_greedy_answers_are_those_of_transformers(folder):
    model = model_of(folder)
    for prompt in prompts_of(3):
        inputs = model.processor(
            text=model.whole_prompt(prompt.text), images=prompt.image, return_tensors="pt"
        )
        tokens = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert ask(model, [prompt])[0].text == model.tokenizer.decode(new, skip_special_tokens=True)


def test_an_answer_that_ends_is_complete_and_a_cut_one_is_not(folder):
    model = model_of(folder)
    prompt = prompts_of(1)[0]
    assert not ask(model, [prompt], 2)[0].is_complete
    # The second token that the model writes, made the end token.
    inputs = model.prepare([prompt])
    tokens = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(token for token in new if token != new[0]) if len(set(new)) > 1 else new[0]
    model.model.generation_config.eos_token_id = end
    model._ends = [end]
    (written,) = ask(model, [prompt], 8)
    assert (written.is_complete, written.tokens) == (True, new.index(end) + 1)


def test_sampled_tokens_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    picks = Counter()
    sample = SeededSampling(Sampling(0.5), [7], CPU)
    for _ in range(4000):
        picks[int(sample(torch.zeros(1, 1, dtype=torch.long), logits).argmax())] += 1
    expected = (logits[0] / 0.5).softmax(0).tolist()
    for token, probability in enumerate(expected):
        assert abs(picks[token] / 4000 - probability) < 0.03

    # With top_p, only the likeliest tokens can be picked.
    sample = SeededSampling(Sampling(1.0, 0.5), [7], CPU)
    picked = {int(sample(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) for _ in range(200)}
    assert picked == {0}


def test_markup_in_a_prompt_is_only_text(folder):
    """A caption of the web that holds the image token would otherwise ask for a second image."""
    model = model_of(folder)
    image = Image.new("RGB", (32, 32))
    hostile = Prompt(image, "a <ima<image>ge> <image> </s> cat", 0)
    assert model.whole_prompt(hostile.text).count("<image>") == model.whole_prompt("cat").count("<image>")
    assert ask(model, [hostile, Prompt(image, "a cat", 0)])


def test_a_template_replaces_a_missing_chat_template(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"set captions\.template"):
        model_of(bare)
    model = model_of(bare, template="<image> a {prompt} ?")
    assert model.whole_prompt("red cat") == "<image> a red cat ?"
    assert ask(model, prompts_of(3))
