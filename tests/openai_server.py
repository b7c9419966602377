"""A real HTTP server on loopback with OpenAI's two completion calls and the faults of real ones.

`python openai_server.py LOG PORT` prints its port (0: any) and answers until it is killed. The
requested model's name says how it behaves; LOG receives each request that it answered in full.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOCK = threading.Lock()
SEEN: Counter = Counter()  # how often each request body came
ANSWERED = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        chat = self.path.endswith("/chat/completions")
        text = request["messages"][-1]["content"] if chat else request["prompt"]
        with LOCK:
            SEEN[body] += 1
            first = SEEN[body] == 1
        fault, _, number = request["model"].partition(":")
        digest = hashlib.sha256(body).hexdigest()
        answer = f"answer {digest[:6]}"
        if fault == "flaky" and first:
            return self.fail(["429", "500", "slow", "garbage", "drop", "null"][int(digest, 16) % 6])
        if fault == "garbage":
            return self.fail("garbage")
        if fault == "wrong-key":
            return self.reply(401, {"error": {"message": "no such key"}})
        if fault == "refuses" and "forbidden" in text:
            return self.reply(400, {"error": {"message": "the prompt was filtered"}})
        if fault == "dies":
            self.die_after(int(number))
        if fault == "judge":
            grade = int(digest, 16) % 5 + 1
            criteria = ("relevance", "correctness", "coherence", "safety")
            answer = "Well. " + json.dumps(dict.fromkeys(criteria, grade))
            if "never" in text or ("once" in text and request["seed"] == 0):
                answer = '{"relevance": 3, "correctness": "high"'
        if "long" in text:
            answer = "Human: " + answer
        with LOCK, open(sys.argv[1], "a") as log:
            log.write(json.dumps(request | {"text": text}) + "\n")
        key = "message" if chat else "text"
        value = {"role": "assistant", "content": answer} if chat else answer
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion" if chat else "text_completion",
                "created": 1,
                "model": request["model"],
                "choices": [{"index": 0, key: value, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            },
        )

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
            self.close_connection = True  # without a word

    def reply(self, status: int, body: dict | bytes):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
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
