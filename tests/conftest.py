"""Settings of the whole suite: no network, no deadlines that a busy machine could miss."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before transformers or datasets is imported; tests need no hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["RRHF_FAST_CACHE"] = tempfile.mkdtemp(prefix="rrhf-fast-tests-")

import torch

if not torch.cuda.is_available():
    # Before a kernel is imported: without a GPU, Triton's interpreter runs them on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

from rrhf_fast import demo
from rrhf_fast.model import active_rows

# Models of tests are small; skip rows as larger ones do.
active_rows.GATHER = 0

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # item.keywords would match folder names too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish():
    shutil.rmtree(os.environ["RRHF_FAST_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def signals_are_as_before():
    """A handler that a test leaves behind would decide how a later one ends."""
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM]
    before = {name: signal.getsignal(name) for name in names}
    yield
    assert {name: signal.getsignal(name) for name in names} == before


@dataclass
class Server:
    """An OpenAI-compatible server in its own process; see openai_server.py."""

    log: Path
    process: subprocess.Popen | None = None
    port: int = 0  # any at first, then the same at every start

    def start(self) -> None:
        script = Path(__file__).with_name("openai_server.py")
        command = [sys.executable, str(script), str(self.log), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def answered(self) -> list[dict]:
        """The bodies of all answered requests; `text` is the prompt."""
        return self._read(self.log)

    @property
    def refused(self) -> list[dict]:
        """The answers to all requests refused for their form."""
        return self._read(Path(f"{self.log}.refused"))

    @staticmethod
    def _read(path: Path) -> list[dict]:
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def openai_server(tmp_path):
    """A running `Server`."""
    pytest.importorskip("openai", reason="endpoints are asked through the openai package")
    server = Server(tmp_path / "answered.jsonl")
    server.start()
    yield server
    server.stop()


def _call(function, config):
    torch.set_num_threads(1)
    function(config)


@pytest.fixture
def killed_at_random():
    """Call function(config) in processes that are killed (SIGKILL) soon after their journal grows,
    until one finishes; returns how many were killed."""
    context = multiprocessing.get_context("forkserver")  # imports once, forks in an instant
    context.set_forkserver_preload(["rrhf_fast.sample.run", "rrhf_fast.score.run"])

    def run(function, config, kills, seed):
        rng, killed = random.Random(seed), 0
        journal = Path(config.output + ".journal")
        while True:
            process = context.Process(target=_call, args=(function, config))
            before = journal.stat().st_size if journal.exists() else 0
            process.start()
            while killed < kills and process.is_alive():
                if journal.exists() and journal.stat().st_size > before:
                    time.sleep(rng.random() * 0.05)
                    process.kill()
                    process.join()
                    killed += process.exitcode == -signal.SIGKILL
                    break
                time.sleep(0.001)
            process.join()
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0
                return killed

    return run


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A folder with the embedded model and a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(demo.MODEL_DIR, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)
