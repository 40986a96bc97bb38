"""Two processes against one: gradients, metrics, and the end of one of them."""

import json
import multiprocessing
import socket

import pytest
import torch

from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed
from make_shapes import make_dataset
from tests.reference import launched, shared_work


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_dataset(folder, train=1, val=7, width=128, height=96)
    return json.loads((folder / "val.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory, ground_truth):
    """What two processes found, each of them on a machine of its own."""
    folder = tmp_path_factory.mktemp("found")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    arguments = {"num_processes": 1, "num_machines": 2, "dist_url": url, "device_type": "cpu"}
    other = multiprocessing.get_context("spawn").Process(
        target=distributed.launch,
        args=(launched.work_together, (folder, ground_truth)),
        kwargs={**arguments, "machine_rank": 1},
    )
    other.start()
    status = distributed.launch(launched.work_together, (folder, ground_truth), **arguments)
    other.join()
    assert (status, other.exitcode) == (0, 0)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_places_and_collectives(found):
    assert [f["places"] for f in found] == [(0, 2, True), (1, 2, False)]
    for one in found:
        assert one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["broadcast"] == "from 0"
        assert one["mean"].tolist() == [0.5, 4.0]
        assert one["on main"] == "computed by 0"
    assert [f["gathered on main"] for f in found] == [[0, 1], None]


def test_buffers_are_those_of_the_main_process(found):
    first, second = (f["buffers"] for f in found)
    assert first["running_mean"].mean().abs() < 0.07  # of noise around 0; the other's is around 1
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_dynamic_targets_are_the_same_on_all_processes(found):
    # 0.5 is the mean of the processes' 0.4 and 0.6, and 0.7 is that of the one with objects.
    thresholds = [[ious[0] for ious, _ in one["dynamic targets"]] for one in found]
    assert thresholds == [pytest.approx([0.1, (0.5 + 0.7) / 2])] * 2
    for (_, first), (_, second) in zip(*(f["dynamic targets"] for f in found), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_labels_are_counted_over_all_processes(found):
    assert [f["counts"].tolist() for f in found] == [[[3, 2]], [[3, 2]]]


def test_gradients_are_the_mean_of_those_of_the_halves(found):
    halves = []
    for rank in (0, 1):
        detector = shared_work.make_detector(seed=0)
        shared_work.backward(detector, shared_work.make_batch(rank, num_objects=2 + rank))
        halves.append(shared_work.gradients(detector))
    for one in found:
        assert one["gradients"].keys() == halves[0].keys()
        for name, gradient in one["gradients"].items():
            mean = (halves[0][name] + halves[1][name]) / 2
            assert (gradient - mean).norm() <= 1e-4 * mean.norm(), name
            # Not trivially so: the halves differ.
            assert (halves[0][name] - mean).norm() > 1e-2 * mean.norm(), name


def test_a_level_that_nothing_reads_waits_for_no_gradient(found):
    names = found[0]["gradients"]
    assert not any("fpn_output2" in name or "fpn_lateral2" in name for name in names)
    assert any("fpn_lateral3" in name for name in names)


def test_stages_without_regions_on_one_process(found):
    for losses in found[1]["losses without regions"]:
        assert all(value == 0 for name, value in losses.items() if "stage" in name)
    for losses in found[0]["losses without regions"]:
        assert all(value > 0 for value in losses.values())
    assert all(f["finite"] for f in found)


@pytest.mark.parametrize(("key", "count"), [("metrics", 7), ("metrics of one image", 1)])
def test_metrics_are_those_of_one_process(found, ground_truth, key, count):
    image_ids = [image["id"] for image in ground_truth["images"]][:count]
    alone = shared_work.evaluate_share(ground_truth, image_ids, (0, 1))
    assert 1 < alone["bbox"]["AP"] < 99
    del alone["latency"]
    for one in found:
        del one[key]["latency"]
        # As text, where NaN is NaN.
        assert json.dumps(one[key], sort_keys=True) == json.dumps(alone, sort_keys=True)


def test_an_evaluation_that_fails_on_the_main_process_fails_on_all(found):
    assert found[0]["failure"] == "ZeroDivisionError: no metrics"
    assert found[1]["failure"].startswith("PeerError: ")
    assert "no metrics" in found[1]["failure"]


def test_a_process_killed_in_training_ends_the_launch(tmp_path, caplog):
    status = distributed.launch(
        launched.die_in_training, (tmp_path,), num_processes=2, device_type="cpu"
    )
    assert status != 0
    assert "rank 1" in caplog.text
    assert "SIGKILL" in caplog.text
    assert not (tmp_path / "rank0_step2").exists()


def test_one_process_is_a_call():
    calls = []
    status = distributed.launch(
        lambda word: calls.append(word) or 5, ("here",), num_processes=1, device_type="cpu"
    )
    assert (status, calls) == (5, ["here"])
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.all_gather(3) == distributed.gather(3) == [3]
    module = torch.nn.Linear(1, 1)
    assert distributed.wrap(module) is module


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_processes": 0}, ["--num-gpus is 0"]),
        ({"num_machines": 2, "machine_rank": 2}, ["--machine-rank is 2", "0 to 1"]),
        ({"machine_rank": -1}, ["--machine-rank is -1"]),
        ({"num_machines": 2}, ["--dist-url", "auto", "tcp://"]),
        ({"dist_url": "file:///tmp/x"}, ["file:///tmp/x", "tcp://"]),
        ({"dist_url": "tcp://host"}, ["tcp://host", "port"]),
        ({"dist_url": "tcp://host:seven"}, ["tcp://host:seven", "port"]),
        ({"num_processes": 1000, "device_type": "cuda"}, ["1000", "GPUs", "--num-gpus"]),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(ConfigError) as caught:
        distributed.launch(print, (), **{"num_processes": 2, "device_type": "cpu", **arguments})
    assert all(word in str(caught.value) for word in words)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=url):
            distributed.launch(print, (), num_processes=2, dist_url=url, device_type="cpu")


@pytest.mark.parametrize(
    ("device_type", "given"), [("cpu", ("gloo", None)), ("cuda", ("nccl", torch.device("cuda", 1)))]
)
def test_nccl_is_told_the_gpu_of_the_process(monkeypatch, device_type, given):
    joined = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name in ("new_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, *, timeout, device_id=None: joined.append((backend, device_id)),
    )
    assert distributed._run_in_group(lambda: 0, (), 1, device_type) == 0
    assert joined == [given]


def test_processes_agree_on_the_batch_that_fits_all(tmp_path):
    assert (
        distributed.launch(launched.find_batch, (tmp_path,), num_processes=2, device_type="cpu")
        == 0
    )
    for rank in (0, 1):
        found, error = (tmp_path / f"rank{rank}").read_text().split(" ", 1)
        assert found == "8"  # 4 images of each
        assert "SOLVER.IMS_PER_BATCH is 0" in error
        assert "MODEL.FPN.NORM" in error
