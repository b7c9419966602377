"""Servers that a run starts: ready before they are asked, gone however the run ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rrhf_fast import demo
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.endpoint import EndpointDown
from rrhf_fast.stages.serve import ServeConfig, Servers
from tests.jsonl import read, write

pytest.importorskip("openai", reason="endpoints are asked through the openai package")
SERVER = Path(__file__).parents[1] / "openai_server.py"
MODEL = str(demo.MODEL_DIR)


def command(log, *before):
    """Starts our server, whose only model has the name it is asked for."""
    words = [*before, sys.executable, str(SERVER), str(log), "PORT", "MODEL"]
    return shlex.join(words).replace("PORT", "{port}").replace("MODEL", "{model}")


@pytest.fixture
def config(tmp_path):
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", [{"prompt": f"p {i}"} for i in range(4)]),
        output=str(tmp_path / "sampled.jsonl"),
        model_name_or_path=MODEL,
        policies=[Policy(method="openai", num_responses=3)],
        serve_command=command(tmp_path / "asked.jsonl"),
        max_retries=0,
    )


def running(marker):
    """The processes with this text in their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        found += [int(folder.name)] if any(marker in word for word in words) else []
    return found


def ends(condition, seconds=60):
    """Whether a condition holds within a time that is ample for it."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_server_is_started_for_a_policy_and_stopped(tmp_path, config, capsys):
    counts = sample(config)
    assert (counts["responses"], counts["requests"]) == (12, 4)
    said = capsys.readouterr().out
    assert said.count("starting ") == 1 and f"{SERVER} {tmp_path}" in said
    assert {asked["model"] for asked in read(tmp_path / "asked.jsonl")} == {MODEL}
    assert all(row["sources"] == ["openai"] * 3 for row in read(config.output))
    assert not running(str(tmp_path / "asked.jsonl")) and not list(tmp_path.glob("*.log"))


def test_policies_of_one_model_share_a_server(config, capsys):
    (policy,) = config.policies
    config.policies = [policy, replace(policy, chat=False), Policy(method="greedy")]
    config.policies += [replace(policy, model="other", source="o")]
    sample(config)
    assert capsys.readouterr().out.count("starting ") == 2


def test_a_finished_policy_needs_no_server(config, capsys):
    (policy,) = config.policies
    config.policies = [policy, replace(policy, base_url="http://127.0.0.1:9/v1", source="gone")]
    for _ in range(2):
        with pytest.raises(EndpointDown):
            sample(config)
    assert capsys.readouterr().out.count("starting ") == 1


@pytest.mark.parametrize(
    "words, problem",
    [
        ("sh -c 'echo hello; exit 3' {model} {port}", "exit code 3 .*it says: hello; all of it"),
        ("sh -c 'echo An Error; echo bye; kill -9 $$' {model} {port}", "247 .* says: An Error;"),
    ],
)
def test_a_server_that_ends_says_why(words, problem, config):
    with pytest.raises(ValueError, match=f"serve_command: the server ended with .*{problem}"):
        sample(replace(config, serve_command=words))
    assert Path(config.output + ".server.log").exists()
    sample(config)  # the command is no part of what was begun
    assert not Path(config.output + ".server.log").exists()


def test_a_server_that_is_never_ready_is_stopped(tmp_path, config):
    words = f"sleep 60{os.getpid()} {{model}} {{port}}"
    words = f"sh -c '{words.replace('{model} {port}', '')}' {{model}} {{port}}"
    with pytest.raises(EndpointDown, match=r"was not ready in 0\.5 s"):
        sample(replace(config, serve_command=words, serve_timeout=0.5))
    assert not running(f"60{os.getpid()}")


@pytest.mark.parametrize(
    "words, problem",
    [
        ("vllm serve", r"expected {model} in it"),
        ("python x {model}", r"expected {port} in it"),
        ("no-such-command-here {model} {port}", "no-such-command-here: no such command"),
        ("vllm 'serve {model} {port}", "serve_command: No closing quotation"),
    ],
)
def test_a_command_that_cannot_work_is_refused(words, problem, config):
    with pytest.raises(ValueError, match=problem):
        sample(replace(config, serve_command=words))
    assert not Path(config.output + ".journal").exists()


def test_ranks_ask_one_server(tmp_path, config):
    """The first rank starts it, and all ask it; it does not take itself for a rank."""
    log, variables = tmp_path / "asked.jsonl", tmp_path / "variables"
    words = command(log, "sh", "-c", f'env > {variables}; exec "$@"', "sh")
    options = {
        "data": config.data,
        "output": config.output,
        "model_name_or_path": MODEL,
        "policies": json.dumps([{"method": "openai", "num_responses": 3}]),
        "serve_command": words,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "rrhf_fast.sample"]
        + [f"--{name}={value}" for name, value in options.items()],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HTTP_PROXY": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(len(row["responses"]) == 3 for row in read(config.output))
    assert len(read(log)) == 4 and done.stdout.count("starting ") == 1
    assert "RANK" not in variables.read_text() and "WORLD_SIZE" not in variables.read_text()
    assert not running(str(log))


SCRIPT = """
import sys, time
from rrhf_fast.stages.command import run_command
from rrhf_fast.stages.serve import ServeConfig, Servers
from dataclasses import dataclass

