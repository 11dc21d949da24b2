"""The formulas of the public benchmarks on answers worked out by hand, their quirks included."""

import base64
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.scorers.noun_phrases import Parsed
from pipeline.evaluation import dpg, fid, genai_bench, geneval, t2i_compbench, t2i_objects
from pipeline.evaluation.common import BenchImage, iou
from pipeline.evaluation.dpg import DPGRules
from pipeline.evaluation.genai_bench import GenAIRules
from pipeline.evaluation.geneval import GenEvalRules
from pipeline.evaluation.t2i_compbench import T2IRules


def thing(name, score=0.95, box=(0, 0, 10, 10), **more):
    return {"class": name, "score": score, "box": list(box), **more}


def include(name, count=1, **more):
    return {"class": name, "count": count, **more}


def correct(about, *objects, **rules):
    return geneval.is_correct({"tag": "x", **about}, objects, GenEvalRules(**rules))[0]


# GenEval


def test_geneval_thresholds_differ_for_counting_and_are_exclusive():
    about = {"include": [include("cat")]}
    assert correct(about, thing("cat", 0.31))
    assert not correct(about, thing("cat", 0.3))
    assert not correct({**about, "tag": "counting"}, thing("cat", 0.9))
    assert correct({**about, "tag": "counting"}, thing("cat", 0.91))


def test_geneval_counts_with_include_and_exclude():
    about = {"tag": "counting", "include": [include("cat", 2)], "exclude": [include("cat", 3)]}
    results = [
        correct(about, *[thing("cat", box=(20 * i, 0, 20 * i + 9, 9)) for i in range(n)]) for n in range(5)
    ]
    assert results == [False, False, True, False, False]
    # at most 16 of a class are looked at: 17 asked for can never be there, nor be excluded
    many = [thing("cat") for _ in range(20)]
    assert not correct({"include": [include("cat", 17)]}, *many)
    assert correct({"exclude": [include("cat", 17)]}, *many)
    assert correct({"include": [include("cat", 17)]}, *many, max_objects=20)


def test_geneval_looks_at_colours_of_the_surest_objects_alone():
    about = {"include": [include("cat", color="red")]}
    assert correct(about, thing("cat", 0.5, color="red"))
    assert not correct(about, thing("cat", 0.5, color="red"), thing("cat", 0.6, color="blue"))
    assert not correct(
        {"include": [include("cat", 2, color="red")]}, thing("cat", color="red"), thing("cat", color="blue")
    )


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-50, 0, -40, 10), {"left of"}),
        ((50, 0, 60, 10), {"right of"}),
        ((0, -50, 10, -40), {"above"}),
        ((0, 50, 10, 60), {"below"}),
        # offset (40, 40): shortened by 0.1 * 20 to 38, 38 / 56.57 = 0.672 on both axes
        ((40, 40, 50, 50), {"right of", "below"}),
        # offset (40, 15): 38 / 42.72 and 13 / 42.72 = 0.30
        ((40, 15, 50, 25), {"right of"}),
        # offset (2, 0) is no longer than 0.1 * (10 + 10)
        ((2, 0, 12, 10), set()),
        # offset (4, 0): 2 / 4 is not above 0.5
        ((4, 0, 14, 10), set()),
        ((0, 0, 10, 10), set()),
    ],
)
def test_geneval_positions(box, expected):
    assert geneval.positions(box, (0, 0, 10, 10), 0.1) == expected


def test_geneval_position_needs_its_target():
    about = {"include": [include("dog"), include("cat", position=["left of", 0])]}
    cat, dog = thing("cat"), thing("dog", box=(50, 0, 60, 10))
    assert correct(about, cat, dog)
    assert not correct(about, cat)
    assert not correct(about, thing("cat", box=(90, 0, 99, 10)), dog)
    assert not correct(
        {"include": [include("dog", color="red"), include("cat", position=["left of", 0])]}, cat, dog
    )


