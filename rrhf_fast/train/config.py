"""Options of `python -m rrhf_fast.train`; its --help prints this page."""

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from rrhf_fast.data.chat import refuse_reserved
from rrhf_fast.data.checks import printed
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.model.config import LossConfig
from rrhf_fast.stages.hub import HubConfig
from rrhf_fast.stages.options import check, check_magnitudes, with_hints


@dataclass
class DataConfig:
    """Model, rows and output"""

    model_name_or_path: str | None = None
    """Causal language model to train: a folder, or a name on the Hugging Face hub. Without it and
    train_data, the embedded demo is trained."""
    train_data: str | list[str] | None = None
    """Rows to train on, with prompt, responses and scores: files (.jsonl, .json, .parquet, .csv,
    also .gz or .zst), patterns such as 'rows/*.jsonl', folders, or datasets of the Hugging Face hub
    as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT."""
    eval_data: str | list[str] | None = None
    """Held-out rows, named as for train_data, to measure loss and ranking accuracy on."""
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Without eval_data: share of the training rows to hold out, chosen by seed. Rows with the same
    prompt stay together."""
    output_dir: str | None = None
    """Folder for the model, metrics.jsonl and training.png. Default: runs/DATE-TIME."""
    overwrite_output_dir: bool = False
    """Allow an output_dir that already holds a run."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose author you trust."""
    data_cache_dir: str | None = None
    """Folder where tokenised rows are kept for later runs. Default: rrhf_fast in the user's cache
    folder, or RRHF_FAST_CACHE of the environment."""
    dataset_num_proc: Annotated[int, Ge(1)] | None = None
    """Processes that tokenise rows. Default: one per core."""


@dataclass
class TokensConfig:
    """From rows to tokens"""

    use_responses: Literal["all", "provided", "sampled"] = "all"
    """Which responses of a row to train on. provided: those whose source begins with provided,
    chosen or rejected; in rows without sources the last two. sampled: the others."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each response before the first of these, for example ["\\n\\nHuman:",
    "\\n\\nAssistant:"]. Default: never."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: NAME} to
    choose one of several. Those of a row take precedence."""
    max_length: Annotated[int, Ge(2)] = 2048
    """Tokens of prompt plus response; lowered to the context window of the model."""
    max_prompt_length: Annotated[int, Ge(1)] | None = None
    """Tokens; a longer prompt keeps its tail. Default: prompts are never cut."""
    max_response_length: Annotated[int, Ge(2)] | None = None
    """Tokens; a longer response keeps its head and its end token. Default: what max_length
    leaves."""


def _share_or_steps(value: float) -> bool:
    """a share of all steps, 0 or more and below 1, or a whole number of steps"""
    return 0 <= value < 1 or (value > 0 and value == int(value))


@dataclass
class StepsConfig:
    """Steps and learning rate"""

    train_batch_size: Annotated[int, Ge(1)] = 64
    """Prompts, each with all its responses, per optimizer step."""
    num_train_epochs: Annotated[float, Gt(0), Le(10**6)] = 3.0
    """Passes over the training rows; may be a fraction."""
    max_steps: Annotated[int, Ge(1), Le(10**9)] | None = None
    """Optimizer steps to train for; overrides num_train_epochs."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate, one of transformers.get_scheduler except those that follow a
    metric: linear, cosine, cosine_with_min_lr, warmup_stable_decay, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict = field(default_factory=dict)
    """Arguments of the schedule, for example {min_lr_rate: 0.1} for cosine_with_min_lr or
    {num_decay_steps: 100} for warmup_stable_decay."""
    warmup_steps: Annotated[float, Predicate(_share_or_steps)] = 0.03
    """Optimizer steps over which the learning rate rises from 0; below 1, a share of all steps."""


@dataclass
class OptimizerConfig:
    """Optimizer"""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's decay of matrices; biases and norms have none."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay rate of AdamW's second moment."""
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm to clip the gradient to; 0 turns clipping off."""
    max_skipped_steps: Annotated[int, Ge(1)] = 3
    """Steps whose loss or gradient is not finite are skipped; stop after this many in a row."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's moments in 8 bits (pip install torchao), a quarter of their
    memory, and writes no checkpoints."""
    optimizer_state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the moments of adamw: bfloat16 halves their memory and rounds at random, so that
    small changes are not lost."""


