"""The whole detector against the real Detectron2: same weights, same images, same numbers."""

from pathlib import Path

import pytest
import torch

from cascade_det.config import add_cascade_config, load_config
from cascade_det.standalone import build_detector

pytest.importorskip("detectron2.engine", exc_type=ImportError)
pytestmark = pytest.mark.needs_detectron2

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "COCO-Detection" / "cascade_rcnn_R_50_FPN_1x.yaml"
OPTIONS = {
    18: ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
    50: ["MODEL.RESNETS.DEPTH", 50],
}
COMMON = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 7),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 128, "MODEL.RPN.POST_NMS_TOPK_TEST", 200),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 200, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
]


def both(depth, kernel="torchvision"):
    """Ours and Detectron2's, with the same random weights that do not leave all scores equal."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list([*COMMON, *OPTIONS[depth]])
    theirs = build_model(cfg)
    ours = build_detector(
        load_config(CONFIG, [*COMMON, *OPTIONS[depth], "MODEL.CASCADE.POOLER_KERNEL", kernel])
    )
    state = theirs.state_dict()
    generator = torch.Generator().manual_seed(depth)
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("norm.weight"):
            value.uniform_(0.2, 0.6, generator=generator)
        elif "cls_score.weight" in name or "bbox_pred.weight" in name:
            value.normal_(std=0.1, generator=generator)
        elif "anchor_deltas.weight" in name:
            value.normal_(std=0.03, generator=generator)
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def make_images(count):
    sizes = [(96, 128), (90, 120), (64, 126)][:count]
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


def detect_with_both(ours, theirs, images):
    batch = [{"image": i, "height": 2 * i.shape[1], "width": 3 * i.shape[2]} for i in images]
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        expected = [output["instances"] for output in theirs(batch)]
    detections = ours.detect(batch).detections
    assert all(len(e) > 20 for e in expected)
    return detections, expected


def test_state_dict_names_are_the_same():
    ours, theirs = both(50)
    assert list(ours.state_dict().keys() ^ theirs.state_dict().keys()) == []


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("count", [1, 3])
def test_same_kernels_give_the_same_bits(depth, count):
    detections, expected = detect_with_both(*both(depth), make_images(count))
    for ours, theirs in zip(detections, expected, strict=True):
        assert torch.equal(ours.boxes, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.classes, theirs.pred_classes)


@pytest.mark.parametrize("depth", [18, 50])
def test_fast_pooling_gives_the_same_detections(depth):
    detections, expected = detect_with_both(*both(depth, "bags"), make_images(2))
    for ours, theirs in zip(detections, expected, strict=True):
        torch.testing.assert_close(ours.boxes, theirs.pred_boxes.tensor, atol=0.01, rtol=0)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=0)
        assert torch.equal(ours.classes, theirs.pred_classes)


@pytest.mark.parametrize("kernel", ["torchvision", "bags"])
def test_one_training_step_is_the_same(kernel):
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    ours, theirs = both(18, kernel)
    ours.train()
    theirs.train()
    images = make_images(2)
    gt_boxes = [torch.tensor([[10.0, 12, 60, 70], [50, 8, 110, 90]]), torch.zeros(0, 4)]
    gt_classes = [torch.tensor([1, 4]), torch.zeros(0, dtype=torch.int64)]
    batch = [
        {"image": image, "gt_boxes": boxes, "gt_classes": classes}
        for image, boxes, classes in zip(images, gt_boxes, gt_classes, strict=True)
    ]
    their_batch = [
        {
            "image": sample["image"],
            "instances": Instances(
                tuple(sample["image"].shape[1:]),
                gt_boxes=Boxes(sample["gt_boxes"]),
                gt_classes=sample["gt_classes"],
            ),
        }
        for sample in batch
    ]
    torch.manual_seed(5)
    losses = ours.losses(batch)
    torch.manual_seed(5)
    with EventStorage():
        expected = theirs(their_batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            scale = their_gradients[name].abs().max().item()
            torch.testing.assert_close(
                parameter.grad, their_gradients[name], rtol=1e-4, atol=1e-4 * scale, msg=name
            )
        else:
            assert their_gradients[name] is None
