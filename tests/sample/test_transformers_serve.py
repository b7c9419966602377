"""Sampling and judging through `transformers serve`."""

import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import demo
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig
from tests.jsonl import read, write

PROMPTS = [row["prompt"] for row in read(demo.EVAL_FILE)[:4]]


@pytest.fixture
def model(tmp_path):
    """The embedded model with a chat template; it samples by default."""
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    lm.generation_config.do_sample = True
    lm.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def url():
    """The address of a running `transformers serve`."""
    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name, reason="the server needs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    server.kill()
    server.wait()


@pytest.mark.slow
def test_the_server_samples_and_its_judgements_are_recorded(tmp_path, model, url):
    policy = Policy(method="openai", model=model, base_url=url, num_responses=3, max_new_tokens=48)
    config = SampleConfig(
        data=write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        output=str(tmp_path / "sampled.jsonl"),
        policies=[policy, replace(policy, chat=False, num_responses=1, source="raw")],
        max_concurrency=2,
    )
    counts = sample(config)
    assert counts["requests"] == 16 and counts["failures"] == 0
    assert counts["responses"] + counts["duplicates"] + counts["empty"] == 16
    rows = read(config.output)
    assert [row["prompt"] for row in rows] == PROMPTS
    texts = [text for row in rows for text in row["responses"]]
    assert len(set(texts)) > 8  # it sampled
    assert "the" in " ".join(texts).split()  # from the demo's model
    judging = ScoreConfig(
        data=config.output,
        output=str(tmp_path / "scored.jsonl"),
        judge_model=model,
        base_url=url,
        max_retries=0,
    )
    # The tiny model cannot judge; the rubric does not even fit its window.
    with pytest.raises(ValueError, match="no response could be scored: malformed judgement"):
        score(judging)
