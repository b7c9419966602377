"""Turn a checkpoint into a folder that from_pretrained and vLLM read."""

from pathlib import Path

from rrhf_fast.export.config import ExportConfig

__all__ = ["ExportConfig", "export"]


def export(config: ExportConfig) -> Path:
    """Write a checkpoint's model or adapters to `output_dir`; returns that. Needs memory for one
    copy of the model in the exported dtype (in float32 to merge), no GPU, and one process. With
    `push_to_hub` a card is written too, and both are pushed to the hub.

    Raises:
        ValueError: the checkpoint is incomplete or there are no adapters to merge, or output_dir
            already holds a model.
        SaveFailed: output_dir cannot be written.
        HubFailed: with push_to_hub; the hub cannot be reached, or does not take the model.
    """
    from rrhf_fast.export.run import run  # late: this loads PyTorch

    return run(config)
