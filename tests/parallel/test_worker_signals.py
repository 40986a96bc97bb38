"""Workers of a loader outlive signals to their group, and never the process that they work for."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from torch.utils.data._utils import worker as torch_worker

from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_test_loader, build_train_loader
from cascade_det.parallel import signals
from cascade_det.parallel.signals import obey_main_process

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def dataset(coco):
    images = [coco.image(number, 40, 30) for number in range(1, 9)]
    source = coco.write(images, [coco.box(n, n, (2, 3, n + 5, 9)) for n in range(1, 9)])
    coco.draw(source, images)
    return load_dataset(source)


def make_loader(dataset, kind="train"):
    arguments = {"max_size": 60, "image_format": "BGR", "images_per_batch": 1, "num_workers": 2}
    if kind == "test":
        return build_test_loader(dataset, min_sizes=(15,), **arguments)
    return build_train_loader(
        [dataset],
        min_sizes=(15,),
        sampling="choice",
        flip="none",
        aspect_ratio_grouping=False,
        filter_empty=True,
        seed=1,
        **arguments,
    )


@pytest.fixture
def own_workers():
    """Gives the workers that this test has started; those of others may still be ending."""
    before = set(multiprocessing.active_children())
    return lambda: [w for w in multiprocessing.active_children() if w not in before]


def are_gone(pids):
    return all(not os.path.exists(f"/proc/{pid}") or is_zombie(pid) for pid in pids)


def is_zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["train", "test"])
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1"])
def test_batches_go_on_after_a_signal_to_all(dataset, own_workers, kind, name):
    batches = iter(make_loader(dataset, kind))
    seen = [next(batches)]
    workers = own_workers()
    assert len(workers) == 2
    # From another process, and before or after the second worker is up.
    subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    seen += itertools.islice(batches, 7)
    assert len(seen) == 8
    assert len(list(batches)) == 0 if kind == "test" else next(batches)


def test_a_signal_at_birth_ends_no_worker(dataset, monkeypatch):
    start = multiprocessing.Process.start

    def start_under_fire(process):
        start(process)
        subprocess.run(["kill", "-TERM", str(process.pid)], check=True)

    monkeypatch.setattr(multiprocessing.Process, "start", start_under_fire)
    assert len(list(make_loader(dataset, "test"))) == 8


def test_workers_end_with_their_loader(dataset, own_workers):
    batches = iter(make_loader(dataset))
    next(batches)
    pids = [worker.pid for worker in own_workers()]
    del batches
    wait_until(lambda: are_gone(pids))


def work(dataset, pids, how):
    torch_worker.MP_STATUS_CHECK_INTERVAL = 0.1  # seconds between two looks for the parent
    global batches  # alive at the exit, as after an error
    batches = iter(make_loader(dataset))
    list(itertools.islice(batches, 2))  # one of each: both know by now whose end to look for
    pids.put([worker.pid for worker in multiprocessing.active_children()])
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_workers_end_with_their_process(dataset, how):
    pids = FORK.SimpleQueue()
    process = FORK.Process(target=work, args=(dataset, pids, how))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if how == "killed" else 0)
    workers = pids.get()
    assert len(workers) == 2
    wait_until(lambda: are_gone(workers))


def be_born_late(folder):
    (folder / "pid").write_text(str(os.getpid()))
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    obey_main_process()
    (folder / "at_work").touch()


def start_and_die(folder):
    FORK.Process(target=be_born_late, args=(folder,)).start()
    wait_until((folder / "pid").exists)
    os.kill(os.getpid(), signal.SIGKILL)


def work_on(folder):
    obey_main_process()
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(120)


def leave_at_work(folder):
    signals._LOOK = 0.1
    FORK.Process(target=work_on, args=(folder,)).start()
    wait_until((folder / "pid").exists)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_whose_process_dies_ends_without_pytorchs_watch(tmp_path):
    """As one whose process dies before PyTorch looks for its parent."""
    process = FORK.Process(target=leave_at_work, args=(tmp_path,))
    process.start()
    process.join(60)
    wait_until(lambda: are_gone([int((tmp_path / "pid").read_text())]))


def test_a_worker_whose_process_is_gone_already_ends(tmp_path):
    process = FORK.Process(target=start_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    wait_until(lambda: are_gone([int((tmp_path / "pid").read_text())]))
    assert not (tmp_path / "at_work").exists()
