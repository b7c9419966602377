"""Log-probs of given responses under a model, through the trainer's packed forest."""

from collections.abc import Sequence

import numpy as np
import torch

from rrhf_fast.data.load import RowReport
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.rows import BadRow, Draft, Row
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import (
    inference_dtype,
    load_model,
    load_tokenizer,
    max_positions,
    rope_of_longest,
)
from rrhf_fast.model.pretrained import check_forward, check_vocabulary, loading, padding_id
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import local_device

# Tokens of prompt and response, if the model's config has no window.
DEFAULT_WINDOW = 4096


class LogProbs:
    """A causal LM that gives the log-probs of the responses of rows."""

    def __init__(
        self,
        name: str,
        config: ScorerConfig,
        option: str = "model_name_or_path",
        *,
        max_length: int | None = None,
    ):
        """Load the model named by `option`, with a window of at most `max_length` tokens. Raises
        ValueError if there is no such model or forest packing does not support it."""
        code = {"trust_remote_code": config.trust_remote_code, "option": option}
        self.tokenizer = load_tokenizer(name, **code)
        lm = load_model(name, **code).to(local_device())
        with loading(name, option):
            check_forward(lm)
        window = max_positions(lm) or DEFAULT_WINDOW
        self.max_length = min(window, max_length or window)
        self._packing = config.packing
        match rope_of_longest(lm, self.max_length):
            case "longrope", _:  # rows, one at a time
                self._packing = "none"
            case "dynamic", window:  # beyond it a row's rotation depends on those before
                self.max_length = window
        self.config, self._name, self._option = config, name, option
        self._has_cut = False
        self.model = RRHFModel(
            lm,
            LossConfig(),
            packing=self._packing,
            max_length=self.max_length,
            compute_dtype=inference_dtype(config.dtype),
        )

    @torch.no_grad()
    def __call__(self, drafts: Sequence[Draft | Row]) -> list[list[np.ndarray | str]]:
        """[row][response] -> the log-probs [R] of its tokens, the end token last; with
        `--on_bad_rows skip`, the reason if there are none (the chat template changes the response,
        for example).

        A response is cut to the room that its prompt leaves in the model's window, as in training,
        which is said once. A prompt that fills the window is bad.
        """
        rows = [draft.as_row() if isinstance(draft, Draft) else draft for draft in drafts]
        results: list[list[np.ndarray | str]] = [[""] * len(row.responses) for row in rows]
        places = [(number, range(len(row.responses))) for number, row in enumerate(rows)]
        places = [place for place in places if place[1]]
        try:
            queries = self._tokenise([rows[number] for number, _ in places])
        except BadRow:
            if self.config.on_bad_rows == "error":
                raise
            places = [(number, self._usable(rows[number], results[number])) for number, _ in places]
            places = [place for place in places if place[1]]
            queries = self._tokenise([rows[number].pick(keep) for number, keep in places])
        planner = PackPlanner(
            queries,
            packing=self._packing,
            max_tokens_per_pack=self.config.max_tokens_per_pack,
            pad_token_id=padding_id(self.tokenizer, self.model.lm),
            pad_to_multiple_of=self.model.pad_to_multiple_of,
            plan=self.model.plan,
        )
        for ids in planner.group(range(len(queries))):
            pack = planner.build(ids).to(self.model.device)
            logps = self.model.edge_logps(pack)[pack.path_edges].float().cpu().numpy()
            parts = iter(np.split(logps, pack.path_offsets[1:-1].cpu().numpy()))
            for number, keep in (places[i] for i in ids):
                for i in keep:
                    results[number][i] = next(parts)
        return results

    def _tokenise(self, rows: Sequence[Row]) -> list[TokenisedQuery]:
        if not rows:
            return []
        queries, counts = tokenise_rows(
            rows,
            self.tokenizer,
            RowReport(),
            max_length=self.max_length,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )
        if counts.cut and not self._has_cut:
            self._has_cut = True
            say(
                f"note: {self._option}: responses are cut to its window of {self.max_length} tokens"
            )
        ids = (ids for query in queries for ids in (query.prompt_ids, *query.response_ids))
        check_vocabulary(ids, self.model.lm, self._name, self._option)
        return queries

    def _usable(self, row: Row, reasons: list[np.ndarray | str]) -> list[int]:
        """The responses of a row that can be tokenised; notes `reasons` for the others."""
        keep = []
        for i in range(len(row.responses)):
            try:
                self._tokenise([row.pick([i])])
                keep.append(i)
            except BadRow as error:
                reasons[i] = error.args[2]
        return keep


def generated(logps: np.ndarray, finish_reason: str | None) -> np.ndarray:
    """The log-probs of a response's own tokens: without the end token if it was cut off.

    These are the tokens of its text, as in training. They are the sampled ones, except where the
    sampler spelt a word in other pieces than the tokenizer does (rare)."""
    return logps[:-1] if finish_reason == "length" else logps
