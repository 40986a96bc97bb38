"""Export by tracing, as Detectron2 documents it for cascades: of fixed depth, for any image."""

import io

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.export import TracingAdapter
from detectron2.structures import Boxes, Instances
from detectron2.utils.testing import assert_instances_allclose
from small_cascades import make_scene
from small_plugin import (
    EXITS,
    MASKS,
    NAMES,
    build_detector,
    build_heads,
    make_image,
    model_cfg,
)

pytestmark = [
    pytest.mark.needs_detectron2,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TRACED_SIZE = (96, 128)
# Larger, smaller and turned: each has a border that clips where another image goes on.
SIZES = [(200, 150), (50, 70), (128, 96)]
# Proposals by the image, not as many as are allowed.
PROPOSALS = ["MODEL.RPN.POST_NMS_TOPK_TEST", 1000, "MODEL.RPN.NMS_THRESH", 0.3]


def infer(model, image):
    return model.inference([{"image": image}], do_postprocess=False)[0]


def infer_and_postprocess(model, image):
    inputs = [{"image": image, "height": image.shape[1], "width": image.shape[2]}]
    return model.inference(inputs, do_postprocess=True)[0]["instances"]


def traced(adapter):
    """The recorded graph, once saved and loaded: what is deployed."""
    buffer = io.BytesIO()
    graph = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    torch.jit.save(graph, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def count_proposals(model, image):
    counts = []
    hook = model.roi_heads.box_head[0].register_forward_hook(
        lambda module, inputs, output: counts.append(len(inputs[0]))
    )
    with torch.no_grad():
        infer(model, image)
    hook.remove()
    return counts[0]


OTHER_CASCADE = [
    *("MODEL.CASCADE.ENSEMBLE", "last_boxes"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
]


STAGE_MASKS = [*MASKS, "MODEL.CASCADE.MASK.STAGES", "every"]


@pytest.mark.parametrize(
    ("options", "inference"),
    [
        ([], infer),
        ([], infer_and_postprocess),
        (MASKS, infer),
        (STAGE_MASKS, infer),
        (["MODEL.CASCADE.POOLER_KERNEL", "bags"], infer),
        (OTHER_CASCADE, infer),
    ],
    ids=["boxes", "postprocessed", "masks", "stage masks", "bags", "other cascade"],
)
def test_graph_is_the_model_on_images_of_other_sizes(options, inference):
    model = build_detector(model_cfg(options=[*PROPOSALS, *options]))
    for name, weight in model.roi_heads.named_parameters():
        if "mask_head" in name and name.endswith("predictor.weight"):
            torch.nn.init.normal_(weight)
    adapter = TracingAdapter(model, make_image(TRACED_SIZE), inference)
    graph = traced(adapter)
    counts = [count_proposals(model, make_image(size)) for size in [TRACED_SIZE, *SIZES]]
    assert min(counts[1:]) < counts[0] < max(counts[1:])
    both_borders = []
    for size in SIZES:
        wanted = adapter.outputs_schema(adapter(make_image(size)))
        found = adapter.outputs_schema(graph(make_image(size)))
        # Neither ties nor a place where any box would do.
        assert len(wanted) > 10
        assert len(set(wanted.scores.tolist())) == len(wanted)
        assert wanted.scores.max() - wanted.scores.min() > 0.1
        far_corners = wanted.pred_boxes.tensor[:, 2:].max(dim=0).values.tolist()
        at_border = [far == limit for far, limit in zip(far_corners, size[::-1], strict=True)]
        assert any(at_border)
        both_borders.append(at_border)
        assert wanted.has("pred_masks") == (options in (MASKS, STAGE_MASKS))
        assert not wanted.has("pred_masks") or wanted.pred_masks.std() > 0.1
        assert_instances_allclose(found, wanted, rtol=1e-4, size_as_tensor=True)
        torch.testing.assert_close(found.exit_stages, torch.full_like(wanted.pred_classes, 2))
    assert all(map(any, zip(*both_borders, strict=True)))


def heads_on(heads, sizes):
    """A function of maps and boxes of one image, for a tracer."""

    def inference(model, p2, p3, boxes):
        proposals = [Instances(sizes, proposal_boxes=Boxes(boxes))]
        return heads(None, dict(zip(NAMES, (p2, p3), strict=True)), proposals)[0][0]

    return inference


@pytest.mark.parametrize("traced_with", [0, 1, 24])
def test_heads_traced_with_one_number_of_proposals_take_any(traced_with):
    heads, scene = (
        build_heads(),
        make_scene(num_proposals=(24,), num_objects=(4,), image_sizes=((240, 320),)),
    )
    (boxes,) = scene.proposals
    adapter = TracingAdapter(
        heads, (*scene.features, boxes[:traced_with]), heads_on(heads, (240, 320))
    )
    graph = traced(adapter)
    for count in (0, 1, 10, 24):
        wanted = adapter(*scene.features, boxes[:count])
        found = graph(*scene.features, boxes[:count])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(wanted[0]) > 5


def test_exits_are_left_out_and_that_is_said():
    with_exits, without = build_heads(options=EXITS), build_heads()
    scene = make_scene(num_proposals=(24,), num_objects=(4,), image_sizes=((240, 320),))
    inputs = (*scene.features, *scene.proposals)
    adapter = TracingAdapter(with_exits, inputs, heads_on(with_exits, (240, 320)))
    with pytest.warns(UserWarning, match="A traced cascade has no exits"):
        found = torch.jit.trace(adapter, inputs)(*inputs)
    wanted = TracingAdapter(without, inputs, heads_on(without, (240, 320)))(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Outside the tracer regions leave as before.
    stages = adapter.outputs_schema(adapter(*inputs)).exit_stages
    assert set(stages.tolist()) == {0, 1, 2}


def test_graph_has_no_device_of_its_own():
    heads = build_heads()
    scene = make_scene(num_proposals=(24,), num_objects=(4,), image_sizes=((240, 320),))
    inputs = (*scene.features, *scene.proposals)
    graph = traced(TracingAdapter(heads, inputs, heads_on(heads, torch.tensor([240, 320]))))
    recorded = graph.inlined_graph
    nodes = recorded.findAllNodes("aten::to")
    assert len(nodes) > 5
    assert not any(moves_it(node) for node in nodes)


def moves_it(node):
    """Whether a node brings a tensor to a device that was written into the graph."""
    inputs = [(value.type().kind(), value.node().kind()) for value in node.inputs()]
    return ("DeviceObjType", "prim::Constant") in inputs
