"""A model of Hugging Face transformers as a source of responses."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rrhf_fast.data.encode import decode_response
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import Draft, cut_at
from rrhf_fast.data.tokenise import end_token_ids, tokenise_rows
from rrhf_fast.model.decoder import inference_dtype, load_model, load_tokenizer, max_positions
from rrhf_fast.model.generate import batches_by_length, generate_batch, own_end_token_ids
from rrhf_fast.model.pretrained import check_forward, check_vocabulary, loading, padding_id
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.journal import fingerprint
from rrhf_fast.stages.ranks import local_device


class LocalModel:
    """Weights, tokenizer and tokenised prompts; answers them batch by batch.

    batches: row numbers of prompts of similar length; rows that exceed the window are left out.
    report: counts these rows.
    """

    def __init__(self, name: str, drafts: Sequence[Draft], config: SampleConfig, option: str):
        """Load the model named by `option`. Raises ValueError if there is no such model or a prompt
        does not fit its window."""
        code = {"trust_remote_code": config.trust_remote_code, "option": option}
        self.name, self.config, self.report = name, config, RowReport()
        self.tokenizer = load_tokenizer(name, **code)
        self.lm = load_model(name, **code).to(local_device(), inference_dtype(config.dtype))
        with loading(name, option):
            check_forward(self.lm)
        self.max_length = max_positions(self.lm)
        self.prompts, ends = tokenise_prompts(
            self.tokenizer, drafts, config, self.report, self.max_length
        )
        self.end_token_ids = sorted({*ends, *own_end_token_ids(self.lm.generation_config)})
        check_vocabulary([*self.prompts.values(), self.end_token_ids], self.lm, name, option)
        usable = list(self.prompts)
        self.batches = [
            [usable[i] for i in batch]
            for batch in batches_by_length(
                [len(self.prompts[i]) for i in usable], config.batch_size
            )
        ]

    def answer(self, policy: Policy, batch: int, seed: int) -> list[list[dict]]:
        """The responses to each prompt of a batch, as {"text", "finish_reason", "as_generated"}."""
        stop_strings = self.config.stop_strings
        gpus = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            generated = generate_batch(
                self.lm,
                [self.prompts[i] for i in self.batches[batch]],
                policy,
                max_length=self.max_length,
                end_token_ids=self.end_token_ids,
                pad_token_id=padding_id(self.tokenizer, self.lm),
                stop_strings=stop_strings,
                tokenizer=self.tokenizer,
            )
        return [
            [
                as_response(ids, self.tokenizer, self.end_token_ids, stop_strings)
                for ids in responses
            ]
            for responses in generated
        ]


def tokenise_prompts(
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
    config: SampleConfig,
    report: RowReport,
    max_length: int | None,
) -> tuple[dict[int, np.ndarray], list[int]]:
    """The tokens of prompts as training sees them, by the numbers of their rows, and the tokens
    that end a response.

    Args:
        report: counts rows that are left out, such as those that fill a window of `max_length`.

    Raises:
        ValueError: a prompt that cannot be read, unless the options skip those; or all are such.
    """
    rows = [draft.pick([]).as_row() for draft in drafts]
    template = {"chat_template_kwargs": config.chat_template_kwargs}
    queries, _ = tokenise_rows(
        rows,
        tokenizer,
        report,
        max_length=max_length or 10**9,
        max_prompt_length=config.max_prompt_length,
        on_bad_rows=config.on_bad_rows,
        **template,
    )
    numbers = {id(row): i for i, row in enumerate(rows)}
    prompts = {numbers[id(query.row)]: query.prompt_ids for query in queries}
    return prompts, end_token_ids(tokenizer, [query.row for query in queries], **template)


def as_response(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: list[int],
    stop_strings: list[str],
) -> dict:
    """What is recorded of a response of these tokens: {"text", "finish_reason", "as_generated"}."""
    text = decode_response(tokenizer, ids, end_token_ids)
    cut = cut_at(stop_strings, text)
    ended = cut != text or (len(ids) > 0 and ids[-1] in end_token_ids)
    reason = "stop" if ended else "length"
    return {"text": cut, "finish_reason": reason, "as_generated": True}


def seed_of(*parts: int) -> int:
    """A 60-bit seed for this position in a run, independent of its neighbours' seeds."""
    return int(fingerprint(*parts)[:15], 16)
