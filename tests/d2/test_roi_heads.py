"""Our ROI heads as a part of Detectron2: how they are built, refused, trained and asked."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    build_roi_heads,
)
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from small_cascades import CHANNELS, NUM_CLASSES, POOLED, STRIDES, make_scene, naive_twin
from small_plugin import (
    EXITS,
    MASKS,
    NAMES,
    SAME_KERNEL,
    SHAPES,
    THEIRS,
    assert_same_instances,
    build_heads,
    decided,
    detect,
    features_of,
    heads_cfg,
    proposals_of,
    targets_of,
    twins,
)

from cascade_det.core import ExitPolicy
from cascade_det.d2 import EarlyExitCascadeROIHeads
from cascade_det.errors import ConfigError

pytestmark = pytest.mark.needs_detectron2

POOLED_SHAPE = ShapeSpec(channels=CHANNELS, height=POOLED, width=POOLED)


@ROI_BOX_HEAD_REGISTRY.register()
class MeanAndLinear(torch.nn.Module):
    """A user's own box head."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.linear = torch.nn.Linear(input_shape.channels, 5)
        self.output_shape = ShapeSpec(channels=5)

    def forward(self, pooled):
        return self.linear(pooled.mean(dim=(2, 3))).relu()


def box_head(conv_dims=(), fc_dims=(12,)):
    return FastRCNNConvFCHead(POOLED_SHAPE, conv_dims=list(conv_dims), fc_dims=list(fc_dims))


def box_predictor(weights=(10.0, 10.0, 5.0, 5.0), num_classes=NUM_CLASSES, **changes):
    defaults = {"cls_agnostic_bbox_reg": True, "test_score_thresh": 0.05}
    return FastRCNNOutputLayers(
        ShapeSpec(channels=12),
        box2box_transform=Box2BoxTransform(weights),
        num_classes=num_classes,
        **(defaults | changes),
    )


def plain_arguments(**changes):
    """What Detectron2's ``CascadeROIHeads`` takes, too."""
    weights = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
    return {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "box_in_features": NAMES,
        "box_pooler": pooler("ROIAlignV2"),
        "box_heads": [box_head() for _ in weights],
        "box_predictors": [box_predictor(stage) for stage in weights],
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)],
    } | changes


def pooler(kind, **changes):
    return ROIPooler(POOLED, [1 / stride for stride in STRIDES], 0, kind, **changes)


def without_own_keys():
    """A configuration as one has it who never called ``add_cascade_config``."""
    cfg = heads_cfg()
    del cfg["CASCADE"], cfg.MODEL["CASCADE"]
    return cfg


def losses_of(heads, scene, *, seed=0):
    """Losses, with what was put into the event storage."""
    torch.manual_seed(seed)
    with EventStorage() as storage:
        _, losses = heads.train()(None, features_of(scene), proposals_of(scene), targets_of(scene))
        return losses, {name: value for name, (value, _) in storage.latest().items()}


def rows_seen(heads):
    """A list that the number of regions in every call of a box head is added to, with its stage."""
    calls = []
    for stage, head in enumerate(heads.box_head):
        head.register_forward_hook(
            lambda module, inputs, output, stage=stage: calls.append((stage, len(inputs[0])))
        )
    return calls


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