def test_geneval_overlap_is_published_as_off():
    about = {"exclude": [include("cat", 2)]}
    pair = [thing("cat", 0.9), thing("cat", 0.8, (0, 0, 10, 9))]
    assert not correct(about, *pair)
    assert correct(about, *pair, max_overlap=0.5)
    assert iou((0, 0, 10, 10), (0, 0, 10, 9), pixel=1) == pytest.approx(110 / 121)


def test_geneval_overall_is_the_mean_over_tags():
    one = {"tag": "single", "prompt": "a", "include": [include("cat")]}
    two = {"tag": "two", "prompt": "b", "include": [include("cat"), include("dog")]}
    pictures = [BenchImage(f"{i}", "", (i,), one if i < 3 else two) for i in range(4)]
    answers = {"0": [thing("cat")], "1": [], "2": [], "3": [thing("cat"), thing("dog")]}
    scores = geneval.score(
        pictures, {key: {"objects": value} for key, value in answers.items()}, GenEvalRules()
    )
    assert scores["tags"] == {"single": pytest.approx(1 / 3), "two": 1.0}
    assert scores["overall"] == pytest.approx(2 / 3)
    assert scores["images"] == 0.5
    assert scores["prompts_any_image"] == 1.0


# DPG-Bench


def question(number, parents=(0,), row=9, category="entity - whole"):
    return {
        "id": number,
        "parents": list(parents),
        "row": row,
        "category": category,
        "question": f"q{number}",
    }


def test_dpg_takes_the_points_of_children():
    assert dpg.gate({1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}, {1: [0], 2: [1], 3: [2], 4: [0]}) == {
        1: 0,
        2: 0,
        3: 0,
        4: 1,
    }
    # in the order of the questions: 1 sees 2 before it falls
    assert dpg.gate({1: 1.0, 2: 1.0, 3: 0.0}, {1: [2], 2: [3], 3: [0]}) == {1: 1, 2: 0, 3: 0}


def test_dpg_means_over_cells_and_counts_only_yes():
    questions = [question(1), question(2, (1,)), question(3, (1, 2))]
    cells = [["yes", "yes", "yes"], ["yes", "no", "yes"], ["no", "yes", "yes"], ["yes", "yes", "yes, it is"]]
    value, points = dpg.score_prompt(questions, cells, DPGRules())
    assert value == pytest.approx((1 + 1 / 3 + 0 + 2 / 3) / 4)
    assert points == [
        ("entity - whole", 1.0),
        ("entity - whole", 1.0),
        ("entity - whole", 0.0),
    ]  # the last cell, as answered
    _, gated = dpg.score_prompt(questions, cells, DPGRules(raw_categories=False))
    assert [value for _, value in gated] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]


def test_dpg_skips_the_first_row_and_drops_a_prompt_that_needs_it():
    questions = [question(1, row=0), question(2, (1,), row=1)]
    assert dpg.score_prompt(questions, [["yes", "yes"]], DPGRules()) is None
    assert dpg.score_prompt(questions, [["no", "yes"]], DPGRules(drop_failed=False))[0] == 1.0
    assert dpg.score_prompt(questions, [["no", "yes"]], DPGRules(skip_first_row=False))[0] == 0.0
    independent = [question(1, row=0), question(2, row=1)]
    assert dpg.score_prompt(independent, [["no", "yes"]], DPGRules())[0] == 1.0
    assert dpg.score_prompt([question(1, row=0)], [["yes"]], DPGRules()) is None


