"""Options for the smallest network of every backbone, and what it is made of."""

M0 = (
    *("MODEL.BACKBONE.NAME", "build_efficientvit_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.EFFICIENTVIT.NAME", "m0", "MODEL.EFFICIENTVIT.NORM_EVAL", False),
)
HIERVIT = (
    *("MODEL.BACKBONE.NAME", "build_hiervit_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.HIERVIT.WIDTHS", (32, 32, 32), "MODEL.HIERVIT.DEPTHS", (1, 1, 1)),
    *("MODEL.HIERVIT.DROP_PATH", 0.0, "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]),
)
P3_TO_P7 = (
    *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
)
STAGES = ("MODEL.FPN.IN_FEATURES", ["res4", "res5", "res6"])
# Attention in the backbone; without drop path, and with norms that learn their statistics.
ATTENTION = {
    "efficientvit": (*M0, *P3_TO_P7, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5", "res6"]),
    "efficientvit_retinanet": (*(*M0, *P3_TO_P7, *STAGES, "MODEL.EFFICIENTVIT.NECK", "retinanet"),),
    "efficientvit_maskrcnn": (*M0, *STAGES, "MODEL.EFFICIENTVIT.NECK", "maskrcnn"),
    "hatnet": (
        *("MODEL.BACKBONE.NAME", "build_hatnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.HATNET.DROP_PATH", 0.0),
    ),
    "hiervit": HIERVIT,
    "hiervit_groups": (*HIERVIT, "MODEL.HIERVIT.MIXER", "token_groups"),
}
