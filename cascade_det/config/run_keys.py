"""The keys of data, solver, evaluation and run; our node ``CASCADE`` among them."""

from __future__ import annotations

import math

from cascade_det.config.augment_keys import is_list_of_entries
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
    each,
    group,
    is_text,
    one_of,
    rising,
    subset_of,
    whole,
    within,
)

SEMANTIC_FORMATS = ("folders", "synapse", "synapse-14", "acdc", "polyp")


def _is_semantic_dataset(value: object) -> bool:
    """(name, format, folder), or (name, "folders", images, labels)."""
    if not isinstance(value, (list, tuple)) or not each(is_text, least=3)(value):
        return False
    return value[1] in SEMANTIC_FORMATS and len(value) == (4 if value[1] == "folders" else 3)


VERSION = group("", "Version", VERSION=Key(2, "Version of the configuration; no other is read."))

INPUT = group(
    "INPUT",
    "Images",
    MIN_SIZE_TRAIN=Key(
        (800,),
        "Shorter edge after resizing in training; one value is drawn per image.",
        Values(
            each(whole(at_least(1)), least=1), "Give a list of sizes in pixels, 1 or more each."
        ),
    ),
    MIN_SIZE_TRAIN_SAMPLING=Key(
        "choice", "One of the values, or any between two.", one_of("choice", "range")
    ),
    MAX_SIZE_TRAIN=Key(1333, "Limit of the longer edge in training.", COUNT, "pixels"),
    MIN_SIZE_TEST=Key(800, "Shorter edge in inference; 0: no resizing.", NOT_NEGATIVE, "pixels"),
    MAX_SIZE_TEST=Key(1333, "Limit of the longer edge in inference.", COUNT, "pixels"),
    RANDOM_FLIP=Key(
        "horizontal", "Flips half of the training images.", one_of("horizontal", "vertical", "none")
    ),
    MASK_FORMAT=Key(
        "polygon",
        "How polygons become targets of the mask head: drawn inside each region, or drawn on the "
        "whole image and cropped. RLE masks are always cropped.",
        one_of("polygon", "bitmask"),
    ),
    FORMAT=Key("BGR", "Channel order, also of PIXEL_MEAN and _STD.", one_of("BGR", "RGB")),
)

CROP = group(
    "INPUT.CROP",
    "Random crops",
    ENABLED=Key(
        False, "Crops training images before everything else; boxes then follow from masks."
    ),
    TYPE=Key(
        "relative_range",
        "SIZE is (height, width) as shares of the image, drawn from SIZE to 1 with relative_range; "
        "or in pixels; absolute_range draws both sides from its two values.",
        one_of("relative_range", "relative", "absolute", "absolute_range"),
    ),
    SIZE=Key(
        [0.9, 0.9],
        "Size of the crop, see TYPE.",
        Values(each(above(0), length=2), "Give two numbers above 0."),
    ),
)

DATASETS = group(
    "DATASETS",
    "Data sets",
    TRAIN=Key((), "Data sets to train on, joined into one.", NAMES),
    TEST=Key((), "Data sets to evaluate on, each on its own.", NAMES),
)

DATALOADER = group(
    "DATALOADER",
    "Data loader",
    NUM_WORKERS=Key(4, "Processes that read images; 0: the main one.", NOT_NEGATIVE),
    ASPECT_RATIO_GROUPING=Key(True, "Batches wide images with wide ones, for less padding."),
    FILTER_EMPTY_ANNOTATIONS=Key(True, "Leaves out training images without objects."),
    SAMPLER_TRAIN=Key(
        "TrainingSampler",
        "Shows every training image once per epoch, or those with rare classes more often.",
        one_of("TrainingSampler", "RepeatFactorTrainingSampler", standalone_only=True),
    ),
    REPEAT_THRESHOLD=Key(
        0.0,
        "RepeatFactorTrainingSampler repeats images with a class that a smaller share f of the "
        "images has: on average sqrt(REPEAT_THRESHOLD / f) times, by the rarest class.",
        NOT_NEGATIVE,
    ),
    REPEAT_SQRT=Key(True, "Takes that root; without it rare classes are repeated more."),
)

