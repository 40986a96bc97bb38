"""Both hosts train and evaluate on YOLO's files as on the json that they come from."""

import numpy as np
import pytest
from shape_runs import metrics_of, saved

from cascade_det.commands import convert

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_on_yolo_is_that_on_the_json(host, make_cfg, shapes, tmp_path):
    own = []
    for split in ("train", "val"):
        given = [f"{shapes / split}.json", "--images", str(shapes / split), "--to", "yolo"]
        assert convert.main([*given, "--output", str(tmp_path / split)]) == 0
        own.append((f"yolo_{split}", str(tmp_path / split / "data.yaml"), str(shapes / split)))
    sets = ["DATASETS.TRAIN", "('yolo_train',)", "DATASETS.TEST", "('yolo_val',)"]
    short = ["SOLVER.MAX_ITER", "2", "CASCADE.VALIDATION_LOSS", "True"]
    expected = host.train(make_cfg(*short, output="json"))
    cfg = make_cfg(*short, "CASCADE.DATASETS", str(own), *sets, output="yolo")
    results = host.train(cfg)
    assert saved(cfg)["run"]["class_names"] == saved(make_cfg(output="json"))["run"]["class_names"]
    for key, loss in expected["validation"].items():
        assert results["validation"][key] == pytest.approx(loss, rel=1e-3), key
    losses = [
        [line["total_loss"] for line in metrics_of(tmp_path / name) if "total_loss" in line]
        for name in ("yolo", "json")
    ]
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(*losses, rtol=1e-3)
    # Once more, as a second process or an evaluation would ask for it.
    assert "bbox" in host.evaluate(cfg, resume=True)
