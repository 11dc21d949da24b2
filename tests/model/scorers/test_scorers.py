"""Scorer models of the real classes with random weights return what their definitions say."""

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


def random_image(seed=0, size=(56, 40)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}

    def folder(name):
        if name not in paths:
            paths[name] = getattr(tiny_scorers, name)(tmp_path_factory.mktemp(name))
        return paths[name]

    return folder


@pytest.fixture(scope="module")
def vqa(folders):
    models = {}

    def load(name, side=None):
        if (name, side) not in models:
            models[name, side] = load_vqa(find_scorer(str(folders(name)), "--vqa"), CPU, side)
        return models[name, side]

    return load


@pytest.mark.parametrize("name", ["blip", "blip2", "llava"])
def test_the_answers_of_a_vqa_model_depend_only_on_image_and_question(vqa, name):
    model = vqa(name)
    both = model.yes(random_image(), QUESTIONS)
    assert all(0 < value < 1 for value in both)
    assert both == pytest.approx(
        [model.yes(random_image(), [question])[0] for question in QUESTIONS], abs=1e-5
    )
    assert abs(both[0] - model.yes(random_image(1), QUESTIONS)[0]) > 1e-6
    assert abs(both[0] - both[1]) > 1e-6
    assert [
        len(model.answers(random_image(), QUESTIONS)),
        model.yes(random_image(), []),
        model.answers(random_image(), []),
    ] == [2, [], []]
    assert all(answer == answer.lower() for answer in model.answers(random_image(), QUESTIONS))
    assert model.identity["revision"].startswith("sampled-sha256:")


