"""Runs functions in two processes that communicate through gloo, started as by `accelerate launch`."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds, beyond which a process is stuck; DeepSpeed may compile for a minute first


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(function: Callable[..., Any], folder: Path, *preload: str) -> None:
    """Calls `function(folder)` in two processes.

    Args:
        function: Of a module, by which a new process finds it.
        folder: Where the processes leave what they found.
        preload: Modules that both need and that are imported once.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    port = free_port()
    processes = [context.Process(target=_run, args=(function, folder, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], f"exit codes of the two processes: {codes}"


def _run(function: Callable[..., Any], folder: Path, rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(folder)
