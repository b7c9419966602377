"""forest_sdpa: forest attention on any device, with PyTorch's scaled_dot_product_attention.

Chains (see `rrhf_fast.model.chains`) of similar shape are padded into one batch (a *bucket*), so a
layer needs a few calls instead of one per chain. A dense [N, N] mask would be correct too, but
computes N^2 scores, of which a forest needs a small part.

Legend: C chains in a bucket, Q queries, K keys, H heads, N tokens in the pack, D head size.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from rrhf_fast.data.forest import Movable, PackedForest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.chains import cut_chains, gather_rows

# Chains whose lengths are within this factor share a bucket. Larger: fewer calls, more padding.
BUCKET_FACTOR = 1.5


@dataclass(frozen=True)
class Bucket(Movable):
    """Chains of similar shape. Padding repeats a chain's last query and last key, so that no row
    is fully masked."""

    query_depths: torch.Tensor  # [C, Q] int64, padding repeats the last
    num_keys: int  # K
    is_plain_causal: bool  # every chain starts at its root, so causality alone hides padding
    # Not moved with the plan: a pack on the host must not keep the masks of its last forward.
    masks: dict = field(default_factory=dict, init=False)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [C, 1, Q, K] mask, made once for all layers; None if plain causality is
        enough."""
        if self.is_plain_causal and (window is None or window >= self.num_keys):
            return None
        if (window, dtype) not in self.masks:
            # Keys lie at depths 0, 1, ...
            depth = torch.arange(self.num_keys, device=self.query_depths.device)
            seen = depth <= self.query_depths[:, :, None]
            if window is not None:
                seen &= depth > self.query_depths[:, :, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, float("-inf")
            )
            self.masks[window, dtype] = mask.unsqueeze(1)
        return self.masks[window, dtype]


@dataclass(frozen=True)
class Plan(Movable):
    """The buckets of one pack; rows are gathered once for all of them, laid end to end."""

    buckets: tuple[Bucket, ...]
    query_rows: torch.Tensor  # [sum of C * Q] int64, rows of the pack
    key_rows: torch.Tensor  # [sum of C * K] int64
    output_order: torch.Tensor  # [N] int64, position of each row of the pack in query_rows


def obstacle(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> str | None:
    """None: everything is supported."""
    return None


def plan(pack: PackedForest) -> Plan:
    """Cut a pack into chains and sort them into buckets."""
    chains = cut_chains(pack)
    starts, stops, depths, paths = chains.starts, chains.stops, chains.depths, chains.paths
    shapes = np.stack([stops - starts, depths[stops - 1] + 1])  # [2, chains]: queries, keys
    steps = np.ceil(np.log(shapes) / np.log(BUCKET_FACTOR)).astype(int)
    keys = list(zip(*steps, depths[starts] == 0, strict=True))
    buckets, query_rows, key_rows = [], [], []
    order, num_out = np.empty(len(depths), dtype=np.int64), 0
    for key in sorted(set(keys)):
        chosen = [c for c, other in enumerate(keys) if other == key]
        num_queries, num_keys = shapes[:, chosen].max(axis=1).tolist()
        query = np.minimum(starts[chosen, None] + np.arange(num_queries), stops[chosen, None] - 1)
        for place, c in enumerate(chosen):
            order[starts[c] : stops[c]] = num_out + place * num_queries + np.arange(shapes[0, c])
        num_out += query.size
        query_rows.append(query.ravel())
        key_rows += [paths[c][np.minimum(np.arange(num_keys), len(paths[c]) - 1)] for c in chosen]
        buckets.append(
            Bucket(
                query_depths=_tensor(depths[query], pack),
                num_keys=num_keys,
                is_plain_causal=bool(key[2]),
            )
        )
    rows = (_tensor(np.concatenate(parts), pack) for parts in (query_rows, key_rows))
    return Plan(tuple(buckets), *rows, _tensor(order, pack))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a packed forest; see `rrhf_fast.model.backend`."""
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if query.device.type != "cpu" or query.dtype.itemsize > 2:
        return _attend(query, key, value, plan, **options)
    # Faster in float32 there; autocast would cast back.
    with torch.autocast("cpu", enabled=False):
        wide = [states.float() for states in (query, key, value)]
        return _attend(*wide, plan, **options).to(query.dtype)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    queries = _gather(query, plan.query_rows, [b.query_depths.shape for b in plan.buckets])
    chains_and_keys = [(len(b.query_depths), b.num_keys) for b in plan.buckets]
    keys = _gather(key, plan.key_rows, chains_and_keys)
    values = _gather(value, plan.key_rows, chains_and_keys)
    outputs = []
    for bucket, q, k, v in zip(plan.buckets, queries, keys, values, strict=True):
        mask = bucket.mask(window, q.dtype)
        if softcap is None and sinks is None:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        else:
            out = _explicit_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [C * Q, H, D]
    return torch.cat(outputs).index_select(0, plan.output_order).unsqueeze(0)


def _gather(
    states: torch.Tensor, rows: torch.Tensor, shapes: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """[1, H, N, D] -> one [C, H, L, D] for each of the shapes (C, L).

    One gather for all buckets: its backward adds into one buffer, whereas one gather per bucket
    would fill and sum one buffer per bucket.
    """
    gathered = gather_rows(states[0].transpose(0, 1), rows)
    parts = gathered.split([chains * length for chains, length in shapes])
    return [
        part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)
    ]


def _explicit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention with capped scores and sinks, which scaled_dot_product_attention lacks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.full(
            scores.shape[2:], float("-inf"), dtype=scores.dtype, device=scores.device
        ).triu_(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1
        )
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return weights[..., : k.shape[2]] @ v


def _tensor(array: np.ndarray, pack: PackedForest) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(pack.input_ids.device)
