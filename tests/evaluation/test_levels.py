"""Metrics per level, against those of each level alone, and the shares that exits leave."""

import numpy as np
import pytest
import torch

from cascade_det.evaluation.levels import LevelEvaluator
from cascade_det.evaluation.semantic import ConfusionMatrix, semantic_metrics
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats

NAMES = ["sky", "road", "car"]


def evaluator():
    return LevelEvaluator(class_names=NAMES, truth_of=lambda sample: sample["truth"])


def random_batches(seed, left):
    rng = np.random.default_rng(seed)
    for counts in left:
        truth = [rng.integers(0, 3, (4, 5)) for _ in range(2)]
        levels = [[torch.from_numpy(rng.integers(0, 3, (4, 5))) for _ in truth] for _ in counts]
        stats = SegmenterStats(left=[{"confident": count} for count in counts])
        yield [{"truth": labels} for labels in truth], SegmenterOutput([], stats, levels)


def test_metrics_of_each_level_and_shares_by_hand():
    batches = list(random_batches(0, [(3, 0, 5), (1, 2, 1)]))
    whole = evaluator()
    for batch, output in batches:
        whole.process(batch, output)
    found = whole.evaluate()["levels"]
    assert list(found) == ["level0", "level1", "level2"]
    assert [level["left"] for level in found.values()] == [4 / 12, 2 / 12, 6 / 12]
    assert [level["entered"] for level in found.values()] == [1, 8 / 12, 6 / 12]
    for index, level in enumerate(found.values()):
        confusion = ConfusionMatrix(3)
        for batch, output in batches:
            for sample, labels in zip(batch, output.levels[index], strict=True):
                confusion.update(labels.numpy(), sample["truth"])
        expected = semantic_metrics(confusion.counts, NAMES)
        assert {name: level[name] for name in ("mIoU", "pACC")} == {
            name: expected[name] for name in ("mIoU", "pACC")
        }


def test_processes_together_have_the_numbers_of_one():
    batches = list(random_batches(1, [(3, 0, 5), (1, 2, 1), (8, 0, 0)]))
    whole, *shares = (evaluator() for _ in range(4))  # the last process sees nothing
    for index, one in enumerate(batches):
        whole.process(*one)
        shares[index % 2].process(*one)
    merged = evaluator()
    merged.merge([share.state() for share in shares])
    assert merged.evaluate() == whole.evaluate()
    assert evaluator().evaluate() == {"levels": {}}


def test_levels_are_needed():
    with pytest.raises(ValueError, match="levels=True"):
        evaluator().process([], SegmenterOutput([], SegmenterStats()))
