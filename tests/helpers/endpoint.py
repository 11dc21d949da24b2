"""A stub of an endpoint with OpenAI's chat protocol, on loopback, with faults on demand."""

import hashlib
import json
import threading
import time
from collections import Counter

from tests.helpers.stub_server import Stub

WORDS = ("red", "blue", "green", "small", "large", "round", "old", "house", "tree", "dog", "river", "boat")


def answer_to(question):
    """The caption of a question, by its image and prompt: some are refusals, loops or empty."""
    digest = hashlib.sha256(question.encode()).digest()
    match digest[0] % 8:
        case 0:
            return "I'm sorry, but I can't describe this image."
        case 1:
            return "a dog and a cat and " * 30
        case 2:
            return "  \n "
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[1:9]) + f" {digest[1:9].hex()}"


class Endpoint(Stub):
    """A running stub. `fault` returns, for the number of a request and its question, what goes wrong."""

    def __init__(self, fault=lambda number, question: "", delay=0.0):
        self.fault, self.delay = fault, delay
        self.requests, self.served = Counter(), Counter()
        self.bodies, self.headers = [], []
        self.running = self.most = 0
        self._lock = threading.Lock()
        super().__init__()
        self.url += "/v1"

    def handle(self, handler, body):
        body = json.loads(body)
        image, text = body["messages"][0]["content"]
        question = image["image_url"]["url"] + text["text"]
        with self._lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.requests[question] += 1
            number = sum(self.requests.values())
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            time.sleep(self.delay)
            self.answer(handler, self.fault(number, question), question)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.running -= 1

    def answer(self, handler, fault, question):
        text, finish = answer_to(question), "stop"
        message = {"role": "assistant", "content": text}
        match fault:
            case "slow":
                time.sleep(1.5)
            case "cut":
                return self.cut(handler)
            case "drip":
                handler.send_response(200)
                handler.send_header("Content-Length", "1000")
                handler.end_headers()
                for _ in range(100):
                    handler.wfile.write(b" ")
                    time.sleep(0.05)
                return
            case "huge":
                return self.send(handler, 200, b" " * (3 << 20))
            case "not json":
                return self.send(handler, 200, b"<html>Bad gateway</html>")
            case "wrong json":
                return self.send(handler, 200, b'{"choices": [{"message": {"content": 5}}]}')
            case "no choice":
                return self.send(handler, 200, b'{"choices": []}')
            case "deep":
                return self.send(handler, 200, b"[" * 100_000)
            case "withheld":
                message, finish = {"role": "assistant", "content": None, "refusal": "no"}, "stop"
            case "length":
                finish = "length"
            case "control":
                message["content"] = "a \x1b[31mred\x1b[0m house"
            case int():
                key = handler.headers.get("Authorization", "")
                text = json.dumps({"error": f"no \x1b[31m good: {key}"}).encode()
                return self.send(handler, fault, text, {"Retry-After": "0.01"} if fault == 429 else {})
        with self._lock:
            self.served[question] += 1
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        reply = {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}
        return self.send(handler, 200, json.dumps(reply).encode())
