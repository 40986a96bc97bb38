"""``MODEL.CASCADE.TRAINING``: contradictions, and the training schedule of the keys."""

import pytest

from cascade_det import config
from cascade_det.core import build_training_schedule
from cascade_det.errors import ConfigError

NODE = "MODEL.CASCADE.TRAINING"
LEARNED = ("MODEL.CASCADE.EXIT.ENABLED", True, "MODEL.CASCADE.EXIT.LEARNED", ("gate",))
FREEZE = (f"{NODE}.FREEZE_DETECTOR", True)
SCHEDULED = (f"{NODE}.STAGE_WEIGHTING", "scheduled", f"{NODE}.STAGE_LOSS_WEIGHTS_END")
DYNAMIC = (f"{NODE}.DYNAMIC.ENABLED", True)
GIOU = ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou")


def cfg_of(*options):
    cfg = config.get_cfg()
    cfg.MODEL.ROI_HEADS.NAME = "EarlyExitCascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    "options",
    [
        (),
        (f"{NODE}.GATING", "hard", f"{NODE}.PREFIX_LOSS_WEIGHT", 1.0),
        (*SCHEDULED, (0.5,), f"{NODE}.GATING", "soft"),
        (*SCHEDULED, (0.2, 0.0, 1.0)),
        (f"{NODE}.STAGE_WEIGHTING", "learned"),
        (f"{NODE}.CLASS_LOSS", "seesaw", f"{NODE}.CLASS_WEIGHTS", (0.5,) * 81),
        DYNAMIC,
        (*DYNAMIC, *GIOU, f"{NODE}.DYNAMIC.K_BETA", 0),
        # Off, its other keys may have any value.
        (*GIOU, f"{NODE}.DYNAMIC.IOU_FLOOR", 0.9),
        (*LEARNED, *FREEZE),
    ],
)
def test_options_that_fit_build_a_schedule(options):
    cfg = cfg_of(*options)
    config.check_heads(cfg)
    build_training_schedule(**config.training_arguments(cfg))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SCHEDULED, ()), r"END is \(\).*1 or 3 values"),
        ((*SCHEDULED, (0.5, 0.5)), "1 or 3 values"),
        ((f"{NODE}.STAGE_LOSS_WEIGHTS_END", (0.5,)), "STAGE_WEIGHTING is 'fixed'"),
        (
            (
                *(f"{NODE}.STAGE_WEIGHTING", "learned"),
                *("MODEL.CASCADE.STAGE_LOSS_WEIGHTS", (1.0, 0.0, 1.0)),
            ),
            "above 0",
        ),
        (
            (f"{NODE}.PREFIX_LOSS_WEIGHT", 0.5, "MODEL.CASCADE.ENSEMBLE", "last_boxes"),
            "ENSEMBLE is 'last_boxes'.*mean_probs or mean_logits",
        ),
        ((*DYNAMIC, f"{NODE}.DYNAMIC.K_I", 0, f"{NODE}.DYNAMIC.K_BETA", 0), "both 0"),
        ((*DYNAMIC, *GIOU), "'giou', which has no beta.*K_BETA to 0"),
        ((*DYNAMIC, f"{NODE}.DYNAMIC.IOU_FLOOR", 0.55), "0.55, above the first.*0.5"),
        ((f"{NODE}.CLASS_WEIGHTS", (1.0,) * 80), "80 values.*NUM_CLASSES is 80.*Give 81"),
        ((f"{NODE}.CLASS_WEIGHTS", (0.0,) * 81), "are all 0"),
        ((*FREEZE, *LEARNED, f"{NODE}.CLASS_LOSS", "focal"), "CLASS_LOSS is 'focal'.*FREEZE"),
        (FREEZE, r"nothing else to train.*EXIT\.LEARNED"),
        ((*FREEZE, *LEARNED[:2]), "nothing else to train"),
        ((*FREEZE, *LEARNED, *DYNAMIC), r"DYNAMIC\.ENABLED is True.*FREEZE_DETECTOR is True"),
        ((*FREEZE, *LEARNED, f"{NODE}.GATING", "soft"), "GATING is 'soft'.*FREEZE_DETECTOR"),
    ],
)
def test_what_does_not_is_an_error_with_a_remedy(options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config.check_heads(cfg_of(*options))


@pytest.mark.parametrize(
    ("options", "metric", "is_there"),
    [
        ((), "loss_cls_stage0", True),
        ((), "loss_exit_gate_stage0", False),
        (LEARNED, "loss_exit_gate_stage1", True),
        (LEARNED, "loss_exit_gate_stage2", False),
        (LEARNED, "loss_exit_iou_stage0", False),
        (LEARNED, "loss_cls_stage0", True),
        ((*LEARNED, *FREEZE), "loss_exit_gate_stage0", True),
        ((*LEARNED, *FREEZE), "loss_cls_stage0", False),
        ((*LEARNED, *FREEZE), "total_loss", True),
    ],
)
def test_losses_on_validation_data_that_a_run_may_be_judged_by(options, metric, is_there):
    cfg = cfg_of(*options, "DATASETS.TEST", ("val",), "CASCADE.VALIDATION_LOSS", True)
    cfg.CASCADE.BEST_METRIC = f"validation/{metric}"
    if is_there:
        config.check_run(cfg)
    else:
        with pytest.raises(ConfigError, match="Such losses are"):
            config.check_run(cfg)


def test_values_reach_the_schedule():
    cfg = cfg_of(
        *(f"{NODE}.GATING", "soft", f"{NODE}.GATE_THRESHOLD", 0.8, f"{NODE}.GATE_SCALE", 12.0),
        *(*SCHEDULED, (0.5,), f"{NODE}.PREFIX_LOSS_WEIGHT", 0.25),
        *(*DYNAMIC, f"{NODE}.DYNAMIC.K_I", 7, f"{NODE}.DYNAMIC.K_BETA", 3),
        *(f"{NODE}.DYNAMIC.PERIOD", 9, f"{NODE}.DYNAMIC.IOU_FLOOR", 0.45),
        *(f"{NODE}.DYNAMIC.BETA_START", 2.0),
        *(f"{NODE}.CLASS_LOSS", "seesaw", f"{NODE}.CLASS_WEIGHTS", (0.5,) * 80 + (2.0,)),
        *(f"{NODE}.FOCAL_GAMMA", 1.5, f"{NODE}.SEESAW_P", 0.7, f"{NODE}.SEESAW_Q", 1.0),
    )
    schedule = build_training_schedule(**config.training_arguments(cfg))
    gates, dynamic = schedule.gates, schedule.dynamic
    loss = schedule.class_loss
    assert (loss.kind, loss.focal_gamma, loss.seesaw_p, loss.seesaw_q) == ("seesaw", 1.5, 0.7, 1.0)
    assert loss.weights.tolist() == [0.5] * 80 + [2.0]
    assert loss.counts.shape == (3, 80)
    assert (gates.kind, gates.threshold, gates.scale) == ("soft", 0.8, 12.0)
    assert schedule.stage_loss_weights_end == (0.5, 0.5, 0.5)
    assert schedule.prefix_loss_weight == 0.25
    assert (dynamic.k_iou, dynamic.k_beta, dynamic.period) == (7, 3, 9)
    assert (dynamic.iou_floor, dynamic.beta_start) == (0.45, 2.0)
    assert not schedule.exits_alone
    plain = build_training_schedule(**config.training_arguments(cfg_of(*LEARNED, *FREEZE)))
    assert (plain.gates, plain.dynamic, plain.exits_alone) == (None, None, True)
    assert plain.class_loss is None
    assert not plain.state_dict()