class TestOneSetOfModules:
    @pytest.fixture
    def heads(self):
        return build_heads(options=EXITS)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))]
    )
    def test_a_copy_is_whole_and_apart(self, heads, duplicate):
        losses_of(heads, make_scene())  # a step leaves tensors behind
        wanted = detect(heads.eval(), make_scene())
        twin = duplicate(heads)
        assert_same_instances(detect(twin, make_scene()), wanted)
        assert twin.cascade.exits.thresholds == (0.7, 0.6)
        with torch.no_grad():
            twin.box_predictor[0].cls_score.weight.zero_()
        assert [len(x) for x in detect(twin, make_scene())] != [len(x) for x in wanted]
        assert_same_instances(detect(heads, make_scene()), wanted)

    def test_conversion_reaches_the_cascade(self, heads):
        heads.to(torch.float64)
        assert {value.dtype for value in heads.cascade.parameters()} == {torch.float64}
        heads.to("meta")
        assert {value.device.type for value in heads.cascade.parameters()} == {"meta"}

    @pytest.mark.parametrize("stage", range(3))
    def test_replaced_head(self, heads, stage):
        before = detect(heads, make_scene())
        heads.box_head[stage] = box_head(conv_dims=[8])
        assert_same_as_naive(heads, make_scene())
        assert changed(before, detect(heads, make_scene()))

    def test_replaced_list_of_heads(self, heads):
        before = detect(heads, make_scene())
        heads.box_head = torch.nn.ModuleList(box_head(conv_dims=[8]) for _ in range(3))
        assert_same_as_naive(heads, make_scene())
        assert changed(before, detect(heads, make_scene()))

    def test_predictors_of_another_number_of_classes(self):
        ours, theirs = twins()
        weights = [(10.0, 10.0, 5.0, 5.0), (5.0, 5.0, 2.0, 2.0), (30.0, 30.0, 15.0, 15.0)]
        for heads in (ours, theirs):
            heads.num_classes = 5
            for stage, deltas in enumerate(weights):
                heads.box_predictor[stage] = box_predictor(deltas, num_classes=5)
            heads.proposal_matchers[1] = Matcher([0.55], [0, 1])
            torch.manual_seed(1)
            decided(heads)
        assert_same_instances(detect(ours, make_scene()), detect(theirs, make_scene()))
        assert_same_training(ours, theirs, make_scene())
        assert ours.cascade.num_classes == 5

    def test_replaced_predictor_is_looked_at(self, heads):
        heads.box_predictor[1] = box_predictor(use_sigmoid_ce=True)
        with pytest.raises(ValueError, match="use_sigmoid_ce"):
            detect(heads, make_scene())

    def test_thresholds_of_the_last_predictor(self):
        ours, theirs = twins()
        before = detect(ours, make_scene())
        for heads in (ours, theirs):
            heads.box_predictor[-1].test_score_thresh = 0.3
            heads.box_predictor[-1].test_nms_thresh = 0.2
            heads.box_predictor[-1].test_topk_per_image = 7
        found = detect(ours, make_scene())
        assert [len(x) for x in found] == [7, 7]
        assert_same_instances(found, detect(theirs, make_scene()))
        assert min(map(len, before)) > 7


def changed(before, after):
    return any(
        len(a) != len(b) or not torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        for a, b in zip(before, after, strict=True)
    )


def assert_same_as_naive(heads, scene):
    """Against a loop over images and regions that shares no code."""
    found = detect(heads, scene)
    naive = naive_twin(heads.cascade).detect(scene.features, scene.proposals, scene.image_sizes)
    for instances, wanted in zip(found, naive.detections, strict=True):
        assert instances.pred_classes.tolist() == [d.label for d in wanted]
        assert instances.exit_stages.tolist() == [d.exit_stage for d in wanted]
        assert instances.scores.tolist() == pytest.approx([d.score for d in wanted], abs=1e-4)
        boxes = torch.tensor([d.box for d in wanted]).view(-1, 4)
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-2)


