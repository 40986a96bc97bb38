"""Damaged files of weights: every outcome is success or CheckpointError, and nothing else."""

import io
import json
import math
import pickle
import pickletools
import zipfile
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError
from cascade_det.weights import load_weights

OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
NUMBERS = [b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x00\x00\x00\x80"]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def checkpoint():
    """What a run saves, in small."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    trainer = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()[:16], "best": 1.5}
    return {
        "model": model.state_dict(),
        "trainer": trainer,
        "iteration": 7,
        "run": {"names": ["a"]},
    }


@cache
def saved(*, is_zip=True):
    file = io.BytesIO()
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


@cache
def zoo(protocol):
    arrays = {name: value.numpy() for name, value in make_model().state_dict().items()}
    return pickle.dumps({"model": arrays, "__author__": "zoo", "scale": np.float32(2)}, protocol)


def rezipped(content, change):
    """The same archive with another ``data.pkl``, and right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return file.getvalue()


def safetensors(change=lambda header: header):
    """Written by hand: the length of the header, the header, the numbers."""
    header, data = {}, b""
    for name, value in make_model().state_dict().items():
        raw = value.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": place}
        data += raw
    text = change(json.dumps(header).encode())
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def mutations(draw):
    """A function that damages bytes in one to three places."""
    edit = st.tuples(
        st.sampled_from(["replace", "insert", "delete", "repeat", "truncate"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([*OPCODES, *NUMBERS]) | st.binary(min_size=1, max_size=8),
    )
    edits = draw(st.lists(edit, min_size=1, max_size=3))

    def change(content):
        for kind, place, extra in edits:
            start = math.floor(place * len(content))
            end = start + len(extra)
            content = {
                "replace": content[:start] + extra + content[end:],
                "insert": content[:start] + extra + content[start:],
                "delete": content[:start] + content[end:],
                "repeat": content[:end] + content[start:],
                "truncate": content[:start],
            }[kind]
        return content

    return change


FORMS = {
    "zip": ("a.pth", lambda change: change(saved())),
    "pickle in a zip": ("a.pth", lambda change: rezipped(saved(), change)),
    "legacy": ("a.pth", lambda change: change(saved(is_zip=False))),
    "zoo, protocol 2": ("a.pkl", lambda change: change(zoo(2))),
    "zoo, protocol 5": ("a.pkl", lambda change: change(zoo(5))),
    "safetensors": ("a.safetensors", lambda change: change(safetensors())),
    "header": ("a.safetensors", safetensors),
}


def load(form, change, folder):
    """What reading the damaged file ends in: a message, or "" where it still loads."""
    name, make = FORMS[form]
    path = folder / name
    path.write_bytes(make(change))
    loads = [lambda: load_weights(make_model(), path)]
    if path.suffix == ".pth":
        loads.append(lambda: resume(path))
    outcomes = []
    for attempt in loads:
        try:
            attempt()
        except CheckpointError as error:
            outcomes.append(str(error))
        else:
            outcomes.append("")
    assert all(not message or str(path) in message for message in outcomes)
    assert max(map(len, outcomes)) < 2000
    return outcomes


def resume(path):
    checkpointer = Checkpointer(make_model(), path.parent)
    checkpointer.tag_last_checkpoint(path.name)
    checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("form", FORMS)
def test_undamaged_files_load(tmp_path, form):
    if form in ("safetensors", "header"):
        pytest.importorskip("safetensors")
    assert not any(load(form, lambda content: content, tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(change=mutations())
def test_damaged_files_load_or_say_so(tmp_path_factory, form, change):
    load(form, change, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("state", [None, 3, "x", [], {}, {"state": 1}, torch.ones(2)], ids=repr)
def test_state_of_something_else_does_not_fit(tmp_path, state):
    model = make_model()
    content = {"model": model.state_dict(), "iteration": 3, "trainer": state}
    torch.save(content, tmp_path / "a.pth")
    (tmp_path / "last_checkpoint").write_text("a.pth")
    checkpointer = Checkpointer(model, tmp_path)
    checkpointer.resume_or_load("", resume=True)
    with pytest.raises(CheckpointError, match=r"a\.pth: its 'trainer' does not fit"):
        checkpointer.add_checkpointable("trainer", torch.optim.SGD(model.parameters()))


NAMES = st.lists(
    st.sampled_from([b"a.pth", b"..", b"/", b"\n", b"\0", b" ", b"x" * 300]), max_size=5
)


@settings(max_examples=60)
@given(content=st.binary(max_size=50) | NAMES.map(b"".join))
def test_any_last_checkpoint_is_resumed_or_named(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    (folder / "a.pth").write_bytes(saved())
    (folder / "last_checkpoint").write_bytes(content)
    checkpointer = Checkpointer(make_model(), folder)
    if content.decode(errors="replace").strip() == "a.pth":
        checkpointer.resume_or_load("", resume=True)
        assert checkpointer.start_iter == 8
    else:
        with pytest.raises(CheckpointError, match="last_checkpoint"):
            checkpointer.resume_or_load("", resume=True)


def test_a_folder_named_last_checkpoint(tmp_path):
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(CheckpointError, match="last_checkpoint: holds no name"):
        Checkpointer(make_model(), tmp_path).resume_or_load("", resume=True)
