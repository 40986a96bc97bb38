"""Detections of our ROI heads, and parts of them that a user replaces."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from small_cascades import POOLED, STRIDES, make_cascade, make_scene, naive_twin
from small_plugin import (
    EXITS,
    MASKS,
    SAME_KERNEL,
    assert_same_as_naive,
    assert_same_instances,
    assert_same_training,
    box_head,
    box_predictor,
    build_heads,
    decided,
    detect,
    features_of,
    losses_of,
    pooler,
    proposals_of,
    twins,
)

from cascade_det.core import RoIPooler

pytestmark = pytest.mark.needs_detectron2


def rows_seen(heads):
    """A list that the number of regions in every call of a box head is added to, with its stage."""
    calls = []
    for stage, head in enumerate(heads.box_head):
        head.register_forward_hook(
            lambda module, inputs, output, stage=stage: calls.append((stage, len(inputs[0])))
        )
    return calls


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


@pytest.mark.parametrize("suppression", ["soft_gaussian", "wbf"])
def test_suppression_is_that_of_the_core(suppression):
    options = ["MODEL.CASCADE.SUPPRESSION", suppression, "MODEL.CASCADE.SUPPRESSION_SIGMA", 0.3]
    heads, plain = (build_heads(options=own).eval() for own in (options, []))
    scene = make_scene()
    found = detect(heads, scene)
    cascade = make_cascade(
        pooler=RoIPooler(output_size=POOLED, strides=STRIDES),
        suppression=suppression,
        suppression_sigma=0.3,
    )
    cascade.load_state_dict(heads.state_dict())
    inputs = scene.features, scene.proposals, scene.image_sizes
    with torch.no_grad():
        wanted, _ = cascade.detect(*inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.boxes, rtol=1e-4, atol=1e-3)
        assert torch.equal(ours.pred_classes, theirs.classes)
    assert changed(found, detect(plain, scene))


def changed(before, after):
    return any(
        len(a) != len(b) or not torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        for a, b in zip(before, after, strict=True)
    )


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

    def test_regions_that_left_are_not_computed(self):
        heads, scene = build_heads(options=EXITS), make_scene()
        seen = rows_seen(heads)
        assert_same_as_naive(heads, scene)
        naive = naive_twin(heads.cascade).detect(scene.features, scene.proposals, scene.image_sizes)
        counts = [len(rows) for rows in naive.survivors]
        assert 41 == counts[0] > counts[1] > counts[2] > 0
        # One call for each stage: the images of a batch are computed together.
        assert seen == list(enumerate(counts))

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
    def test_an_image_of_nan_spoils_no_other(self, exits):
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
        # No region leaves at a threshold that rounding decides.
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


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
def test_a_pooler_that_is_replaced_is_followed(kind):
    both = twins()
    for heads in both:
        heads.box_pooler = pooler(kind)
    ours, theirs = (detect(heads.eval(), make_scene()) for heads in both)
    assert_same_instances(ours, theirs)
