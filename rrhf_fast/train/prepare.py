"""From the options to everything that a run needs: rows, tokens, model, packs, and a summary."""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.trainer_utils import enable_full_determinism

from rrhf_fast import demo
from rrhf_fast.data.corpus import Corpus
from rrhf_fast.data.forest import Pack
from rrhf_fast.data.packs import PackPlanner, steps_per_epoch
from rrhf_fast.model.decoder import check_finite, load_model, load_tokenizer, max_positions
from rrhf_fast.model.four_bit import load_in_four_bits, multiply_in
from rrhf_fast.model.lora import add_lora, init_lora
from rrhf_fast.model.pretrained import check_vocabulary, padding_id, read_config
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.save import learn_end_tokens
from rrhf_fast.model.sharded import Stored, empty_model, fill_weights, locate_weights
from rrhf_fast.stages.checkpoint_files import read_state
from rrhf_fast.stages.hub import hub_name, public_names, refuse_local_base
from rrhf_fast.stages.reward_fn import RewardFn, load_reward_fn
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.corpora import read_corpora
from rrhf_fast.train.distributed import World, shard_model
from rrhf_fast.train.given import Given
from rrhf_fast.train.memory import activation_line, fitting_tokens
from rrhf_fast.train.output_dir import check_output_dir, claim_output_dir
from rrhf_fast.train.profile import WARMUP
from rrhf_fast.train.starting_point import starting_point
from rrhf_fast.train.summary import describe, warn_of_rate


@dataclass
class Run:
    """What `RRHFTrainer` works on."""

    config: TrainConfig
    world: World
    output_dir: Path
    checkpoint: Path | None  # to start from
    model: RRHFModel
    save_dtype: torch.dtype
    tokenizer: transformers.PreTrainedTokenizerBase
    train: PackPlanner
    held_out: PackPlanner | None
    reward_fn: RewardFn | None
    num_steps: int
    summary: dict[str, str]
    warning: str | None  # for stderr
    lock: ExitStack  # closing it unlocks output_dir, which the first rank holds
    nameable: frozenset[tuple[str, str]] = frozenset()  # kinds and names that a card may give
    is_given: bool = False  # the model was handed over in memory
    reference: dict[str, np.ndarray] = field(default_factory=dict)  # see `attach_reference`

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return steps_per_epoch(len(self.train.queries), self.config.train_batch_size)

    @property
    def eval_steps(self) -> int:
        """Optimizer steps from one evaluation to the next."""
        return self.config.eval_steps or self.steps_per_epoch

    @cached_property
    def held_out_packs(self) -> list[Pack]:
        """This rank's share of the held-out packs."""
        if self.held_out is None:
            return []
        queries = range(len(self.held_out.queries))
        return self.held_out.batch(queries, self.world.rank, self.world.size).packs


def prepare(config: TrainConfig, world: World, given: Given | None = None) -> Run:
    """Check everything that can be checked before the first step, cheapest first. All ranks must
    call.

    Raises:
        ValueError: any mistake in options, files or rows, with one line that says what, where and
            what was expected; or another process writes to output_dir.
    """
    config.validate()
    with ExitStack() as lock:
        run = _prepare(config, world, given or Given(), lock)
        run.lock = lock.pop_all()  # still held
    return run


