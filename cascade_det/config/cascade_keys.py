"""Our keys of exits, faster inference and training: nodes of ``MODEL.CASCADE``.

A list "per stage" has one value for each stage, or a single value for all of them. In ``EXIT`` it
has none for the last stage, and a list "per gate" has one for the gate before stage 0 and one for
each stage but the last.
"""

from __future__ import annotations

import re

from cascade_det.config.key import (
    ABOVE_0_TO_1,
    BETWEEN_0_AND_1,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Key,
    Values,
    above,
    at_least,
    each,
    group,
    is_number,
    one_of,
    subset_of,
    whole,
    within,
)

FAST_PARTS = ("stem", "backbone", "fpn", "rpn", "roi_heads")
LEARNED_PARTS = ("iou_head", "gate", "pruner", "tile_head")

_SHARES = each(within(0, 1))
_SHARES_0_NEVER = Values(_SHARES, "Give a list of numbers from 0 to 1; 0 means never.")
_SHARES_1_NEVER = Values(_SHARES, "Give a list of numbers from 0 to 1; 1 means never.")

EXIT = group(
    "MODEL.CASCADE.EXIT",
    "Exits: regions that leave before the last stage, in inference only",
    ENABLED=Key(False, "Turns early exits on."),
    PRUNE_THRESHOLDS=Key(
        (0.02,),
        "Drops a region whose ensemble probability is below this for every class, per stage.",
        _SHARES_0_NEVER,
    ),
    PROPOSAL_THRESHOLD=Key(
        0.0,
        "Drops proposals with a lower objectness before stage 0.",
        Values(within(0, 1), "Give a number from 0 to 1; 0 means never."),
    ),
    PRUNE_MARGINS=Key(
        (1.0,),
        "Drops a region that scores more than this below the region of rank PRUNE_BEST in its "
        "image, per gate.",
        _SHARES_1_NEVER,
    ),
    PRUNE_BEST=Key(100, "Rank that PRUNE_MARGINS count from.", COUNT),
    PRUNER_THRESHOLDS=Key(
        (0.0,),
        "Drops a region that the learned pruner scores below this, per gate.",
        _SHARES_0_NEVER,
    ),
    REDUNDANCY_IOU=Key(
        0.9,
        "Drops a region whose IoU with a better one of its class reaches this.",
        Values(above(0), "Give a number above 0; above 1 means never."),
    ),
    THRESHOLDS=Key(
        (1.01,),
        "Accepts a region, with its current box, if its CONFIDENCE reaches this, per stage.",
        Values(each(above(0)), "Give a list of numbers above 0; above 1 means never."),
    ),
    CONFIDENCE=Key(
        "max_prob",
        "Probability of the best class, 1 less the normalised entropy, lead of the best class, "
        "number of stages before that had the same class (THRESHOLDS count stages), or the learned "
        "gate.",
        one_of("max_prob", "entropy", "margin", "agreement", "learned"),
    ),
    LOCALISATION=Key(
        "none",
        "Further condition on accepted boxes: none, the IoU with the box before the stage, or the "
        "IoU with the object, as predicted by the IoU head.",
        one_of("none", "refinement", "predicted_iou"),
    ),
    LOCALISATION_THRESHOLDS=Key(
        (0.9,),
        "Smallest value of LOCALISATION to accept, per stage.",
        Values(_SHARES, "Give a list of numbers from 0 to 1."),
    ),
    REGION_BUDGET=Key(
        (0,),
        "Most regions of an image that enter a stage, best first, per gate.",
        Values(each(whole(at_least(0))), "Give a list of whole numbers; 0: no limit."),
    ),
    TIME_BUDGET_MS=Key(
        0.0,
        "Time limit from image to detections; regions still live then are reported as they are.",
        Values(at_least(0), "Give milliseconds, 0 or more; 0 means no limit."),
    ),
    TIME_BUDGET_PER=Key(
        "image", "Whether TIME_BUDGET_MS is for an image or a batch.", one_of("image", "batch")
    ),
    GATES_OFF=Key(
        (),
        "Gates at which no region leaves, but for TIME_BUDGET_MS: those that take longer than they "
        "save. Calibration finds them.",
        Values(
            each(whole(at_least(0))),
            "Give a list of gates: 0 is before stage 0, 1 after stage 0, 2 after stage 1.",
        ),
    ),
    TILE_THRESHOLD=Key(
        0.0,
        "Computes the finest map only in tiles, for the RPN where the objectness on the next "
        "coarser map, or the learned tile head, reaches this, and where regions are pooled.",
        Values(
            within(0, 1),
            "Give a number from 0 to 1; 0 computes the whole map, 1 none of it for the RPN.",
        ),
    ),
    LEARNED=Key((), "Trained parts that the rules above use.", subset_of(*LEARNED_PARTS)),
    SCORE_SCALES=Key(
        (1.0,),
        "Scores after a stage become sigmoid(scale * logit(p) + shift); one scale for each stage.",
        Values(each(above(0)), "Give a list of numbers above 0."),
    ),
    SCORE_SHIFTS=Key(
        (0.0,),
        "The shifts; one for each stage.",
        Values(each(is_number), "Give a list of numbers."),
    ),
    EXPECTED_LOSS=Key(
        -1.0,
        "Mean share of the full cascade's detections lost per image, measured by calibration.",
        Values(is_number, "Give a number; -1 means not calibrated."),
    ),
    EXPECTED_LOSS_DEVIATION=Key(0.0, "Standard deviation of EXPECTED_LOSS.", NOT_NEGATIVE),
    DEVICE_NAME=Key(
        "",
        "Device that calibration timed, if thresholds depend on it.",
        Values(lambda value: isinstance(value, str), "Give the name of a device, or ''."),
    ),
    WEIGHTS_SHA256=Key(
        "",
        "Digest of the calibrated weights; other weights cause a warning.",
        Values(
            lambda value: isinstance(value, str) and bool(re.fullmatch("([0-9a-f]{64})?", value)),
            "Give 64 hexadecimal digits, or ''.",
        ),
    ),
)

