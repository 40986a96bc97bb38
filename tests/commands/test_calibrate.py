"""The command: from a trained detector and images to exits that hold what they promise."""

import csv
import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from calibration_case import INSTANT, make_calibration_case
from small_backbones import ATTENTION

from cascade_det import __version__
from cascade_det.calibration import calibrate as calibrate_module
from cascade_det.calibration import comparison as exit_comparison
from cascade_det.calibration.calibrator import Calibrator
from cascade_det.calibration.front_plot import plot_front
from cascade_det.calibration.profiles import PROMISES
from cascade_det.calibration.recording import _SHARES, Timing, time_policies
from cascade_det.calibration.target import Options
from cascade_det.commands import calibrate
from cascade_det.config import load_config
from cascade_det.engine.devices import device_name
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.hosts import load_host
from cascade_det.standalone import host
from cascade_det.weights import read_weights_file, weights_sha256

FILES = [
    *("calibration.json", "comparison.csv", "exits.yaml", "front.csv", "front.png", "report.html")
]
PROFILES = ("quality", "balanced", "fast")
TARGETS = {
    "drop": ["--max-ap-drop", "20"],
    "latency": ["--latency-ms", "100000"],
    "rate": ["--exit-rate", "0.1"],
    "risk": ["--risk", "0.5", "--delta", "0.2"],
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_calibration_case(tmp_path_factory.mktemp("case"), images=8)


DRAWN = []


def _fewer_pictures(front, path, **arguments):
    """The first one alone."""
    if not DRAWN:
        plot_front(front, path, **arguments)
        DRAWN.append(cv2.imread(str(path)).shape)
    else:
        path.touch()


def names_in(folder):
    """The files of a calibration, which names the profiles among them itself."""
    written = json.loads((folder / "calibration.json").read_text())["profiles"]["written"]
    assert set(written) <= set(PROFILES)
    return sorted([*FILES, *(f"{name}.yaml" for name in written)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}


MASK_MS = 2.0


def _made_up_times(*arguments, **options):
    """Of regions and masks; no tile takes any time, so that no tile gate saves some by chance."""

    def timed(call):
        masks = MASK_MS * call.masks
        milliseconds = 6 + 0.01 * sum(call.entered) + masks
        return call._replace(
            milliseconds=milliseconds, map_milliseconds=5.0, mask_milliseconds=masks
        )

    measured = time_policies(*arguments, **options)
    return {name: [timed(call) for call in calls] for name, calls in measured.items()}


def _two_times(detector, batches, policies, *, rounds):
    """Measured of the full cascade and of what was chosen; the others take as long as the first."""
    first = dict(list(policies.items())[:2])
    measured = time_policies(detector, batches, first, rounds=rounds)
    return {name: measured.get(name, measured["full cascade"]) for name in policies}


def _time_of_tiles(*arguments, **options):
    """Made up: regions take nothing to speak of, and tiles 1 ms if they are open or whole."""
    measured = time_policies(*arguments, **options)
    most = max(call.tiles for calls in measured.values() for call in calls)
    rates = np.array([1.0, 1.5, 0.7, 0.5])

    def timed(call):
        maps = 5 + float(rates @ (call.tile_work if call.tiles else (most, 0, 0, 0)))
        milliseconds = maps + 1 + 1e-3 * sum(call.entered)
        return call._replace(milliseconds=milliseconds, map_milliseconds=maps)

    return {name: [timed(call) for call in calls] for name, calls in measured.items()}


def _gates_taking(*milliseconds):
    def of_policies(detector, batches, policies, *, rounds):
        return {name: [Timing((0, 0, 0), 1.0, gates=milliseconds)] for name in policies}

    return of_policies


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure little, and compare with less: these take longer than everything else."""
    options = functools.partial(Options, timed_batches=1, rounds=1)
    monkeypatch.setattr("cascade_det.calibration.target.Options", options)
    assessment = "cascade_det.calibration.assessment"
    monkeypatch.setattr(f"{assessment}.usual_settings", lambda *_, **__: {})
    monkeypatch.setattr("cascade_det.calibration.recording._SHARES", _SHARES[:5])
    monkeypatch.setattr("cascade_det.calibration.recording.time_policies", _made_up_times)
    # Of so small a model, any gate may take longer than what it saves.
    monkeypatch.setattr("cascade_det.calibration.gate_costs.time_policies", _gates_taking(0, 0, 0))
    fewer_rounds = functools.partial(exit_comparison.compare, rounds=20)
    monkeypatch.setattr(f"{assessment}.compare", fewer_rounds)
    monkeypatch.setattr("cascade_det.calibration.report.plot_front", _fewer_pictures)
    monkeypatch.setattr(f"{assessment}.time_policies", _two_times)
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_analysis", lambda *_, **__: None)


def run(case, output, *arguments, options=(), host="standalone"):
    flags = ["--host", host, "--config-file", str(INSTANT), "--output", str(output)]
    if not any(a.startswith("--trials") for a in arguments):
        arguments = ["--trials", "16", "--score-threshold", "0.3", *arguments]
    return calibrate.main([*flags, *arguments, *case.options, *options])


@pytest.fixture(scope="module")
def calibrated(case, tmp_path_factory):
    """``calibrated(target, host)``: the folder of a calibration, made once."""

    @functools.cache
    def make(target, host="standalone"):
        output = tmp_path_factory.mktemp(target)
        assert run(case, output, *TARGETS[target], host=host) == 0
        return output

    return make


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *((target, "standalone") for target in TARGETS),
        pytest.param("drop", "detectron2", marks=pytest.mark.needs_detectron2),
        pytest.param("risk", "detectron2", marks=pytest.mark.needs_detectron2),
    ],
)
@pytest.mark.usefixtures("own_catalog")
def test_an_evaluation_gives_what_was_promised(case, calibrated, target, name, tmp_path):
    if name == "detectron2":
        pytest.importorskip("detectron2.engine", exc_type=ImportError)
    left = assert_as_promised(case, calibrated(target, name), name, tmp_path)
    if target == "rate":
        assert left < 1
    cfg = load_config([INSTANT, calibrated(target, name) / "exits.yaml"])
    assert (cfg.MODEL.CASCADE.EXIT.DEVICE_NAME == "") == (target != "latency")


def test_exits_of_a_backbone_with_attention(tmp_path):
    folder = tmp_path / "case"
    case = make_calibration_case(folder, images=8, backbone=ATTENTION["efficientvit"])
    assert run(case, tmp_path / "exits", *TARGETS["drop"]) == 0
    assert assert_as_promised(case, tmp_path / "exits", "standalone", tmp_path / "run") < 1


@pytest.mark.parametrize("target", ["drop", "latency", "rate", "risk"])
def test_a_tile_threshold_that_saves_time(case, tmp_path, monkeypatch, target):
    monkeypatch.setattr("cascade_det.calibration.recording.time_policies", _time_of_tiles)
    monkeypatch.setattr(calibrate_module, "images_to_search", lambda *_: np.inf)
    # A few images cannot show that so small a model loses nothing.
    monkeypatch.setattr("cascade_det.calibration.choose.USUAL_DROP", 90.0)
    for name in PROMISES:
        monkeypatch.setitem(PROMISES, name, 90.0)
    arguments = {
        "drop": ["--max-ap-drop", "90"],
        "latency": ["--latency-ms", "12"],
        "rate": ["--exit-rate", "0.1"],
    }.get(target, TARGETS[target])
    assert run(case, tmp_path / "exits", *arguments) == 0
    exits = yaml.safe_load((tmp_path / "exits" / "exits.yaml").read_text())
    assert exits["MODEL"]["CASCADE"]["EXIT"]["TILE_THRESHOLD"] > 0
    assert_as_promised(case, tmp_path / "exits", "standalone", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = json.loads((tmp_path / "exits" / "calibration.json").read_text())["expected"]
    for kind in ("open", "computed"):
        share = results["exits"]["tiles"][f"{kind}_share"]
        assert share == pytest.approx(expected[f"tiles_{kind}"])
    quality = yaml.safe_load((tmp_path / "exits" / "quality.yaml").read_text())
    assert quality["MODEL"]["CASCADE"]["EXIT"]["TILE_THRESHOLD"] > 0


def test_the_path_is_chosen_for_the_target(case, tmp_path, monkeypatch, capfd):
    def choose_path(_, target):
        raise ConfigError(f"chosen for {target.max_ap_drop}")

    monkeypatch.setattr(Calibrator, "choose_path", choose_path)
    assert run(case, tmp_path / "exits", "--max-ap-drop", "7") == 1
    assert "chosen for 7.0" in capfd.readouterr().err


def test_no_setting_is_faster_than_the_fastest_that_is_named(case, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("cascade_det.calibration.recording.time_policies", _time_of_tiles)
    monkeypatch.setattr(calibrate_module, "images_to_search", lambda *_: np.inf)
    assert run(case, tmp_path / "exits", "--latency-ms", "1") == 1
    said = re.search(r"the fastest setting takes (\S+) ms", capfd.readouterr().err)
    faster = str(float(said.group(1)) - 0.1)
    assert run(case, tmp_path / "faster", "--latency-ms", faster) == 1


def test_gates_that_take_longer_than_they_save_are_off(case, tmp_path, monkeypatch):
    times = _gates_taking(0, 1e6, 1e6)
    monkeypatch.setattr("cascade_det.calibration.gate_costs.time_policies", times)
    assert run(case, tmp_path / "exits", *TARGETS["drop"]) == 0
    exits = yaml.safe_load((tmp_path / "exits" / "exits.yaml").read_text())
    off = exits["MODEL"]["CASCADE"]["EXIT"]["GATES_OFF"]
    assert off
    assert set(off) <= {1, 2}
    assert "ms: it is switched off" in (tmp_path / "exits" / "log.txt").read_text()
    assert_as_promised(case, tmp_path / "exits", "standalone", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not {f"gate{gate}" for gate in off} & results["latency"]["parts"].keys()


def assert_as_promised(case, folder, name, output):
    """By an evaluation in a host; returns the share of regions that are left."""
    host = load_host(name)
    promised = json.loads((folder / "calibration.json").read_text())
    options = case.with_truth("reporting", case.truth)
    files = [INSTANT, folder / "exits.yaml"]
    shadow = ["CASCADE.SHADOW_SHARE", "1.0", "OUTPUT_DIR", str(output)]
    cfg = host.load_config(files, [*options, *shadow])
    host.check_config(cfg)
    results = host.evaluate(cfg)
    expected, exits = promised["expected"], results["exits"]
    assert promised["images"] == {"chosen_on": 8, "reported_on": 8}
    assert results["bbox"]["AP"] == pytest.approx(expected["AP"], abs=1e-3)
    entered = [exits[f"stage{stage}"]["entered"] for stage in range(3)]
    full = 8 * 60
    assert sum(entered) / (3 * full) == pytest.approx(expected["regions_left"])
    assert 1 - sum(entered[1:]) / (2 * full) == pytest.approx(expected["exit_rate"])
    assert results["shadow"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    return sum(entered) / (3 * full)


def front_of(folder):
    with (folder / "front.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return value is not None


class TestFiles:
    def test_they_are_whole_and_readable(self, calibrated):
        folder = calibrated("drop")
        assert sorted(contents(folder)) == names_in(folder)
        content = json.loads((folder / "calibration.json").read_text())
        assert finite(content)
        assert content["trials"] == len(front_of(folder))
        front = front_of(folder)
        assert {row["head FLOPs left"] for row in front} >= {"1.0"}
        for row in front:
            json.loads(row["setting"])
            assert float(row["AP (%)"]) >= 0
        with (folder / "comparison.csv").open(newline="") as file:
            named = {row["exits"]: row for row in csv.DictReader(file)}
        assert {"full cascade", "chosen", "1 stage", "50 proposals", "oracle"} <= named.keys()
        for name in ("full cascade", "chosen", "1 stage", "50 proposals"):
            assert float(named[name]["ms/image"]) > 0
        expected = content["expected"]
        assert float(named["chosen"]["AP (%)"]) == pytest.approx(expected["AP"])
        assert float(named["chosen"]["lost"]) == pytest.approx(expected["lost_true_positives"])
        assert DRAWN[0][0] > 300

    def test_the_settings_can_be_put_on_top(self, case, calibrated):
        for name in sorted(n for n in contents(calibrated("drop")) if n.endswith(".yaml")):
            path = calibrated("drop") / name
            cfg = load_config([INSTANT, path], case.options)
            host.check_config(cfg)
            assert cfg.MODEL.CASCADE.EXIT.EXPECTED_LOSS >= 0
            assert cfg.CASCADE.SHADOW_SCORE == 0.3
            assert "&" not in path.read_text()
            plain = yaml.safe_load(path.read_text())["MODEL"]["CASCADE"]["EXIT"]
            # All that says who leaves is said, so that nothing below shines through.
            assert {"PRUNE_THRESHOLDS", "REDUNDANCY_IOU", "THRESHOLDS", "REGION_BUDGET"} <= set(
                plain
            )

    def test_they_name_what_they_rest_on(self, case, calibrated):
        folder = calibrated("drop")
        content = json.loads((folder / "calibration.json").read_text())
        cfg = load_config(INSTANT, case.options)
        sha256 = weights_sha256(read_weights_file(cfg.MODEL.WEIGHTS).weights)
        of_file = hashlib.sha256(Path(cfg.MODEL.WEIGHTS).read_bytes()).hexdigest()
        truth = case.folder / "truth.json"
        of_truth = hashlib.sha256(truth.read_bytes()).hexdigest()
        assert content["weights"] == {
            **{"file": cfg.MODEL.WEIGHTS, "sha256": sha256, "file_sha256": of_file}
        }
        assert content["data"]["json_file"] == str(truth)
        assert content["data"]["json_sha256"] == of_truth
        assert content["data"]["images"] == 8
        assert content["device_name"] == device_name("cpu")
        assert content["version"] == __version__
        for path in folder.glob("*.yaml"):
            comment, told = path.read_text(), load_config([INSTANT, path], case.options)
            assert sha256 == told.MODEL.CASCADE.EXIT.WEIGHTS_SHA256
            named = (of_file, of_truth, str(truth), "8 images", __version__, device_name("cpu"))
            assert all(words in comment for words in named)

    def test_a_second_run_replaces_them(self, case, calibrated, tmp_path):
        shutil.copytree(calibrated("drop"), tmp_path / "again")
        before = contents(tmp_path / "again")
        assert run(case, tmp_path / "again", "--exit-rate", "0.0", "--trials=2") == 0
        after = contents(tmp_path / "again")
        assert sorted(after) == names_in(tmp_path / "again")
        assert json.loads(after["calibration.json"])["target"]["exit_rate"] == 0.0
        assert before["calibration.json"] != after["calibration.json"]
        # The log goes on where it was.
        log = (tmp_path / "again" / "log.txt").read_text()
        assert log.startswith((calibrated("drop") / "log.txt").read_text())
        assert log.count("Written to") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["again"]

    def test_ctrl_c_leaves_what_was_there(self, case, calibrated, tmp_path, monkeypatch):
        shutil.copytree(calibrated("drop"), tmp_path / "again")
        before, made = contents(tmp_path / "again"), []

        def interrupted(_, path, **__):
            made.extend(contents(path.parent))
            raise KeyboardInterrupt

        monkeypatch.setattr("cascade_det.calibration.report.plot_front", interrupted)
        assert run(case, tmp_path / "again", "--max-ap-drop", "9", "--trials=2") == 130
        assert "exits.yaml" in made
        assert contents(tmp_path / "again") == before
        assert [path.name for path in tmp_path.iterdir()] == ["again"]

    @pytest.mark.parametrize("count", [0, 1, len(FILES)])
    @pytest.mark.parametrize("existing", [True, False])
    def test_files_of_two_calibrations_never_stand_side_by_side(
        self, case, tmp_path, monkeypatch, count, existing
    ):
        """Whatever stops it, after however many files."""

        def full_disk(*arguments):
            for name in FILES[:count]:
                (arguments[3] / name).write_text("new")
            raise OSError(28, "No space left on device")

        folder = tmp_path / "out"
        if existing:
            folder.mkdir()
            for name in FILES:
                (folder / name).write_text("old")
        monkeypatch.setattr(calibrate_module, "_calibrate", full_disk)
        assert run(case, folder, "--max-ap-drop", "9") == 1
        assert contents(folder) == dict.fromkeys(FILES if existing else (), b"old")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_a_killed_calibration_left_goes_with_the_next(self, case, tmp_path, monkeypatch):
        left = tmp_path / ".cascade_det-0123456789abcdef.tmp"
        left.mkdir()
        (left / "exits.yaml").write_text("half")
        (tmp_path / ".draft.tmp").write_text("mine")
        monkeypatch.setattr(calibrate_module, "_calibrate", lambda *_, **__: {})
        assert run(case, tmp_path / "out", "--max-ap-drop", "9") == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [".draft.tmp", "out"]

    def test_the_log_is_kept_where_files_have_one_name_each(self, case, tmp_path, monkeypatch):
        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        monkeypatch.setattr(calibrate_module, "_calibrate", lambda *_, **__: {})
        assert run(case, tmp_path / "out", "--max-ap-drop", "9") == 0
        assert "Host: standalone" in (tmp_path / "out" / "log.txt").read_text()

    def test_a_folder_with_something_else_is_refused_before_any_work(
        self, case, tmp_path, capfd, monkeypatch
    ):
        (tmp_path / "photo.jpg").write_bytes(b"mine")
        (tmp_path / "log.txt").write_text("mine")
        monkeypatch.setattr(host, "open_detector", lambda _: pytest.fail("it loads the detector"))
        assert run(case, tmp_path, "--exit-rate", "0.1") == 1
        assert "photo.jpg" in capfd.readouterr().err
        for name in ("photo.jpg", "log.txt"):
            assert (tmp_path / name).read_bytes() == b"mine"

    def test_exits_that_it_starts_from_are_not_replaced(self, case, tmp_path, capfd, monkeypatch):
        monkeypatch.setattr(host, "open_detector", lambda _: pytest.fail("it loads the detector"))
        exits = tmp_path / "exits.yaml"
        exits.write_text("MODEL: {CASCADE: {EXIT: {ENABLED: False}}}")
        before = contents(tmp_path)
        assert run(case, tmp_path, "--exit-rate", "0.1", "--config-file", str(exits)) == 1
        assert f"would replace {exits}" in capfd.readouterr().err
        assert contents(tmp_path) == before


@pytest.fixture
def choose(monkeypatch):
    """``choose(setting)``: the result is this one, of a free search."""

    def make(setting):
        def last(sequence, *_):
            return sequence.always(len(sequence.settings) - 1)

        settings = [{}, setting] if setting else [{}]
        monkeypatch.setattr(calibrate_module, "images_to_search", lambda *_: 0)
        monkeypatch.setattr(Calibrator, "_front", lambda _: settings)
        monkeypatch.setattr("cascade_det.calibration.calibrator.choose", last)

    return make


def test_where_nothing_may_leave_exits_are_off(case, tmp_path, choose):
    choose({})
    assert run(case, tmp_path, "--max-ap-drop", "0", "--trials=1") == 0
    cfg = load_config([INSTANT, tmp_path / "exits.yaml"], case.options)
    host.check_config(cfg)
    assert not cfg.MODEL.CASCADE.EXIT.ENABLED
    assert json.loads((tmp_path / "calibration.json").read_text())["expected"]["work"] == 1


def test_a_model_with_learned_exits(tmp_path, choose):
    names = ("iou_head", "gate", "pruner")
    case = make_calibration_case(tmp_path / "case", images=4, learned=names)
    for setting in ({}, {"PRUNER_THRESHOLDS": (0.0, 0.8, 0.0)}):
        choose(setting)
        assert run(case, tmp_path / "out", "--exit-rate", "0", "--trials=1") == 0
        cfg = load_config([INSTANT, tmp_path / "out" / "exits.yaml"], case.options)
        host.check_config(cfg)
        # The model keeps its learned parts where none of them is used.
        assert cfg.MODEL.CASCADE.EXIT.ENABLED
        expected = json.loads((tmp_path / "out" / "calibration.json").read_text())["expected"]
        assert (expected["work"] == 1) == (not setting)
    detector, _, loader = host.open_detector(cfg)
    stats = detector.eval().detect(next(iter(loader))).stats
    assert 0 < stats.left[0]["background"] < stats.entered[0]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_calibration_case(tmp_path_factory.mktemp("masked"), images=8, masks=True)


class TestMasks:
    @pytest.mark.parametrize(
        "name", ["standalone", pytest.param("detectron2", marks=pytest.mark.needs_detectron2)]
    )
    @pytest.mark.usefixtures("own_catalog")
    def test_an_evaluation_gives_what_was_promised(self, masked, tmp_path, name):
        if name == "detectron2":
            pytest.importorskip("detectron2.engine", exc_type=ImportError)
        host, folder = load_host(name), tmp_path / "out"
        target = ["--exit-rate", "0.2", "--metric", "segm/AP", "--loss", "masks"]
        options = masked.with_truth("masked", masked.truth)  # a name of its own in the catalog
        assert run(masked, folder, *target, options=options, host=name) == 0
        content = json.loads((folder / "calibration.json").read_text())
        assert {key: content["target"][key] for key in ("metric", "loss")} == {
            **{"metric": "segm/AP", "loss": "masks"}
        }
        expected = content["expected"]
        assert abs(expected["segm/AP_change"]) < 4
        assert expected["work"] < 1
        options = masked.with_truth(f"masked_{name}", masked.truth)
        cfg = host.load_config(
            [INSTANT, folder / "exits.yaml"], [*options, "OUTPUT_DIR", str(tmp_path / "eval")]
        )
        host.check_config(cfg)
        results = host.evaluate(cfg)
        assert results["bbox"]["AP"] == pytest.approx(expected["AP"], abs=1e-3)
        assert results["segm"]["AP"] == pytest.approx(expected["segm/AP"], abs=1e-3)
        assert 2 < results["segm"]["AP"] < 98
        masks = results["exits"]["masks"]["masks_per_image"]
        assert masks == pytest.approx(expected["masks_per_image"])

        with (folder / "comparison.csv").open(newline="") as file:
            rows = {row["exits"]: row for row in csv.DictReader(file)}
        assert float(rows["chosen"]["segm/AP (%)"]) == pytest.approx(expected["segm/AP"])
        assert float(rows["chosen"]["masks/image"]) == pytest.approx(masks)
        change = float(rows["chosen"]["segm/AP change"])
        assert change == pytest.approx(expected["segm/AP_change"])
        with (folder / "masks.csv").open(newline="") as file:
            everything, *fewer = csv.DictReader(file)
        assert float(everything["segm/AP (%)"]) == pytest.approx(expected["segm/AP"])
        assert all(float(row["masks/image"]) <= masks for row in fewer)
        assert min(float(row["masks/image"]) for row in fewer) < masks
        assert content["latency_model"]["per_mask"] == pytest.approx(MASK_MS)
        front = (folder / "front.csv").read_text()
        assert front.startswith("segm/AP (%),segm/AP drop")

    def test_objects_without_masks_leave_the_boxes(self, masked, tmp_path, capfd):
        truth = masked.truth
        for annotation in truth["annotations"]:
            del annotation["segmentation"]
        options = masked.with_truth("maskless", truth)
        target = ["--exit-rate", "0", "--trials=2"]
        assert run(masked, tmp_path / "out", *target, options=options) == 0
        told = "".join(capfd.readouterr())
        assert "has no masks (segmentation): AP is of boxes" in told
        expected = json.loads((tmp_path / "out" / "calibration.json").read_text())["expected"]
        assert expected["masks_per_image"] > 1
        assert "segm/AP" not in expected
        target += ["--metric", "segm/AP"]
        assert run(masked, tmp_path / "out", *target, options=options) == 1
        assert "which --metric segm/AP and --loss masks need" in capfd.readouterr().err

    @pytest.mark.parametrize("arguments", [["--metric", "segm/AP"], ["--loss", "masks"]])
    def test_a_model_without_masks(self, case, tmp_path, capfd, monkeypatch, arguments):
        monkeypatch.setattr(host, "open_detector", lambda _: pytest.fail("it loads the detector"))
        assert run(case, tmp_path, "--exit-rate", "0.1", *arguments) == 1
        assert re.search("need masks.*MODEL.MASK_ON", capfd.readouterr().err)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--exit-rate", "2"], ["--exit-rate is 2.0"]),
            (["--risk", "0.02", "--images", "100"], ["at least 114 images", "100"]),
            (["--exit-rate", "0.5", "--trials", "0"], ["--trials is 0"]),
            (["--exit-rate", "0.5", "MODEL.WIEGHTS", "x"], ["MODEL.WIEGHTS", "MODEL.WEIGHTS"]),
        ],
    )
    def test_of_the_command_line(self, tmp_path, capfd, monkeypatch, arguments, words):
        monkeypatch.setattr(host, "open_detector", lambda _: pytest.fail("it loads the detector"))
        flags = ["--host", "standalone", "--config-file", str(INSTANT), "--output", str(tmp_path)]
        assert calibrate.main([*flags, *arguments]) == 1
        told = "".join(capfd.readouterr())
        assert all(word in told for word in words)
        assert "Traceback" not in told

    @pytest.mark.parametrize(
        ("arguments", "content", "words"),
        [
            (["--risk", "0.02"], {}, "at least 114 images.* but there are 8"),
            (["--exit-rate", "0.5"], {"annotations": None}, "changed.json has no annotations"),
            (["--exit-rate", "0.5"], {"annotations": 1}, "Only 1 of the 8 images has"),
            (["--exit-rate", "0.5"], {"annotations": 3, "images": 3}, "3 are too few"),
            (["--exit-rate", "0.5", "DATASETS.TEST", "()"], {}, "DATASETS.TEST is empty"),
        ],
    )
    def test_of_the_data(self, case, tmp_path, capfd, monkeypatch, arguments, content, words):
        """``content``: how many images, or annotations of how many images, are left."""
        forbidden = functools.partial(pytest.fail, "it runs the detector")
        monkeypatch.setattr(calibrate_module, "record_dataset", lambda *_, **__: forbidden())
        truth = dict(case.truth)
        images = [image["id"] for image in truth["images"]]
        if "images" in content:
            truth["images"] = truth["images"][: content["images"]]
        if "annotations" in content:
            kept = images[: content["annotations"] or 0]
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
            if content["annotations"] is None:
                del truth["annotations"]
        options = case.with_truth("changed", truth)
        assert run(case, tmp_path, *arguments[:2], options=[*options, *arguments[2:]]) == 1
        assert re.search(words, capfd.readouterr().err, re.DOTALL)

    @pytest.mark.needs_detectron2
    @pytest.mark.usefixtures("own_catalog")
    def test_of_the_heads(self, case, tmp_path, capfd):
        pytest.importorskip("detectron2.engine", exc_type=ImportError)
        options = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.CASCADE.EXIT.ENABLED", "False"]
        assert run(case, tmp_path, "--exit-rate", "0.1", options=options, host="detectron2") == 1
        assert re.search("CascadeROIHeads.*EarlyExitCascadeROIHeads", capfd.readouterr().err)

    def test_what_no_setting_reaches(self, case, tmp_path, capfd):
        assert run(case, tmp_path, "--latency-ms", "0.001", "--trials=3") == 1
        assert "the fastest setting takes" in capfd.readouterr().err
        assert [path.name for path in Path(tmp_path).iterdir()] == ["log.txt"]


@pytest.mark.parametrize(("per_image", "limit"), [("50", 100), ("250", 250)])
def test_as_many_detections_count_as_in_an_evaluation(
    case, tmp_path, monkeypatch, per_image, limit
):
    asked = []

    def matcher(*_, max_detections):
        asked.append(max_detections)
        raise DatasetError("far enough")

    monkeypatch.setattr(calibrate_module, "ImageMatcher", matcher)
    options = ["TEST.DETECTIONS_PER_IMAGE", per_image]
    assert run(case, tmp_path, "--exit-rate", "0.5", options=options) == 1
    assert asked == [limit]
