"""Download addresses of torchvision's weights."""

from __future__ import annotations

from torchvision.models import get_model_weights, get_weight, list_models


def torchvision_address(name: str) -> str:
    """The address of weights such as ``ResNet50_Weights.IMAGENET1K_V2``.

    Args:
        name: as in ``torchvision.models.get_weight``. A model's name alone is refused, because its
            default weights may change.

    Returns:
        An https address, usually ending in ``-<first digits of the SHA-256>.pth``.

    Raises:
        ValueError: for unknown weights; the message has the names for this model.
    """
    try:
        return str(get_weight(name).url)
    except (KeyError, ValueError):
        model = name.split(".")[0].removesuffix("_Weights").lower()
        known = [str(w) for m in list_models() if m.lower() == model for w in get_model_weights(m)]
        hint = f"it has {', '.join(known)}" if known else "one is ResNet50_Weights.IMAGENET1K_V2"
        raise ValueError(f"torchvision has no weights named {name!r}; {hint}") from None
