"""Pictures of tiles: what a predictor says of them, and the command that draws them."""

import cv2
import pytest
import torch
from shape_runs import INSTANT

from cascade_det.commands.predict import main as predict
from cascade_det.config import check_config, load_config
from cascade_det.standalone import Predictor, TilePredictor, build_detector
from shape_scenes import make_scene

# Tiles of two regions of each image alone are computed.
GATE = ["MODEL.CASCADE.EXIT.ENABLED", "True", "MODEL.CASCADE.EXIT.TILE_THRESHOLD", "1.0"]
GATE += ["MODEL.CASCADE.EXIT.REGION_BUDGET", "(2,1,1)"]
SIZES = [(192, 256), (96, 160)]  # height and width of the files


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Of random weights, and images that are twice as large as their files at most."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"model": build_detector(load_config(INSTANT)).state_dict()}, path)
    sizes = ["INPUT.MIN_SIZE_TEST", "192", "INPUT.MAX_SIZE_TEST", "256"]
    return ["MODEL.WEIGHTS", str(path), "CASCADE.TEST_IMS_PER_BATCH", "2", *sizes]


def predictor_of(keys):
    cfg = load_config(INSTANT, keys)
    check_config(cfg)
    return Predictor(cfg)


@pytest.fixture(scope="module")
def images():
    return [make_scene(5, "val", i, width=w, height=h).image for i, (h, w) in enumerate(SIZES)]


def test_tiles_come_with_the_detections_of_the_predictor(keys, images):
    predictor = predictor_of([*keys, *GATE])
    found = TilePredictor(predictor)(images)
    for one, other in zip(found, predictor(images), strict=True):
        for name in ("boxes", "scores", "classes", "exit_stages"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    counted = predictor.monitor.report()["exits"]["tiles"]
    computed = torch.stack([one.tiles.computed for one in found])
    assert counted["computed_share"] == pytest.approx(float(computed.float().mean()))
    assert not any(one.tiles.opened.any() for one in found)
    # Of 32 pixels: the first image keeps its size, the second one grows to 154 x 256.
    assert computed.shape == (2, 6, 8)
    sides = [(one.tiles.height, one.tiles.width) for one in found]
    assert sides[0] == (32, 32)
    assert sides[1] == pytest.approx((32 * 96 / 154, 32 * 160 / 256))


def test_one_image_and_some_of_its_detections_keep_the_tiles(keys, images):
    predictor = TilePredictor(predictor_of([*keys, *GATE]))
    found, (listed,) = predictor(images[0]), predictor(images[:1])
    assert torch.equal(found.boxes, listed.boxes)
    for some in (found[:1], found[found.scores > 2], found.to("cpu")):
        assert some.tiles is found.tiles
    assert torch.equal(found[:1].boxes, found.boxes[:1])


def test_a_predictor_without_a_gate_has_no_tiles(keys, images):
    predictor = predictor_of(keys)
    (output,) = predictor.outputs(images)
    assert (output.tiles, output.stats.tiles) == (None, 0)
    with pytest.raises(ValueError, match="no tile gate"):
        TilePredictor(predictor)(images)


def test_the_command_draws_tiles(keys, images, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    begin = ["--config-file", INSTANT, "--input", str(tmp_path / "a.png"), "--output"]
    assert predict([*begin, str(tmp_path / "out"), "--tiles", "--opts", *keys, *GATE]) == 0
    assert "% of the tiles" in capsys.readouterr().out
    (found,) = TilePredictor(predictor_of([*keys, *GATE]))([images[0]])
    picture = cv2.imread(str(tmp_path / "out" / "a.jpg")).astype(float)
    dark = ~found.tiles.computed.numpy().repeat(32, 0).repeat(32, 1)
    assert 0 < dark.mean() < 1
    ratio = picture.mean(axis=2) / images[0].mean(axis=2)
    assert ratio[dark].mean() < 0.5
    assert ratio[~dark].mean() > 0.7
    assert predict([*begin, str(tmp_path / "no"), "--tiles", "--opts", *keys]) == 1
    assert "--tiles shows what a tile gate computes, and here it is off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--onnx", "a.onnx"], "--onnx computes whole maps"),
        (["--config-file", "a.yaml", "--slice", "640"], "with --slice an image has many maps"),
    ],
)
def test_maps_that_are_not_of_an_image_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict(["--input", "a.png", "--output", "o", "--tiles", *arguments])
    assert words in capsys.readouterr().err
