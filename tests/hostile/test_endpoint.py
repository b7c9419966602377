"""Endpoints that mean harm: every answer ends soon, takes little memory and gives no key away."""

import itertools
import json
import logging
import os
import re
import socket
import threading
import time
import traceback
import tracemalloc
from base64 import b64decode
from contextlib import suppress
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rrhf_fast.data.checks import one_line
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.score.judge import parse_judgement
from rrhf_fast.stages import secrets
from rrhf_fast.stages.answer import Answer, NoCompletion, Refused, read_answers
from rrhf_fast.stages.endpoint import Endpoint, EndpointConfig, EndpointDown, split_login
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.run_folder import claim
from rrhf_fast.stages.secrets import hide, keep_secret
from tests.hostile.raw_server import (
    GRADES,
    HOSTILE,
    KEY,
    MOVED,
    OF_SIZE,
    OF_TIME,
    Server,
    answers,
    completion,
    forever,
    good,
    http,
    repeats_header,
    says,
)
from tests.jsonl import read, write

pytest.importorskip("openai", reason="endpoints are asked through the openai package")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def key(monkeypatch, caplog):
    """A key in the environment, and every log on."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in logging.root.manager.loggerDict:
        if name.startswith(("httpx", "httpcore", "openai")):
            caplog.set_level(logging.DEBUG, name)


def ends(call, *arguments):
    """Call it; a test fails, rather than hangs, if the call does not end."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call(*arguments)), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "never ends"
    return results[0]


def ask(url, timeout=20.0, max_retries=0):
    """How an endpoint answers: ("answer", text), ("refused", reason) or ("down", reason); and the
    traceback, if any."""
    config = EndpointConfig(timeout=timeout, max_retries=max_retries)
    try:
        answer = Endpoint(url, "OPENAI_API_KEY", config).ask("m", "hard", max_tokens=9)
    except (Refused, EndpointDown) as error:
        how = "refused" if isinstance(error, Refused) else "down"
        return how, str(error), "".join(traceback.format_exception(error))
    json.dumps(answer.usage, allow_nan=False)
    return "answer", answer.text, ""


def hides_the_key(*texts):
    """Whether the texts hold neither the key nor a long part of it."""
    letters = "".join("".join(text.split()) for text in texts).replace("\\", "")
    return not any(KEY[i : i + 12] in letters for i in range(len(KEY) - 11))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_answer_ends_in_a_text_or_a_reason(name, server, caplog):
    behaviour, kind, reason = HOSTILE[name]
    server.behaviour = behaviour
    # Only what never ends may meet its timeout, on however busy a machine.
    result, message, error = ends(ask, server.url, 0.4 if name in OF_TIME else 20.0)
    assert (result, bool(re.search(reason, message))) == (kind, True), message
    assert len(message) < 500 and len(message.splitlines()) == 1
    assert hides_the_key(message, error, caplog.text)
    assert result == "answer" or message == one_line(message, None)  # no control characters


BOMBS = [name for name in OF_SIZE if re.search("bomb|twice|endless", name)]


@pytest.mark.parametrize("name", BOMBS)
def test_no_answer_takes_much_memory(name, server):
    server.behaviour = HOSTILE[name][0]
    tracemalloc.start()
    try:
        ends(ask, server.url)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


ROWS = [{"prompt": f"{kind} {i}", "responses": [kind]} for i, kind in enumerate("ahb")]
ROWS[1] = {"prompt": "hard 1", "responses": ["h"]}


def sample_arguments(url):
    policy = {"method": "openai", "model": "m", "base_url": url}
    return ["--policies", json.dumps([policy])]


def score_arguments(url):
    return ["--judge_model", "m", "--base_url", url]


