"""The protocol of forest attention backends, and what a decoder's layers request of them.

A backend is a module with three functions; `rrhf_fast.model.attention` chooses one at start-up:

    plan(pack) -> plan          once per pack, on the host: a Movable that all layers share
    attend(query, key, value, plan, *, scale, window, softcap, sinks) -> output     once per layer
    obstacle(spec, device, dtype, max_tokens) -> why it is unsupported here, or None

`attend` takes query [1, H, N, D], rotated by position, key [1, H_kv, N, D] and value
[1, H_kv, N, D_v], where H is a multiple of H_kv, and returns [1, N, H, D_v], the layout that
Hugging Face's attention modules expect. Its options:

    scale      factor of the scores, default 1 / sqrt(D)
    window     a query sees at most the last `window` tokens of its path, itself included
    softcap    scores become softcap * tanh(scores / softcap) (Gemma 2)
    sinks      [H] logits that join each softmax and contribute no value (gpt-oss)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer requests of its attention."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
