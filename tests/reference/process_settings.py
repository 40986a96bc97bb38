"""What PyTorch computes float32 in, and how cuDNN chooses: settings of the whole process."""

import torch


def process_settings():
    """The settings by name; reading them changes none."""
    return {
        "products": torch.get_float32_matmul_precision(),
        "products on GPUs": torch.backends.cuda.matmul.allow_tf32,
        "float16 sums": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bfloat16 sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn": torch.backends.cudnn.enabled,
        "timed algorithms": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cuda"),
        "type": torch.get_default_dtype(),
    }
