"""The last line of a command: what to do with what it made. Words in capitals are the reader's."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rrhf_fast.train.config import TrainConfig

# Options by which training read its rows, and by which its held-out rows are read too.
_READING = ("columns", "group_by", "apply_chat_template", "chat_template_kwargs")
_READING += ("trust_remote_code",)


def after_sampling(output: str) -> str:
    """Score the rows."""
    scored = Path(output).with_name(f"{Path(output).stem}-scored.jsonl")
    return _command(
        "score", data=output, output=str(scored), reward_model_name_or_path="REWARD_MODEL"
    )


def after_scoring(output: str, model: str | None, *, has_unrankable: bool) -> str:
    """Train on the rows, and leave out those that cannot be ranked; not over the model itself."""
    skip = {"on_bad_rows": "skip"} if has_unrankable else {}
    folder = str(Path(output).with_name("trained"))
    if model is not None and Path(folder).absolute() == Path(model).absolute():
        folder += "-again"
    return _command(
        "train", model_name_or_path=model or "MODEL", train_data=output, output_dir=folder, **skip
    )


def after_training(folder: Path, config: "TrainConfig") -> str:
    """Compare the model with the one before; merge adapters first."""
    if config.use_peft:
        merged = f"{folder}-merged"
        return _command("export", checkpoint=str(folder), output_dir=merged, merge=True)
    before = config.model_name_or_path
    return _command(
        "evaluate",
        model_name_or_path=str(folder),
        baseline=before,
        reference_model_name_or_path=before,
        data=config.eval_data or "HELD_OUT.jsonl",
        reward_fn=config.eval_reward_fn or "MODULE:FUNCTION",
        output_dir=f"{folder}-evaluation",
        **{name: value for name in _READING if (value := getattr(config, name))},
    )


def after_rounds(folder: Path, model: str, rounds: int) -> str:
    """Read the report; add a round."""
    again = shlex.join(["--output_dir", str(folder), "--rounds", str(rounds + 1)])
    return (
        f"next: open {folder / 'report.html'}; the last model is in {model}; the same command with "
        f"{again} adds a round"
    )


def after_export(folder: Path) -> str:
    """Load the model."""
    has_adapters = (folder / "adapter_config.json").is_file()
    serve = shlex.join(["vllm", "serve", str(folder)])
    how = ", with peft installed" if has_adapters else f", or {serve}"
    return f"next: AutoModelForCausalLM.from_pretrained({str(folder)!r}){how}"


def _command(name: str, **options: object) -> str:
    words = [
        word
        for option, value in options.items()
        for word in (f"--{option}", value if isinstance(value, str) else json.dumps(value))
    ]
    return f"next: {shlex.join(['python', '-m', f'rrhf_fast.{name}', *words])}"
