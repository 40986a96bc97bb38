"""Several processes that share the images have the metrics of one that sees them all."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput, StageOutput
from cascade_det.errors import DatasetError
from cascade_det.evaluation import (
    CocoEvaluator,
    ExitEvaluator,
    LatencyEvaluator,
    RegionFlops,
    StageEvaluator,
)
from cascade_det.monitoring.shadow import ShadowEvaluator, ShadowRules

CATEGORY_IDS = (3, 7)
IMAGE_IDS = tuple(range(1, 9))


def random_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 60], 1)


def random_detections(generator, boxes):
    count = len(boxes)
    return Detections(
        boxes + torch.randn(count, 4, generator=generator) * 2,
        torch.rand(count, generator=generator),
        torch.randint(0, 2, (count,), generator=generator),
        torch.randint(0, 2, (count,), generator=generator),
    )


@pytest.fixture(scope="module")
def case():
    """Ground truth, and for each image a batch of one and what a detector gave for it."""
    generator = torch.Generator().manual_seed(0)
    annotations, outputs = [], {}
    for image_id in IMAGE_IDS:
        boxes = random_boxes(generator, int(torch.randint(0, 4, (1,), generator=generator)))
        annotations += [
            {"image_id": image_id, "category_id": CATEGORY_IDS[row % 2],
             "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for row, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        ]  # fmt: skip
        entering = torch.cat([boxes, boxes, random_boxes(generator, 2)])
        found = [random_detections(generator, entering) for _ in range(2)]
        stages = [StageOutput([found[k]], [entering], [found[k].boxes]) for k in range(2)]
        left = len(entering) // 2
        stats = CascadeStats(
            [len(entering), len(entering) - left],
            [{"background": left}, {"completed": len(entering) - left}],
            {"backbone": 10.0 * image_id, "stage0": 1.0},
            proposed=len(entering) + image_id,
            left_before={"background": image_id},
            confidence=[{"background": 0.1 * image_id}, {"completed": 0.7}],
            overrun_ms=float(image_id % 3),
            tiles=12 * (image_id % 2),
            tiles_open=(image_id % 2) * image_id,
            tiles_computed=(image_id % 2) * (image_id + 1),
        )
        outputs[image_id] = DetectorOutput([found[0]], stats, stages)
    content = {
        "images": [{"id": image_id} for image_id in IMAGE_IDS],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    return content, outputs


def build(content):
    return [
        CocoEvaluator(ground_truth=content, category_ids=CATEGORY_IDS),
        StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS),
        ExitEvaluator(RegionFlops((1e6, 2e6), (0.0, 0.0))),
        ShadowEvaluator(ShadowRules(share=0.7, min_score=0.3, expected_loss=0.0)),
        LatencyEvaluator(warmup=0),
    ]


def processed(content, outputs, image_ids):
    evaluators = build(content)
    for image_id in image_ids:
        for evaluator in evaluators:
            evaluator.process([{"image_id": image_id}], outputs[image_id])
    return evaluators


@settings(max_examples=15)
@given(owners=st.lists(st.integers(0, 3), min_size=8, max_size=8), seed=st.integers(0, 99))
def test_shares_give_the_metrics_of_the_whole(case, owners, seed):
    shuffled = random.Random(seed).sample(IMAGE_IDS, len(IMAGE_IDS))
    shares = [
        [image_id for image_id, owner in zip(shuffled, owners, strict=True) if owner == rank]
        for rank in range(4)
    ]
    processes = [processed(*case, share) for share in shares]
    for whole, *parts in zip(processed(*case, IMAGE_IDS), *processes, strict=True):
        states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
        merged = parts[seed % 4]
        merged.merge(states)
        expected, ours = whole.evaluate(), merged.evaluate()
        if isinstance(whole, LatencyEvaluator):
            assert "4 processes" in ours["latency"]["notes"].pop(0)
        # As text, since nan is not equal to itself. All digits count.
        assert json.dumps(ours) == json.dumps(expected)


def test_metrics_of_the_case_are_not_trivial(case):
    metrics = [item.evaluate() for item in processed(*case, IMAGE_IDS)]
    coco, stages, exits, shadow, latency = metrics
    assert 1 < coco["bbox"]["AP"] < 99
    assert stages["stages"]["stage0"]["AP"] != stages["stages"]["stage1"]["AP"]
    assert stages["stages"]["regions"] > 10
    assert exits["exits"]["stage0"]["exit_rate"] > 0
    tiles = exits["exits"]["tiles"]
    assert 0 < tiles["open_share"] < tiles["computed_share"] < 1
    assert 1 < shadow["shadow"]["images"] < len(IMAGE_IDS)
    assert shadow["shadow"]["changed"] > 0
    assert latency["latency"]["batches"] == len(IMAGE_IDS)


def test_a_merged_state_can_be_merged_again(case):
    first, second, whole = (processed(*case, ids) for ids in ((1, 2), (3,), (1, 2, 3)))
    for one, other, both in zip(first[:4], second, whole, strict=False):
        one.merge([one.state(), other.state()])
        other.reset()
        one.merge([one.state(), other.state()])
        assert json.dumps(one.evaluate()) == json.dumps(both.evaluate())


@pytest.mark.parametrize("which", [0, 1])
def test_an_image_in_two_shares_is_refused(case, which):
    first, second = (processed(*case, ids)[which] for ids in ((1, 2), (2, 3)))
    with pytest.raises(DatasetError, match="1 images, 2 among them, were processed by two"):
        first.merge([first.state(), second.state()])
