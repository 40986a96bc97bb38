import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.config import (
    check_processes,
    get_cfg,
    scale_to_batch,
    scale_to_epochs,
    scale_to_world_size,
)
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


@pytest.mark.parametrize(("images", "factor"), [(4, 4), (16, 1), (64, 0.25)])
def test_a_batch_found_has_the_rate_and_schedule_of_16_images(images, factor):
    cfg = make_cfg(**{**DOUBLED, "SOLVER.IMS_PER_BATCH": 0, "SOLVER.BASE_LR_END": 0.01})
    scaled = scale_to_batch(cfg, images)
    assert schedule(scaled) == {
        "IMS_PER_BATCH": images,
        "BASE_LR": pytest.approx(0.1 / factor),
        "MAX_ITER": 5000 * factor,
        "STEPS": (4000 * factor, 4500 * factor),
        "WARMUP_ITERS": 100 * factor,
        "CHECKPOINT_PERIOD": 1000 * factor,
        "EVAL_PERIOD": 500 * factor,
        "REFERENCE_WORLD_SIZE": 8,
    }
    assert pytest.approx(0.01 / factor) == scaled.SOLVER.BASE_LR_END
    assert scaled.SOLVER.MAX_ITER * images == 5000 * 16


def test_steps_that_coincide_become_one():
    cfg = make_cfg(**{**DOUBLED, "SOLVER.STEPS": (2, 3, 4000)})
    assert scale_to_batch(cfg, 64).SOLVER.STEPS == (1, 1000)


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

    @settings(max_examples=30)
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


# -- epochs ---------------------------------------------------------------------------------------

RECIPE = {
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 3000,
    "SOLVER.STEPS": (2000, 2500),
    "SOLVER.WARMUP_ITERS": 150,
    "SOLVER.CHECKPOINT_PERIOD": 300,
    "TEST.EVAL_PERIOD": 600,
    "CASCADE.EPOCHS": 30.0,
}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_schedule_is_stretched_to_so_many_epochs(frozen):
    cfg = make_cfg(**RECIPE)
    if frozen:
        cfg.freeze()
    before = cfg.dump()
    stretched = scale_to_epochs(cfg, 800)  # 30 x 800 / 4 = 6000, twice as many as 3000
    assert schedule(stretched) == {
        "IMS_PER_BATCH": 4,
        "BASE_LR": 0.001,
        "MAX_ITER": 6000,
        "STEPS": (4000, 5000),
        "WARMUP_ITERS": 300,
        "CHECKPOINT_PERIOD": 600,
        "EVAL_PERIOD": 1200,
        "REFERENCE_WORLD_SIZE": 0,
    }
    assert cfg.dump() == before
    assert stretched.is_frozen() == frozen
    assert scale_to_epochs(stretched, 800) is stretched


def test_without_epochs_the_schedule_is_that_of_the_solver():
    cfg = make_cfg(**{**RECIPE, "CASCADE.EPOCHS": 0.0})
    assert scale_to_epochs(cfg, 7) is cfg


def test_a_short_schedule_has_no_zeros_and_rising_steps():
    short = schedule(scale_to_epochs(make_cfg(**{**RECIPE, "CASCADE.EPOCHS": 0.001}), 3))
    assert short.pop("STEPS") == (1,)
    assert set(short.values()) == {1, 4, 0.001, 0}


def test_epochs_are_what_is_asked_for():
    cfg = make_cfg(**RECIPE)

    @settings(max_examples=60)
    @given(
        images=st.integers(1, 10**7),
        batch=st.integers(1, 512),
        epochs=st.floats(0.01, 1000),
        max_iter=st.integers(1, 10**6),
        parts=st.integers(1, 20),
    )
    def check(images, batch, epochs, max_iter, parts):
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = max_iter, batch
        cfg.CASCADE.EPOCHS, cfg.TEST.EVAL_PERIOD = epochs, -(-max_iter // parts)
        evaluations = -(-max_iter // cfg.TEST.EVAL_PERIOD)
        scaled = scale_to_epochs(cfg, images)
        iterations = scaled.SOLVER.MAX_ITER
        assert epochs * images - 1e-5 * batch <= iterations * batch < epochs * images + batch * 1.01
        made = -(-iterations // scaled.TEST.EVAL_PERIOD)
        assert made <= evaluations
        assert scale_to_epochs(scaled, images) is scaled

    check()


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_epochs_stay_what_they_are_on_more_processes(processes):
    """A resume reads what the run wrote, on any number of processes."""
    cfg = make_cfg(**{**RECIPE, "SOLVER.REFERENCE_WORLD_SIZE": 1, "SOLVER.STEPS": ()})
    scaled = scale_to_epochs(scale_to_world_size(cfg, processes), 800)
    found = schedule(scaled)
    assert (found["MAX_ITER"], found["BASE_LR"]) == (6000 // processes, 0.001 * processes)
    back = schedule(scale_to_epochs(scale_to_world_size(scaled, 1), 800))
    assert (back["MAX_ITER"], back["BASE_LR"], back["IMS_PER_BATCH"]) == (6000, 0.001, 4)
