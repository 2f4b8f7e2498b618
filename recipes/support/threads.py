"""
Lets waiting threads leave their cores to others, which matters if several processes share a CPU: the workers of a data
loader, for example, or the processes of a distributed training.

Import this module before any other: OpenMP reads the setting when torch is loaded. A value that is already in the
environment is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
