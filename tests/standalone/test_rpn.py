"""Anchors, their labels, the losses and the proposals of the RPN."""

import math

import pytest
import torch
from torchvision.ops import box_iou, nms

from cascade_det.core.structures.boxes import decode_boxes
from cascade_det.layers import rpn_head
from cascade_det.standalone.anchors import AnchorGenerator, cell_anchors
from cascade_det.standalone.rpn import RPN, RPNHead


def run_head(rpn, maps):
    """Anchors, logits and deltas of every level."""
    levels = [maps[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator([tuple(x.shape[-2:]) for x in levels])
    return anchors, *rpn.rpn_head(levels)


def make_rpn(**changes):
    arguments = {
        "in_features": ("p2", "p3"),
        "in_channels": 4,
        "strides": (4, 8),
        "anchor_sizes": [[16.0], [32.0]],
        "aspect_ratios": [[0.5, 1.0, 2.0]] * 2,
        "anchor_offset": 0.0,
        "conv_dims": (-1,),
        "iou_thresholds": (0.3, 0.7),
        "batch_size_per_image": 32,
        "positive_fraction": 0.5,
        "pre_nms_topk": (60, 40),
        "post_nms_topk": (30, 20),
        "nms_thresh": 0.7,
        "min_box_size": 0.0,
        "bbox_reg_weights": (1.0, 1.0, 1.0, 1.0),
        "box_reg_loss_type": "smooth_l1",
        "smooth_l1_beta": 0.0,
        "loss_weights": {"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0},
    }
    return RPN(**{**arguments, **changes})


@pytest.fixture
def maps():
    return {"p2": torch.randn(2, 4, 16, 24), "p3": torch.randn(2, 4, 8, 12)}


SIZES = [(64, 96), (60, 80)]


def test_cell_anchors_by_hand():
    # Area 32^2; a ratio of 4 is 16 wide and 64 high.
    expected = [[-16, -16, 16, 16], [-8, -32, 8, 32]]
    torch.testing.assert_close(
        cell_anchors([32.0], [1.0, 4.0]), torch.tensor(expected, dtype=torch.float32)
    )


def test_anchors_are_not_rounded():
    # sqrt(32^2 / 0.5) = 45.2548...
    width = cell_anchors([32.0], [0.5])[0, 2] * 2
    assert width.item() == pytest.approx(32 * math.sqrt(2), abs=1e-5)


def test_grid_order_and_offset():
    generator = AnchorGenerator(sizes=[[8.0, 16.0]], aspect_ratios=[[1.0]], strides=[4], offset=0.5)
    (anchors,) = generator([(2, 3)])
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    expected = [(x, y) for y in (2.0, 6.0) for x in (2.0, 6.0, 10.0) for _ in range(2)]
    torch.testing.assert_close(centers, torch.tensor(expected))
    assert (anchors[:, 2] - anchors[:, 0]).tolist() == [8.0, 16.0] * 6


def test_some_anchors_are_those_of_all():
    generator = AnchorGenerator(
        sizes=[[8.0, 16.0], [32.0]], aspect_ratios=[[0.5, 2.0], [1.0]], strides=[4, 8], offset=0.3
    )
    sizes = [(9, 7), (3, 5)]
    for level, (found, stride) in enumerate(zip(generator(sizes), (4, 8), strict=True)):
        # As Detectron2 places them, to the last bit.
        y, x = (torch.arange(0.3 * stride, side * stride, stride) for side in sizes[level])
        y, x = torch.meshgrid(y, x, indexing="ij")
        cells = generator.get_buffer(f"cells{level}")
        anchors = (torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4) + cells).view(-1, 4)
        torch.testing.assert_close(found, anchors, rtol=0, atol=0)
        index = torch.randint(len(anchors), (2, 50))
        some = generator.at(level, index, sizes[level][1])
        torch.testing.assert_close(some, anchors[index], rtol=0, atol=0)


def test_several_convolutions_have_detectron2s_names():
    names = set(RPNHead(in_channels=4, num_anchors=3, conv_dims=(8, -1)).state_dict())
    assert {"conv.conv0.weight", "conv.conv1.weight"} <= names
    single = set(RPNHead(in_channels=4, num_anchors=3).state_dict())
    assert {"conv.weight", "objectness_logits.weight", "anchor_deltas.weight"} <= single


def test_labels_agree_with_the_definition():
    rpn = make_rpn(batch_size_per_image=10**6, positive_fraction=1.0)
    anchors = torch.cat(rpn.anchor_generator([(16, 24), (8, 12)]))
    gt = torch.tensor([[10.0, 10, 42, 40], [50, 5, 60, 60], [70, 40, 74, 45]])
    labels, matched = rpn._label_anchors(anchors, gt)
    overlaps = box_iou(gt, anchors)
    for i in range(len(anchors)):
        column = overlaps[:, i]
        is_best_of_some = any(column[g] == overlaps[g].max() for g in range(len(gt)))
        if column.max() >= 0.7 or is_best_of_some:
            assert labels[i] == 1
            assert torch.equal(matched[i], gt[column.argmax()])
        else:
            assert labels[i] == (0 if column.max() < 0.3 else -1)
    assert (labels == 1).any()
    assert (labels == -1).any()


def test_losses_by_definition(maps):
    rpn = make_rpn(loss_weights={"loss_rpn_cls": 2.0, "loss_rpn_loc": 3.0})
    gt = [torch.tensor([[10.0, 10, 42, 40]]), torch.zeros(0, 4)]
    torch.manual_seed(3)
    _, losses = rpn.losses(maps, gt, SIZES)
    torch.manual_seed(3)
    anchors, logits, deltas = run_head(rpn, maps)
    anchors, logits, deltas = torch.cat(anchors), torch.cat(logits, 1), torch.cat(deltas, 1)
    cls = loc = 0.0
    for image, boxes in enumerate(gt):
        labels, matched = rpn._label_anchors(anchors, boxes)
        for i in torch.nonzero(labels >= 0).squeeze(1).tolist():
            probability = torch.sigmoid(logits[image, i])
            cls -= torch.log(probability if labels[i] == 1 else 1 - probability)
            if labels[i] == 1:
                a, g = anchors[i], matched[i]
                w, h = a[2] - a[0], a[3] - a[1]
                target = torch.stack(
                    [
                        ((g[0] + g[2]) - (a[0] + a[2])) / 2 / w,
                        ((g[1] + g[3]) - (a[1] + a[3])) / 2 / h,
                        torch.log((g[2] - g[0]) / w),
                        torch.log((g[3] - g[1]) / h),
                    ]
                )
                loc += (deltas[image, i] - target).abs().sum()
    normalizer = 32 * 2
    torch.testing.assert_close(losses["loss_rpn_cls"], 2.0 * cls / normalizer)
    torch.testing.assert_close(losses["loss_rpn_loc"], 3.0 * loc / normalizer)


def test_no_ground_truth_gives_zero_box_loss_and_finite_gradients(maps):
    rpn = make_rpn()
    _, losses = rpn.losses(maps, [torch.zeros(0, 4)] * 2, SIZES)
    assert losses["loss_rpn_loc"] == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in rpn.parameters())


def test_all_levels_and_images_equal_each_of_them_alone(maps):
    rpn = make_rpn(post_nms_topk=(50, 20))
    for parameter in rpn.rpn_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    anchors, logits, deltas = run_head(rpn, maps)
    for image, (boxes, scores) in enumerate(zip(*rpn.propose(maps, SIZES), strict=True)):
        height, width = SIZES[image]
        kept_boxes, kept_scores = [], []
        for level in range(2):
            score, index = logits[level][image].topk(40)
            decoded = decode_boxes(deltas[level][image][index], anchors[level][index], (1.0,) * 4)
            decoded[:, 0::2] = decoded[:, 0::2].clamp(0, width)
            decoded[:, 1::2] = decoded[:, 1::2].clamp(0, height)
            good = (decoded[:, 2:] > decoded[:, :2]).all(1)
            decoded, score = decoded[good], score[good]
            kept = nms(decoded, score, 0.7)
            kept_boxes.append(decoded[kept])
            kept_scores.append(score[kept])
        order = torch.cat(kept_scores).argsort(descending=True)[:20]
        assert len(order) == 20
        torch.testing.assert_close(boxes, torch.cat(kept_boxes)[order], rtol=0, atol=0)
        torch.testing.assert_close(scores, torch.cat(kept_scores)[order], rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_deltas_of_the_best_alone_are_those_of_the_maps(maps, memory_format, monkeypatch):
    monkeypatch.setattr(rpn_head, "_POSITIONS", 100)  # several parts of the finest map
    rpn = make_rpn(conv_dims=(6, -1))
    for parameter in rpn.rpn_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = rpn.propose(maps, SIZES)
    rpn.rpn_head.topk_deltas_only = True
    lean = rpn.propose(
        {k: x.contiguous(memory_format=memory_format) for k, x in maps.items()}, SIZES
    )
    for ours, theirs in zip(lean, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_small_proposals_are_dropped(maps):
    rpn = make_rpn(min_box_size=14.0)
    for boxes in rpn.propose(maps, SIZES)[0]:
        assert (boxes[:, 2:] - boxes[:, :2] > 14.0).all()


def test_broken_proposals_are_counted_in_training_and_left_out_always(maps):
    rpn = make_rpn()
    targets = [torch.tensor([[10.0, 10, 42, 40]])] * 2
    rpn.losses(maps, targets, SIZES)
    assert rpn.metrics == {"rpn/nonfinite_boxes": 0}
    maps["p3"][0, :, 0, 0] = float("nan")
    (proposals, *_), _ = rpn.losses(maps, targets, SIZES)
    assert rpn.metrics["rpn/nonfinite_boxes"] > 0
    assert all(torch.isfinite(boxes).all() for boxes in proposals)
    assert all(torch.isfinite(boxes).all() for boxes in rpn.propose(maps, SIZES)[0])
