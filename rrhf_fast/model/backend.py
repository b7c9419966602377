"""What every attention backend of the forest offers, and what a decoder asks of it.

A backend is a module with three functions; `rrhf_fast.model.attention` chooses one at start-up:

    plan(pack) -> plan          once a pack, on the host: what all layers share, a Movable
    attend(query, key, value, plan, *, scale, window, softcap, sinks) -> output     once a layer
    obstacle(spec, device, dtype, max_tokens) -> why it cannot serve, or None

`attend` takes query [1, H, N, D], rotated by position, key [1, H_kv, N, D] and value
[1, H_kv, N, D_v], where H is a multiple of H_kv, and returns [1, N, H, D_v], the layout that
Hugging Face's attention modules expect. Its options:

    scale      of the scores, default 1 / sqrt(D)
    window     a query sees at most the last `window` tokens of its path, itself included
    softcap    scores become softcap * tanh(scores / softcap) (Gemma 2)
    sinks      [H] logits that join each softmax and attend to nothing (gpt-oss)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer asks of its attention."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
