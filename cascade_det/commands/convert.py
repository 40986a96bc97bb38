r"""Convert a data set: from COCO, YOLO, Pascal VOC or LabelMe to these, and to Label Studio.

cascade-det convert train.json --images photos/ --to yolo --output cells
cascade-det convert cells/data.yaml --images cells/images/train --to coco --output train.json
cascade-det convert VOC2007/ImageSets/Main/train.txt --to coco --output train.json
cascade-det convert labelme/ --to coco --output train.json
cascade-det convert val.json --to label-studio --predictions coco_instances_results.json \
  --output tasks.json

What is given decides how it is read: a .yaml is YOLO's data.yaml, whose labels/ lie beside images/
or the yaml, and so are obj.names and classes.txt, a name a line; a folder of xml files or a list in
ImageSets/ is Pascal VOC; a folder of json files is LabelMe; any other file is a COCO json. Images
stay where they are. What the new format cannot hold is listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_det.commands.arguments import check_output_file, command_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.data.image_names import LINK_RULES, LinkRule
from cascade_det.text import printable

if TYPE_CHECKING:
    from cascade_det.data.coco import CocoDataset
    from cascade_det.data.issues import Issues

FORMATS = ("coco", "yolo", "voc", "labelme", "label-studio")
_FILES = ("coco", "label-studio")  # formats of one file; the others are folders
BAD_DATA_OPTION, LINKS_OPTION = "--on-bad-data", "--follow-links"
# Label Studio's address of files below its LOCAL_FILES_DOCUMENT_ROOT.
IMAGE_URL = "/data/local-files/?d="


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    parser.add_argument("annotations", help="a json, a yaml, a folder or a list: see above")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="of the annotations, and checks the images of a COCO json as well (by default images/ "
        "or JPEGImages/ beside annotations of YOLO or Pascal VOC, or else their own folder)",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the new format")
    parser.add_argument(
        "--output",
        required=True,
        help="a json for coco and label-studio, a new folder for the others",
    )
    parser.add_argument(
        "--predictions",
        metavar="JSON",
        help="with label-studio: write these instead of the objects, as pre-annotations; in COCO's "
        "result format, or predictions.json of predict",
    )
    parser.add_argument(
        "--image-url",
        default=IMAGE_URL,
        metavar="PREFIX",
        help=f"with label-studio: what precedes the names of images there ({IMAGE_URL})",
    )
    parser.add_argument(
        BAD_DATA_OPTION,
        choices=("error", "skip"),
        default="error",
        help="what to do about bad annotations and images, as CASCADE.ON_BAD_DATA",
    )
    parser.add_argument(
        LINKS_OPTION,
        choices=LINK_RULES,
        default=LINK_RULES[0],
        help="which links out of the folders of images and labels to follow, as "
        "CASCADE.FOLLOW_LINKS",
    )
    args = parser.parse_args(argv)
    if args.predictions and args.to != "label-studio":
        parser.error("--predictions needs --to label-studio")
    return args


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.data.catalog import dataset_of_files, is_label_files
    from cascade_det.data.coco import load_dataset
    from cascade_det.data.issues import Issues
    from cascade_det.engine.log import setup_logging

    setup_logging()
    source = dataset_of_files(args.annotations, args.images)
    if args.to in _FILES:
        check_output_file(Path(args.output), [args.annotations, args.predictions])
    dataset = load_dataset(
        source,
        args.on_bad_data,
        masks="keep",
        keep_ground_truth=True,
        # Only a COCO json says how large its images are, so they need not be here.
        check_images=bool(args.images) or is_label_files(source.json_file),
        option=BAD_DATA_OPTION,
        links=LinkRule(args.follow_links, LINKS_OPTION),
    )
    dropped = Issues()
    _write(args, dataset, dropped)
    content = dataset.ground_truth
    counts = f"{len(content['images']):,} images, {len(content.get('annotations', ())):,} objects"
    print(printable(f"{args.output}: {counts}, {len(dataset.class_names)} classes"))
    if dropped:
        print(printable(f"not as they were:\n{dropped}", lines=True))
    return 0


def _write(args: argparse.Namespace, dataset: CocoDataset, dropped: Issues) -> None:
    from cascade_det.data.label_studio import label_studio_tasks
    from cascade_det.data.labelme import write_labelme
    from cascade_det.data.voc import write_voc
    from cascade_det.data.yolo import write_yolo
    from cascade_det.files import atomic_folder, write_json

    content, root = dataset.ground_truth, dataset.source.image_root
    if args.to == "coco":
        write_json(content, args.output)
    elif args.to == "label-studio":
        predictions = _predictions(args.predictions, dataset)
        tasks = label_studio_tasks(content, root, args.image_url, dropped, predictions)
        write_json(tasks, args.output, indent=1)
    else:
        write = {"yolo": write_yolo, "voc": write_voc, "labelme": write_labelme}[args.to]
        # A folder with labels is never replaced: they may be edited by hand.
        with atomic_folder(args.output, made=()) as folder:
            write(content, root, folder, dropped)


def _predictions(file: str | None, dataset: CocoDataset) -> list[dict[str, Any]] | None:
    """The checked predictions on the images that are not left out."""
    from cascade_det.commands.prediction_scores import check_predictions
    from cascade_det.data.annotation_file import read_json

    if file is None:
        return None
    predictions, notes = check_predictions(Path(file), read_json(Path(file)), dataset)
    for note in notes:
        print(printable(note))
    return predictions
