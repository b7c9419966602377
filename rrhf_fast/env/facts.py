"""The facts of `rrhf-fast env`.

Each is found by itself: where one cannot be, its error stands in its place, since what is broken is
what a report is about.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rrhf_fast
from rrhf_fast.data.checks import one_line

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets",
    "numpy", "flash-attn", "peft", "torchao", "bitsandbytes", "accelerate", "trl", "vllm", "openai",
    "tensorboard", "wandb", "trackio",
)  # fmt: skip
# Environment variables that change what a run does, by how their names begin.
_BEGINNINGS = (
    "RRHF_FAST_", "HF_", "HUGGING", "TRANSFORMERS_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_",
    "NCCL_", "GLOO_", "TRITON_", "VLLM_", "OMP_", "MKL_", "SLURM_", "WANDB_", "TRACKIO_", "OPENAI_",
    "TOKENIZERS_", "PYTHON", "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "RANK",
    "WORLD_SIZE", "LOCAL_RANK", "MASTER_",
)  # fmt: skip
# Those whose values are shown if they are switches or numbers.
_SHOWN = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE", "RANK", "WORLD_SIZE", "LOCAL_RANK",
)  # fmt: skip
_SWITCH = re.compile(r"[\d,]{1,40}|true|false|on|off|yes|no", re.IGNORECASE)


def facts() -> dict:
    """What a report needs, as plain data. Loads PyTorch; on a GPU it compiles and tries attention,
    which takes some seconds."""
    return {
        "rrhf_fast": f"{rrhf_fast.__version__} in {_without_home(Path(rrhf_fast.__file__).parent)}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": _try(_processor),
        "threads": _try(_threads),
        "devices": _try(_devices),
        "cuda": _try(_cuda),
        "attention": _try(_attention),
        "cache": _try(_cache),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": _environment(),
    }


def as_text(found: dict) -> str:
    """The facts in lines, ready to paste."""
    lines = []
    for name, value in found.items():
        if name == "packages":
            lines += [f"{package:<16} {it}" for package, it in value.items() if it is not None]
            absent = [package for package, it in value.items() if it is None]
            value = ", ".join(absent) or "none of those that matter"
            name = "not installed"
        elif isinstance(value, dict):
            value = ", ".join(f"{key}={it}" if it else key for key, it in value.items()) or "none"
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            lines.append(f"{'' if number else name:<16} {item}".rstrip())
    return "\n".join(lines)


def _try(find: Callable[[], str | list[str]]) -> str | list[str]:
    """What `find` finds, or its error."""
    try:
        return find()
    except Exception as error:  # drivers and broken installs raise any type
        return f"failed ({type(error).__name__}: {_without_home(one_line(error))})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = match[1] if match else name
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{name}, {os.cpu_count()} cores, {pages / 2**30:.1f} GiB of memory"


def _threads() -> str:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{torch.get_num_threads()} of PyTorch, on {allowed} cores that this process may use"


def _devices() -> list[str]:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        found.append(f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}")
    return found or ["CPU only"]


def _cuda() -> str:
    import torch

    built = torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}")
    parts = [f"PyTorch is built for {built}" if built else "PyTorch is built for CPUs"]
    if torch.cuda.is_available():
        parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        drivers = sorted(set(done.stdout.split())) if done.returncode == 0 else []
        parts.append(f"driver {', '.join(drivers)}" if drivers else "nvidia-smi fails")
    return ", ".join(parts)


def _attention() -> str:
    """What `--attn_implementation auto` comes to for a decoder of a common shape, tried as at the
    start of a run."""
    import torch

    from rrhf_fast.model.attention import choose_backend
    from rrhf_fast.model.backend import AttentionSpec

    is_cuda = torch.cuda.is_available()
    is_bf16 = is_cuda and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    device = torch.device("cuda" if is_cuda else "cpu")
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, value_size=64)
    choice = choose_backend("auto", [spec], device=device, dtype=dtype)
    of = f"for heads of 64 in {str(dtype).removeprefix('torch.')} on {device}"
    warning = f"; warning: {choice.warning}" if choice.warning else ""
    return f"{choice.name} {of} ({_without_home(choice.reason)}){_without_home(warning)}"


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    from rrhf_fast.stages.token_cache import cache_folder

    return _without_home(f"{cache_folder()} (tokens), {HF_HUB_CACHE} (models)")


def _environment() -> dict[str, str | None]:
    """The names that are set, and the values of those that are shown."""
    names = sorted(name for name in os.environ if name.upper().startswith(_BEGINNINGS))
    return {one_line(name, 80): os.environ[name] if _is_shown(name) else None for name in names}


def _is_shown(name: str) -> bool:
    return name in _SHOWN and _SWITCH.fullmatch(os.environ[name]) is not None


def _without_home(text: object) -> str:
    """The text with ~ for the home folder, whose name is often that of a person."""
    home = os.path.expanduser("~")
    return str(text).replace(home, "~") if len(home) > 1 else str(text)
