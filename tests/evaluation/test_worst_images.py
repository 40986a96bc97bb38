"""The worst images of a segmenter against a count of all, and over processes."""

import pickle

import numpy as np
import torch

from cascade_det.evaluation.semantic import SemanticEvaluator
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats

NAMES = ["sky", "road", "car"]
MOST = 4


def evaluator():
    return SemanticEvaluator(
        class_names=NAMES, truth_of=lambda sample: sample["truth"], num_worst=MOST
    )


def random_images(count=12):
    generator = np.random.default_rng(0)
    for number in range(count):
        truth = generator.integers(0, 3, (6, 5))
        truth[generator.random((6, 5)) < 0.2] = 255
        if number == 5:
            truth[:] = 255
        scores = np.eye(3)[np.minimum(truth, 2)].transpose(2, 0, 1)
        scores += generator.uniform(0, 1.5) * generator.standard_normal((3, 6, 5))
        sample = {"image_id": number, "file_name": f"{number}.png", "truth": truth}
        yield sample, torch.from_numpy(scores)


def process(one, sample, scores):
    one.process([sample], SegmenterOutput([scores], SegmenterStats()))


def mean_iou(prediction, truth):
    """Of the classes in the truth."""
    counted = truth != 255
    shares = []
    for label in set(truth[counted].tolist()):
        both = ((prediction == label) & (truth == label)).sum()
        either = (((prediction == label) & counted) | (truth == label)).sum()
        shares.append(100 * both / either)
    return np.mean(shares)


def test_the_worst_are_those_of_a_count_with_their_predictions():
    images, whole = list(random_images()), evaluator()
    expected = []
    for sample, scores in images:
        process(whole, sample, scores)
        if (sample["truth"] != 255).any():
            labels = scores.argmax(0).numpy()
            expected.append((mean_iou(labels, sample["truth"]), sample["image_id"], labels))
    expected = sorted(expected, key=lambda entry: entry[0])[:MOST]
    analysis = whole.evaluate()["sem_seg_analysis"]
    found = analysis["worst_images"]
    assert [image["image_id"] for image in found] == [number for _, number, _ in expected]
    np.testing.assert_allclose(
        [image["mIoU"] for image in found], [share for share, _, _ in expected]
    )
    for image, (_, _, labels) in zip(whole.worst.images, expected, strict=True):
        np.testing.assert_array_equal(image.prediction, labels)
    assert analysis["confusion_matrix"]["classes"] == NAMES
    counted = sum((sample["truth"] != 255).sum() for sample, _ in images)
    assert np.sum(analysis["confusion_matrix"]["counts"]) == counted


def test_processes_together_find_the_same():
    whole, *shares = (evaluator() for _ in range(4))  # the last process sees nothing
    for number, (sample, scores) in enumerate(random_images()):
        process(whole, sample, scores)
        process(shares[number % 2], sample, scores)
    shares[0].merge([pickle.loads(pickle.dumps(share.state())) for share in shares])
    assert shares[0].evaluate() == whole.evaluate()
    assert shares[0].worst.images == whole.worst.images
