"""The core against the real Detectron2, piece by piece and as a whole.

Runs where Detectron2 can be imported; nothing of its compiled part is needed.
"""

import pytest
import torch
from small_cascades import random_boxes, reported

from cascade_det.core import (
    BoxPredictor,
    CascadeHead,
    ConvFCBoxHead,
    Detections,
    RoIPooler,
)
from cascade_det.core.matching import GroundTruth, label_regions, sample_labels
from cascade_det.core.postprocess import Selection, rescale_detections, select_detections
from cascade_det.core.structures.boxes import decode_boxes, encode_boxes, flatten_images

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

pytestmark = pytest.mark.needs_detectron2

NUM_CLASSES = 5
CHANNELS = 16
STRIDES = (4, 8, 16, 32)
IMAGE_SIZES = [(480, 640), (448, 600)]
IOUS = (0.5, 0.6, 0.7)
REG_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class TestPieces:
    @pytest.mark.parametrize("classes", [1, 3])
    def test_box_deltas(self, generator, classes):
        boxes, targets = (random_boxes(50, (300, 400), generator=generator) for _ in range(2))
        transform = Box2BoxTransform(REG_WEIGHTS[1])
        assert torch.equal(
            encode_boxes(boxes, targets, REG_WEIGHTS[1]), transform.get_deltas(boxes, targets)
        )
        deltas = 20 * torch.randn(50, 4 * classes, generator=generator)
        assert torch.equal(
            decode_boxes(deltas, boxes, REG_WEIGHTS[1]), transform.apply_deltas(deltas, boxes)
        )

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
    def test_samples_of_one_seed(self, seed, fraction):
        labels = torch.randint(-1, NUM_CLASSES + 1, (200,))
        torch.manual_seed(seed)
        ours = sample_labels(
            labels, num_samples=64, positive_fraction=fraction, negative_label=NUM_CLASSES
        )
        torch.manual_seed(seed)
        theirs = subsample_labels(labels, 64, fraction, NUM_CLASSES)
        assert [rows.tolist() for rows in ours] == [rows.tolist() for rows in theirs]

    def test_labels(self, generator):
        boxes = random_boxes(100, (100, 100), generator=generator)
        objects = random_boxes(6, (100, 100), generator=generator)
        classes = torch.arange(6) % NUM_CLASSES
        images = torch.zeros(100, dtype=torch.int64)
        ours = label_regions(
            boxes,
            images,
            GroundTruth(objects, classes, images[:6]),
            iou_threshold=0.5,
            num_classes=NUM_CLASSES,
        )
        matched, labels = Matcher([0.5], [0, 1])(pairwise_iou(Boxes(objects), Boxes(boxes)))
        assert torch.equal(ours.gt_classes, classes[matched].where(labels == 1, NUM_CLASSES))
        foreground = labels == 1
        assert foreground.any()
        assert torch.equal(ours.gt_boxes[foreground], objects[matched][foreground])

    @pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    def test_pooling(self, generator, pooler_type, sampling_ratio):
        features, boxes = random_features(generator), random_proposals(generator)
        theirs = ROIPooler(7, [1 / s for s in STRIDES], sampling_ratio, pooler_type)
        wanted = theirs(features, [Boxes(b) for b in boxes])
        flat, image_index = flatten_images(boxes)
        settings = {"sampling_ratio": sampling_ratio, "aligned": pooler_type == "ROIAlignV2"}
        for kernel in ("torchvision", "bags"):
            ours = RoIPooler(output_size=7, strides=STRIDES, kernel=kernel, **settings)
            got = ours(ours.prepare(features), flat, image_index)
            if kernel == "torchvision":
                assert torch.equal(got, wanted)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("norm", ["", "GN"])
    def test_box_head(self, norm):
        shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
        theirs = FastRCNNConvFCHead(shape, conv_dims=[32, 64], fc_dims=[20, 10], conv_norm=norm)
        ours = ConvFCBoxHead(
            in_channels=CHANNELS, pooled_size=7, conv_dims=(32, 64), fc_dims=(20, 10), norm=norm
        )
        ours.load_state_dict(theirs.state_dict())
        pooled = torch.randn(3, CHANNELS, 7, 7)
        assert torch.equal(ours(pooled), theirs(pooled))

    @pytest.mark.parametrize("classes", [1, NUM_CLASSES])
    @pytest.mark.parametrize("topk", [10, -1])
    def test_selection(self, generator, classes, topk):
        rows = 80
        boxes = random_boxes(rows * classes, IMAGE_SIZES[1], generator=generator)
        boxes = boxes.view(rows, 4 * classes)
        probs = torch.softmax(torch.randn(rows, NUM_CLASSES + 1, generator=generator), dim=1)
        boxes[3, 1] = torch.nan
        images = (torch.arange(rows) >= 30).long()
        ours = select_detections(
            [reported(boxes, probs, images, torch.zeros_like(images))],
            2,
            Selection(0.05, 0.5, topk),
        )
        theirs, _ = fast_rcnn_inference(
            list(boxes.split([30, 50])), list(probs.split([30, 50])), IMAGE_SIZES, 0.05, 0.5, topk
        )
        assert_same_instances(ours, theirs)

    def test_rescaling(self, generator):
        boxes = random_boxes(30, (256, 320), generator=generator, smallest=1.0)
        boxes[0] = torch.tensor([319.99, 0, 320, 8])
        boxes[1] = torch.tensor([330.0, 0, 340, 8])
        scores, classes = torch.rand(30, generator=generator), torch.arange(30) % NUM_CLASSES
        (ours,) = rescale_detections(
            [Detections(boxes, scores, classes, classes)], [((256, 320), (107, 533))]
        )
        instances = Instances(
            (256, 320), pred_boxes=Boxes(boxes.clone()), scores=scores, pred_classes=classes
        )
        theirs = detector_postprocess(instances, 107, 533)
        assert len(theirs) == 29
        assert_same_instances([ours], [theirs])


