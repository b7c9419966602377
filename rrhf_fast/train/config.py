"""Every option, its unit and its default. `python -m rrhf_fast.train --help` prints this page."""

from dataclasses import dataclass, field
from typing import Literal

from rrhf_fast.data.chat import check_kwargs
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.model.config import LossConfig
from rrhf_fast.stages.options import check_types, expect


@dataclass
class DataConfig:
    """Which model, which rows, and how rows become tokens."""

    model_name_or_path: str | None = None
    """A causal language model: a folder, or a name on the Hugging Face hub."""
    train_data: str | list[str] | None = None
    """Rows with prompt, responses and scores: files (.jsonl, .json, .parquet, .csv, also .gz or
    .zst), patterns, folders, or Hugging Face datasets as name, name:split or name:config:split."""
    eval_data: str | list[str] | None = None
    """Held-out rows of the same kind."""
    eval_fraction: float = 0.0
    """Without eval_data: hold out about this share of the training rows (0 to 1), chosen by seed;
    rows with the same prompt stay together."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Off unless you trust its author."""

    use_responses: Literal["all", "provided", "sampled"] = "all"
    """Provided: those whose source starts so, else the last two, as in the released data. Sampled:
    the others."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each response at the first of these, for example ["\\n\\nHuman:", "\\n\\nAssistant:"]."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: name} to
    choose one of several. A row's own come on top."""
    max_length: int = 2048
    """Tokens of prompt plus response; lowered to the model's window."""
    max_prompt_length: int | None = None
    """Tokens; a longer prompt keeps its tail. Default: never cut a prompt."""
    max_response_length: int | None = None
    """Tokens; a longer response keeps its head and its end token. Default: what max_length
    leaves."""


