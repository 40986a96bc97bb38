"""Several processes that train or evaluate together.

Without a process group, this process is rank 0 of 1. Tensors of training go through NCCL on GPUs
and gloo on CPUs; objects always go through gloo, with a timeout longer than any evaluation. A dead
process is detected by torch's launcher (see :mod:`cascade_det.parallel.processes`) and by gloo's
closed connection, not by timeouts.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous as meet
from torch.nn.parallel import DistributedDataParallel

from cascade_det.errors import ConfigError
from cascade_det.parallel.processes import USER_ERRORS, PeerError, portable, run_processes

T = TypeVar("T")

_TENSOR_TIMEOUT = timedelta(minutes=30)
_OBJECT_TIMEOUT = timedelta(days=1)
_CONNECTION_TIMEOUT = timedelta(minutes=10)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Joined:
    """State that torch's default group does not hold."""

    local_rank: int = 0
    objects: Any = None  # a process group
    alone: bool = False


_joined = _Joined()


def rank() -> int:
    """Index of this process among those on all machines, from 0."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Number of processes on all machines."""
    return dist.get_world_size() if _in_group() else 1


def planned_world_size(num_processes: int, num_machines: int = 1) -> int:
    """How many processes :func:`launch` will start, or torchrun has started.

    Raises:
        ConfigError: a number is below 1.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if num_processes < 1 or num_machines < 1:
        raise ConfigError(
            f"--num-gpus is {num_processes} and --num-machines is {num_machines}: "
            "each has to be 1 or more"
        )
    return num_processes * num_machines


def local_rank() -> int:
    """Index of this process among those on this machine, from 0; also its GPU's index."""
    return _joined.local_rank


def is_main() -> bool:
    """Whether this is the process that writes files: rank 0."""
    return rank() == 0


def all_gather(value: Any) -> list[Any]:
    """The values of all processes in the order of ranks, on every process.

    Args:
        value: picklable; tensors on the CPU.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_joined.objects)
    return values


def gather(value: Any) -> list[Any] | None:
    """Like ``all_gather``, on the main process only; ``None`` on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, group=_joined.objects)
    return values


def broadcast(value: Any) -> Any:
    """The main process's value, on every process; the values of the others are ignored."""
    if world_size() == 1:
        return value
    values = [value if is_main() else None]
    dist.broadcast_object_list(values, group=_joined.objects)
    return values[0]