def random_features(generator):
    return [torch.randn(2, CHANNELS, 480 // s, 640 // s, generator=generator) for s in STRIDES]


def random_proposals(generator, count=60):
    """Boxes from a few pixels to the whole image; some have no height."""
    proposals = []
    for height, width in IMAGE_SIZES:
        boxes = random_boxes(count, (height, width), generator=generator, smallest=2.0)
        boxes[0] = torch.tensor([0.0, 0.0, width, height])
        boxes[1] = torch.tensor([20.0, 30.0, 50.0, 30.0])
        proposals.append(boxes)
    return proposals


def random_targets(generator, proposals, counts=(5, 3)):
    """Objects near some of the proposals, the largest among them, which only p5 sees."""
    gt_boxes, gt_classes = [], []
    for boxes, count in zip(proposals, counts, strict=True):
        noise = torch.randn(count, 4, generator=generator)
        gt_boxes.append(boxes[:count] + noise)
        gt_classes.append(torch.randint(NUM_CLASSES, (count,), generator=generator))
    return gt_boxes, gt_classes


def detectron2_cascade(loss_type="smooth_l1", beta=0.0):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [f"p{level}" for level in range(2, 6)]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 40
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = loss_type
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = beta
    shapes = {
        f"p{i}": ShapeSpec(channels=CHANNELS, stride=s) for i, s in enumerate(STRIDES, start=2)
    }
    torch.manual_seed(0)
    heads = CascadeROIHeads(cfg, shapes)
    for predictor in heads.box_predictor:
        # Their initial weights would give every class the same score and leave boxes in place.
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.6)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.4)
    return heads


def our_cascade(theirs, *, kernel="torchvision", loss_type="smooth_l1", beta=0.0):
    heads = [ConvFCBoxHead(in_channels=CHANNELS, pooled_size=7, fc_dims=(64, 64)) for _ in range(3)]
    predictors = [BoxPredictor(in_features=64, num_classes=NUM_CLASSES) for _ in range(3)]
    cascade = CascadeHead(
        pooler=RoIPooler(output_size=7, strides=STRIDES, kernel=kernel),
        box_heads=heads,
        box_predictors=predictors,
        num_classes=NUM_CLASSES,
        ious=IOUS,
        bbox_reg_weights=REG_WEIGHTS,
        box_reg_loss_type=loss_type,
        smooth_l1_beta=beta,
        batch_size_per_image=40,
    )
    cascade.load_state_dict(theirs.state_dict())
    return cascade


