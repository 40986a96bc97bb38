"""Waits and operations on a pretended GPU, by part, beside Detectron2's."""

import pytest

from cascade_det.benchmark.models import why_no_detectron2
from cascade_det.benchmark.waits import measure_waits, waits_section

KINDS = ("ours", "ours, default exits", "ours-fast", "ours-fast, default exits")
IN_DETECTRON2 = ("plugin", "detectron2-cascade")
PARTS = {"preprocess", "backbone", "rpn", "stage0", "stage1", "stage2", "postprocess"}
# Of Detectron2's cascade with ResNet-18, which the tests of Detectron2 measure themselves.
DETECTRON2S_OPERATIONS = 690


@pytest.fixture(scope="module")
def measured(make_options):
    left_out = {}
    contenders = ("ours", "ours-fast", "ours-fast-exits", *IN_DETECTRON2)
    return measure_waits(make_options(contenders=contenders), left_out), left_out


def total(counted, key):
    return sum(part[key] for part in counted.values())


def test_every_part_is_counted(measured):
    results, _ = measured
    [inference] = results["inference"]
    for name in (*KINDS, "ours-fast-exits"):
        counted = inference["contenders"][name]
        gates = {part for part in counted if part.startswith("gate")}
        assert set(counted) - {"rest"} - gates == PARTS
        assert bool(gates) == ("exits" in name)
        assert all(part["operations"] > 0 for part in counted.values())
        assert counted["rpn"]["nms"] == 0  # an operation that is not waited for
    ours = inference["contenders"]["ours"]
    assert ours["preprocess"]["waits"] == ours["backbone"]["waits"] == 0
    assert total(ours, "waits") < total(inference["contenders"]["ours, default exits"], "waits")
    step = results["training"]["contenders"]["ours"]
    assert step["metrics"]["waits"] == 1
    assert (step["backward"]["waits"], step["optimizer"]["waits"]) == (0, 0)


def test_ours_sends_no_more_operations_than_detectron2(measured):
    results, left_out = measured
    [inference] = results["inference"]
    models = inference["contenders"]
    most = DETECTRON2S_OPERATIONS
    if why_no_detectron2():
        assert set(IN_DETECTRON2) <= left_out.keys()
    else:
        theirs = models["detectron2-cascade"]
        most = total(theirs, "operations")
        assert most <= DETECTRON2S_OPERATIONS
        assert total(models["plugin"], "waits") < total(theirs, "waits")
        steps = results["training"]["contenders"]
        assert total(steps["ours"], "waits") < total(steps["detectron2-cascade"], "waits")
    for name in KINDS:
        assert total(models[name], "operations") <= most


def test_the_table_has_all_models(measured):
    results, _ = measured
    section = waits_section(results)
    for counted in (*results["inference"], results["training"]):
        for name, parts in counted["contenders"].items():
            sums = f"{total(parts, 'waits')} / {total(parts, 'operations')}"
            assert any(f"| {name} " in line and sums in line for line in section.splitlines())
