"""Parts of a cascade without which it detects something, but nothing that anybody trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from cascade_det.errors import CheckpointError

_STAGE = re.compile(r"roi_heads\.box_(?:head|predictor)\.(\d+)\.")
_LEARNED = re.compile(r"roi_heads\.exits\.learned\.(\w+)\.")


def check_complete(
    path: str | Path,
    loaded: Collection[str],
    missing: Collection[str],
    mismatched: Collection[str] = (),
) -> None:
    """Make sure that a file of weights has every stage of a model, and every learned exit.

    A file without any stage, such as that of a backbone, is not looked at.

    Args:
        path: of the file, for the message.
        loaded: the model's names that the file has values for.
        missing: those that it has not.
        mismatched: those that it has in another shape.

    Raises:
        CheckpointError: names what is missing, and the remedies.
    """
    there = _stages([*loaded, *mismatched])
    lacking = sorted(_stages(missing) - there)
    if there and lacking:
        last, many = max(there), len(lacking) > 1
        raise CheckpointError(
            f"{path}: has {last + 1} stage{'s' if last else ''} (roi_heads.box_head."
            f"{f'0-{last}' if last else last}), but MODEL.ROI_BOX_CASCADE_HEAD.IOUS has "
            f"{lacking[-1] + 1}: train stage{'s' * many} {' and '.join(map(str, lacking))} "
            "(tools/train_net.py with this configuration, starting from these weights), or leave "
            f"{'them' if many else 'it'} out of IOUS and BBOX_REG_WEIGHTS."
        )
    learned = {
        found[1]: name for name in [*missing, *mismatched] if (found := _LEARNED.match(name))
    }
    if there and learned:
        raise CheckpointError(
            f"{path}: has no weights that fit the learned exits {', '.join(sorted(learned))} "
            f"({', '.join(sorted(learned.values()))}), which MODEL.CASCADE.EXIT.LEARNED asks for: "
            "train them with MODEL.CASCADE.TRAINING.FREEZE_DETECTOR (tools/train_net.py, starting "
            "from these weights), or leave them out of LEARNED."
        )


def _stages(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := _STAGE.match(name))}
