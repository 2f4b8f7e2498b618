"""Environments that `accelerate launch` makes from the shipped configurations."""

from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

CONFIGURATIONS = Path(__file__).parents[2] / "recipes" / "accelerate"


def launched(name: str, *options: str) -> Any:
    """The arguments of a launch with a configuration."""
    command = ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), *options, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


def deepspeed_environment(name: str, *options: str) -> dict[str, str]:
    """The environment of processes that DeepSpeed launches with a configuration."""
    arguments = launched(name, "--main_process_port", "0", *options)
    arguments.deepspeed_fields_from_accelerate_config = "zero_stage"  # as the launcher goes on to say
    _, environment = prepare_deepspeed_cmd_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
