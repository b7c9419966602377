"""Cards: the README.md that the Hugging Face hub shows of a model."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rrhf_fast.data.checks import one_line, visible_lines
from rrhf_fast.stages.files import write_text
from rrhf_fast.stages.secrets import hide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"
# The first line after the metadata.
OURS = "<!-- Written by rrhf_fast, which replaces this file; without this line it stays. -->"
PAPER = "[arXiv 2304.05302](https://arxiv.org/abs/2304.05302)"
_LIBRARIES = ("torch", "transformers", "peft", "safetensors")
# Options that say where things are, what becomes of the finished model, or what is kept on the way.
NOT_SHOWN = {
    "model_name_or_path", "train_data", "eval_data", "output_dir", "overwrite_output_dir",
    "data_cache_dir", "dataset_num_proc", "resume_from_checkpoint", "init_optimizer_from",
    "push_to_hub", "hub_model_id", "hub_private_repo", "report_to", "run_name", "save_steps",
    "save_total_limit", "logging_steps", "profile_steps",
}  # fmt: skip


@dataclass
class ModelCard:
    """What a card says of a model. Names of files and folders of this machine are left out."""

    base: str | None  # on the hub; None: a folder of this machine
    kind: str  # such as "llama, 135M parameters"
    has_adapters: bool
    name: str | None = None  # that it will have on the hub
    options: Mapping = field(default_factory=dict)  # those that differ from the defaults
    loss: Mapping = field(default_factory=dict)  # all options of the loss
    data: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)  # on the hub
    figures: list[tuple[str, float, float]] = field(default_factory=list)  # before, after
    state: str = ""  # how far training came

    def text(self, *, has_curves: bool) -> str:
        """The file's text."""
        from huggingface_hub import ModelCardData

        metadata = ModelCardData(
            library_name="peft" if self.has_adapters else "transformers",
            pipeline_tag="text-generation",
            base_model=self.base,
            datasets=self.datasets or None,
            tags=["rrhf", "rrhf_fast", "arxiv:2304.05302"],
        )
        base = f"`{self.base}`" if self.base else "a local model"
        parts = [
            f"---\n{metadata.to_yaml()}\n---\n{OURS}",
            f"# {self.base or 'A causal language model'}, trained by RRHF",
            f"{'LoRA adapters for' if self.has_adapters else 'Trained from'} {base} ({self.kind}) "
            f"by RRHF, on responses ranked by their scores ({PAPER}). {self.state}".strip(),
        ]
        if self.figures:
            rows = [f"| {name} | {old:.3f} | {new:.3f} |" for name, old, new in self.figures]
            parts.append("\n".join(["| | before | after |", "|---|---|---|", *rows]))
        if has_curves:
            shown = "losses, ranking accuracy, reward and length or margin and gradient, speed"
            parts.append(f"![{shown}](training.png)")
        if self.data:
            parts.append("## Data\n\n" + "\n".join(f"* {line}" for line in self.data))
        if self.loss:
            parts.append("## Loss\n\n" + block(self.loss))
        if self.options:
            parts.append("## Options that differ from the defaults\n\n" + block(self.options))
        parts += [f"## Use\n\n{self._use()}", f"## Versions\n\n{versions()}"]
        return hide("\n\n".join(parts) + "\n")

    def _use(self) -> str:
        name = self.name or "PATH_OR_NAME"
        note = "With peft installed:\n\n" if self.has_adapters else ""
        return (
            f"{note}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
        )


def shown_options(config: Mapping, defaults: Mapping) -> dict:
    """The options that differ from their defaults, without those that name places."""
    return {
        name: without_paths(value)
        for name, value in config.items()
        if name not in NOT_SHOWN and name in defaults and value != defaults[name]
    }


def described(lm: "PreTrainedModel") -> str:
    """Architecture and size of a model."""
    from rrhf_fast.model.four_bit import num_elements  # late: it loads transformers

    kind = re.sub(r"[^\w. -]", "?", one_line(lm.config.model_type, 40))  # its author's word
    return f"{kind}, {short(sum(map(num_elements, lm.parameters())))} parameters"


def short(number: int) -> str:
    """A count with three digits, such as 1.24B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def counted(number: int, what: str) -> str:
    """A number of things, such as 1 row or 2,000 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def write_card(folder: Path, card: ModelCard) -> None:
    """Write the card of the model in `folder`, unless its README.md is a person's."""
    path = folder / CARD
    if is_ours(path):
        write_text(path, card.text(has_curves=(folder / "training.png").is_file()))


def is_ours(path: Path) -> bool:
    """Whether a card may be written here: there is none, or it was written by this package."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return False
    if not path.exists():
        return True
    try:
        return OURS in path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it may be read by others alone
        return False


def is_model_card(path: Path) -> bool:
    """Whether this is a card to publish: written by this package, or a person's with a card's
    metadata, which the README.md of a project does not have."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return OURS in text or text.startswith(("---\n", "---\r\n"))


def without_paths(value: object) -> object:
    """Plain data, without the names of files and folders of this machine."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    # Sources name a way and then a model, as in openai:/home/me/model.
    way = re.match(r"(?:[\w.+-]{2,}:)*", value)[0]
    place = value[len(way) :]
    is_path = place.startswith(("/", "~", "./", "../", "\\")) and not place.startswith("//")
    is_path |= re.match(r"[A-Za-z]:[\\/]", place) is not None
    is_path |= "/" in place and os.path.exists(place)
    return f"{way}(a path)" if is_path else value


def block(options: Mapping) -> str:
    """Options as a block of YAML in Markdown."""
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    if visible_lines(text) != text:
        text = yaml.safe_dump(dict(options), sort_keys=False)
    fence = "`" * max(3, 3, *(len(run) + 1 for run in re.findall("`+", text)))
    return f"{fence}yaml\n{text}{fence}"


def versions() -> str:
    """Those of the libraries that made a model or rows."""
    from rrhf_fast import __version__

    found = [f"rrhf_fast {__version__}"]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except ModuleNotFoundError:
            continue
    return ", ".join(found)
