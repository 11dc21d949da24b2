"""Captions families: what a vision-language model says about the images of the committed pairs."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash
from PIL import Image

from data_prep.captioners.answers import EQUAL, judge_answer
from data_prep.captioners.captioner import Answer, Captioner, Question
from data_prep.captioners.choice import captioner_identity, open_captioner
from data_prep.dataset.parts import committed_parts, read_commit, read_plan, register_family
from data_prep.dataset.rollups import write_committed
from data_prep.dataset.schema import CAPTIONS, PAIRS, Commit, Family, Part
from data_prep.engines import Do, Outcome, Step, run
from data_prep.families.encode import commit_rows
from data_prep.families.generated import to_row
from data_prep.images.images import encode_image
from data_prep.model_settings import CaptionsConfig, PromptConfig
from data_prep.pairs.pairs import Pair, read_clip, read_pairs
from data_prep.sources.sample import printable
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.share import Share

IN_FLIGHT = 2
"""Parts whose questions are asked at the same time: the last answers of one part leave room for those of the
next."""
MAX_DROPPED_TEXT = 200
"""Letters stored of an answer that is no caption."""
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
"""An answer that is one quotation."""


def captions_family(captions: CaptionsConfig) -> Family:
    """Return the family that the settings describe.

    Raises:
        UserError: if the model's folder does not exist, or it cannot be downloaded.
    """
    return Family(captions.name, CAPTIONS, captioner_identity(captions), {"kinds": captions.kinds})


class CaptionsStep(Step):
    """The captions of a dataset's parts; the units are their names."""

    noun = "parts"
    overlap = IN_FLIGHT

    def __init__(self, captions: CaptionsConfig, dataset: Store, family: Family) -> None:
        """Ask nothing yet.

        Args:
            captions: the family's settings.
            dataset: the dataset's store.
            family: the family, as returned by `register_family`.
        """
        self.title = family.name
        self.captions = captions
        self.dataset = dataset
        self.family = family
        plan = read_plan(dataset)
        self.units = [str(part) for part in plan.parts]
        self._caption_kinds = plan.caption_kinds

    @property
    def gpus(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """GPUs of a worker: none if the model runs behind an endpoint."""
        return 0 if self.captions.endpoint else 1

    def missing(self) -> set[str]:
        """Return the parts without captions."""
        return set(self.units) - {str(part) for part in committed_parts(self.dataset, self.title)}

    def exists(self, unit: str) -> bool:
        """True if a part has captions."""
        return self.dataset.exists(Part.parse(unit).commit_key(self.title))

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Load the model, or open the endpoint; once per worker.

        Raises:
            UserError: if there is no such model or endpoint.
        """
        with closing(open_captioner(self.captions)) as captioner:
            yield lambda units: self._do_all(captioner, units)

    def _do_all(self, captioner: Captioner, units: Sequence[str]) -> Iterator[Outcome]:
        """Do some parts, `IN_FLIGHT` at a time; those without pairs are notes."""
        made: list[Commit] = []
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            work = {pool.submit(self.do, captioner, Part.parse(unit)): unit for unit in units}
            try:
                for future in as_completed(work):
                    commit = future.result()
                    if commit is None:
                        yield Outcome(notes=[work[future]])
                        continue
                    made.append(commit)
                    yield Outcome(Counter(captioned=1))
            except BaseException:
                # The threads of the pool would wait for their answers.
                captioner.close()
                raise
            finally:
                for future in work:
                    future.cancel()
        write_committed(self.dataset, self.family.name, made)

    def do(self, captioner: Captioner, part: Part) -> Commit | None:
        """Caption one part, and commit it; a part that another task commits meanwhile stays as it is.

        Returns:
            The commit; None if the part has no pairs yet.

        Raises:
            UserError: if the captioner does not work.
        """
        start = time.perf_counter()
        try:
            commit = read_commit(self.dataset, PAIRS, part)
        except FileNotFoundError:
            return None
        pairs = read_pairs(self.dataset, commit, self._caption_kinds)
        questions = [question for pair in pairs for question in self._questions(pair)]
        answers = captioner.ask(questions)

        rows, counts = [], Counter[str]()
        each = len(self.captions.prompts)
        for number, pair in enumerate(pairs):
            rows.append(self._row(pair, answers[number * each : (number + 1) * each], counts))
        counts.update(_costs(answers))
        ids = [pair.id for pair in pairs]
        seconds = {"seconds": time.perf_counter() - start}
        with TemporaryDirectory(prefix="li-dit-") as folder:
            return commit_rows(
                self.dataset, self.family, part, ids, rows, {**counts, **seconds}, Path(folder)
            )

    def _questions(self, pair: Pair) -> Iterator[Question]:
        image = pair.image
        if pair.frames > 1:
            # Of a clip, the frame in its middle.
            image = encode_image(Image.fromarray(read_clip(pair)[pair.frames // 2]), "png", 0)
        for number, prompt in enumerate(self.captions.prompts):
            text = prompt.text.replace("{caption}", pair.captions[0][1] if pair.captions else "")
            yield Question(image, text, prompt.max_tokens, self._seed(pair.id, number))

    def _seed(self, id: int, prompt: int) -> int:
        """Return the seed of an answer, below 2^63."""
        return xxhash.xxh64_intdigest(f"{self.captions.seed} {id} {prompt}") >> 1

    def _row(self, pair: Pair, answers: Sequence[Answer], counts: "Counter[str]") -> dict[str, object]:
        """Return a pair's row, and count its captions and dropped answers."""
        captions: list[tuple[str, str]] = []
        dropped: list[tuple[str, str, str]] = []
        for prompt, answer in zip(self.captions.prompts, answers, strict=True):
            text, reason = self._judge(prompt, answer, captions)
            if reason:
                dropped.append((prompt.kind, reason, printable(answer.text[:MAX_DROPPED_TEXT])))
                counts[f"dropped {reason}"] += 1
            else:
                captions.append((prompt.kind, text))
                counts[f"captions {prompt.kind}"] += 1
                counts["letters"] += len(text)
        if not captions:
            counts["images without a caption"] += 1
        return to_row(pair.id, captions, dropped)

    def _judge(
        self, prompt: PromptConfig, answer: Answer, before: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        """Return an answer's caption, or the reason why it is none."""
        if answer.reason:
            return "", answer.reason
        quoted = QUOTED.fullmatch(answer.text.strip())
        text = (quoted[1] or quoted[2] or "") if quoted else answer.text
        settings = self.captions
        text, reason = judge_answer(text, answer.is_complete, settings.max_letters, settings.refusals)
        if not reason and (prompt.kind, text) in before:
            return "", EQUAL
        return text, reason


def run_captions(captions: CaptionsConfig, dataset: Store, share: Share) -> None:
    """Caption the parts of a share that have no captions; running it again does only what is missing.

    Raises:
        UserError: if the model or the endpoint does not work, a family of this name was made in another way,
            or parts of the share have no pairs yet (all others are captioned before).
    """
    family = register_family(dataset, captions_family(captions), None)
    step = CaptionsStep(captions, dataset, family)
    without_pairs = run(step, share).notes
    # All other parts have captions by now: another run has only these left to do.
    if without_pairs:
        raise UserError(
            f"{dataset.uri}: {len(without_pairs)} of {len(share.owns(step.units))} parts of this task have "
            f"no pairs yet ({min(without_pairs)} is the first): finish `python -m data_prep pairs`, then run "
            "this again"
        )


def _costs(answers: Sequence[Answer]) -> dict[str, int]:
    """Return what some answers cost."""
    return {
        "answers": len(answers),
        "requests": sum(answer.requests for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
    }
