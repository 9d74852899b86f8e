# SPDX-License-Identifier: Apache-2.0
"""Runs a function on two processes that train together, and never waits for them for ever."""

import faulthandler
import os
import time
from collections.abc import Callable
from datetime import timedelta

from torch import distributed, multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# What a process of ours needs, loaded once for all: the server has no threads yet that a fork would lose.
CONTEXT.set_forkserver_preload(["torch", "transformers.trainer", "madtp.models", "madtp.training.trainer"])


def run(function: Callable, *arguments, store: str, seconds: float) -> None:
    """function(rank, *arguments) in a gloo group of two; raises what it raises, and TimeoutError after `seconds`.

    Args:
        function: of a module, so that a new process can import it.
        store: a file that does not exist, where the two meet.
    """
    context = multiprocessing.start_processes(
        _enter, (function, store, seconds, *arguments), nprocs=2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds + 10  # by then a process that hangs has said where
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"two processes did not finish {function.__name__} within {seconds} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _enter(rank: int, function: Callable, store: str, seconds: float, *arguments) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # or gloo asks the name service where this machine is
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=seconds)
    )
    function(rank, *arguments)
    distributed.barrier()
    distributed.destroy_process_group()
