"""The keys of data, solver, evaluation and run; our node ``CASCADE`` among them."""

from __future__ import annotations

import math

from cascade_det.config.key import (
    ABOVE_0_TO_1,
    COUNT,
    FRACTION,
    FROM_0_BELOW_1,
    NAMES,
    NOT_NEGATIVE,
    POSITIVE,
    Key,
    Values,
    above,
    at_least,
    built,
    each,
    group,
    is_text,
    one_of,
    rising,
    standalone,
    whole,
    within,
)

_NO_PROPOSALS = standalone(one_of((), why="Proposals come from the RPN."))

VERSION = group("", "Version", Key("VERSION", 2, "Version of the tree; no other is read."))

INPUT = group(
    "INPUT",
    "Images",
    Key(
        "MIN_SIZE_TRAIN",
        (800,),
        "Shorter edge after resizing in training; one value is drawn per image.",
        Values(
            each(whole(at_least(1)), least=1), "Give a list of sizes in pixels, 1 or more each."
        ),
    ),
    Key(
        "MIN_SIZE_TRAIN_SAMPLING",
        "choice",
        "One of the values, or any between two.",
        one_of("choice", "range"),
    ),
    Key("MAX_SIZE_TRAIN", 1333, "Limit of the longer edge in training.", COUNT, "pixels"),
    Key("MIN_SIZE_TEST", 800, "Shorter edge in inference; 0: no resizing.", NOT_NEGATIVE, "pixels"),
    Key("MAX_SIZE_TEST", 1333, "Limit of the longer edge in inference.", COUNT, "pixels"),
    Key(
        "RANDOM_FLIP",
        "horizontal",
        "Flips half of the training images.",
        one_of("horizontal", "vertical", "none"),
    ),
    Key("CROP.ENABLED", False, values=built(False)),
    Key("CROP.TYPE", "relative_range"),
    Key("CROP.SIZE", [0.9, 0.9]),
    Key("FORMAT", "BGR", "Channel order, also of PIXEL_MEAN and _STD.", one_of("BGR", "RGB")),
    Key("MASK_FORMAT", "polygon"),
)

DATASETS = group(
    "DATASETS",
    "Data sets",
    Key("TRAIN", (), "Data sets to train on, joined into one.", NAMES),
    Key("PROPOSAL_FILES_TRAIN", (), values=_NO_PROPOSALS),
    Key("PRECOMPUTED_PROPOSAL_TOPK_TRAIN", 2000),
    Key("TEST", (), "Data sets to evaluate on, each on its own.", NAMES),
    Key("PROPOSAL_FILES_TEST", (), values=_NO_PROPOSALS),
    Key("PRECOMPUTED_PROPOSAL_TOPK_TEST", 1000),
)

DATALOADER = group(
    "DATALOADER",
    "Data loader",
    Key("NUM_WORKERS", 4, "Processes that read images; 0: the main one.", NOT_NEGATIVE),
    Key("ASPECT_RATIO_GROUPING", True, "Batches wide images with wide ones, for less padding."),
    Key("SAMPLER_TRAIN", "TrainingSampler", values=built("TrainingSampler")),
    Key("REPEAT_THRESHOLD", 0.0),
    Key("REPEAT_SQRT", True),
    Key("FILTER_EMPTY_ANNOTATIONS", True, "Trains without the images that hold no object."),
)