def test_dpg_overall_and_categories():
    pictures = [
        BenchImage("a.png", "", (0,), {"questions": [question(1, row=0), question(2, (1,), row=1)]}),
        BenchImage(
            "b.png", "", (0,), {"questions": [question(1), question(2, (1,), category="attribute - color")]}
        ),
        BenchImage("c.png", "", (0,), {"questions": [question(1, category="attribute - shape")]}),
    ]
    answers = {
        name: {"cells": [cell]}
        for name, cell in {"a.png": ["yes"] * 2, "b.png": ["no", "yes"], "c.png": ["yes"]}.items()
    }
    scores = dpg.score(pictures, answers, DPGRules())
    assert scores["left_out"] == ["a"]
    assert scores["overall"] == 50.0
    assert scores["categories"] == {
        "entity": 0.0,
        "attribute": 100.0,
    }  # the child's own answer, though its parent is wrong
    assert scores["categories_fine"] == {
        "attribute - color": 100,
        "attribute - shape": 100,
        "entity - whole": 0,
    }
    kept = dpg.score(pictures, answers, DPGRules(skip_first_row=False, raw_categories=False))
    assert kept["overall"] == pytest.approx(200 / 3)
    assert kept["categories"]["attribute"] == 50.0


# T2I-CompBench


@pytest.mark.parametrize(
    ("yes", "rules", "expected"),
    [
        ([0.5, 0.5], T2IRules(), 0.25),
        ([], T2IRules(), 1.0),
        ([0.12345, 1.0], T2IRules(), 0.1235),  # rounded before the product
        ([0.33333, 0.33333], T2IRules(), 0.1111),  # 0.3333 ** 2 = 0.11108889, rounded after it
        ([0.33333, 0.33333], T2IRules(decimals=-1), 0.33333**2),
        ([0.5] * 8 + [0.0] * 3, T2IRules(), 0.0039),  # eight chunks count
    ],
)
def test_t2i_attribute_is_a_product_with_four_decimals(yes, rules, expected):
    assert t2i_compbench.attribute({"yes": yes}, rules) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("relation", "a", "b", "expected"),
    [
        ("on the left of", (0, 0, 10, 10), (50, 0, 60, 10), 1.0),
        ("on the right of", (0, 0, 10, 10), (50, 0, 60, 10), 0.0),
        ("on the right of", (50, 0, 60, 10), (0, 0, 10, 10), 1.0),
        ("on the top of", (0, 0, 10, 10), (0, 50, 10, 60), 1.0),
        ("on the bottom of", (0, 50, 10, 60), (0, 0, 10, 10), 1.0),
        ("on the left of", (0, 0, 10, 10), (50, 50, 60, 60), 0.0),  # no axis dominates
        ("on the left of", (0, 0, 10, 10), (5, 0, 15, 10), 0.1 / (50 / 150)),  # IoU 1/3
        ("on top of", (0, 0, 10, 10), (0, 50, 10, 60), 0.0),
        (None, (0, 0, 10, 10), (0, 50, 10, 60), 0.0),
        ("near", (0, 0, 10, 10), (149, 300, 159, 310), 1.0),  # near along one axis is near
        ("next to", (0, 0, 10, 10), (200, 300, 210, 310), 0.5),
    ],
)
def test_t2i_places(relation, a, b, expected):
    assert t2i_objects.score_position(relation, a, b, 1.0, 150.0) == pytest.approx(expected)


def test_t2i_distances_are_in_the_detectors_pixels():
    assert t2i_objects.detector_scale(479, 479) == 1
    assert t2i_objects.detector_scale(1024, 1024) == 479 / 1024
    assert t2i_objects.detector_scale(960, 480) == 0.5
    far = ((0, 0, 10, 10), (200, 300, 210, 310))
    assert t2i_objects.score_position("near", *far, 0.25, 150.0) == 1.0


def spatial(prompt, *found, size=(479, 479), **rules):
    answer = {"objects": ["cat", "dog"], "found": list(found), "size": list(size)}
    return t2i_compbench.spatial(prompt, answer, T2IRules(**rules))


