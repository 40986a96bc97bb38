"""Convolutions with norms, under Detectron2's names, for all parts of a detector.

``folding`` and ``winograd`` make them faster for inference, ``training_conv`` for training.
"""
