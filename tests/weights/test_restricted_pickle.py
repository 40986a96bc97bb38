import builtins
import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cascade_det.errors import CheckpointError
from cascade_det.weights.restricted_pickle import read_array_pickle

DTYPES = ["f2", "f4", "f8", "i1", "i8", "u1", "u4", "b1", "c8", ">f4", ">i2"]


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_protocol_come_back(tmp_path, protocol, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    content = {
        "model": {
            "plain": array,
            "fortran": np.asfortranarray(array),
            "view": array[:, ::2],
            "scalar": array[1, 2, 3],
            "no_dimension": np.array(array[0, 0, 1]),
        },
        "__author__": "somebody",
        "values": [1, 2.5, None, True, b"bytes", ("a", "b")],
    }
    if protocol >= 3:  # before that, empty bytes are written as a call of builtins.bytes
        content["model"]["empty"] = array[:0]
    found = read_array_pickle(write(tmp_path / "a.pkl", content, protocol))
    for name, expected in content["model"].items():
        value = found["model"][name]
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.dtype(dtype).newbyteorder("=")
        assert value.shape == np.shape(expected)
        np.testing.assert_array_equal(value, expected)
    assert found["__author__"] == "somebody"
    assert found["values"] == [1, 2.5, None, True, b"bytes", ["a", "b"]]


@settings(max_examples=50)
@given(
    array=hnp.arrays(st.sampled_from([np.float32, np.int16]), hnp.array_shapes()),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_array_comes_back(tmp_path_factory, array, protocol):
    path = write(tmp_path_factory.mktemp("p") / "a.pkl", {"a": array}, protocol)
    np.testing.assert_array_equal(read_array_pickle(path)["a"], array)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_both_spellings_of_numpy_are_read(tmp_path, protocol):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = pickle.dumps({"a": array, "s": np.float64(2)}, protocol=protocol)
    new, old = b"numpy._core.", b"numpy.core."
    path = tmp_path / "a.pkl"
    if protocol < 4:  # names end in a newline there, so a shorter one needs no other change
        other = raw.replace(new, old) if new in raw else raw.replace(old, new)
        assert other != raw
    else:  # names have their length in front
        other = raw
        for name in (b"multiarray", b"numeric"):
            for a, b in ((new + name, old + name), (old + name, new + name)):
                if bytes([len(a)]) + a in raw:
                    other = other.replace(bytes([len(a)]) + a, bytes([len(b)]) + b)
        # The frame's length no longer fits: leave the frame out.
        other = other[:2] + other[11:]
    path.write_bytes(other)
    found = read_array_pickle(path)
    np.testing.assert_array_equal(found["a"], array)
    assert found["s"] == 2


def test_python_2_pickle_is_read(tmp_path):
    # What cPickle of Python 2 wrote for {"w": np.array([1, 2], "<f4")} with protocol 2: byte
    # strings (opcode U) where Python 3 writes unicode and bytes.
    raw = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbs."
    )
    pickletools.dis(raw, out=(tmp_path / "listing").open("w"))  # it is a whole pickle
    path = tmp_path / "a.pkl"
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_array_pickle(path)["w"], np.array([1, 2], np.float32))


class Calls:
    """Pickles into a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "name", ["system", "eval", "exec", "open", "getattr", "OrderedDict", "fromfile", "load"]
)
def test_every_other_global_is_refused_and_nothing_runs(tmp_path, protocol, nested, name):
    victim = tmp_path / "victim"
    calls = {
        "system": (Calls(os.system, f"touch {victim}"), f"{os.name}.system"),
        "eval": (Calls(eval, f"open({str(victim)!r}, 'w')"), "builtins.eval"),
        "exec": (Calls(exec, f"open({str(victim)!r}, 'w')"), "builtins.exec"),
        "open": (Calls(open, str(victim), "w"), "open"),
        "getattr": (Calls(getattr, "a", "upper"), "builtins.getattr"),
        "OrderedDict": (OrderedDict(a=1), "collections.OrderedDict"),
        "fromfile": (Calls(np.fromfile, str(tmp_path)), "fromfile"),
        "load": (Calls(np.load, str(tmp_path)), "numpy.load"),
    }
    evil, refused = calls[name]
    content = {"model": {"w": np.zeros(2), "x": [evil]}} if nested else evil
    path = write(tmp_path / "evil.pkl", content, protocol)
    refused = refused.replace("builtins", "__builtin__") if protocol < 3 else refused
    with pytest.raises(CheckpointError) as caught:
        read_array_pickle(path)
    assert str(path) in str(caught.value)
    assert refused in str(caught.value)
    assert not victim.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cposix\nsystem\n(S'touch VICTIM'\ntR.",
        b"(S'touch VICTIM'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch VICTIM'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch VICTIM\x85R.",
        b'c__builtin__\neval\n(S\'open("VICTIM","w")\'\ntR.',
        b'cbuiltins\neval\n(S\'open("VICTIM","w")\'\ntR.',
        # Attributes of what is admitted are not admitted.
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x04\x8c\x07_codecs\x8c\x06lookup\x93.",
        # A codec that is not latin1.
        b"c_codecs\nencode\n(VVICTIM\nVpunycode\ntR.",
        # Objects are no numbers: a buffer of "pointers" must not become an array of objects.
        b"cnumpy\nndarray\n(I1\ncnumpy\ndtype\n(S'O8'\nI0\nI1\ntRS'AAAAAAAA'\ntR.",
        # Sizes that contradict each other.
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I9\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntRI00\nS'abcd'\ntb.",
    ],
)
def test_hand_written_pickles_are_refused(tmp_path, opcodes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(opcodes)
    with pytest.raises(CheckpointError, match=r"evil\.pkl"):
        read_array_pickle(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pkl"]


def test_pickle_cannot_change_the_reader(tmp_path):
    # BUILD with (None, {name: value}) sets attributes on whatever lies on the stack.
    for target in (b"c_codecs\nencode\n", b"cnumpy.core.multiarray\nscalar\n"):
        path = tmp_path / "evil.pkl"
        path.write_bytes(target + b"(N(dS'__defaults__'\n(S'x'\ntstb.")
        with pytest.raises(CheckpointError):
            read_array_pickle(path)
    good = write(tmp_path / "good.pkl", {"a": np.arange(3)})
    np.testing.assert_array_equal(read_array_pickle(good)["a"], np.arange(3))


@settings(max_examples=100)
@given(junk=st.binary(max_size=60))
def test_junk_never_ends_in_another_error(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "junk.pkl"
    path.write_bytes(junk)
    before = set(vars(builtins))
    try:
        read_array_pickle(path)
    except CheckpointError as error:
        assert "junk.pkl" in str(error)  # noqa: PT017 - some junk is a fine pickle
    assert set(vars(builtins)) == before
