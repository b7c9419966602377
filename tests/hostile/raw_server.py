"""A server of raw bytes on loopback: each behaviour yields what it sends, valid HTTP or not."""

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import repeat
from urllib.parse import quote

KEY = "sk-very/secret+key-0123456789"
GRADES = '{"relevance": 4, "correctness": 4, "coherence": 5, "safety": 5}'


class Server:
    """Answers every request as `behaviour(request)` says, where a prompt has "hard" in it; else
    well. requests: the head and the body of each."""

    def __init__(self):
        self.behaviour: Callable[[str], Iterator[bytes]] = good
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._stopped = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, suppress(OSError), connection.makefile("rb") as file:
            head = b"".join(iter(lambda: file.readline().rstrip(b"\r\n") + b"\n", b"\n")).decode()
            sizes = [line for line in head.splitlines() if line.lower()[:15] == "content-length:"]
            request = head + "\n" + file.read(int(sizes[0][15:]) if sizes else 0).decode()
            self.requests.append(request)
            hard = "hard" in request or "GET" in head[:4]
            for piece in (self.behaviour if hard else good)(request):
                if self._stopped:
                    break
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)

    def stop(self):
        self._stopped = True
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()


def http(body: bytes = b"", status: str = "200 OK", headers: str = "", sized: bool = True) -> bytes:
    """One response."""
    size = f"Content-Length: {len(body)}\r\n" if sized else ""
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n{size}{headers}\r\n".encode() + body


def completion(content: object = "fine", **fields) -> bytes:
    """The body of an answer; fields replace those of the choice, its message and the answer."""
    message = {"role": "assistant", "content": content}
    message |= {name: fields.pop(name) for name in ("refusal",) if name in fields}
    choice = {"index": 0, "finish_reason": fields.pop("finish_reason", "stop"), "message": message}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"choices": [choice], "usage": usage} | fields).encode()


def good(request: str) -> Iterator[bytes]:
    yield http(completion(GRADES))


def sends(*pieces: bytes) -> Callable[[str], Iterator[bytes]]:
    return lambda request: iter(pieces)


def answers(body: bytes | str, status: str = "200 OK", headers: str = ""):
    """A response with this body."""
    body = body.encode() if isinstance(body, str) else body
    return sends(http(body, status, headers))


def errors(error: object, status: str = "401 Unauthorized"):
    return answers(json.dumps(error), status)


def forever(start: bytes, piece: bytes, pause: float = 0.0):
    """`start`, then `piece` again and again."""

    def behave(request: str) -> Iterator[bytes]:
        yield start
        for again in repeat(piece):
            time.sleep(pause)
            yield again

    return behave


def drips(text: bytes, pause: float = 0.1):
    """The text byte by byte, the last one over and over."""

    def behave(request: str) -> Iterator[bytes]:
        for i in range(10**9):
            yield text[min(i, len(text) - 1) :][:1]
            time.sleep(pause)

    return behave


def bomb(wbits: int) -> Iterator[bytes]:
    """1 GiB of spaces, compressed to 1 MiB."""
    start = zlib.compressobj(9, wbits=wbits)
    block = start.compress(b" " * 2**20) + start.flush(zlib.Z_FULL_FLUSH)
    more = zlib.compressobj(9, wbits=-15)
    again = more.compress(b" " * 2**20) + more.flush(zlib.Z_FULL_FLUSH)
    yield block
    yield from repeat(again, 1023)


def explodes(coding: str, wbits: int, status: str = "200 OK", headers: str = ""):
    """A compressed body without end mark, of which HTTP libraries decode all that there is."""
    head = http(status=status, headers=f"Content-Encoding: {coding}\r\n{headers}", sized=False)
    return lambda request: iter([head, *bomb(wbits)])


CHUNKED = http(headers="Transfer-Encoding: chunked\r\n", sized=False)
ENDLESS = b"10000\r\n" + b" " * 2**16 + b"\r\n"
MOVED = "307 Temporary Redirect"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 10_000
SPELLED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)


def says(text: str):
    return answers(completion(text))


def with_usage(usage: str):
    return answers(completion(usage="?").replace(b'"?"', usage.encode()))


