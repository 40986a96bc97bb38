"""Weights and configurations of one host are read by the other unchanged."""

import logging
import pickle
import re

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from shape_runs import INSTANT, ROOT
from small_plugin import detectron2_yaml
from two_hosts import (
    BACKBONES,
    CONFIG,
    EVERY,
    EXITS,
    MASKS,
    OUR_HEADS,
    OWN_HEADS,
    SMALL,
    InDetectron2,
    in_detectron2,
    largest_differences,
    make_batch,
    standalone,
    stir,
)

from cascade_det.config import add_cascade_config, load_config
from cascade_det.standalone import build_detector, train
from cascade_det.weights import load_weights

pytestmark = pytest.mark.needs_detectron2

R18 = BACKBONES["R-18"]


@pytest.fixture
def detectron2_log(caplog, monkeypatch):
    """The log of Detectron2's checkpointer."""
    for name in ("fvcore", "fvcore.common.checkpoint", "detectron2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO, "fvcore")
    return caplog


@pytest.fixture(scope="module")
def theirs():
    """Detectron2's own cascade."""
    torch.manual_seed(0)
    host = in_detectron2(*R18, *OWN_HEADS)
    stir(host.model)
    return host


def shapes_of(model):
    return {name: value.shape for name, value in model.state_dict().items()}


def assert_same_state(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], torch.as_tensor(value)), name


def assert_complete(report):
    assert (report.missing, report.unexpected, report.reinitialised) == ([], [], {})
    assert len(report.loaded) == report.total


# The others load each other's weights, strictly, in test_same_numbers.py.
@pytest.mark.parametrize("name", ["R-18", "R-152", "mobilenet_v2", "mobilenet_v3", "hatnet"])
def test_parameters_have_the_same_names_and_shapes(name):
    own = in_detectron2(*BACKBONES[name], *OWN_HEADS).model
    alone = standalone(*BACKBONES[name], *OUR_HEADS, *EXITS).model
    assert shapes_of(alone) == shapes_of(own)


@pytest.mark.parametrize("exits", [(), EXITS], ids=["off", "on"])
def test_exits_need_no_parameters(theirs, exits):
    assert shapes_of(in_detectron2(*R18, *OUR_HEADS, *exits).model) == shapes_of(theirs.model)
    assert shapes_of(standalone(*R18, *OUR_HEADS, *exits).model) == shapes_of(theirs.model)


class TestDetectron2ToStandalone:
    @pytest.fixture
    def alone(self):
        return standalone(*R18, *OWN_HEADS).model

    def test_checkpoint_of_a_run(self, theirs, alone, tmp_path):
        optimizer, scheduler = theirs.solver()
        saver = DetectionCheckpointer(
            theirs.model, tmp_path, optimizer=optimizer, scheduler=scheduler
        )
        saver.save("model_0000009", iteration=9)
        assert_complete(load_weights(alone, tmp_path / "model_0000009.pth"))
        assert_same_state(alone, theirs.model.state_dict())

    def test_model_zoo_file(self, theirs, alone, tmp_path):
        arrays = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
        # Older files of the zoo have what is a matter of the configuration today.
        arrays["pixel_mean"] = arrays["pixel_std"] = torch.ones(3, 1, 1).numpy()
        arrays["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4).numpy()
        path = tmp_path / "model_final_480dd8.pkl"
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
        assert_complete(load_weights(alone, path))
        assert_same_state(alone, theirs.model.state_dict())

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("R-18", "heuristics"), ("R-18", "Caffe2"), ("resnet_cascade", "heuristics")],
    )
    def test_backbone_of_imagenet(self, theirs, tmp_path, name, kind):
        """Each host on its own makes the same of it."""
        trunk = theirs.model.backbone.bottom_up.state_dict()
        if kind == "Caffe2":
            # Statistics are part of the scale and the shift there.
            trunk = {name: x for name, x in trunk.items() if "running" not in name}
            content = {blob_name(name): value.numpy() for name, value in trunk.items()}
        else:
            arrays = {name: value.numpy() for name, value in trunk.items()}
            content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        path = tmp_path / "R-18.pkl"
        path.write_bytes(pickle.dumps(content, protocol=2))

        torch.manual_seed(1)
        options = (*BACKBONES[name], *OUR_HEADS)
        ours, alone = (host(*options).model for host in (in_detectron2, standalone))
        alone.load_state_dict(ours.state_dict())
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        DetectionCheckpointer(ours).load(str(path))
        load_weights(alone, path)
        assert_same_state(alone, ours.state_dict())
        changed = {n for n, value in ours.state_dict().items() if not torch.equal(value, before[n])}
        assert changed >= {f"backbone.bottom_up.{name}" for name in trunk}
        assert not any(name.startswith("backbone.decoder.") for name in changed)