@dataclass
class SpeedConfig:
    """Memory and speed"""

    max_tokens_per_pack: Annotated[int, Ge(1)] | Literal["auto"] = 8192
    """Tokens per forward and backward pass: lower it if memory runs out; the loss stays the same. A
    prompt and its responses are never split. auto: as many as --dry_run expects to fit the GPU,
    from 2048 to 32768; 8192 on the CPU."""
    packing: Literal["forest", "none"] = "forest"
    """forest encodes each prompt once for all its responses. none pads one row per response, which
    is slower and works for every causal model."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the decoder's arithmetic; weights and loss are float32. auto: bfloat16 on a GPU
    that has it, else float32."""
    attn_implementation: Literal["auto", "forest_flex", "forest_flash", "forest_sdpa"] = "auto"
    """Code that computes attention over packed forests. auto: the first of these that works."""
    compile: bool | None = None
    """Compile the decoder's layers, which takes time at the start. Default: only on CUDA."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass to save memory. full: keep one activation per
    layer. selective: also keep the results of matrix products and attention."""
    active_set: Literal["auto", "on", "off"] = "auto"
    """Spend no backward on tokens without a gradient, those of correctly ranked responses alone;
    the step is the same. on: score the responses of each step first, then train on the others.
    auto: leave them out within the backward of linear layers, where these run uncompiled on a CPU;
    elsewhere as on while that is less work, and never for a pair_loss other than hinge, under which
    nearly every response has a gradient."""


@dataclass
class AdapterConfig:
    """LoRA"""

    use_peft: bool = False
    """Train LoRA adapters (pip install peft) and leave the model as it is."""
    lora_r: Annotated[int, Ge(1), Le(10**5)] = 16
    """Rank of the adapters, which sets their size."""
    lora_alpha: Annotated[int, Ge(1)] = 32
    """Adapters are scaled by lora_alpha / lora_r."""
    use_rslora: bool = False
    """Scale adapters by lora_alpha / sqrt(lora_r) instead (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA, arXiv 2402.09353),
    which is slower."""
    load_in_4bit: bool = False
    """Keep the weights under adapters in 4 bits (QLoRA, arXiv 2305.14314; pip install
    bitsandbytes). On one GPU or CPU; layers are not compiled."""
    lora_target_modules: str | list[str] = "all-linear"
    """Layers to adapt: a list of names, a regular expression, or all-linear (all but the head)."""


@dataclass
class ProcessesConfig:
    """Several GPUs or machines, started by torchrun"""

    data_parallel_shard: Annotated[int, Ge(1)] | None = None
    """Processes that share one copy of weights and optimizer state (FSDP2). Default: all of
    them."""
    data_parallel_replicate: Annotated[int, Ge(1)] = 1
    """Number of such copies (HSDP), for example one per machine."""
    reshard_after_forward: bool = True
    """Gather the weights of a layer each time it is used. false: once per optimizer step, which
    keeps whole weights and gradients in memory for less traffic."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the memory of the CPU, which is slower."""


