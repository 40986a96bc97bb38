"""The LazyConfig of the main model is its YAML file in other words."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)
pytest.importorskip("omegaconf")

import detectron2
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import default_argument_parser
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    build_roi_heads,
)
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from small_cascades import CHANNELS, NUM_CLASSES, POOLED, STRIDES, make_scene
from small_plugin import (
    CONFIGS,
    NAMES,
    assert_same_instances,
    decided,
    detect,
    keep_in_range,
    make_image,
    proposals_of,
)

from cascade_det.config import get_cfg
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.background import PruneBelow
from cascade_det.core.exits.redundancy import DropCovered
from cascade_det.d2 import EarlyExitCascadeROIHeads
from make_shapes import make_dataset

pytestmark = pytest.mark.needs_detectron2

NAME = "cascade_rcnn_R_50_FPN_1x_early_exit"
LAZY_FILE = CONFIGS / "lazy" / f"{NAME}.py"
MASKS = "cascade_mask_rcnn_R_50_FPN_1x_early_exit"
MASKS_FILE = CONFIGS / "lazy" / f"{MASKS}.py"
MAPS = {f"p{i}": ShapeSpec(channels=256, stride=2**i) for i in range(2, 7)}
DETECTRON2_TOOL = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"


@pytest.fixture(scope="module")
def lazy():
    return LazyConfig.load(str(LAZY_FILE))


@pytest.fixture(scope="module")
def yaml_cfg():
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "COCO-Detection" / f"{NAME}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module")
def models(lazy, yaml_cfg):
    """Lazy and YAML, with the same weights."""
    from_yaml = build_model(yaml_cfg).eval()
    from_lazy = instantiate(lazy.model).eval()
    keep_in_range(from_yaml)
    return from_lazy, from_yaml


def test_state_dict(models):
    from_lazy, from_yaml = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert list(from_lazy.items()) == list(from_yaml.items())
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert trained[0] == trained[1]


def test_detections_with_exits(models):
    from_lazy, from_yaml = models
    from_lazy.load_state_dict(from_yaml.state_dict())
    image = make_image((96, 128))
    with torch.no_grad():
        (found,), (wanted,) = (m([{"image": image}]) for m in models)
    assert from_lazy.roi_heads.stats == from_yaml.roi_heads.stats
    assert from_lazy.roi_heads.stats.entered[0] > from_lazy.roi_heads.stats.entered[2]
    assert len(wanted["instances"]) > 5
    assert_same_instances([found["instances"]], [wanted["instances"]])
    assert torch.equal(found["instances"].exit_stages, wanted["instances"].exit_stages)


def test_a_dump_from_before_the_modules_moved_still_instantiates(lazy):
    """``dumped_roi_heads.yaml`` was saved by version 0.1, before its modules moved."""
    dumped = LazyConfig.load(str(Path(__file__).with_name("dumped_roi_heads.yaml")))
    assert str(dumped.roi_heads["_target_"]) == "cascade_det.d2.EarlyExitCascadeROIHeads"
    settings = (dumped.roi_heads, lazy.model.roi_heads)
    old, new = (instantiate(heads) for heads in settings)
    assert [(k, v.shape) for k, v in old.state_dict().items()] == [
        (k, v.shape) for k, v in new.state_dict().items()
    ]
    assert plain(old.exits.rules) == plain(new.exits.rules)
    assert old.exits.prune_thresholds == (0.02, 0.02)
    assert [type(rule) for rule in old.exits.rules] == [PruneBelow, DropCovered]


def plain(value):
    """A setting in simple types, lists for all sequences."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (Matcher, Box2BoxTransform, PruneBelow, DropCovered)):
        return plain(vars(value))
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return type(value).__name__


def test_every_setting_of_the_model(models):
    for (name, ours), (_, theirs) in zip(*(m.named_modules() for m in models), strict=True):
        if isinstance(ours, ExitPolicy):
            assert plain(ours.rules) == plain(theirs.rules)
            continue
        keys = {key for key in vars(theirs) if not key.startswith("_")}
        assert keys == {key for key in vars(ours) if not key.startswith("_")}
        # A factor of each loss, or one for both.
        for key in keys - {"loss_weight"}:
            assert plain(vars(ours)[key]) == plain(vars(theirs)[key]), f"{name}.{key}"
    heads, their_heads = (m.roi_heads for m in models)
    for ours, theirs in zip(heads.box_predictor, their_heads.box_predictor, strict=True):
        for loss in ("loss_cls", "loss_box_reg"):
            assert ours.loss_weight.get(loss, 1.0) == theirs.loss_weight.get(loss, 1.0)
    assert heads.cascade.targets == their_heads.cascade.targets
    probs = torch.rand(2, 3)
    assert all(
        h.exits.calibrated(probs, stage) is probs
        for h in (heads, their_heads)
        for stage in range(3)
    )
    generators = (m.proposal_generator.anchor_generator for m in models)
    for ours, theirs in zip(*(g.cell_anchors for g in generators), strict=True):
        assert torch.equal(ours, theirs)


