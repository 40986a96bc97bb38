"""What a run is: its model, its list of images, and the parts that it is cut into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import __version__, config
from cascade_det.data.coco_results import PREDICTIONS_FILE
from cascade_det.engine.run_info import class_labels, usable_run_info
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.offline.folder import OutputFolder
from cascade_det.offline.images import Entry
from cascade_det.offline.parquet import FORMAT
from cascade_det.text import listed, printable
from cascade_det.weights import read_weights_file, weights_sha256

RUN_FILE = "run.json"
PARTS = "parts"
# Sections and keys that a detector is built from; the rest is about training and evaluation.
_SECTIONS = ("MODEL.", "INPUT.")
_KEYS = ("TEST.DETECTIONS_PER_IMAGE", "CASCADE.TEST_IMS_PER_BATCH")
_LEFT_OUT = ("MODEL.WEIGHTS", "MODEL.DEVICE")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """Some images that are detected in together, and written to one file.

    Attributes:
        name: of the file in the folder of parts; has a hash of the images and of the model.
        entries: the images.
    """

    name: str
    entries: tuple[Entry, ...]


def model_identity(cfg: CfgNode) -> dict[str, Any]:
    """What decides the results for an image, as plain values.

    Returns:
        ``weights``, their SHA-256; ``class_names`` and ``category_ids``; ``configuration``, the
        values by key; ``device``, without the number of a GPU.

    Raises:
        ConfigError: there are no weights, or a key does not work in several processes.
        CheckpointError: the weights cannot be read.
    """
    _check_keys(cfg)
    file = read_weights_file(cfg.MODEL.WEIGHTS)
    run = usable_run_info(file.run, file.path)
    names, ids = class_labels(run, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS)
    values = config.flat(cfg).items()
    keys = {key: value for key, value in values if key.startswith(_SECTIONS) or key in _KEYS}
    identity = {
        "weights": weights_sha256(file.weights),
        "class_names": names,
        "category_ids": ids,
        "configuration": {key: keys[key] for key in sorted(keys) if key not in _LEFT_OUT},
        "device": cfg.MODEL.DEVICE.partition(":")[0],
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as when read
    return plain


def _check_keys(cfg: CfgNode) -> None:
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to predict with")
    if cfg.CASCADE.SHADOW_SHARE > 0:
        raise ConfigError(
            "CASCADE.SHADOW_SHARE: --engine has no monitor of exits, which is one process's. Set "
            "it to 0, or predict without --engine."
        )
    fast = cfg.MODEL.CASCADE.FAST
    if fast.ENABLED and fast.IMAGES and fast.DTYPE == "auto":
        raise ConfigError(
            "MODEL.CASCADE.FAST.IMAGES: with DTYPE auto each process would measure and choose its "
            "own types. Set DTYPE to the type that predict chose, or IMAGES to 0."
        )


def cut(entries: Sequence[Entry], size: int, model: Mapping[str, Any]) -> list[Part]:
    """Cut a list into parts of ``size`` images, named by their content and the model."""
    starts = range(0, len(entries), size)
    digits = max(5, len(str(len(starts))))
    parts = []
    for number, start in enumerate(starts):
        chosen = tuple(entries[start : start + size])
        name = f"part-{number:0{digits}d}-{_digest([FORMAT, model, chosen])[:16]}.parquet"
        parts.append(Part(name, chosen))
    return parts


def _digest(value: Any) -> str:
    # ASCII alone, so lone surrogates in file names are no error.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_run(folder: OutputFolder, parts: Sequence[Part], model: Mapping[str, Any]) -> None:
    """Begin a run in a folder, or continue the same one.

    Raises:
        DatasetError: the folder is of another run, or holds other files of the same names.
    """
    run = {
        "format": FORMAT,
        "model": dict(model),
        "parts": [[part.name, len(part.entries)] for part in parts],
    }
    # Looked at once: another job may be beginning the same run.
    there = folder.names("")
    if RUN_FILE in there:
        _check_same(read_run(folder), run, folder)
        return
    foreign = [name for name in (PARTS, PREDICTIONS_FILE) if name in there]
    if foreign:
        raise DatasetError(
            f"--output {folder}: has {listed(foreign, 2)} of another run. Give another folder."
        )
    folder.write(RUN_FILE, json.dumps({**run, "version": __version__}, indent=1).encode())


def read_run(folder: OutputFolder) -> dict[str, Any]:
    """The run of a folder: ``model`` as from :func:`model_identity`; names and sizes of ``parts``.

    Raises:
        DatasetError: there is none, or it cannot be read.
    """
    if not folder.exists(RUN_FILE):
        raise DatasetError(f"{folder}: has no {RUN_FILE}, so it is not of predict --engine")
    try:
        run = json.loads(folder.read(RUN_FILE))
        version = run["format"]
        parts = [(str(name), int(size)) for name, size in run["parts"]]
        categories = zip(run["model"]["category_ids"], run["model"]["class_names"], strict=True)
        labels = dict(categories)
        dict(run["model"]["configuration"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{folder}: {RUN_FILE} is damaged ({type(error).__name__}: {error})"
        ) from None
    if version != FORMAT or any("/" in name for name, _ in parts) or not labels:
        raise DatasetError(f"{folder}: {RUN_FILE} is of another version, or damaged")
    return {"format": version, "model": run["model"], "parts": [list(part) for part in parts]}


def missing_parts(folder: OutputFolder, names: Sequence[str]) -> list[str]:
    """Those that are not done, in order."""
    done = folder.names(PARTS)
    return [name for name in names if name not in done]


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: OutputFolder) -> None:
    differing = _differences(old["model"], new["model"])
    if not differing and old["parts"] != new["parts"]:
        differing = ["the list of images, or --part-size"]
    if differing:
        raise DatasetError(
            f"--output {folder}: holds another run, which differs in "
            f"{printable(listed(differing, _MOST_SHOWN))}. Its results are not mixed with these: "
            "give another folder."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = (
        {**{key: model.get(key) for key in ("weights", "class_names", "category_ids", "device")},
         **model.get("configuration", {})}
        for model in (old, new)
    )  # fmt: skip
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
