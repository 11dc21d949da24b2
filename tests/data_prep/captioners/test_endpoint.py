"""An endpoint in trouble: no question is lost, nothing is unbounded, and the key stays secret."""

import base64
import logging
import threading
import time
from contextlib import closing, contextmanager

import pytest

from data_prep.captioners.answers import FILTERED, NO_ANSWER, REFUSED
from data_prep.captioners.captioner import Question
from data_prep.captioners.endpoint import EndpointCaptioner
from data_prep.model_settings import CaptionsConfig, PromptConfig
from model.common.errors import UserError
from tests.helpers.endpoint import Endpoint, answer_to

KEY = "sk-secret-0123456789"
FAULTS = ("slow", "cut", "drip", "huge", "not json", "wrong json", "no choice", "deep", 429, 500, 503, 408)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "20")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VLM_KEY", KEY)


def settings(url, **changes):
    fields = {"model": "vlm", "endpoint": url, "concurrency": 8, "timeout_seconds": 1.0}
    return CaptionsConfig(prompts=[PromptConfig("long", "Describe.")], **{**fields, **changes})


@contextmanager
def captioner_of(fault=lambda number, question: "", delay=0.0, **changes):
    with (
        closing(Endpoint(fault, delay)) as stub,
        closing(EndpointCaptioner(settings(stub.url, **changes))) as captioner,
    ):
        yield stub, captioner


def questions(count):
    return [Question(b"\x89PNG %d" % number, "Describe.", 100, number) for number in range(count)]


def expected(stub, captioner, question):
    content = captioner._body(question)["messages"][0]["content"]
    return answer_to(content[0]["image_url"]["url"] + content[1]["text"])


def test_each_question_gets_its_own_answer_through_all_faults():
    """The first request of each question meets a fault, and its second one is answered."""
    seen, lock = {}, threading.Lock()

    def fault(_, question):
        with lock:
            if question in seen:
                return ""
            seen[question] = FAULTS[len(seen) % len(FAULTS)]
            return seen[question]

    with captioner_of(fault) as (stub, captioner):
        asked = questions(4 * len(FAULTS))
        answers = captioner.ask(asked)
        assert [answer.text for answer in answers] == [expected(stub, captioner, one) for one in asked]
        assert set(seen.values()) == set(FAULTS)
        assert min(answer.requests for answer in answers) == 2
        # A request that is cut early enough never reaches the stub.
        assert sum(answer.requests for answer in answers) >= sum(stub.requests.values())
        assert {(answer.prompt_tokens, answer.tokens) for answer in answers} == {(10, 5)}


def test_requests_are_as_many_as_allowed_and_no_more():
    with captioner_of(delay=0.05, concurrency=5) as (stub, captioner):
        # Two parts at a time.
        threads = [threading.Thread(target=captioner.ask, args=(questions(20),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stub.most == 5


def test_the_request_has_what_the_settings_say():
    with captioner_of(temperature=0.5, top_p=0.9, api_key_variable="VLM_KEY") as (stub, captioner):
        captioner.ask([Question(b"\xff\xd8jpeg", "Describe.", 77, 1 << 62)])
        (body,), (headers,) = stub.bodies, stub.headers
        assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == (
            "vlm",
            77,
            0.5,
            0.9,
        )
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert 0 <= body["seed"] < 1 << 31
        assert headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_an_endpoint_that_takes_no_question_ends_the_command_at_once(status, caplog):
    caplog.set_level(logging.DEBUG)
    with captioner_of(lambda *_: status, api_key_variable="VLM_KEY") as (stub, captioner):
        with pytest.raises(UserError, match=f"HTTP {status}") as caught:
            captioner.ask(questions(100))
        # The stub repeats the key and a control sequence in its error.
        assert KEY not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert KEY not in caplog.text
        assert sum(stub.requests.values()) <= 16


def test_an_endpoint_that_is_down_ends_the_command_after_the_retries(monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "0.5")
    nobody = settings("http://127.0.0.1:9/v1")
    with (
        closing(EndpointCaptioner(nobody)) as captioner,
        pytest.raises(UserError, match="check that it runs"),
    ):
        captioner.ask(questions(3))


def test_a_question_that_always_fails_is_given_up_if_others_are_answered(monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    bad = f"data:image/png;base64,{base64.b64encode(questions(5)[2].image).decode()}Describe."
    with captioner_of(
        lambda _, question: 500 if question == bad else "", delay=0.02, timeout_seconds=20.0
    ) as (_, captioner):
        answers = captioner.ask([*questions(5), *questions(80)[5:] * 6])
        assert answers[2].reason == NO_ANSWER
        assert answers[2].requests > 2
        assert all(not answer.reason for number, answer in enumerate(answers) if number != 2)


def test_refused_questions_are_dropped_one_by_one_but_not_all_of_them():
    with captioner_of(lambda number, question: 400 if number % 5 == 0 else "", concurrency=1) as (
        _,
        captioner,
    ):
        reasons = [answer.reason for answer in captioner.ask(questions(20))]
        assert reasons.count(FILTERED) == 4
        assert reasons.count("") == 16
    with captioner_of(lambda *_: 400) as (_, captioner), pytest.raises(UserError, match="refuses 20 of 20"):
        captioner.ask(questions(20))
    with captioner_of(lambda *_: "withheld") as (_, captioner):
        assert {answer.reason for answer in captioner.ask(questions(20))} == {REFUSED}


def test_closing_ends_what_is_under_way():
    with captioner_of(delay=30.0, timeout_seconds=60.0) as (_, captioner):
        failures = []

        def ask():
            try:
                captioner.ask(questions(4))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        captioner.close()
        thread.join(5)
        assert not thread.is_alive()
        assert failures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": "ftp://host/v1"}, "give an address"),
        ({"endpoint": "http://user:word@host/v1"}, "has a name or a password"),
        ({"endpoint": "http://host/v1?key=a"}, "give an address"),
        ({"api_key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY: the variable has no key"),
    ],
)
def test_wrong_settings(changes, message):
    url = changes.pop("endpoint", "http://host/v1")
    with pytest.raises(UserError, match=message) as caught:
        EndpointCaptioner(settings(url, **changes))
    assert "word" not in str(caught.value).replace("password", "")
