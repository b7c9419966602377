"""Held-out measures: loss, ranking accuracy, and the reward of fresh samples."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rrhf_fast.data.active import kept_rows
from rrhf_fast.data.encode import decode_response
from rrhf_fast.data.forest import Pack, PackedForest
from rrhf_fast.data.tokenise import TokenisedQuery, learned_end_ids
from rrhf_fast.losses import RRHFLoss
from rrhf_fast.model.decoder import max_positions
from rrhf_fast.model.generate import sample_responses
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.stages.reward_fn import RewardFn
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World, gathered


class Totals:
    """Sums of `RRHFLoss` over packs, kept on the device; `means` brings them to the host once."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(11, dtype=torch.float64, device=device)

    def add(self, out: RRHFLoss, pack: Pack, share: float = 1.0) -> None:
        """Add one pack, if it is no filler. `share` is what its loss was multiplied by. Waits for
        no device."""
        if not pack.num_queries:
            return
        parts = [
            out.loss.detach() * (pack.num_queries / share),
            out.rank_loss.detach().sum(),
            out.sft_loss.detach().sum(),
        ]
        parts += [out.num_correct.sum(), out.margins.sum(), out.num_pairs.sum()]
        self.sums[:6] += torch.stack([part.double() for part in parts])
        self.sums[6] += pack.num_queries
        self.sums[7] += pack.num_tokens

    def add_active(self, pack: PackedForest, is_active: torch.Tensor) -> None:
        """Add how many of a pack's tokens lead to an edge that `is_active` [E]; padding leads to
        none."""
        if pack.num_queries:
            self.sums[9] += kept_rows(pack, is_active).sum()
            self.sums[10] += kept_rows(pack, torch.ones_like(is_active)).sum()

    @property
    def active_fraction(self) -> float:
        """The share of tokens that have a gradient; nan where nobody counted."""
        kept, tokens = self.sums[9:].tolist()
        return kept / tokens if tokens else float("nan")

    def flag(self) -> None:
        """Raise a flag that `sum` hands to all ranks: the same all-reduce carries it."""
        self.sums[8] += 1

    @property
    def flagged(self) -> bool:
        """Whether any rank raised the flag."""
        return self.sums[8].item() > 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all packs, padding included, fillers not."""
        return int(self.sums[7].item())

    def means(self) -> dict[str, float]:
        """Losses a query; accuracy and margin a pair (nan without pairs)."""
        loss, rank, sft, correct, margin, pairs, queries = self.sums[:7].tolist()
        return {
            "loss": loss / queries,
            "rank_loss": rank / queries,
            "sft_loss": sft / queries,
            "rewards/accuracies": correct / pairs if pairs else float("nan"),
            "rewards/margins": margin / pairs if pairs else float("nan"),
        }


@torch.no_grad()
def evaluate_ranking(
    model: RRHFModel, packs: Sequence[Pack], world: World | None = None
) -> dict[str, float]:
    """`Totals.means` of held-out packs; of all ranks' packs, if `world` is given."""
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
    queries: Sequence[TokenisedQuery],
    reward_fn: RewardFn,
    config: TrainConfig,
    world: World | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """Sample `eval_samples` fresh responses a prompt at temperature 1 and score them. Each rank of
    `world` samples for its share of the prompts; the first scores.

    Returns:
        {"reward", "reward_ci95" (half width of a normal interval over prompts), "response_length"
        in tokens}, and one {"prompt", "response", "reward"} for each sample.

    Raises:
        ValueError: the reward function returned something else than one finite number a response.
    """
    world = world or World(model.device)
    prompts = [query.row.prompt for query in queries for _ in range(config.eval_samples)]
    prompt_ids = [query.prompt_ids for query in queries for _ in range(config.eval_samples)]
    end_tokens = sorted({tokenizer.eos_token_id, *learned_end_ids(queries)})
    with model.generation(), model.autocast(), gathered(model, config):
        share = sample_responses(
            model.lm,
            prompt_ids[world.rank :: world.size],
            max_new_tokens=config.eval_max_new_tokens,
            max_length=max_positions(model.lm),
            end_token_ids=end_tokens,
            pad_token_id=tokenizer.eos_token_id
            if tokenizer.pad_token_id is None
            else tokenizer.pad_token_id,
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
    try:
        rewards = np.asarray(reward_fn(prompts, responses), dtype=np.float64)
    except Exception as error:  # whatever the user's function raises
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"eval_reward_fn: {name} raised {problem}") from error
    if rewards.shape != (len(responses),) or not np.isfinite(rewards).all():
        expected = f"expected {len(responses)} finite numbers, one a response"
        problem = f"{name}: {expected}, found {rewards.shape} {rewards}"
        raise ValueError(f"eval_reward_fn: {problem[:200]}")
    return rewards
