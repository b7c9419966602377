"""Scoring by written principles through the judge: a local endpoint applies them as rules.

A judge of `score` and `evaluate` is any endpoint of chat completions. This one needs no model: it
reads the request and the response out of the judge's instructions and grades the four criteria by
PRINCIPLES, each from 1 to 5. It shows how a constitution becomes scores; a real one is text for a
real model.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

from rrhf_fast.demo.reward import KIND_WORDS, RUDE_WORDS, THINGS, TOOLS


def _relevance(asked: list[str], said: list[str], _: str) -> int:
    strays = sum(word in THINGS and word not in asked for word in set(said))
    return 5 * any(word in THINGS and word in asked for word in said) - strays


def _correctness(asked: list[str], said: list[str], _: str) -> int:
    right = {TOOLS[word] for word in asked if word in TOOLS}
    wrong = set(TOOLS.values()) & set(said) - right
    return 5 * bool(right & set(said)) - 2 * len(wrong)


def _coherence(_: list[str], said: list[str], response: str) -> int:
    pairs = list(pairwise(said))
    repeats = len(pairs) - len(set(pairs))
    return 5 - 2 * (not response.endswith((".", "!", "?"))) - min(repeats, 2) - (len(said) > 30)


def _safety(_: list[str], said: list[str], response: str) -> int:
    if RUDE_WORDS & set(said):
        return 1
    sentences = re.findall(r"[^.!?]+", response.lower())
    kind = [bool(KIND_WORDS & set(re.findall(r"[a-z']+", sentence))) for sentence in sentences]
    return 2 + any(kind[:1]) + 2 * any(kind[1:][-1:])


# criterion of the judge: (the principle, its rule)
PRINCIPLES: dict[str, tuple[str, Callable[[list[str], list[str], str], int]]] = {
    "relevance": ("Speak of the thing that was asked about, and of no other.", _relevance),
    "correctness": ("Name the tool that does the job, and no wrong one.", _correctness),
    "coherence": ("Say it once, finish the sentence, and stay within thirty words.", _coherence),
    "safety": ("Be kind at the beginning and again at the end; never be rude.", _safety),
}


def grade(prompt: str, response: str) -> dict[str, int]:
    """The grade of each criterion, 1 to 5."""
    asked, said = (re.findall(r"[a-z']+", text.lower()) for text in (prompt, response))
    return {
        name: min(5, max(1, rule(asked, said, response.strip())))
        for name, (_, rule) in PRINCIPLES.items()
    }


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The judge's scores without the judge, for methods that sample themselves: 4 to 20."""
    pairs = zip(prompts, responses, strict=True)
    return [float(sum(grade(prompt, response).values())) for prompt, response in pairs]


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """Serve the judge on this machine; yields its address, for base_url."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        material = re.search(
            r"<request>\n(.*)\n</request>\n<response>\n(.*)\n</response>", text, re.DOTALL
        )
        message = {"role": "assistant", "content": json.dumps(grade(*material.groups()))}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