def assert_same_training(ours, theirs, scene):
    """Losses and gradients of Detectron2's own heads, to the last bit; and what both log."""
    (losses, logged), (expected, their_log) = (losses_of(h, scene) for h in (ours, theirs))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    for heads, values in ((ours, losses), (theirs, expected)):
        heads.zero_grad()
        sum(values.values()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    assert logged.keys() >= their_log.keys()
    for name, value in their_log.items():
        assert logged[name] == pytest.approx(value), name


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

    def test_scalars(self):
        scene = make_scene()
        _, logged = losses_of(build_heads(), scene)
        for stage in range(3):
            prefix = f"stage{stage}"
            samples = [logged[f"{prefix}/roi_head/num_{kind}_samples"] for kind in ("fg", "bg")]
            # 16 are sampled of each image; of those that have no area left, a few go.
            assert 8 < sum(samples) <= 16
            assert 0 <= logged[f"{prefix}/fast_rcnn/cls_accuracy"] <= 1
            assert logged[f"{prefix}/nonfinite_boxes"] == 0
            # Of a stage without foreground there is nothing more to say.
            about_foreground = ("iou_before", "iou_after", "fast_rcnn/fg_cls_accuracy")
            assert {f"{prefix}/{name}" in logged for name in about_foreground} == {samples[0] > 0}
            if samples[0]:
                assert (0.5, 0.6, 0.7)[stage] <= logged[f"{prefix}/iou_before"] <= 1
                assert 0 <= logged[f"{prefix}/iou_after"] <= 1
        assert logged["stage0/roi_head/num_fg_samples"] == logged["roi_head/num_fg_samples"] > 0

    def test_iou_of_boxes_that_stay(self):
        heads = build_heads()
        for predictor in heads.box_predictor:
            torch.nn.init.zeros_(predictor.bbox_pred.weight)
            torch.nn.init.zeros_(predictor.bbox_pred.bias)
        scene = make_scene()
        scene.proposals = [boxes.clone() for boxes in scene.gt_boxes]
        _, logged = losses_of(heads, scene)
        for stage in range(3):
            assert logged[f"stage{stage}/iou_before"] == pytest.approx(1.0)
            assert logged[f"stage{stage}/iou_after"] == pytest.approx(1.0, abs=1e-4)
            assert logged[f"stage{stage}/roi_head/num_bg_samples"] == 0

    @pytest.mark.parametrize(
        ("proposals", "objects"),
        [((24, 17), (0, 0)), ((24, 17), (4, 0)), ((0, 0), (4, 3)), ((0, 17), (4, 3))],
    )
    @pytest.mark.parametrize("append", [True, False])
    def test_empty_parts(self, proposals, objects, append):
        ours, theirs = twins(["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", append])
        scene = make_scene(num_proposals=proposals, num_objects=objects)
        assert_same_training(ours, theirs, scene)

    def test_nothing_at_all(self):
        scene = make_scene(num_proposals=(0, 0), num_objects=(0, 0))
        heads = build_heads()
        losses, logged = losses_of(heads, scene)
        assert all(value == 0 for value in losses.values())
        sum(losses.values()).backward()
        assert all(torch.count_nonzero(value.grad) == 0 for value in heads.parameters())
        assert logged["stage2/roi_head/num_fg_samples"] == 0

    def test_no_foreground(self):
        ours, theirs = twins(["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False])
        scene = make_scene()
        scene.gt_boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 2
        scene.gt_classes = [torch.tensor([1])] * 2
        assert_same_training(ours, theirs, scene)
        losses, logged = losses_of(ours, scene)
        assert losses["loss_box_reg_stage0"] == 0
        assert "stage0/iou_before" not in logged

    @settings(max_examples=25, deadline=None)
    @given(
        counts=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=3),
        seed=st.integers(0, 999),
    )
    def test_any_batch_is_detectron2s(self, counts, seed):
        ours, theirs = twins()
        scene = make_scene(
            seed=seed,
            num_proposals=tuple(n for n, _ in counts),
            num_objects=tuple(n for _, n in counts),
            image_sizes=((96, 128), (80, 100), (120, 64))[: len(counts)],
        )
        assert_same_instances(detect(ours, scene), detect(theirs, scene))
        if sum(n for pair in counts for n in pair):
            assert_same_training(ours, theirs, scene)

    def test_features_that_are_nan(self):
        heads, scene = build_heads(options=SAME_KERNEL), make_scene()
        scene.features[0][0] = torch.nan
        losses, logged = losses_of(heads, scene)
        assert bool(losses["loss_cls_stage0"].isnan())
        assert logged["stage0/nonfinite_boxes"] > 0


class TestInference:
    def test_fields(self):
        scene = make_scene()
        for instances, size in zip(
            detect(build_heads(options=EXITS), scene), scene.image_sizes, strict=True
        ):
            assert set(instances.get_fields()) == {
                "pred_boxes",
                "scores",
                "pred_classes",
                "exit_stages",
            }
            assert instances.image_size == size
            assert isinstance(instances.pred_boxes, Boxes)
            assert instances.scores.dtype == torch.float32
            assert instances.pred_classes.dtype == instances.exit_stages.dtype == torch.int64
            assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
            corners = instances.pred_boxes.tensor
            assert bool((corners >= 0).all())
            assert bool((corners <= torch.tensor([*size[::-1], *size[::-1]])).all())

    def test_without_exits_every_region_saw_the_last_stage(self):
        for instances in detect(build_heads(), make_scene()):
            assert set(instances.exit_stages.tolist()) == {2}

    def test_regions_that_left_are_not_computed(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        seen = rows_seen(heads)
        assert_same_as_naive(heads, scene)
        naive = naive_twin(heads.cascade).detect(scene.features, scene.proposals, scene.image_sizes)
        counts = [len(rows) for rows in naive.survivors]
        assert 41 == counts[0] > counts[1] > counts[2] > 0
        # One call for each stage: the images of a batch are computed together.
        assert seen == list(enumerate(counts))

    def test_when_all_have_left_the_rest_does_not_run(self):
        options = [*EXITS, "MODEL.CASCADE.EXIT.THRESHOLDS", (1e-6,)]
        options += ["MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.0,)]
        heads = build_heads(options=options)
        seen = rows_seen(heads)
        found = detect(heads, make_scene())
        assert seen == [(0, 41)]
        assert {stage for x in found for stage in x.exit_stages.tolist()} == {0}

    def test_exits_are_for_inference(self):
        without, with_exits = build_heads(), build_heads(options=EXITS)
        losses, expected = (losses_of(h, make_scene())[0] for h in (with_exits, without))
        assert losses == expected

    def test_exit_rates_while_a_run_is_evaluated(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        with EventStorage() as storage:
            detect(heads, scene)
            logged = {name: value for name, (value, _) in storage.latest().items()}
        naive = naive_twin(heads.cascade).detect(scene.features, scene.proposals, scene.image_sizes)
        counts = [len(rows) for rows in naive.survivors]
        assert logged == {
            f"stage{stage}/exit_rate": pytest.approx(1 - counts[stage + 1] / counts[stage])
            for stage in range(2)
        }

    @pytest.mark.parametrize("exits", [[], EXITS])
    def test_empty_proposals(self, exits):
        heads = build_heads(options=exits)
        scene = make_scene(num_proposals=(0, 0))
        for instances in detect(heads, scene):
            assert len(instances) == 0
            assert instances.pred_boxes.tensor.shape == (0, 4)
            assert instances.exit_stages.dtype == torch.int64
        with_one = detect(heads, make_scene(num_proposals=(0, 17)))
        assert [len(x) > 0 for x in with_one] == [False, True]

    @pytest.mark.parametrize("exits", [[], EXITS])
    def test_one_image_of_nan_spoils_no_other(self, exits):
        heads, scene = build_heads(options=[*exits, *SAME_KERNEL]), make_scene()
        wanted = detect(heads, scene)[1]
        for level in scene.features:
            level[0] = torch.nan
        broken, other = detect(heads, scene)
        assert len(broken) == 0
        assert_same_instances([other], [wanted])

    def test_a_box_of_nan_spoils_no_other(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        scene.proposals[0] = scene.proposals[0][:23]
        wanted = detect(heads, scene)
        scene.proposals[0] = torch.cat([scene.proposals[0], torch.full((1, 4), torch.nan)])
        assert_same_instances(detect(heads, scene), wanted, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_masks_for_given_boxes(self, autocast):
        ours, theirs = twins(MASKS)
        scene = make_scene()
        found = detect(ours, scene)
        assert found[0].pred_masks.shape == (len(found[0]), 1, 28, 28)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = [copy.deepcopy(x) for x in found]
            for instances in given:
                instances.remove("pred_masks")
            again = ours.forward_with_given_boxes(features_of(scene), given)
            wanted = theirs.forward_with_given_boxes(features_of(scene), copy.deepcopy(given))
        assert_same_instances(again, wanted)
        # What was given stays beside the masks.
        assert torch.equal(again[0].exit_stages, found[0].exit_stages)
        if not autocast:
            assert_same_instances(again, found)


class TestAutocast:
    def test_inference_is_close(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        # Nobody leaves at a threshold that rounding decides about.
        heads.exits = None
        wanted = detect(heads, scene)
        with torch.autocast("cpu", torch.bfloat16):
            found = detect(heads, scene)
        for ours, exact in zip(found, wanted, strict=True):
            assert ours.scores.dtype == ours.pred_boxes.tensor.dtype == torch.float32
            best = exact.scores[:3]
            torch.testing.assert_close(ours.scores[:3], best, rtol=0.05, atol=0.02)
        assert not torch.equal(found[0].scores[:5], wanted[0].scores[:5])

    def test_exits_and_training_are_finite(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        exact, _ = losses_of(heads, scene)
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = losses_of(heads, scene)
            found = detect(heads.eval(), scene)
        for name, value in losses.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.05, msg=name)
        sum(losses.values()).backward()
        assert all(bool(value.grad.isfinite().all()) for value in heads.parameters())
        assert all(bool(x.pred_boxes.tensor.isfinite().all()) for x in found)


def test_detections_have_detectron2s_gradients():
    scene, gradients = make_scene(), []
    for heads in twins():
        found, _ = heads.eval()(None, features_of(scene), proposals_of(scene))
        sum(x.scores.sum() + x.pred_boxes.tensor.sum() for x in found).backward()
        gradients.append({name: p.grad for name, p in heads.named_parameters()})
    ours, theirs = gradients
    assert {k for k, v in ours.items() if v is None} == {k for k, v in theirs.items() if v is None}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


class ClippedPooler(ROIPooler):
    """One that a user has derived."""


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
def test_a_pooler_that_is_replaced_is_followed(kind):
    both = twins()
    for heads in both:
        heads.box_pooler = pooler(kind)
    ours, theirs = (detect(heads.eval(), make_scene()) for heads in both)
    assert_same_instances(ours, theirs)


def test_a_pooler_of_the_users_own_is_refused():
    theirs = ClippedPooler(POOLED, [1 / stride for stride in STRIDES], 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="ClippedPooler"):
        EarlyExitCascadeROIHeads(**plain_arguments(box_pooler=theirs))


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
