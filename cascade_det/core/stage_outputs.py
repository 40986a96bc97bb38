"""The detections of each stage of the full cascade, for AP per stage."""

from __future__ import annotations

from collections.abc import Sequence

from cascade_det.core.exits import ExitPolicy
from cascade_det.core.mask_branch import MaskBranch
from cascade_det.core.postprocess import Selection, select_detections
from cascade_det.core.regions import Regions
from cascade_det.core.stage_network import StageNetwork
from cascade_det.core.structures import PartTimer, StageOutput, part


def stage_outputs(
    network: StageNetwork,
    regions: Regions,
    counts: Sequence[int],
    *,
    num_stages: int,
    selection: Selection,
    exits: ExitPolicy | None,
    masks: MaskBranch | None,
    timer: PartTimer | None,
) -> list[StageOutput]:
    """Run every stage on every region, and select the detections of each stage.

    Args:
        network: the stages on a batch of N images.
        regions: the proposals, image by image.
        counts: N numbers of proposals.
        num_stages: S.
        selection: of the detections.
        exits: calibrate the scores; no region leaves. ``None`` for no calibration.
        masks: detections get masks if every stage has a mask head.
        timer: takes the milliseconds of ``full/stage<s>`` and ``full/masks<s>`` if given.
    """
    outputs = []
    for stage in range(num_stages):
        before = regions.boxes
        with part(timer, f"full/stage{stage}"):
            result = network.run_stage(regions, stage)
        regions = result.regions
        probs = network.final_probs(result, stage)  # [R, K + 1]
        if exits is not None:
            # To be comparable with the scores of ``detect``.
            probs = exits.calibrated(probs, stage)
        detections = select_detections([result.reported(probs, stage)], len(counts), selection)
        if masks is not None and masks.per_stage:
            with part(timer, f"full/masks{stage}"):
                detections, _ = masks.add(detections, network.pyramid, stages=stage + 1)
        after = regions.boxes.split(counts)
        outputs.append(StageOutput(detections, list(before.split(counts)), list(after)))
    return outputs
