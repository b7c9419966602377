"""The root module: decoder, head and loss of a pack in one forward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from rrhf_fast.data.active import WeightedForest
from rrhf_fast.data.checks import one_line
from rrhf_fast.data.forest import Movable, Pack, PackedForest, build_forest
from rrhf_fast.data.padded import PaddedBatch, build_padded
from rrhf_fast.losses import RRHFLoss, linear_logprob, linear_rrhf_loss, rrhf_loss
from rrhf_fast.losses.linear_rrhf import workspace_for
from rrhf_fast.losses.parts import Layout, LinearHead
from rrhf_fast.model.active_rows import pays, use_active_rows, use_all_rows
from rrhf_fast.model.attention import FOREST, Choice, Forest, choose_backend
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import (
    attention,
    check_causal,
    check_forest_support,
    check_queries,
    decode_forest,
    read_head,
    rope_of_longest,
    self_check,
)
from rrhf_fast.model.flops import Costs, decoder_flops
from rrhf_fast.model.layers import (
    checkpoint_layers,
    compile_layers,
    compiles_by_default,
    restore_layers,
    trial_length,
    uncompile_layers,
)
from rrhf_fast.model.lean_layers import find_lean_layers, use_lean_layers, use_own_layers
from rrhf_fast.model.sharded import small_twin
from rrhf_fast.model.weight_copies import copy_weights, keep_gradients, remove_copies, update_copies
from rrhf_fast.spans import span

# The tokens of a pack are padded to a multiple of this, FlexAttention's block, if kernels or
# graphs need it.
PADDING_MULTIPLE = 128


class RRHFModel(nn.Module):
    """A causal LM that scores the responses of a pack and returns their RRHF loss.

    `packing` "forest" runs packed forests (and refuses models for which they would be wrong);
    "none" runs padded batches. `attn_implementation` is a name of
    `rrhf_fast.model.attention.BACKENDS` or "auto"; `max_tokens` the tokens of the largest pack to
    come, if known. `compile` None compiles layers on CUDA if possible. `activation_checkpointing`
    is "none", "selective" or "full". `skip_rows` lets linear layers leave rows without a gradient
    out of their backward, where that pays (`row_skipping`): uncompiled on a CPU. `device` is where
    the model will run, if it is not there yet; `is_sharded` says that FSDP will shard it, which
    keeps its own copies of weights.

    Raises:
        ValueError: model, attention or compiler cannot do what is asked; says which and why.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        loss: LossConfig,
        *,
        packing: str = "forest",
        max_length: int,
        max_tokens: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        attn_implementation: str = "auto",
        compile: bool | None = False,
        activation_checkpointing: str = "none",
        skip_rows: bool = True,
        device: torch.device | None = None,
        is_sharded: bool = False,
    ):
        super().__init__()
        # Where packs go. A model that is yet to be sharded is elsewhere, or has no weights.
        self.device = device or lm.device
        self.lm, self.loss_config, self.compute_dtype = lm, loss, compute_dtype
        self._is_sharded = is_sharded
        # MiB for the head's logits; None means the losses' default.
        self.workspace_mb: float | None = None
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            self.workspace_mb = workspace_for(memory)
        remove_copies(lm)
        use_all_rows(lm)
        use_own_layers(lm)
        restore_layers(lm)
        self.plain_attention = lm.config._attn_implementation
        self.attention: Choice | None = None
        self.warnings: list[str] = []  # preferences that failed and were replaced
        # A small model of the same kind stands in for one that cannot run there yet.
        runnable = lm if lm.device == self.device else small_twin(lm, self.device)
        if packing == "forest":
            check_forest_support(lm, max_length)
            self.attention_specs = self_check(runnable, max_length)
            self.attention = choose_backend(
                attn_implementation,
                self.attention_specs,
                device=self.device,
                dtype=compute_dtype if compute_dtype != torch.float32 else lm.dtype,
                max_tokens=max_tokens,
            )
            if self.attention.warning is not None:
                self.warnings.append(self.attention.warning)
            self.head = read_head(lm)
            lm.set_attn_implementation(FOREST)
        else:
            check_causal(runnable)
            self._rows_alone = self._checked_rope(max_length)
        has_copies = compute_dtype != torch.float32 and not is_sharded
        self.copied = copy_weights(lm, compute_dtype) if has_copies else []
        self.compiled = compiles_by_default(self.device) if compile is None else compile
        if self.compiled and runnable is lm:
            self._compile(is_optional=compile is None)
        elif self.compiled:
            trial = RRHFModel(
                runnable,
                loss,
                packing=packing,
                max_length=max_length,
                compute_dtype=compute_dtype,
                attn_implementation=self.attention.name if self.attention else "auto",
                compile=compile,
                is_sharded=is_sharded,
            )
            self.compiled, self.warnings = trial.compiled, self.warnings + trial.warnings
            if self.compiled:
                compile_layers(lm)
        is_eager_on_cpu = self.device.type == "cpu" and not self.compiled
        self._skip_rows = skip_rows and is_eager_on_cpu
        is_lean = is_eager_on_cpu and activation_checkpointing == "none" and runnable is lm
        self._lean_layers = find_lean_layers(lm) if is_lean else []
        # The share of the decoder's products whose backward leaves out rows without a gradient.
        self.row_skipping = 0.0
        self._use_own_backward()
        # Around compilation, so that the backward pass runs compiled layers too.
        if activation_checkpointing != "none":
            checkpoint_layers(lm, activation_checkpointing)

    def _checked_rope(self, max_length: int) -> bool:
        """Whether rows must not be batched, since the longest would decide for all. Raises
        ValueError where that cannot be helped: a row depends on those before it, or ranks that
        share a model would have different numbers of rows."""
        kind, window = rope_of_longest(self.lm, max_length) or (None, None)
        if kind == "dynamic" or (kind and self._is_sharded):
            problem = f"its {kind} RoPE depends on the longest row beyond {window} tokens"
            kind = self.lm.config.model_type
            raise ValueError(f"max_length: {kind}: {problem} (lower it to {window})")
        return kind is not None

    def _compile(self, *, is_optional: bool) -> None:
        """Compile the layers and run them once, so that a failing compiler shows before the run."""
        compile_layers(self.lm)
        queries = check_queries(self.lm)
        if self.attention is None:
            pack = build_padded(queries)
        else:
            multiple = trial_length(self.lm, self.pad_to_multiple_of)
            pack = build_forest(queries, pad_to_multiple_of=multiple)
        pack = replace(pack, reference_logps=torch.zeros_like(pack.rewards))
        try:
            with torch.enable_grad():
                self(pack.to(self.device)).loss.backward()
        except Exception as error:  # from a compiler, of any type
            reason = f"{type(error).__name__}: {one_line(error)}"
            problem = f"a step of compiled layers failed ({reason})"
            if not is_optional:
                raise ValueError(f"compile: {problem}") from error
            uncompile_layers(self.lm)
            self.compiled = False
            self.warnings.append(problem)
        self.lm.zero_grad()

    @property
    def pad_to_multiple_of(self) -> int:
        """The number of which the token count of a packed forest should be a multiple."""
        fits = self.compiled or (self.attention and self.attention.name == "forest_flex")
        return PADDING_MULTIPLE if fits else 1

    def plan(self, pack: PackedForest | WeightedForest) -> Movable:
        """The chosen attention's plan for this pack; best made on the host, before the pack moves
        to a device."""
        return self.attention.backend.plan(pack)

    @cached_property
    def costs(self) -> Costs:
        """Operations of this model's parts, for packed forests. Which weights are frozen must not
        change after the first use."""
        return Costs.of(self.lm, self.attention_specs, self.head)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Inside this block `lm` is a plain Hugging Face model that generates and can be saved. Its
        layers run uncompiled there, because a cache grows with every token."""
        with attention(self.lm, self.plain_attention), torch.compiler.set_stance("force_eager"):
            yield

    def release(self) -> None:
        """Give `lm` its own attention and layers back, so that it is a plain Hugging Face model
        until `engaged`."""
        self.lm.set_attn_implementation(self.plain_attention)
        use_all_rows(self.lm)
        use_own_layers(self.lm)
        self._is_released = True

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """Inside this block, after `release`, packs can be run."""
        was_released = self._is_released
        self._use_own_backward()
        try:
            with attention(self.lm, self.plain_attention if self.attention is None else FOREST):
                yield
        finally:
            if was_released:
                self.release()

    def _use_own_backward(self) -> None:
        """Let the decoder's layers leave out rows and keep less, where they can."""
        self._is_released = False
        use_lean_layers(self._lean_layers)
        if not self._skip_rows:
            return
        count = use_active_rows(self.lm)
        for layer in self.copied:
            layer.skips_rows = pays(layer)
            count += layer.skips_rows * layer.in_features * layer.out_features
        if count:  # else a decoder of other layers, and its flops are perhaps not known
            forward, _ = decoder_flops(self.lm)
            self.row_skipping = min(1.0, 2 * count / forward)

    def autocast(self) -> AbstractContextManager[None]:
        """Inside this block matrix products run in `compute_dtype`; weights, norms and RoPE stay in
        float32."""
        enabled = self.compute_dtype != torch.float32
        update_copies(self.copied)
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    def forward(self, pack: Pack, *, share: float = 1.0, into_grad: bool = False) -> RRHFLoss:
        """`share` times the loss of one pack, mean over its queries; log-probs and loss are at
        least float32. Only `loss` carries a gradient. Its parts do not depend on `share`.

        `into_grad`: `loss.backward()` will follow. The gradient of the head's weight is then added
        to its `grad` at once, where it has one, and no other [V, H] is needed."""
        options = self.loss_options(pack, share)
        if not isinstance(pack, PackedForest):
            return rrhf_loss(self.edge_logps(pack), pack.rewards, **options)
        hidden, head = self.head_inputs(pack)
        with span("head"):
            return linear_rrhf_loss(
                hidden, rows=pack.edge_rows, targets=pack.edge_targets, rewards=pack.rewards,
                bounds=pack.bounds, weight_grad=self._head_grad(hidden) if into_grad else None,
                workspace_mb=self.workspace_mb, **head._asdict(), **options,
            )  # fmt: skip

    def _head_grad(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The `grad` of the head's weight, if sums of the sweep can be added to it: FSDP makes
        gradients of its own, and hooks must see each."""
        weight = self.head.linear.weight
        has_hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
        grad = None if self._is_sharded or has_hooks else weight.grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return grad if grad is not None and grad.dtype == wide else None

    def edge_weights(self, pack: Pack, *, share: float = 1.0) -> tuple[RRHFLoss, torch.Tensor]:
        """What `forward` returns, without a gradient, and the weight d loss / d logp [E] of each
        edge."""
        with torch.no_grad():
            logps = self.edge_logps(pack)
        with torch.enable_grad(), span("loss"):
            out = rrhf_loss(logps.requires_grad_(), pack.rewards, **self.loss_options(pack, share))
            return out, torch.autograd.grad(out.loss, logps)[0]

    def weighted_loss(self, part: WeightedForest) -> torch.Tensor:
        """The sum of the log-probs of the part's edges, times their weights. Its gradient is that
        of the loss from which the weights come."""
        return (self.edge_logps(part) * part.edge_weights).sum()

    def edge_logps(self, pack: Pack | WeightedForest) -> torch.Tensor:
        """[E] log-prob of each edge's target."""
        if isinstance(pack, PackedForest | WeightedForest):
            hidden, head = self.head_inputs(pack)
            with span("head"):
                return linear_logprob(
                    hidden, rows=pack.edge_rows, targets=pack.edge_targets,
                    workspace_mb=self.workspace_mb, **head._asdict(),
                )  # fmt: skip
        assert isinstance(pack, PaddedBatch)
        with self.autocast():
            logits = self._padded_logits(pack.input_ids, pack.attention_mask)
        keep_gradients(self.copied, logits)
        logits = logits.flatten(0, 1).index_select(0, pack.edge_rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -nn.functional.cross_entropy(logits, pack.edge_targets, reduction="none")

    def _padded_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[S, T, V]"""
        if not self._rows_alone:
            return self.lm(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
        width, lengths = input_ids.shape[1], attention_mask.sum(1).tolist()
        rows = [
            self.lm(input_ids=row[None, :length], use_cache=False).logits[0]
            for row, length in zip(input_ids, lengths, strict=True)
        ]
        return torch.stack([nn.functional.pad(r, (0, 0, 0, width - len(r))) for r in rows])

    @torch.no_grad()
    def response_logps(self, pack: Pack) -> torch.Tensor:
        """[S] float32 sum of the log-probs of each response's tokens, without a gradient."""
        lengths = pack.path_offsets.diff()
        response_of = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device),
            lengths,
            output_size=len(pack.path_edges),
        )
        logps = self.edge_logps(pack)[pack.path_edges].double()
        return logps.new_zeros(len(lengths)).index_add_(0, response_of, logps).float()

    def head_inputs(self, pack: PackedForest | WeightedForest) -> tuple[torch.Tensor, LinearHead]:
        """Hidden states [N, H] of a pack, and the head that turns them into logits."""
        with self.autocast(), span("decoder"):
            plan = self.plan(pack) if pack.plan is None else pack.plan
            hidden = decode_forest(self.lm, pack, Forest(self.attention.backend, plan))
        keep_gradients(self.copied, hidden)
        if self.compute_dtype != torch.float32:
            # Autocast leaves the residual stream in float32, but the head is a product too.
            hidden = hidden.to(self.compute_dtype)
        head, linear = self.head, self.head.linear
        return hidden, LinearHead(linear.weight, linear.bias, head.softcap, head.logit_scale)

    def loss_options(self, pack: Pack, share: float = 1.0) -> dict:
        """The pack's layout and `share` times the configured loss, as arguments of the loss
        functions. Raises ValueError if these need `reference_logps` and the pack has none."""
        config = self.loss_config
        has_reference = config.reference == "initial"
        if has_reference and pack.reference_logps is None:
            raise ValueError("reference: expected a pack with reference_logps, found one without")
        widths = None
        if config.compat == "official":
            # Not torch.segment_reduce, which waits for the device to check the lengths.
            lengths, group_sizes = pack.path_offsets.diff(), pack.group_offsets.diff()
            query_of = torch.repeat_interleave(
                torch.arange(len(group_sizes), device=lengths.device),
                group_sizes,
                output_size=len(lengths),
            )
            longest = torch.zeros_like(group_sizes).scatter_reduce_(0, query_of, lengths, "amax")
            widths = pack.prompt_lengths + longest
        return {
            **{name: getattr(pack, name) for name in Layout._fields},
            "length_penalty": config.length_penalty,
            "rank_weight": config.rank_weight * share,
            "sft_weight": config.sft_weight * share,
            "sft_reduction": "mean" if config.compat == "official" else config.sft_reduction,
            **{
                name: getattr(config, name)
                for name in ("pair_loss", "margin", "beta", "rank_reduction")
            },
            "reference_logps": pack.reference_logps if has_reference else None,
            "padded_widths": widths,
        }