def _prepare(config: TrainConfig, world: World, given: Given, lock: ExitStack) -> Run:
    if config.model_name_or_path is None:
        config = with_demo(config)
    world.once(lambda: check_output_dir(config, lock))
    if (repository := config.repository()) is not None:
        if config.use_peft:
            is_given = isinstance(given.model, transformers.PreTrainedModel)
            refuse_local_base(given.model.name_or_path if is_given else config.model_name_or_path)
        repository = world.once(repository.check)
        config = replace(config, hub_model_id=repository.name)
    checkpoint = starting_point(config, world)
    reward_fn = given.reward_fn
    if reward_fn is None and config.eval_reward_fn is not None:
        reward_fn = load_reward_fn(config.eval_reward_fn)
    set_seed = enable_full_determinism if config.full_determinism else transformers.set_seed
    set_seed(config.seed)
    tokenizer = given.processing_class or load_tokenizer(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    max_length = min(config.max_length, _window(config, given) or config.max_length)
    data = read_corpora(config, given, tokenizer, max_length, world)
    lm, stored, save_dtype = _load(config, world, given.model)
    config = replace(config, dtype=_resolve_dtype(config.dtype, world.device))
    check_vocabulary([[data.findings.max_id]], lm, config.model_name_or_path, "model_name_or_path")
    learn_end_tokens(lm, tokenizer, data.train.end_ids)
    sizes = [None if corpus is None else _sizes(corpus, config) for corpus in data.sides]
    largest = max(int(part.max()) for part in sizes if part is not None)
    num_tokens = _resolve_pack(config, world, largest, checkpoint, given.model)
    config = replace(config, max_tokens_per_pack=num_tokens)

    model = _build_model(config, world, lm, stored, max_length)
    options = {
        "packing": config.packing,
        "max_tokens_per_pack": config.max_tokens_per_pack,
        "pad_token_id": padding_id(tokenizer, lm),
        "pad_to_multiple_of": model.pad_to_multiple_of,
        "plan": model.plan,
    }
    train, held_out = (
        None if corpus is None else PackPlanner(corpus, sizes=part, **options)
        for corpus, part in zip(data.sides, sizes, strict=True)
    )
    num_steps = _count_steps(config, len(data.train))
    has_template = bool(tokenizer.chat_template)
    if repository is not None:
        world.once(repository.create)
    return Run(
        config=config,
        world=world,
        output_dir=world.once(lambda: claim_output_dir(config, lock)),
        checkpoint=checkpoint,
        model=model,
        save_dtype=save_dtype,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        reward_fn=reward_fn,
        num_steps=num_steps,
        summary=describe(config, model, data, max_length),
        warning=warn_of_rate(config, model, has_template),
        lock=lock,
        nameable=world.once(lambda: _nameable(config)),
        is_given=isinstance(given.model, transformers.PreTrainedModel),
    )


def datasets_of(sources: list[str]) -> list[str]:
    """The names of datasets, of the hub perhaps, within the names of rows."""
    return list(dict.fromkeys(source.split(":")[0] for source in sources))


def _nameable(config: TrainConfig) -> frozenset[tuple[str, str]]:
    """Model and datasets of the hub; of a run that pushes, those that are public."""
    sources = [config.train_data] if isinstance(config.train_data, str) else config.train_data or []
    named = {"model": [hub_name(config.model_name_or_path)]}
    named["dataset"] = [hub_name(name, "dataset") for name in datasets_of(sources)]
    if config.push_to_hub:
        named = {kind: public_names(names, kind) for kind, names in named.items()}
    return frozenset((kind, name) for kind, names in named.items() for name in names if name)


def _window(config: TrainConfig, given: Given) -> int | None:
    """The model's window in tokens, before its weights are loaded."""
    if isinstance(given.model, transformers.PreTrainedModel):
        return max_positions(given.model)
    code = {"trust_remote_code": config.trust_remote_code}
    return max_positions(empty_model(config.model_name_or_path, **code))


def _sizes(corpus: Corpus, config: TrainConfig) -> np.ndarray:
    """Tokens of each query in a pack."""
    is_forest = config.packing == "forest"
    return corpus.index["forest_tokens"] if is_forest else corpus.padded_tokens


def _build_model(
    config: TrainConfig,
    world: World,
    lm: transformers.PreTrainedModel,
    stored: dict[str, Stored] | None,
    max_length: int,
) -> RRHFModel:
    """The model on its device, or sharded over the ranks and filled with its weights."""
    if config.use_peft:
        add_lora(lm, config)
    model = RRHFModel(
        lm if world.mesh is not None else lm.to(world.device),
        config,
        packing=config.packing,
        max_length=max_length,
        max_tokens=config.max_tokens_per_pack,
        compute_dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        compile=False if config.load_in_4bit else config.compile,
        activation_checkpointing=config.activation_checkpointing,
        skip_rows=config.active_set == "auto",
        device=world.device,
        is_sharded=world.mesh is not None,
    )
    if world.mesh is not None:
        shard_model(model, world, config)
    elif config.use_peft:
        # Frozen weights need no float32 copy. (FSDP wants one dtype per layer, though.)
        for parameter in lm.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(model.compute_dtype)
    if config.load_in_4bit:  # the model has been checked, which takes float32
        multiply_in(lm, model.compute_dtype)
    if stored is not None:
        model.to_empty(device="cpu" if config.cpu_offload else world.device)
        with world.together():
            fill_weights(lm, stored)
    if config.use_peft:
        init_lora(lm, config.seed)
    if stored is not None:
        with world.together():
            check_finite(lm, config.model_name_or_path)
    return model


def _count_steps(config: TrainConfig, num_queries: int) -> int:
    per_epoch = steps_per_epoch(num_queries, config.train_batch_size)
    num_steps = config.max_steps or max(1, round(config.num_train_epochs * per_epoch))
    if config.profile_steps is not None and num_steps <= WARMUP:
        raise ValueError(
            f"profile_steps: expected a run of more than {WARMUP} steps, found {num_steps}"
        )
    return num_steps


def with_demo(config: TrainConfig) -> TrainConfig:
    """The embedded demo's settings for every option that is at its default; eval_fraction holds
    out a share of the demo's training rows instead of its held-out ones."""
    defaults = TrainConfig()
    untouched = {
        f.name for f in fields(config) if getattr(config, f.name) == getattr(defaults, f.name)
    }
    if config.eval_fraction > 0:
        untouched.remove("eval_data")
    return replace(
        config, **{name: value for name, value in demo.SETTINGS.items() if name in untouched}
    )


def _load(
    config: TrainConfig, world: World, given: object
) -> tuple[transformers.PreTrainedModel, dict[str, Stored] | None, torch.dtype]:
    """The model; where its weights are, if it is still empty; and the dtype to save it in."""
    name, trust = config.model_name_or_path, {"trust_remote_code": config.trust_remote_code}
    if isinstance(given, transformers.PreTrainedModel):
        return _given_model(given, config)
    stored = None
    if config.load_in_4bit:
        lm = _load_in_4bit(config, world)
    elif world.mesh is not None:
        lm = empty_model(name, **trust)
        stored = locate_weights(lm, name)
    if stored is None and not config.load_in_4bit:
        lm = load_model(name, **trust)
    if config.save_dtype != "auto":
        return lm, stored, getattr(torch, config.save_dtype)
    source = read_config(name, **trust).dtype
    return lm, stored, torch.float32 if config.use_peft or source is None else source


def _load_in_4bit(config: TrainConfig, world: World) -> transformers.PreTrainedModel:
    """The model on its device, with the weights of linear layers in 4 bits."""
    if world.mesh is not None:
        raise ValueError("load_in_4bit: works in one process, without torchrun")
    code = {"trust_remote_code": config.trust_remote_code}
    return load_in_four_bits(config.model_name_or_path, world.device, **code)


def _given_model(
    lm: transformers.PreTrainedModel, config: TrainConfig
) -> tuple[transformers.PreTrainedModel, None, torch.dtype]:
    """As `_load`, for a model in memory: in float32, without dropout."""
    if getattr(lm, "peft_config", None):
        raise ValueError("model: it has adapters already (merge them, or name the model)")
    if config.load_in_4bit:
        raise ValueError("load_in_4bit: needs the name of a model, found a loaded one")
    dtype = torch.float32 if config.use_peft else lm.dtype
    if config.save_dtype != "auto":
        dtype = getattr(torch, config.save_dtype)
    check_finite(lm, config.model_name_or_path, "model")
    return lm.float().eval(), None, dtype


def _resolve_dtype(dtype: str, device: torch.device) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def _resolve_pack(
    config: TrainConfig,
    world: World,
    largest_query: int,
    checkpoint: Path | None = None,
    given: str | transformers.PreTrainedModel | None = None,
) -> int:
    """max_tokens_per_pack as a number, the same on all ranks. Auto: the number of the checkpoint to
    resume from, so that packs stay as they were, or what the smallest GPU has room for."""
    if config.max_tokens_per_pack != "auto":
        return config.max_tokens_per_pack
    if config.resume_from_checkpoint is not None and checkpoint is not None:
        return world.once(lambda: read_state(checkpoint)["config"]["max_tokens_per_pack"])
    if world.device.type == "cpu":
        return TrainConfig.max_tokens_per_pack
    with torch.random.fork_rng(devices=[]):  # adapters draw numbers, which the run would miss
        if isinstance(given, transformers.PreTrainedModel):
            with torch.device("meta"):
                lm = type(given)(given.config)
        else:
            code = {"trust_remote_code": config.trust_remote_code}
            lm = empty_model(config.model_name_or_path, **code)
        if config.use_peft:
            add_lora(lm, config)
    dtype = getattr(torch, config.dtype)
    return fitting_tokens(
        lm,
        config,
        dtype,
        num_gpus=1 if world.mesh is None else world.mesh["shard"].size(),
        activations=activation_line(lm, config, dtype),
        memory=min(world.gather(torch.cuda.get_device_properties(world.device).total_memory)),
        largest_query=largest_query,
    )