STAGES = {"sample": (sample, sample_arguments), "score": (score, score_arguments)}
FAMILIES = [
    "drip of the body", "endless chunks", "gzip bomb", "nothing", "not UTF-8", "nested",
    "usage of 10,000 digits", "half a pair in the text", "controls in an error",
    "request in an error", "key in the text", "key in a redirect",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, capsys, caplog):
    """Run a stage over `ROWS`; returns the exit code and what it printed. Everything that it leaves
    is checked: one line for a failure, plain JSON, and no key anywhere."""
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"

    def run(stage, url, *more):
        main, arguments = STAGES[stage]
        options = ["--timeout", "2", "--max_retries", "0", "--max_concurrency", "1", *more]
        paths = ["--data", data, "--output", str(output)]
        code = ends(main, [*paths, *arguments(url), *options])
        printed = capsys.readouterr()
        assert code == 0 or len(printed.err.splitlines()) == 1
        left = [path.read_text() for path in tmp_path.glob("out.jsonl*")]
        for line in "".join(left).splitlines():
            json.loads(line, parse_constant=pytest.fail)
        assert hides_the_key(printed.out, printed.err, caplog.text, *left)
        return code, printed.err

    run.output, run.journal = output, output.with_name("out.jsonl.journal")
    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_ends_in_rows_or_in_one_line_and_can_be_repeated(stage, name, server, run):
    server.behaviour = HOSTILE[name][0]
    code, error = run(stage, server.url)
    kind, reason = HOSTILE[name][1:]
    if code == 1:
        assert kind == "down" and re.search(reason, error) and run.journal.exists()
    else:
        assert code == 0 and kind != "down" and not run.journal.exists()
        rows = read(run.output)
        failures = rows[1].get("failures" if stage == "sample" else "unscored", [])
        assert len(failures) == (kind == "refused" or stage == "score")
        assert kind == "answer" or re.search(reason, failures[0]["error"])
    server.behaviour, before = good, len(server.requests)
    assert run(stage, server.url, *(["--overwrite", "true"] if code == 0 else []))[0] == 0
    # After a failure the first row is kept, and the last one if it was under way.
    assert len(server.requests) - before in ((3,) if code == 0 else (1, 2))
    for row in read(run.output):
        assert len(row["responses"]) == 1 and not {"failures", "unscored"} & set(row)
    assert not run.journal.exists()


def test_a_judgement_takes_no_more_retries_than_an_answer(server, run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    bodies = itertools.cycle([http(b"not JSON"), http(b"not JSON"), http(completion("well"))])
    server.behaviour = lambda request: iter([next(bodies)])
    assert run("score", server.url, "--max_retries", "4")[0] == 0
    assert sum("hard" in request for request in server.requests) == 6  # three for each answer
    assert read(run.output)[1]["unscored"][0]["error"] == "malformed judgement"


JUDGEMENTS = {
    "nested": '{"relevance": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "objects": "{" * 100_000,
    "empty objects": "{}" * 10**6,
    "digits": GRADES.replace("4", "9" * 10_000),
    "NaN": GRADES.replace("4", "NaN"),
    "infinity": GRADES.replace("4", "1e999"),
    "text": GRADES.replace("4", '"4"'),
    "booleans": GRADES.replace("4", "true"),
    "lists": GRADES.replace("4", "[4]"),
    "too much": GRADES.replace("4", "6"),
    "half a pair": GRADES.replace("relevance", r"\ud800"),
    "list": "[4, 4, 5, 5]",
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_an_odd_judgement_leaves_its_response_unscored(name, server, run):
    server.behaviour = says(JUDGEMENTS[name])
    assert run("score", server.url)[0] == 0
    rows = read(run.output)
    assert [row["scores"] for row in rows] == [[18], [], [18]]
    assert rows[1]["unscored"][0]["error"] == "malformed judgement"


@pytest.mark.parametrize(
    "text", [f"```json\n{GRADES}\n```", f"{{}} {GRADES}", f'{{"scores": {GRADES}}}']
)
def test_a_judgement_may_have_other_text_around_it(text):
    assert sum(parse_judgement(text).values()) == 18


ADDRESSES = [
    "", " ", "x", "ftp://x", "http:", "http://", "http:///v1", "http://[", "http://\0", "http://\\x00",
    "http://h:99999", "http://h:0", "http://h:x", "http://a..b", "//h/v1", "http://a b", "http://%zz",
    f"http://h/v1?key={KEY}", f"http://h/#{KEY}", f"http://user:{KEY[-9:]}@[", " http://h", "h:80",
    f"http://{'a' * 5000}/v1", "http://h/\n",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_none_is_named_first(address, run):
    for stage, option in (("sample", "policies[0].base_url"), ("score", "base_url")):
        code, error = run(stage, address)
        assert code == 2 and f"error: {option}: expected a" in error
        assert len(error) < 400 and KEY[-9:] not in error
        assert not run.output.exists() and not run.journal.exists()


PARTS = ["http", "https", ":", "//", "/", "@", "?", "#", "[", "]", "\\", ".", "%", "80", "\ud800"]


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=5)).map("".join))
@example(f"http://h/{'a' * 100_000}")
@settings(max_examples=50)
def test_any_text_is_an_address_or_none(text):
    try:
        address = split_login(text, "base_url")[0]
    except ValueError as error:
        assert str(error).startswith("base_url: expected an address") and len(str(error)) < 200
    else:
        assert split_login(address, "base_url") == (address, {})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("key", ["secret\nKEY", "secret KEY", "secret\x1bKEY", "sécretKEY"])