@dataclass
class SavingConfig:
    """Saving and resuming"""

    save_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps between two checkpoints, output_dir/checkpoint-STEP. Default: none."""
    save_total_limit: Annotated[int, Ge(1)] | None = None
    """Checkpoints to keep, the newest, besides that of the best evaluation. Default: all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint to resume from, a folder; or latest: the newest in output_dir, and a fresh start
    if it holds none."""
    init_optimizer_from: str | None = None
    """Checkpoint whose optimizer moments a new run starts with."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved model. auto: that in which model_name_or_path is stored; adapters and
    checkpoints are float32."""


@dataclass
class WatchingConfig:
    """Looking and measuring"""

    show_tokens: Annotated[int, Ge(0)] = 0
    """Print this many rows as the model will see them, token by token, and stop; loads no
    weights."""
    dry_run: bool = False
    """Print an estimate of memory and time on 1 to 1,024 GPUs, and stop; loads no weights."""
    dry_run_machine: dict[str, float] = field(default_factory=dict)
    """What dry_run assumes of a GPU and its network, instead of a H100 SXM's figures: {tflops, mfu,
    memory_gib, memory_gb_per_second, gpus_per_node, nvlink_gb_per_second, network_gb_per_second,
    hop_microseconds}, or some of them."""
    logging_steps: Annotated[int, Ge(1)] = 1
    """Optimizer steps between two lines of metrics.jsonl, which give means over them."""
    eval_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps between two evaluations on held-out rows, besides the first and last.
    Default: one epoch."""
    eval_reward_fn: str | None = None
    """Function that scores fresh samples of the held-out prompts at each evaluation:
    PACKAGE.MODULE:FUNCTION, called as function(prompts, responses) -> scores."""
    eval_max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens of a fresh sample, at most."""
    eval_samples: Annotated[int, Ge(1), Le(10**4)] = 1
    """Fresh samples per held-out prompt, at temperature 1."""
    log_completions: bool = False
    """Show the fresh samples with the highest and lowest rewards at each evaluation, on the console
    and in trackers. All are in output_dir/samples.jsonl."""
    metric_for_best_model: str = "loss"
    """Held-out metric that says which evaluation was best, also to callbacks: loss, rank_loss,
    sft_loss, rewards/accuracies, rewards/margins, and with eval_reward_fn reward."""
    greater_is_better: bool | None = None
    """Whether a higher metric_for_best_model is better. Default: yes, unless it is a loss."""
    load_best_model_at_end: bool = False
    """Save the model of the best evaluation after the first step, of those in output_dir, instead
    of the last step's. Each that is the best so far gets a checkpoint, in place of the one before;
    Ctrl-C saves the last step's model."""
    early_stopping_patience: Annotated[int, Ge(1)] | None = None
    """End training after this many evaluations in a row that are no better than the best before
    them; that before the first step does not count. Default: never."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(
        default_factory=list
    )
    """Trackers to log to besides metrics.jsonl (pip install their names)."""
    profile_steps: Annotated[int, Ge(1)] | None = None
    """Record this many steps, after the first three, as a trace and a page in output_dir/profile
    that says where their time went."""
    run_name: str | None = None
    """Name of this run in the trackers. Default: that of output_dir."""


@dataclass
class SeedConfig:
    """Randomness"""

    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of everything but the order of the rows."""
    data_seed: Annotated[int, Ge(0)] | None = None
    """Seed of the order of the rows. Default: seed."""
    full_determinism: bool = False
    """Give the same bits in every run on the same machine, also on a GPU, where it is slower."""


