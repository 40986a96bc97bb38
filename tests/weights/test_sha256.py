"""What tells weights from others: their names, shapes, types and values, and nothing else."""

import hashlib

import pytest
import torch

from cascade_det.weights import read_weights_file, sha256_of, weights_sha256

STATE = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.steps": torch.tensor(7),
    "c.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


@pytest.fixture
def digest(tmp_path):
    def make(state, **others):
        torch.save({"model": state, **others}, tmp_path / "w.pth")
        return weights_sha256(read_weights_file(tmp_path / "w.pth").weights)

    return make


def test_it_can_be_computed_by_hand(digest):
    expected = hashlib.sha256()
    expected.update(b"a.steps [] torch.int64\n" + (7).to_bytes(8, "little"))
    expected.update(b"b.weight [2, 3] torch.float32\n" + STATE["b.weight"].numpy().tobytes())
    # 1.5 and -2 in bfloat16: the upper half of 0x3FC00000 and 0xC0000000.
    expected.update(b"c.half [2] torch.bfloat16\n" + bytes.fromhex("c03f00c0"))
    assert digest(STATE) == expected.hexdigest()


def test_order_layout_and_the_rest_of_the_file_do_not_count(digest):
    wanted = digest(STATE)
    assert digest(dict(reversed(STATE.items())), iteration=9, run={"seed": 1}) == wanted
    transposed = STATE["b.weight"].t().contiguous().t()
    assert not transposed.is_contiguous()
    assert digest({**STATE, "b.weight": transposed}) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"b.weight": STATE["b.weight"] + 1e-6},
        {"b.weight": STATE["b.weight"].view(3, 2)},
        {"b.weight": STATE["b.weight"].double()},
        {"d.new": torch.zeros(1)},
    ],
)
def test_everything_else_does(digest, change):
    assert digest({**STATE, **change}) != digest(STATE)


def test_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
