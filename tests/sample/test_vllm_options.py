"""Options of vLLM in-process, checked without it; tests/engines run it."""

import pytest

from rrhf_fast import demo
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.sample import sample, vllm
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.identity import identity
from tests.jsonl import write

MODEL = str(demo.MODEL_DIR)


@pytest.fixture
def config(tmp_path):
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", [{"prompt": "One day"}]),
        output=str(tmp_path / "sampled.jsonl"),
        model_name_or_path=MODEL,
        policies=[Policy(method="greedy", backend="vllm")],
    )


@pytest.mark.parametrize("method", ["diverse_beam", "openai", "provided"])
def test_methods_that_vllm_lacks_are_refused(method):
    with pytest.raises(ValueError, match=f"backend: vllm decodes with .*, found method {method}"):
        Policy(method=method, backend="vllm").validate()


def test_arguments_of_vllm_need_vllm(config):
    kwargs = {"max_model_len": 1}
    with pytest.raises(ValueError, match="engine_kwargs: is for backend vllm"):
        Policy(engine_kwargs=kwargs).validate()
    evaluation = EvaluateConfig(reward_fn="a:b", engine_kwargs=kwargs)
    with pytest.raises(ValueError, match="engine_kwargs: is for backend vllm"):
        evaluation.validate()


def test_evaluations_sample_in_one_way(tmp_path):
    served = "python {model} {port}"
    options = {"reward_fn": "a:b", "model_name_or_path": "m", "data": "d", "output_dir": "o"}
    with pytest.raises(ValueError, match="backend: vllm decodes with"):
        EvaluateConfig(backend="vllm", serve_command=served, **options).validate()
    asked = EvaluateConfig(serve_command=served, **options).sampling("m", "model")
    assert (asked.method, asked.send_tokens, asked.source) == ("openai", True, "model")
    here = EvaluateConfig(backend="vllm", **options).sampling("m")
    assert (here.method, here.backend) == ("sample", "vllm")


def test_a_missing_vllm_is_one_line(config, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"policies\[0\].backend: vllm is not installed"):
        sample(config)
    assert not list(tmp_path.glob("*.journal"))


def test_ranks_do_not_each_start_an_engine(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda _: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"policies\[0\].backend: vllm starts its own processes"):
        vllm.check_vllm("policies[0].")


def test_where_a_model_runs_is_no_part_of_what_it_says(config):
    before = identity(config)
    config.policies[0].engine_kwargs = {"gpu_memory_utilization": 0.5}
    config.serve_command = "python {model} {port}"
    assert identity(config) == before
    config.policies[0].backend = "transformers"
    assert identity(config) != before


def test_the_port_of_a_local_server_may_change(config):
    addresses = ["http://127.0.0.1:8000/v1", "http://127.0.0.1:9000/v1", "http://127.0.0.1:9000/v2"]
    addresses += ["http://other:9000/v1", "http://other:9001/v1"]
    found = []
    for address in addresses:
        config.policies = [Policy(method="openai", base_url=address)]
        found.append(identity(config)["policies"][0]["base_url"])
    assert found[0] == found[1] and len(set(found)) == 4
