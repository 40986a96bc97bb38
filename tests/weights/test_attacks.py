"""Files of weights that were made to harm: an error that names the file, and nothing executed."""

import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError
from cascade_det.weights import load_weights, read_weights_file


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def victim(tmp_path):
    """A file that exists if anything was executed."""
    path = tmp_path / "victim"
    yield path
    assert not path.exists()


def payloads(victim):
    command = f"touch {victim}"
    return {
        "system": Calls(os.system, command),
        "Popen": Calls(subprocess.Popen, ["touch", str(victim)]),
        "exec": Calls(exec, f"open({str(victim)!r}, 'w')"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "load": Calls(torch.load, str(victim)),
        "FileHandler": Calls(__import__("logging").FileHandler, str(victim)),
        "memmap": Calls(np.memmap, str(victim), "u1", "w+", 0, 10),
    }


def archive(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def entries_of(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's, of what it refuses in the end

PAYLOADS = ["system", "Popen", "exec", "getattr", "load", "FileHandler", "memmap"]
PLACES = ["value", "key", "in a list", "beside the model"]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "zoo"])
def test_calls_in_every_form_of_file(tmp_path, victim, form, payload):
    evil = {"model": {"w": torch.ones(1), "x": payloads(victim)[payload]}}
    path = tmp_path / ("evil.pkl" if form == "zoo" else "evil.pth")
    if form in ("zip", "legacy"):
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    else:
        evil["model"]["w"] = np.ones(1) if form == "zoo" else 1
        path.write_bytes(pickle.dumps(evil, protocol=2))
    for read in (read_weights_file, lambda path: load_weights(nn.Linear(1, 1), path)):
        with pytest.raises(CheckpointError, match=rf"evil.*: refused.*{payload}") as caught:
            read(path)
        # No advice to switch the protection off.
        assert "weights_only" not in str(caught.value)
        assert "safe_globals" not in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_calls_in_every_place(tmp_path, victim, place):
    evil = payloads(victim)["system"]
    model = {"w": torch.ones(1)}
    content = {
        "value": {"model": {**model, "x": evil}},
        "key": {"model": {**model, evil: 1}},
        "in a list": {"model": model, "a": [[{"b": (evil,)}]]},
        "beside the model": {"model": model, "trainer": evil},
    }[place]
    path = tmp_path / "evil.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused.*system"):
        read_weights_file(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_calls_in_a_checkpoint_that_is_resumed(tmp_path, victim, legacy):
    model = nn.Linear(1, 1)
    content = {"model": model.state_dict(), "trainer": payloads(victim)["system"], "iteration": 3}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "last_checkpoint").write_text("a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: refused.*system"):
        Checkpointer(model, tmp_path).resume_or_load("", resume=True)


def test_calls_in_other_entries_of_the_archive(tmp_path, victim):
    """Only what data.pkl leads to is read, and that as numbers."""
    evil = pickle.dumps(payloads(victim)["system"])
    good = tmp_path / "good.pth"
    torch.save({"w": torch.ones(len(evil), dtype=torch.uint8)}, good)
    entries = entries_of(good)
    more = {"good/constants.pkl": evil, "good/code/__torch__.py": "import os", "extra.pkl": evil}
    for added in ({"good/data/0": evil}, {"good/extra.pkl": evil}, more):
        archive(tmp_path / "a.pth", {**entries, **added})
        try:
            weights = read_weights_file(tmp_path / "a.pth").weights
        except CheckpointError as error:
            assert "a.pth" in str(error)  # noqa: PT017 - TorchScript is refused as a whole
        else:
            expected = added.get("good/data/0", b"\1" * len(evil))
            assert bytes(weights["w"].tolist()) == expected


def test_an_archive_behind_a_pickle(tmp_path, victim):
    """One reader could see the harmless end, another the beginning."""
    good = tmp_path / "good.pth"
    torch.save({"w": torch.ones(1)}, good)
    path = tmp_path / "both.pth"
    path.write_bytes(pickle.dumps(payloads(victim)["system"]) + good.read_bytes())
    with pytest.raises(CheckpointError, match=r"both\.pth"):
        read_weights_file(path)


