"""Checks that a file of weights holds everything a detector needs, and only finite numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cascade_det.errors import CheckpointError
from cascade_det.text import listed
from cascade_det.weights.attention import differs_in_kernel, differs_in_window

Shapes = tuple[tuple[int, ...], tuple[int, ...]]

_STAGE = re.compile(r"roi_heads\.(?:box_(?:head|predictor)|mask_head)\.(\d+)\.")
_MASKS = re.compile(r"roi_heads\.mask_head\.")
PREDICTOR = re.compile(r"roi_heads\.(?:box_predictor|mask_head(?:\.\d+)?\.predictor)\.")
# Another number of classes would also show in the scores.
_AGNOSTIC = re.compile(
    r"roi_heads\.(?:box_predictor\.\d+\.bbox_pred|mask_head(?:\.\d+)?\.predictor)\."
)
_LEARNED = re.compile(r"roi_heads\.exits\.learned\.(\w+)\.")
# State of a training, such as thresholds that follow its statistics.
_TRAINING_ALONE = re.compile(r"roi_heads\.regime\.")
# Detectron2's FPN and its coarser levels, the CASCADE decoder, and the necks of EfficientViT.
_NECK = r"(?:fpn_|top_block\.|decoder\.|lateral_convs\.|extra_trans_convs\.|extra_fpn_convs\.)"
_PARTS = (
    (re.compile(r"backbone\.(?:bottom_up|features)\."), "the backbone"),
    (re.compile(rf"backbone\.{_NECK}"), "the FPN"),
    (re.compile(r"proposal_generator\."), "the RPN"),
    (re.compile(r"roi_heads\.box_"), "the box heads"),
    (re.compile(r"roi_heads\.mask_head\."), "the mask head"),
    (re.compile(r"roi_heads\.keypoint_head\."), "the keypoint head"),
    (_LEARNED, "the learned exits"),
)
_IN_ANY_MODEL = re.compile(rf"backbone\.(?:bottom_up|features|{_NECK})|proposal_generator\.")
_SHOWN = 3


def check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are finite: a detector with NaN or Inf in it detects nothing.

    Args:
        path: of the file, for the message.
        weights: name to tensor, in the types of the model.

    Raises:
        CheckpointError: names the first tensors that are not finite.
    """
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{path}: holds NaN or Inf in {listed(wrong, _SHOWN)}, of {len(weights)} tensors. "
            "Such weights neither detect nor train: take an earlier checkpoint, or save them again."
        )


def check_complete(
    path: str | Path,
    loaded: Collection[str],
    missing: Collection[str],
    mismatched: Mapping[str, Shapes],
    unexpected: Collection[str],
) -> None:
    """Check that a file has weights for every part of a detector.

    The file may hold further parts, such as more stages, or a mask head for a model without one.
    But further layers in the same part mean another architecture, whose first layers alone are
    useless.

    Args:
        path: of the file, for the message.
        loaded: the model's names that the file has values for.
        missing: the model's names that the file lacks.
        mismatched: the model's names whose shapes differ: the file's and the model's.
        unexpected: the file's names that the model has no place for.

    Raises:
        CheckpointError: names what is missing, of another shape or too much, and the remedies.
    """
    missing = [name for name in missing if not _TRAINING_ALONE.match(name)]
    differing = {k: v for k, v in mismatched.items() if not _TRAINING_ALONE.match(k)}
    there = _stages([*loaded, *differing])
    lacking = sorted(_stages(missing) - there)
    learned = {found[1]: name for name in [*missing, *differing] if (found := _LEARNED.match(name))}
    rest = [n for n in missing if not _LEARNED.match(n) and _stages([n]).isdisjoint(lacking)]
    if rest or (lacking and not there):
        raise CheckpointError(_incomplete(path, missing, loaded, unexpected))
    if lacking:
        raise CheckpointError(_too_few_stages(path, max(there) + 1, lacking))
    others = {name: shapes for name, shapes in differing.items() if not _LEARNED.match(name)}
    if others:
        raise CheckpointError(_differing(path, others))
    if learned:
        raise CheckpointError(
            f"{path}: has no weights that fit the learned exits {', '.join(sorted(learned))} "
            f"({', '.join(sorted(learned.values()))}), which MODEL.CASCADE.EXIT.LEARNED asks for: "
            "train them with MODEL.CASCADE.TRAINING.FREEZE_DETECTOR (cascade-det train, starting "
            "from these weights), or leave them out of LEARNED."
        )
    surplus = _further_layers(loaded, unexpected)
    if surplus:
        raise CheckpointError(
            f"{path}: has {listed(surplus, _SHOWN)}, which this model has no place for. These "
            "weights are of another architecture: give the keys below MODEL of their training "
            "(such as RESNETS.DEPTH and NORM), or the MODEL.WEIGHTS of a training of this "
            "configuration."
        )


