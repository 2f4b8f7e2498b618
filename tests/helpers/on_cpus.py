"""
Runs a script on CPUs under a configuration of `accelerate launch` for several GPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
        tests/helpers/on_cpus.py recipes/sequence_classification.py

Accelerate only shards weights (FSDP2) among processes with accelerators. Here it treats gloo's processes as such.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState


def take_cpus_for_gpus() -> None:
    """For this process, one of several according to its environment."""
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
