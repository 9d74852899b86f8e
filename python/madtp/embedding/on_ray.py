# SPDX-License-Identifier: Apache-2.0
"""Shards on the machines of a Ray cluster: actors that hold the model, one shard a call.

Names of shards and counts go through Ray, and no more: actors read images and write vectors themselves, so both have to
be on a file system that all see. An actor that is lost is started again, and so is its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from madtp.data.errors import DataError
from madtp.embedding.encoder import default_device
from madtp.embedding.shard import Job
from madtp.embedding.sources import Shard

RETRIES = 3  # of an actor, and of a shard, that is lost


def require_ray() -> Any:
    """Ray. Raises ImportError where it is not installed."""
    try:
        import ray
        import ray.util
    except ModuleNotFoundError as error:
        raise ImportError("ray is needed for ray=: pip install ray", name="ray") from error
    return ray


def run_on_ray(job: Job, shards: Sequence[Shard], actors: int) -> Iterator[tuple[int, int] | DataError]:
    """What `Job.run` returns, or raises, of each shard, as they come.

    Args:
        actors: how many there are; each takes as many CPUs as it has processes, and a GPU where the model is on one.
    """
    ray = require_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, or one of this machine
    on_gpu = job.encoder.device.type == "cuda"
    options = {
        "num_cpus": 1 + job.workers,
        "num_gpus": int(on_gpu),
        "max_restarts": RETRIES,
        "max_task_retries": RETRIES,
    }
    held = ray.put(replace(job, encoder=job.encoder.to("cpu")))
    kind = ray.remote(_Actor).options(**options)
    pool = ray.util.ActorPool([kind.remote(held, on_gpu) for _ in range(min(actors, len(shards)))])
    yield from pool.map_unordered(lambda actor, shard: actor.run.remote(shard), shards)


class _Actor:
    def __init__(self, job: Job, on_gpu: bool):
        self.job = replace(job, encoder=job.encoder.to(default_device() if on_gpu else "cpu"))

    def run(self, shard: Shard) -> tuple[int, int] | DataError:
        try:
            return self.job.run(shard)
        except DataError as error:
            return error
