"""Captions by an endpoint that speaks OpenAI's chat protocol, such as those of vLLM and SGLang.

An endpoint is foreign: its answers are bounded in size and time, and checked before they are used. Faults
that may pass (429, 500, cut connections, answers that are not JSON) are retried like those of a store. The
key is read from the environment, sent to this endpoint only, and written nowhere.
"""

import asyncio
import base64
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NotRequired
from urllib.parse import urlsplit

import httpx
import tenacity
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.captioners.answers import FILTERED, NO_ANSWER, REFUSED
from data_prep.captioners.captioner import Answer, Question
from data_prep.model_settings import CaptionsConfig
from data_prep.store.faults import TransientError, retry_seconds
from model.common.errors import UserError, first_line
from model.common.records import OPEN, canonical_json, checked, parse_json

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 20
MAX_SHOWN = 300
"""Letters of an endpoint's error message that ours repeats."""
CONNECT_SECONDS = 10.0
MAX_WAIT_SECONDS = 30.0
MIN_REQUESTS = 3
"""Requests before a question is given up."""
MAX_REFUSED_SHARE = 0.5
"""Share of a part's questions that the endpoint can refuse before it counts as wrongly set up."""
MIN_REFUSED = 8

TRANSIENT = {408, 409, 425, 429}
REFUSING = {400, 413, 415, 422}
"""Status codes about a single question: an image that is too small, a text that a filter refuses."""
TYPES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}
"""First bytes of an image -> its media type."""


class _Message(TypedDict):
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    content: NotRequired[str | None]
    refusal: NotRequired[str | None]


class _Choice(TypedDict):
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    message: _Message
    finish_reason: NotRequired[str | None]


class _Usage(TypedDict):
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    prompt_tokens: NotRequired[int | None]
    completion_tokens: NotRequired[int | None]


class _Completion(TypedDict):
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    choices: list[_Choice]
    usage: NotRequired[_Usage | None]


class _Refused(Exception):
    """The endpoint takes this question under no circumstances."""


class EndpointCaptioner:
    """An endpoint, and the requests that are under way, in an event loop of a thread of its own."""

    def __init__(self, captions: CaptionsConfig) -> None:
        """Make the client; nothing is sent yet.

        Raises:
            UserError: if the address is none, or the key's variable is not set.
        """
        self._captions = captions
        self._url = _chat_url(captions.endpoint)
        self._key = _read_key(captions.api_key_variable)
        # Its own log has a line per request.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(captions.timeout_seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=captions.concurrency),
            # A redirection would take the key elsewhere.
            follow_redirects=False,
        )
        self._slots = asyncio.Semaphore(captions.concurrency)
        self._last_answer = 0.0
        """Time of the last answer to any question."""
        self._loop = asyncio.new_event_loop()
        # A daemon, so that nothing waits for an answer when the command ends with an error.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers, in the order of the questions; at most `concurrency` are asked at a time.

        Raises:
            UserError: if the endpoint does not answer at all, does not know the model or the key, or refuses
                most questions.
        """
        answers = asyncio.run_coroutine_threadsafe(self._ask_all(questions), self._loop).result()
        refused = [answer for answer in answers if answer.reason == FILTERED]
        if len(refused) >= max(MIN_REFUSED, MAX_REFUSED_SHARE * len(answers)):
            raise UserError(
                f"{self._url}: refuses {len(refused)} of {len(answers)} questions ({refused[0].text}): "
                "correct captions.model and the prompts, or the endpoint's settings"
            )
        return [answer._replace(text="") if answer.reason else answer for answer in answers]

    def close(self) -> None:
        """End all work; threads that still ask get an error."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        tasks = [asyncio.create_task(self._ask(question)) for question in questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # After an error, nobody needs the other answers.
            for task in tasks:
                task.cancel()

    async def _ask(self, question: Question) -> Answer:
        """Ask until there is an answer.

        If one question gets none while others do, it is its own fault, and it is given up.
        """
        # Questions wait here in the order in which they come, so an earlier part is complete first.
        async with self._slots:
            began, requests = time.monotonic(), 0
            try:
                async for attempt in _retrying():
                    with attempt:
                        requests += 1
                        answer = (await self._ask_once(question))._replace(requests=requests)
                        self._last_answer = time.monotonic()
                        return answer
            except _Refused as error:
                return Answer(str(error), FILTERED, requests=requests)
            except TransientError as error:
                if self._last_answer > began:
                    log.warning(
                        "%s: a question is given up after %d requests: %s", self._url, requests, error
                    )
                    return Answer("", NO_ANSWER, requests=requests)
                raise UserError(
                    f"{self._url}: {error} ({requests} requests in {time.monotonic() - began:.0f} s): check "
                    "that it runs, and run this again"
                ) from error
        raise AssertionError("the loop of tries ends by a return or an error")

    async def _ask_once(self, question: Question) -> Answer:
        """Send one request.

        Raises:
            TransientError: if it failed in a way that may pass.
            _Refused: if the endpoint refuses this question.
            UserError: if it refuses all of them.
        """
        body = canonical_json(self._body(question))
        try:
            # The client's own limit is for each read, so a few bytes now and then would keep it waiting.
            async with asyncio.timeout(self._captions.timeout_seconds):
                async with self._client.stream("POST", self._url, content=body) as response:
                    data = await _read(response)
        except (httpx.TransportError, httpx.StreamError, TimeoutError) as error:
            raise TransientError(f"{type(error).__name__}: {first_line(error)}"[:MAX_SHOWN]) from error

        status = response.status_code
        if status == httpx.codes.OK:
            return _parse(data)
        said = f"HTTP {status}: {self._shown(data)}"
        if status in TRANSIENT or status >= 500:
            raise TransientError(said, _asked_wait(response))
        if status in REFUSING:
            raise _Refused(said)
        raise UserError(f"{self._url}: {said}: correct captions.endpoint, captions.model or the key")

    def _shown(self, data: bytes) -> str:
        """Return the start of an error's body on one line, without the key, which some servers repeat."""
        text = " ".join(data.decode(errors="replace").split())
        text = text.replace(self._key, "(key)") if self._key else text
        return "".join(letter for letter in text if letter.isprintable())[:MAX_SHOWN]

    def _body(self, question: Question) -> dict[str, Any]:
        kind = TYPES.get(question.image[:2], "jpeg")
        image = f"data:image/{kind};base64,{base64.b64encode(question.image).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question.prompt},
        ]
        return {
            "model": self._captions.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": self._captions.temperature,
            "top_p": self._captions.top_p,
            # Servers take numbers of 32 bits.
            "seed": question.seed & 0x7FFFFFFF,
        }


