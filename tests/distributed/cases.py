"""Runs on every rank: python -m torch.distributed.run --nproc_per_node N cases.py FOLDER [CASE..]

Small runs of the embedded model, or of a random one with an untied head. Without torchrun it
creates the inputs and the runs that those of the ranks are compared with.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rrhf_fast import RRHFTrainer, TrainConfig, demo, train
from rrhf_fast.model import layers

# Adam amplifies rounding where a gradient is nearly 0, hence the large epsilon. 24 rows in steps of
# 5: the last step of the epoch has 4.
COMMON = {
    "learning_rate": 1e-3, "adam_epsilon": 1e-3, "train_batch_size": 5, "num_train_epochs": 1,
}  # fmt: skip
REFERENCE = {"reference": "initial", "pair_loss": "logistic", "beta": 2.0}
CASES = {
    "tied": {"save_steps": 3},
    "untied": {"model": "untied"},
    "experts": {"model": "experts"},
    "accumulation": {"max_tokens_per_pack": 250, "profile_steps": 1},
    "gathered once": {"max_tokens_per_pack": 250, "reshard_after_forward": False},
    "checkpointing": {"activation_checkpointing": "full", "max_tokens_per_pack": 250},
    "active set": {"active_set": "on", "max_tokens_per_pack": 250},
    "padding": {"packing": "none", "max_tokens_per_pack": 1500},
    "offload": {"cpu_offload": True},
    "lora": {"use_peft": True, "learning_rate": 1e-2},
    "dora": {"use_peft": True, "use_dora": True, "use_rslora": True, "learning_rate": 1e-2},
    # The held-out loss falls, so that its highest value is the first.
    "the best of three": {
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "eval_steps": 1,
        "max_steps": 3,
    },
    "fewer queries than ranks": {"train_batch_size": 2, "max_steps": 3},
    "reference": REFERENCE | {"save_steps": 3},
    "reference and adapters": REFERENCE | {"use_peft": True, "learning_rate": 1e-2},
    "reference and offload": REFERENCE | {"cpu_offload": True},
    "reference, evaluated first": REFERENCE | {"evaluated_first": True},
    "samples": {"max_steps": 1, "eval_reward_fn": "rrhf_fast.demo.reward:score"},
}
# Layers compiled by one backend each; they run only if named.
COMPILED = {
    f"{backend} {mode}": {
        "compiler": backend, "compile": True, "activation_checkpointing": mode,
        "max_tokens_per_pack": 250,
    }
    for backend, modes in {
        "aot_eager": ("none", "selective", "full"), "inductor": ("selective",)
    }.items()
    for mode in modes
}  # fmt: skip
# Cases that must give the same run.
SAME_AS = {
    "accumulation": "tied", "gathered once": "tied", "checkpointing": "tied", "offload": "tied",
    "active set": "tied",
    "replicated": "tied", "resumed": "tied", "replicated and checkpointed": "tied",
    "reference resumed": "reference", "reference replicated": "reference",
    "reference and offload": "reference", "reference, evaluated first": "reference",
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Rows, and a model with an untied head, in bfloat16 and in several files."""
    for source, count in ((demo.TRAIN_FILE, 24), (demo.EVAL_FILE, 7)):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    torch.manual_seed(0)
    # 66 columns and 3 layers: FSDP's shards differ in size.
    config = LlamaConfig(
        vocab_size=577, hidden_size=66, intermediate_size=90, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=22, tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    lm = LlamaForCausalLM(config).to(torch.bfloat16)
    lm.save_pretrained(folder / "untied", max_shard_size="100KB")
    # Its files store experts separately, and transformers fuses them while loading.
    config = MixtralConfig(
        vocab_size=577, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "experts")
    for name in ("untied", "experts"):
        AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder / name)


def run(folder: Path, name: str, options: dict):
    """One case, in folder/<number of ranks, 0 without torchrun>/<name>."""
    options = dict(options)
    torch._dynamo.reset()
    layers.COMPILER = options.pop("compiler", "inductor")
    model = folder / options.pop("model") if "model" in options else demo.MODEL_DIR
    data = {"train_data": str(folder / demo.TRAIN_FILE.name)}
    data["eval_data"] = str(folder / demo.EVAL_FILE.name)
    output_dir = folder / os.environ.get("WORLD_SIZE", "0") / name
    evaluated_first = options.pop("evaluated_first", False)
    config = TrainConfig(
        model_name_or_path=str(model), output_dir=str(output_dir), save_dtype="float32",
        **(COMMON | data | options),
    )  # fmt: skip
    if not evaluated_first:
        return train(config)
    with RRHFTrainer(args=config) as trainer:
        trainer.evaluate()
        return trainer.train()


def of_ranks(num_ranks: int, folder: Path) -> dict[str, dict]:
    """The cases for this number of ranks: all on 2, few on 4, which are slow to start and step on a
    small machine."""
    if num_ranks == 0:
        return {name: options for name, options in CASES.items() if name not in SAME_AS}
    if num_ranks == 2:
        return CASES
    names = ["tied", "untied", "offload", "lora"]
    cases = {"resumed": {"resume_from_checkpoint": str(folder / "2" / "tied" / "checkpoint-3")}}
    saved = str(folder / "2" / "reference" / "checkpoint-3")
    cases["reference resumed"] = CASES["reference"] | {"resume_from_checkpoint": saved}
    if num_ranks == 4:
        names = ["tied", "untied", "accumulation", "lora", "fewer queries than ranks", "samples"]
        cases["replicated"] = {"data_parallel_replicate": 2, "max_tokens_per_pack": 250}
        cases["reference replicated"] = cases["replicated"] | REFERENCE
        cases["replicated and checkpointed"] = cases["replicated"] | {
            "activation_checkpointing": "full"
        }
    return {name: CASES[name] for name in names} | cases


def main(folder: Path, *names: str) -> None:
    num_ranks = int(os.environ.get("WORLD_SIZE", 0))
    if num_ranks:
        dist.init_process_group("gloo")
    else:
        make_inputs(folder)
    named = {name: (CASES | COMPILED)[name] for name in names}
    for name, options in (named or of_ranks(num_ranks, folder)).items():
        run(folder, name, options)
    if num_ranks:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
