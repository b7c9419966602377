"""What a stage's results depend on, so that earlier results are reused only where they hold."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rrhf_fast.data.rows import Draft
from rrhf_fast.data.sources import local_files
from rrhf_fast.stages.journal import fingerprint
from rrhf_fast.stages.ranks import Ranks

# Options that decide where and when results appear, but not what they are.
_IRRELEVANT = ("output", "output_dir", "overwrite", "timeout", "max_retries", "max_concurrency")
_IRRELEVANT += ("serve_command", "serve_timeout")
_IRRELEVANT += ("push_to_hub", "hub_dataset_id", "hub_private_repo")
# Options of the trainer that decide how rows are tokenised, but not what the tokens are, and those
# of the finished model.
_NOT_TRAINED_BY = ("data_cache_dir", "dataset_num_proc")
_NOT_TRAINED_BY += ("push_to_hub", "hub_model_id", "hub_private_repo")
# Options that name files or folders, whose content may change under the same name.
_ROWS = ("data", "eval_data", "ranking_data")
_MODELS = ("baseline", "model_name_or_path")
_MODELS += ("reference_model_name_or_path", "reward_model_name_or_path")
# Arguments of vLLM's engine that say where it runs.
_PLACEMENT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_PLACEMENT += ("gpu_memory_utilization", "distributed_executor_backend", "enforce_eager")
_PLACEMENT += ("max_num_seqs", "max_num_batched_tokens", "swap_space", "cpu_offload_gb")
# The files that define a model; others in its folder may come and go.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")


def identity(config: object) -> dict:
    """The options that a stage's results depend on, and the content of the files they name."""
    parts = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
    for holder in (parts, *parts.get("policies", [])):
        if holder.get("base_url"):  # recorded without user name, password and query
            address = re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", holder["base_url"])
            # A server of this machine may get another port whenever it starts.
            holder["base_url"] = re.sub(r"(?<=//)(localhost|127\.0\.0\.1):\d+", r"\1", address)
        kwargs = holder.get("engine_kwargs") or {}
        holder["engine_kwargs"] = {k: v for k, v in kwargs.items() if k not in _PLACEMENT}
    if "train" in parts:
        parts["train"] = {k: v for k, v in parts["train"].items() if k not in _NOT_TRAINED_BY}
    paths = {name: [parts[name]] for name in _MODELS if parts.get(name)}
    if parts.get("reward_fn"):
        paths["reward_fn"] = [_module_file(parts["reward_fn"])]
    paths["policies"] = [policy["model"] for policy in parts.get("policies", [])]
    for name in _ROWS:
        sources = [parts[name]] if isinstance(parts.get(name), str) else parts.get(name) or []
        if files := [file for source in sources for file in local_files(source)]:
            parts[f"content of {name}"] = [[str(file), _content(file)] for file in files]
    for name, places in paths.items():
        if content := [_content(Path(place)) for place in places if place]:
            parts[f"content of {name}"] = content
    return parts


def depends_on(stage: str, config: object, drafts: Iterable[Draft], ranks: Ranks) -> str:
    """The fingerprint of a stage's options and rows, the first rank's. Raises ValueError unless all
    ranks read the same rows; files of a model may have other times on another host."""
    rows = (vars(draft) | {"where": None} for draft in drafts)
    digest = fingerprint(rows=rows)
    digests = ranks.gather(digest)
    if odd := [rank for rank in range(ranks.size) if digests[rank] != digests[0]]:
        raise ValueError(f"data: rank {odd[0]} reads other rows than rank 0")
    return ranks.once(lambda: fingerprint(stage, identity(config), digest))


def refuse_pipes(config: object) -> None:
    """Raise ValueError for rows that come from a pipe, such as <(zcat rows.gz), where they are read
    more than once."""
    for name in _ROWS:
        sources = getattr(config, name, None) or []
        for source in [sources] if isinstance(sources, str) else sources:
            if Path(source).is_fifo():
                raise ValueError(f"{name}: {source}: expected a file, found a pipe, which ends")


def _content(path: Path) -> str | list | None:
    """A file's hash; name, size and time of a model's files; None for a model on the hub, and for
    what cannot be read: whoever uses it says so."""
    try:
        return _readable_content(path)
    except (OSError, ValueError):
        return None


def _readable_content(path: Path) -> str | list | None:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
    files = sorted(file for file in files if file.suffix in _MODEL_FILES)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _module_file(function: str) -> str:
    """The file of the module of package.module:function, or "" if there is none."""
    try:
        spec = find_spec(function.partition(":")[0])
    except KeyboardInterrupt:
        raise
    except BaseException:  # this imports parent packages; errors are reported when it is called
        return ""
    return spec.origin or "" if spec else ""
