"""
How threads wait, on a CPU that others use too: workers of a data loader, say, or the processes of one training.

Import this before anything else: OpenMP reads the setting when torch is loaded. Without it, a thread that waits for
others keeps its core busy, and those may have none. What the environment says already stands.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
