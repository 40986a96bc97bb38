"""A detector as one object, for those who only use it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, overload

from fvcore.common.config import CfgNode

from cascade_det import config, model_zoo
from cascade_det.config.shipped import SCHEME
from cascade_det.core import Detections
from cascade_det.data.given_images import Image, Images
from cascade_det.errors import ConfigError
from cascade_det.facade import pretrained
from cascade_det.facade.given_data import Data, class_names_of, source_of, with_data
from cascade_det.standalone import Predictor, SlicedPredictor, evaluate, train

_HUB = "hf://"


class CascadeDetector:
    """A detector that is opened by name, detects, is trained further, evaluated and shared.

    It runs in the standalone host. Models of PyTorch are made when they are needed, and freed with
    this object.

    Args:
        cfg: a configuration of a detector, with ``MODEL.WEIGHTS``; it is checked.

    Attributes:
        cfg: the configuration.
        results: of the last ``fit`` with validation data, see ``evaluate``; empty before.

    Raises:
        ConfigError: a key has a wrong value, or the model is no detector.
    """

    def __init__(self, cfg: CfgNode) -> None:
        config.require_detector(cfg)
        config.check_config(cfg)
        self.cfg = cfg
        self.results: dict[str, Any] = {}
        self._predictor: Predictor | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        opts: Sequence[Any] = (),
    ) -> CascadeDetector:
        """Open a detector.

        Only the architecture and settings of inference and training are taken from its
        configuration: its data sets, output folder, device and trackers belong to another machine.
        The device is ``cuda`` where there is one; ``opts`` set another.

        Args:
            name: "hf://owner/name", a repository on the Hugging Face Hub with ``config.yaml`` and
                ``model.safetensors``; nothing else is fetched from it. Or a folder with these, or
                the output folder of a run. Or a file of weights with ``config.yaml`` beside it. Or
                a shipped configuration, such as "COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml" (see
                ``model_zoo.list_configs``): it has the weights of a backbone alone, to be trained
                by ``fit``.
            revision: of a repository: a branch, tag or commit; ``None`` for the newest.
            opts: ``KEY, VALUE`` pairs in one flat sequence, on top of the configuration.

        Raises:
            CheckpointError: there are no weights, or they cannot be read or do not fit.
            ConfigError: the name is unknown, or the configuration cannot be used.
            DownloadError: the repository or a file in it is missing or cannot be reached.
            ImportError: huggingface_hub, the extra ``[hub]``, is not installed.
        """
        text = os.fspath(name)
        if revision is not None and not text.startswith(_HUB):
            raise ConfigError(f"revision is of repositories ({_HUB}owner/name), not of {text}")
        if text in model_zoo.list_configs() or text.startswith(SCHEME):
            cfg = model_zoo.get_config(text)
            return cls(_with_options(pretrained.portable(cfg, cfg.MODEL.WEIGHTS), opts))
        detector = cls(_with_options(_find(text, revision), opts))
        detector.open()
        return detector

    def open(self) -> Predictor:
        """The predictor, with the weights loaded.

        Raises:
            CheckpointError: the weights cannot be read, or are not of a whole detector.
            ConfigError: there are none.
        """
        if self._predictor is None:
            self._predictor = Predictor(self.cfg)
        return self._predictor

    @property
    def class_names(self) -> list[str]:
        """K names, see ``Predictor``."""
        return self.open().class_names

    @property
    def category_ids(self) -> list[int]:
        """K ids of the training data, see ``Predictor``."""
        return self.open().category_ids

    @overload
    def predict(
        self, images: Image, *, slice_size: int | None = None, overlap: float = 0.2
    ) -> Detections: ...

    @overload
    def predict(
        self, images: Images, *, slice_size: int | None = None, overlap: float = 0.2
    ) -> list[Detections]: ...

    def predict(
        self, images: Image | Images, *, slice_size: int | None = None, overlap: float = 0.2
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: one image, or a list or tuple of several; each a uint8 array ``[H, W, 3]`` in
                BGR order, as OpenCV reads it, or the path of a file.
            slice_size: also detect in slices of so many pixels, for small objects in large images,
                see ``SlicedPredictor``; ``None`` for none.
            overlap: of slices, as a share of their size.

        Returns:
            ``Detections`` on the CPU, boxes in pixels of the given image; a list for several.

        Raises:
            DatasetError: a file is missing or not an image.
            ValueError: an image is something else, or an array not uint8 ``[H, W, 3]``; or a slice
                is too small or its overlap not from 0 to below 1.
        """
        if slice_size is None:
            return self.open()(images)
        return SlicedPredictor(self.open(), size=slice_size, overlap=overlap)(images)

    def fit(
        self,
        data: Data,
        *,
        validation: Data | None = None,
        output_dir: str | os.PathLike[str] = "output",
        epochs: float | None = None,
        resume: bool = False,
        opts: Sequence[Any] = (),
    ) -> CascadeDetector:
        """Train on data, from the weights of this detector, as ``cascade-det train`` does.

        Afterwards this object is the trained detector: with the best weights if there is
        validation data, else the last ones. Its number of classes is that of the data; layers that
        depend on it start anew where it changes.

        Args:
            data: a COCO json, YOLO's ``data.yaml``, or a folder of Pascal VOC or LabelMe; or a pair
                of that and the folder of the images, else looked for near it.
            validation: as ``data``, with the same classes: evaluated during the training and at its
                end.
            output_dir: for checkpoints, metrics and reports, as of a run; made if missing.
            epochs: passes over the images; ``None`` for the length that the configuration has.
            resume: continue the training in ``output_dir``.
            opts: ``KEY, VALUE`` pairs, such as ``["SOLVER.BASE_LR", 0.001]``, for this training
                and what is done with its result.

        Returns:
            This object.

        Raises:
            CheckpointError, ConfigError, DatasetError, FloatingPointError: see
                ``cascade_det.standalone.train``.
        """
        source = source_of(data)
        tested = [] if validation is None else [source_of(validation)]
        # The training tells what is wrong with data that have none.
        classes = max(1, len(class_names_of(self.cfg, source)))
        keys: list[Any] = ["MODEL.ROI_HEADS.NUM_CLASSES", classes]
        keys += [] if epochs is None else ["CASCADE.EPOCHS", float(epochs)]
        cfg = _with_options(self.cfg, [*keys, *opts])
        if "SOLVER.MAX_ITER" in opts and cfg.CASCADE.EPOCHS:
            raise ConfigError(
                f"SOLVER.MAX_ITER is given, but CASCADE.EPOCHS is {cfg.CASCADE.EPOCHS:g}, from "
                "which the iterations follow. Give epochs instead, or CASCADE.EPOCHS 0 as well."
            )
        run = with_data(cfg, train=[source], test=tested)
        run = _with_options(run, ["OUTPUT_DIR", os.fspath(output_dir)])
        run = config.scale_to_world_size(run, 1)
        config.check_config(run)
        results = train(run, resume=resume)
        weights = pretrained.weights_of_run(Path(output_dir), evaluated=bool(tested))
        self.cfg = _with_options(cfg, ["MODEL.WEIGHTS", str(weights)])
        self.results, self._predictor = results, None
        return self

    def evaluate(
        self,
        data: Data,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        opts: Sequence[Any] = (),
    ) -> dict[str, Any]:
        """Score the detections on annotated data, as ``cascade-det eval`` does.

        Args:
            data: as of ``fit``, with the classes of this detector.
            output_dir: for ``results.json``, the report and the detections; ``None`` keeps none.
            opts: ``KEY, VALUE`` pairs for this evaluation.

        Returns:
            The metrics: ``["bbox"]["AP"]`` in percent, ``AP50`` and so on; with masks the same
            under ``segm``; ``stages``, ``exits``, ``latency`` and more, see
            ``cascade_det.standalone.evaluate``.

        Raises:
            CheckpointError, ConfigError, DatasetError: see ``cascade_det.standalone.evaluate``.
        """
        cfg = with_data(_with_options(self.cfg, opts), test=[source_of(data)])
        with TemporaryDirectory() as unseen:
            folder = unseen if output_dir is None else os.fspath(output_dir)
            cfg = _with_options(cfg, ["OUTPUT_DIR", folder])
            config.check_config(cfg)
            return evaluate(cfg)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.yaml`` and ``model.safetensors``, which holds the classes too.

        Args:
            folder: made if missing; the two files are replaced.

        Raises:
            CheckpointError: safetensors, of the extra ``[hub]``, is not installed.
        """
        pretrained.write_folder(self.cfg, self.class_names, self.category_ids, Path(folder))

    def push_to_hub(self, name: str, **arguments: Any) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face Hub, with a model card.

        Args:
            name: "owner/name"; the repository is made if it is missing.
            arguments: of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as ``private=True``,
                ``commit_message`` and ``token``.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: ``name`` is not the name of a repository.
            DownloadError: the Hub cannot be reached, or refuses.
            ImportError: huggingface_hub, the extra ``[hub]``, is not installed.
        """
        return str(_hub().push(name.removeprefix(_HUB), self.save_pretrained, arguments))


def _find(text: str, revision: str | None) -> CfgNode:
    """The configuration, with ``MODEL.WEIGHTS``, that a name stands for."""
    if text.startswith(_HUB):
        folder = _hub().download(text.removeprefix(_HUB), revision)
        return pretrained.open_folder(folder, downloaded=True)
    path = Path(text).expanduser()
    if path.is_dir():
        return pretrained.open_folder(path)
    if path.is_file():
        return pretrained.open_file(path)
    raise ConfigError(
        f"{text}: is neither a folder, nor a file of weights, nor the name of a shipped "
        f"configuration (cascade_det.model_zoo.list_configs()). For a repository on the Hugging "
        f"Face Hub write {_HUB}owner/name."
    )


def _with_options(cfg: CfgNode, opts: Sequence[Any]) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    config.merge_config(changed, None, opts)
    return changed


def _hub() -> ModuleType:
    try:
        from cascade_det.facade import hub
    except ImportError as error:
        raise ImportError(
            f"the Hugging Face Hub needs huggingface_hub, which cannot be imported ({error}): "
            "pip install huggingface_hub safetensors, the extra [hub] of cascade_det"
        ) from error
    return hub