# Endings: "answer", "refused" (a failure of its row) or "down" (the run ends and can be repeated),
# and a pattern of the reason.
TIMED_OUT = ("down", "no whole answer in")
TOO_LONG = ("refused", "more than 8 MiB")
COMPRESSED = ("refused", "compressed unasked")
NOT_JSON = ("down", "not a completion")
BROKEN = ("down", "Connection error")
REPEATS = ("refused", "repeats an API key")
OF_TIME = {
    "silence": (forever(b"", b"", 0.1), *TIMED_OUT),
    "drip of the status line": (drips(b"HTTP/1.1 200 O"), *TIMED_OUT),
    "drip of a header": (drips(b"HTTP/1.1 200 OK\r\nA: b"), *TIMED_OUT),
    "drip of headers": (forever(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", 0.1), *TIMED_OUT),
    "drip of interim responses": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1), *TIMED_OUT),
    "drip of early hints": (forever(b"", b"HTTP/1.1 103 Hints\r\n\r\n", 0.1), *TIMED_OUT),
    "flood of interim responses": (forever(b"", b"HTTP/1.1 100 A\r\n\r\n" * 99), *TIMED_OUT),
    "silence after the headers": (forever(http(b"a" * 9)[:-9], b"", 0.1), *TIMED_OUT),
    "drip of the body": (forever(http(sized=False), b" ", 0.1), *TIMED_OUT),
    "drip of chunks": (forever(CHUNKED, b"1\r\n \r\n", 0.1), *TIMED_OUT),
    "drip of a chunk's size": (forever(CHUNKED, b"0", 0.1), *TIMED_OUT),
    "drip of trailers": (forever(CHUNKED + b"0\r\n", b"A: b\r\n", 0.1), *TIMED_OUT),
    "drip of an error": (forever(http(status="400 Bad", sized=False), b" ", 0.1), *TIMED_OUT),
    "drip of a redirect": (
        forever(http(status=MOVED, headers="Location: /a\r\n", sized=False), b" ", 0.1),
        *TIMED_OUT,
    ),
}
OF_SIZE = {
    "endless chunks": (forever(CHUNKED, ENDLESS), *TOO_LONG),
    "endless body": (forever(http(sized=False), ENDLESS), *TOO_LONG),
    "endless body of a known size": (
        forever(http(headers="Content-Length: 999999999999\r\n", sized=False), ENDLESS),
        *TOO_LONG,
    ),
    "text of 50 MB": (
        lambda request: iter([http(completion("a" * 50_000_000))]),
        *TOO_LONG,
    ),
    "endless headers": (forever(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 999), *BROKEN),
    "endless header": (forever(b"HTTP/1.1 200 OK\r\nA: ", b"a" * 9999), *BROKEN),
    "endless trailers": (forever(CHUNKED + b"0\r\n", b"A: b\r\n" * 999), *BROKEN),
    "endless chunk extension": (forever(CHUNKED + b"1;", b"a" * 9999), *BROKEN),
    "endless error": (forever(http(status="400 Bad", sized=False), b"a" * 9999), "refused", "400"),
    "endless redirect": (
        forever(http(status=MOVED, headers="Location: /a\r\n", sized=False), b" " * 9999),
        "down",
        "redirects",
    ),
    "gzip bomb": (explodes("gzip", 31), *COMPRESSED),
    "deflate bomb": (explodes("deflate", 15), *COMPRESSED),
    "gzip twice": (explodes("gzip, gzip", 31), *COMPRESSED),
    "brotli": (answers(b"\x1b\0\0\0", headers="Content-Encoding: br\r\n"), *COMPRESSED),
    "zstd": (answers(b"\x28\xb5\x2f\xfd", headers="Content-Encoding: zstd\r\n"), *COMPRESSED),
    "gzip bomb in an error": (explodes("gzip", 31, "401 No"), "down", "Error code: 401"),
    "bomb behind a charset": (
        lambda request: iter(
            [
                http(
                    status="401 No",
                    headers="Content-Type: text/plain; charset=zlib\r\n",
                    sized=False,
                ),
                *bomb(15),
            ]
        ),
        "down",
        "Error code: 401",
    ),
}
OF_PROTOCOL = {
    "nothing": (sends(b""), *BROKEN),
    "no HTTP": (sends(b"\xff\x00 what?\r\n\r\n"), *BROKEN),
    "HTTP/2": (sends(b"\0\0\x12\x04\0\0\0\0\0" * 3), *BROKEN),
    "HTTP/0.9": (sends(completion()), *BROKEN),
    "HTTP/1.0": (sends(b"HTTP/1.0 200 OK\r\n\r\n" + completion()), "answer", "fine"),
    "headers cut off": (sends(b"HTTP/1.1 200 OK\r\nContent-"), *BROKEN),
    "body cut off": (sends(http(completion())[:-9]), *BROKEN),
    "size too small": (
        sends(http(completion(), headers="X: y\r\n").replace(b"Length: 1", b"Length: ")),
        *NOT_JSON,
    ),
    "size negative": (sends(http(headers="Content-Length: -1\r\n", sized=False)), *BROKEN),
    "size of 30 digits": (sends(http(headers=f"Content-Length: {10**30}\r\n")), *BROKEN),
    "two sizes": (sends(http(completion(), headers="Content-Length: 3\r\n")), *BROKEN),
    "odd chunk size": (sends(CHUNKED + b"-1\r\n"), *BROKEN),
    "chunks cut off": (sends(CHUNKED + b"ff\r\n{"), *BROKEN),
    "NUL in a header": (sends(http(completion(), headers="A: \0\r\n")), *BROKEN),
    "odd content type": (answers(completion(), headers="Content-Type: a/\xff;=\r\n"), "answer", ""),
    "status 101": (answers("", "101 Switching"), "down", "101|Connection error"),
    "status 204": (answers("", "204 No Content"), *NOT_JSON),
    "status 206": (answers(completion(), "206 Partial"), "answer", "fine"),
    "status 300": (answers("", "300 Choices"), "down", "300"),
    "status 304": (answers("", "304 Not Modified"), "down", "304"),
    "status 000": (answers("", "000 A"), *BROKEN),
    "status 600": (answers("", "600 A"), "down", "600"),
    "status 999": (answers(completion(), "999 A"), "down", "999"),
    "redirect to itself": (answers("", MOVED, "Location: /v1\r\n"), "down", "redirects"),
    "redirect to a file": (answers("", MOVED, "Location: file:///etc/passwd\r\n"), "down", ""),
    "redirect to no host": (answers("", MOVED, "Location: http://[\r\n"), "down", ""),
    "redirect to a long host": (
        answers("", MOVED, f"Location: http://{'a' * 300}/\r\n"),
        *BROKEN,
    ),
    "redirect to a long place": (answers("", MOVED, f"Location: /{'a' * 70_000}\r\n"), "down", ""),
}
OF_SHAPE = {
    "empty": (answers(""), *NOT_JSON),
    "HTML": (answers("<html><body>Welcome"), *NOT_JSON),
    "events": (answers(b"data: " + completion() + b"\n\ndata: [DONE]\n\n"), *NOT_JSON),
    "not UTF-8": (answers(completion().replace(b"fine", b"\xff\xfe")), *NOT_JSON),
    "UTF-16": (answers(completion().decode().encode("utf-16")), "answer", "fine"),
    "UTF-8 with a mark": (answers(b"\xef\xbb\xbf" + completion()), "answer", "fine"),
    "null": (answers("null"), "refused", "not a JSON object"),
    "a number": (answers(LONG), "refused", "not a JSON object"),
    "NaN": (answers("NaN"), "refused", "not a JSON object"),
    "nested": (answers(DEEP), "refused", "nested"),
    "nested usage": (with_usage(DEEP), "refused", "nested"),
    "nested text": (answers(completion("?").replace(b'"?"', DEEP.encode())), "refused", "nested"),
    "nested almost too deeply": (answers('{"error":' * 900 + "1" + "}" * 900), "refused", ""),
    "usage as text": (with_usage('{"prompt_tokens": "7"}'), "answer", "fine"),
    "usage negative": (with_usage('{"prompt_tokens": -7}'), "answer", "fine"),
    "usage of 10,000 digits": (with_usage(f'{{"prompt_tokens": {LONG}}}'), "answer", "fine"),
    "usage NaN": (with_usage('{"prompt_tokens": NaN}'), "answer", "fine"),
    "usage infinite": (with_usage('{"prompt_tokens": -Infinity}'), "answer", "fine"),
    "usage 1e999": (with_usage('{"prompt_tokens": 1e999}'), "answer", "fine"),
    "usage as lists": (with_usage('{"prompt_tokens": [[7]]}'), "answer", "fine"),
    "usage with odd names": (with_usage(r'{"\ud800": 1, "prompt_tokens": 1}'), "answer", "fine"),
    "names twice": (answers(b'{"choices": 3, ' + completion()[1:]), "answer", "fine"),
    "half a pair in the text": (says("\ud800"), "refused", "not valid Unicode"),
    "half a pair in the refusal": (answers(completion(refusal="\udfff")), "refused", "refused: "),
    "half a pair in the reason": (
        answers(completion(None, finish_reason="\ud800")),
        "refused",
        "without text",
    ),
    "half a pair in an error": (errors({"error": {"message": "\ud800"}}), "down", "401"),
    "controls in the text": (says("a\0b\x1b[2Jc\x1b]0;d\x07"), "answer", "\0b\x1b"),
    "controls in the refusal": (answers(completion(refusal="\x1b[2J\x07no")), "refused", "no"),
    "controls in an error": (errors({"error": {"message": "\x1b[2J\0no"}}), "down", "no"),
    "reason of 1 MB": (answers(completion(None, finish_reason="a" * 10**6)), "refused", "text"),
    "reason as a list": (answers(completion(finish_reason=[[]])), "answer", "fine"),
    "choices as text": (answers(completion(choices="fine")), "refused", "without choices"),
    "choices as a dict": (answers(completion(choices={"0": {}})), "refused", "without choices"),
    "choices of lists": (answers(completion(choices=[[]])), "refused", "without choices"),
    "a million choices": (answers(completion(choices=[{}] * 10**6)), "refused", "a message"),
    "message as text": (answers(completion(choices=[{"message": "a"}])), "refused", "a message"),
    "odd id": (answers(completion(id={"a": []}, model=3, created="x")), "answer", "fine"),
    "logprobs": (answers(completion(logprobs={"content": [{}] * 99})), "answer", "fine"),
    "error in an answer": (errors({"error": {"message": "busy"}}, "200 OK"), "refused", "busy"),
    "error as a list": (errors({"error": [[1], {}]}, "200 OK"), "refused", "an error"),
    "error as true": (errors({"error": True}, "200 OK"), "refused", "an error"),
    "error with an odd message": (
        errors({"error": {"message": {"a": [1]}, "param": [], "code": {}, "type": 7}}),
        "down",
        "401",
    ),
    "refusal of an odd shape": (errors([[{"error": 1}]], "400 Bad"), "refused", "400"),
    "refusal as a number": (errors(7, "422 Bad"), "refused", "422"),
    "refusal without words": (answers("", "400 Bad"), "refused", "400"),
    "refusal nested": (answers(DEEP, "400 Bad"), "refused", "400"),
    "error in HTML": (answers("<html>\n<h1>no", "403 No"), "down", "403 - <html> <h1>no"),
    "error not UTF-8": (answers(b"\xff\xfe\x80", "403 No"), "down", "403"),
    "too large": (answers("", "413 Large"), "refused", "413"),
}