MASK = group(
    "MODEL.CASCADE.MASK",
    "Masks, where `MODEL.MASK_ON`: made for final detections only, at whatever stage they left",
    STAGES=Key(
        "last",
        "One mask head, trained on the foreground of stage 0, or one for every stage, trained on "
        "its own foreground and averaged in inference.",
        one_of("last", "every"),
    ),
    SCORE_THRESHOLD=Key(
        0.0,
        "Detections that score below this get no mask; AP counts the low scores too.",
        Values(within(0, 1), "Give a number from 0 to 1; 0 gives every detection a mask."),
    ),
    REDUNDANCY=Key(
        1.01,
        "IoU with a better detection of any class from which a detection gets no mask; above 1 "
        "never.",
        POSITIVE,
    ),
)

FAST = group(
    "MODEL.CASCADE.FAST",
    "Lower precision and compilation for evaluation, prediction and calibration",
    ENABLED=Key(
        False,
        "Speeds up inference, at the cost of rounding errors; ignored in training. In Detectron2's "
        "own scripts limited to our heads.",
    ),
    DTYPE=Key(
        "auto",
        "Type to compute in; auto is bfloat16 on devices with instructions for it, float16 on "
        "other GPUs, and float32 on other CPUs; float16 needs a GPU. Where auto is bfloat16, "
        "MobileNets and EfficientViTs stay float32, without their pyramid. int8 is for CPUs with "
        "VNNI or AMX instructions: ResNets, pyramid, RPN and the first layers of box heads compute "
        "in 8 bits, the rest as with auto; it needs IMAGES.",
        one_of("auto", "float32", "bfloat16", "float16", "int8"),
    ),
    IMAGES=Key(
        0,
        "Images of DATASETS.TRAIN to optimise with: the types of parts are chosen by what is "
        "detected in them, and int8 measures the ranges of its maps. With 0 auto goes by the "
        "backbone.",
        Values(at_least(0), "Give a number of images, such as 32, or 0."),
    ),
    FLOAT32_PARTS=Key(
        (),
        "Parts that stay float32; boxes, scores, and the last layers of RPN and box heads always "
        "do.",
        subset_of(*FAST_PARTS),
    ),
    COMPILE=Key(
        False,
        "Compiles backbone and FPN with torch.compile, on GPUs also the RPN up to its NMS, which "
        "takes about a minute at the first image; not for float32 on CPUs, which does not gain "
        "from it, nor in Detectron2.",
    ),
)

