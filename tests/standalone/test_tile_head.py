"""The learned head of the tile gate: what it is trained for, and which tiles it opens."""

import copy
import math

import pytest
import torch
from small_cascades import assert_same_detections
from small_detectors import make_detector, random_image
from torch import nn

from cascade_det.calibration.recording import record_dataset
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.core.postprocess import rescale_detections
from cascade_det.engine.training_modes import freeze_detector, training_mode
from cascade_det.layers.rpn_head import best_anchors
from cascade_det.layers.tiles import TILE, WHOLE_FROM_WITH_BORDER
from cascade_det.standalone import optimize

SIZES = ((128, 192), (96, 160), (160, 96))
HALF = TILE // 2  # cells of a tile, on the map after the finest


def make_parts(detector, *, untrained=False):
    torch.manual_seed(5)
    channels = detector.proposal_generator.rpn_head.objectness_logits.in_channels
    names, widths = ("tile_head",), (12,) * 3
    parts = LearnedParts(names=names, num_stages=3, hidden_features=widths, tile_channels=channels)
    if not untrained:
        for parameter in parts.parameters():
            nn.init.normal_(parameter, std=1.0)
    return parts


def make(*, threshold=0.0, untrained=False, frozen=False, **rules):
    detector = make_detector(score_thresh=0.3)
    parts = make_parts(detector, untrained=untrained)
    detector.set_exits(ExitPolicy(num_stages=3, learned=parts, tile_threshold=threshold, **rules))
    if frozen:
        detector.roi_heads.regime.exits_alone = True
        freeze_detector(detector)
        training_mode(detector)
    return detector


def batch_of(sizes=SIZES):
    return [
        {
            "image": random_image(*size, seed=seed),
            "image_id": seed,
            "height": size[0],
            "width": size[1],
            "gt_boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]),
            "gt_classes": torch.tensor([1]),
        }
        for seed, size in enumerate(sizes)
    ]


@torch.no_grad()
def maps_of(detector, batch):
    return detector.backbone(detector.preprocess([s["image"] for s in batch])[0])


@torch.no_grad()
def hidden_of(detector, batch):
    """The RPN's hidden map of p3."""
    return detector.proposal_generator.rpn_head.conv(maps_of(detector, batch)["p3"]).relu()


@torch.no_grad()
def naive_logits(head, hidden, mean, var):
    """Tile by tile, the highest of its cells: a list of images of rows of logits."""
    found = []
    for image in hidden:
        rows = []
        for top in range(0, image.shape[1], HALF):
            row = []
            for left in range(0, image.shape[2], HALF):
                logits = []
                for y in range(top, top + HALF):
                    for x in range(left, left + HALF):
                        unit = (image[:, y, x] - mean) / (var + head.norm.eps).sqrt()
                        inner = (head.fc.weight @ unit + head.fc.bias).clamp(min=0)
                        logits.append(float(head.logit.weight[0] @ inner + head.logit.bias))
                row.append(max(logits))
            rows.append(row)
        found.append(rows)
    return torch.tensor(found)


def anchors_of(row, column):
    """Of a cell of p2: stride 4, size 24, ratios of height to width 0.5, 1 and 2."""
    for ratio in (0.5, 1.0, 2.0):
        width = math.sqrt(24**2 / ratio)
        yield 4.0 * column, 4.0 * row, width, width * ratio


