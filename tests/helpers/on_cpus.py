"""
Runs a script, under a configuration of `accelerate launch` that is for several GPUs, on CPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
        tests/helpers/on_cpus.py recipes/sequence_classification.py

Accelerate shares weights out (FSDP2) among processes of accelerators alone. Here it takes those of gloo for such.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState


def take_cpus_for_gpus() -> None:
    """For this process, one of several that its environment tells of."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = _backend


def _backend(
    self: PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    take_cpus_for_gpus()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