def test_t2i_spatial_weighs_confidence_and_place_and_has_a_floor():
    cat, dog = thing("cat", 0.8), thing("dog", 0.6, (50, 0, 60, 10))
    prompt = "a cat on the left of a dog"
    assert spatial(prompt, cat, dog) == pytest.approx(0.2 + 0.15 + 0.5)
    assert spatial(prompt, cat) == 0.0  # 0.2
    assert spatial(prompt, cat, spatial_floor=0.0) == pytest.approx(0.2)
    assert spatial("a cat on the right of a dog", cat, dog, spatial_floor=0.0) == pytest.approx(0.35)
    assert spatial("a cat on the right of a dog", cat, dog) == 0.0
    assert spatial(prompt, cat, thing("dog", 0.5, (50, 0, 60, 10))) == 0.0  # not above the confidence
    below = thing("dog", 0.6, (0, 50, 10, 60))
    assert spatial("a cat on top of a dog", cat, below) == 0.0  # parsed, without a branch
    assert spatial("a cat on top of a dog", cat, below, on_top_of=True) == pytest.approx(0.85)
    assert spatial("a cat on the top of a dog", cat, below) == pytest.approx(0.85)


def parsed(text, chunks=()):
    words = [tuple(word.split("/")) if "/" in word else (word, "X") for word in text.split()]
    return Parsed(tuple(words), tuple(chunks))


def test_t2i_objects_of_prompts():
    simple = parsed("a cat/NOUN on the left of a big/ADJ dog/NOUN")
    assert t2i_objects.first_and_last_noun(simple) == ["cat", "dog"]
    assert t2i_objects.first_and_last_noun(parsed("near")) == []
    around = t2i_objects.nouns_around_preposition
    assert around(parsed("the red/ADJ vase/NOUN is next to a Ferrari/PROPN .")) == ["vase", "Ferrari"]
    assert around(parsed("a cat/NOUN is near a dog/NOUN and on top of a box/NOUN")) == []
    assert around(parsed("a cat/NOUN is on the left of a dog/NOUN")) == ["cat", "dog"]
    assert t2i_compbench.without_adjectives(simple) == "a cat on the left of a dog"
    assert t2i_compbench.clean_question("A red, round apple") == "a red, round apple?"
    assert t2i_compbench.clean_question('the "Moon!"') == "the moon?"
    assert [t2i_objects.detector_name(name) for name in ("girl", "ship", "cat")] == ["person", "boat", "cat"]


NAMES = [["cat", "cats"], ["hot dog", "hot dogs"], ["sheep", "sheep"]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two cats and a hot dog there", (["cat", "hot dog"], [2, 1])),
        ("three hot dogs and a cat", (["hot dog", "cat"], [3, 1])),
        ("a sheep and four sheep", (["sheep", "sheep"], [1, 4])),
        ("a cats and two sheep", (["cat", "sheep"], [2])),  # an article has no number: the next one moves up
        ("blue sky", ([], [])),
    ],
)
def test_t2i_counted_objects_of_prompts(prompt, expected):
    assert t2i_objects.count_objects(parsed(prompt), NAMES) == expected


def test_t2i_numeracy_gives_half_for_presence_and_half_for_the_number():
    boxes = [(0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)]

    def value(objects, numbers, *found):
        return t2i_compbench.numeracy(
            {"objects": objects, "numbers": numbers, "found": list(found)}, T2IRules()
        )

    two = [thing("cat", box=box) for box in boxes[:2]]
    assert value(["cat"], [2], *two) == 1.0
    assert value(["cat"], [3], *two) == 0.5
    assert value(["cat", "dog"], [2, 1], *two) == 0.5
    assert value(["cat"], [2], *two, thing("cat", 0.9, (0, 0, 10, 9.5))) == 1.0  # the third lies in the first
    assert value(["cat"], [2], *two, thing("cat", 0.5, boxes[2])) == 1.0  # not sure enough
    assert value(["dog"], [1], thing("hot dog")) == 1.0  # a class whose name holds the object's
    assert value([], []) == 0.0