def test_optimizer_and_schedule(lazy, yaml_cfg):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    wanted = build_optimizer(yaml_cfg, model)
    settings = lazy.copy()
    settings.optimizer.params.model = model
    found = instantiate(settings.optimizer)
    groups = [
        sorted(
            (g["lr"], g["momentum"], g["weight_decay"], g["nesterov"], len(g["params"]))
            for g in optimizer.param_groups
        )
        for optimizer in (found, wanted)
    ]
    assert groups[0] == groups[1]
    assert len(groups[0]) == 2
    their_schedule = build_lr_scheduler(yaml_cfg, wanted)
    our_schedule = LRMultiplier(found, instantiate(lazy.lr_multiplier), lazy.train.max_iter)
    assert lazy.train.max_iter == yaml_cfg.SOLVER.MAX_ITER
    for iteration in (0, 1, 500, 999, 1000, 59999, 60000, 79999, 80000, 89999):
        our_schedule.last_epoch = their_schedule.last_epoch = iteration
        assert our_schedule.get_lr() == pytest.approx(their_schedule.get_lr(), rel=1e-9)


def steps(mapper):
    return [(type(step), plain(vars(step))) for step in mapper.augmentations.augs]


def test_data_and_run(lazy, yaml_cfg):
    data, run, solver = lazy.dataloader, lazy.train, yaml_cfg.SOLVER
    assert (data.train.dataset.names,) == yaml_cfg.DATASETS.TRAIN
    assert (data.test.dataset.names,) == yaml_cfg.DATASETS.TEST
    assert data.evaluator.dataset_name == data.test.dataset.names
    assert data.train.total_batch_size == solver.IMS_PER_BATCH
    assert data.train.num_workers == data.test.num_workers == yaml_cfg.DATALOADER.NUM_WORKERS
    for is_train, part in ((True, data.train), (False, data.test)):
        ours, theirs = instantiate(part.mapper), DatasetMapper(yaml_cfg, is_train)
        names = ("is_train", "image_format", "use_instance_mask", "use_keypoint", "recompute_boxes")
        for name in names:
            assert getattr(ours, name) == getattr(theirs, name)
        assert steps(ours) == steps(theirs)
    assert run.init_checkpoint == yaml_cfg.MODEL.WEIGHTS
    assert run.checkpointer.period == solver.CHECKPOINT_PERIOD
    assert run.eval_period == yaml_cfg.TEST.EVAL_PERIOD
    assert run.amp.enabled == solver.AMP.ENABLED


