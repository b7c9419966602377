"""What options and values of transformers 5.23, TRL 1.16 and LLaMA-Factory 0.9.5 are called here.

docs/guides/from_trl.md has the same table with what differs.
"""

from collections.abc import Set

# Their name -> ours, which do the same or stand in its place; none where nothing is to be set.
OTHER_NAMES = {
    "bf16": ("dtype",),
    "cutoff_len": ("max_length",),
    "dataloader_num_workers": (),
    "dataset": ("train_data",),
    "dataset_dir": (),
    "dataset_name": ("train_data",),
    "ddp_timeout": (),
    "deepspeed": ("data_parallel_shard",),
    "disable_gradient_checkpointing": ("activation_checkpointing",),
    "do_train": (),
    "early_stopping_steps": ("early_stopping_patience",),
    "eval_dataset": ("eval_data",),
    "eval_strategy": ("eval_steps",),
    "finetuning_type": ("use_peft",),
    "flash_attn": ("attn_implementation",),
    "fp16": ("dtype",),
    "fsdp": ("data_parallel_shard",),
    "gradient_accumulation_steps": ("train_batch_size", "max_tokens_per_pack"),
    "gradient_checkpointing": ("activation_checkpointing",),
    "logging_strategy": ("logging_steps",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "loss_type": ("pair_loss", "margin", "length_penalty", "sft_weight"),
    "lr": ("learning_rate",),
    "max_samples": (),
    "overwrite_cache": (),
    "padding_free": ("packing",),
    "peft_config": ("use_peft", "lora_r"),
    "per_device_eval_batch_size": (),
    "per_device_train_batch_size": ("train_batch_size", "max_tokens_per_pack"),
    "plot_loss": (),
    "pref_beta": ("beta",),
    "pref_ftx": ("sft_weight",),
    "pref_loss": ("pair_loss",),
    "preprocessing_num_workers": ("dataset_num_proc",),
    "quantization_bit": ("load_in_4bit",),
    "ref_model": ("reference",),
    "save_only_model": (),
    "save_strategy": ("save_steps",),
    "simpo_gamma": ("margin",),
    "stage": (),
    "streaming": (),
    "template": ("chat_template_kwargs",),
    "torch_dtype": ("dtype",),
    "train_dataset": ("train_data",),
    "truncation_mode": ("max_prompt_length", "max_response_length"),
    "val_size": ("eval_fraction",),
    "warmup_ratio": ("warmup_steps",),
}

_DPO = "DPO is logistic with reference initial, beta 0.1, length_penalty 0, sft_weight 0 and "
_DPO += "rank_reduction mean"
# Our option and their value of it -> what to say.
OTHER_VALUES = {
    ("dtype", "bf16"): "bfloat16 here",
    ("dtype", "fp32"): "float32 here",
    ("max_steps", -1): "null is no limit, and the default",
    ("optim", "adamw_torch"): "adamw here",
    ("optim", "adamw_torch_fused"): "adamw here",
    ("pair_loss", "dpo"): _DPO,
    ("pair_loss", "sigmoid"): _DPO,
    ("report_to", "none"): "[] is none, and the default",
    ("report_to", "all"): "name them",
    ("resume_from_checkpoint", True): "latest is the newest in output_dir",
}


def hint_for_name(name: str, options: Set[str]) -> str | None:
    """What is said of an unknown option, if another trainer has it and what stands for it is among
    `options`; else None."""
    ours = OTHER_NAMES.get(name)
    if ours is None or not options >= set(ours):
        return None
    return f" (here: {', '.join(ours)})" if ours else " (nothing takes its place here)"


def hint_for_value(name: str, value: object) -> str:
    """What is said of a wrong value, if another trainer has it; else nothing."""
    for (option, other), text in OTHER_VALUES.items():
        if option == name and type(other) is type(value) and other == value:
            return f" ({text})"
    return ""