def test_t2i_complex_is_the_mean_of_its_parts_and_overall_that_of_the_attributes():
    found = [thing("cat", 1.0), thing("dog", 1.0, (50, 0, 60, 10))]
    answer = {"yes": [0.5], "similarity": 0.3, "objects": ["cat", "dog"], "found": found, "size": [479, 479]}
    prompt = "a cat on the left of a dog"
    value = {
        p: t2i_compbench.complex_score(prompt, p, answer, T2IRules()) for p in ("spatial", "action", "all")
    }
    assert value == {"spatial": pytest.approx(0.75), "action": pytest.approx(0.4), "all": pytest.approx(0.6)}
    names = ["color", "shape", "texture", "non_spatial"]
    pictures = [BenchImage(name, "", (0,), {"category": name}) for name in names]
    answers = {name: {"yes": [0.1 * i]} for i, name in enumerate(names, start=1)} | {
        "non_spatial": {"similarity": 0.9}
    }
    scores = t2i_compbench.score(pictures, answers, T2IRules())
    assert scores["overall"] == pytest.approx(0.2)
    assert scores["categories"]["non_spatial"] == 0.9


# GenAI-Bench


def test_genai_skills_and_their_union():
    skills = [["basic", "attribute"], ["basic"], ["advanced", "counting"], []]
    pictures = [
        BenchImage(f"{i}.jpeg", "", (0,), {"id": str(i), "skills": each}) for i, each in enumerate(skills)
    ]
    answers = {f"{i}.jpeg": {"vqascore": value} for i, value in enumerate((0.2, 0.6, 0.7, 1.0))}
    scores = genai_bench.score(pictures, answers, GenAIRules())
    assert scores["overall"] == pytest.approx(0.5)  # the prompt without a skill is in none of the sums
    assert scores["skills"] == pytest.approx(
        {"basic": 0.4, "attribute": 0.2, "advanced": 0.7, "counting": 0.7}
    )
    assert scores["deviation"]["basic"] == pytest.approx(math.sqrt(0.08))  # over n - 1
    assert genai_bench.score(pictures, answers, GenAIRules(untagged=True))["overall"] == pytest.approx(0.625)


def test_genai_images_of_a_prompt_are_averaged_first():
    pictures = [
        BenchImage(file, "", (0,), {"id": key, "skills": ["basic"]})
        for file, key in (("a", "0"), ("b", "0"), ("c", "1"))
    ]
    answers = {file: {"vqascore": value} for file, value in (("a", 0.0), ("b", 1.0), ("c", 1.0))}
    assert genai_bench.score(pictures, answers, GenAIRules())["overall"] == 0.75


# FID


@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.5, 2))
@settings(deadline=None, max_examples=15)
def test_fid_of_a_shift_and_a_scale_is_known(seed, shift, scale):
    a = np.random.default_rng(seed).normal(size=(40, 5))
    assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(a, a + shift) == pytest.approx(5 * shift**2, abs=1e-9)
    # covariance C and s^2 C: (1 - s)^2 tr C; the means differ by (1 - s) m
    expected = (1 - scale) ** 2 * (np.trace(np.cov(a.T)) + (a.mean(0) ** 2).sum())
    assert fid.frechet_distance(a, a * scale) == pytest.approx(expected, abs=1e-8)
    assert fid.frechet_distance(a * scale, a) == pytest.approx(expected, abs=1e-8)


def test_fid_of_covariances_that_do_not_commute_is_that_of_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)),
        rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 1,
    )
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fid_reads_features_from_answers():
    values = np.random.default_rng(0).normal(size=(8, 3)).astype("<f4")
    answers = {
        str(i): {"features": base64.b64encode(value.tobytes()).decode()} for i, value in enumerate(values)
    }
    pictures = [BenchImage(str(i), "", (), {"reference": True} if i >= 4 else {}) for i in range(8)]
    scores = fid.score(pictures, answers, fid.FIDRules())
    assert scores["overall"] == pytest.approx(
        fid.frechet_distance(values[:4].astype(float), values[4:].astype(float))
    )
    assert (scores["drawn"], scores["reference"]) == (4, 4)
