"""What is claimed, beside what was measured."""

from cascade_det.benchmark.bar import EMULATED, Claim, hold_claims


def spread(value):
    return {"median": value, "low": value, "high": value, "samples": [value]}


def comparison(batch, proposals, value):
    return {
        "batch": batch,
        "proposals": proposals,
        "ratios": [
            {"what": "ours", "against": "peer", "ratio": spread(value)},
            {"what": "ours", "against": "another", "ratio": spread(99.0)},
        ],
    }


def results(device="cpu", **measured):
    return {"machine": {"device": device}, **measured}


def test_a_claim_is_about_the_most_proposals():
    measured = results(heads=[comparison(1, 100, 2.0), comparison(1, 1000, 3.0)])
    held = hold_claims(measured, [Claim("heads alone", "heads", "ours", "peer", 2.5)])
    assert [(row["proposals"], row["ratio"]["median"], row["least"]) for row in held] == [
        (1000, 3.0, 2.5)
    ]


def test_a_claim_on_a_batch_is_about_that_batch_and_one_on_a_device_about_that_device():
    measured = [comparison(1, 1000, 2.0), comparison(8, 1000, 3.0)]
    claims = [
        Claim("whole", "whole", "ours", "peer", 2.5, "cuda", 8),
        Claim("whole", "whole", "ours", "peer", 6.0, "cpu"),
        Claim("whole", "whole", "ours", "peer", 9.0, "cuda", 4),
    ]
    [row] = hold_claims(results("cuda:0", whole=measured), claims)
    assert (row["batch"], row["ratio"]["median"]) == (8, 3.0)
    [row] = hold_claims(results("cpu", whole=measured), claims)
    assert (row["batch"], row["least"]) == (1, 6.0)


def test_a_peer_whose_type_is_emulated_is_marked():
    claims = [Claim("heads alone", "heads", "ours", peer, 2.0) for peer in ("peer", "another")]
    words = {"peer": "a peer" + EMULATED, "another": "another peer"}
    held = hold_claims(results(heads=[comparison(1, 10, 3.0)], contenders=words), claims)
    assert [row["what"] for row in held] == ["heads alone" + EMULATED, "heads alone"]


def test_what_was_not_measured_is_not_claimed():
    claims = [Claim("heads alone", "heads", "ours", "missing", 2.0)]
    assert hold_claims(results(heads=[comparison(1, 10, 2.0)]), claims) == []
    assert hold_claims(results()) == []


def test_memory_and_accuracy_stand_beside_their_bars():
    peaks = {"ours": {"ratio": 0.8}, "detectron2-cascade": {"ratio": 1.0}}
    settings = [
        {"setting": "plain", "AP": 60.0, "AP75": 70.0},
        {"setting": "fast", "AP": 59.95, "AP75": 70.5},
    ]
    held = hold_claims(
        results(
            memory={"inference": {"batch": 1, "contenders": peaks}},
            accuracy={"settings": settings},
        )
    )
    assert [(row["what"], row["contender"], round(row["ratio"], 2)) for row in held] == [
        ("peak memory, inference", "ours", 0.8),
        ("AP, points", "fast", -0.05),
        ("AP75, points", "fast", 0.5),
    ]