def repeats_header(request: str) -> Iterator[bytes]:
    """The request itself in the status, in headers and in the message."""
    (line,) = [line for line in request.splitlines() if line.lower().startswith("authorization")]
    body = json.dumps({"error": {"message": line}}).encode()
    yield http(body, f"401 {KEY}", f"{line}\r\nX-Key: {KEY}\r\n")


OF_KEYS = {
    "request in an error": (repeats_header, "down", "401"),
    "key in the text": (says(f"Your key is {KEY}."), *REPEATS),
    "key in a text of parts": (
        answers(completion([{"type": "text", "text": half} for half in (KEY[:9], KEY[9:])])),
        *REPEATS,
    ),
    "key over two lines": (says(f"{KEY[:9]}\n  {KEY[9:]}"), *REPEATS),
    "key escaped in the text": (says(json.dumps({"key": KEY}).replace("/", r"\/")), *REPEATS),
    "key spelled in the text": (says(SPELLED), *REPEATS),
    "key in a URL": (says(f"http://a/?k={quote(KEY, safe='')}"), *REPEATS),
    "key in the refusal": (answers(completion(refusal=f"no {KEY}")), "refused", "the model"),
    "key in the reason": (answers(completion(None, finish_reason=KEY)), "refused", "text"),
    "key in an error of an answer": (errors({"error": KEY}, "200 OK"), "refused", "an error"),
    "key in HTML": (answers(f"<p>{KEY}</p>", "403 No"), "down", "403"),
    "key where the message ends": (
        errors({"error": {"message": f"{'a' * 270}{KEY}"}}, "400 Bad"),
        "refused",
        "400",
    ),
    "key spelled in HTML": (answers(SPELLED, "403 No"), "down", "403"),
    "key in odd JSON": (errors({"detail": [{"input": KEY}]}, "422 Bad"), "refused", "422"),
    "key in a redirect": (answers("", MOVED, f"Location: /v1?{KEY}\r\n"), "down", "redirects"),
    "key as the host": (answers("", MOVED, "Location: ftp://a/" + KEY + "\r\n"), "down", ""),
    "key in a broken header": (sends(http(headers=f"{KEY}: \0\r\n")), *BROKEN),
    "key instead of HTTP": (sends(f"{KEY}\r\n\r\n".encode()), *BROKEN),
}
HOSTILE = OF_TIME | OF_SIZE | OF_PROTOCOL | OF_SHAPE | OF_KEYS
