"""What the detectors of both hosts have in common: their interface, modes and refusals."""

import copy

import pytest
import torch

from cascade_det.core import PartTimer
from cascade_det.evaluation import agreement_loss
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.monitoring.shadow import ShadowRules

BN = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
STANDARD = ["MODEL.CASCADE.EXIT.ENABLED", "False", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]


@pytest.fixture
def build(host, make_cfg, build_model):
    """``build(*options)``: the detector, with scores that differ."""

    def make(*options):
        torch.manual_seed(0)
        model = build_model(make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *BN, *options))
        for name, parameter in model.named_parameters():
            if "cls_score.weight" in name:
                torch.nn.init.normal_(parameter, std=2.0)
        if host.name == "standalone":
            return model.eval()
        from cascade_det.d2.detector import Detector

        return Detector(model).eval()

    return make


@pytest.fixture
def batch(host):
    """Two images with objects, the second of which was resized."""
    generator = torch.Generator().manual_seed(1)
    boxes, classes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0]]), [1, 4]
    samples = []
    for size, original in (((64, 96), {}), ((64, 80), {"height": 128, "width": 160})):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        truth = {"gt_boxes": boxes, "gt_classes": torch.tensor(classes)}
        if host.name == "detectron2":
            from two_hosts import with_instances

            truth = {"instances": with_instances({"image": image, **truth})["instances"]}
        samples.append({"image": image, **truth, **original})
    return samples


@pytest.fixture(params=["our heads", "standard heads"])
def heads(request, host):
    """Options; the standalone host has our heads only."""
    if request.param == "our heads":
        return []
    if host.name == "standalone":
        pytest.skip("standard heads are Detectron2's")
    return STANDARD


def answers(detector, batch):
    output = detector.detect(batch)
    return [x for found in output.detections for x in (found.boxes, found.scores, found.classes)]


def modes_of(detector):
    return {name: module.training for name, module in detector.named_modules()}


def test_what_a_report_reads(build):
    detector = build()
    assert detector.device == torch.device("cpu")
    assert detector.dtype == "float32"
    assert detector.cascade.num_stages == 3
    before = detector.cascade.exits
    detector.set_exits(None)
    assert before is not None
    assert detector.cascade.exits is None


def test_the_mode_changes_nothing_and_is_not_changed(build, batch, heads):
    detector = build(*heads)
    wanted = answers(detector, batch)
    assert len(wanted[0]) > 3
    detector.train()
    detector.get_submodule(next(n for n, _ in detector.named_modules() if "features.0" in n)).eval()
    modes, state = modes_of(detector), copy.deepcopy(detector.state_dict())
    for found, expected in zip(answers(detector, batch), wanted, strict=True):
        assert torch.equal(found, expected)
    if not heads:
        detector.cascade_inputs(batch)
    assert modes_of(detector) == modes
    for name, value in detector.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_modes_come_back_after_a_failure(build, batch):
    class Broken(PartTimer):
        def part(self, name):
            if name == "stage1":
                raise KeyError(name)
            return super().part(name)

    detector = build().train()
    modes = modes_of(detector)
    with pytest.raises(KeyError):
        detector.detect(batch, timer=Broken())
    assert modes_of(detector) == modes
    detector.eval()
    modes = modes_of(detector)
    batch[1] = {"image": batch[1]["image"]}
    with pytest.raises(KeyError):
        detector.losses(batch)
    assert modes_of(detector) == modes


def test_stages_of_some_images_alone(build, batch):
    detector = build()
    whole = detector.detect(batch, stages=True).stages
    part = detector.detect(batch, stages=[False, True]).stages
    for of_all, of_some in zip(whole, part, strict=True):
        assert len(of_all.detections[0]) > 3
        assert len(of_some.detections[0]) == len(of_some.boxes_before[0]) == 0
        found, wanted = vars(of_some.detections[1]), vars(of_all.detections[1])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert detector.detect(batch, stages=[False, False]).stages is None


def test_a_monitor_shadows_a_detector(build, batch):
    detector = build()
    monitor = ExitMonitor(detector, shadow=ShadowRules(share=1.0, min_score=0.2))
    assert monitor.detect(batch).stages is None
    output = detector.detect(batch, stages=True)
    pairs = zip(output.detections, output.stages[-1].detections, strict=True)
    losses = [agreement_loss(*pair, min_score=0.2) for pair in pairs]
    shadow = monitor.report()["shadow"]
    assert (shadow["images"], shadow["loss"]) == (2, pytest.approx(sum(losses) / 2))


def test_of_no_image_nothing_is_detected(build):
    detector = build()
    for one in (detector, ExitMonitor(detector)):
        output = one.detect([])
        assert output.detections == []
        assert output.stats.entered == [0, 0, 0]
        assert output.stages is None
    assert detector.detect([], stages=True, timer=PartTimer()).detections == []
    with pytest.raises(ValueError, match="at least one"):
        detector.losses([])


IMAGES = (
    torch.zeros(3, 0, 5, dtype=torch.uint8),
    torch.zeros(3, 5, 0, dtype=torch.uint8),
    torch.zeros(1, 8, 8, dtype=torch.uint8),
    torch.zeros(8, 8, 3, dtype=torch.uint8),
    torch.zeros(8, 8, dtype=torch.uint8),
    torch.zeros(0, dtype=torch.uint8),
    torch.zeros(3, 8, 8).numpy(),
    None,
)


def test_batches_that_are_none_are_refused(build, batch, heads):
    detector = build(*heads)
    calls = [detector.detect, detector.losses]
    if not heads:
        calls.append(detector.cascade_inputs)
    for call in calls:
        for image in IMAGES:
            with pytest.raises(ValueError, match=r"image 1 of the batch .*\[3, H, W\]"):
                call([batch[0], {**batch[1], "image": image}])
        for wrong in (batch[0], batch[0]["image"], [batch[0]["image"]]):
            with pytest.raises(ValueError, match=r"list of samples|give a dict"):
                call(wrong)
