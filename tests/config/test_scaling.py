import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.config import check_processes, get_cfg, scale_to_world_size
from cascade_det.errors import ConfigError


def make_cfg(**solver):
    cfg = get_cfg()
    cfg.merge_from_list([item for key, value in solver.items() for item in (key, value)])
    return cfg


def schedule(cfg):
    solver = cfg.SOLVER
    names = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "WARMUP_ITERS", "STEPS", "CHECKPOINT_PERIOD")
    values = {name: solver[name] for name in (*names, "REFERENCE_WORLD_SIZE")}
    return {**values, "EVAL_PERIOD": cfg.TEST.EVAL_PERIOD}


DOUBLED = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.MAX_ITER": 5000,
    "SOLVER.STEPS": (4000, 4500),
    "SOLVER.WARMUP_ITERS": 100,
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "SOLVER.REFERENCE_WORLD_SIZE": 8,
    "TEST.EVAL_PERIOD": 500,
}


@pytest.mark.parametrize("frozen", [False, True])
def test_twice_as_many_processes_take_half_as_long(frozen):
    cfg = make_cfg(**DOUBLED)
    if frozen:
        cfg.freeze()
    before = cfg.dump()
    scaled = scale_to_world_size(cfg, 16)
    assert schedule(scaled) == {
        "IMS_PER_BATCH": 32,
        "BASE_LR": 0.2,
        "MAX_ITER": 2500,
        "STEPS": (2000, 2250),
        "WARMUP_ITERS": 50,
        "CHECKPOINT_PERIOD": 500,
        "EVAL_PERIOD": 250,
        "REFERENCE_WORLD_SIZE": 16,
    }
    assert cfg.dump() == before
    assert scaled.is_frozen() == frozen
    assert scale_to_world_size(scaled, 16).dump() == scaled.dump()


@pytest.mark.parametrize(("reference", "processes"), [(0, 4), (8, 8)])
def test_nothing_to_scale(reference, processes):
    cfg = make_cfg(**DOUBLED)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    assert scale_to_world_size(cfg, processes) is cfg


def test_what_is_there_does_not_become_never():
    few = {"SOLVER.MAX_ITER": 3, "SOLVER.WARMUP_ITERS": 0, "SOLVER.STEPS": (1,)}
    few |= {"TEST.EVAL_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 2}
    cfg = make_cfg(**{**DOUBLED, **few})
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    scaled = schedule(scale_to_world_size(cfg, 8))
    assert (scaled["MAX_ITER"], scaled["EVAL_PERIOD"], scaled["CHECKPOINT_PERIOD"]) == (1, 1, 1)
    assert (scaled["STEPS"], scaled["WARMUP_ITERS"]) == ((1,), 0)


@pytest.mark.needs_detectron2
def test_the_rule_is_detectron2s():
    engine = pytest.importorskip("detectron2.engine", exc_type=ImportError)
    d2_cfg = pytest.importorskip("detectron2.config").get_cfg()
    iterations = st.integers(64, 500_000)

    @settings(max_examples=30, deadline=None)
    @given(
        reference=st.integers(1, 64),
        processes=st.integers(1, 64),
        images=st.integers(1, 8),
        rate=st.floats(1e-6, 1),
        lengths=st.tuples(iterations, iterations, iterations, iterations),
        steps=st.lists(iterations, max_size=4, unique=True).map(sorted),
    )
    def compare(reference, processes, images, rate, lengths, steps):
        names = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD")
        keys = dict(zip((*names, "TEST.EVAL_PERIOD"), lengths, strict=True))
        keys |= {"SOLVER.REFERENCE_WORLD_SIZE": reference, "SOLVER.STEPS": tuple(steps)}
        keys |= {"SOLVER.IMS_PER_BATCH": reference * images, "SOLVER.BASE_LR": rate}
        ours, theirs = make_cfg(**keys), d2_cfg.clone()
        theirs.merge_from_list([item for pair in keys.items() for item in pair])
        expected = engine.DefaultTrainer.auto_scale_workers(theirs, processes)
        assert schedule(scale_to_world_size(ours, processes)) == schedule(expected)

    compare()


@pytest.mark.parametrize(
    ("images", "parts", "reference", "processes", "words"),
    [
        (16, 1, 0, 3, ["16", "number of processes", "3", "15 or 18"]),
        (16, 2, 0, 16, ["16", "ACCUMULATION_STEPS, 2", "multiple of 32, such as 32"]),
        (10, 1, 4, 8, ["10", "REFERENCE_WORLD_SIZE, 4", "8 or 12"]),
        (5, 2, 0, 1, ["5", "ACCUMULATION_STEPS, 2", "4 or 6"]),
    ],
)
def test_images_that_cannot_be_shared(images, parts, reference, processes, words):
    keys = {"SOLVER.IMS_PER_BATCH": images, "CASCADE.ACCUMULATION_STEPS": parts}
    cfg = make_cfg(**keys, **{"SOLVER.REFERENCE_WORLD_SIZE": reference})
    with pytest.raises(ConfigError) as caught:
        scale_to_world_size(cfg, processes)
    assert all(word in str(caught.value) for word in ["SOLVER.IMS_PER_BATCH", *words])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.NORM", "SyncBN"),
        ("MODEL.ROI_BOX_HEAD.NORM", "SyncBN"),
        ("MODEL.CASCADE.BOX_HEAD.NORM", ("GN", "SyncBN", "")),
    ],
)
def test_synchronised_norms_need_gpus(key, value):
    cfg = make_cfg(**{"MODEL.DEVICE": "cpu", key: value})
    with pytest.raises(ConfigError, match=key):
        check_processes(cfg, 2, train=True)
    check_processes(cfg, 1, train=True)
    check_processes(cfg, 2, train=False)
    cfg.MODEL.DEVICE = "cuda"
    check_processes(cfg, 2, train=True)


def test_several_processes_do_not_share_a_gpu():
    cfg = make_cfg(**{"MODEL.DEVICE": "cuda:1"})
    check_processes(cfg, 1, train=False)
    with pytest.raises(ConfigError, match="cuda:1"):
        check_processes(cfg, 2, train=False)