def test_a_key_that_is_none_is_named_first(stage, key, server, run, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ | {"OPENAI_API_KEY": key})
    code, error = run(stage, server.url)
    assert code == 2 and "api_key_env: OPENAI_API_KEY does not fit" in error
    assert "KEY " not in error.replace("OPENAI_API_KEY", "") and "cret" not in error
    assert not run.journal.exists() and not server.requests


def test_an_address_in_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost")
    with pytest.raises(ValueError, match="OPENAI_BASE_URL: expected an address"):
        Endpoint(None, "OPENAI_API_KEY", EndpointConfig())


def test_blanks_around_a_key_are_left_out(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\r\n")
    assert ask(server.url)[0] == "answer"
    assert f"Bearer {KEY}\n" in server.requests[0]


def authorization(request):
    return re.findall(r"(?i)^authorization: (.*)$", request, re.MULTILINE)


def test_a_password_in_the_address_is_sent_and_not_shown(server, run, caplog):
    url = server.url.replace("http://", "http://user:pass-%2Fword@")
    server.behaviour = repeats_header
    code, error = run("sample", url)
    (sent,) = authorization(server.requests[-1])
    assert b64decode(sent.removeprefix("Basic ")) == b"user:pass-/word"
    assert code == 1 and f"{server.url}: Error code: 401 - " in error
    for text in (error, caplog.text):
        assert "word" not in text and sent[6:] not in text


def test_a_password_in_the_address_is_not_recorded(tmp_path):
    url = "http://user:pass-%2Fword@localhost:8000/v1"
    judged = EvaluateConfig(base_url=url, judge_model="m")
    sampled = SampleConfig(policies=[Policy(method="openai", base_url=url)])
    for config in (judged, sampled):
        folder = claim(str(tmp_path / type(config).__name__), identity(config))
        text = (folder / "options.json").read_text()
        assert '"http://localhost/v1"' in text and "word" not in text and "user:" not in text


def test_another_host_gets_no_key(server):
    other = Server()
    for target in (server, other):
        server.behaviour = answers("", MOVED, f"Location: {target.url}/here\r\n")
        server.requests.clear()
        ask(server.url)
    other.stop()
    assert authorization(server.requests[0]) == [f"Bearer {KEY}"]
    assert other.requests and not authorization(other.requests[0])
    assert KEY not in other.requests[0]


def test_the_same_host_keeps_the_key(server):
    places = iter(["Location: /here\r\n"])

    def moves(request):
        place = next(places, None)
        yield http(b"", MOVED, place) if place else http(completion("moved"))

    server.behaviour = moves
    assert ask(server.url)[:2] == ("answer", "moved")
    assert [authorization(request) for request in server.requests] == [[f"Bearer {KEY}"]] * 2


def test_no_cookie_is_kept(server):
    server.behaviour = answers(completion(), headers="Set-Cookie: a=b\r\n" * 50)
    endpoint = Endpoint(server.url, "OPENAI_API_KEY", EndpointConfig())
    for _ in range(2):
        endpoint.ask("m", "hard", max_tokens=9)
    assert "cookie" not in server.requests[1].lower()


AFTER = [
    "315360000",
    "-5",
    "nan",
    "inf",
    "1e400",
    "soon",
    "Fri, 31 Dec 9999 23:59:59 GMT",
    "9" * 400,
]


@pytest.mark.parametrize("after", AFTER)
def test_retries_are_counted_together_and_pauses_are_short(after, server, monkeypatch):
    """Whether the client repeats a request for its status or we do for its body."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    bodies = itertools.cycle(
        [
            http(status="503 Busy", headers=f"Retry-After: {after}\r\nX-Should-Retry: true\r\n"),
            http(b"not JSON"),
            http(completion(choices=[])),
            b"",
        ]
    )
    server.behaviour = lambda request: iter([next(bodies)])
    assert ends(ask, server.url, 5.0, 6)[0] in ("down", "refused")
    assert len(server.requests) <= 7
    assert all(0 <= pause <= 120 for pause in pauses)


def test_the_pauses_of_many_retries_do_not_overflow(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.behaviour = says("\ud800")
    answer = Answer("", None, {})
    results = iter([NoCompletion("odd")] * 1500 + [[answer]])
    monkeypatch.setattr(Endpoint, "_result", lambda *_: next(results))
    http = SimpleNamespace(content=b"", extensions={})
    response = SimpleNamespace(retries_taken=0, http_response=http)
    monkeypatch.setattr(Endpoint, "_post", lambda *_: response)
    endpoint = Endpoint(server.url, "OPENAI_API_KEY", EndpointConfig(max_retries=2000))
    assert endpoint.ask("m", "hard", max_tokens=9) is answer


def test_a_handshake_has_a_deadline(server):
    for piece in (b"", b"\x16\x03\x03\x3f\xff"):  # nothing, or a record that never ends
        server.behaviour = forever(piece, b"", 0.1)
        listener = socket.create_server(("127.0.0.1", 0))

        def drip(listener=listener, piece=piece):
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(piece)
                while True:
                    connection.sendall(piece and b"\0")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        port = listener.getsockname()[1]
        result, message, _ = ends(ask, f"https://127.0.0.1:{port}/v1", 0.4)
        assert result == "down" and "no whole answer in 0.4 s" in message
        listener.close()


def test_addresses_that_do_not_answer_share_the_deadline(monkeypatch):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = full.getsockname()
    waiting = [socket.socket() for _ in range(4)]  # no room for any other
    for client in waiting:
        client.setblocking(False)
        client.connect_ex(address)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)] * 10_000
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **options: found if "many" in host else look_up(host, *rest, **options),
    )
    result, message, _ = ends(ask, f"http://many.example:{address[1]}/v1", 0.4)
    assert result == "down" and "no whole answer in 0.4 s" in message
    for each in (full, *waiting):
        each.close()


def test_a_proxy_is_no_way_around(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    server.behaviour = HOSTILE["drip of headers"][0]
    result, message, _ = ends(ask, "http://far.example/v1", 0.4)
    assert result == "down" and "no whole answer in 0.4 s" in message
    assert server.requests[0].startswith("POST http://far.example/v1/")


@pytest.mark.parametrize(
    "name, value",
    [
        ("HTTP_PROXY", "socks9://user:pass-word@h"),
        ("HTTP_PROXY", "http://user:pass-word@h:x"),
        ("HTTP_PROXY", "http://user:pass-word@127.0.0.1:1"),
        ("SSL_CERT_FILE", "/none/pass-word"),
    ],
)
def test_what_the_environment_says_is_no_traceback(name, value, run, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    code, error = run("sample", "http://far.example/v1")
    assert code in (1, 2) and "http://far.example/v1" in error
    assert "word" not in error or name == "SSL_CERT_FILE"


def test_a_logged_traceback_shows_no_key(caplog):
    keep_secret(KEY)
    secrets.hide_in_logs("openai._base_client")
    try:
        raise OSError(f"illegal header {KEY}")
    except OSError:
        logging.getLogger("openai._base_client").warning("no %s", "answer", exc_info=True)
    assert "OSError: illegal header [key]" in caplog.text and KEY not in caplog.text
    assert all(hides_the_key(repr(record.__dict__)) for record in caplog.records)


PRINTABLE = st.characters(min_codepoint=33, max_codepoint=126)


@given(st.text(PRINTABLE, min_size=8, max_size=60), st.data())
def test_a_key_is_found_however_it_is_escaped(key, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "_patterns", {})
        keep_secret(key)
        forms = [key, json.dumps(key)[1:-1], quote(key, safe=""), quote(key), repr(key)[1:-1]]
        forms += ["".join(f"\\u{ord(letter):04X}" for letter in key), "\n ".join(key)]
        for form in forms:
            around = data.draw(st.tuples(st.text(max_size=5), st.text(max_size=5)))
            assert form not in hide(f"{around[0]}{form}{around[1]}") or form in "[key]"


@given(st.binary() | st.binary().map(lambda some: completion().replace(b"fine", some)))
def test_any_bytes_are_an_answer_or_no_answer(body):
    try:
        answers = read_answers(body, True, 1)
    except ValueError:
        return
    result = [vars(answer) for answer in answers if isinstance(answer, Answer)]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("text", ["\\" * 10**6, "s " * 10**6, " " * 10**6, (KEY + " ") * 10**4])
def test_a_long_text_is_searched_at_once(text):
    keep_secret(KEY)
    assert KEY not in ends(hide, text)
