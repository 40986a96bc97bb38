"""What predict writes for a segmenter, against the segmenter itself on the same files as data."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from semantic_sets import save
from small_segmenter import SEGMENTER
from small_videos import make_video

from cascade_det import config
from cascade_det.commands import prediction
from cascade_det.commands.main import main
from cascade_det.data.semantic import read_labels
from cascade_det.engine.semantic_datasets import load_semantic_datasets, semantic_test_loader
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.standalone import SegmenterPredictor
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.streams.sources import find_sources

NAMES = ["background", "cell", "nucleus"]
RUN = {"seed": 0, "class_names": NAMES, "category_ids": [0, 1, 2], "host": "standalone"}


@pytest.fixture
def options(tmp_path):
    """Of a segmenter whose predictions vary."""
    more = (
        *("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone"),
        *("INPUT.MIN_SIZE_TEST", 48, "CASCADE.TEST_IMS_PER_BATCH", 4),
        *("DATALOADER.NUM_WORKERS", 0, "MODEL.WEIGHTS", str(tmp_path / "weights.pth")),
    )
    return [str(word) for word in (*SEGMENTER, *more)]


def save_weights(options, folder, run=RUN, change=lambda segmenter: None):
    cfg = config.load_config(None, options)
    segmenter = build_segmenter(cfg)
    image = torch.from_numpy(blurred(48, 60).transpose(2, 0, 1).copy())
    with torch.no_grad():
        (scores,) = segmenter.segment([{"image": image}]).sem_seg
        segmenter.sem_seg_head.heads[0].bias -= scores.mean(dim=(1, 2))
        change(segmenter)
    torch.save({"model": segmenter.state_dict(), "run": run}, folder / "weights.pth")


def blurred(height, width):
    coarse = np.random.default_rng(height).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


@pytest.fixture
def photos(tmp_path):
    """Four images of three sizes."""
    for number, size in enumerate([(40, 60), (40, 60), (70, 50), (48, 48)]):
        save(tmp_path / "photos" / f"{number}.png", blurred(*size))
    return tmp_path / "photos"


def run(options, inputs, output, *arguments):
    (output.parent / "a.yaml").write_text("SEED: 0")
    command = ["predict", "--config-file", str(output.parent / "a.yaml"), "--input"]
    return main([*command, str(inputs), "--output", str(output), *arguments, "--opts", *options])


def results(output):
    return json.loads((output / "predictions.json").read_text())


def test_label_images_are_the_segmenters_and_a_data_set(options, photos, tmp_path, capsys):
    save_weights(options, tmp_path)
    output = tmp_path / "out"
    assert run(options, photos, output) == 0
    assert "4 images: " in capsys.readouterr().out
    found = results(output)
    assert [image["labels"] for image in found["images"]] == [f"{i}.png" for i in range(4)]
    assert [image["picture"] for image in found["images"]] == [f"{i}.jpg" for i in range(4)]
    assert found["categories"] == [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    assert "annotations" not in found
    own = [("made", "folders", str(photos), str(output))]
    data = ["CASCADE.SEMANTIC_DATASETS", str(own), "CASCADE.SEMANTIC_CLASSES", str(NAMES)]
    data += ["DATASETS.TEST", "('made',)", "CASCADE.TEST_IMS_PER_BATCH", "1"]
    cfg = config.load_config(None, [*options, *data])
    (dataset,) = load_semantic_datasets(cfg, train=False)
    segmenter = build_segmenter(cfg)
    segmenter.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    labels = []
    for (sample,) in semantic_test_loader(cfg, dataset):
        (scores,) = segmenter.segment([sample]).sem_seg
        labels.append(read_labels(dataset.records[sample["image_id"]]))
        # Of a pixel with two equal scores either may be best.
        chosen = scores.gather(0, torch.from_numpy(labels[-1].astype(np.int64))[None])[0]
        assert (scores.max(0).values - chosen).max() <= 1e-4 * scores.abs().max()
        assert (labels[-1] == scores.argmax(0).numpy()).mean() > 0.99
    assert len(np.unique(np.concatenate([x.ravel() for x in labels]))) > 1
    # The same in Python.
    paths = [str(path) for path in sorted(photos.iterdir())]
    for ours, theirs in zip(SegmenterPredictor(cfg)(paths), labels, strict=True):
        assert ours.dtype == np.uint8
        assert (ours == theirs).mean() > 0.99


def test_files_that_are_no_images_and_names_that_collide(options, photos, tmp_path, capsys):
    save_weights(options, tmp_path)
    (photos / "1.png").write_bytes(b"no image")
    Image.open(photos / "0.png").save(photos / "0.jpg")
    output = tmp_path / "out"
    assert run(options, photos, output) == 1
    found = results(output)
    assert [failure["file_name"] for failure in found["failed"]] == [str(photos / "1.png")]
    assert "1.png" in capsys.readouterr().err
    pairs = [(image["picture"], image["labels"]) for image in found["images"]]
    assert pairs == [(f"{stem}.jpg", f"{stem}.png") for stem in ("0", "0_2", "2", "3")]
    # Another run replaces what this one made, and nothing else.
    assert run(options, photos / "2.png", output) == 0
    assert set(results(output)["older_pictures"]) == {
        f"{stem}.{ending}" for stem in ("0", "0_2", "3") for ending in ("jpg", "png")
    }
    (output / "1.png").write_bytes(b"labels by hand")
    (photos / "1.png").write_bytes((photos / "0.png").read_bytes())
    assert run(options, photos, output) == 1
    assert "1.png would be replaced" in capsys.readouterr().err
    assert (output / "1.png").read_bytes() == b"labels by hand"
    assert run(options, photos, photos) == 1
    assert "would replace the input" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_costs_not_the_other(tmp_path, photos):
    class Wide:
        """Its label images have a pixel more than a JPEG can have."""

        batch_size, class_names, category_ids = 1, ["a", "b"], [0, 1]

        def __call__(self, images, *, names):
            return [np.zeros(image.shape[:2], np.uint8) for image in images]

    save(photos / "4.png", np.zeros((1, 65_501, 3), np.uint8))
    assert prediction.segment(Wide(), find_sources([str(photos)]), tmp_path / "out") == 1
    (failure,) = results(tmp_path / "out")["failed"]
    assert failure["reason"].startswith("no picture: a picture of 65,501")
    last = results(tmp_path / "out")["images"][-1]
    assert (last["labels"], "picture" in last) == ("4.png", False)
    assert Image.open(tmp_path / "out" / "4.png").size == (65_501, 1)


def test_a_video_gets_pictures_alone(options, tmp_path):
    pytest.importorskip("av")
    save_weights(options, tmp_path)
    make_video(tmp_path / "a.mp4", frames=3)
    output = tmp_path / "out"
    assert run(options, tmp_path / "a.mp4", output) == 0
    assert {path.name for path in output.iterdir()} == {"a.mp4", "predictions.json"}
    found = results(output)
    assert found["videos"][0]["frames"] == len(found["images"]) == 3
    assert not any("labels" in image for image in found["images"])


def test_more_than_255_classes_have_16_bits(options, photos, tmp_path):
    options += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "300"]

    def prefer_the_last(segmenter):
        segmenter.sem_seg_head.heads[0].bias[299] = 1e6

    save_weights(options, tmp_path, run=None, change=prefer_the_last)
    output = tmp_path / "out"
    assert run(options, photos / "0.png", output) == 0
    labels = cv2.imread(str(output / "0.png"), cv2.IMREAD_UNCHANGED)
    assert (labels.dtype, labels.shape) == (np.uint16, (40, 60))
    assert (labels == 299).all()
    assert results(output)["categories"][299] == {"id": 299, "name": "class 299"}
    # Data sets hold 8 bits, and say so.
    own = [("made", "folders", str(photos), str(output))]
    names = [f"class {i}" for i in range(256)]
    data = ["CASCADE.SEMANTIC_DATASETS", str(own), "CASCADE.SEMANTIC_CLASSES", str(names)]
    cfg = config.load_config(None, [*options, *data, "DATASETS.TEST", "('made',)"])
    with pytest.raises(DatasetError, match="one channel of 8 bits"):
        load_semantic_datasets(cfg, train=False)


def test_names_of_the_configuration_stand_in(options, tmp_path):
    save_weights(options, tmp_path, run=None)
    cfg = config.load_config(None, options)
    assert SegmenterPredictor(cfg).class_names == ["class 0", "class 1", "class 2"]
    cfg.CASCADE.SEMANTIC_CLASSES = ["sky", "sea", "sand"]
    assert SegmenterPredictor(cfg).class_names == ["sky", "sea", "sand"]
    save_weights(options, tmp_path)
    assert SegmenterPredictor(cfg).class_names == NAMES


def test_what_is_of_detectors_is_refused(options, photos, tmp_path, capsys):
    save_weights(options, tmp_path)
    assert run(options, photos, tmp_path / "out", "--score-threshold", "0") == 1
    assert "--score-threshold is of detections" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    cfg = config.load_config(None, options)
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty"):
        SegmenterPredictor(cfg)


def test_the_help_tells_of_segmenters(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "label image, NAME.png" in capsys.readouterr().out
