"""Settings of the whole suite: no network, no deadline that a busy machine could miss."""

import os

# Before transformers or datasets is imported; tests read what is shipped or made here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