def as_instances(proposals):
    return [
        Instances(
            size, proposal_boxes=Boxes(boxes.clone()), objectness_logits=torch.zeros(len(boxes))
        )
        for size, boxes in zip(IMAGE_SIZES, proposals, strict=True)
    ]


def as_feature_dict(features):
    return {f"p{i}": level for i, level in enumerate(features, start=2)}


def assert_same_instances(ours, theirs):
    assert len(ours) == len(theirs)
    for detections, instances in zip(ours, theirs, strict=True):
        assert torch.equal(detections.boxes, instances.pred_boxes.tensor)
        assert torch.equal(detections.scores, instances.scores)
        assert torch.equal(detections.classes, instances.pred_classes)


class TestWholeCascade:
    @pytest.mark.parametrize("empty", [False, True])
    def test_inference_is_equal_to_the_last_bit(self, generator, empty):
        theirs = detectron2_cascade().eval()
        features, proposals = random_features(generator), random_proposals(generator)
        if empty:
            proposals[1] = proposals[1][:0]
        with torch.no_grad():
            wanted, _ = theirs(None, as_feature_dict(features), as_instances(proposals))
        got, _ = our_cascade(theirs).detect(features, proposals, IMAGE_SIZES)
        assert [len(instances) > 20 for instances in wanted] == [True, not empty]
        assert_same_instances(got, wanted)

    def test_inference_with_bags_is_close(self, generator):
        theirs = detectron2_cascade().eval()
        features, proposals = random_features(generator), random_proposals(generator)
        with torch.no_grad():
            wanted, _ = theirs(None, as_feature_dict(features), as_instances(proposals))
        got, _ = our_cascade(theirs, kernel="bags").detect(features, proposals, IMAGE_SIZES)
        for detections, instances in zip(got, wanted, strict=True):
            assert torch.equal(detections.classes, instances.pred_classes)
            torch.testing.assert_close(detections.scores, instances.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(
                detections.boxes, instances.pred_boxes.tensor, rtol=0, atol=0.01
            )

    @pytest.mark.parametrize(
        ("loss_type", "beta"), [("smooth_l1", 0.0), ("smooth_l1", 0.4), ("giou", 0.0)]
    )
    @pytest.mark.parametrize("counts", [(5, 3), (4, 0)])
    def test_training_is_equal(self, generator, loss_type, beta, counts):
        theirs = detectron2_cascade(loss_type, beta).train()
        ours = our_cascade(theirs, loss_type=loss_type, beta=beta)
        # An empty box cannot be matched: an RPN removes them.
        proposals = [boxes[boxes[:, 3] > boxes[:, 1]] for boxes in random_proposals(generator)]
        features = [level.requires_grad_() for level in random_features(generator)]
        gt_boxes, gt_classes = random_targets(generator, proposals, counts)
        targets = [
            Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
            for size, boxes, classes in zip(IMAGE_SIZES, gt_boxes, gt_classes, strict=True)
        ]

        torch.manual_seed(7)
        with EventStorage() as storage:
            _, wanted = theirs(None, as_feature_dict(features), as_instances(proposals), targets)
            logged = {name: value for name, (value, _) in storage.latest().items()}
        torch.manual_seed(7)
        got = ours.losses(features, proposals, gt_boxes, gt_classes, IMAGE_SIZES)

        assert set(got) == set(wanted)
        for name, loss in wanted.items():
            torch.testing.assert_close(got[name], loss, rtol=1e-6, atol=1e-6)
        for name in ("cls_accuracy", "fg_cls_accuracy", "false_negative"):
            for stage in range(3):
                key = f"stage{stage}/fast_rcnn/{name}"
                assert float(ours.metrics[key]) == pytest.approx(logged[key])

        def gradients(losses, cascade):
            inputs = [*features, *dict(sorted(cascade.named_parameters())).values()]
            return torch.autograd.grad(sum(losses.values()), inputs)

        for mine, other in zip(gradients(got, ours), gradients(wanted, theirs), strict=True):
            largest = other.abs().max().item()
            assert largest > 0  # every level and every layer is trained
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * largest)
