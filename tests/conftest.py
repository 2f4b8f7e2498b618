"""What every test run starts from."""

import gc
import os

# The tests read local folders only. Set before any Hugging Face library is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_finish():
    """Each training collects garbage; the modules that are loaded by now are none, and need not be looked at again."""
    gc.freeze()
