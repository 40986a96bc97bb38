"""Default values of ``SOLVER``, as in Detectron2. One iteration is one step of the optimizer."""

from __future__ import annotations

from typing import Any

SOLVER: dict[str, Any] = {
    # "WarmupMultiStepLR", "WarmupCosineLR" or "WarmupStepWithFixedGammaLR"
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "MAX_ITER": 40000,  # length of the training, iterations, >= 1
    "BASE_LR": 0.001,  # learning rate after warm-up, > 0, for the whole batch of IMS_PER_BATCH
    "BASE_LR_END": 0.0,  # where the cosine schedule ends, in [0, BASE_LR]
    "MOMENTUM": 0.9,  # of SGD, in [0, 1)
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,  # >= 0
    "WEIGHT_DECAY_NORM": 0.0,  # the same for scale and shift of normalisation layers, >= 0
    "GAMMA": 0.1,  # factor of each decay, in (0, 1]
    "STEPS": (30000,),  # the iterations at which the rate decays, increasing
    "NUM_DECAYS": 3,  # of the fixed-gamma schedule, evenly spaced, >= 1
    "WARMUP_FACTOR": 1.0 / 1000,  # the rate starts at BASE_LR times this, in [0, 1]
    "WARMUP_ITERS": 1000,  # iterations, >= 0
    "WARMUP_METHOD": "linear",  # "linear" or "constant"
    "RESCALE_INTERVAL": False,  # squeeze the schedule into what remains after warm-up
    "CHECKPOINT_PERIOD": 5000,  # iterations, >= 1
    "IMS_PER_BATCH": 16,  # images per iteration over all processes, >= 1
    "REFERENCE_WORLD_SIZE": 0,  # process count to scale batch and rate from; 0 = no scaling
    "BIAS_LR_FACTOR": 1.0,  # the biases' learning rate as a multiple of BASE_LR, > 0
    "WEIGHT_DECAY_BIAS": None,  # float >= 0, or None = WEIGHT_DECAY
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",  # "value" clips each element, "norm" the norm of each parameter
        "CLIP_VALUE": 1.0,  # > 0
        "NORM_TYPE": 2.0,  # p of the p-norm, > 0; .inf is the largest element
    },
    "AMP": {"ENABLED": False},  # mixed precision in training; see CASCADE.AMP_DTYPE
}
