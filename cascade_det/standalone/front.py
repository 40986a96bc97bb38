"""What a detector computes before the first result whose size depends on values."""

from __future__ import annotations

from torch import Tensor, nn

from cascade_det.standalone.rpn import RPN, Candidates

# Sides of a batch are multiples of it where a recording of the front is made for each size. COCO at
# 800 to 1333 pixels then has 27 sizes in place of 49, and 4 % more pixels; 128 gives 15 and 18 %.
SIZE_STEP = 64


class Front(nn.Module):
    """Trunk, pyramid, and the RPN up to its best anchors, in one call.

    All shapes follow from that of the images, so that a GPU can run a recording of it, in which
    hundreds of operations are sent as one. NMS comes after it.

    Args:
        backbone: a batch of images to feature maps by name.
        rpn: takes some of these maps.
    """

    def __init__(self, backbone: nn.Module, rpn: RPN) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Candidates]:
        """Feature maps and candidates of images ``[N, 3, H, W]``."""
        maps: dict[str, Tensor] = self.backbone(images)
        return maps, self.rpn.candidates(maps)
