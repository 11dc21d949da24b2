"""Small benchmarks whose truth is known, a sampler that draws it, and judges that read it or, where there is
none, guess.

A true picture shows the number of its prompt as six squares, black or white. Judges read the number and
answer about that prompt; where the squares are anything else they guess, each answer from a hash of the
picture and the question.
"""

import csv
import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import torch

from model.scorers.detectors import Detection
from model.scorers.noun_phrases import Parsed
from pipeline.evaluation.geneval import COLORS
from tests.helpers.tiny_sampler import make_network, make_stage

ANIMALS = ("cat", "dog", "cow", "hen", "ant", "bee")
SEEN = ("red", "blue", "pink", "black")
PAIRS = list(itertools.permutations(ANIMALS, 2))[:24]
SLOTS = {"left": (0, 0, 6, 6), "right": (16, 0, 22, 6)}
SIDE = 8
DPG_COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
)
DPG_COLUMNS += ("question_natural_language",)


def geneval(folder):
    """Prompts of all six tags; the world is the metadata itself."""
    lines = []
    for number, (a, b) in enumerate(PAIRS):
        one, two, other = {"class": a, "count": 1}, {"class": a, "count": 2}, {"class": b, "count": 1}
        red, blue = {"color": SEEN[number % 4]}, {"color": SEEN[(number + 1) % 4]}
        lines.append([
            {"tag": "single_object", "include": [one], "prompt": f"{a} {number}"},
            {"tag": "two_object", "include": [one, other], "prompt": f"{a} and {b} {number}"},
            {"tag": "counting", "include": [two], "exclude": [{**one, "count": 3}],
             "prompt": f"two {a}s {number}"},
            {"tag": "colors", "include": [{**one, **red}], "prompt": f"one {a} {number}"},
            {"tag": "position", "include": [other, {**one, "position": ["left of", 0]}],
             "prompt": f"{a} left {b} {number}"},
            {"tag": "color_attr", "include": [{**one, **red}, {**other, **blue}],
             "prompt": f"both {a} {b} {number}"},
        ][number % 6])  # fmt: skip
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, {line["prompt"]: line for line in lines}


def dpg(folder):
    """Three questions per prompt, the second of which hangs on the first."""
    path = folder / "dpg_bench.csv"
    world = {"a ant 9": set()}
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(DPG_COLUMNS)
        rows.writerow(["0", "a ant 9", "", 1, "0", "", "", "entity - whole (ant)", "Is there a ant?"])
        for number, (a, b) in enumerate(PAIRS):
            text = f"a {a}, a {b} {number}"
            questions = [
                (1, "0", f"Is there a {a}?"),
                (2, "1", f"Is the {a} small?"),
                (3, "0", f"Is there a {b}?"),
            ]
            for ordinal, parent, asked in questions:
                rows.writerow(
                    [str(number + 1), text, "", ordinal, parent, "", "", "entity - whole (x)", asked]
                )
            world[text] = {asked for _, _, asked in questions}
    return path, world


def genai_bench(folder):
    texts = [f"a {a}, a {b} {number}" for number, (a, b) in enumerate(PAIRS)]
    (folder / "genai_image.json").write_text(
        json.dumps({f"{i:05d}": {"prompt": text} for i, text in enumerate(texts)})
    )
    skills = {"basic": list(range(12)), "advanced": list(range(12, 24)), "counting": [20, 21, 22, 23]}
    (folder / "genai_skills.json").write_text(json.dumps(skills))
    return folder, {text: text for text in texts}


def t2i_compbench(folder):
    color = [f"a {a}, a {b}" for a, b in PAIRS[:12]]
    place = [f"{a} on the left of {b}" for a, b in PAIRS[:12]]
    (folder / "color_val.txt").write_text("\n".join(color))
    (folder / "spatial_val.txt").write_text("\n".join(place))
    return folder, {text: text for text in (*color, *place)}


def fid(folder):
    texts = [f"a {a}, a {b}" for a, b in PAIRS]
    (folder / "captions.txt").write_text("\n".join(texts))
    return folder / "captions.txt", {text: text for text in texts}


WORLDS = {
    "geneval": geneval,
    "dpg": dpg,
    "genai_bench": genai_bench,
    "t2i_compbench": t2i_compbench,
    "fid": fid,
}


