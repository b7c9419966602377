"""Settings of the whole suite: no network, no deadline that a busy machine could miss."""

import os

# Before transformers or datasets is imported; tests read what is shipped or made here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    # Before a kernel is imported: without a GPU, Triton's interpreter runs them on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    import pytest

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
