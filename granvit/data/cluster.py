"""Shards made on a Ray cluster: Ray Data deals them out to its workers, and to others where one dies.

A worker writes its shards where one machine's processes do, each whole by a rename, so that a shard that two workers
make is there once. All machines must therefore see the output, and what it is made of, at the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from granvit.data.shards import Shards
from granvit.errors import Failed

SECONDS = 10
"""That a cluster has to answer."""
MAX_TASKS = 10_000
"""Of Ray Data's; more shards share them, as its scheduler works through tasks one by one."""

log = logging.getLogger(__name__)

Over = Callable[[Shards, Sequence[int], int | None], Iterator[dict[str, Any]]]


@contextmanager
def ray_cluster(address: str, gpus: float = 0) -> Iterator[Over]:
    """What `build_dataset` takes as `over`, to have the shards made by workers on a cluster.

    address: HOST:PORT, or "auto": what the variable RAY_ADDRESS says, else the cluster that this machine belongs to.
    gpus: for each worker, 0.5 lets two share one; 0: a CPU each. Raises ValueError without the package ray and for
    gpus < 0, Failed where no cluster answers.
    """
    if gpus < 0:
        raise ValueError(f"gpus_per_worker must be >= 0, got {gpus}")
    try:
        import ray.data
    except ImportError as error:
        raise ValueError(f"--ray takes pip install 'granvit[ray]': {error}") from None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    try:
        host, colon, port = address.rpartition(":")
        if colon and "/" not in address:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise Failed(
            f"no way to a Ray cluster at {address!r}: {error}. `ray start --head` begins one and says its address; one "
            "that runs wants its own token here, too (`ray get-auth-token`)"
        ) from None
    try:
        yield partial(_make, gpus)
    finally:
        ray.shutdown()


def _make(gpus: float, shards: Shards, numbers: Sequence[int], workers: int | None) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1 on a cluster, got {workers}")
    if gpus > (there := ray.cluster_resources().get("GPU", 0)):
        log.warning("workers of %g GPUs wait: the cluster has %g now", gpus, there)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=min(len(numbers), MAX_TASKS))
    made = rows.map_batches(
        _Worker,
        fn_constructor_args=(shards, os.getcwd(), sys.path),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy() if workers is None else ray.data.ActorPoolStrategy(size=workers),
        **({"num_gpus": gpus} if gpus else {"num_cpus": 1}),  # Ray calls both together an experiment
    )
    try:
        for row in made.iter_rows():
            if row["error"]:
                raise Failed(row["error"])
            yield json.loads(row["made"])
    except RayTaskError:  # a mistake of ours, with where it was made
        raise
    except RayError as error:
        raise Failed(f"the Ray cluster failed: {error}") from error


class _Worker:
    """A process somewhere on the cluster, which keeps the models that its shards' source loads."""

    def __init__(self, shards: Shards, folder: str, modules: list[str]) -> None:
        self.shards, self.checked = shards, False
        sys.path += [path for path in modules if path not in sys.path]  # as in spawned processes: models of one's own
        with suppress(OSError):  # relative paths are the caller's
            os.chdir(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            if not self.checked:
                self.shards.check()
                self.checked = True
            [number] = batch["number"]
            return {"made": [json.dumps(self.shards(int(number)))], "error": [""]}
        except (Failed, ValueError, OSError) as error:  # to be told in one line, which Ray's errors are not
            return {"made": [""], "error": [f"{error} (on {platform.node()})"]}
