"""Answers of a vision-language model: cleaned like all captions, or refused with a reason."""

import re
from collections.abc import Sequence

from data_prep.plan.captions import Cleaned, clean_caption

RULES = 1
"""Version of the rules below, part of a family's identity: with other rules other captions are left."""

REFUSED = "answer: refused by the model"
REPEATS = "answer: repeats itself"
EQUAL = "answer: equal to another caption of the image"
CUT = "answer: cut at max_tokens"
FILTERED = "answer: refused by the endpoint"
NO_ANSWER = "answer: none from the endpoint"
LONG = "answer: over max_letters"

REFUSAL = re.compile(
    r"\W*(?:"
    r"(?:i'm|i am) (?:really |very |so )?(?:sorry|unable|not able|afraid)\b"
    r"|(?:sorry|apologies)\b|i apologi[sz]e\b|unfortunately,? i\b"
    r"|i (?:cannot|can't|can not|won't|don't see|do not see|could not|couldn't)\b"
    r"|as an ai\b|as a (?:large )?language model\b"
    r"|(?:there is|i see) no image\b|no image (?:was|is|has been)\b"
    r"|please (?:provide|upload|share|attach) (?:the|an|your|a)\b)",
    re.IGNORECASE,
)
"""Starts of an answer that describes no image. A caption may quote these words later."""

MIN_WORDS = 24
"""Words from which on an answer is tested for repetition by words; shorter ones by letters."""
MIN_LETTERS = 120
WORDS_OF_A_RUN, LETTERS_OF_A_RUN = 4, 12
MIN_NEW_RUNS = 0.5
"""Share of the runs of words that have to be different ones."""


def judge_answer(text: str, is_complete: bool, max_letters: int, refusals: Sequence[str]) -> Cleaned:
    """Return an answer as a caption on one line, or the reason why it is none.

    Args:
        text: the answer.
        is_complete: False if it was cut.
        max_letters: letters that a caption can have.
        refusals: more starts of refusals, in any case.
    """
    cleaned = clean_caption(text)
    if cleaned.reason:
        return cleaned

    plain = cleaned.text.replace("’", "'")
    starts = tuple(start.casefold() for start in refusals)
    if REFUSAL.match(plain) or (starts and plain.casefold().startswith(starts)):
        return Cleaned("", REFUSED)
    # Before the length: an answer that turns in circles is also cut.
    if repeats_itself(cleaned.text):
        return Cleaned("", REPEATS)
    if not is_complete:
        return Cleaned("", CUT)
    if len(cleaned.text) > max_letters:
        return Cleaned("", LONG)
    return cleaned


def repeats_itself(text: str) -> bool:
    """True if more than half of the runs of words occur before in the text."""
    units: Sequence[str] = text.casefold().split()
    size = WORDS_OF_A_RUN
    # Some scripts have no spaces between words.
    if len(units) < MIN_WORDS:
        units, size = text.casefold(), LETTERS_OF_A_RUN
        if len(units) < MIN_LETTERS:
            return False

    runs = [tuple(units[place : place + size]) for place in range(len(units) - size + 1)]
    return len(set(runs)) < MIN_NEW_RUNS * len(runs)