def run(config):
    with Servers(config, sys.argv[3]) as servers:
        servers.serve("m")
        print("ready", flush=True)
        time.sleep(600)

sys.exit(run_command("test", "", ServeConfig, run, ["--serve_command", sys.argv[1]]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_server_outlives_its_run(name, tmp_path):
    """Nor what the server started: here a shell starts the server beside another process."""
    log, marker = tmp_path / "asked.jsonl", f"61{os.getpid()}"
    inner = command(log).replace("{port}", "$1").replace("{model}", "$0")
    inner = inner.replace("'$1'", "$1").replace("'$0'", "$0")
    words = shlex.join(["sh", "-c", f"sleep {marker} & {inner}", "MODEL", "PORT"])
    words = words.replace("MODEL", "{model}").replace("PORT", "{port}")
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, words, str(log), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert any("ready" in line for line in run.stdout)
    assert len(running(str(log))) >= 2 and running(marker)
    run.send_signal(signal.Signals[name])
    run.wait(timeout=60)
    run.stdout.close()
    assert ends(lambda: not running(marker) and not running(str(log)))


@pytest.fixture
def adapters(tmp_path):
    """Names of folders of adapters of the demo's model, which this server only hears of."""

    def write_adapters(name):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"base_model_name_or_path": MODEL, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return str(folder)

    return write_adapters


def test_adapters_are_loaded_into_a_server_of_their_base(tmp_path, config, adapters):
    config.policies[0].model = adapters("tuned")
    assert sample(config)["responses"] == 12
    (loaded,) = read(str(tmp_path / "asked.jsonl") + ".adapters")
    assert loaded == {"lora_name": "tuned", "lora_path": str(tmp_path / "tuned")}
    assert {asked["model"] for asked in read(tmp_path / "asked.jsonl")} == {"tuned"}


def test_adapters_that_a_server_refuses_are_reported(config, adapters):
    config.policies[0].model = adapters("broken")
    with pytest.raises(ValueError, match="does not load these adapters: 400 .*rank 64.*max-lora"):
        sample(config)


def test_rounds_ask_only_a_server_that_knows_them(config):
    options = {"data": config.data, "eval_data": config.data, "model_name_or_path": MODEL}
    policies = [Policy(method="openai", base_url="http://127.0.0.1:9/v1")]
    rounds = IterateConfig(**options, policies=policies, reward_fn="a:b")
    with pytest.raises(ValueError, match=r"policies\[0\].model: missing: .*--serve_command"):
        rounds.validate()
    replace(rounds, policies=[replace(policies[0], model="theirs")]).validate()
    served = [replace(policies[0], base_url=None)]
    replace(rounds, policies=served, serve_command=config.serve_command).validate()
    with pytest.raises(ValueError, match=r"policies\[0\].model: missing: "):
        replace(rounds, policies=served).validate()


def test_a_server_is_asked_for_its_own_name(tmp_path):
    words = command(tmp_path / "asked.jsonl").replace("{model}", "served-{model}")
    with Servers(ServeConfig(serve_command=words), str(tmp_path / "log")) as servers:
        url, name = servers.serve("m")
        assert url.startswith("http://127.0.0.1:") and name == "served-m"
        assert servers.serve("m") == (url, name)