def on_main(compute: Callable[[], T]) -> T:
    """Compute on the main process while the others wait; every process gets the result.

    Args:
        compute: called on the main process only; returns something picklable.

    Raises:
        PeerError: on the other processes, if it fails with an error that the user cannot fix. A
            user's error is raised on all processes.
    """
    if world_size() == 1:
        return compute()
    value: Any = None
    error: Exception | None = None
    if is_main():
        try:
            value = compute()
        except Exception as caught:
            error = caught
    value, for_peers = broadcast((value, None if error is None else _for_peers(error)))
    if failure := error or for_peers:
        raise failure
    return value


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process counts as the only one, and nothing is exchanged."""
    _joined.alone = True
    try:
        yield
    finally:
        _joined.alone = False


def mean_over_processes(vector: Tensor) -> Tensor:
    """The mean over processes, on every process.

    Args:
        vector: float ``[N]`` on the training device, with the same N everywhere; unchanged.
    """
    if world_size() == 1:
        return vector
    total = vector.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def wrap(detector: nn.Module) -> nn.Module:
    """Wrap the detector in ``DistributedDataParallel`` if there are several processes.

    All processes start from the main one's weights. Buffers are not kept in step, see
    :func:`synchronise_buffers`.

    Args:
        detector: on the training device. Every trained parameter needs a gradient in every
            iteration, if only of zeros.
    """
    if world_size() == 1:
        return detector
    device = next(detector.parameters()).device
    # Newer versions of torch renamed it.
    arguments = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
    without_syncing: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        detector,
        device_ids=[device.index] if device.type == "cuda" else None,
        # No second copy of the gradients; those of our convolutions on CPUs have other strides.
        gradient_as_bucket_view=device.type == "cuda",
        **without_syncing,
    )


def synchronise_buffers(detector: nn.Module) -> None:
    """Copy the main process's buffers to all others.

    Call it before an evaluation: the statistics of batch norms differ between processes.
    """
    if world_size() > 1:
        for buffer in detector.buffers():
            dist.broadcast(buffer, src=0)


def launch(
    main: Callable[..., int],
    args: tuple[Any, ...],
    *,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device_type: str,
) -> int:
    """Call ``main(*args)`` in every process of a group.

    A single process just calls it. Under torchrun the processes exist already, and its environment
    replaces the numbers given here. Otherwise torch's elastic launcher starts them, and stops them
    if one dies.

    Args:
        main: at the top level of a module; returns an exit status, the same in every process.
        args: picklable.
        num_processes: on each machine.
        num_machines: all run the same command.
        machine_rank: from 0.
        dist_url: ``tcp://host:port`` of machine 0, or ``auto`` for a free port on a single machine.
        device_type: ``cuda`` gives each process a GPU of its own; else ``cpu``.

    Returns:
        The exit status, see :func:`cascade_det.parallel.processes.run_processes`.

    Raises:
        ConfigError: the arguments contradict each other or the machine, or the machines do not
            meet at the URL.
        CascadeDetError, FloatingPointError: raised by ``main``.
    """
    if under_torchrun():
        return _run_under_torchrun(main, args, device_type)
    total = planned_world_size(num_processes, num_machines)
    host, port = _address(num_machines, machine_rank, dist_url)
    if total == 1:
        return main(*args)
    _check_devices(num_processes, device_type)
    threads = None
    if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = max(torch.get_num_threads() // num_processes, 1)
    return run_processes(
        _run_started,
        (device_type, threads, main, args),
        num_processes,
        num_machines=num_machines,
        machine_rank=machine_rank,
        host=host,
        port=port,
    )


def _run_started(
    index: int,
    device_type: str,
    threads: int | None,
    main: Callable[..., int],
    args: tuple[Any, ...],
) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    rendezvous = _torchruns_rendezvous()
    for name in _TORCHRUN:  # the user did not call torchrun
        del os.environ[name]
    return _run_in_group(main, args, index, device_type, **rendezvous)


def _run_under_torchrun(main: Callable[..., int], args: tuple[Any, ...], device_type: str) -> int:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return main(*args)
    index = int(os.environ["LOCAL_RANK"])
    _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", index + 1)), device_type)
    return _run_in_group(main, args, index, device_type, **_torchruns_rendezvous())


def _torchruns_rendezvous() -> dict[str, Any]:
    """Store, rank and number of processes under torchrun, after a restart too.

    torchrun keeps one store for all starts, and the addresses of processes that are gone stay in
    it. Each start gets keys of its own; not on several machines, which may count differently.
    """
    store, rank, processes = next(meet("env://", timeout=_CONNECTION_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start_{start}", store)
    return {"store": store, "rank": rank, "world_size": processes}


def _run_in_group(
    main: Callable[..., int], args: tuple[Any, ...], index: int, device_type: str, **rendezvous: Any
) -> int:
    """Join the group, call ``main`` and leave; after an error, without waiting for the others."""
    backend = "gloo"
    if device_type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(index)
        # Otherwise NCCL guesses the GPU at the first collective call.
        rendezvous["device_id"] = torch.device("cuda", index)
    dist.init_process_group(backend, timeout=_TENSOR_TIMEOUT, **rendezvous)
    _joined.local_rank = index
    _joined.objects = dist.new_group(backend="gloo", timeout=_OBJECT_TIMEOUT)
    status = main(*args)
    # The first to leave would break the connections of the others.
    dist.barrier(group=_joined.objects)
    dist.destroy_process_group()
    _joined.local_rank, _joined.objects = 0, None
    return status


def _address(num_machines: int, machine_rank: int, dist_url: str) -> tuple[str, int]:
    """Host and port of the rendezvous; port 0 is any free one of this machine."""
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"--machine-rank is {machine_rank}, but --num-machines is {num_machines}: number the "
            f"machines from 0 to {num_machines - 1}"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ConfigError(
                f"--dist-url is auto, but --num-machines is {num_machines}: give every machine "
                "the address of machine 0 and a free port of it, such as tcp://10.0.0.1:29500"
            )
        return "127.0.0.1", 0
    with suppress(ValueError):
        url = urlsplit(dist_url)
        if url.scheme == "tcp" and url.hostname and url.port:
            return url.hostname, url.port
    raise ConfigError(
        f"--dist-url is {dist_url!r}: give tcp://host:port, or auto for a single machine"
    )


def _check_devices(num_processes: int, device_type: str) -> None:
    if device_type == "cuda" and torch.cuda.device_count() < num_processes:
        raise ConfigError(
            f"{num_processes} processes need as many GPUs, but this machine has "
            f"{torch.cuda.device_count()}: lower --num-gpus, or set MODEL.DEVICE cpu"
        )


def under_torchrun() -> bool:
    """Whether torchrun has started this process, by its environment."""
    return all(name in os.environ for name in _TORCHRUN)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and not _joined.alone


def _for_peers(error: Exception) -> Exception:
    if isinstance(error, USER_ERRORS):
        return portable(error)
    return PeerError(f"the main process failed: {type(error).__name__}: {error}")