@torch.no_grad()
def naive_needed(detector, batch):
    """Detections to proposals, by running each alone; proposals to cells, by decoding all."""
    detector = copy.deepcopy(detector).eval()
    detector.set_exits(None)
    inputs = detector.cascade_inputs(batch)
    finest = maps_of(detector, batch)["p2"]
    images, _, height, width = finest.shape
    (_,), (deltas,) = detector.proposal_generator.rpn_head([finest])
    needed = torch.zeros(images, height // TILE, width // TILE, dtype=torch.bool)
    for image, found in enumerate(detector.detect(batch).detections):
        limit = torch.tensor(inputs.image_sizes[image]).flip(0).repeat(2)
        own = [x[image : image + 1] for x in inputs.features]
        places, boxes = [], []
        for index, delta in enumerate(deltas[image].tolist()):
            cell, number = divmod(index, 3)
            x, y, w, h = [*anchors_of(*divmod(cell, width))][number]
            dx, dy, dw, dh = delta
            x, y, w, h = x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)
            boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            places.append(divmod(cell, width))
        boxes = torch.tensor(boxes).clamp(min=0).minimum(limit)
        for proposal in inputs.proposals[image]:
            size = [inputs.image_sizes[image]]
            (alone,), _ = detector.roi_heads.detect(own, [proposal[None]], size)
            if not is_among(alone, found):
                continue
            distances = (boxes - proposal).abs().amax(dim=1)
            if distances.min() < 1e-3:
                row, column = places[int(distances.argmin())]
                needed[image, row // TILE, column // TILE] = True
    return needed


def is_among(alone, found):
    """Whether a detection of ``alone`` is one of ``found``."""
    for box, score, kind in zip(alone.boxes, alone.scores, alone.classes, strict=True):
        same = (found.classes == kind) & ((found.scores - score).abs() < 1e-4)
        if (same & ((found.boxes - box).abs().amax(dim=1) < 1e-2)).any():
            return True
    return False


@pytest.mark.parametrize("frozen", [True, False])
def test_the_loss_is_that_of_naive_targets(frozen):
    detector, batch = make(frozen=frozen), batch_of([(128, 192)] * 2)
    detector.train(not frozen)
    if frozen:
        training_mode(detector)
    loss = detector.losses(batch)["loss_exit_tiles"].item()
    needed = naive_needed(detector, batch).flatten()
    assert 0.02 < needed.float().mean() < 0.5
    hidden = hidden_of(detector, batch)
    cells = hidden.transpose(0, 1).flatten(1)
    head = detector.roi_heads.exits.learned.tile_head
    logits = naive_logits(head, hidden, cells.mean(dim=1), cells.var(dim=1, correction=0))
    weight = math.sqrt((~needed).sum() / needed.sum())
    terms = [
        weight * math.log1p(math.exp(-z)) if wanted else math.log1p(math.exp(z))
        for z, wanted in zip(logits.flatten().tolist(), needed.tolist(), strict=True)
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_without_detections_no_tile_is_needed():
    detector = make_detector(score_thresh=1.0)
    detector.set_exits(ExitPolicy(num_stages=3, learned=make_parts(detector, untrained=True)))
    loss = detector.train().losses(batch_of())["loss_exit_tiles"]
    assert loss.item() == pytest.approx(math.log(2))


def test_a_frozen_detector_trains_the_head_alone():
    detector, batch = make(untrained=True, frozen=True), batch_of()
    before = copy.deepcopy(detector.state_dict())
    parts = detector.roi_heads.exits.learned
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        found = detector.losses(batch)
        assert set(found) == {"loss_exit_tiles"}
        optimizer.zero_grad()
        found["loss_exit_tiles"].backward()
        optimizer.step()
        losses.append(found["loss_exit_tiles"].item())
    assert losses[-1] < 0.6 * losses[0]
    changed = {
        name for name, x in detector.state_dict().items() if not torch.equal(x, before[name])
    }
    own = {f"roi_heads.exits.learned.{name}" for name in parts.state_dict()}
    assert {name for name in own if "norm" not in name} <= changed <= own
    assert {name for name, p in detector.named_parameters() if p.grad is not None} == {
        name for name in own if "norm" not in name
    }


def trained(threshold=0.0, **rules):
    """With statistics of hidden maps."""
    detector = make(threshold=threshold, **rules)
    head = detector.roi_heads.exits.learned.tile_head.train()
    for _ in range(30):
        head(hidden_of(detector, batch_of()))
    detector.eval()
    return detector


def scores_of(detector, batch):
    head = detector.roi_heads.exits.learned.tile_head
    norm = head.norm
    hidden = hidden_of(detector, batch)
    return naive_logits(head, hidden, norm.running_mean, norm.running_var).sigmoid()


class Dense(nn.Module):
    """An RPN head on whole maps, with logits of minus infinity in closed tiles."""

    def __init__(self, head, opened):
        super().__init__()
        self.head, self.opened = head, opened

    def best(self, features, most, **_):
        logits, deltas = self.head(features)
        closed = ~self.opened.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
        anchors = self.head.objectness_logits.out_channels
        shut = closed.flatten(1).repeat_interleave(anchors, 1)
        logits[0] = logits[0].masked_fill(shut, -torch.inf)
        return [best_anchors(x, d, most) for x, d in zip(logits, deltas, strict=True)]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_tiles_are_open_where_the_head_says(share, fast):
    batch, detector = batch_of(), trained()
    scores = scores_of(detector, batch)
    threshold = between(scores, share)
    opened = scores >= threshold
    whole = opened.float().mean(dim=(1, 2), keepdim=True) >= WHOLE_FROM_WITH_BORDER
    opened = opened | whole
    twin = copy.deepcopy(detector)
    twin.set_exits(None)
    twin.proposal_generator.rpn_head = Dense(twin.proposal_generator.rpn_head, opened)
    expected = twin.detect(batch)
    detector.roi_heads.exits.tile_threshold = threshold
    if fast:
        optimize(detector, dtype="float32")
    got = detector.detect(batch)
    assert got.stats.tiles_open == opened.sum() > 0
    assert torch.equal(torch.stack([own.opened for own in got.tiles]), opened)
    assert_same_detections(got.detections, expected.detections)
    # By objectness, other tiles would be open.
    detector.roi_heads.exits.learned = None
    assert detector.detect(batch).stats.tiles_open != opened.sum()


def between(scores, share):
    """A threshold that this share of tiles reaches, not close to any score."""
    ordered = scores.flatten().sort(descending=True).values
    count = int(share * len(ordered))
    return float(ordered[count - 1 : count + 1].mean())


@pytest.mark.parametrize("fast", [False, True])
def test_a_replay_is_the_run(fast):
    batch, detector = batch_of(), trained()
    scores = scores_of(detector, batch)
    thresholds = (0.0, *(between(scores, share) for share in (0.4, 0.1)), 1.0)
    if fast:
        optimize(detector, dtype="float32")
    batches = [[sample] for sample in batch]
    recording = record_dataset(detector, batches, len(batch), tile_thresholds=thresholds)
    (record,) = recording.records
    exits, shares = detector.roi_heads.exits, set()
    for threshold in thresholds:
        exits.tile_threshold = threshold
        replay = record.replay(exits)
        found = rescale_detections(record.select(replay.reported), recording.frames)
        outputs = [detector.detect(one) for one in batches]
        assert_same_detections(found, [output.detections[0] for output in outputs])
        if threshold:
            opened = [output.stats.tiles_open for output in outputs]
            assert replay.tiles[:2].sum(dim=0).tolist() == opened
            shares.add(sum(opened))
    assert len(shares) == 3


def test_an_untrained_head_opens_all_tiles():
    batch, detector = batch_of(), make(threshold=0.5, untrained=True)
    plain = make_detector(score_thresh=0.3).detect(batch).detections
    got = detector.detect(batch)
    assert_same_detections(got.detections, plain, exact=True)
    assert got.stats.tiles_open == got.stats.tiles > 0


def test_types_change_nothing():
    head = trained().roi_heads.exits.learned.tile_head
    hidden = (torch.randn(2, 6, 8, 12) * 3).bfloat16()
    wanted = head.probabilities(hidden.float())
    assert wanted.shape == (2, 2, 3)
    assert torch.equal(head.probabilities(hidden), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.probabilities(hidden), wanted)
