"""An HTTP server on loopback with OpenAI's two completion calls and the faults of real servers.

`python openai_server.py LOG PORT [MODEL]` prints its port (0: any) and answers until it is killed.
The model's name in a request selects the behaviour. LOG receives every answered request,
LOG.refused the answers to requests refused for their form, LOG.adapters those that were loaded.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

THOUGHT = {"role": "assistant", "reasoning_content": "hmm, let me think"}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}]
# Answers of the models of these names to prompts that contain "hard": a message and its
# finish_reason, or a whole body.
ODD = {
    "null": ({"content": None}, "stop"),
    "no-content": ({"role": "assistant"}, "stop"),
    "no-parts": ({"content": []}, "stop"),
    "image": ({"content": [{"type": "image_url", "image_url": {"url": "a"}}]}, "stop"),
    "number": ({"content": 7}, "stop"),
    "refusal": ({"content": None, "refusal": "I can't help with that."}, "stop"),
    "refusal-part": ({"content": [{"type": "refusal", "refusal": "I can't."}]}, "stop"),
    "filter": ({"content": None}, "content_filter"),
    "filter-midway": ({"content": "It begins and"}, "content_filter"),
    "abort": ({"content": "It begins and"}, "abort"),
    "thought": (THOUGHT | {"content": None}, "length"),
    "thought-newer": ({"content": None, "reasoning": "hmm", "role": "assistant"}, "length"),
    "thought-bare": (THOUGHT, "length"),
    "thought-empty": (THOUGHT | {"content": ""}, "length"),
    "thought-parts": ({"content": PARTS}, "length"),
    "thought-only": (THOUGHT | {"content": None}, "stop"),
    "thought-hidden": ({"content": ""}, "length"),
    "tool": ({"content": None, "tool_calls": [TOOL_CALL]}, "tool_calls"),
    "surrogate": ({"content": "a \ud800"}, "stop"),
    "no-message": (None, "stop"),
    "no-choices": {"choices": []},
    "null-choices": {"choices": None},
    "odd-choices": {"choices": ["text"]},
    "nothing": {},
    "list": [],
    "error": {"error": {"message": "the provider is overloaded", "code": 502}},
    "error-string": {"error": "out of order"},
}

GRADES = '{"relevance": 4, "correctness": 4, "coherence": 5, "safety": 5}'

LOCK = threading.Lock()
SEEN: Counter = Counter()  # requests by body
ANSWERED = 0


def unsupported(request: dict) -> dict:
    """OpenAI's error for an unsupported parameter or value."""
    if "max_tokens" in request:
        name = "max_tokens"
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. "
        message += "Use 'max_completion_tokens' instead."
    else:
        name = "temperature"
        message = "Unsupported value: 'temperature' does not support this value with this model. "
        message += "Only the default (1) value is supported."
    return {"error": {"message": message, "type": "invalid_request_error", "param": name}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        """Ready, and with one model."""
        names = sys.argv[3:]
        self.reply(200, {"data": [{"id": name} for name in names]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        if self.path == "/v1/load_lora_adapter":
            return self.load_adapters(request)
        chat = self.path.endswith("/chat/completions")
        text = request["messages"][-1]["content"] if chat else request["prompt"]
        if isinstance(text, list):  # tokens
            text = " ".join(map(str, text))
        digest = hashlib.sha256(body).hexdigest()
        fault, _, argument = request["model"].partition(":")
        with LOCK:
            SEEN[body] += 1
            first = SEEN[body] == 1
        if fault == "flaky" and first:
            return self.fail(["429", "500", "slow", "garbage", "drop", "null"][int(digest, 16) % 6])
        if fault == "garbage":
            return self.fail("garbage")
        if refusal := self.refusal(fault, request, text):
            return self.reply(*refusal)
        if fault == "dies":
            self.die_after(int(argument))
        choices = [
            self.choice(fault, argument, request, text, f"{digest}{index or ''}")
            for index in range(self.count(fault, argument, request))
        ]
        with LOCK, open(sys.argv[1], "a") as log:
            log.write(json.dumps(request | {"text": text}) + "\n")
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        if "hard" in text and fault in ODD:
            if not isinstance(ODD[fault], tuple):
                return self.reply(200, ODD[fault])
            choices = [ODD[fault]] * len(choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": 3 * (fault[:2] == "th")}
        if "hard" in text and fault in ("partly", "mostly"):  # only each second or fourth has text
            each = 2 if fault == "partly" else 4
            choices = [ODD["refusal"] if i % each else choice for i, choice in enumerate(choices)]
        values = [
            {"message": message} if chat else {"text": message and message.get("content")}
            for message, _ in choices
        ]
        if fault == "parrot" and request.get("return_token_ids"):
            prompt = request["prompt"]
            values = [{"text": "", "token_ids": prompt[: i + 2]} for i in range(len(choices))]
        completion = {
            "id": "1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": request["model"],
            "choices": [
                {"index": index, "finish_reason": reason} | value
                for index, (value, (_, reason)) in enumerate(zip(values, choices, strict=True))
            ],
            "usage": usage,
        }
        self.reply(200, completion)

    def count(self, fault: str, argument: str, request: dict) -> int:
        """The number of choices that this model gives."""
        asked = request.get("n", 1)
        if fault == "few":
            return min(asked, int(argument))
        return 1 if fault == "ignores-n" else asked

    def choice(
        self, fault: str, argument: str, request: dict, text: str, digest: str
    ) -> tuple[dict, str]:
        """A message and its finish_reason."""
        digest = digest if len(digest) == 64 else hashlib.sha256(digest.encode()).hexdigest()
        answer = self.answer(fault, argument, request, text, digest)
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or 10**6
        reason = "length" if len(answer) > 4 * limit else "stop"  # a token is 4 letters
        message = {"role": "assistant", "content": answer[: 4 * limit]}
        if fault == "parts":
            half = len(answer) // 2
            texts = [{"type": "text", "text": part} for part in (answer[:half], answer[half:])]
            message["content"] = [*PARTS, *texts]
        return message, reason

    def load_adapters(self, request: dict):
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "True":
            return self.reply(404, {"detail": "Not Found"})
        if "broken" in request["lora_path"]:
            return self.reply(400, {"error": {"message": "LoRA rank 64 is greater than 16"}})
        with LOCK, open(sys.argv[1] + ".adapters", "a") as log:
            log.write(json.dumps(request) + "\n")
        self.reply(200, b"loaded")

    def refusal(self, fault: str, request: dict, text: str) -> tuple[int, dict] | None:
        """Status and body for a request that this model refuses."""
        if fault == "echoes-key":
            return 401, {"error": {"message": f"no such key: {self.headers['Authorization']}"}}
        if fault == "wrong-key":
            return 401, {"error": {"message": "no such key"}}
        if fault == "refuses" and "forbidden" in text:
            return 400, {"error": {"message": "the prompt was filtered"}}
        if fault == "refuses-n" and request.get("n", 1) > 1:
            return 400, {"error": {"message": "only one completion choice is allowed"}}
        if fault == "base" and "messages" in request:
            return 400, {"error": {"message": "the tokenizer does not define a chat template"}}
        if fault == "no-tokens" and isinstance(request.get("prompt"), list):
            problem = {"type": "extra_forbidden", "loc": ["body", "return_token_ids"]}
            return 422, {"detail": [problem]}
        if fault == "newer" and ("max_tokens" in request or request.get("temperature", 1) != 1):
            return 400, unsupported(request)
        if fault == "no-seed" and "seed" in request:
            problem = {"type": "extra_forbidden", "loc": ["body", "seed"], "input": request["seed"]}
            return 422, {"detail": [problem]}
        if fault == "too-large" and "long" in text:
            problem = "'max_tokens' or 'max_completion_tokens' is too large: this model's window is"
            return 400, {"error": {"message": f"{problem} 4096", "param": "max_tokens"}}
        if fault == "repeats" and "long" in text:
            problem = f"Extra inputs are not permitted: {request}"
            return 400, {"error": {"message": problem, "request": request}}
        return None

    def answer(self, fault: str, argument: str, request: dict, text: str, digest: str) -> str:
        """The full text of this model's answer."""
        answer = f"answer {digest[:6]}"
        if fault == "judge":
            grade = int(digest, 16) % 5 + 1
            criteria = ("relevance", "correctness", "coherence", "safety")
            answer = "Well. " + json.dumps(dict.fromkeys(criteria, grade))
            if "never" in text or ("once" in text and request["temperature"] == 0):
                answer = '{"relevance": 3, "correctness": "high"'
        if fault == "says":
            answer = argument
        if fault in ODD and argument == "judge":
            answer = GRADES
        if fault == "think":  # for `argument` tokens
            answer = "<think>\n" + "hmm " * int(argument) + "{draft}\n</think>\n" + GRADES
        if fault == "newer":
            answer += " " + GRADES
        return "Human: " + answer if "long" in text else answer

    def die_after(self, number: int):
        global ANSWERED
        with LOCK:
            ANSWERED += 1
            if number < ANSWERED:
                os._exit(1)

    def fail(self, how: str):
        if how in ("429", "500"):
            self.reply(int(how), {"error": {"message": "try later"}})
        elif how == "slow":
            time.sleep(7)
            self.reply(500, {"error": {"message": "too late"}})
        elif how == "garbage":
            self.reply(200, b'{"choices": [{"mess')
        elif how == "null":
            self.reply(200, {"choices": None})
        else:
            self.close_connection = True  # without an answer

    def reply(self, status: int, body: dict | bytes):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if status in (400, 422):
            with LOCK, open(sys.argv[1] + ".refused", "ab") as log:
                log.write(body + b"\n")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0.1")
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
