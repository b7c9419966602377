"""Options of `python -m rrhf_fast.export`."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """Options of `python -m rrhf_fast.export`."""

    checkpoint: str
    """A checkpoint of a run, output_dir/checkpoint-<step>; or a folder of LoRA adapters."""
    output_dir: str
    """Where the model goes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the exported weights. Auto: the one that the model came in; adapters are float32."""
    merge: bool = False
    """Add LoRA adapters to the weights of their model, instead of exporting them alone."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Off unless you trust its author."""