def _further_layers(loaded: Collection[str], unexpected: Iterable[str]) -> list[str]:
    """The names without a place that belong to a part that the model has."""
    used, has_masks = _stages(loaded), any(map(_MASKS.match, loaded))

    def is_further(name: str) -> bool:
        stages = _stages([name])
        if _MASKS.match(name):
            return has_masks and (not stages or not used.isdisjoint(stages))
        return bool(_IN_ANY_MODEL.match(name)) or not used.isdisjoint(stages)

    return list(filter(is_further, unexpected))


def _incomplete(
    path: str | Path,
    missing: Collection[str],
    loaded: Collection[str],
    unexpected: Collection[str],
) -> str:
    has = Counter(map(_part_of, loaded))
    parts = [
        f"{part} ({count} of {count + has[part]} tensors)"
        for part, count in Counter(map(_part_of, missing)).items()
    ]
    return (
        f"{path}: lacks {', '.join(parts)}, such as {listed([*missing], _SHOWN)}. These weights "
        "can be trained on, but a model that is only used needs all of them: give MODEL.WEIGHTS "
        "the checkpoint of a training of this configuration (cascade-det train), such as "
        f"model_final.pth{_instead_of_masks(missing, loaded, unexpected)}."
    )


def _instead_of_masks(
    missing: Collection[str], loaded: Collection[str], unexpected: Collection[str]
) -> str:
    """For a message: another remedy where only mask heads are missing."""
    if not all(map(_MASKS.match, missing)):
        return ""
    if any(map(_MASKS.match, loaded)):
        return ", or give the MODEL.ROI_MASK_HEAD of their training"
    in_file = list(filter(_MASKS.match, unexpected))
    if in_file and bool(_stages(in_file)) != bool(_stages(missing)):
        stages = "every" if _stages(in_file) else "last"
        return f", or set MODEL.CASCADE.MASK.STAGES to {stages!r}, as these weights have it"
    return ", or leave masks out (MODEL.MASK_ON False)"


def _too_few_stages(path: str | Path, there: int, lacking: list[int]) -> str:
    last, many = there - 1, len(lacking) > 1
    return (
        f"{path}: has {there} stage{'s' if last else ''} (roi_heads.box_head."
        f"{f'0-{last}' if last else last}), but MODEL.ROI_BOX_CASCADE_HEAD.IOUS has "
        f"{lacking[-1] + 1}: train stage{'s' * many} {' and '.join(map(str, lacking))} "
        "(cascade-det train with this configuration, starting from these weights), or leave "
        f"{'them' if many else 'it'} out of IOUS and BBOX_REG_WEIGHTS."
    )


def differing_shapes(shapes: Mapping[str, Shapes]) -> list[str]:
    """For messages: names, with the shapes of the file and of the model."""
    return [
        f"{name} is {in_file} in the file, {in_model} in the model"
        for name, (in_file, in_model) in shapes.items()
    ]


def _differing(path: str | Path, shapes: Mapping[str, Shapes]) -> str:
    differences = listed(differing_shapes(shapes), _SHOWN, "; ")
    if all(map(_AGNOSTIC.match, shapes)):
        keys = ("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK")
        masks = [bool(_MASKS.match(name)) for name in shapes]
        key = " and ".join(f"MODEL.{keys[is_mask]}" for is_mask in sorted(set(masks)))
    elif all(map(PREDICTOR.match, shapes)):
        key = "MODEL.ROI_HEADS.NUM_CLASSES"
    elif all(differs_in_window(name, *pair) for name, pair in shapes.items()):
        key = "window of attention"
    elif all(differs_in_kernel(name, *pair) for name, pair in shapes.items()):
        key = "MODEL.EFFICIENTVIT.KERNELS"
    else:
        key = "MODEL.ROI_MASK_HEAD" if all(map(_MASKS.match, shapes)) else "MODEL"
    return (
        f"{path}: {differences}. These weights were trained with another {key}: give that of "
        "their training, or the MODEL.WEIGHTS of a training of this configuration "
        "(cascade-det train)."
    )


def _part_of(name: str) -> str:
    part = next((part for pattern, part in _PARTS if pattern.match(name)), "")
    return part or ".".join(name.split(".")[:2])


def _stages(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := _STAGE.match(name))}
