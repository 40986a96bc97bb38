"""The decoder as semantic head of Detectron2's own models."""

import numpy as np
import pytest
import torch
from small_segmenter import SEGMENTER, labelled

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from cascade_det import config
from cascade_det.d2 import add_cascade_config
from cascade_det.d2.detector import Detector
from cascade_det.errors import ConfigError
from cascade_det.model_zoo import get_config_file
from cascade_det.standalone.build_segmenter import build_segmenter


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return [labelled(75, 90, height=150, width=200), labelled(64, 101, height=64, width=101)]


@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_same_names_and_numbers_in_both_hosts(batch, fuse):
    theirs_cfg = get_cfg()
    add_cascade_config(theirs_cfg)
    ours_cfg = config.get_cfg()
    for cfg in (theirs_cfg, ours_cfg):
        cfg.merge_from_list([*SEGMENTER, "MODEL.CASCADE_DECODER.FUSE", fuse])
    plugin, standalone = build_model(theirs_cfg), build_segmenter(ours_cfg)
    assert plugin.state_dict().keys() == standalone.state_dict().keys()
    standalone.load_state_dict(plugin.state_dict())
    losses = [model.train()(batch)["loss_sem_seg"] for model in (plugin, standalone)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    standalone.load_state_dict(plugin.state_dict())
    with torch.no_grad():
        found = zip(plugin.eval()(batch), standalone.segment(batch).sem_seg, strict=True)
    for theirs, ours in found:
        torch.testing.assert_close(theirs["sem_seg"], ours, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["image", "patch"])
def test_exits_decide_the_same_in_both_hosts(batch, kind):
    theirs_cfg = get_cfg()
    add_cascade_config(theirs_cfg)
    ours_cfg = config.get_cfg()
    node = "MODEL.CASCADE_DECODER.EXIT"
    exits = (f"{node}.ENABLED", True, f"{node}.KIND", kind, f"{node}.THRESHOLDS", [0.36, 0.4, 0.5])
    for cfg in (theirs_cfg, ours_cfg):
        cfg.merge_from_list([*SEGMENTER, *exits])
    plugin, standalone = build_model(theirs_cfg).eval(), build_segmenter(ours_cfg)
    standalone.load_state_dict(plugin.state_dict())
    with torch.no_grad():
        theirs, ours = plugin(batch), standalone.segment(batch)
    assert any(left["confident"] for left in ours.stats.left[:-1])
    for found, expected in zip(theirs, ours.sem_seg, strict=True):
        torch.testing.assert_close(found["sem_seg"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("trunk", ["mobilenet_v2", "efficientvit", "hatnet", "pvtv2"])
def test_our_trunks_are_backbones_of_segmenters(batch, trunk):
    if trunk == "pvtv2":
        pytest.importorskip("timm")
    theirs_cfg = get_cfg()
    add_cascade_config(theirs_cfg)
    ours_cfg = config.get_cfg()
    for cfg in (theirs_cfg, ours_cfg):
        name = f"build_{trunk}_backbone"
        cfg.merge_from_list([*SEGMENTER, "MODEL.BACKBONE.NAME", name, "MODEL.PVTV2.NAME", "b0"])
    plugin, standalone = build_model(theirs_cfg), build_segmenter(ours_cfg)
    standalone.load_state_dict(plugin.state_dict())
    with torch.no_grad():
        found = zip(plugin.eval()(batch), standalone.segment(batch).sem_seg, strict=True)
    for theirs, ours in found:
        torch.testing.assert_close(theirs["sem_seg"], ours, rtol=1e-4, atol=1e-3)


def test_panoptic_fpn_trains_both_cascades(batch):
    """Cascade Mask R-CNN finds things, the decoder stuff."""
    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_file(get_config_file("Base-Cascade-RCNN-FPN.yaml"))
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True),
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads"),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
            *("MODEL.SEM_SEG_HEAD.NAME", "CascadeSemSegHead"),
        ]
    )
    model = build_model(cfg).train()
    for one in batch:
        instances = Instances(one["image"].shape[-2:])
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 60.0, 50.0]]))
        instances.gt_classes = torch.tensor([3])
        instances.gt_masks = PolygonMasks([[np.array([5.0, 5, 60, 5, 60, 50])]])
        one["instances"] = instances
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with EventStorage():
        for _ in range(2):
            losses = model(batch)
            assert {"loss_sem_seg", "loss_cls_stage2", "loss_mask"} <= losses.keys()
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    decoder = model.sem_seg_head.decoder
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.AG1.W_x[0].parameters())
    assert Detector(model.eval()).losses(batch).keys() == losses.keys()
    with torch.no_grad():
        found = model.eval()(batch)[0]
    assert found["sem_seg"].shape == (54, 150, 200)
    assert found["panoptic_seg"][0].shape == (150, 200)


def test_bad_keys_are_named():
    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_list([*SEGMENTER, "MODEL.CASCADE_DECODER.FUSE", "sum"])
    with pytest.raises(ConfigError, match=r"CASCADE_DECODER\.FUSE is 'sum'.*'add', 'concat'"):
        build_model(cfg)
    cfg.merge_from_list(["MODEL.CASCADE_DECODER.FUSE", "add", "MODEL.DUAL_SCALE.MODE", "cascaded"])
    with pytest.raises(ConfigError, match=r"MODE is 'cascaded'.*need the standalone host"):
        build_model(cfg)
