"""What the results of a stage depend on, so that earlier work is reused for nothing else."""

import hashlib
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rrhf_fast.data.sources import local_files

# Options that change where a result goes or when it is there, not what it is.
_NO_MATTER = ("output", "output_dir", "overwrite", "timeout", "max_retries", "max_concurrency")
# Options that name files or folders, whose content may change while the name stays.
_ROWS = ("data", "eval_data", "ranking_data")
_NAMES = ("baseline", "model_name_or_path")
_NAMES += ("reference_model_name_or_path", "reward_model_name_or_path")
# What a model is made of; other files of its folder may come and go.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")


def identity(config: object) -> dict:
    """What the results of a stage depend on: its options, and the content of what they name."""
    found = {name: value for name, value in asdict(config).items() if name not in _NO_MATTER}
    named = {name: found[name] for name in _NAMES if found.get(name)}
    if found.get("reward_fn"):
        named["reward_fn"] = _module_file(found["reward_fn"])
    for name in _ROWS:
        sources = [found[name]] if isinstance(found.get(name), str) else found.get(name) or []
        if files := [file for source in sources for file in local_files(source)]:
            found[f"content of {name}"] = [[str(file), _content(file)] for file in files]
    named["policies"] = [policy["model"] for policy in found.get("policies", []) if policy["model"]]
    for name, places in named.items():
        places = [places] if isinstance(places, str) else places
        if content := [_content(Path(place)) for place in places if place]:
            found[f"content of {name}"] = content
    return found


def _content(path: Path) -> str | list | None:
    """A hash of a file; name, size and time of a model's files; None for what is on the hub."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
    files = sorted(file for file in files if file.suffix in _MODEL_FILES)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _module_file(function: str) -> str:
    """Where the module of package.module:function is; "" where nothing can be found."""
    try:
        spec = find_spec(function.partition(":")[0])
    except Exception:  # packages above it are imported; what is wrong is said when it is called
        return ""
    return spec.origin or "" if spec else ""
