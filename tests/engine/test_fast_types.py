"""The types of parts that images choose: of a detector that computes what the test says."""

import copy
from types import SimpleNamespace

import pytest
import torch
from detection_rows import detections_of

from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.engine import fast_types
from cascade_det.engine.devices import describe_dtypes, weight_dtypes
from cascade_det.engine.fast_types import choose_types, resolve_types
from cascade_det.engine.part_types import INT8_PARTS, candidates

TRUNK, MAPS = ("stem", "backbone"), ("stem", "backbone", "fpn")
IMAGES = [[{}, {}], [{}]]
PER_IMAGE = 20
EXACT = (0.0, PER_IMAGE)


class Planted:
    """Finds ``found`` of 20 objects per image, ``shift`` pixels away, and takes its time."""

    def __init__(self, now):
        self.now = now
        self.shift, self.found = EXACT
        self.seconds = 1.0
        self.cascade = SimpleNamespace(exits=SimpleNamespace(time_budget="a budget"))

    def __deepcopy__(self, memo):
        other = Planted(self.now)
        other.cascade = copy.deepcopy(self.cascade)
        return other

    def parameters(self):
        yield torch.zeros(1)

    def detect(self, batch):
        assert self.cascade.exits.time_budget is None
        self.now[0] += self.seconds * len(batch)
        rows = [((100 * i + self.shift, 0, 80, 80), 0.9, 0) for i in range(self.found)]
        return SimpleNamespace(detections=[detections_of(*rows) for _ in batch])


def choose(table, float32_parts=(), int8_parts=()):
    """Choose by a table of parts in float32 to (shift, found), seconds per image."""
    now, tried = [0.0], []

    def make_fast(detector, types):
        parts = tuple(p for p in PARTS if types.floating[p] == torch.float32)
        tried.append((parts, types.int8) if types.int8 else parts)
        (detector.shift, detector.found), detector.seconds = table[tried[-1]]
        return detector

    detector = Planted(now)
    options = candidates(torch.bfloat16, float32_parts, int8_parts)
    chosen, sentences = choose_types(detector, IMAGES, make_fast, options, clock=lambda: now[0])
    assert detector.cascade.exits.time_budget == "a budget"
    assert len(tried) == len(sentences) == len(set(tried))
    return tried[options.index(chosen)], tried, sentences


def test_the_fastest_of_those_that_agree_is_chosen():
    table = {(): ((2.0, 20), 1), TRUNK: ((0.1, 20), 2), MAPS: (EXACT, 3), PARTS: (EXACT, 4)}
    chosen, tried, sentences = choose(table)
    assert tried == [(), TRUNK, MAPS, PARTS]
    assert chosen == TRUNK
    # Both x move, so that the mean of four coordinates is half of it.
    assert sentences[0].startswith(
        "bfloat16: finds 100.0 % of 60 detections again at IoU 0.9, 1.00 pixels away, refused"
    )
    assert sentences[1].endswith("0.05 pixels away, 2000.0 ms per image, chosen.")
    assert sentences[2].endswith("0.00 pixels away, 3000.0 ms per image.")
    assert sentences[3].startswith("float32: finds")


def test_lost_detections_refuse_a_candidate_and_time_decides_among_the_others():
    lost = (0.0, 18)  # of 20
    table = {(): (lost, 1), TRUNK: (EXACT, 9), MAPS: (EXACT, 8), PARTS: (EXACT, 7)}
    assert choose(table)[0] == PARTS


def test_float32_is_left_where_nothing_agrees():
    # By another algorithm, even float32 may differ.
    table = dict.fromkeys(((), TRUNK, MAPS, PARTS), ((50.0, 20), 1))
    chosen, _, sentences = choose(table)
    assert chosen == PARTS
    assert ["refused" in s for s in sentences] == [True, True, True, False]


def test_parts_that_are_asked_for_stay_float32_in_all_candidates():
    with_rpn = {("rpn",): (EXACT, 1), (*TRUNK, "rpn"): (EXACT, 2), (*MAPS, "rpn"): (EXACT, 3)}
    chosen, tried, _ = choose({**with_rpn, PARTS: (EXACT, 4)}, float32_parts=["rpn"])
    assert (chosen, tried) == (("rpn",), [*with_rpn, PARTS])
    tried = choose({MAPS: (EXACT, 1), PARTS: (EXACT, 4)}, float32_parts=MAPS)[1]
    assert tried == [MAPS, PARTS]


def test_images_that_cannot_decide_are_refused(monkeypatch):
    monkeypatch.setattr(fast_types, "MIN_DETECTIONS", 61)
    with pytest.raises(ValueError, match=r"detects 60 objects .* in the 3 images .* at least 61"):
        choose({})
    with pytest.raises(ValueError, match="give batches"):
        resolve_types(
            Planted([0.0]),
            None,
            None,
            dtype="auto",
            float32_parts=(),
            int8_parts=(),
            images=[{"image": 1}],
        )


def test_8_bits_come_first_where_parts_can_have_them():
    every = frozenset(INT8_PARTS)
    after = every - {"backbone"}
    table = {
        ((), every): ((9.0, 20), 0.1),
        ((), after): (EXACT, 0.5),
        (): (EXACT, 1),
        (TRUNK, after): (EXACT, 0.6),
        TRUNK: (EXACT, 2),
        MAPS: (EXACT, 3),
        PARTS: (EXACT, 4),
    }
    chosen, tried, sentences = choose(table, int8_parts=INT8_PARTS)
    assert (chosen, tried) == (((), after), list(table))
    assert sentences[0].startswith("bfloat16: stem; int8: backbone, fpn, rpn, roi_heads: finds")
    assert "refused" in sentences[0]
    # Parts that cannot have them, and parts that are asked for in float32.
    heads = frozenset(("rpn", "roi_heads"))
    options = candidates(torch.bfloat16, (), heads)
    assert [types.int8 for types in options[:3]] == [heads, frozenset(), heads]
    options = candidates(torch.bfloat16, heads, heads)
    assert [types.int8 for types in options] == [frozenset()] * 3


def test_a_part_of_two_types_is_named_with_both():
    half, whole = torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2)
    parts = [("head", torch.nn.Sequential(whole, half)), ("body", half), ("act", torch.nn.ReLU())]
    assert describe_dtypes(weight_dtypes(parts)) == "float32: head; bfloat16: head, body"
    assert describe_dtypes(weight_dtypes(parts[1:])) == "bfloat16"
    assert describe_dtypes(weight_dtypes(parts[2:])) == "float32"
