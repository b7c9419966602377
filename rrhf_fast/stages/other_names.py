"""What options of transformers 5.23, TRL 1.16 and LLaMA-Factory 0.9.5 are called here.

docs/guides/from_trl.md has the same table with what differs.
"""

# Their name -> ours, which do the same or stand in its place.
OTHER_NAMES = {
    "bf16": ("dtype",),
    "cutoff_len": ("max_length",),
    "dataset": ("train_data",),
    "dataset_name": ("train_data",),
    "deepspeed": ("data_parallel_shard",),
    "disable_gradient_checkpointing": ("activation_checkpointing",),
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
    "padding_free": ("packing",),
    "peft_config": ("use_peft", "lora_r"),
    "per_device_train_batch_size": ("train_batch_size", "max_tokens_per_pack"),
    "pref_beta": ("beta",),
    "pref_ftx": ("sft_weight",),
    "pref_loss": ("pair_loss",),
    "preprocessing_num_workers": ("dataset_num_proc",),
    "quantization_bit": ("load_in_4bit",),
    "ref_model": ("reference",),
    "save_strategy": ("save_steps",),
    "simpo_gamma": ("margin",),
    "torch_dtype": ("dtype",),
    "train_dataset": ("train_data",),
    "truncation_mode": ("max_prompt_length", "max_response_length"),
    "val_size": ("eval_fraction",),
    "warmup_ratio": ("warmup_steps",),
}
