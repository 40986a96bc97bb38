"""The keys of semantic segmenters. ``SEM_SEG_HEAD`` is Detectron2's, with its defaults."""

from __future__ import annotations

from cascade_det.config.key import (
    COUNT,
    NAMES,
    NOT_NEGATIVE,
    Key,
    Values,
    above,
    at_least,
    each,
    group,
    one_of,
    whole,
)


def _is_falling_pair(value: object) -> bool:
    is_pair = each(whole(at_least(1)), length=2)(value)
    return is_pair and isinstance(value, (list, tuple)) and value[0] >= value[1]


SEM_SEG_HEAD = group(
    "MODEL.SEM_SEG_HEAD",
    "Head of a segmenter, with `META_ARCHITECTURE` `SemanticSegmentor`",
    NAME=Key("SemSegFPNHead", "The head: `CascadeSemSegHead`."),
    IN_FEATURES=Key(
        ["p2", "p3", "p4", "p5"],
        "Maps that are decoded, two or more, finest first; of a backbone without a pyramid, its "
        "outputs.",
        NAMES,
    ),
    IGNORE_VALUE=Key(255, "Label of pixels that take no part in losses and metrics.", COUNT),
    NUM_CLASSES=Key(54, "Classes, background included.", COUNT),
    LOSS_WEIGHT=Key(1.0, "Weight of the loss.", NOT_NEGATIVE),
)

CASCADE_DECODER = group(
    "MODEL.CASCADE_DECODER",
    "The CASCADE decoder of a segmenter",
    FUSE=Key(
        "add",
        "How a level fuses the gated map of the backbone with the upsampled coarser one.",
        one_of("add", "concat"),
    ),
    FINEST_GATE=Key(
        0,
        "Width inside the gate of the finest level; 0 is half of that level's, as in MERIT; the "
        "published CASCADE has 32.",
        Values(whole(at_least(0)), "Give a whole number, 0 or more."),
        "channels",
    ),
    SUBSETS=Key(
        "mutation",
        "Sets of levels whose summed logits each have a loss: all, or each level alone.",
        one_of("mutation", "singletons"),
    ),
    SUBSET_MEAN=Key(
        False,
        "Divides the loss of all sets by their number and multiplies it by that of the levels: it "
        "then has the scale of that of each level alone.",
    ),
    CE_WEIGHT=Key(0.3, "Weight of cross-entropy in the loss of a set.", NOT_NEGATIVE),
    DICE_WEIGHT=Key(0.7, "Weight of the Dice loss in the loss of a set.", NOT_NEGATIVE),
)

MAP_EXIT = group(
    "MODEL.CASCADE_DECODER.EXIT",
    "Early exits of a segmenter",
    ENABLED=Key(False, "Applies exits after each level but the last, in inference."),
    KIND=Key(
        "patch",
        "What leaves: whole images, or patches, which finer levels then do not compute.",
        one_of("patch", "image"),
    ),
    CONFIDENCE=Key(
        "max",
        "How sure a patch or image is: the mean of its pixels' largest probability, their 0.25 "
        "quantile, or the mean of 1 - entropy / log K.",
        one_of("max", "quantile", "entropy"),
    ),
    THRESHOLDS=Key(
        [0.99],
        "What has this confidence or more leaves after the level; per level but the finest, "
        "coarsest first, or a single value for all.",
        Values(each(above(0), least=1), "Give a list of numbers above 0; above 1 means never."),
    ),
    PATCH=Key(8, "Side of a patch, in pixels of the finest map that is decoded.", COUNT, "pixels"),
    CHANNEL_GATES=Key(
        "computed",
        "What channel attention pools over if patches left: the computed pixels, or the whole map "
        "(`dense`), which takes longer.",
        one_of("computed", "dense"),
    ),
)

DUAL_SCALE = group(
    "MODEL.DUAL_SCALE",
    "MERIT: a segmenter that sees an image at two scales, with a trunk for each and one decoder",
    MODE=Key(
        "off",
        "Adds the logits of both scales; by cascaded, the first also masks the image of the "
        "second, and adds its maps to those of the second.",
        one_of("off", "parallel", "cascaded"),
    ),
    SIZES=Key(
        [256, 224],
        "Sides of the squares to which images are resized; MaxViT takes multiples of 32.",
        Values(
            _is_falling_pair,
            "Give 2 whole numbers of 1 or more, the larger first: the second square is made of the "
            "first.",
        ),
        "pixels",
    ),
    GREY=Key(
        False,
        "Gives the network one channel, through a stem for grey images, as published for CT and "
        "MRI; False gives it all three.",
    ),
)

SEGMENTER_GROUPS = (SEM_SEG_HEAD, CASCADE_DECODER, MAP_EXIT, DUAL_SCALE)
