"""Sums and means over packs, and held-out measures: loss, ranking accuracy, and the reward of
fresh samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rrhf_fast.data.active import kept_rows
from rrhf_fast.data.corpus import Corpus
from rrhf_fast.data.encode import decode_response
from rrhf_fast.data.forest import Pack, PackedForest
from rrhf_fast.losses import RRHFLoss
from rrhf_fast.model.decoder import max_positions
from rrhf_fast.model.flops import Flops
from rrhf_fast.model.generate import own_end_token_ids, sample_responses
from rrhf_fast.model.pretrained import padding_id
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.stages.reward_fn import RewardFn, call_reward_fn
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World, gathered


class Sums(NamedTuple):
    """What `Totals` sums over packs."""

    loss: float  # of queries, as are the two parts
    rank_loss: float
    sft_loss: float
    num_correct: float  # pairs in which the better response scores higher
    margins: float  # over pairs, of the better score minus the worse
    num_pairs: float
    num_queries: float
    num_tokens: float  # padding included
    num_flags: float
    num_active_tokens: float  # those with a gradient
    num_real_tokens: float  # those of packs whose active ones are counted, without padding
    decoder_flops: float
    attention_flops: float
    head_flops: float


class Totals:
    """`Sums` over packs in one tensor, float64 on the device. It may be summed over ranks, and be
    replaced by its copy on the host, so that reading waits for the device only once."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, sums: Sequence[float]) -> "Totals":
        """Those with these sums."""
        totals = cls()
        totals.sums += torch.tensor(sums, dtype=torch.float64)
        return totals

    def read(self) -> Sums:
        """The sums as numbers."""
        return Sums(*self.sums.tolist())

    def add(self, out: RRHFLoss, pack: Pack, share: float = 1.0) -> None:
        """Add one pack's loss, which was multiplied by `share`. Waits for no device, as all that
        add; none of them adds a filler."""
        self._add(
            pack,
            loss=out.loss.detach() * (pack.num_queries / (share or 1.0)),
            rank_loss=out.rank_loss.detach().sum(),
            sft_loss=out.sft_loss.detach().sum(),
            num_correct=out.num_correct.sum(),
            margins=out.margins.sum(),
            num_pairs=out.num_pairs.sum(),
            num_queries=pack.num_queries,
            num_tokens=pack.num_tokens,
        )

    def add_active(self, pack: PackedForest, is_active: torch.Tensor) -> None:
        """Count the pack's tokens that lead to an edge in `is_active` [E], and those that lead to
        any edge, as all but padding do."""
        self._add(
            pack,
            num_active_tokens=kept_rows(pack, is_active).sum(),
            num_real_tokens=kept_rows(pack, torch.ones_like(is_active)).sum(),
        )

    def add_flops(self, pack: Pack, flops: Flops) -> None:
        """Add work on a pack."""
        self._add(pack, **{f"{part}_flops": count for part, count in flops._asdict().items()})

    def _add(self, pack: Pack, **amounts: torch.Tensor | float) -> None:
        for name, amount in amounts.items() if pack.num_queries else ():
            self.sums[Sums._fields.index(name)] += amount

    def flag(self) -> None:
        """Raise a flag that the sum over ranks carries to all of them."""
        self.sums[Sums._fields.index("num_flags")] += 1

    @property
    def flagged(self) -> bool:
        """Whether any rank raised the flag."""
        return self.read().num_flags > 0

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a finite number."""
        return math.isfinite(self.read().loss)

    @property
    def num_tokens(self) -> int:
        """Tokens of all packs, padding included, fillers not."""
        return int(self.read().num_tokens)

    @property
    def active_fraction(self) -> float:
        """The share of tokens that have a gradient; NaN if not tracked."""
        sums = self.read()
        return _ratio(sums.num_active_tokens, sums.num_real_tokens)

    @property
    def flops(self) -> Flops:
        """Operations that loss and gradient needed, by part; 0 if not tracked. Model FLOPs
        utilisation is their sum over seconds, ranks and `roofline.product_speed`."""
        sums = self.read()
        return Flops(sums.decoder_flops, sums.attention_flops, sums.head_flops)

    def means(self) -> dict[str, float]:
        """Losses per query; accuracy and margin per pair (NaN without pairs)."""
        sums = self.read()
        return {
            "loss": sums.loss / sums.num_queries,
            "rank_loss": sums.rank_loss / sums.num_queries,
            "sft_loss": sums.sft_loss / sums.num_queries,
            "rewards/accuracies": _ratio(sums.num_correct, sums.num_pairs),
            "rewards/margins": _ratio(sums.margins, sums.num_pairs),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


@torch.no_grad()
def evaluate_ranking(
    model: RRHFModel, packs: Sequence[Pack], world: World | None = None
) -> dict[str, float]:
    """`Totals.means` of held-out packs, over all ranks if `world` is given."""
    totals = Totals(model.device)
    for pack in packs:
        pack = pack.to(model.device)
        totals.add(model(pack), pack)
    if world is not None:
        world.sum(totals.sums)
    return totals.means()


def evaluate_samples(
    model: RRHFModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Corpus,
    reward_fn: RewardFn,
    config: TrainConfig,
    world: World | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """Sample `eval_samples` fresh responses per prompt at temperature 1 and score them. Each rank
    of `world` samples for its share of the prompts; the first one scores.

    Returns:
        {"reward", "reward_ci95" (half width of a normal interval over prompts), "response_length"
        in tokens}, and one {"prompt", "response", "reward"} per sample.

    Raises:
        ValueError: the reward function did not return one finite number per response.
    """
    world = world or World(model.device)
    places = [place for place in range(len(queries)) for _ in range(config.eval_samples)]
    prompts = list(map(queries.prompt, places))
    prompt_ids = [queries[place].prompt_ids for place in places]
    own = own_end_token_ids(model.lm.generation_config)
    end_tokens = sorted({tokenizer.eos_token_id, *queries.end_ids, *own})
    with model.generation(), model.autocast(), gathered(model, config):
        share = sample_responses(
            model.lm,
            prompt_ids[world.rank :: world.size],
            max_new_tokens=config.eval_max_new_tokens,
            max_length=max_positions(model.lm),
            end_token_ids=end_tokens,
            pad_token_id=padding_id(tokenizer, model.lm),
            seed=config.seed + world.rank,
        )
    tokens = [None] * len(prompts)
    for rank, sampled in enumerate(world.gather(share)):
        tokens[rank :: world.size] = sampled
    responses = [decode_response(tokenizer, ids, end_tokens) for ids in tokens]
    rewards = world.once(lambda: _score(reward_fn, prompts, responses, config.eval_reward_fn))
    by_prompt = rewards.reshape(len(queries), -1).mean(1)
    measures = {
        "reward": rewards.mean(),
        "reward_ci95": 1.96 * by_prompt.std(ddof=1) / len(by_prompt) ** 0.5
        if len(by_prompt) > 1
        else float("nan"),
        "response_length": np.mean([len(ids) for ids in tokens]),
    }
    samples = [
        {"prompt": prompt, "response": response, "reward": reward}
        for prompt, response, reward in zip(prompts, responses, rewards.tolist(), strict=True)
    ]
    return {name: float(value) for name, value in measures.items()}, samples


def _score(reward_fn: RewardFn, prompts: list, responses: list[str], name: str) -> np.ndarray:
    """[N] float64 rewards, checked."""
    rewards = call_reward_fn(reward_fn, prompts, responses, name, "eval_reward_fn")
    if not np.isfinite(rewards).all():
        problem = f"expected {len(responses)} finite numbers, one per response, found {rewards}"
        raise ValueError(f"eval_reward_fn: {name}: {problem}"[:200])
    return rewards
