"""vLLM within this process as a source of responses; it batches, caches and shards by itself."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing import active_children

import numpy as np

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import Draft
from rrhf_fast.model.decoder import inference_dtype, load_tokenizer
from rrhf_fast.model.generate import batches_by_length, own_end_token_ids
from rrhf_fast.model.pretrained import check_generation_config
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.local import as_response, seed_of, tokenise_prompts
from rrhf_fast.stages.endpoint import EndpointDown
from rrhf_fast.stages.launcher import launched

# Prompts given to vLLM at once, in units of batch_size: many, because its own batches run empty at
# the end of each call; not all, because a kill loses those of a call.
_BATCHES_PER_CALL = 16
# A script that waits until standard input ends, and then ends these processes.
_REAPER = """
import os, signal, sys
os.read(0, 1)
for process in sys.argv[1:]:
    try:
        os.kill(int(process), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def check_vllm(where: str) -> None:
    """Raise ValueError, beginning with `where`, if vLLM is not installed or cannot shard."""
    if find_spec("vllm") is None:
        problem = "vllm is not installed here (pip install vllm)"
        raise ValueError(f"{where}backend: {problem}")
    if launched().size > 1:
        problem = "vllm starts its own processes (set engine_kwargs, and no torchrun or srun)"
        raise ValueError(f"{where}backend: {problem}")


class VllmModel:
    """A model in an engine of vLLM, and tokenised prompts; used as `LocalModel` is.

    batches: row numbers of the prompts of a call; rows that exceed the window are left out.
    report: counts these rows.
    """

    def __init__(
        self,
        name: str,
        drafts: Sequence[Draft],
        config: SampleConfig,
        option: str,
        engine_kwargs: dict,
    ):
        """Start the engine for the model named by `option`. Raises ValueError if there is no such
        model, a prompt does not fit its window, or vLLM refuses model or arguments."""
        # Before the import. It is talkative, and says in a traceback of its own what went wrong.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        code = config.trust_remote_code
        self.name, self.config, self.report = name, config, RowReport()
        self.engine_kwargs = engine_kwargs
        self.tokenizer = load_tokenizer(name, trust_remote_code=code, option=option)
        widths = [policy.num_beams or policy.count for policy in config.policies]
        options = {
            "dtype": inference_dtype(config.dtype),
            "trust_remote_code": code,
            "seed": config.seed % 2**31,
            "enable_prefix_caching": True,  # a prompt is encoded once for its responses
            "generation_config": "vllm",  # only the policy decides how to decode
            "max_logprobs": max(20, 2 * max(widths)),  # for beams
        }
        before = set(active_children())
        try:
            self._llm = LLM(model=name, **options | engine_kwargs)
        except Exception as error:  # its own of many kinds, for options, memory and models
            raise ValueError(f"{option}: vLLM cannot run {name} ({one_line(error)})") from error
        # The engine would outlive this process if that is killed, and hold its memory.
        engines = [str(process.pid) for process in set(active_children()) - before]
        self._reaper = subprocess.Popen(
            [sys.executable, "-c", _REAPER, *engines], stdin=subprocess.PIPE, start_new_session=True
        )
        self.max_length = self._llm.llm_engine.model_config.max_model_len
        self.prompts, ends = tokenise_prompts(
            self.tokenizer, drafts, config, self.report, self.max_length
        )
        self.end_token_ids = sorted({*ends, *own_end_token_ids(check_generation_config(name))})
        rows = list(self.prompts)
        size = config.batch_size * _BATCHES_PER_CALL
        self.batches = [
            [rows[i] for i in batch]
            for batch in batches_by_length([len(self.prompts[i]) for i in rows], size)
        ]

    def answer(self, policy: Policy, batch: int, seed: int) -> list[list[dict]]:
        """The responses to each prompt of a batch, as {"text", "finish_reason", "as_generated"}."""
        prompts = [self.prompts[i] for i in self.batches[batch]]
        decode = self._beams if policy.method == "beam" else self._samples
        try:
            generated = decode(policy, prompts, seed)
        except Exception as error:  # its own kinds again
            kind = ValueError if isinstance(error, ValueError) else EndpointDown
            raise kind(f"vLLM: {self.name}: {one_line(error)}") from error
        stop_strings = self.config.stop_strings
        return [
            [
                as_response(ids, self.tokenizer, self.end_token_ids, stop_strings)
                for ids in responses
            ]
            for responses in generated
        ]

    def __del__(self):
        """Stop the engine's processes and free their memory, for which vLLM waits until the end."""
        if reaper := getattr(self, "_reaper", None):
            reaper.kill()
            reaper.communicate()
            self._llm.llm_engine.engine_core.shutdown(timeout=60)

    def _samples(
        self, policy: Policy, prompts: list[np.ndarray], seed: int
    ) -> list[list[list[int]]]:
        from vllm import SamplingParams

        stop = self.config.stop_strings
        params = [
            SamplingParams(
                n=policy.count,
                temperature=0.0 if policy.method == "greedy" else policy.temperature,
                top_p=policy.top_p,
                top_k=policy.top_k,
                max_tokens=min(policy.max_new_tokens, self.max_length - len(ids)),
                stop_token_ids=self.end_token_ids,
                stop=stop or None,
                detokenize=bool(stop),
                skip_special_tokens=False,
                seed=seed_of(seed, i) % 2**31 if self.config.send_seed else None,
            )
            for i, ids in enumerate(prompts)
        ]
        outputs = self._llm.generate(_as_tokens(prompts), params, use_tqdm=False)
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]

    def _beams(self, policy: Policy, prompts: list[np.ndarray], seed: int) -> list[list[list[int]]]:
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(
            beam_width=policy.num_beams or policy.count,
            max_tokens=min(policy.max_new_tokens, self.max_length - max(map(len, prompts))),
            include_stop_str_in_output=True,
        )
        outputs = self._llm.beam_search(_as_tokens(prompts), params)
        return [
            [
                _until_end(beam.tokens[len(ids) :], self.end_token_ids)
                for beam in output.sequences[: policy.count]
            ]
            for output, ids in zip(outputs, prompts, strict=True)
        ]


def _as_tokens(prompts: list[np.ndarray]) -> list[dict]:
    return [{"prompt_token_ids": ids.tolist()} for ids in prompts]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token: vLLM's beams end at EOS alone."""
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: at + 1]
