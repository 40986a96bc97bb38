"""The host without Detectron2: detector, training, evaluation and prediction on torchvision."""

from cascade_det.standalone.augmented import AugmentedDetector
from cascade_det.standalone.build import build_detector
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import evaluate
from cascade_det.standalone.optimize import optimize, optimize_segmenter
from cascade_det.standalone.predictor import Predictor
from cascade_det.standalone.segmenter_predictor import SegmenterPredictor
from cascade_det.standalone.slices import SlicedPredictor
from cascade_det.standalone.tile_predictor import TilePredictor
from cascade_det.standalone.train import replay_batch, train

__all__ = [
    "AugmentedDetector",
    "Detector",
    "Predictor",
    "SegmenterPredictor",
    "SlicedPredictor",
    "TilePredictor",
    "build_detector",
    "evaluate",
    "optimize",
    "optimize_segmenter",
    "replay_batch",
    "train",
]
