import os
from pathlib import Path

import pytest
import torch
from torch import nn

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_round_trip(tmp_path):
    source = nn.Linear(3, 2)
    Checkpointer(source, tmp_path, counter=Counter(7)).save("model_0000004", iteration=4)
    assert files(tmp_path) == ["last_checkpoint", "model_0000004.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"

    target, counter = nn.Linear(3, 2), Counter()
    checkpointer = Checkpointer(target, tmp_path, counter=counter)
    checkpointer.resume_or_load("/not/looked/at.pth", resume=True)
    assert checkpointer.start_iter == 5
    assert counter.value == 7
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor, rtol=0, atol=0)


def test_object_that_is_added_after_the_resume_gets_its_state(tmp_path):
    Checkpointer(nn.Linear(1, 1), tmp_path, counter=Counter(7)).save("m", iteration=0)
    checkpointer = Checkpointer(nn.Linear(1, 1), tmp_path)
    checkpointer.resume_or_load("")
    counter = Counter()
    checkpointer.add_checkpointable("counter", counter)
    assert counter.value == 7


def test_start_with_weights_takes_no_iteration_from_them(tmp_path):
    source = nn.Linear(3, 2)
    Checkpointer(source, tmp_path, counter=Counter(7)).save("model_final", iteration=99)
    target, counter = nn.Linear(3, 2), Counter(1)
    checkpointer = Checkpointer(target, tmp_path / "new", counter=counter)
    checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert checkpointer.start_iter == 0
    assert counter.value == 1
    torch.testing.assert_close(target.weight, source.weight, rtol=0, atol=0)


def test_start_without_weights(tmp_path):
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    checkpointer = Checkpointer(model, tmp_path)
    assert checkpointer.resume_or_load("", resume=False) == {}
    assert checkpointer.start_iter == 0
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)


def break_torch_save(monkeypatch):
    def save(data, file):
        file.write_bytes(b"half of a checkp")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", save)


def break_replace(monkeypatch):
    def replace(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)


def break_fsync(monkeypatch):
    def fsync(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("break_it", [break_torch_save, break_replace, break_fsync])
@pytest.mark.parametrize("name", ["same", "other"])
def test_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, break_it, name):
    model = nn.Linear(2, 2)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    checkpointer = Checkpointer(model, tmp_path)
    checkpointer.save("same", iteration=1)
    before = files(tmp_path)
    nn.init.ones_(model.weight)
    with monkeypatch.context() as patched:
        break_it(patched)
        with pytest.raises(CheckpointError, match=r"disk full.*--resume, from.*same\.pth"):
            checkpointer.save(name, iteration=2)
    assert files(tmp_path) == before
    checkpointer.resume_or_load("")
    assert checkpointer.start_iter == 2
    for key, tensor in old.items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0)


def test_saving_can_be_switched_off(tmp_path):
    Checkpointer(nn.Linear(1, 1), tmp_path, save_to_disk=False).save("a")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (nn.Linear(2, 3), r"weight is \(2, 2\) in the file, \(3, 2\) in the model"),
        (nn.Linear(2, 2, bias=False), "bias is only in the file"),
        (
            nn.Sequential(nn.Linear(2, 2)),
            "0.weight is only in the model; .*weight is only in the file",
        ),
    ],
)
def test_resuming_another_model_is_an_error(tmp_path, model, wanted):
    Checkpointer(nn.Linear(2, 2), tmp_path).save("a")
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{wanted}"):
        Checkpointer(model, tmp_path).resume_or_load("")


@pytest.mark.parametrize(
    ("files_there", "wanted"), [((), "no checkpoint"), (("a.pth",), r"only a\.pth without last_ch")]
)
def test_nothing_to_resume_is_an_error(tmp_path, files_there, wanted):
    for name in files_there:
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"--resume: .*{wanted}"):
        Checkpointer(nn.Linear(1, 1), tmp_path).resume_or_load("weights.pth")


def test_weights_that_are_no_checkpoint_cannot_be_resumed(tmp_path):
    model = nn.Linear(1, 1)
    Checkpointer(model, tmp_path).save("a")
    with pytest.raises(CheckpointError, match=r"a\.pth.*'iteration' is None.*MODEL\.WEIGHTS"):
        Checkpointer(model, tmp_path).resume_or_load("")


@pytest.mark.parametrize("name", [b"", b"../a.pth", b"/etc/a.pth", b"..", b"a\0.pth", b"\xff\xfe"])
def test_last_checkpoint_leads_nowhere_else(tmp_path, name):
    folder = tmp_path / "run"
    Checkpointer(nn.Linear(1, 1), tmp_path).save("a", iteration=0)
    folder.mkdir()
    (folder / "last_checkpoint").write_bytes(name)
    with pytest.raises(CheckpointError, match=r"last_checkpoint: holds no name"):
        Checkpointer(nn.Linear(1, 1), folder).resume_or_load("")


def test_best_weights_do_not_take_over_the_last_checkpoint(tmp_path):
    model = nn.Linear(1, 1)
    checkpointer = Checkpointer(model, tmp_path, run=Counter(3), trainer=Counter(4))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save_weights("model_best", iteration=2, metric={"bbox/AP": 1.5})
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best.keys() == {"model", "run", "iteration", "metric"}
    assert best["run"] == {"value": 3}


def test_last_checkpoint_that_is_gone(tmp_path):
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    with pytest.raises(CheckpointError, match=r"gone\.pth.*last_checkpoint"):
        Checkpointer(nn.Linear(1, 1), tmp_path).resume_or_load("")
