"""Workloads: queries in tokens, of given lengths or from real rows; and models of given shapes,
with random weights, since time does not depend on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from rrhf_fast.data.load import load_rows
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.rrhf import RRHFModel


@dataclass(frozen=True)
class Lengths:
    """Queries of equal length: tokens of the prompt and of each of k responses."""

    prompt: int
    response: int
    k: int

    @property
    def tokens(self) -> int:
        """Tokens of a query in a pack; the last token of a response is never an input."""
        return self.prompt + self.k * (self.response - 1)

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response} k={self.k}"


PAPER = Lengths(128, 64, 6)  # the paper's data: at most 192 tokens, 6 responses
EQUAL = Lengths(64, 64, 6)
LONG_PROMPTS = Lengths(1024, 128, 8)
LONG_RESPONSES = Lengths(128, 1024, 4)


# Default tokens per pack. A GPU needs large packs to amortise their fixed cost of about 10 ms.
PACK_TOKENS = {"cpu": 2048, "cuda": 16_384}


def fill(lengths: Lengths, max_tokens: int, packs: int = 4) -> int:
    """How many queries with shared prompts fill `packs` packs."""
    return -(-packs * max_tokens // lengths.tokens)


def draw(lengths: Lengths, count: int, vocab_size: int, *, seed: int = 0) -> list[TokenisedQuery]:
    """`count` queries of random tokens and rewards; their responses share only the prompt."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(0, vocab_size, length, dtype=np.int32)

    return [
        TokenisedQuery(
            tokens(lengths.prompt),
            [tokens(lengths.response) for _ in range(lengths.k)],
            rng.random(lengths.k, dtype=np.float32),
        )
        for _ in range(count)
    ]


def draw_tries(
    lengths: Lengths, count: int, vocab_size: int, *, seed: int = 0
) -> list[TokenisedQuery]:
    """As `draw`, but each response shares a random prefix with an earlier one, as in beam
    search."""
    rng = np.random.default_rng(seed)
    queries = draw(lengths, count, vocab_size, seed=seed)
    for query in queries:
        for i in range(1, lengths.k):
            shared = rng.integers(0, lengths.response)
            query.response_ids[i][:shared] = query.response_ids[rng.integers(0, i)][:shared]
    return queries


def real(data: str, tokenizer_of: str, count: int) -> list[TokenisedQuery]:
    """`count` queries from a file of rows in the tokens of this model, evenly spaced by size, so
    that their lengths represent the file's."""
    rows, report = load_rows(data, on_bad_rows="skip")
    tokenizer = load_tokenizer(tokenizer_of)
    queries, _ = tokenise_rows(rows, tokenizer, report, max_length=2048, on_bad_rows="skip")
    queries.sort(key=padded_tokens)
    count = min(count, len(queries))
    # The middle of each of `count` equal parts.
    places = (np.arange(count) + 0.5) * len(queries) / count
    return [queries[int(place)] for place in places]


def weights_note(model: str) -> str:
    """What the files of a model tell about its weights: their dtype, and whether they come from 4
    bits each, as dequantised files of Q4_0, Q4_1 and their kind do. Figures of such a model are not
    those of the published one."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return "unknown"
    with safe_open(files[0], "pt") as file:
        names = [n for n in file.keys() if n.endswith("_proj.weight")]  # noqa: SIM118
        rows = [file.get_slice(name)[:64] for name in names[:8]]
    if not rows:
        return "unknown"
    dtype = str(rows[0].dtype).removeprefix("torch.")
    if all(map(_are_of_4_bits, rows)):
        return f"dequantised from 4 bits (at most 16 values in every {BLOCK} weights), in {dtype}"
    return dtype


BLOCK = 32  # weights that share a scale in formats of 4 bits


def _are_of_4_bits(rows: torch.Tensor) -> bool:
    """Whether no block of a row has more than 16 values."""
    if rows.shape[1] % BLOCK:
        return False
    blocks = rows.float().reshape(-1, BLOCK).sort(1).values
    return int((blocks.diff(dim=1) != 0).sum(1).max()) < 16


# hidden, layers, heads, key-value heads, feed-forward, vocabulary, tied
SHAPES = {
    "tiny": (192, 4, 6, 2, 512, 8_192, True),
    "SmolLM2-135M": (576, 30, 9, 3, 1_536, 49_152, True),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4_864, 151_936, True),
    "Llama-3.2-1B": (2_048, 16, 32, 8, 8_192, 128_256, True),
    "Llama-3.2-3B": (3_072, 28, 24, 8, 8_192, 128_256, True),
    "Llama-2-7B": (4_096, 32, 32, 32, 11_008, 32_000, False),
    "two layers of Llama-3-8B": (4_096, 2, 32, 8, 14_336, 8_192, False),
}


def build_model(
    shape: str, *, device: str, vocab_size: int | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model of this shape, optionally with another vocabulary, with random float32 weights, in
    eval mode like those of `load_model`."""
    hidden, layers, heads, kv_heads, feed_forward, own_vocab_size, tied = SHAPES[shape]
    family = Qwen2Config if shape.startswith("Qwen2") else LlamaConfig
    config = family(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        vocab_size=vocab_size or own_vocab_size,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def unpacked_tokens(queries: Sequence[TokenisedQuery]) -> int:
    """Tokens encoded if every response carries its prompt, without padding."""
    return sum(
        len(query.prompt_ids) + len(ids) - 1 for query in queries for ids in query.response_ids
    )


def planner_for(model: RRHFModel, queries: Sequence[TokenisedQuery], tokens: int) -> PackPlanner:
    """The trainer's planner for a forest model, with packs of at most `tokens` tokens."""
    return PackPlanner(
        queries,
        packing="forest",
        max_tokens_per_pack=tokens,
        pad_to_multiple_of=model.pad_to_multiple_of,
        plan=model.plan,
    )
