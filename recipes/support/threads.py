"""
Makes waiting threads give up their cores. This matters if several processes share a CPU, such as the workers of a data
loader or the processes of a distributed run.

Import this module before any other, since OpenMP reads the setting when torch is loaded. If the environment already has
a value, it is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
