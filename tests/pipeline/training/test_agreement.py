"""All ranks agree on the same answer at the same call; late, on that of the call before."""

import torch

from pipeline.training.agreement import Agreement
from tests.helpers.distributed import on_ranks
from tests.helpers.stream_tasks import agreed

WISHES = [(False, False), (True, False), (False, False), (False, True), (True, True), (False, False)]


def test_one_rank_has_its_own_answer_at_once():
    agreement = Agreement(torch.device("cpu"), world=1, late=True)
    assert [agreement.ask(wish) for wish in (False, True, False)] == [False, True, False]


def test_all_ranks_learn_of_any_yes_at_once_or_a_call_later_without_reading_the_last_collective():
    any_yes = [any(wishes) for wishes in WISHES]
    now = on_ranks(2, agreed, WISHES, False)
    late = on_ranks(2, agreed, WISHES, True)
    assert [answers for answers, _ in now] == [any_yes] * 2
    assert [answers for answers, _ in late] == [[False, *any_yes[:-1]]] * 2
    # The first call reads nothing, and so no call reads what it has just asked.
    assert [reads for _, reads in late] == [len(WISHES) - 1] * 2
