"""Read distributed checkpoints (DCP) without running code from them.

PyTorch's reader unpickles `.metadata`, and every value that is not a tensor, and unpickling can run
anything. A checkpoint is a file that people share, so here only the classes that DCP itself writes
are known, and values are numbers, texts and tensors.
"""

import io
import pathlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from rrhf_fast.data.checks import one_line, show
from rrhf_fast.stages.checkpoint_files import read_state, wrong_files

# DCP warns so wherever there is no launcher.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip


def load_checkpoint(state: dict, folder: Path, option: str, **ranks: Any) -> None:
    """Read a checkpoint into the tensors and values of `state`; `ranks` go to `dcp.load`.

    Raises:
        ValueError: it does not fit the state, is damaged, or holds what no checkpoint needs; begins
            with the option that names it.
    """
    names_in(folder, option)  # PyTorch hides why it could not
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), **ranks)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        reason = first_failure(error)
        problem = str(reason).strip().splitlines()[-1:] or [type(reason).__name__]
        raise ValueError(
            f"{option}: {folder} does not fit this model, or is damaged ({one_line(problem[0])})"
        ) from error


def first_failure(error: Exception) -> BaseException:
    """What failed first behind the exception in which DCP collects those of all ranks."""
    if isinstance(error, dcp.api.CheckpointException):
        return next(reason for reason, _ in error.failures.values())
    return error


def damage(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """What is damaged in a complete checkpoint, one line each. Each of `size` ranks reads its share
    of the files."""
    problems = []
    if rank == 0:
        for look in (read_state, lambda folder: _Reader(folder).read_metadata()):
            try:
                look(folder)
            except ValueError as error:
                problems.append(str(error))
    return problems + wrong_files(folder, rank, size)


def summary(problems: list[str]) -> str | None:
    """The first of them on one line, or None if there are none."""
    more = [f"{len(problems) - 3} more"] if len(problems) > 3 else []
    return "; ".join(problems[:3] + more) or None


def names_in(folder: Path, option: str) -> set[str]:
    """The names of everything that a checkpoint holds. Raises ValueError as `load_checkpoint`."""
    try:
        return set(_Reader(folder).read_metadata().state_dict_metadata)
    except ValueError as error:
        raise ValueError(f"{option}: {folder}: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, dcp.Metadata):
                raise pickle.UnpicklingError("it holds something else")
            self._check_files(metadata)
        except Exception as error:  # a damaged pickle raises a dozen types
            raise ValueError(f".metadata cannot be read ({one_line(error)})") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check_files(self, metadata: dcp.Metadata) -> None:
        """Raise ValueError unless all entries are in files of the checkpoint, and these are long
        enough."""
        dict(metadata.state_dict_metadata)
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            name, end = info.relative_path, info.offset + info.length
            if not isinstance(name, str) or Path(name).name != name or min(info.offset, end) < 0:
                raise ValueError(f"it names the file {show(name)}")
            ends[name] = max(end, ends.get(name, 0))
        for name, end in ends.items():
            path = Path(self.path) / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if path.stat().st_size < end:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, expected {end}")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: dcp.planner.ReadItem, value: io.BytesIO) -> None:
        """Take numbers and texts only: what is read safely is written again for PyTorch, which
        would run anything."""
        try:
            content = torch.load(value, weights_only=True)
        except Exception as error:
            # Not PyTorch's reason, which advises to run what is there.
            problem = "holds something else than numbers, texts and tensors, or is damaged"
            raise ValueError(f"{read_item.dest_index.fqn} {problem}") from error
        safe = io.BytesIO()
        torch.save(content, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
