"""Losses, gradients and logged scalars of our ROI heads, against Detectron2's own."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.utils.events import EventStorage
from small_cascades import make_scene
from small_plugin import (
    SAME_KERNEL,
    assert_same_instances,
    assert_same_training,
    box_predictor,
    build_heads,
    detect,
    features_of,
    losses_of,
    proposals_of,
    targets_of,
    twins,
)

pytestmark = pytest.mark.needs_detectron2


class TestTraining:
    @pytest.mark.parametrize("loss_weight", [0.5, {"loss_cls": 2.0}, {"loss_box_reg": 3.0}])
    def test_loss_weights_of_predictors(self, loss_weight):
        ours, theirs = twins()
        for heads in (ours, theirs):
            heads.box_predictor[1] = box_predictor(loss_weight=loss_weight)
        ours.load_state_dict(theirs.state_dict())
        assert_same_training(ours, theirs, make_scene())

    @pytest.mark.parametrize("loss", ["smooth_l1", "giou", "diou", "ciou"])
    def test_keys_of_the_box_loss(self, loss):
        options = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.5]
        options += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss]
        options += ["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5]
        ours, theirs = twins(options)
        (losses, _), (expected, _) = (losses_of(h, make_scene()) for h in (ours, theirs))
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=0, msg=name)

    def test_no_foreground(self):
        ours, theirs = twins(["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False])
        scene = make_scene()
        scene.gt_boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 2
        scene.gt_classes = [torch.tensor([1])] * 2
        assert_same_training(ours, theirs, scene)
        losses, logged = losses_of(ours, scene)
        assert losses["loss_box_reg_stage0"] == 0
        assert "stage0/iou_before" not in logged

    @settings(max_examples=25)
    @given(
        counts=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=3),
        append=st.booleans(),
        seed=st.integers(0, 999),
    )
    @example(counts=[(24, 0), (17, 0)], append=False, seed=0)
    @example(counts=[(24, 4), (17, 0)], append=False, seed=0)
    @example(counts=[(0, 4), (0, 3)], append=True, seed=0)
    @example(counts=[(0, 4), (0, 3)], append=False, seed=0)
    @example(counts=[(0, 4), (17, 3)], append=False, seed=0)
    def test_any_batch_is_detectron2s(self, counts, append, seed):
        ours, theirs = twins(["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", append])
        scene = make_scene(
            seed=seed,
            num_proposals=tuple(n for n, _ in counts),
            num_objects=tuple(n for _, n in counts),
            image_sizes=((96, 128), (80, 100), (120, 64))[: len(counts)],
        )
        assert_same_instances(detect(ours, scene), detect(theirs, scene))
        if sum(n for pair in counts for n in pair):
            assert_same_training(ours, theirs, scene)

    def test_features_of_nan_give_losses_of_nan_and_a_count(self):
        heads, scene = build_heads(options=SAME_KERNEL), make_scene()
        scene.features[0][0] = torch.nan
        losses, logged = losses_of(heads, scene)
        assert bool(losses["loss_cls_stage0"].isnan())
        assert logged["stage0/nonfinite_boxes"] > 0


def test_an_image_without_objects_may_have_classes_of_any_type():
    scene = make_scene(num_objects=(4, 0))
    losses = []
    for heads in twins():
        targets = targets_of(scene)
        targets[1].gt_classes = torch.tensor([])
        torch.manual_seed(0)
        with EventStorage():
            found = heads.train()(None, features_of(scene), proposals_of(scene), targets)[1]
        losses.append(found)
    torch.testing.assert_close(*losses)