def _chat_url(endpoint: str) -> str:
    """Return the address to send questions to.

    Raises:
        UserError: if it is no plain http address, or has a password in it.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"captions.endpoint={endpoint!r}: give an address such as http://localhost:8000/v1")
    if parts.username or parts.password:
        # Not repeated, since the message may be kept in a log.
        raise UserError(
            "captions.endpoint has a name or a password in it: leave it out, and name the variable with the "
            "key as captions.api_key_variable"
        )
    return f"{endpoint.rstrip('/')}/chat/completions"


def _read_key(variable: str) -> str:
    """Return the key in an environment variable; "" if none is named.

    Raises:
        UserError: if the variable is not set.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"captions.api_key_variable={variable}: the variable has no key: set it")
    return key


def _retrying() -> tenacity.AsyncRetrying:
    """Build the retry policy of a question: a store's, or what the endpoint asks for."""
    budget = retry_seconds()
    backoff = tenacity.wait_random_exponential(
        multiplier=min(1.0, budget / 40), max=min(MAX_WAIT_SECONDS, budget / 8)
    )

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(backoff(state), min(getattr(error, "wait_seconds", 0.0), budget / 10))

    return tenacity.AsyncRetrying(
        wait=wait,
        # One answer may take the whole budget.
        stop=tenacity.stop_all(tenacity.stop_after_delay(budget), tenacity.stop_after_attempt(MIN_REQUESTS)),
        retry=tenacity.retry_if_exception_type(TransientError),
        reraise=True,
    )


async def _read(response: httpx.Response) -> bytes:
    """Return the body.

    Raises:
        TransientError: if it is too large.
    """
    data = bytearray()
    # Without decoding, which could make gigabytes of a few bytes.
    async for chunk in response.aiter_raw(1 << 16):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise TransientError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    return bytes(data)


def _parse(data: bytes) -> Answer:
    """Return the answer in a response's body.

    Raises:
        TransientError: if it is not one: proxies in trouble answer 200 with a page of their own.
    """
    try:
        parse_json(data)  # bounds the depth
        completion: _Completion = checked(_Completion, data)
        choice = completion["choices"][0]
    except (ValueError, LookupError) as error:
        raise TransientError(f"not an answer: {first_line(error)}"[:MAX_SHOWN]) from error

    usage = completion.get("usage") or {}
    prompt_tokens, tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    finish = choice.get("finish_reason")
    if choice["message"].get("refusal") or finish == "content_filter":
        return Answer("", REFUSED, True, prompt_tokens, tokens)
    return Answer(choice["message"].get("content") or "", "", finish != "length", prompt_tokens, tokens)


def _asked_wait(response: httpx.Response) -> float:
    """Return the seconds that the endpoint asks to wait; 0 if it does not."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0  # a date, which needs a clock that agrees
