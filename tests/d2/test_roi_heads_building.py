"""How our ROI heads are built from arguments and configurations, and what they refuse."""

import re

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    build_roi_heads,
)
from small_cascades import NUM_CLASSES, POOLED, STRIDES, make_scene
from small_plugin import (
    EXITS,
    SHAPES,
    THEIRS,
    assert_same_as_naive,
    assert_same_instances,
    box_predictor,
    build_heads,
    decided,
    detect,
    heads_cfg,
    losses_of,
    plain_arguments,
    pooler,
    twins,
)

from cascade_det.core import ExitPolicy
from cascade_det.d2 import EarlyExitCascadeROIHeads
from cascade_det.errors import ConfigError

pytestmark = pytest.mark.needs_detectron2


@ROI_BOX_HEAD_REGISTRY.register()
class MeanAndLinear(torch.nn.Module):
    """A box head that a user registered."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.linear = torch.nn.Linear(input_shape.channels, 5)
        self.output_shape = ShapeSpec(channels=5)

    def forward(self, pooled):
        return self.linear(pooled.mean(dim=(2, 3))).relu()


def without_own_keys():
    """A configuration without the keys of ``add_cascade_config``."""
    cfg = heads_cfg()
    del cfg["CASCADE"], cfg.MODEL["CASCADE"]
    return cfg


class TestConstruction:
    def test_with_plain_arguments(self):
        theirs = decided(CascadeROIHeads(**plain_arguments())).eval()
        ours = EarlyExitCascadeROIHeads(**plain_arguments(), pooler_kernel="torchvision").eval()
        ours.load_state_dict(theirs.state_dict())
        wanted = detect(theirs, make_scene())
        assert min(map(len, wanted)) > 5
        assert_same_instances(detect(ours, make_scene()), wanted)

    def test_own_arguments(self):
        exits = ExitPolicy(
            num_stages=3, thresholds=(0.7, 0.6), prune_thresholds=(0.1, 0.2), redundancy_iou=0.9
        )
        plain = EarlyExitCascadeROIHeads(
            **plain_arguments(), exits=exits, ensemble="last", stage_loss_weights=[1.0, 0.5, 0.25]
        ).eval()
        options = [*EXITS, "MODEL.CASCADE.ENSEMBLE", "last"]
        options += ["MODEL.CASCADE.STAGE_LOSS_WEIGHTS", (1.0, 0.5, 0.25)]
        from_cfg = build_heads(options=options)
        plain.load_state_dict(from_cfg.state_dict())
        found = detect(plain, make_scene())
        assert set(found[0].exit_stages.tolist()) == {0, 1, 2}
        assert_same_instances(found, detect(from_cfg, make_scene()))
        losses, expected = (losses_of(h, make_scene())[0] for h in (plain, from_cfg))
        assert losses == expected

    @pytest.mark.parametrize("conv", [0, 2])
    def test_parameters_are_detectron2s(self, conv):
        options = ["MODEL.ROI_BOX_HEAD.NUM_CONV", conv, "MODEL.ROI_BOX_HEAD.NORM", "BN"]
        ours, theirs = build_heads(options=options), build_heads(THEIRS, options)

        def described(tensors):
            return [(name, tensor.shape) for name, tensor in tensors]

        assert described(ours.state_dict().items()) == described(theirs.state_dict().items())
        wanted = described(theirs.named_parameters())
        assert described(ours.named_parameters()) == wanted
        assert described(ours.named_parameters(remove_duplicate=False)) == wanted
        names = [name for name, _ in theirs.named_modules()]
        assert [name for name, _ in ours.named_modules()] == [*names, "regime"]

    def test_one_seed_gives_detectron2s_weights(self):
        ours, theirs = build_heads(), build_heads(THEIRS)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name

    @pytest.mark.parametrize("given_keys", [{}, {"ENSEMBLE": "last"}])
    def test_nodes_that_lack_keys_have_defaults(self, given_keys):
        cfg = without_own_keys()
        if given_keys:
            cfg.MODEL.CASCADE = type(cfg)(given_keys)
        cfg.freeze()
        before = cfg.dump()
        heads = build_roi_heads(cfg, SHAPES)
        assert heads.cascade.exits is None
        assert heads.cascade.ensemble.name == given_keys.get("ENSEMBLE", "mean_probs")
        assert cfg.dump() == before

    def test_keys_that_were_new_when_they_were_merged(self, tmp_path):
        """As SAHI merges: no node of ours, but new keys allowed, which keeps values as text."""
        cfg = without_own_keys()
        cfg.set_new_allowed(True)
        file = tmp_path / "config.yaml"
        file.write_text(
            "MODEL: {CASCADE: {EXIT: {ENABLED: true, THRESHOLDS: '(0.7, 0.6)'}}}\n"
            "CASCADE: {EMA_DECAY: 0}\n"
        )
        cfg.merge_from_file(str(file))
        assert cfg.MODEL.CASCADE.EXIT.THRESHOLDS == "(0.7, 0.6)"
        exits = build_roi_heads(cfg, SHAPES).cascade.exits
        assert exits.thresholds == (0.7, 0.6)
        assert exits.prune_thresholds == (0.02, 0.02)

    @pytest.mark.parametrize(
        ("node", "complaint"),
        [
            ({"EXIT": {"TRESHOLDS": (0.7,)}}, "no key MODEL.CASCADE.EXIT.TRESHOLDS"),
            ({"EXIT": {"ENABLED": "perhaps"}}, "MODEL.CASCADE.EXIT.ENABLED is 'perhaps'"),
            ({"EXIT": None}, "MODEL.CASCADE.EXIT is None"),
        ],
    )
    def test_new_keys_that_are_wrong(self, node, complaint):
        cfg = without_own_keys()
        cfg.MODEL.CASCADE = type(cfg)(node)
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            build_roi_heads(cfg, SHAPES)

    def test_box_head_of_a_user(self):
        options = ["MODEL.ROI_BOX_HEAD.NAME", "MeanAndLinear"]
        ours, theirs = twins(options)
        assert {type(head) for head in ours.box_head} == {MeanAndLinear}
        assert_same_instances(detect(ours, make_scene()), detect(theirs, make_scene()))
        losses, _ = losses_of(ours, make_scene())
        sum(losses.values()).backward()
        assert all(head.linear.weight.grad.abs().sum() > 0 for head in ours.box_head)

    def test_box_heads_of_their_own_for_every_stage(self):
        options = ["MODEL.CASCADE.BOX_HEAD.NUM_FC", (1, 1, 2)]
        options += ["MODEL.CASCADE.BOX_HEAD.FC_DIM", (4, 8, 16)]
        heads = build_heads(options=options)
        widths = [[fc.out_features for fc in head.fcs] for head in heads.box_head]
        assert widths == [[4], [8], [16, 16]]
        assert [p.cls_score.in_features for p in heads.box_predictor] == [4, 8, 16]
        assert all(len(found) for found in detect(heads, make_scene()))

    def test_class_specific_boxes(self):
        heads = build_heads(options=["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, *EXITS])
        assert heads.box_predictor[0].bbox_pred.out_features == 4 * NUM_CLASSES
        assert_same_as_naive(heads, make_scene())

    @pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
    @pytest.mark.parametrize("samples", [0, 2])
    def test_poolers(self, kind, samples):
        options = ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind]
        options += ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", samples]
        ours, theirs = twins(options)
        assert_same_instances(detect(ours, make_scene()), detect(theirs, make_scene()))


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
            ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
            ("MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]),
            ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4]),
            ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((10.0, 10.0, 5.0, 5.0),)),
            ("MODEL.CASCADE.EXIT.THRESHOLDS", (0.9, 0.9, 0.9)),
            ("MODEL.CASCADE.ENSEMBLE", "median"),
        ],
    )
    def test_key(self, key, value):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            build_heads(options=[key, value])

    @pytest.mark.parametrize("option", ["use_sigmoid_ce", "use_fed_loss"])
    def test_class_loss(self, option):
        predictors = plain_arguments()["box_predictors"]
        setattr(predictors[1], option, True)
        with pytest.raises(ValueError, match=option):
            EarlyExitCascadeROIHeads(**plain_arguments(box_predictors=predictors))

    @pytest.mark.parametrize(
        ("argument", "make"),
        [
            ("box_pooler", lambda: pooler("ROIPool")),
            ("box_pooler", lambda: pooler("ROIAlignRotated")),
            ("box_pooler", lambda: pooler("ROIAlignV2", canonical_level=3)),
            ("proposal_matchers", lambda: [Matcher([0.3, 0.5], [0, -1, 1])] * 3),
            ("proposal_matchers", lambda: [Matcher([0.5], [0, 1], True)] * 3),
            ("proposal_matchers", lambda: [Matcher([0.5], [1, 0])] * 3),
        ],
    )
    def test_part(self, argument, make):
        with pytest.raises(ValueError, match=argument):
            EarlyExitCascadeROIHeads(**plain_arguments(**{argument: make()}))

    def test_another_box_transform(self):
        class Shifted(Box2BoxTransform):
            pass

        predictors = [box_predictor() for _ in range(3)]
        predictors[2].box2box_transform = Shifted((10.0, 10.0, 5.0, 5.0))
        with pytest.raises(ValueError, match="Shifted"):
            EarlyExitCascadeROIHeads(**plain_arguments(box_predictors=predictors))

    @pytest.mark.parametrize(
        "method", ["losses", "box_reg_loss", "inference", "predict_boxes", "predict_probs"]
    )
    def test_predictor_that_overrides(self, method):
        own = type("OwnPredictor", (FastRCNNOutputLayers,), {method: lambda self, *args: None})
        predictors = [box_predictor() for _ in range(3)]
        predictors[0].__class__ = own
        with pytest.raises(ValueError, match=f"OwnPredictor overrides {method}"):
            EarlyExitCascadeROIHeads(**plain_arguments(box_predictors=predictors))

    def test_predictor_of_another_kind(self):
        predictors = [box_predictor(), box_predictor(), torch.nn.Linear(12, 4)]
        with pytest.raises(ValueError, match="Linear overrides losses, box_reg_loss"):
            EarlyExitCascadeROIHeads(**plain_arguments(box_predictors=predictors))

    @pytest.mark.parametrize(
        "method", ["_run_stage", "_match_and_label_boxes", "_create_proposals_from_boxes"]
    )
    def test_subclass_that_overrides(self, method):
        own = type("OwnHeads", (EarlyExitCascadeROIHeads,), {method: lambda self, *args: None})
        with pytest.raises(ValueError, match=f"OwnHeads overrides {method}"):
            own(**plain_arguments())


class ClippedPooler(ROIPooler):
    """One that a user has derived."""


def test_a_pooler_of_the_users_own_is_refused():
    theirs = ClippedPooler(POOLED, [1 / stride for stride in STRIDES], 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="ClippedPooler"):
        EarlyExitCascadeROIHeads(**plain_arguments(box_pooler=theirs))
