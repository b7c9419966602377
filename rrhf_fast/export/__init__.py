"""A checkpoint becomes a folder that from_pretrained and vLLM read."""

from pathlib import Path

from rrhf_fast.export.config import ExportConfig

__all__ = ["ExportConfig", "export"]


def export(config: ExportConfig) -> Path:
    """Write what a checkpoint holds to `output_dir`; returns that. Needs memory for one copy of the
    model in the exported dtype (to merge, in float32), no GPU, and no more than one process.

    Raises:
        ValueError: there is no complete checkpoint and there are no adapters to merge; output_dir
            holds a model.
        SaveFailed: output_dir cannot be written.
    """
    from rrhf_fast.export.run import run  # late: it loads PyTorch

    return run(config)