class Oracle:
    """Draws the truth: the number of the prompt."""

    def __init__(self, prompts):
        stage = make_stage()
        self.numbers = {prompt: number for number, prompt in enumerate(prompts, start=1)}
        self.network, self.defaults = make_network(stage.fusion), stage.sample
        reader = SimpleNamespace(read=lambda prompts, keep_llms: None)
        self.reader, self.partitioned = SimpleNamespace(of=lambda frames: reader), None

    def check(self, drawing):
        pass

    def resolve(self, drawing):
        return drawing

    def keep_pace(self, drawing):
        pass

    def evaluations(self, drawing):
        return 0

    def latents(self, prompts, seeds, drawing, on_step):
        return torch.tensor([self.numbers[prompt] for prompt in prompts])

    def pixels(self, numbers):
        bits = (numbers[:, None] >> torch.arange(6)) & 1
        squares = (bits.float() * 2 - 1).view(-1, 1, 2, 3)
        return squares.repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3).expand(-1, 3, -1, -1)


def squares(image):
    return np.asarray(image.convert("L"), dtype=float).reshape(2, SIDE, 3, SIDE).swapaxes(1, 2).reshape(6, -1)


def guess(image, *asked):
    """A number in [0, 1) that hangs on everything and on nothing else."""
    digest = hashlib.sha256(np.asarray(image).tobytes() + repr(asked).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Judges:
    """All scorer models at once."""

    identity = {"name": "judges", "revision": "of the test", "kind": "owl"}  # noqa: RUF012
    asked = 0

    def __init__(self, world):
        self.world = world
        self.prompts = list(world)

    def identities(self, needed):
        return dict.fromkeys(needed, self.identity)

    def read(self, image):
        """What a picture shows; None = nothing that could be read."""
        values = squares(image)
        if not ((values < 40) | (values > 215)).all():
            return None
        number = int(sum(bit << place for place, bit in enumerate(values.mean(1) > 127)))
        return self.prompts[number - 1] if 0 < number <= len(self.prompts) else None

    def yes(self, image, questions):
        shown = self.read(image)
        return [
            guess(image, each) if shown is None else float(each.rstrip("?") in shown) for each in questions
        ]

    def answers(self, image, questions):
        Judges.asked += 1
        shown = self.read(image)
        right = [
            guess(image, each) < 0.5 if shown is None else each in self.world[shown] for each in questions
        ]
        return ["yes" if each else "no" for each in right]

    def likelihood(self, image, question, answer):
        Judges.asked += 1
        shown = self.read(image)
        return guess(image, question) if shown is None else float(shown == question)

    def detect(self, image, classes, above):
        Judges.asked += 1
        shown = self.showing = self.read(image)
        if shown is None:  # each class is there or not, on either side
            there = [name for name in classes if guess(image, name) < 0.5]
            return [
                Detection(name, 0.95, SLOTS["left" if guess(image, name, "where") < 0.5 else "right"])
                for name in there
            ]
        if isinstance(self.world[shown], dict):
            found = []
            for clause in reversed(self.world[shown]["include"]):  # what stands to the left is named last
                for _ in range(clause["count"]):
                    found.append(
                        Detection(clause["class"], 1.0, (len(found) * 12.0, 0.0, len(found) * 12.0 + 6, 6.0))
                    )
            return [each for each in found if each.label in classes]
        left, right = shown.split(" on the left of ")
        return [Detection(left, 1.0, SLOTS["left"]), Detection(right, 1.0, SLOTS["right"])]

    def classify(self, crops, classes):
        """Colours, of the picture that was looked at last: a crop does not show whose it is."""
        name = classes[0][0].split()[-1]
        if self.showing is None:
            return [int(guess(crop, name) * len(COLORS)) for crop in crops]
        color = next(
            clause["color"] for clause in self.world[self.showing]["include"] if clause["class"] == name
        )
        return [COLORS.index(color)] * len(crops)

    def parse(self, prompt):
        words = tuple((word, "NOUN" if word in ANIMALS else "X") for word in prompt.replace(",", "").split())
        return Parsed(words, tuple(part.strip() for part in prompt.split(",")))

    def features(self, images):
        return torch.tensor(np.array([squares(image).mean(1) for image in images]), dtype=torch.float32)


def make_judges(world):
    """What stands for `ScorerModels`."""
    judges = Judges(world)
    roles = dict.fromkeys(("vqa", "detector", "clip", "phrases", "inception"), judges)
    return SimpleNamespace(**roles, question="{}", answer="Yes", identity=judges.identities)