def test_the_oldest_format_is_refused(tmp_path, victim):
    """A tar file, from which PyTorch would unpack names."""
    path = tmp_path / "old.pth"
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle", "../victim"):
            content = pickle.dumps(payloads(victim)["system"])
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(CheckpointError, match=r"old\.pth"):
        read_weights_file(path)


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pth"
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(path)
    with pytest.raises(CheckpointError, match=r"script\.pth"):
        read_weights_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_a_wrong_suffix_executes_nothing(tmp_path, victim, suffix):
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps(payloads(victim)["system"], protocol=2))
    with pytest.raises(CheckpointError, match="evil"):
        read_weights_file(path)


def test_compressed_bombs_are_refused_unread(tmp_path):
    torch.save({"w": torch.zeros(3_000_000)}, tmp_path / "a.pth")
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries_of(tmp_path / "a.pth").items():
            file.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"bomb\.pth: refused.*would unpack to 12,\d+,\d+"):
        read_weights_file(path)


def claiming(path, *, legacy, places):
    """A checkpoint of 4 numbers that says 2 billion: of the storage, of the tensor or of both."""
    torch.save({"w": torch.arange(4.0)}, path, _use_new_zipfile_serialization=not legacy)
    entries = {"": path.read_bytes()} if legacy else entries_of(path)
    many = b"J" + struct.pack("<i", 2_000_000_000)
    for name, content in entries.items():
        if legacy or name.endswith("data.pkl"):
            storage, tensor, rest = content.rsplit(b"K\x04", 2)
            parts = [storage, many if "storage" in places else b"K\x04", tensor]
            parts += [many if "tensor" in places else b"K\x04", rest]
            entries[name] = b"".join(parts)
    path.write_bytes(entries[""]) if legacy else archive(path, entries)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("places", [["storage"], ["tensor"], ["storage", "tensor"]])
def test_claims_beyond_the_file_are_not_believed(tmp_path, legacy, places):
    path = tmp_path / "claims.pth"
    claiming(path, legacy=legacy, places=places)
    try:
        weights = read_weights_file(path).weights
    except CheckpointError as refused:
        message = str(refused)
    else:
        # Some versions of PyTorch do not look at what the storage of a zip says of itself.
        assert (legacy, places) == (False, ["storage"])
        assert torch.equal(weights["w"], torch.arange(4.0))
        return
    assert "claims.pth" in message


def test_one_number_repeated_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"a\.pth: w claims to be \(1000000, 1000000\)"):
        read_weights_file(path)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, tensor, kind):
    torch.save({"weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth: weight is a tensor of kind .*{kind}"):
        load_weights(nn.Linear(1, 1), tmp_path / "a.pth")


def test_arrays_that_are_no_weights(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weight": np.ones(2, np.longdouble)}))
    with pytest.raises(CheckpointError, match=r"a\.pkl: weight is not a tensor of numbers"):
        load_weights(nn.Linear(1, 1), tmp_path / "a.pkl")


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p2000000000\n"])
def test_a_far_place_in_the_memo_takes_no_memory(tmp_path, opcode):
    # The unpickler would fill a table of twice as many places, 34 GB.
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}" + opcode + b".")
    with pytest.raises(CheckpointError, match=r"a\.pkl.*memo"):
        read_weights_file(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_what_refers_to_itself_often_is_read_once(tmp_path, kind):
    content = np.ones(1)
    for _ in range(100):  # 2 ** 100 arrays, each counted
        content = {"a": content, "b": content} if kind is dict else kind([content, content])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": np.ones(2), "more": content}))
    assert read_weights_file(tmp_path / "a.pkl").weights.keys() == {"w"}


def test_what_contains_itself(tmp_path):
    content = {"w": np.ones(2), "list": []}
    content["list"] += [content, content["list"]]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert read_weights_file(tmp_path / "a.pkl").weights.keys() == {"w"}


def test_deep_nesting(tmp_path):
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}U\x01wK\x01s" + b"]" * 100_000 + b"a" * 99_999 + b"."
    )
    with pytest.raises(CheckpointError, match=r"a\.pkl"):
        read_weights_file(tmp_path / "a.pkl")


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors"])
def test_files_that_may_not_be_read(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("the administrator may read everything")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(Permission denied\)"):
        read_weights_file(path)
