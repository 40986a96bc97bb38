"""Parts by a pool of Ray's actors, on one machine or on many."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_det.errors import CascadeDetError, ConfigError
from cascade_det.offline.addresses import missing_extra
from cascade_det.offline.plan import Part
from cascade_det.offline.worker import MOST_TRIES, Counts, Job, PartWorker
from cascade_det.parallel.processes import portable


@dataclass(frozen=True)
class Actors:
    """The pool of actors, each with a predictor.

    Attributes:
        least: actors from the start.
        most: actors where the cluster has room.
        cpus: of each, which Ray also gives PyTorch as threads.
        gpus: of each; a fraction shares a GPU.
    """

    least: int
    most: int
    cpus: float
    gpus: float


class _Tries:
    """How often each part was begun: Ray itself tries the part of a dead actor for ever."""

    def __init__(self) -> None:
        self._tries: Counter[str] = Counter()

    def count(self, name: str) -> int:
        self._tries[name] += 1
        return self._tries[name]


class _Actor:
    def __init__(self, job: Job, tries: Any) -> None:
        self._job, self._tries = job, tries
        self._worker: PartWorker | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        (pickled,) = batch["part"]
        # As a result, since Ray wraps what is raised, and loses its cause on the way.
        try:
            result: Counts | Exception = self._run(pickle.loads(pickled))
        except CascadeDetError as error:
            result = portable(error)
        return {"result": [pickle.dumps(result)]}

    def _run(self, part: Part) -> Counts:
        if self._worker is None:
            self._worker = PartWorker(self._job)
        if _import_ray().get(self._tries.count.remote(part.name)) > MOST_TRIES:
            raise CascadeDetError(
                f"{part.name}, with {len(part.entries)} images: {MOST_TRIES} actors died in it. "
                "Perhaps the memory was full. The other parts that are done are kept: the same "
                "command continues."
            )
        return self._worker.run(part)


def run_on_ray(job: Job, parts: Sequence[Part], actors: Actors) -> Generator[Counts, None, None]:
    """Make the files of parts; yields the counts of each when it is done.

    Uses the cluster that Ray finds (``RAY_ADDRESS``), or starts one on this machine. Ray starts
    actors again that die, and tries their parts again; nothing is dropped for errors.

    Args:
        job: see there.
        parts: to be done.
        actors: the pool.

    Raises:
        ConfigError: Ray is not installed.
        CascadeDetError: an actor raised it, or actors died with the same part again and again.
    """
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init()
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0
    context.enable_progress_bars = False  # ours counts images
    tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tries).remote()
    # A block for each part, so that each is a task of its own.
    items = [{"part": pickle.dumps(part)} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor,
        fn_constructor_args=(job, tries),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(actors.least, len(parts)), max_size=min(actors.most, len(parts))
        ),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )
    try:
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        ray.kill(tries)


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(missing_extra("--engine ray is of Ray Data", error, "ray")) from None
    return ray