SOLVER = group(
    "SOLVER",
    "Solver",
    Key(
        "LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
        "Schedule of the learning rate.",
        one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    Key("MAX_ITER", 40000, "Length of the training.", COUNT, "iterations"),
    Key("BASE_LR", 0.001, "Learning rate after warm-up, for a batch of IMS_PER_BATCH.", POSITIVE),
    Key("BASE_LR_END", 0.0, "Where a cosine schedule ends, up to BASE_LR.", NOT_NEGATIVE),
    Key("MOMENTUM", 0.9, "Momentum of SGD.", FROM_0_BELOW_1),
    Key("NESTEROV", False, "Nesterov momentum."),
    Key("WEIGHT_DECAY", 0.0001, "Weight decay.", NOT_NEGATIVE),
    Key("WEIGHT_DECAY_NORM", 0.0, "Weight decay of normalisation layers.", NOT_NEGATIVE),
    Key("GAMMA", 0.1, "Factor of each decay of the learning rate.", ABOVE_0_TO_1),
    Key(
        "STEPS",
        (30000,),
        "When the learning rate decays.",
        Values(
            rising(each(whole(at_least(1))), strictly=True),
            "Give increasing iterations, 1 or more each.",
        ),
    ),
    Key("NUM_DECAYS", 3, "Decays of the fixed-gamma schedule, evenly spaced.", COUNT),
    Key("WARMUP_FACTOR", 1.0 / 1000, "Warm-up starts at BASE_LR times this.", FRACTION),
    Key("WARMUP_ITERS", 1000, "Length of the warm-up.", NOT_NEGATIVE, "iterations"),
    Key("WARMUP_METHOD", "linear", "Course of the warm-up.", one_of("linear", "constant")),
    Key("RESCALE_INTERVAL", False, "Squeezes the schedule into what remains after warm-up."),
    Key("CHECKPOINT_PERIOD", 5000, "Time between checkpoints.", COUNT, "iterations"),
    Key("IMS_PER_BATCH", 16, "Images per iteration, over all processes.", COUNT),
    Key(
        "REFERENCE_WORLD_SIZE",
        0,
        "Processes that batch, rate and schedule are for; 0: any.",
        NOT_NEGATIVE,
    ),
    Key("BIAS_LR_FACTOR", 1.0, "Learning rate of biases, as a multiple of BASE_LR.", POSITIVE),
    Key(
        "WEIGHT_DECAY_BIAS",
        None,
        "Weight decay of biases; null is WEIGHT_DECAY.",
        Values(
            lambda value: value is None or at_least(0)(value),
            "Give 0 or more, or null for the value of SOLVER.WEIGHT_DECAY.",
        ),
        type_if_set=float,
    ),
    Key("CLIP_GRADIENTS.ENABLED", False, "Clips gradients."),
    Key(
        "CLIP_GRADIENTS.CLIP_TYPE",
        "value",
        "Clips each element, the norm of each parameter, or the norm of all together.",
        one_of("value", "norm", "full_model"),
    ),
    Key("CLIP_GRADIENTS.CLIP_VALUE", 1.0, "Where gradients are clipped.", POSITIVE),
    Key(
        "CLIP_GRADIENTS.NORM_TYPE",
        2.0,
        "The p of the p-norm.",
        Values(
            lambda value: value == math.inf or above(0)(value),
            "Give a number above 0, or .inf for the largest element.",
        ),
    ),
    Key("AMP.ENABLED", False, "Mixed precision in training, of the type `CASCADE.AMP_DTYPE`."),
)

TEST = group(
    "TEST",
    "Evaluation",
    Key("EXPECTED_RESULTS", [], values=built([])),
    Key(
        "EVAL_PERIOD",
        0,
        "Time between evaluations; 0: only at the end.",
        NOT_NEGATIVE,
        "iterations",
    ),
    Key("KEYPOINT_OKS_SIGMAS", []),
    Key(
        "DETECTIONS_PER_IMAGE",
        100,
        "The best detections that are returned; above COCO's limit of 100, an evaluation counts as "
        "many of each class in an image.",
        COUNT,
    ),
    Key("AUG.ENABLED", False, values=built(False)),
    Key("AUG.MIN_SIZES", (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)),
    Key("AUG.MAX_SIZE", 4000),
    Key("AUG.FLIP", True),
    Key("PRECISE_BN.ENABLED", False, values=built(False)),
    Key("PRECISE_BN.NUM_ITER", 200),
)

RUN = group(
    "",
    "Run",
    Key("OUTPUT_DIR", "./output", "Folder for all results.", Values(is_text, "Give a folder.")),
    Key("SEED", -1, "Seed of batches and initial weights; below 0: random."),
    Key("CUDNN_BENCHMARK", False, "Lets cuDNN time its algorithms: for fixed image sizes."),
    Key(
        "FLOAT32_PRECISION",
        "",
        'Precision of float32 matrix products; "" leaves torch\'s default.',
        one_of("", "highest", "high", "medium"),
    ),
    Key("VIS_PERIOD", 0, values=built(0)),
    Key("GLOBAL.HACK", 1.0, values=one_of(1.0, why="Nothing reads it.")),
)

CASCADE = group(
    "CASCADE",
    "Data, training and evaluation beyond Detectron2's keys",
    Key(
        "DATASETS",
        (),
        "Your own data sets in COCO format, for `DATASETS.TRAIN` and `DATASETS.TEST`; paths are "
        "relative to the working directory.",
        Values(
            each(each(is_text, length=3)),
            "Give [name, annotation file, image folder] for each data set.",
        ),
    ),
    Key(
        "ON_BAD_DATA",
        "error",
        "Stops with a list of all unusable records and images, or leaves them out and counts them. "
        "Test images are decoded before a run; of training images only heads and ends are read, "
        "and one that proves broken later stops the training or is replaced.",
        one_of("error", "skip"),
    ),
    Key(
        "FOLLOW_LINKS",
        "near",
        "Symbolic links of images or folders that are followed out of the image folder: those that "
        "lead below the json's folder or the working directory, all, or none; an image behind "
        "another link is bad data.",
        one_of("near", "all", "none"),
    ),
    Key(
        "EPOCHS",
        0.0,
        "Length of the training in passes over the training images: sets `SOLVER.MAX_ITER` and "
        "scales STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and `TEST.EVAL_PERIOD` with it; 0 keeps "
        "`SOLVER.MAX_ITER`.",
        Values(within(0, 1e6), "Give a number from 0 to 1,000,000."),
        "epochs",
    ),
    Key("MAX_TO_KEEP", 5, "Latest checkpoints that are kept; 0 keeps all.", NOT_NEGATIVE),
    Key(
        "BEST_METRIC",
        "bbox/AP",
        "Metric of the best checkpoint and of PATIENCE: higher is better, except for losses "
        "(`validation/total_loss`, with VALIDATION_LOSS); of several test sets, it begins with the "
        "name of one (`my_val/bbox/AP`).",
        Values(is_text, "Give the name of a metric, such as bbox/AP."),
    ),
    Key(
        "PATIENCE",
        0,
        "Ends after so many evaluations without a new best; 0: never.",
        NOT_NEGATIVE,
    ),
    Key("VALIDATION_LOSS", False, "Computes losses on `DATASETS.TEST` at each evaluation."),
    Key(
        "ACCUMULATION_STEPS",
        1,
        "Equal parts in which an iteration's images are computed, for less memory; divides "
        "`SOLVER.IMS_PER_BATCH`.",
        COUNT,
    ),
    Key(
        "EMA_DECAY",
        0.0,
        "Share that the average of the weights, for evaluation and in checkpoints, keeps at each "
        "iteration, such as 0.999; 0 averages nothing.",
        FROM_0_BELOW_1,
    ),
    Key("OPTIMIZER", "SGD", "Optimizer.", one_of("SGD", "AdamW")),
    Key(
        "AMP_DTYPE",
        "auto",
        "Type under `SOLVER.AMP`; auto is float16 on GPUs, and on CPUs bfloat16 with instructions "
        "for it, else float32.",
        one_of("auto", "bfloat16", "float16"),
    ),
    Key("TEST_IMS_PER_BATCH", 1, "Images per batch and process in inference.", COUNT),
    Key(
        "SHADOW_SHARE",
        0.0,
        "Share of the images that also take the full cascade, to see what exits lose; image and "
        "SEED alone decide which.",
        FRACTION,
    ),
    Key("SHADOW_SCORE", 0.5, "Lowest score of a detection that counts there.", FRACTION),
    Key("LOG_PERIOD", 20, "Time between lines of log and metrics.", COUNT, "iterations"),
)

RUN_GROUPS = (INPUT, DATASETS, DATALOADER, SOLVER, TEST, RUN, CASCADE)
