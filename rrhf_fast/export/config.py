"""Options of `python -m rrhf_fast.export`."""

from dataclasses import dataclass
from typing import Literal

from rrhf_fast.stages.hub import HubConfig


@dataclass
class _Exported:
    """Checkpoint and model"""

    checkpoint: str
    """Checkpoint of a run, output_dir/checkpoint-STEP; or a folder of LoRA adapters, with --merge
    true. Required."""
    output_dir: str
    """Folder for the model. Required."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the exported weights. auto: that of the model that was trained; adapters are
    float32."""
    merge: bool = False
    """Add LoRA adapters to the weights of their model, instead of exporting them alone."""
    load_in_4bit: bool | None = None
    """Merge with what 4 bits keep of the model's weights, on which --load_in_4bit trained the
    adapters. Default: as they were trained, which base_quantization.json beside them says."""
    base_model_name_or_path: str | None = None
    """Model that LoRA adapters were trained for. Default: the one they name; a relative path that
    leads nowhere from here is looked up from their folder and those above it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose author you trust."""


@dataclass
class ExportConfig(_Exported, HubConfig):
    """Options of `python -m rrhf_fast.export`."""