SOLVER = group(
    "SOLVER",
    "Solver",
    LR_SCHEDULER_NAME=Key(
        "WarmupMultiStepLR",
        "Schedule of the learning rate.",
        one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    MAX_ITER=Key(40000, "Length of the training.", COUNT, "iterations"),
    BASE_LR=Key(0.001, "Learning rate after warm-up, for a batch of IMS_PER_BATCH.", POSITIVE),
    BASE_LR_END=Key(0.0, "Where a cosine schedule ends, up to BASE_LR.", NOT_NEGATIVE),
    MOMENTUM=Key(0.9, "Momentum of SGD.", FROM_0_BELOW_1),
    NESTEROV=Key(False, "Nesterov momentum."),
    WEIGHT_DECAY=Key(0.0001, "Weight decay; attention biases have none.", NOT_NEGATIVE),
    WEIGHT_DECAY_NORM=Key(0.0, "Weight decay of normalisation layers.", NOT_NEGATIVE),
    GAMMA=Key(0.1, "Factor of each decay of the learning rate.", ABOVE_0_TO_1),
    STEPS=Key(
        (30000,),
        "When the learning rate decays.",
        Values(
            rising(each(whole(at_least(1))), strictly=True),
            "Give increasing iterations, 1 or more each.",
        ),
    ),
    NUM_DECAYS=Key(3, "Decays of the fixed-gamma schedule, evenly spaced.", COUNT),
    WARMUP_FACTOR=Key(1.0 / 1000, "Warm-up starts at BASE_LR times this.", FRACTION),
    WARMUP_ITERS=Key(1000, "Length of the warm-up.", NOT_NEGATIVE, "iterations"),
    WARMUP_METHOD=Key("linear", "Shape of the warm-up.", one_of("linear", "constant")),
    RESCALE_INTERVAL=Key(False, "Fits the whole schedule into the iterations after warm-up."),
    CHECKPOINT_PERIOD=Key(5000, "Time between checkpoints.", COUNT, "iterations"),
    IMS_PER_BATCH=Key(
        16,
        "Images per iteration, over all processes; 0: as many as fit into the GPUs, with rate and "
        "schedule given for 16.",
        NOT_NEGATIVE,
    ),
    REFERENCE_WORLD_SIZE=Key(
        0, "Processes that batch size, rate and schedule are set for; 0: any.", NOT_NEGATIVE
    ),
    BIAS_LR_FACTOR=Key(1.0, "Learning rate of biases, as a multiple of BASE_LR.", POSITIVE),
    WEIGHT_DECAY_BIAS=Key(
        None,
        "Weight decay of biases; null is WEIGHT_DECAY.",
        Values(
            lambda value: value is None or at_least(0)(value),
            "Give 0 or more, or null for the value of SOLVER.WEIGHT_DECAY.",
        ),
        type_if_set=float,
    ),
)

CLIP_GRADIENTS = group(
    "SOLVER.CLIP_GRADIENTS",
    "Gradient clipping",
    ENABLED=Key(False, "Clips gradients."),
    CLIP_TYPE=Key(
        "value",
        "Clips each element, the norm of each parameter, or the norm of all together.",
        one_of("value", "norm", "full_model"),
    ),
    CLIP_VALUE=Key(1.0, "Where gradients are clipped.", POSITIVE),
    NORM_TYPE=Key(
        2.0,
        "The p of the p-norm.",
        Values(
            lambda value: value == math.inf or above(0)(value),
            "Give a number above 0, or .inf for the largest element.",
        ),
    ),
)

AMP = group(
    "SOLVER.AMP",
    "Mixed precision in training",
    ENABLED=Key(False, "Trains in mixed precision, of the type `CASCADE.AMP_DTYPE`."),
)

TEST = group(
    "TEST",
    "Evaluation",
    EVAL_PERIOD=Key(0, "Time between evaluations; 0: only at the end.", NOT_NEGATIVE, "iterations"),
    DETECTIONS_PER_IMAGE=Key(
        100,
        "Number of best detections to return; if above COCO's limit of 100, an evaluation counts "
        "that many per class and image.",
        COUNT,
    ),
)

AUG = group(
    "TEST.AUG",
    "Test-time augmentation",
    ENABLED=Key(
        False,
        "Evaluates also with augmentation: each test image in several sizes, boxes merged by NMS, "
        "masks averaged. Results are named `bbox_TTA` and `segm_TTA`; prediction ignores it.",
    ),
    MIN_SIZES=Key(
        (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "Shorter edges after resizing the test image; 0: its own size.",
        Values(
            each(whole(at_least(0)), least=1), "Give a list of sizes in pixels, 0 or more each."
        ),
    ),
    MAX_SIZE=Key(4000, "Limit of the longer edge.", COUNT, "pixels"),
    FLIP=Key(True, "Each size also mirrored."),
)

RUN = group(
    "",
    "Run",
    OUTPUT_DIR=Key("./output", "Folder for all results.", Values(is_text, "Give a folder.")),
    SEED=Key(-1, "Seed of batches and initial weights; below 0: random."),
    CUDNN_BENCHMARK=Key(False, "Lets cuDNN time its algorithms: for fixed image sizes."),
    FLOAT32_PRECISION=Key(
        "",
        "Precision of float32 matrix products in the process of a command: high allows TF32 on "
        'GPUs; "" leaves torch\'s default, as FAST does.',
        one_of("", "highest", "high", "medium"),
    ),
)

CASCADE = group(
    "CASCADE",
    "Data, training and evaluation beyond Detectron2's keys",
    DATASETS=Key(
        (),
        "Your own data sets, for `DATASETS.TRAIN` and `DATASETS.TEST`. Annotations are a COCO "
        "json, YOLO's data.yaml, or a folder of Pascal VOC or LabelMe. Paths are relative to the "
        "working directory.",
        Values(
            each(each(is_text, length=3)),
            "Give [name, annotations, image folder] for each data set.",
        ),
    ),
    AUGMENT=Key(
        (),
        "Augmentation of training images: a list of `[name, {argument: value}]`, applied in its "
        "order before resizing and flipping; see [below](#entries-of-cascadeaugment).",
        Values(
            is_list_of_entries,
            "Give a list of [name, {argument: value}], such as [[RandomGrayscale, {p: 0.1}]].",
        ),
        mappings=True,
    ),
    SEMANTIC_DATASETS=Key(
        (),
        "Your data sets for semantic segmentation: `[name, folders, images, labels]` with label "
        "images in the second folder, or `[name, format, folder]` with a published format.",
        Values(
            each(_is_semantic_dataset),
            "Give [name, 'folders', image folder, label folder] or [name, format, folder] for each "
            f"data set; the formats are {', '.join(SEMANTIC_FORMATS[1:])}.",
        ),
    ),
    SEMANTIC_CLASSES=Key(
        (),
        "Names of the classes in the label images of `folders`, in the order of their labels "
        "from 0; the published formats have their own.",
        NAMES,
    ),
    SEMANTIC_AUGMENTATION=Key(
        "flip",
        "Of training images for semantic segmentation: `INPUT.RANDOM_FLIP`, or in its place the "
        "rotations and flips published for Synapse and ACDC.",
        one_of("flip", "rotate"),
    ),
    ON_BAD_DATA=Key(
        "error",
        "Stops with a list of all unusable records and images, or leaves them out and counts them. "
        "Test images are decoded before a run; of training images only headers and ends are "
        "read, and one that proves broken later stops the training or is replaced.",
        one_of("error", "skip"),
    ),
    MASKLESS=Key(
        "keep",
        "Objects with a box but no mask, where `MODEL.MASK_ON`: kept for the boxes and left out of "
        "the mask loss, or dropped, as Detectron2 does. The Detectron2 host always drops them.",
        one_of("keep", "drop"),
    ),
    FOLLOW_LINKS=Key(
        "near",
        "Symbolic links out of the image folder to follow, for images and folders: links to below "
        "the json's folder or the working directory, all, or none; an image behind any other link "
        "is bad data.",
        one_of("near", "all", "none"),
    ),
    EPOCHS=Key(
        0.0,
        "Length of the training in passes over the training images: sets `SOLVER.MAX_ITER` and "
        "scales STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and `TEST.EVAL_PERIOD` with it; 0 keeps "
        "`SOLVER.MAX_ITER`.",
        Values(within(0, 1e6), "Give a number from 0 to 1,000,000."),
        "epochs",
    ),
    MAX_TO_KEEP=Key(5, "Number of latest checkpoints to keep; 0 keeps all.", NOT_NEGATIVE),
    BEST_METRIC=Key(
        "bbox/AP",
        "Metric of the best checkpoint and of PATIENCE: higher is better, except for losses "
        "(`validation/total_loss`, with VALIDATION_LOSS); of several test sets, it begins with the "
        "name of one (`my_val/bbox/AP`).",
        Values(is_text, "Give the name of a metric, such as bbox/AP."),
    ),
    PATIENCE=Key(
        0, "Stops after this many evaluations without a new best; 0: never.", NOT_NEGATIVE
    ),
    VALIDATION_LOSS=Key(False, "Computes losses on `DATASETS.TEST` at each evaluation."),
    ACCUMULATION_STEPS=Key(
        1,
        "Equal parts in which an iteration's images are computed, for less memory; divides "
        "`SOLVER.IMS_PER_BATCH`.",
        COUNT,
    ),
    EMA_DECAY=Key(
        0.0,
        "Share that the average of the weights, for evaluation and in checkpoints, keeps at each "
        "iteration, such as 0.999; 0 averages nothing.",
        FROM_0_BELOW_1,
    ),
    OPTIMIZER=Key("SGD", "Optimizer.", one_of("SGD", "AdamW")),
    AMP_DTYPE=Key(
        "auto",
        "Type under `SOLVER.AMP`; auto is bfloat16 on devices with instructions for it, else "
        "float16 on GPUs and float32 on CPUs.",
        one_of("auto", "bfloat16", "float16"),
    ),
    TEST_IMS_PER_BATCH=Key(1, "Images per batch and process in inference.", COUNT),
    SHADOW_SHARE=Key(
        0.0,
        "Share of images that also run the full cascade, to measure what exits lose; chosen by "
        "image and SEED alone.",
        FRACTION,
    ),
    SHADOW_SCORE=Key(0.5, "Lowest score of a detection that counts in shadow runs.", FRACTION),
    LVIS_AP=Key(
        False,
        "Adds the AP of rare, common and frequent classes, by the json's `frequency` or the number "
        "of images of DATASETS.TRAIN that have the class; by faster-coco-eval, the extra [lvis].",
    ),
    FAST_AP=Key(
        False,
        "Scores the stages by faster-coco-eval, the extra [lvis], in place of pycocotools: the "
        "same numbers sooner.",
    ),
    LOG_PERIOD=Key(20, "Time between lines of log and metrics.", COUNT, "iterations"),
    LOGGERS=Key(
        (),
        "Experiment trackers that also get metrics, configuration, evaluations and pictures, each "
        "set up by its own environment variables.",
        subset_of("wandb", "mlflow", "trackio"),
    ),
)

RUN_GROUPS = (
    INPUT,
    CROP,
    DATASETS,
    DATALOADER,
    SOLVER,
    CLIP_GRADIENTS,
    AMP,
    TEST,
    AUG,
    RUN,
    CASCADE,
)
