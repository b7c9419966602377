"""Options of `python -m rrhf_fast.export`."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
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
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose author you trust."""
