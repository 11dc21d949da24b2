"""Models that judge pictures, of the real classes with random weights: what they return is what their definitions say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForQuestionAnswering

from model.common.errors import UserError
from model.scorers import inception
from model.scorers.clip import CLIPScorer
from model.scorers.detectors import Detection, load_detector
from model.scorers.files import find_scorer
from model.scorers.image_text import load_vqa
from pipeline.evaluation import geneval
from pipeline.evaluation.common import BenchImage
from tests.helpers import tiny_scorers

CPU = torch.device("cpu")
QUESTIONS = ["Is it there ?", "a red cat ?"]


def load_any_vqa(files, device):
    return load_vqa(files, device, None)


def picture(seed=0, size=(56, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = getattr(tiny_scorers, name)(tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def vqa(folders):
    made = {}
    return lambda name, side=None: made.setdefault((name, side), load_vqa(find_scorer(str(folders(name)), "--vqa"), CPU, side))


@pytest.mark.parametrize("name", ["blip", "blip2", "llava"])
def test_a_vqa_models_answers_hang_on_picture_and_question_alone(vqa, name):
    model = vqa(name)
    both = model.yes(picture(), QUESTIONS)
    assert all(0 < value < 1 for value in both)
    assert both == pytest.approx([model.yes(picture(), [each])[0] for each in QUESTIONS], abs=1e-5)
    assert abs(both[0] - model.yes(picture(1), QUESTIONS)[0]) > 1e-6
    assert abs(both[0] - both[1]) > 1e-6
    assert [len(model.answers(picture(), QUESTIONS)), model.yes(picture(), []), model.answers(picture(), [])] == [2, [], []]
    assert all(answer == answer.lower() for answer in model.answers(picture(), QUESTIONS))
    assert model.identity["revision"].startswith("sampled-sha256:")


def test_blips_first_answer_token_is_what_transformers_own_model_decodes(folders, vqa):
    """Through transformers' own generation, which starts with [DEC] too; the question starts with [ENC], as BLIP's does."""
    ours, theirs = vqa("blip"), BlipForQuestionAnswering.from_pretrained(folders("blip")).eval()
    pixels = ours.processor(images=picture(), return_tensors="pt").pixel_values
    question = ours.tokenizer(QUESTIONS[0], return_tensors="pt")
    question.input_ids[:, 0] = ours.start + 1
    step = {}
    theirs.text_decoder.register_forward_hook(lambda *arguments: step.update(first=arguments[2].logits))
    theirs.generate(question.input_ids, pixels, question.attention_mask, max_new_tokens=1)
    words = [ours.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    expected = step["first"][0, -1].softmax(0)[words]
    assert ours.yes(picture(), QUESTIONS[:1])[0] == pytest.approx(float(expected[0] / expected.sum()), abs=1e-5)


def test_blip_sees_pictures_of_the_size_that_is_asked_for(vqa):
    assert vqa("blip", 48).identity["picture"] == "48x48"
    assert abs(vqa("blip", 48).yes(picture(), QUESTIONS)[0] - vqa("blip").yes(picture(), QUESTIONS)[0]) > 1e-7


@pytest.mark.parametrize(("name", "ends"), [("blip2", True), ("llava", False)])
def test_vqascore_is_the_geometric_mean_over_the_answers_tokens(vqa, name, ends):
    model = vqa(name)
    first = model.logits(picture(), QUESTIONS[0], [3, 5])
    alone = model.logits(picture(), QUESTIONS[0], [3])
    torch.testing.assert_close(first[:1], alone, atol=1e-5, rtol=1e-4)  # a later token does not reach an earlier one
    wanted = [3, 1] if ends else [3]
    probabilities = model.logits(picture(), QUESTIONS[0], wanted).double().softmax(1)
    product = np.prod([float(probabilities[i, token]) for i, token in enumerate(wanted)])
    assert model.likelihood(picture(), QUESTIONS[0], "Yes") == pytest.approx(product ** (1 / len(wanted)), rel=1e-6)


def test_a_decoder_without_a_chat_template_is_refused(tmp_path):
    tiny_scorers.llava(tmp_path, template=None)
    with pytest.raises(UserError, match="no chat template"):
        load_vqa(find_scorer(str(tmp_path), "--vqa"), CPU, None)


@pytest.mark.parametrize("name", ["mask2former", "owl"])
@given(st.integers(0, 99), st.floats(0, 0.6))
@settings(deadline=None, max_examples=8)
def test_detectors_give_what_is_asked_for_the_surest_first(folders, name, seed, above):
    detector = load_detector(find_scorer(str(folders(name)), "--detector"), CPU)
    image = picture(seed)
    found = detector.detect(image, ["cat", "dog"], above)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    for each in found:
        assert each.label in ("cat", "dog")
        assert above < each.score <= 1
        left, top, right, bottom = each.box
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
        if each.mask is not None:
            rows, columns = np.nonzero(each.mask)
            assert each.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len(detector.detect(image, ["cat"], above)) <= len(found) or name == "owl"


def test_a_mask2former_knows_its_classes_alone(folders):
    detector = load_detector(find_scorer(str(folders("mask2former")), "--detector"), CPU)
    assert detector.detect(picture(), ["cat"], 0.0)
    with pytest.raises(UserError, match="does not know unicorn"):
        detector.detect(picture(), ["cat", "unicorn"], 0.0)


@pytest.mark.parametrize(("folder", "load"), [("clip", load_detector), ("clip", load_any_vqa), ("owl", CLIPScorer)])
def test_another_model_than_is_needed_is_refused(folders, folder, load):
    with pytest.raises(UserError, match=r"contains a clip|read from it|are missing"):
        load(find_scorer(str(folders(folder)), "--x"), CPU)


def test_clip_takes_the_class_whose_mean_is_nearest(folders):
    clip = CLIPScorer(find_scorer(str(folders("clip")), "--clip"), CPU)
    texts = [["a red cat", "red"], ["blue"], ["a dog that is pink", "x"]]
    images = [picture(seed) for seed in range(4)]
    centres = [sum(clip.texts([text])[0] for text in group) / len(group) for group in texts]
    cosines = [[float(clip.images([image])[0] @ centre / centre.norm()) for centre in centres] for image in images]
    assert clip.classify(images, texts) == [int(np.argmax(row)) for row in cosines]
    assert clip.similarity(images[0], "blue") == pytest.approx(cosines[0][1], abs=1e-6)
    assert -1 <= clip.similarity(images[0], "a " * 60) <= 1  # longer than its context
    assert clip.classify([], texts) == []


class Scripted:
    """A detector that says what it was told, and a CLIP that keeps what it was shown."""

    identity = {"kind": "mask2former"}  # noqa: RUF012

    def __init__(self, *found):
        self.found, self.shown, self.detector, self.clip = found, [], self, self

    def detect(self, image, classes, above):
        self.classes = classes
        return list(self.found)

    def classify(self, images, classes):
        self.shown, self.texts = images, classes
        return [3] * len(images)


def test_geneval_shows_clip_an_object_on_grey_and_speaks_cocos_names():
    mask = np.zeros((40, 56), dtype=bool)
    mask[10:20, 5:10] = True
    judge = Scripted(Detection("mouse", 0.9, (5.0, 10.0, 15.0, 20.0), mask), Detection("cat", 0.5, (0.0, 0.0, 5.0, 5.0)))
    clauses = [{"class": "computer mouse", "count": 1, "color": "green"}, {"class": "cat", "count": 1}]
    answer = geneval.ask(judge, BenchImage("x", "", (0,), {"include": clauses}), picture())
    assert judge.classes == ["mouse", "cat"]
    assert [each.get("color") for each in answer["objects"]] == ["green", None]
    (crop,) = judge.shown
    values = np.asarray(crop)
    assert (values[:, 5:] == 0x99).all()
    assert (values[:, :5] == np.asarray(picture())[10:20, 5:10]).all()
    assert judge.texts[0] == [
        "a photo of a red computer mouse",
        "a photo of a red-colored computer mouse",
        "a photo of a red object",
    ]


def test_inception_reads_safetensors_and_pth_and_nothing_else(tmp_path):
    with pytest.raises(UserError, match=r"no such file|pip install"):
        inception.Inception(tmp_path / "missing.pth", CPU)
    (tmp_path / "bad.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be read|pip install"):
        inception.Inception(tmp_path / "bad.pth", CPU)


def test_inception_gives_the_same_features_from_either_file(tmp_path):
    port = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    empty = object.__new__(port.FeatureExtractorInceptionV3)
    original = torch.load
    try:
        torch.load = lambda *_, **__: None
        port.FeatureExtractorInceptionV3.load_state_dict, kept = (lambda *_: None), torch.nn.Module.load_state_dict
        empty.__init__("x", ["2048"], "unread")
    finally:
        torch.load = original
        del port.FeatureExtractorInceptionV3.load_state_dict
    assert port.FeatureExtractorInceptionV3.load_state_dict is kept
    torch.save(empty.state_dict(), tmp_path / "w.pth")
    save_file(empty.state_dict(), tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == empty.state_dict().keys()
    first, second = (inception.Inception(tmp_path / name, CPU) for name in ("w.pth", "w.safetensors"))
    images = [picture(0), picture(1, (30, 70))]
    features = first.features(images)
    assert features.shape == (2, 2048)
    assert torch.equal(features, second.features(images))
    torch.testing.assert_close(features[1:], first.features(images[1:]))
    assert (features[0] - features[1]).abs().max() > 0
