"""The command against pycocotools itself, and on files that are no predictions."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math

import cv2
import numpy as np
import pytest
from coco_sets import damage, draw_noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cascade_det.commands import eval_json

CATEGORY_IDS = (3, 7)
IMAGE_IDS = (1, 2, 5, 6)


def noisy_case():
    """Annotations of four images, and predictions near them, some of the wrong class."""
    rng = np.random.default_rng(3)
    annotations, predictions = [], []
    for image_id in IMAGE_IDS:
        for _ in range(4):
            size = rng.choice([15, 60, 110]) * rng.uniform(0.8, 1.2, 2)
            box = np.concatenate([rng.uniform(0, 80, 2), size])
            category = int(rng.choice(CATEGORY_IDS))
            annotations.append(
                {
                    "id": len(annotations) + 10,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(2):
                guess = (box + rng.normal(0, 4, 4)).clip(1)
                kind = category if rng.random() < 0.8 else int(rng.choice(CATEGORY_IDS))
                predictions.append(
                    {
                        "image_id": image_id,
                        "category_id": kind,
                        "bbox": guess.tolist(),
                        "score": float(rng.random()),
                        "exit_stage": 1,
                    }
                )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 200, "width": 220} for i in IMAGE_IDS
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    return content, predictions


@pytest.fixture
def files(tmp_path):
    content, predictions = noisy_case()
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    return tmp_path


def run(folder, *options):
    return eval_json.main(
        ["--json", f"{folder}/val.json", "--predictions", f"{folder}/predictions.json", *options]
    )


def plain_pycocotools(folder):
    truth = COCO(str(folder / "val.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_ap_is_bit_for_bit_that_of_pycocotools(files, capsys):
    assert run(files, "--output", str(files / "out")) == 0
    expected = plain_pycocotools(files)
    scores = json.loads((files / "out" / "scores.json").read_text())
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [scores["bbox"][name] for name in names] == [100 * v for v in expected.stats[:6]]
    assert 5 < scores["bbox"]["AP"] < 95
    for index, row in enumerate(scores["analysis"]["per_class"]):
        precision = expected.eval["precision"][:, :, index, 0, 2]
        assert row["AP"] == scores["bbox"][f"AP-{row['class']}"] == 100 * precision.mean()
        assert row["AP75"] == 100 * precision[5].mean()
    report = capsys.readouterr().out
    assert "**Box AP (%)**" in report
    assert f"{scores['bbox']['AP']:.1f}" in report
    analysis = {path.name for path in (files / "out" / "analysis").iterdir()}
    assert analysis == {
        *("per_class.csv", "confusion_matrix.csv", "confusion_matrix.png", "worst_images.csv")
    }


def test_the_score_threshold_moves_precision_and_recall_alone(files):
    found = {}
    for threshold in ("0.2", "0.9"):
        folder = files / threshold
        assert run(files, "--score-threshold", threshold, "--output", str(folder)) == 0
        found[threshold] = json.loads((folder / "scores.json").read_text())
    low, high = found["0.2"], found["0.9"]
    assert low["bbox"] == high["bbox"]
    assert low["analysis"]["recall"] > high["analysis"]["recall"]
    assert low["analysis"]["overall"][0]["score"] == 0.2


def test_pictures_where_the_images_are(files, capsys):
    folder = files / "images"
    assert run(files, "--images", str(folder), "--output", str(files / "out")) == 1
    assert "no such folder" in capsys.readouterr().err
    folder.mkdir()
    for image_id in IMAGE_IDS[:3]:
        cv2.imwrite(str(folder / f"{image_id}.png"), np.full((200, 220, 3), 128, np.uint8))
    assert run(files, "--images", str(folder), "--output", str(files / "out")) == 1
    assert "6.png" in capsys.readouterr().err
    cv2.imwrite(str(folder / "6.png"), np.full((200, 220, 3), 128, np.uint8))
    assert run(files, "--images", str(folder), "--output", str(files / "out")) == 0
    pictures = sorted((files / "out" / "analysis" / "worst_images").iterdir())
    assert [path.name for path in pictures] == ["01.jpg", "02.jpg", "03.jpg", "04.jpg"]
    assert cv2.imread(str(pictures[0])).shape[1] == 440  # Enlarged.


def test_nothing_detected_is_an_ap_of_0(files, capsys):
    (files / "predictions.json").write_text("[]")
    assert run(files) == 0
    assert "there are no detections at all" in capsys.readouterr().out


def test_all_problems_are_listed_together(files, capsys):
    _, predictions = noisy_case()
    bad = copy.deepcopy(predictions[:9])
    bad[0]["image_id"] = bad[1]["image_id"] = 77
    bad[2]["category_id"] = "cat"
    bad[3]["bbox"] = [1, 2, 3]
    bad[4]["bbox"] = [1, 2, -3, 4]
    bad[5]["score"] = math.nan
    del bad[6]["score"]
    bad[6]["image_id"] = True
    bad[7]["bbox"][0] = 10**400
    bad[8] = 5
    (files / "predictions.json").write_text(json.dumps([*bad, predictions[9]]))
    assert run(files) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for line in (
        "predictions.json: bad predictions, of 10",
        "3 x prediction with an unknown 'image_id': number 1 (77), number 2 (77), number 7 (True)",
        "1 x prediction with an unknown 'category_id': number 3 ('cat')",
        "2 x prediction whose 'bbox' is not four finite numbers: number 4 ([1, 2, 3])",
        "1 x prediction whose 'bbox' has a negative width or height: number 5",
        "2 x prediction whose 'score' is not a finite number: number 6 (nan), number 7 (None)",
        "1 x prediction that is not an object: number 9 (5)",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a list of predictions: its top level is dict"),
        ("[1, ", "is not valid json"),
        ("[" * 100_000, "is not valid json"),
        ("", "is not valid json"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_list_is_named(files, capsys, text, message):
    path = files / "predictions.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert run(files) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_bad_annotations_stop_unless_they_are_skipped(files, capsys):
    content, _ = noisy_case()
    content["annotations"][0]["category_id"] = 99
    (files / "val.json").write_text(json.dumps(content))
    assert run(files) == 1
    assert "unknown category" in capsys.readouterr().err
    assert run(files, "--on-bad-data", "skip") == 0


def test_predictions_on_skipped_images_are_dropped_and_counted(files, capsys):
    content, predictions = noisy_case()
    folder = files / "images"
    folder.mkdir()
    for image_id in IMAGE_IDS:
        draw_noise(folder / f"{image_id}.png", 200, 220)
    damage(folder / "5.png")
    del content["images"][3]["height"]
    (files / "val.json").write_text(json.dumps(content))
    output = ["--images", str(folder), "--output", str(files / "skipped")]
    assert run(files, *output) == 1
    assert "set --on-bad-data to 'skip'" in capsys.readouterr().err
    assert run(files, *output, "--on-bad-data", "skip") == 0
    scores = json.loads((files / "skipped" / "scores.json").read_text())
    assert "Left out as --on-bad-data is 'skip': 1 x image" in scores["notes"][-2]
    dropped = sum(prediction["image_id"] in (5, 6) for prediction in predictions)
    assert scores["notes"][-1] == (
        f"{dropped} of {len(predictions)} predictions are on images left out."
    )
    # The same as if neither json had ever named these images.
    for key in ("images", "annotations"):
        entries = content[key]
        content[key] = [e for e in entries if e.get("image_id", e["id"]) not in (5, 6)]
    (files / "val.json").write_text(json.dumps(content))
    rest = [prediction for prediction in predictions if prediction["image_id"] not in (5, 6)]
    (files / "predictions.json").write_text(json.dumps(rest))
    assert scores["bbox"]["AP"] == 100 * plain_pycocotools(files).stats[0]
    (files / "predictions.json").write_text(json.dumps([*rest, {**rest[0], "image_id": 77}]))
    assert run(files, "--on-bad-data", "skip") == 1
    assert "1 x prediction with an unknown 'image_id'" in capsys.readouterr().err


def test_links_out_of_the_folder_of_images(files, tmp_path_factory, capsys):
    far, folder = tmp_path_factory.mktemp("far"), files / "images"
    folder.mkdir()
    for image_id in IMAGE_IDS:
        cv2.imwrite(str(far / f"{image_id}.png"), np.zeros((200, 220, 3), np.uint8))
        (folder / f"{image_id}.png").symlink_to(far / f"{image_id}.png")
    assert run(files, "--images", str(folder)) == 1
    assert "4 x image behind a link out of its folder, which --follow-links 'near' does" in (
        capsys.readouterr().err
    )
    assert run(files, "--images", str(folder), "--follow-links", "all") == 0
    assert run(files) == 0  # where no image is looked at, links do not matter


def test_annotations_are_needed(files, capsys):
    content, _ = noisy_case()
    del content["annotations"]
    (files / "val.json").write_text(json.dumps(content))
    assert run(files) == 1
    assert "has no annotations to score against" in capsys.readouterr().err


def of_predict(content, predictions):
    """The same predictions as predict.py writes them: other ids, and paths."""
    ids = {image_id: number for number, image_id in enumerate(reversed(IMAGE_IDS), start=1)}
    names = {image["id"]: image for image in content["images"]}
    return {
        "images": [
            {**names[image_id], "id": number, "file_name": f"photos/{image_id}.png"}
            for image_id, number in ids.items()
        ],
        "annotations": [
            {**entry, "image_id": ids[entry["image_id"]], "id": 5, "area": 1.0, "iscrowd": 0}
            for entry in predictions
        ],
        "failed": [],
        "categories": content["categories"],
        "older_pictures": [],
        "others": [],
    }


def test_predictions_of_predict_are_scored_as_any_others(files):
    assert run(files, "--output", str(files / "list")) == 0
    content, predictions = noisy_case()
    written = of_predict(content, predictions)
    written["failed"] = [{"file_name": "photos/x.png", "reason": "is not a file"}]
    (files / "predictions.json").write_text(json.dumps(written))
    assert run(files, "--output", str(files / "ours")) == 0
    by_list, ours = (
        json.loads((files / name / "scores.json").read_text()) for name in ("list", "ours")
    )
    assert ours["bbox"] == by_list["bbox"]
    assert ours["analysis"] == by_list["analysis"]
    assert ours["notes"] == [
        "1 images failed in prediction: see 'failed' there.",
        *by_list["notes"],
    ]


def test_images_that_were_not_predicted_are_told(files):
    content, predictions = noisy_case()
    kept = [p for p in predictions if p["image_id"] != IMAGE_IDS[-1]]
    written = of_predict(content, kept)
    assert written["images"].pop(0)["file_name"] == f"photos/{IMAGE_IDS[-1]}.png"
    (files / "predictions.json").write_text(json.dumps(written))
    assert run(files, "--output", str(files / "out")) == 0
    scores = json.loads((files / "out" / "scores.json").read_text())
    assert scores["notes"][0] == (
        f"1 images of the json are not in the predictions (such as '{IMAGE_IDS[-1]}.png'): "
        "their objects count as missed."
    )


def test_names_of_images_are_compared_from_their_end(files):
    content, predictions = noisy_case()
    names = dict(zip(IMAGE_IDS, ("1.png", "day/1.png", "night/1.png", "3.png"), strict=True))
    for image in content["images"]:
        image["file_name"] = names[image["id"]]
    written = of_predict(content, predictions)
    for image, image_id in zip(written["images"], reversed(IMAGE_IDS), strict=True):
        image["file_name"] = f"/any/where/{names[image_id]}"
    (files / "val.json").write_text(json.dumps(content))
    (files / "predictions.json").write_text(json.dumps(written))
    assert run(files, "--output", str(files / "out")) == 0
    scores = json.loads((files / "out" / "scores.json").read_text())
    (files / "predictions.json").write_text(json.dumps(predictions))
    assert scores["bbox"]["AP"] == 100 * plain_pycocotools(files).stats[0]


def test_predictions_of_other_images_or_classes_are_told(files, capsys):
    content, predictions = noisy_case()
    wrong = of_predict(content, predictions)
    wrong["images"][0]["file_name"] = "photos/77.png"
    wrong["images"][1]["width"] = 77
    wrong["images"][2]["file_name"] = None
    wrong["images"].append({**wrong["images"][3], "id": 99})
    wrong["images"].append({**wrong["images"][3], "id": [1]})
    wrong["categories"] = [{"id": 3, "name": "dog"}, {"id": 7, "name": "dog"}, 5]
    wrong["annotations"] = [*predictions[:1], {"image_id": [1]}, 5]
    (files / "predictions.json").write_text(json.dumps(wrong))
    assert run(files) == 1
    error = capsys.readouterr().err
    for line in (
        "predictions.json: does not fit the annotations",
        "1 x category of another name: 3: 'dog', not 'cat'",
        "1 x image that the annotations do not have: 'photos/77.png'",
        "1 x image of another size: 'photos/5.png'",
        "1 x image without a file name: ",
        "1 x image listed twice: 'photos/1.png'",
        "1 x image without a usable id: 'photos/1.png'",
        "3 x prediction on an image that is not listed: ",
    ):
        assert line in error
    # Issues of a single prediction are told as those of a list.
    wrong = of_predict(content, predictions)
    wrong["annotations"][0]["score"] = None
    (files / "predictions.json").write_text(json.dumps(wrong))
    assert run(files) == 1
    assert "1 x prediction whose 'score' is not a finite number" in capsys.readouterr().err


def test_scores_replace_no_input(files, capsys):
    (files / "predictions.json").rename(files / "scores.json")
    before = (files / "scores.json").read_bytes()
    arguments = ["--json", f"{files}/val.json", "--predictions", f"{files}/scores.json"]
    assert eval_json.main([*arguments, "--output", str(files)]) == 1
    assert "scores.json: would replace" in capsys.readouterr().err
    assert (files / "scores.json").read_bytes() == before


def test_an_analysis_replaces_no_input(files, capsys):
    (files / "analysis").mkdir()
    (files / "analysis" / "per_class.csv").write_text((files / "predictions.json").read_text())
    (files / "link").symlink_to(files)
    before = (files / "analysis" / "per_class.csv").read_bytes()
    for output in (files, files / "link"):
        options = ("--predictions", str(files / "analysis" / "per_class.csv"))
        assert run(files, *options, "--output", str(output)) == 1
        assert "analysis would replace" in capsys.readouterr().err
    assert (files / "analysis" / "per_class.csv").read_bytes() == before
    assert not (files / "scores.json").exists()


plain = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
good = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from(IMAGE_IDS),
        "category_id": st.sampled_from(CATEGORY_IDS),
        "bbox": st.lists(st.floats(0, 100), min_size=4, max_size=4),
        "score": st.floats(0, 1),
    }
)
doubtful = st.fixed_dictionaries(
    {},
    optional={
        "image_id": st.sampled_from(IMAGE_IDS) | values,
        "category_id": st.sampled_from(CATEGORY_IDS) | values,
        "bbox": st.lists(st.floats(0, 100) | plain, min_size=3, max_size=5) | values,
        "score": st.floats(0, 1) | values,
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(good, max_size=4) | st.lists(good | doubtful | values, max_size=4) | values)
def test_any_json_is_scored_or_refused(files, content):
    path = files / "predictions.json"
    path.write_text(json.dumps(content))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = run(files)
    usable = isinstance(content, list) and all(map(is_prediction, content))
    assert status == int(not usable)
    assert (str(path) in errors.getvalue()) == (not usable)


def is_prediction(entry):
    try:
        numbers = [*entry["bbox"], entry["score"]]
        return (
            entry["image_id"] in IMAGE_IDS
            and entry["category_id"] in CATEGORY_IDS
            and len(entry["bbox"]) == 4
            and min(entry["bbox"][2:]) >= 0
            and all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers)
            and type(entry["image_id"]) is type(entry["category_id"]) is int
        )
    except (TypeError, KeyError):
        return False


def test_the_limit_of_detections_can_be_set(files, capsys):
    expected = {}
    for limit in ("1", "100"):
        assert run(files, "--max-detections", limit, "--output", str(files / limit)) == 0
        expected[limit] = json.loads((files / limit / "scores.json").read_text())
        told = "Raise --max-detections." in capsys.readouterr().out
        assert told == (limit == "1")
    truth = COCO(str(files / "val.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(files / "predictions.json")), "bbox")
    evaluation.params.maxDets = [1, 10, 100]
    evaluation.evaluate()
    evaluation.accumulate()
    for index, limit in ((0, "1"), (2, "100")):
        precision = evaluation.eval["precision"][:, :, :, 0, index]
        ap = 100 * precision[precision > -1].mean()
        assert expected[limit]["bbox"]["AP"] == pytest.approx(ap, abs=1e-9)
    assert expected["1"]["bbox"]["AP"] < expected["100"]["bbox"]["AP"]
    with pytest.raises(SystemExit):
        run(files, "--max-detections", "0")