@pytest.fixture
def masks_cfg():
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "COCO-InstanceSegmentation" / f"{MASKS}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_masks(masks_cfg):
    """Of the heads alone: the rest is the model above."""
    content = LazyConfig.load(str(MASKS_FILE))
    assert content.dataloader.train.mapper.use_instance_mask
    ours = instantiate(content.model.roi_heads).eval()
    theirs = build_roi_heads(masks_cfg, MAPS).eval()
    torch.nn.init.normal_(theirs.mask_head.predictor.weight, std=0.3)
    for predictor in theirs.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
    ours.load_state_dict(theirs.state_dict())
    scene = make_scene(num_proposals=(6, 5))
    maps = {
        name: torch.randn(2, 256, 240 // shape.stride, 320 // shape.stride)
        for name, shape in MAPS.items()
    }
    with torch.no_grad():
        found, wanted = (heads(None, maps, proposals_of(scene))[0] for heads in (ours, theirs))
    assert min(map(len, wanted)) > 3
    assert wanted[0].pred_masks.std() > 0.1
    assert_same_instances(found, wanted)
    assert ours.mask_rules == theirs.mask_rules


def test_a_mask_head_for_every_stage_as_the_docstring_says(masks_cfg):
    text = MASKS_FILE.read_text().split('"""')[1]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    model = LazyConfig.load(str(MASKS_FILE)).model
    exec("\n".join(lines), {"model": model})
    masks_cfg.merge_from_list(["MODEL.CASCADE.MASK.STAGES", "every"])
    ours, theirs = instantiate(model.roi_heads), build_roi_heads(masks_cfg, MAPS)
    shapes = [{k: v.shape for k, v in heads.state_dict().items()} for heads in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert "mask_head.2.predictor.weight" in shapes[0]


@pytest.fixture
def own_data(tmp_path):
    """The lines for data of one's own that the file gives, with such data in ``cells``."""
    make_dataset(tmp_path / "cells", train=4, val=2, width=96, height=64)
    text = LAZY_FILE.read_text().split('"""')[1]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    own = "\n".join(lines).replace('"cells/', f'"{tmp_path}/cells/')
    assert own.count("num_classes = 3") == own.count("max_iter = 5000") == 1
    return own.replace("num_classes = 3", "num_classes = 6").replace("5000", "2")


@pytest.mark.skipif(not DETECTRON2_TOOL.is_file(), reason="Detectron2's tools are not beside it")
def test_detectron2s_tool_trains_and_evaluates_own_data(own_data, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("lazyconfig_train_net", DETECTRON2_TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    own = tmp_path / "own.py"
    (tmp_path / LAZY_FILE.name).write_text(LAZY_FILE.read_text())
    own.write_text(
        f"{own_data}\n"
        "dataloader.train.total_batch_size = 1\n"
        "dataloader.train.num_workers = dataloader.test.num_workers = 0\n"
        "for _part in (dataloader.train, dataloader.test):\n"
        "    _part.mapper.augmentations[0].short_edge_length = (64,)\n"
        "for _head in model.roi_heads.box_heads:\n"
        "    _head.fc_dims = [32, 32]\n"
        "for _predictor in model.roi_heads.box_predictors:\n"
        "    _predictor.input_shape.channels = 32\n"
        "model.proposal_generator.post_nms_topk = (50, 50)\n"
        "train.init_checkpoint = ''\n"
        f"train.output_dir = {str(tmp_path / 'output')!r}\n"
    )
    options = ["train.device=cpu", "optimizer.lr=0.0001"]
    parser = default_argument_parser()
    tool.main(parser.parse_args(["--config-file", str(own), *options]))
    assert (tmp_path / "output" / "model_final.pth").is_file()
    dumped = LazyConfig.load(str(tmp_path / "output" / "config.yaml"))
    again = instantiate(dumped.model)
    DetectionCheckpointer(again).load(str(tmp_path / "output" / "model_final.pth"))
    assert again.roi_heads.exits.prune_thresholds == (0.02, 0.02)
    parsed = parser.parse_args(
        ["--config-file", str(own), "--eval-only", *options, "model.roi_heads.exits=null"]
    )
    parsed.opts.append(f"train.init_checkpoint={tmp_path / 'output' / 'model_final.pth'}")
    capsys.readouterr()
    tool.main(parsed)
    told = capsys.readouterr().out
    assert "Start inference on 2 batches" in told
    assert "OrderedDict([('bbox', {'AP':" in told


def test_the_target_of_a_users_own_file_can_be_swapped():
    L = LazyCall
    heads = L(CascadeROIHeads)(
        num_classes=NUM_CLASSES,
        batch_size_per_image=16,
        positive_fraction=0.25,
        box_in_features=NAMES,
        box_pooler=L(ROIPooler)(
            output_size=POOLED,
            scales=tuple(1 / stride for stride in STRIDES),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_heads=[
            L(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=CHANNELS, height=POOLED, width=POOLED),
                conv_dims=[],
                fc_dims=[12],
            )
            for _ in range(3)
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=12),
                test_score_thresh=0.05,
                box2box_transform=L(Box2BoxTransform)(weights=(w, w, w / 2, w / 2)),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for w in (10, 20, 30)
        ],
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in (0.5, 0.6, 0.7)
        ],
    )
    theirs = decided(instantiate(heads)).eval()
    heads["_target_"] = EarlyExitCascadeROIHeads
    heads.pooler_kernel = "torchvision"
    ours = instantiate(heads).eval()
    ours.load_state_dict(theirs.state_dict())
    wanted = detect(theirs, make_scene())
    assert min(map(len, wanted)) > 5
    assert_same_instances(detect(ours, make_scene()), wanted)
