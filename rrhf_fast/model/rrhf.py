"""The root module: a pack goes in, one scalar loss comes out. Decoder, head and loss in one
forward."""

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from rrhf_fast.config import LossConfig
from rrhf_fast.data.forest import Pack, PackedForest
from rrhf_fast.data.padded import PaddedBatch
from rrhf_fast.losses import RRHFLoss, linear_logprob, linear_rrhf_loss, rrhf_loss
from rrhf_fast.model.chains import plan_chains
from rrhf_fast.model.decoder import (
    FOREST,
    attention,
    check_causal,
    check_forest_support,
    decode_forest,
    read_head,
    self_check,
)
from rrhf_fast.model.sharded import small_twin


class RRHFModel(nn.Module):
    """A causal LM that scores the responses of a pack and returns their RRHF loss.

    `packing` "forest" runs packed forests (and refuses models that it would be wrong for); "none"
    runs padded batches.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        loss: LossConfig,
        *,
        packing: str = "forest",
        max_length: int,
        compute_dtype: torch.dtype = torch.float32,
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        self.device = lm.device  # where packs go; sharded weights may live elsewhere
        self.lm, self.loss_config, self.compute_dtype = lm, loss, compute_dtype
        self.plain_attention = lm.config._attn_implementation
        # An empty model cannot be run, but one of its kind can.
        runnable = small_twin(lm) if lm.device.type == "meta" else lm
        if packing == "forest":
            check_forest_support(lm, max_length)
            self_check(runnable, max_length)
            self.head = read_head(lm)
            lm.set_attn_implementation(FOREST)
        else:
            check_causal(runnable)
        if activation_checkpointing != "none":
            for layer in decoder_layers(lm):
                layer.forward = _checkpointed(layer.forward, activation_checkpointing)

    def generation(self) -> AbstractContextManager[None]:
        """Inside this block `lm` is a plain Hugging Face model: it generates, and is saved as
        one."""
        return attention(self.lm, self.plain_attention)

    def forward(self, pack: Pack) -> RRHFLoss:
        """The loss of one pack, mean over its queries; log-probs and loss are float32 or better.
        Only `loss` carries a gradient."""
        if not isinstance(pack, PackedForest):
            return rrhf_loss(self.edge_logps(pack), pack.rewards, **self._loss_options(pack))
        hidden, weight, head = self._head_inputs(pack)
        edges = (pack.edge_rows, pack.edge_targets)
        return linear_rrhf_loss(
            hidden, weight, *edges, pack.rewards, **head, **self._loss_options(pack)
        )

    def edge_logps(self, pack: Pack) -> torch.Tensor:
        """[E] log-prob of each edge's target."""
        if isinstance(pack, PackedForest):
            hidden, weight, head = self._head_inputs(pack)
            return linear_logprob(hidden, weight, pack.edge_rows, pack.edge_targets, **head)
        assert isinstance(pack, PaddedBatch)
        with self._autocast():
            logits = self.lm(
                input_ids=pack.input_ids, attention_mask=pack.attention_mask, use_cache=False
            ).logits
        logits = logits.flatten(0, 1).index_select(0, pack.edge_rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -nn.functional.cross_entropy(logits, pack.edge_targets, reduction="none")

    def _head_inputs(self, pack: PackedForest) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Hidden states [N, H], the head's weight [V, H] and its other arguments."""
        with self._autocast():
            hidden = decode_forest(self.lm, pack, plan_chains(pack))
        if self.compute_dtype != torch.float32:
            # Autocast leaves the residual stream in float32, but the head is a product too.
            hidden = hidden.to(self.compute_dtype)
        head, linear = self.head, self.head.linear
        options = {"softcap": head.softcap, "logit_scale": head.logit_scale}
        return hidden, linear.weight, {"bias": linear.bias, **options}

    def _autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    def _loss_options(self, pack: Pack) -> dict:
        """The pack's layout and the configured loss, as arguments of the loss functions."""
        config = self.loss_config
        widths = None
        if config.compat == "official":
            longest = torch.segment_reduce(
                pack.path_offsets.diff().float(), "max", lengths=pack.group_offsets.diff()
            )
            widths = pack.prompt_lengths + longest.long() - 1
        return {
            "path_edges": pack.path_edges,
            "path_offsets": pack.path_offsets,
            "group_offsets": pack.group_offsets,
            "length_penalty": config.length_penalty,
            "rank_weight": config.rank_weight,
            "sft_weight": config.sft_weight,
            "sft_reduction": "mean" if config.compat == "official" else config.sft_reduction,
            "margin": config.margin,
            "padded_widths": widths,
        }


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: its longest ModuleList at the outermost level that has one."""
    lists = [module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    count = lm.config.get_text_config().num_hidden_layers
    layers = next((module for module in lists if len(module) == count), None)
    if layers is None:
        kind = lm.config.model_type
        raise ValueError(f"activation_checkpointing: no list of {count} layers found in {kind}")
    return layers


# What selective checkpointing keeps: results of matrix products and attention.
CHECKPOINT_KEEPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def _checkpointed(forward, mode: str):
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, CHECKPOINT_KEEPS)

    # Around the bound method, so that parameter names (and the saved model) stay as they are.
    def run(*args, **kwargs):
        return checkpoint(forward, *args, **options, **kwargs)

    return run
