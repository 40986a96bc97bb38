import pytest
import torch

from cascade_det.weights.names import (
    caffe2_to_detectron2,
    has_caffe2_names,
    has_torchvision_resnet_names,
    torchvision_resnet_to_detectron2,
)


def resnet50_blobs():
    names = ["conv1_w", "conv1_b", "fc1000_w", "fc1000_b"]
    names += [f"res_conv1_bn_{kind}" for kind in ("s", "b", "rm", "riv")]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            for branch in ("branch2a", "branch2b", "branch2c") + ("branch1",) * (block == 0):
                prefix = f"res{stage}_{block}_{branch}"
                names += [f"{prefix}_w", f"{prefix}_b"]
                names += [f"{prefix}_bn_{kind}" for kind in ("s", "b", "rm", "riv")]
    return names


def detectron_blobs():
    names = [f"res{s}_{i}_branch2a_gn_{kind}" for s in (6, 7) for i in (0, 1) for kind in "sb"]
    names += [f"res{s}_9_branch2a_bn_{k}" for s in (2, 3) for k in ("gamma", "beta")]
    names += [f"res4_9_branch2c_bn_{k}" for k in ("running_mean", "running_var")]
    for parameter in "wb":
        names += [f"conv_rpn_fpn2_{parameter}", f"rpn_bbox_pred_fpn2_{parameter}"]
        names += [f"rpn_cls_logits_fpn2_{parameter}"]
        names += [f"fpn_inner_res5_2_sum_{parameter}", f"fpn_res5_2_sum_{parameter}"]
        for stage, block in ((2, 2), (3, 3), (4, 5)):
            names += [f"fpn_inner_res{stage}_{block}_sum_lateral_{parameter}"]
            names += [f"fpn_res{stage}_{block}_sum_{parameter}"]
        names += [f"fc6_{parameter}", f"fc7_{parameter}"]
        names += [f"bbox_pred_{parameter}", f"cls_score_{parameter}"]
        names += [f"head_conv{i}_{parameter}" for i in (1, 2, 3, 4)]
        names += [f"_[mask]_fcn{i}_{parameter}" for i in (1, 2, 3, 4)]
        names += [f"mask_fcn_logits_{parameter}", f"conv5_mask_{parameter}"]
        names += [f"conv_fcn{i}_{parameter}" for i in (1, 8)]
        names += [f"kps_score_lowres_{parameter}", f"kps_score_{parameter}"]
    names += [f"head_conv{i}_gn_{kind}" for i in (1, 2) for kind in "sb"]
    names += [f"fpn_res4_5_sum_gn_{kind}" for kind in "sb"]
    names += [f"fpn_inner_res4_5_sum_lateral_gn_{kind}" for kind in "sb"]
    names += [f"fpn_inner_res5_2_sum_gn_{kind}" for kind in "sb"]
    return names


@pytest.mark.parametrize(
    ("blob", "name"),
    [
        ("conv1_w", "stem.conv1.weight"),
        ("res_conv1_bn_s", "stem.conv1.norm.weight"),
        ("res_conv1_bn_b", "stem.conv1.norm.bias"),
        ("res2_0_branch1_w", "res2.0.shortcut.weight"),
        ("res2_0_branch1_bn_b", "res2.0.shortcut.norm.bias"),
        ("res4_22_branch2c_bn_s", "res4.22.conv3.norm.weight"),
        ("res5_2_branch2b_bn_rm", "res5.2.conv2.norm.running_mean"),
        ("res5_2_branch2b_bn_riv", "res5.2.conv2.norm.running_var"),
        ("fpn_inner_res5_2_sum_w", "fpn_lateral5.weight"),
        ("fpn_inner_res4_5_sum_lateral_b", "fpn_lateral4.bias"),
        ("fpn_res3_3_sum_gn_s", "fpn_output3.norm.weight"),
        ("conv_rpn_fpn2_w", "proposal_generator.rpn_head.conv.weight"),
        ("conv_rpn_w", "proposal_generator.rpn_head.conv.weight"),
        ("rpn_cls_logits_fpn2_b", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("rpn_bbox_pred_w", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("fc6_w", "box_head.fc1.weight"),
        ("fc7_b", "box_head.fc2.bias"),
        ("head_conv1_gn_b", "box_head.conv1.norm.bias"),
        ("pred_w", "linear.weight"),
    ],
)
def test_blob_names(blob, name):
    assert list(caffe2_to_detectron2({blob: torch.zeros(8, 2)})) == [name]


def test_background_moves_from_first_to_last_and_loses_box_and_mask():
    rows = torch.arange(12.0)[:, None]
    out = caffe2_to_detectron2(
        {"cls_score_w": rows[:3], "bbox_pred_w": rows, "mask_fcn_logits_w": rows[:3]}
    )
    assert out["cls_score.weight"].flatten().tolist() == [1, 2, 0]
    assert out["bbox_pred.weight"].flatten().tolist() == list(range(4, 12))
    assert out["mask_head.predictor.weight"].flatten().tolist() == [1, 2]


def test_momentum_is_dropped():
    assert list(
        caffe2_to_detectron2({"fc6_w": torch.ones(1), "fc6_w_momentum": torch.ones(1)})
    ) == ["box_head.fc1.weight"]


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("make", [resnet50_blobs, detectron_blobs])
def test_equals_detectron2(make):
    loading = pytest.importorskip("detectron2.checkpoint.c2_model_loading")
    weights = {blob: torch.full((12, 2), float(i)) for i, blob in enumerate(make())}
    expected, _ = loading.convert_c2_detectron_names(weights)
    found = caffe2_to_detectron2(weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_torchvision_names_become_detectron2s():
    torchvision = pytest.importorskip("torchvision")
    state = torchvision.models.resnet18().state_dict()
    assert has_torchvision_resnet_names(state)
    out = torchvision_resnet_to_detectron2(state)
    assert len(out) == len(state)
    assert out["stem.conv1.weight"] is state["conv1.weight"]
    assert out["stem.conv1.norm.running_var"] is state["bn1.running_var"]
    assert out["res2.0.conv2.norm.bias"] is state["layer1.0.bn2.bias"]
    assert out["res5.0.shortcut.weight"] is state["layer4.0.downsample.0.weight"]
    assert out["res5.0.shortcut.norm.weight"] is state["layer4.0.downsample.1.weight"]
    assert out["fc.weight"] is state["fc.weight"]


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_names_fill_detectron2s_resnet(depth):
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("detectron2")
    from detectron2.modeling.backbone import resnet

    block = resnet.BottleneckBlock if depth == 50 else resnet.BasicBlock
    stages = resnet.ResNet.make_default_stages(depth, block_class=block, norm="BN")
    theirs = resnet.ResNet(resnet.BasicStem(norm="BN"), stages).state_dict()
    ours = torchvision_resnet_to_detectron2(
        getattr(torchvision.models, f"resnet{depth}")().state_dict()
    )
    assert {n: t.shape for n, t in ours.items() if not n.startswith("fc.")} == {
        n: t.shape for n, t in theirs.items()
    }


def test_kinds_of_names_are_told_apart():
    assert has_caffe2_names(["conv1_w", "lr"])
    assert not has_caffe2_names(["stem.conv1.weight", "some_w"])
    assert not has_caffe2_names(["weight", "bias"])
    assert not has_torchvision_resnet_names(["res2.0.conv1.weight"])
