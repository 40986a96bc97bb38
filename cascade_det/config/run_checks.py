"""Checks of the keys of data, solver and evaluation against each other."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from fvcore.common.config import CfgNode

from cascade_det.config.augment_keys import KEY as AUGMENT
from cascade_det.config.augment_keys import complete_entries, entry_problems
from cascade_det.config.cascade_checks import Check
from cascade_det.config.key import at_least, each, rising, whole, within
from cascade_det.config.segmenter_arguments import is_segmenter


def _check_sizes(cfg: CfgNode) -> Iterator[str]:
    source = cfg.INPUT
    bounds = (
        ("TRAIN", max(source.MIN_SIZE_TRAIN), source.MAX_SIZE_TRAIN),
        ("TEST", source.MIN_SIZE_TEST, source.MAX_SIZE_TEST),
    )
    for phase, smallest, largest in bounds:
        if smallest > largest:
            yield (
                f"INPUT.MIN_SIZE_{phase} is {smallest}, above INPUT.MAX_SIZE_{phase}, {largest}. "
                "The shorter edge cannot be the longer one: lower the first or raise the second."
            )
    sizes = tuple(source.MIN_SIZE_TRAIN)
    is_range = len(sizes) == 2 and sizes[0] <= sizes[1]
    if source.MIN_SIZE_TRAIN_SAMPLING == "range" and not is_range:
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, but INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range'. "
            "Give the smallest and the largest size, or sample by 'choice'."
        )


def _check_crop(cfg: CfgNode) -> Iterator[str]:
    crop = cfg.INPUT.CROP
    pixels = each(whole(at_least(1)))
    accepts, remedy = {
        "absolute": (pixels, "[height, width] in pixels, 1 or more"),
        "absolute_range": (
            rising(pixels, strictly=False),
            "[smallest, largest] side in pixels, 1 or more",
        ),
    }.get(crop.TYPE, (each(within(0, 1)), "[height, width] as shares of the image, up to 1"))
    if crop.ENABLED and not accepts(crop.SIZE):
        yield (
            f"INPUT.CROP.SIZE is {list(crop.SIZE)}, but INPUT.CROP.TYPE is {crop.TYPE!r}. Give "
            f"{remedy}."
        )


def _check_augment(cfg: CfgNode) -> Iterator[str]:
    problems = list(entry_problems(cfg.CASCADE.AUGMENT))
    yield from problems
    if problems:
        return
    for number, (name, arguments) in enumerate(complete_entries(cfg.CASCADE.AUGMENT)):
        where = f"{AUGMENT}[{number}]"
        if name == "CopyPaste" and not cfg.MODEL.MASK_ON:
            yield (
                f"{where} is CopyPaste, which cuts objects out by their masks, but MODEL.MASK_ON "
                "is False. Set it to True, or take the entry out."
            )
        if name == "RandomIoUCrop" and arguments["min_scale"] > arguments["max_scale"]:
            yield (
                f"{where}: min_scale of RandomIoUCrop is {arguments['min_scale']}, above "
                f"max_scale, {arguments['max_scale']}. Exchange them."
            )


def _check_datasets(cfg: CfgNode) -> Iterator[str]:
    own = [name for name, *_ in (*cfg.CASCADE.DATASETS, *cfg.CASCADE.SEMANTIC_DATASETS)]
    lists = {
        "DATASETS.TRAIN": cfg.DATASETS.TRAIN,
        "DATASETS.TEST": cfg.DATASETS.TEST,
        "CASCADE.DATASETS with SEMANTIC_DATASETS"
        if cfg.CASCADE.SEMANTIC_DATASETS
        else "CASCADE.DATASETS": own,
    }
    for key, names in lists.items():
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            yield f"{key} names {', '.join(twice)} more than once. Name each data set once."


def _check_repeats(cfg: CfgNode) -> Iterator[str]:
    sampler, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if sampler == "RepeatFactorTrainingSampler" and threshold == 0:
        yield (
            f"DATALOADER.SAMPLER_TRAIN is {sampler!r}, but DATALOADER.REPEAT_THRESHOLD is 0, which "
            "repeats no image. Give the share of images below which a class is rare, such as 0.1."
        )


def _check_solver(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    is_cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    if is_cosine and solver.BASE_LR_END > solver.BASE_LR:
        yield (
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}, above SOLVER.BASE_LR, {solver.BASE_LR}. "
            "Lower it: the rate of a cosine schedule falls."
        )
    if solver.REFERENCE_WORLD_SIZE and not solver.IMS_PER_BATCH:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}, which scales a number "
            "of images, but SOLVER.IMS_PER_BATCH is 0. Give that number, or set the former to 0."
        )
    if cfg.CASCADE.OPTIMIZER == "SGD" and solver.NESTEROV and solver.MOMENTUM == 0:
        yield "SOLVER.NESTEROV is True, but SOLVER.MOMENTUM is 0. Give it a momentum, such as 0.9."


def _check_scorers(cfg: CfgNode) -> Iterator[str]:
    cascade = cfg.CASCADE
    for key in ("LVIS_AP", "FAST_AP"):
        if cascade[key] and find_spec("faster_coco_eval") is None:
            yield (
                f"CASCADE.{key} is True, but faster-coco-eval is not installed: install it with "
                "pip install '.[lvis]' in the folder of cascade_det, or set the key to False."
            )


def _check_accumulation(cfg: CfgNode) -> Iterator[str]:
    parts, images = cfg.CASCADE.ACCUMULATION_STEPS, cfg.SOLVER.IMS_PER_BATCH
    if images % parts:
        yield (
            f"CASCADE.ACCUMULATION_STEPS is {parts}, which does not divide SOLVER.IMS_PER_BATCH, "
            f"{images}. Give a divisor of it: an iteration's images are computed in equal parts."
        )


def _check_evaluation(cfg: CfgNode) -> Iterator[str]:
    cascade, test_sets = cfg.CASCADE, list(cfg.DATASETS.TEST)
    metric, patience = cascade.BEST_METRIC, cascade.PATIENCE
    if cascade.VALIDATION_LOSS and not test_sets:
        yield "CASCADE.VALIDATION_LOSS is True, but DATASETS.TEST is empty. Name a data set."
    if patience and not test_sets:
        yield f"CASCADE.PATIENCE is {patience}, but DATASETS.TEST is empty. Name a data set."
    if patience and not cfg.TEST.EVAL_PERIOD:
        yield (
            f"CASCADE.PATIENCE is {patience} evaluations, but TEST.EVAL_PERIOD is 0, "
            "so that there are none. Give a period, or a patience of 0."
        )
    if cascade.VALIDATION_LOSS and "validation" in test_sets:
        yield (
            "DATASETS.TEST names a set 'validation', which is the name of the losses of "
            "CASCADE.VALIDATION_LOSS in the results. Give the set another name."
        )
    if "segm" in metric.split("/") and not cfg.MODEL.MASK_ON:
        yield (
            f"CASCADE.BEST_METRIC is {metric!r}, but MODEL.MASK_ON is False. Set it to True, or "
            "watch bbox/AP."
        )
    losses = [f"validation/{name}" for name in _loss_names(cfg)]
    if metric.startswith("validation/"):
        if not cascade.VALIDATION_LOSS:
            yield (
                f"CASCADE.BEST_METRIC is {metric!r}, but CASCADE.VALIDATION_LOSS is False. Set it "
                "to True, or watch a metric of the evaluation, such as bbox/AP."
            )
        if metric not in losses:
            yield f"CASCADE.BEST_METRIC is {metric!r}. Such losses are {', '.join(losses)}."
    elif patience and len(test_sets) > 1 and metric.split("/")[0] not in test_sets:
        yield (
            f"CASCADE.BEST_METRIC is {metric!r}, but DATASETS.TEST has {len(test_sets)} sets, and "
            f"their metrics begin with their names. Choose one, such as {test_sets[0]}/bbox/AP."
        )


def _loss_names(cfg: CfgNode) -> list[str]:
    if is_segmenter(cfg):
        return ["total_loss", "loss_sem_seg"]
    stages = range(len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS))
    per_stage = [f"{name}_stage{i}" for i in stages for name in ("loss_cls", "loss_box_reg")]
    masks = (
        [f"loss_mask_stage{i}" for i in stages]
        if cfg.MODEL.CASCADE.MASK.STAGES == "every"
        else ["loss_mask"]
    )
    others = [(masks, cfg.MODEL.MASK_ON), (["loss_keypoint"], cfg.MODEL.KEYPOINT_ON)]
    asked = [name for names, is_on in others if is_on for name in names]
    of_detector = ["loss_rpn_cls", "loss_rpn_loc", *per_stage, *asked]
    cascade = cfg.MODEL.CASCADE
    parts = cascade.EXIT.LEARNED if cascade.EXIT.ENABLED else ()
    of_exits = {
        "iou_head": [f"loss_exit_iou_stage{i}" for i in stages],
        "gate": [f"loss_exit_gate_stage{i}" for i in stages[:-1]],
        "pruner": [f"loss_exit_pruner_gate{i}" for i in stages],
        "tile_head": ["loss_exit_tiles"],
    }
    exits = [name for part, names in of_exits.items() if part in parts for name in names]
    return ["total_loss", *([] if cascade.TRAINING.FREEZE_DETECTOR else of_detector), *exits]


RUN_CHECKS: tuple[Check, ...] = (
    _check_sizes,
    _check_crop,
    _check_augment,
    _check_datasets,
    _check_repeats,
    _check_solver,
    _check_accumulation,
    _check_evaluation,
    _check_scorers,
)
