r"""Write a trained detector or segmenter, without exits, into one self-contained file.

cascade-det export --config-file ... --format onnx --output model.onnx \
    --opts MODEL.WEIGHTS output/model_final.pth
cascade-det predict --onnx model.onnx --input photos --output out

A detector has fixed depth; a segmenter its whole decoder, and predict does not run its file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_det.commands.arguments import check_output_file, config_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError, ConfigError

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode

    from cascade_det.onnx_predictor import ExportedModel
    from cascade_det.standalone import Predictor
    from cascade_det.standalone.export import Comparison

ASPECT_RATIO = 1.3  # width by height of the image of random pixels


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__)
    parser.add_argument(
        "--format",
        choices=("onnx", "torch-export"),
        default="onnx",
        help="for onnxruntime (the default) or torch.export.load",
    )
    parser.add_argument(
        "--stages", type=int, metavar="K", help="of a detector: export the first K; all by default"
    )
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument(
        "--image", metavar="FILE", help="to check the file on; random pixels by default"
    )
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status.

    It is 1, and no file is written, if the exported model's answer differs.
    """
    args = _parse(argv, prog)
    from cascade_det import config
    from cascade_det.engine.log import setup_logging

    setup_logging()
    cfg = config.load_config(args.config_file, args.opts)
    config.check_config(cfg)
    output = Path(args.output)
    check_output_file(output, [*args.config_file, args.image, cfg.MODEL.WEIGHTS])
    if config.is_segmenter(cfg):
        _export_segmenter(cfg, args, output)
    else:
        _export_detector(cfg, args, output)
    return 0


def _export_detector(cfg: CfgNode, args: argparse.Namespace, output: Path) -> None:
    from cascade_det.files import atomic_path, remove_leftovers
    from cascade_det.standalone import Predictor, export

    num_stages = export.stages_to_export(cfg, args.format, args.stages)
    _print_what_is_left_out(cfg)
    cfg = _plain(cfg)
    image = _image_to_check(cfg, args.image)
    predictor = Predictor(cfg)
    description = _description(cfg, predictor, num_stages)
    remove_leftovers(output.parent)
    with atomic_path(output) as temporary:
        exporter = export.export_onnx if args.format == "onnx" else export.export_program
        run = exporter(predictor.detector, temporary, description)
        comparison = export.compare(predictor.detector, run, image, num_stages)
        _report(comparison, image)
        if not comparison.same:
            raise CascadeDetError(
                f"{output}: not the same detections as the detector's; nothing is written"
            )
    print(f"{output}: {num_stages} stages, {_megabytes(output)}")


def _export_segmenter(cfg: CfgNode, args: argparse.Namespace, output: Path) -> None:
    from cascade_det.config import require_one_scale
    from cascade_det.files import atomic_path, remove_leftovers
    from cascade_det.standalone import export_segmenter as export
    from cascade_det.standalone.export import check_export
    from cascade_det.standalone.segmenter import SemanticSegmentor
    from cascade_det.standalone.segmenter_predictor import SegmenterPredictor

    if args.stages is not None:
        raise ConfigError("--stages is for detectors: a segmenter is exported with all its levels")
    require_one_scale(cfg)
    check_export(cfg, args.format)
    _print_what_is_left_out(cfg)
    cfg = _plain(cfg)
    image = _image_to_check(cfg, args.image).float()
    predictor = SegmenterPredictor(cfg)
    segmenter, class_names = predictor.segmenter, predictor.class_names
    assert isinstance(segmenter, SemanticSegmentor)
    description = export.SegmenterDescription(class_names, **_input_size(cfg))
    remove_leftovers(output.parent)
    with atomic_path(output) as temporary:
        write = export.export_onnx if args.format == "onnx" else export.export_program
        comparison = export.compare(segmenter, write(segmenter, temporary, description), image)
        height, width = image.shape[1:]
        print(
            f"Checked on an image of {width} x {height}: largest difference "
            f"{comparison.difference:.2g} of logits up to {comparison.largest:.2g}; the same "
            f"class in {comparison.labels:.4%} of the pixels"
        )
        if not comparison.same:
            raise CascadeDetError(
                f"{output}: not the same logits as the segmenter's; nothing is written"
            )
    print(f"{output}: {len(class_names)} classes, {_megabytes(output)}")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def _description(cfg: CfgNode, predictor: Predictor, num_stages: int) -> ExportedModel:
    from cascade_det.onnx_predictor import ExportedModel

    return ExportedModel(
        class_names=predictor.class_names,
        category_ids=predictor.category_ids,
        num_stages=num_stages,
        **_input_size(cfg),
    )


def _input_size(cfg: CfgNode) -> dict[str, Any]:
    """What a description says of images."""
    from cascade_det import config
    from cascade_det.onnx_predictor import LONGEST_SIDE, MOST_PIXELS

    inputs = config.input_arguments(cfg, train=False)
    min_size = inputs["min_sizes"][0]
    return {
        "image_format": inputs["image_format"],
        "min_size": min_size,
        "max_size": min(inputs["max_size"], LONGEST_SIDE, MOST_PIXELS // max(min_size, 1)),
    }


def _plain(cfg: CfgNode) -> CfgNode:
    """The same model on the CPU, without this machine's optimisations."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CASCADE.FAST.ENABLED = False
    cfg.CASCADE.SHADOW_SHARE = 0.0
    cfg.MODEL.CASCADE_DECODER.EXIT.ENABLED = False
    return cfg


def _print_what_is_left_out(cfg: CfgNode) -> None:
    from cascade_det import config

    if cfg.MODEL.CASCADE.EXIT.ENABLED:
        print("Exits are left out: every proposal runs all stages of the file.")
    if config.is_segmenter(cfg) and cfg.MODEL.CASCADE_DECODER.EXIT.ENABLED:
        print("Exits are left out: the file runs the whole decoder.")
    if cfg.MODEL.CASCADE.FAST.ENABLED:
        print("MODEL.CASCADE.FAST is ignored: the file is float32, as the weights are.")


def _image_to_check(cfg: CfgNode, file: str | None) -> torch.Tensor:
    """The file's pixels, or random ones: uint8 ``[3, H, W]``, resized as for the model."""
    import torch

    from cascade_det import config
    from cascade_det.data.transforms import read_image, resize_shortest_edge

    inputs = config.input_arguments(cfg, train=False)
    short_edge, max_size = inputs["min_sizes"][0], inputs["max_size"]
    if file is None:
        short_edge = short_edge or min(max_size, 800)
        size = (3, short_edge, min(round(short_edge * ASPECT_RATIO), max_size))
        return torch.randint(0, 256, size, dtype=torch.uint8)
    pixels = resize_shortest_edge(read_image(file, inputs["image_format"]), short_edge, max_size)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _report(comparison: Comparison, image: torch.Tensor) -> None:
    height, width = image.shape[1:]
    masks = "" if comparison.masks is None else f", {comparison.masks:.2g} in a mask"
    print(
        f"Checked on an image of {width} x {height}: {comparison.num_exported} detections, "
        f"{comparison.num_detections} of the detector itself; largest difference "
        f"{comparison.boxes:.2g} px, {comparison.scores:.2g} in score{masks}"
    )
    if comparison.num_detections == 0:
        print("That says little: give an --image with objects in it.")
