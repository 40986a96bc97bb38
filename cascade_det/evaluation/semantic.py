"""Metrics of semantic segmentation over pixels, as Detectron2 reports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cascade_det.data.samples import Sample
from cascade_det.errors import DatasetError
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.worst_images import WorstImage, WorstImages
from cascade_det.segmentation.output import SegmenterOutput

Labels = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]

IGNORE_LABEL = 255


class ConfusionMatrix:
    """Counts pixels by true and predicted class, over any number of images.

    Args:
        num_classes: K.
        ignore_label: truth of the pixels that do not count, not in ``0..K-1``.

    Attributes:
        counts: int64 ``[K, K]``, true class by predicted class.
    """

    def __init__(self, num_classes: int, *, ignore_label: int = IGNORE_LABEL) -> None:
        self.ignore_label = ignore_label
        self.counts: Counts = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: Labels, truth: Labels) -> None:
        """Add an image.

        Args:
            prediction: integers ``[H, W]`` in ``0..K-1``.
            truth: integers ``[H, W]`` in ``0..K-1``, or the ignore label.

        Raises:
            ValueError: the sizes differ, or a pixel that counts has another label.
        """
        if prediction.shape != truth.shape:
            raise ValueError(
                f"the prediction has {_size(prediction)} pixels (height x width), "
                f"the truth has {_size(truth)}"
            )
        counted = truth != self.ignore_label
        true, predicted = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
        k = len(self.counts)
        for name, labels in (("truth", true), ("prediction", predicted)):
            if labels.size and not 0 <= labels.min() <= labels.max() < k:
                wrong = labels[(labels < 0) | (labels >= k)][0]
                raise ValueError(
                    f"the {name} has label {wrong}; known are 0 to {k - 1} for {k} classes, and "
                    f"{self.ignore_label} for pixels of the truth to ignore"
                )
        pairs = np.bincount(true * k + predicted, minlength=k * k)
        self.counts += pairs.reshape(k, k)


def semantic_metrics(counts: Counts, class_names: Sequence[str]) -> dict[str, float]:
    """Metrics of a confusion matrix in percent, named and computed as by Detectron2.

    A class without truth has no IoU and no accuracy (nan) and is left out of the means, even if it
    was predicted; these pixels still count as errors of their true classes. Without any truth all
    metrics are nan.

    Args:
        counts: int64 ``[K, K]``, true class by predicted class.
        class_names: of the K classes.

    Returns:
        ``mIoU``, ``fwIoU`` (IoU weighted with the share of the class in the truth),
        ``IoU-<class>``, ``mACC`` (mean accuracy of the classes), ``pACC`` (share of the pixels that
        are right), ``ACC-<class>``.
    """
    right = counts.diagonal().astype(float)
    true = counts.sum(1).astype(float)
    union = true + counts.sum(0) - right
    present = true > 0
    iou, accuracy = np.full((2, len(counts)), np.nan)
    iou[present] = right[present] / union[present]
    accuracy[present] = right[present] / true[present]
    total = true.sum()
    if not total:
        mean_iou = weighted_iou = mean_accuracy = pixel_accuracy = float("nan")
    else:
        mean_iou, mean_accuracy = iou[present].mean(), accuracy[present].mean()
        weighted_iou = (iou[present] * true[present]).sum() / total
        pixel_accuracy = right.sum() / total
    metrics = {
        "mIoU": mean_iou,
        "fwIoU": weighted_iou,
        **{f"IoU-{name}": value for name, value in zip(class_names, iou, strict=True)},
        "mACC": mean_accuracy,
        "pACC": pixel_accuracy,
        **{f"ACC-{name}": value for name, value in zip(class_names, accuracy, strict=True)},
    }
    return {name: 100 * float(value) for name, value in metrics.items()}


class SemanticEvaluator(Evaluator):
    """Metrics over the pixels of a data set; keeps a confusion matrix, and the worst images.

    Args:
        class_names: of the classes ``0..K-1``.
        truth_of: labels of the image of a sample, integers ``[height, width]``.
        ignore_label: truth of the pixels that do not count.
        num_worst: of the images, how many of the worst ones are kept, with their predictions.

    Attributes:
        worst: these images.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        truth_of: Callable[[Sample], Labels],
        ignore_label: int = IGNORE_LABEL,
        num_worst: int = 0,
    ) -> None:
        self._class_names = tuple(class_names)
        self._truth_of = truth_of
        self._ignore_label = ignore_label
        self._num_worst = num_worst
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._counts: Counts = np.zeros((len(self._class_names),) * 2, np.int64)
        self.worst = WorstImages(self._num_worst)

    def process(self, batch: Sequence[Sample], output: SegmenterOutput) -> None:
        """Add the predictions of a batch.

        Args:
            batch: N samples.
            output: scores ``[K, height, width]`` of each; the class with the largest one is the
                prediction.

        Raises:
            DatasetError: the truth of an image has another size or unknown labels.
        """
        for sample, scores in zip(batch, output.sem_seg, strict=True):
            truth, prediction = self._truth_of(sample), predicted_labels(scores)
            confusion = ConfusionMatrix(len(self._class_names), ignore_label=self._ignore_label)
            try:
                confusion.update(prediction, truth)
            except ValueError as error:
                name = sample.get("sem_seg_file_name", sample["file_name"])
                raise DatasetError(f"{name}: {error}") from error
            self._counts += confusion.counts
            if self._num_worst:
                metrics = semantic_metrics(confusion.counts, self._class_names)
                self.worst.add(sample, prediction, metrics["mIoU"], metrics["pACC"])

    def state(self) -> tuple[Counts, list[WorstImage]]:
        """The confusion matrix, int64 ``[K, K]``, true by predicted class, and worst images."""
        return self._counts, self.worst.images

    def merge(self, states: Sequence[tuple[Counts, list[WorstImage]]]) -> None:
        """Continue from the sum of the matrices of all processes, and the worst of all images."""
        self.reset()
        for counts, images in states:
            self._counts += counts
            self.worst.merge(images)

    def evaluate(self) -> dict[str, Any]:
        """``sem_seg``, and ``sem_seg_analysis`` if worst images are kept.

        ``sem_seg`` is that of ``semantic_metrics``. ``sem_seg_analysis`` has ``confusion_matrix``,
        with ``classes`` and ``counts`` of pixels (true class by predicted class), and
        ``worst_images``, the worst first, each with ``image_id``, ``file_name``, ``mIoU`` (of the
        classes in its truth) and ``pACC``.
        """
        results: dict[str, Any] = {"sem_seg": semantic_metrics(self._counts, self._class_names)}
        if self._num_worst:
            results["sem_seg_analysis"] = {
                "confusion_matrix": {
                    "classes": list(self._class_names),
                    "counts": self._counts.tolist(),
                },
                "worst_images": [
                    {
                        "image_id": image.image_id,
                        "file_name": image.file_name,
                        "mIoU": image.mean_iou,
                        "pACC": image.pixel_accuracy,
                    }
                    for image in self.worst.images
                ],
            }
        return results


def predicted_labels(scores: Tensor) -> Labels:
    """Labels int64 ``[H, W]`` of scores ``[K, H, W]``."""
    labels: Labels = scores.argmax(0).cpu().numpy()
    return labels


def _size(labels: Labels) -> str:
    return " x ".join(str(side) for side in labels.shape)
