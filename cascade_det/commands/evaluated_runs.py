"""Folders of evaluations: their results, predictions and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_det.calibration.page import RECORD_FILE
from cascade_det.calibration.run_comparison import RunComparison, compare_evaluations
from cascade_det.commands.eval_json import SCORES_FILE
from cascade_det.commands.prediction_scores import check_predictions, evaluate, have_masks
from cascade_det.data.annotation_file import read_json
from cascade_det.data.catalog import DatasetSource, dataset_of_files
from cascade_det.data.coco import CocoDataset, load_dataset
from cascade_det.data.image_names import LINK_RULES, LinkRule
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.evaluation.average_precision import (
    ap_metrics,
    detections_limit,
    run_cocoeval,
)
from cascade_det.evaluation.coco import RESULTS_FILE as PREDICTIONS_FILE
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth
from cascade_det.report.pages.evaluation import read_results
from cascade_det.report.text import RESULTS_FILE
from cascade_det.text import listed
from cascade_det.weights.transfer import sha256_of

_SAME_AP = 0.01  # Percent points: libraries round differently.


@dataclass(frozen=True)
class EvaluatedRun:
    """The folder of an evaluation.

    Attributes:
        folder: with ``results.json`` or, of ``eval-json``, ``scores.json``.
        results: the content, with nan for null.
        source: of its data; ``None`` if neither the results nor the user say which.
        image_root: of its images; ``None`` if it is not known.
    """

    folder: Path
    results: dict[str, Any]
    source: DatasetSource | None
    image_root: Path | None

    @classmethod
    def of(cls, folder: Path, json_file: str | None, images: str | None) -> EvaluatedRun:
        """Read a folder.

        Args:
            folder: of the run.
            json_file: the annotations; by default those that the results name.
            images: their folder; the same.

        Raises:
            CascadeDetError: there are no results, or they cannot be used.
        """
        results = read_results(_results_file(folder))
        named = results.get("data")
        data = named if isinstance(named, dict) else {}
        file, root = data.get("json_file"), images or data.get("image_root")
        image_root = Path(root) if isinstance(root, str) else None
        source = None
        if json_file:
            source = dataset_of_files(json_file, None if image_root is None else str(image_root))
            image_root = source.image_root
        elif isinstance(file, str) and image_root is not None:
            source = DatasetSource(str(data.get("name", "")), Path(file), image_root)
        return cls(folder, results, source, image_root)

    def known_source(self) -> DatasetSource:
        """The data.

        Raises:
            DatasetError: they are not known.
        """
        if self.source is None:
            raise DatasetError(
                f"{self.folder}: {RESULTS_FILE} does not say on which data it was evaluated, as "
                "results of an earlier version. Give the annotations with --json."
            )
        return self.source

    def dataset(self, *, masks: bool) -> CocoDataset:
        """The images and objects that the evaluation counted.

        Raises:
            DatasetError: they are not known, gone or different now.
        """
        source = self.known_source()
        if not source.json_file.exists():
            raise DatasetError(
                f"{self.folder} was evaluated on {source.json_file}, which does not exist "
                "(relative paths start from the working directory). Give it with --json."
            )
        data = self.results.get("data") or {}
        skipped = data.get("skipped", 0)
        on_bad_data = self._setting("CASCADE.ON_BAD_DATA", "error")
        dataset = load_dataset(
            source,
            on_bad_data,
            masks="keep" if masks else None,
            keep_ground_truth=True,
            # Images that are bad were skipped, so they must be found again.
            check_images=bool(skipped),
            decode=bool(skipped),
            links=LinkRule(self._setting("CASCADE.FOLLOW_LINKS", LINK_RULES[0])),
        )
        images = data.get("images", len(dataset.records))
        if isinstance(images, int) and images != len(dataset.records):
            raise DatasetError(
                f"{source.json_file} has {len(dataset.records):,} usable images now, and had "
                f"{images:,} when {self.folder} was evaluated. Evaluate again."
            )
        return dataset

    def predictions(self) -> Any:
        """The content of the file of predictions.

        Raises:
            CascadeDetError: it is missing, or not JSON.
        """
        file = self.predictions_file
        if not file.is_file():
            raise CascadeDetError(
                f"{file}: there is no such file. An evaluation writes its predictions there: "
                "evaluate again."
            )
        return read_json(file)

    def scored_again(self) -> dict[str, Any]:
        """The metrics of the predictions, see ``prediction_scores.evaluate``."""
        content = self.predictions()
        dataset = self.dataset(masks=have_masks(content))
        return evaluate(dataset, self.predictions_file, content, max_detections=self.max_detections)

    @property
    def json_file(self) -> Path | None:
        """The annotations; ``None`` if they are not known."""
        return None if self.source is None else self.source.json_file

    @property
    def predictions_file(self) -> Path:
        """In the folder; of ``eval-json``, the file that it scored."""
        named = self.results.get("predictions")
        return Path(named) if isinstance(named, str) else self.folder / PREDICTIONS_FILE

    @property
    def max_detections(self) -> int:
        """How many count per class and image."""
        return detections_limit(int(self._setting("TEST.DETECTIONS_PER_IMAGE", 0)))

    def _setting(self, key: str, default: Any) -> Any:
        try:
            _, value = self.results["config"][key]
        except (KeyError, TypeError, ValueError):
            return default  # The key has its default, or the results are of an earlier version.
        return value if isinstance(value, type(default)) else default


def _results_file(folder: Path) -> Path:
    """The results in a folder.

    Raises:
        CascadeDetError: there are none.
    """
    for name in (RESULTS_FILE, SCORES_FILE):
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise CascadeDetError(f"{folder}: is not a folder. Give that of an evaluation.")
    if (folder / RECORD_FILE).is_file():
        raise CascadeDetError(f"{folder}: is of a calibration. --compare is for evaluations.")
    below = sorted(str(file.parent) for file in folder.glob(f"*/{RESULTS_FILE}"))
    if below:
        raise CascadeDetError(
            f"{folder}: has results of several data sets. Give one of {listed(below, 5)}."
        )
    raise CascadeDetError(
        f"{folder}: has neither {RESULTS_FILE} of an evaluation nor calibration.json of a "
        "calibration. Give the folder of one."
    )


def compare_runs(a: EvaluatedRun, b: EvaluatedRun) -> dict[str, RunComparison]:
    """Compare two evaluations of detectors on the same images.

    Returns:
        By task: ``bbox``, and ``segm`` if both have masks.

    Raises:
        CascadeDetError: they are of other data or of segmenters, or files are missing, or are not
            those that the results are of.
    """
    for run in (a, b):
        if "bbox" not in run.results:
            raise CascadeDetError(
                f"{run.folder}: is of a segmenter. --compare is for detectors, whose predictions "
                "are kept in a file."
            )
    _check_same_data(a, b)
    contents = [run.predictions() for run in (a, b)]
    with_masks = all(map(have_masks, contents))
    dataset = a.dataset(masks=with_masks)
    if not dataset.ground_truth.get("annotations"):
        raise DatasetError(f"{dataset.source.json_file}: has no objects to compare AP on")
    truths = {"bbox": load_ground_truth(dataset.ground_truth)}
    if with_masks:
        truths["segm"] = load_mask_truth(dataset.ground_truth)
    results = [
        check_predictions(run.predictions_file, content, dataset)[0]
        for run, content in zip((a, b), contents, strict=True)
    ]
    image_ids = sorted(truths["bbox"].imgs)
    compared = {}
    for task, truth in truths.items():
        evaluations = [
            run_cocoeval(truth, found, image_ids, task=task, max_detections=run.max_detections)
            for run, found in zip((a, b), results, strict=True)
        ]
        for run, evaluation in zip((a, b), evaluations, strict=True):
            _check_same_ap(run, task, ap_metrics(evaluation)["AP"])
        compared[task] = compare_evaluations(*evaluations)
    return compared


def _check_same_data(a: EvaluatedRun, b: EvaluatedRun) -> None:
    first, second = (run.known_source().json_file for run in (a, b))
    if first.resolve() == second.resolve():
        return
    if first.is_file() and second.is_file() and sha256_of(first) == sha256_of(second):
        return
    raise CascadeDetError(
        f"{a.folder} was evaluated on {first}, and {b.folder} on {second}: their AP cannot be "
        "compared. Evaluate both on the same images."
    )


def _check_same_ap(run: EvaluatedRun, task: str, ap: float) -> None:
    before = run.results.get(task, {}).get("AP", ap)
    if abs(before - ap) > _SAME_AP:
        raise CascadeDetError(
            f"{run.folder}: its predictions have {task}/AP {ap:.3f}, but {RESULTS_FILE} has "
            f"{before:.3f}: the annotations or the predictions have changed since. Evaluate again."
        )
