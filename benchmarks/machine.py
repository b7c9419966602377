"""The machine that figures come from: its name, versions and ceilings."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.cores import binding
from benchmarks.timing import device_seconds

# Side of the square product, and MiB of the copy, that are timed.
PRODUCT = {"cpu": 1536, "cuda": 8192}
COPY_MB = {"cpu": 64, "cuda": 2048}


def environment(device: str) -> dict:
    """The environment that figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        **({"binding": binding()} if device == "cpu" else {}),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
    }


def measured_best(device: str) -> dict:
    """The environment, the driver, memory, and the ceilings of products and copies."""
    more = {}
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=False)
        properties = torch.cuda.get_device_properties(0)
        more = {
            "driver": driver.stdout.strip() or None,
            "cuda": torch.version.cuda,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        **environment(device),
        **more,
        "tflops": peak_flops(device) / 1e12,
        "copy_gb_per_second": copy_bandwidth(device) / 1e9,
    }


def compute_dtype(device: str) -> torch.dtype:
    """The compute dtype of benchmarks: bfloat16 if the GPU supports it."""
    on_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_bf16 else torch.float32


def peak_flops(device: str) -> float:
    """Operations per second of one large square product of random matrices by cuBLAS: the ceiling
    for everything else."""
    size, dtype = PRODUCT[device], compute_dtype(device)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / device_seconds(lambda: torch.mm(a, b, out=out))


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.ones(COPY_MB[device] * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