def blob_name(name):
    """``res2.0.conv1.norm.weight`` -> ``res2_0_branch2a_bn_s``."""
    if name.startswith("stem."):
        name = name.replace("stem.conv1.norm", "res.conv1.norm").removeprefix("stem.")
    else:
        name = re.sub(r"conv(\d)", lambda found: f"branch2{' abc'[int(found[1])]}", name)
    for ours, theirs in (
        *(("shortcut", "branch1"), ("norm.weight", "bn_s"), ("norm.bias", "bn_b")),
        *(("weight", "w"), (".", "_")),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A configuration and the folder of a short standalone run with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    more = ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", (), "CASCADE.EMA_DECAY", 0.9]
    cfg = load_config(INSTANT, [*options, *more, "OUTPUT_DIR", str(folder)])
    train(cfg)
    return cfg, folder


class TestMasks:
    def test_shipped_configuration_has_the_names_of_the_model_zoo(self):
        name = "cascade_mask_rcnn_R_50_FPN_3x.yaml"
        theirs = get_cfg()
        theirs.merge_from_file(detectron2_yaml(f"Misc/{name}"))
        theirs.MODEL.DEVICE = "cpu"
        ours = ROOT / "configs" / "COCO-InstanceSegmentation" / name
        wanted = shapes_of(build_model(theirs))
        found = shapes_of(build_detector(load_config(ours, ["MODEL.DEVICE", "cpu"])))
        computed = {key for key in wanted if "anchor_generator" in key}
        assert found == {key: shape for key, shape in wanted.items() if key not in computed}
        assert "roi_heads.mask_head.mask_fcn4.weight" in found

    @pytest.mark.parametrize("options", [MASKS, EVERY], ids=["last", "every"])
    def test_there_and_back(self, options, tmp_path, detectron2_log):
        kind = OWN_HEADS if options is MASKS else OUR_HEADS
        theirs = in_detectron2(*R18, *options, *kind)
        stir(theirs.model)
        arrays = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
        path = tmp_path / "model_final_480dd8.pkl"
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
        alone = standalone(*R18, *options).model
        assert_complete(load_weights(alone, path, complete=True))
        assert_same_state(alone, theirs.model.state_dict())

        torch.save({"model": alone.state_dict()}, tmp_path / "back.pth")
        again = in_detectron2(*R18, *options, *kind).model
        detectron2_log.clear()
        DetectionCheckpointer(again).load(str(tmp_path / "back.pth"))
        assert [r for r in detectron2_log.records if r.levelno >= logging.WARNING] == []
        assert_same_state(again, theirs.model.state_dict())

    def test_caffe2_model(self, tmp_path):
        """Each host on its own makes the same of its mask head."""
        ours, alone = (host(*R18, *MASKS, *OUR_HEADS).model for host in (in_detectron2, standalone))
        alone.load_state_dict(ours.state_dict())
        content = {"conv1_w": np.ones((64, 3, 7, 7), np.float32)}
        blobs = {"mask_fcn1": "_[mask]_fcn1", "mask_fcn2": "_[mask]_fcn2", "deconv": "conv5_mask"}
        for name, blob in {**blobs, "predictor": "mask_fcn_logits"}.items():
            for kind in ("weight", "bias"):
                shape = list(getattr(ours.roi_heads.mask_head.get_submodule(name), kind).shape)
                shape[0] += name == "predictor"  # background, the first
                content[f"{blob}_{kind[0]}"] = np.random.rand(*shape).astype(np.float32)  # noqa: NPY002
        path = tmp_path / "mask_rcnn.pkl"
        path.write_bytes(pickle.dumps({"blobs": content}, protocol=2))
        before = ours.roi_heads.mask_head.predictor.weight.clone()
        DetectionCheckpointer(ours).load(str(path))
        load_weights(alone, path)
        assert_same_state(alone.roi_heads.mask_head, ours.roi_heads.mask_head.state_dict())
        found = alone.roi_heads.mask_head.predictor.weight.detach()
        assert not torch.equal(found, before)
        assert torch.equal(found, torch.from_numpy(content["mask_fcn_logits_w"][1:]))


class TestStandaloneToDetectron2:
    def test_checkpoint_of_a_run(self, run, detectron2_log):
        cfg, folder = run
        model = build_model(merged_from(cfg, folder))
        checkpointer = DetectionCheckpointer(model)
        detectron2_log.clear()
        rest = checkpointer.load(str(folder / "model_final.pth"))
        said = [r.getMessage() for r in detectron2_log.records]
        assert any("model_final.pth" in line for line in said)
        assert [r for r in detectron2_log.records if r.levelno >= logging.WARNING] == []

        content = torch.load(folder / "model_final.pth", weights_only=True)
        assert_same_state(model, content["model"])
        # The weights that training goes on with are beside those that detect, and not the same.
        assert rest["iteration"] == 1
        assert rest["training_weights"].keys() == content["model"].keys()
        assert any(
            not torch.equal(value, content["model"][name])
            for name, value in rest["training_weights"].items()
        )

    def test_there_and_back(self, run, tmp_path):
        cfg, folder = run
        model = build_model(merged_from(cfg, folder))
        DetectionCheckpointer(model, tmp_path).load(str(folder / "model_final.pth"))
        DetectionCheckpointer(model, tmp_path).save("back")
        detector = build_detector(cfg)
        assert_complete(load_weights(detector, tmp_path / "back.pth"))
        content = torch.load(folder / "model_final.pth", weights_only=True)
        assert_same_state(detector, content["model"])


def merged_from(cfg, folder):
    """Detectron2's configuration, with what the run has dumped."""
    merged = get_cfg()
    add_cascade_config(merged)
    merged.merge_from_file(str(folder / "config.yaml"))
    assert as_yaml(merged) == as_yaml(cfg)
    return merged


def as_yaml(cfg):
    """Values as a file has them: tuples and lists are the same there."""
    return yaml.safe_load(cfg.dump())


def test_files_of_the_cascade_decoder(tmp_path):
    options = (*BACKBONES["resnet_cascade"], *OUR_HEADS)
    torch.manual_seed(0)
    ours, alone, back = (host(*options).model for host in (in_detectron2, standalone, standalone))
    DetectionCheckpointer(alone, str(tmp_path)).save("alone")
    assert not DetectionCheckpointer(ours).load(str(tmp_path / "alone.pth"))
    assert_same_state(ours, alone.state_dict())
    stir(ours)
    DetectionCheckpointer(ours, str(tmp_path)).save("ours")
    assert_complete(load_weights(back, tmp_path / "ours.pth", complete=True))
    assert_same_state(back, ours.state_dict())


class TestConfigurations:
    @pytest.mark.parametrize(
        "options", [OWN_HEADS, (*OUR_HEADS, *EXITS)], ids=["own heads", "exits"]
    )
    def test_dumped_by_detectron2(self, options, tmp_path):
        theirs = in_detectron2(*R18, *options)
        (tmp_path / "config.yaml").write_text(theirs.cfg.dump())
        assert_same_detections(theirs, build_detector(load_config(tmp_path / "config.yaml")))

    def test_dumped_without_our_nodes(self, tmp_path):
        cfg = get_cfg()
        cfg.merge_from_file(str(CONFIG))
        cfg.merge_from_list([*SMALL, *R18, *OWN_HEADS])
        assert "CASCADE" not in as_yaml(cfg) | as_yaml(cfg.MODEL)
        (tmp_path / "config.yaml").write_text(cfg.dump())
        theirs = in_detectron2(*R18, *OWN_HEADS)
        assert_same_detections(theirs, build_detector(load_config(tmp_path / "config.yaml")))

    @pytest.mark.parametrize("nodes", ["", "part"])
    def test_with_part_of_our_nodes(self, nodes, tmp_path):
        """With new keys allowed, Detectron2 merges files with keys that it does not know."""
        content = {"_BASE_": str(CONFIG), "MODEL": {"ROI_HEADS": {"NAME": OUR_HEADS[1]}}}
        if nodes:
            exits = {"ENABLED": True, "THRESHOLDS": [0.6, 0.4], "PRUNE_THRESHOLDS": [0.1, 0.15]}
            content["MODEL"]["CASCADE"] = {"EXIT": exits}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
        cfg = get_cfg()
        cfg.set_new_allowed(True)
        cfg.merge_from_file(str(tmp_path / "own.yaml"))
        cfg.merge_from_list([*SMALL, *R18])
        assert ("CASCADE" in cfg.MODEL) == bool(nodes)
        theirs = InDetectron2(cfg)
        alone = build_detector(load_config(tmp_path / "own.yaml", [*SMALL, *R18]))
        stages = assert_same_detections(theirs, alone)
        assert stages == ({0, 1, 2} if nodes else {2})


def assert_same_detections(theirs, detector):
    """Of Detectron2 and the standalone detector with its weights; return the exit stages."""
    torch.manual_seed(0)
    stir(theirs.model)
    detector.load_state_dict(theirs.model.state_dict())
    wanted, got = theirs.detect(make_batch(2)), detector.eval().detect(make_batch(2)).detections
    assert all(len(found) > 20 for found in wanted)
    largest = largest_differences(got, wanted)
    assert largest["boxes"] <= 0.01
    assert largest["scores"] <= 1e-4
    stages = torch.cat([found.exit_stages for found in got])
    if wanted[0].exit_stages is not None:
        assert torch.equal(stages, torch.cat([found.exit_stages for found in wanted]))
    return set(stages.tolist())