@dataclass
class TrainConfig(LossConfig, RowsConfig, DataConfig):
    """Options of `python -m rrhf_fast.train`; without model and data it trains the demo."""

    output_dir: str | None = None
    """Where the model, metrics.jsonl and training.png go; default runs/<date>-<time>."""
    overwrite_output_dir: bool = False
    """Allow an output_dir that already holds a run."""

    # --- Steps
    train_batch_size: int = 64
    """Queries of one optimizer step."""
    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    max_tokens_per_pack: int | Literal["auto"] = 8192
    """Tokens of one forward and backward: bounds memory and changes nothing else. A query is never
    split. Auto: as many as the estimate of dry_run leaves room for on a GPU, from 2048 to 32768;
    8192 on the CPU."""
    packing: Literal["forest", "none"] = "forest"
    """Forest encodes each prompt once; none pads one row a response and serves every causal
    model."""

    # --- Optimizer
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: str = "linear"
    """Any schedule of transformers.get_scheduler that follows no metric: linear, cosine,
    cosine_with_min_lr, warmup_stable_decay, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict = field(default_factory=dict)
    """Its own arguments, for example {"min_lr_rate": 0.1} of cosine_with_min_lr, or
    {"num_decay_steps": 100} of warmup_stable_decay."""
    warmup_steps: float = 0.03
    """Optimizer steps of warm-up; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """Of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradient norm to clip at; 0 turns clipping off."""
    max_skipped_steps: int = 3
    """A step whose loss or gradient is not finite is skipped; stop after this many in a row."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the decoder's arithmetic; weights and loss are float32. Auto: bfloat16 on a GPU that has
    it, else float32."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's moments in 8 bits (pip install rrhf-fast[lowbit]); no
    checkpoints."""
    optimizer_state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of adamw's two moments: bfloat16 halves their memory, rounding at random so that small
    changes are not lost."""
    attn_implementation: Literal["auto", "forest_flex", "forest_flash", "forest_sdpa"] = "auto"
    """What computes attention over packed forests. Auto: the first of these that can serve."""
    compile: bool | None = None
    """Compile the decoder's layers, which takes its time at the start. Default: on CUDA."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Less memory for more arithmetic. Full: keep one activation a layer and recompute the rest.
    Selective: keep the results of matrix products and attention too."""

    active_set: Literal["auto", "on", "off"] = "auto"
    """Score each step's responses first, then train on the part with a gradient alone, which gives
    the same step. Auto: while that is less work, as the metric active_fraction tells."""

    # --- LoRA
    use_peft: bool = False
    """Train LoRA adapters (pip install rrhf-fast[peft]) and leave the model as it is."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Only 0: responses are compared by their log-probs, which dropout would make random."""
    lora_target_modules: str | list[str] = "all-linear"
    """Layers to adapt: names, a regular expression, or all-linear (all but the head)."""

    # --- Several processes (torchrun)
    data_parallel_shard: int | None = None
    """Processes that share one copy of weights and optimizer state (FSDP2); default all of them."""
    data_parallel_replicate: int = 1
    """Copies of that (HSDP), such as one a machine."""
    reshard_after_forward: bool = True
    """Gather a layer's weights each time it is used. False: once an optimizer step, which keeps
    whole weights and gradients in memory for less traffic."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the CPU's memory."""
    show_tokens: int = 0
    """Print so many rows as the model will see them, token by token, and stop; loads no weights."""
    dry_run: bool = False
    """Print an estimate of the memory a GPU needs, and stop; loads neither weights nor data."""

    # --- Saving
    save_steps: int | None = None
    """Optimizer steps between two checkpoints, output_dir/checkpoint-<step>; default none."""
    save_total_limit: int | None = None
    """Checkpoints to keep, the newest; default all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint, or latest: the newest of output_dir, and a fresh start if there is none."""
    init_optimizer_from: str | None = None
    """A checkpoint whose optimizer moments a new run starts with."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the saved model. Auto: the one that model_name_or_path is stored in; adapters and
    checkpoints are float32."""

    # --- Watching
    logging_steps: int = 1
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_steps: int | None = None
    """Optimizer steps between two evaluations; default once an epoch. There is one before and one
    after training too."""
    eval_reward_fn: str | None = None
    """package.module:function, called as function(prompts, responses) -> scores on fresh samples at
    each evaluation."""
    eval_max_new_tokens: int = 128
    """Tokens of a fresh sample."""
    eval_samples: int = 1
    """Fresh samples a prompt, at temperature 1."""
    metric_for_best_model: str = "loss"
    """Held-out metric that callbacks such as transformers' EarlyStoppingCallback watch: loss,
    rewards/accuracies, rewards/margins, reward."""
    greater_is_better: bool | None = None
    """Whether more of it is better. Default: of all but losses."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers to log to beside metrics.jsonl (pip install rrhf-fast[tracking])."""
    profile_steps: int | None = None
    """Record so many steps after the first three: output_dir/profile gets a trace and a page on
    where their time went."""
    run_name: str | None = None
    """The trackers' name of this run; default the name of output_dir."""

    # --- Randomness
    seed: int = 0
    """Of everything but the order of the data."""
    data_seed: int | None = None
    """Of the order of the data; default seed."""
    full_determinism: bool = False
    """The same bits in every run on the same machine, also on a GPU, which is slower."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for a value out of range or a combination that
        cannot work."""
        check_types(self)
        self.reading()
        for name in ("max_length", "max_response_length"):
            # One token and the end token.
            expect(self, name, lambda value: value is None or value >= 2, "at least 2")
        for name in (
            "max_prompt_length",
            "train_batch_size",
            "max_steps",
            "logging_steps",
            "eval_steps",
            "eval_samples",
            "eval_max_new_tokens",
            "max_skipped_steps",
            "lora_r",
            "lora_alpha",
            "data_parallel_shard",
            "data_parallel_replicate",
            "save_steps",
            "save_total_limit",
            "profile_steps",
        ):
            expect(self, name, lambda value: value is None or value >= 1, "at least 1")
        name, of_packs = "max_tokens_per_pack", lambda value: value == "auto" or value >= 1
        expect(self, name, of_packs, "at least 1, or auto")
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon"):
            expect(self, name, lambda value: value > 0, "more than 0")
        check_kwargs(self.chat_template_kwargs)
        for name in (
            "weight_decay",
            "max_grad_norm",
            "show_tokens",
            "rank_weight",
            "sft_weight",
            "margin",
            "length_penalty",
            "seed",
            "data_seed",
        ):
            expect(self, name, lambda value: value is None or value >= 0, "0 or more")
        expect(
            self,
            "warmup_steps",
            lambda value: 0 <= value < 1 or (value > 0 and value == int(value)),
            "a share of all steps, 0 or more and below 1, or a whole number of steps",
        )
        for name in ("eval_fraction", "adam_beta1", "adam_beta2"):
            expect(self, name, lambda value: 0 <= value < 1, "0 or more and below 1")
        expect(self, "lora_dropout", lambda value: value == 0, "0 (log-probs must not be random)")
        if self.resume_from_checkpoint == "latest" and self.output_dir is None:
            raise ValueError("resume_from_checkpoint: latest needs an output_dir to look in")
        for name in ("save_steps", "resume_from_checkpoint", "init_optimizer_from"):
            if self.optim == "adamw_8bit" and getattr(self, name) is not None:
                raise ValueError(f"{name}, optim: the moments of adamw_8bit cannot be saved")
        if self.resume_from_checkpoint is not None and self.init_optimizer_from is not None:
            raise ValueError("resume_from_checkpoint, init_optimizer_from: choose one")
        if not self.dry_run and (self.model_name_or_path is None) != (self.train_data is None):
            missing = "model_name_or_path" if self.model_name_or_path is None else "train_data"
            raise ValueError(f"{missing}: missing (name a model and data, or neither for the demo)")
        if self.active_set == "on" and self.packing == "none":
            raise ValueError("active_set: works on forests only (--packing forest)")
        if self.profile_steps is not None and self.packing == "none":
            raise ValueError("profile_steps: works on forests only (--packing forest)")
        if self.rank_weight == self.sft_weight == 0:
            raise ValueError("rank_weight, sft_weight: both are 0, so there is nothing to train")
        if self.eval_data is not None and self.eval_fraction > 0:
            raise ValueError(
                "eval_data, eval_fraction: name held-out rows or hold out a share, not both"
            )
        held_out = self.eval_data is not None or self.eval_fraction > 0
        if self.eval_reward_fn is not None and self.train_data is not None and not held_out:
            raise ValueError("eval_reward_fn: needs held-out rows (eval_data or eval_fraction)")
        if self.packing == "none" and self.attn_implementation != "auto":
            raise ValueError(
                "packing, attn_implementation: padded rows use the model's own attention"
            )
        if self.optim == "adamw_8bit" and self.optimizer_state_dtype != "float32":
            raise ValueError("optim, optimizer_state_dtype: adamw_8bit keeps its state in 8 bits")
        if self.compat == "official" and self.sft_reduction != "sum":
            raise ValueError(
                "compat, sft_reduction: the released code's SFT mean is part of --compat official"
            )