def test_blips_first_answer_token_is_what_transformers_own_model_decodes(folders, vqa):
    """Generation by transformers starts with [DEC], too; the question starts with [ENC], as in training."""
    model, reference = vqa("blip"), BlipForQuestionAnswering.from_pretrained(folders("blip")).eval()
    pixels = model.processor(images=random_image(), return_tensors="pt").pixel_values
    question = model.tokenizer(QUESTIONS[0], return_tensors="pt")
    question.input_ids[:, 0] = model.start + 1
    step = {}
    reference.text_decoder.register_forward_hook(lambda *arguments: step.update(first=arguments[2].logits))
    reference.generate(question.input_ids, pixels, question.attention_mask, max_new_tokens=1)
    words = [model.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    expected = step["first"][0, -1].softmax(0)[words]
    assert model.yes(random_image(), QUESTIONS[:1])[0] == pytest.approx(
        float(expected[0] / expected.sum()), abs=1e-5
    )


def test_blip_sees_images_of_the_requested_size(vqa):
    assert vqa("blip", 48).identity["picture"] == "48x48"
    resized, whole = (vqa("blip", side).yes(random_image(), QUESTIONS)[0] for side in (48, None))
    assert abs(resized - whole) > 1e-7


@pytest.mark.parametrize(("name", "ends"), [("blip2", True), ("llava", False)])
def test_vqascore_is_the_geometric_mean_over_the_answers_tokens(vqa, name, ends):
    model = vqa(name)
    first = model.logits(random_image(), QUESTIONS[0], [3, 5])
    alone = model.logits(random_image(), QUESTIONS[0], [3])
    # A later token does not reach an earlier one.
    torch.testing.assert_close(first[:1], alone, atol=1e-5, rtol=1e-4)
    wanted = [3, 1] if ends else [3]
    probabilities = model.logits(random_image(), QUESTIONS[0], wanted).double().softmax(1)
    product = np.prod([float(probabilities[i, token]) for i, token in enumerate(wanted)])
    assert model.likelihood(random_image(), QUESTIONS[0], "Yes") == pytest.approx(
        product ** (1 / len(wanted)), rel=1e-6
    )


def test_a_decoder_without_a_chat_template_is_refused(tmp_path):
    tiny_scorers.llava(tmp_path, template=None)
    with pytest.raises(UserError, match="no chat template"):
        load_vqa(find_scorer(str(tmp_path), "--vqa"), CPU, None)


@pytest.mark.parametrize("name", ["mask2former", "owl"])
@given(st.integers(0, 99), st.floats(0, 0.6))
@settings(deadline=None, max_examples=8)
def test_detectors_return_the_requested_classes_by_falling_score(folders, name, seed, above):
    detector = load_detector(find_scorer(str(folders(name)), "--detector"), CPU)
    image = random_image(seed)
    detections = detector.detect(image, ["cat", "dog"], above)
    scores = [detection.score for detection in detections]
    assert scores == sorted(scores, reverse=True)
    for detection in detections:
        assert detection.label in ("cat", "dog")
        assert above < detection.score <= 1
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
        if detection.mask is not None:
            rows, columns = np.nonzero(detection.mask)
            assert detection.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len(detector.detect(image, ["cat"], above)) <= len(detections) or name == "owl"


def test_a_mask2former_knows_only_its_own_classes(folders):
    detector = load_detector(find_scorer(str(folders("mask2former")), "--detector"), CPU)
    assert detector.detect(random_image(), ["cat"], 0.0)
    with pytest.raises(UserError, match="does not know unicorn"):
        detector.detect(random_image(), ["cat", "unicorn"], 0.0)


@pytest.mark.parametrize(
    ("folder", "load"), [("clip", load_detector), ("clip", load_any_vqa), ("owl", CLIPScorer)]
)
def test_a_folder_with_another_kind_of_model_is_refused(folders, folder, load):
    with pytest.raises(UserError, match=r"contains a clip|read from it|are missing"):
        load(find_scorer(str(folders(folder)), "--x"), CPU)


def test_clip_takes_the_class_whose_mean_is_nearest(folders):
    clip = CLIPScorer(find_scorer(str(folders("clip")), "--clip"), CPU)
    texts = [["a red cat", "red"], ["blue"], ["a dog that is pink", "x"]]
    images = [random_image(seed) for seed in range(4)]
    centers = [sum(clip.texts([text])[0] for text in group) / len(group) for group in texts]
    cosines = [
        [float(clip.images([image])[0] @ center / center.norm()) for center in centers] for image in images
    ]
    assert clip.classify(images, texts) == [int(np.argmax(row)) for row in cosines]
    assert clip.similarity(images[0], "blue") == pytest.approx(cosines[0][1], abs=1e-6)
    assert -1 <= clip.similarity(images[0], "a " * 60) <= 1  # longer than its context
    assert clip.classify([], texts) == []


class Scripted:
    """A detector that returns the given detections, and a CLIP that records its inputs."""

    identity = {"kind": "mask2former"}  # noqa: RUF012

    def __init__(self, *detections):
        self.detections, self.shown, self.detector, self.clip = detections, [], self, self

    def detect(self, image, classes, above):
        self.classes = classes
        return list(self.detections)

    def classify(self, images, classes):
        self.shown, self.texts = images, classes
        return [3] * len(images)


def test_geneval_shows_clip_an_object_on_gray_and_uses_the_names_of_coco():
    mask = np.zeros((40, 56), dtype=bool)
    mask[10:20, 5:10] = True
    judge = Scripted(
        Detection("mouse", 0.9, (5.0, 10.0, 15.0, 20.0), mask), Detection("cat", 0.5, (0.0, 0.0, 5.0, 5.0))
    )
    clauses = [{"class": "computer mouse", "count": 1, "color": "green"}, {"class": "cat", "count": 1}]
    answer = geneval.ask(judge, BenchImage("x", "", (0,), {"include": clauses}), random_image())
    assert judge.classes == ["mouse", "cat"]
    assert [item.get("color") for item in answer["objects"]] == ["green", None]
    (crop,) = judge.shown
    values = np.asarray(crop)
    assert (values[:, 5:] == 0x99).all()
    assert (values[:, :5] == np.asarray(random_image())[10:20, 5:10]).all()
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
        original_load = torch.nn.Module.load_state_dict
        port.FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
        empty.__init__("x", ["2048"], "unread")
    finally:
        torch.load = original
        del port.FeatureExtractorInceptionV3.load_state_dict
    assert port.FeatureExtractorInceptionV3.load_state_dict is original_load
    torch.save(empty.state_dict(), tmp_path / "w.pth")
    save_file(empty.state_dict(), tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == empty.state_dict().keys()
    first, second = (inception.Inception(tmp_path / name, CPU) for name in ("w.pth", "w.safetensors"))
    images = [random_image(0), random_image(1, (30, 70))]
    features = first.features(images)
    assert features.shape == (2, 2048)
    assert torch.equal(features, second.features(images))
    torch.testing.assert_close(features[1:], first.features(images[1:]))
    assert (features[0] - features[1]).abs().max() > 0