@with_hints
@dataclass
class TrainConfig(
    DataConfig,
    TokensConfig,
    RowsConfig,
    LossConfig,
    StepsConfig,
    OptimizerConfig,
    SpeedConfig,
    AdapterConfig,
    ProcessesConfig,
    SavingConfig,
    WatchingConfig,
    HubConfig,
    SeedConfig,
):
    """Options of `python -m rrhf_fast.train`; without model and data it trains the demo."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        check(self)
        check_magnitudes(self)
        self.reading()
        if self.output_dir == "":  # an unset variable of the shell, perhaps
            raise ValueError("output_dir: missing")
        self.repository()
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty text would cut every response to nothing")
        refuse_reserved(self.chat_template_kwargs)
        if self.resume_from_checkpoint in ("true", "True"):  # of transformers
            problem = "expected a checkpoint's folder, or latest for the newest in output_dir"
            raise ValueError(f"resume_from_checkpoint: {problem}")
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
        if self.log_completions and self.eval_reward_fn is None and self.train_data is not None:
            raise ValueError("log_completions: needs eval_reward_fn, for which samples are drawn")
        self._check_best(has_held_out=held_out or self.train_data is None)
        if self.packing == "none" and self.attn_implementation != "auto":
            raise ValueError(
                "packing, attn_implementation: padded rows use the model's own attention"
            )
        if self.optim == "adamw_8bit" and self.optimizer_state_dtype != "float32":
            raise ValueError("optim, optimizer_state_dtype: adamw_8bit keeps its state in 8 bits")
        if self.pair_loss == "squared" and self.margin == 0:
            problem = "squared draws responses together without a margin (IPO's is 1 / (2 tau))"
            raise ValueError(f"margin, pair_loss: {problem}")
        if self.pair_loss == "hinge" and self.reference == "initial" and self.margin == 0:
            problem = "all responses score alike at first, so a hinge needs a margin above 0"
            raise ValueError(f"margin, reference: {problem}")
        if self.use_peft:
            _check_layers(self.lora_target_modules)
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit: needs use_peft (4 bits can be kept, not trained)")
        adapters = [f.name for f in fields(AdapterConfig) if getattr(self, f.name) != f.default]
        if adapters and not self.use_peft:
            problem = "needs use_peft, without which all weights are trained"
            raise ValueError(f"{adapters[0]}: {problem}")
        if self.load_in_4bit and self.compile:
            raise ValueError("load_in_4bit, compile: layers in 4 bits are not compiled")
        if self.load_in_4bit and self.use_dora:
            raise ValueError("load_in_4bit, use_dora: choose one")
        if self.compat == "official" and self.sft_reduction != "sum":
            raise ValueError(
                "compat, sft_reduction: the released code's SFT mean is part of --compat official"
            )

    def _check_best(self, *, has_held_out: bool) -> None:
        """Raise ValueError if evaluations cannot say which model is best."""
        chosen = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience,
        }
        option = next((name for name, value in chosen.items() if value), None)
        if option is None:
            return
        if not has_held_out:
            raise ValueError(f"{option}: needs held-out rows (eval_data or eval_fraction)")
        metric = self.metric_for_best_model.removeprefix("eval_")
        if metric not in BEST_BY:
            problem = f"expected {', '.join(BEST_BY)}, found {printed(metric)}"
            raise ValueError(f"metric_for_best_model: {problem}")
        if metric == "reward" and self.eval_reward_fn is None and self.train_data is not None:
            raise ValueError("metric_for_best_model: reward needs eval_reward_fn")
        if self.load_best_model_at_end and self.optim == "adamw_8bit":
            problem = "the moments of adamw_8bit cannot be saved, so no checkpoint of the best can"
            raise ValueError(f"load_best_model_at_end, optim: {problem}")


# What `metric_for_best_model` may be where this package itself follows it.
BEST_BY = ("loss", "rank_loss", "sft_loss", "rewards/accuracies", "rewards/margins", "reward")


def _check_layers(names: str | list[str]) -> None:
    """Raise ValueError for no name, and for a text that is no regular expression."""
    if not names or (isinstance(names, list) and "" in names):
        raise ValueError("lora_target_modules: expected names of layers, found nothing")
    if names == "all" or (isinstance(names, str) and re.fullmatch(r"\w+(,\s*\w+)+", names)):
        problem = "a list such as [q_proj, v_proj], a regular expression or all-linear"
        raise ValueError(f"lora_target_modules: expected {problem}, found {printed(names)}")
    try:
        re.compile(names if isinstance(names, str) else "")
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        problem = f"{printed(names)} is no regular expression ({error})"
        raise ValueError(f"lora_target_modules: {problem}") from error
