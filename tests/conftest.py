"""What every test run starts from."""

import os

# The tests read local folders only. Set before any Hugging Face library is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
