"""What every rank runs: python -m torch.distributed.run --nproc_per_node N cases.py FOLDER

Small runs of the embedded model, or of a random one with a head of its own. Without torchrun it
makes the inputs and what the ranks' runs are compared with.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rrhf_fast import TrainConfig, demo, train

# Adam blows rounding up where a gradient is nearly 0, hence its large epsilon. 24 rows in steps of
# 5: the last step of the epoch has 4.
COMMON = {
    "learning_rate": 1e-3, "adam_epsilon": 1e-3, "train_batch_size": 5, "num_train_epochs": 1,
}  # fmt: skip
CASES = {
    "tied": {"save_steps": 3},
    "untied": {"model": "untied"},
    "accumulation": {"max_tokens_per_pack": 250},
    "gathered once": {"max_tokens_per_pack": 250, "reshard_after_forward": False},
    "checkpointing": {"activation_checkpointing": "full", "max_tokens_per_pack": 250},
    "padding": {"packing": "none", "max_tokens_per_pack": 1500},
    "offload": {"cpu_offload": True},
    "lora": {"use_peft": True, "learning_rate": 1e-2},
    "fewer queries than ranks": {"train_batch_size": 2, "max_steps": 3},
    "samples": {"max_steps": 1, "eval_reward_fn": "rrhf_fast.demo.reward:score"},
}
# Which of them give the same run.
SAME_AS = {
    "accumulation": "tied", "gathered once": "tied", "checkpointing": "tied", "offload": "tied",
    "replicated": "tied", "resumed": "tied",
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Rows, and a model whose head is not tied, in bfloat16 and in several files."""
    for source, count in ((demo.TRAIN_FILE, 24), (demo.EVAL_FILE, 7)):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    torch.manual_seed(0)
    # 66 columns and 3 layers: FSDP's parts have to differ in size.
    config = LlamaConfig(
        vocab_size=577, hidden_size=66, intermediate_size=90, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=22, tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    lm = LlamaForCausalLM(config).to(torch.bfloat16)
    lm.save_pretrained(folder / "untied", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder / "untied")


def run(folder: Path, name: str, options: dict):
    """One case, in folder/<number of ranks>/<name>."""
    options = dict(options)
    model = folder / options.pop("model") if "model" in options else demo.MODEL_DIR
    data = {"train_data": str(folder / demo.TRAIN_FILE.name)}
    data["eval_data"] = str(folder / demo.EVAL_FILE.name)
    output_dir = folder / os.environ.get("WORLD_SIZE", "alone") / name
    return train(
        TrainConfig(
            model_name_or_path=str(model), output_dir=str(output_dir), save_dtype="float32",
            **(COMMON | data | options),
        )
    )  # fmt: skip


def main(folder: Path) -> None:
    size = int(os.environ.get("WORLD_SIZE", 0))
    if not size:
        make_inputs(folder)
        for name, options in CASES.items():
            if name not in SAME_AS:
                run(folder, name, options)
        return
    dist.init_process_group("gloo")
    cases = CASES
    if size == 4:
        cases |= {
            "replicated": {"data_parallel_replicate": 2, "max_tokens_per_pack": 250},
            "resumed": {"resume_from_checkpoint": str(folder / "2" / "tied" / "checkpoint-3")},
        }
    for name, options in cases.items():
        run(folder, name, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
