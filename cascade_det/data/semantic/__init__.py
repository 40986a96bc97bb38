"""Data sets for semantic segmentation: formats, checks, transforms and loaders."""

from cascade_det.data.semantic.dataset import (
    SemanticDataset,
    check_same_semantic_classes,
    load_semantic_dataset,
)
from cascade_det.data.semantic.formats import FORMATS, SemanticSource
from cascade_det.data.semantic.loader import build_semantic_test_loader, build_semantic_train_loader
from cascade_det.data.semantic.reading import SemanticRecord, read_labels
from cascade_det.data.semantic.sources import find_semantic_dataset

__all__ = [
    "FORMATS",
    "SemanticDataset",
    "SemanticRecord",
    "SemanticSource",
    "build_semantic_test_loader",
    "build_semantic_train_loader",
    "check_same_semantic_classes",
    "find_semantic_dataset",
    "load_semantic_dataset",
    "read_labels",
]
