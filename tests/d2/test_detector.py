"""A model of Detectron2 as the engine knows a detector."""

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from cascade_det import standalone
from cascade_det.core import PartTimer
from cascade_det.d2.detector import Detector

pytestmark = pytest.mark.needs_detectron2

PLAIN = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "VIS_PERIOD", "3"]
NO_EXITS = ["MODEL.CASCADE.EXIT.ENABLED", "False"]
OWN_CASCADE = [*NO_EXITS, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
STANDARD = [*NO_EXITS, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]


@pytest.fixture
def build(make_cfg):
    def model(*options):
        torch.manual_seed(0)
        built = build_model(make_cfg(*PLAIN, *options)).eval()
        for name, parameter in built.named_parameters():
            if "cls_score.weight" in name:
                torch.nn.init.normal_(parameter, std=2.0)
        return built

    return model


@pytest.fixture
def batch():
    """Two images, the second of which was resized, with objects."""
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for size, original in (((64, 96), {}), ((64, 80), {"height": 128, "width": 160})):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0]])
        truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([1, 4]))
        inputs.append({"image": image, "instances": truth, **original})
    return inputs


@pytest.mark.parametrize("fast", ["False", "True"])
def test_a_call_is_the_same_with_one_of_another_thread_between_its_steps(build, batch, fast):
    detector = Detector(build("MODEL.CASCADE.FAST.ENABLED", fast))
    detector.detect(batch)  # fast heads are there from then on
    others = []

    def call(inputs):
        timer = PartTimer()
        output = detector.detect(inputs, stages=True, timer=timer)
        return output, output.stats.milliseconds is timer.milliseconds

    alone = [call(batch), call(batch[1:])]
    heads = detector.model.roi_heads
    with ThreadPoolExecutor(1) as pool:

        def between(*_):
            if threading.current_thread() is threading.main_thread():
                others.append(pool.submit(call, batch[1:]).result())

        # The last one stands where the heads are done and their caller is not.
        hooks = [p.register_forward_hook(between) for p in (detector.cascade.pooler, heads)]
        mine = call(batch)
    for hook in hooks:
        hook.remove()
    assert others
    for (output, is_own), (wanted, _) in [(mine, alone[0]), *((o, alone[1]) for o in others)]:
        assert is_own
        assert output.stats == replace(wanted.stats, milliseconds=output.stats.milliseconds)
        for found, expected in zip(output.detections, wanted.detections, strict=True):
            assert torch.equal(found.boxes, expected.boxes)
            assert torch.equal(found.scores, expected.scores)


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, copy.deepcopy(dict(model.named_buffers()))


@pytest.mark.parametrize("exits", ["True", "False"])
def test_detections_are_those_of_the_model(build, batch, exits):
    model = build("MODEL.CASCADE.EXIT.ENABLED", exits)
    detector = Detector(model)
    assert detector.has_stages
    timer = PartTimer()
    output = detector.detect(batch, stages=True, timer=timer)
    assert {"preprocess", "backbone", "rpn", "stage0", "postprocess"} <= timer.milliseconds.keys()
    with torch.no_grad():
        expected = model(batch)
    for found, own, wanted in zip(output.detections, detector.outputs, expected, strict=True):
        instances = wanted["instances"]
        assert len(instances) > 3
        assert torch.equal(found.boxes, instances.pred_boxes.tensor)
        assert torch.equal(found.scores, instances.scores)
        assert torch.equal(found.classes, instances.pred_classes)
        assert torch.equal(found.exit_stages, instances.exit_stages)
        assert own["instances"].image_size == instances.image_size
    assert [instances["instances"].image_size for instances in expected] == [(64, 96), (128, 160)]
    assert len(output.stages) == 3
    if exits == "False":
        for image, found in enumerate(output.detections):
            assert torch.equal(output.stages[-1].detections[image].boxes, found.boxes)
    parts = dict(timer.milliseconds)
    with torch.no_grad():
        model(batch)
    assert timer.milliseconds == parts


@pytest.mark.parametrize("options", [OWN_CASCADE, STANDARD])
def test_a_model_without_our_heads_is_one_part(build, batch, options):
    model = build(*options)
    detector, timer = Detector(model), PartTimer()
    assert not detector.has_stages
    output = detector.detect(batch, timer=timer)
    assert list(timer.milliseconds) == ["model"]
    assert output.stats.entered == []
    with torch.no_grad():
        expected = model(batch)
    for found, wanted in zip(output.detections, expected, strict=True):
        assert torch.equal(found.boxes, wanted["instances"].pred_boxes.tensor)
        assert not found.exit_stages.any()


@pytest.mark.parametrize("options", [[], OWN_CASCADE, STANDARD])
def test_losses_are_those_of_training_but_leave_no_trace(build, batch, options):
    """Of a model whose norms are frozen, since others see the batch in training alone."""
    model = build(*options, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")
    before = state_of(model)
    torch.manual_seed(3)
    with EventStorage() as storage:
        losses = Detector(model).losses(batch)
        assert not storage.histories()
        assert not storage._vis_data
    assert state_of(model)[0] == before[0]
    model.train()
    torch.manual_seed(3)
    with EventStorage():
        expected = model(batch)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name


def test_losses_change_no_statistics_of_norms(build, batch):
    model = build()
    modes, buffers = state_of(model)
    assert any("running_mean" in name for name in buffers)
    with torch.no_grad():
        Detector(model).losses(batch)
    assert state_of(model)[0] == modes
    for name, value in state_of(model)[1].items():
        assert torch.equal(value, buffers[name]), name


BN = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ([], "float32"),
        (STANDARD, "float32"),
        (["ENABLED", "True", "DTYPE", "float32"], "float32"),
        (["ENABLED", "True", "DTYPE", "bfloat16"], "bfloat16: roi_heads; float32: all before"),
    ],
)
def test_the_type_that_is_reported_is_the_one_that_runs(build, more, dtype):
    keys = [x if "." in x or i % 2 else f"MODEL.CASCADE.FAST.{x}" for i, x in enumerate(more)]
    detector = Detector(build(*keys).train())
    assert detector.dtype == dtype
    assert detector.model.training


def test_the_types_of_other_models_are_those_of_their_weights(build):
    model = build(*OWN_CASCADE)
    model.backbone.to(torch.bfloat16)
    names = "proposal_generator, roi_heads"
    assert Detector(model).dtype == f"bfloat16: backbone; float32: {names}"
    assert Detector(model.to(torch.float16)).dtype == "float16"


@pytest.mark.parametrize("name", ["losses", "detect", "set_exits", "cascade_inputs"])
def test_signatures_are_those_of_the_standalone_detector(name):
    ours, theirs = (
        inspect.signature(inspect.unwrap(getattr(detector, name)))
        for detector in (Detector, standalone.Detector)
    )
    assert ours == theirs
