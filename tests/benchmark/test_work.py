"""What parts compute and move, against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade_det.benchmark.work import PartCounter, Work

FLOAT = 4


def counted(parts):
    """The work of functions called in turn, each as a part with its name."""
    counter = PartCounter()
    with torch.no_grad():
        for name, call in parts.items():
            with counter.part(name):
                call()
    return counter.work()


def test_a_linear_layer_reads_weights_and_inputs():
    layer, x = nn.Linear(30, 20), torch.randn(7, 30)
    work = counted({"linear": lambda: layer(x)})["linear"]
    assert work == Work(multiply_adds=7 * 30 * 20, floats=30 * 20 + 20 + 7 * 30)
    assert work.bytes_moved(torch.float32) == FLOAT * work.floats
    assert work.bytes_moved(torch.bfloat16) == 2 * work.floats


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_multiplies_for_every_output(stride):
    conv = nn.Conv2d(4, 6, 3, stride=stride, padding=1, bias=False)
    x = torch.randn(2, 4, 10, 12)
    work = counted({"conv": lambda: conv(x)})["conv"]
    outputs = 2 * 6 * (10 // stride) * (12 // stride)
    assert work == Work(multiply_adds=outputs * 4 * 9, floats=6 * 4 * 9 + x.numel())


def test_only_what_crosses_a_border_is_moved():
    """The first passes on 5 x 8 numbers, and keeps the 5 x 9 before them."""
    first, second, third = nn.Linear(4, 9), nn.Linear(9, 8), nn.Linear(8, 3)
    x, handed = torch.randn(5, 4), []
    work = counted(
        {
            "one": lambda: handed.append(second(F.relu(first(x)))),
            "two": lambda: third(handed[0]),
        }
    )
    own = first.weight.numel() + 9 + second.weight.numel() + 8
    assert work["one"] == Work(5 * (4 * 9 + 9 * 8), floats=own + 5 * 4 + 5 * 8)
    assert work["two"] == Work(5 * 8 * 3, floats=8 * 3 + 3 + 5 * 8)


def test_a_second_read_and_views_count_nothing():
    x = torch.randn(6, 10)
    work = counted({"sum": lambda: x.view(60).sum() + x.sum(), "view": lambda: x[:3].flatten()})
    assert work["sum"] == Work(floats=60)
    assert work["view"] == Work()


def test_an_expanded_tensor_counts_its_storage():
    x = torch.randn(10, 1)
    assert counted({"sum": lambda: x.expand(10, 50).sum()})["sum"].floats == 10


def test_integers_are_counted_in_bytes():
    image, index = torch.zeros(3, 5, 5, dtype=torch.uint8), torch.arange(6)
    work = counted({"part": lambda: (image.float(), index + 1)})["part"]
    assert work == Work(other_bytes=75 + 6 * 8)


def test_embedding_bags_read_the_rows_of_their_index():
    table, index = torch.randn(1000, 16), torch.tensor([3, 5, 3, 9])
    offsets, weights = torch.tensor([0, 2]), torch.rand(4)

    def bags():
        F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights)

    work = counted({"bags": bags})["bags"]
    assert work == Work(4 * 16, floats=3 * 16 + 4, other_bytes=4 * 8 + 2 * 8)


def test_attention_multiplies_queries_by_keys_and_weights_by_values():
    q, k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4)
    work = counted({"attention": lambda: F.scaled_dot_product_attention(q, k, v)})["attention"]
    assert work.multiply_adds == 2 * 3 * 7 * 5 * (8 + 4)
    assert work.floats == q.numel() + k.numel() + v.numel()


def test_storages_at_reused_addresses_are_not_confused():
    """Each pass frees its tensors: the next one may reuse their addresses."""
    source = torch.randn(50_000)

    def passes():
        for _ in range(20):
            (source + 1).sum()

    made = []
    work = counted(
        {"one": passes, "two": lambda: made.append(source * 2), "three": lambda: made[0].sum()}
    )
    assert work["one"].floats == 50_000
    assert work["two"].floats == 2 * 50_000
    assert work["three"].floats == 50_000


def test_a_part_that_runs_twice_adds_up():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    counter = PartCounter()
    with torch.no_grad():
        for _ in range(2):
            with counter.part("part"):
                layer(x)
    assert counter.work() == {"part": Work(2 * 4 * 3 * 2, floats=3 * 2 + 2 + 4 * 3)}
