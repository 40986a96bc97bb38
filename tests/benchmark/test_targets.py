"""Targets beside what was measured."""

from cascade_det.benchmark.targets import EMULATED, SpeedTarget, hold_targets

TARGET = SpeedTarget("heads alone", "heads", "ours", "baseline", 2.5)


def spread(value):
    return {"median": value, "low": value, "high": value, "samples": [value]}


def comparison(proposals, value):
    return {
        "batch": 1,
        "proposals": proposals,
        "ratios": [
            {"what": "ours", "against": "baseline", "ratio": spread(value)},
            {"what": "ours", "against": "another", "ratio": spread(99.0)},
        ],
    }


def results(device="cpu", models=None, **measured):
    return {"machine": {"device": device}, "contenders": models or {}, **measured}


def test_the_comparison_with_the_most_proposals_counts():
    heads = [comparison(100, 2.0), comparison(1000, 3.0)]
    [row] = hold_targets(results(heads=heads), [TARGET])
    assert (row["proposals"], row["ratio"]["median"], row["least"]) == (1000, 3.0, 2.5)


def test_speed_and_memory_have_targets_on_a_cpu_alone():
    peaks = {"ours": {"ratio": 0.8}, "detectron2-cascade": {"ratio": 1.0}}
    measured = {
        "heads": [comparison(1000, 3.0)],
        "memory": {"inference": {"batch": 1, "contenders": peaks}},
        "accuracy": {
            "settings": [
                {"setting": "plain", "AP": 60.0, "AP75": 70.0},
                {"setting": "fast", "AP": 59.95, "AP75": 70.5},
            ]
        },
    }
    rows = hold_targets(results(**measured), [TARGET])
    assert [(row["what"], row["contender"]) for row in rows] == [
        ("heads alone", "ours"),
        ("peak memory, inference", "ours"),
        ("AP, points", "fast"),
        ("AP75, points", "fast"),
    ]
    assert [round(row["ratio"], 2) for row in rows[1:]] == [0.8, -0.05, 0.5]
    assert hold_targets(results("cuda:0", **measured), [TARGET]) == rows[2:]


def test_a_baseline_in_an_emulated_dtype_is_marked():
    other = SpeedTarget("heads alone", "heads", "ours", "another", 2.0)
    models = {"baseline": "a baseline" + EMULATED, "another": "another baseline"}
    rows = hold_targets(results(models=models, heads=[comparison(10, 3.0)]), [TARGET, other])
    assert [row["what"] for row in rows] == ["heads alone" + EMULATED, "heads alone"]


def test_targets_without_a_measurement_are_left_out():
    missing = SpeedTarget("heads alone", "heads", "ours", "missing", 2.0)
    assert hold_targets(results(heads=[comparison(10, 2.0)]), [missing]) == []
    assert hold_targets(results()) == []