TRAINING = group(
    "MODEL.CASCADE.TRAINING",
    "Training beyond the sum of the stages' losses",
    CLASS_LOSS=Key(
        "cross_entropy",
        "Class loss of a region in training: cross-entropy of the softmax; focal, less for regions "
        "that are classified well; or seesaw, which lowers the pressure of frequent classes on "
        "rare ones.",
        one_of("cross_entropy", "focal", "seesaw"),
    ),
    CLASS_WEIGHTS=Key(
        (),
        "Factors of the class loss by label: one for each class and one for background; () for 1.",
        Values(each(at_least(0)), "Give a list of numbers, 0 or more each."),
    ),
    FOCAL_GAMMA=Key(2.0, "Exponent of focal; 0 is the cross-entropy.", NOT_NEGATIVE),
    SEESAW_P=Key(
        0.8, "Exponent of the ratio of the numbers of regions of two classes.", NOT_NEGATIVE
    ),
    SEESAW_Q=Key(2.0, "Exponent of the ratio of the scores of two classes.", NOT_NEGATIVE),
    GATING=Key(
        "none",
        "Stages that a region's class loss reaches: all; those up to the first that is confident "
        "and right (hard); or all, each with less weight the more probable the right class was at "
        "the stages before (soft).",
        one_of("none", "hard", "soft"),
    ),
    GATE_THRESHOLD=Key(
        0.9,
        "Probability from which a stage is confident; a soft gate is half closed there.",
        ABOVE_0_TO_1,
    ),
    GATE_SCALE=Key(15.0, "Steepness of a soft gate; at 1 it hardly moves.", POSITIVE),
    STAGE_WEIGHTING=Key(
        "fixed",
        "Loss weights of the stages: STAGE_LOSS_WEIGHTS, a linear ramp from these to "
        "STAGE_LOSS_WEIGHTS_END, or these times a trained factor per stage (uncertainty).",
        one_of("fixed", "scheduled", "learned"),
    ),
    STAGE_LOSS_WEIGHTS_END=Key(
        (),
        "Where the scheduled weights end, per stage; () unless scheduled.",
        Values(each(at_least(0)), "Give a list of numbers, 0 or more."),
    ),
    PREFIX_LOSS_WEIGHT=Key(
        0.0,
        "Weight of the class loss of the ensembles of all subsets of the stages.",
        Values(at_least(0), "Give 0 or more; 0 leaves the loss out."),
    ),
    FREEZE_DETECTOR=Key(
        False,
        "Trains the parts in EXIT.LEARNED alone; everything else, norms too, stays as it is. In "
        "Detectron2 this needs our trainer.",
    ),
)

DYNAMIC = group(
    "MODEL.CASCADE.TRAINING.DYNAMIC",
    "Thresholds and beta that follow the training",
    ENABLED=Key(False, "Adapts IoU thresholds and beta to the training: Dynamic R-CNN."),
    K_I=Key(
        75,
        "A stage's IoU threshold is the mean over PERIOD of the images' K_I-th largest IoU, from "
        "IOU_FLOOR to its value in IOUS.",
        Values(whole(at_least(0)), "Give 0 or more; 0 keeps the IOUS."),
    ),
    K_BETA=Key(
        10,
        "A stage's SMOOTH_L1_BETA is the median over PERIOD of the images' K_BETA-th smallest "
        "offset of the foreground, up to BETA_START.",
        Values(whole(at_least(0)), "Give 0 or more; 0 keeps SMOOTH_L1_BETA."),
    ),
    PERIOD=Key(
        100,
        "Iterations between updates; each of ACCUMULATION_STEPS counts as one.",
        Values(whole(at_least(1)), "Give 1 or more iterations."),
    ),
    IOU_FLOOR=Key(0.4, "Lowest IoU threshold.", BETWEEN_0_AND_1),
    BETA_START=Key(1.0, "Largest beta.", POSITIVE),
)

CASCADE_GROUPS = (EXIT, MASK, FAST, TRAINING, DYNAMIC)
EXIT_DEFAULTS = {name: key.default for name, key in EXIT.keys.items()}
