"""The cascade with early exits as ROI heads of Detectron2."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from cascade_det import config
from cascade_det.core import (
    CascadeHead,
    CascadeInputs,
    CascadeStats,
    ExitPolicy,
    FastCopies,
    MaskBranch,
    MaskRules,
    TrainingSchedule,
    build_exits,
    build_training_schedule,
)
from cascade_det.core.structures import part
from cascade_det.d2.box_heads import build_box_heads, num_features
from cascade_det.d2.config_checks import check_mask_heads, refuse_tile_head
from cascade_det.d2.heads_call import current_call
from cascade_det.d2.heads_log import log_exit_rates, log_metrics
from cascade_det.d2.mask_heads import add_masks, mask_branch, with_stage_heads
from cascade_det.d2.parts import (
    DynamicMatcher,
    check_not_overridden,
    check_predictor,
    common_value,
    foreground_threshold,
    refuse_classifier_names,
    to_roi_pooler,
)
from cascade_det.d2.structures import (
    number_objects,
    objectness_logits,
    to_ground_truth,
    to_instances,
    to_labelled_regions,
)
from cascade_det.d2.tile_gate import NOT_OPTIMISED, warn_of_whole_map
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.devices import resolve_fast_dtype
from cascade_det.layers.int8 import Grid
from cascade_det.layers.tiles import FeatureMap, as_tensor, whole_maps

Losses = dict[str, Tensor]

_COMPUTED_BY_THE_CORE = ("_run_stage", "_match_and_label_boxes", "_create_proposals_from_boxes")


@ROI_HEADS_REGISTRY.register()
class EarlyExitCascadeROIHeads(CascadeROIHeads):
    """Detectron2's cascade of box heads with early exits.

    Replaces :class:`CascadeROIHeads` with the same arguments and the same weights. Without
    ``exits`` and with ``pooler_kernel="torchvision"``, losses and detections are equal to the last
    bit. Mask and keypoint heads are Detectron2's own and run on the boxes of the cascade, unless
    ``mask_head`` is :class:`~cascade_det.d2.mask_heads.StageMaskHeads`, one for every stage.
    Detections have one more field, ``exit_stages``: int64 ``[D]``, the last stage (from 0) of
    each region. ``GeneralizedRCNNWithTTA`` builds new ``Instances`` without it. Under
    ``torch.jit.trace`` every region runs through every stage.

    Subclasses must not override ``_run_stage``, ``_match_and_label_boxes`` and
    ``_create_proposals_from_boxes``, which the cascade replaces. They may override
    ``_init_box_head``, ``_init_mask_head``, ``_init_keypoint_head``, ``label_and_sample_proposals``
    and ``forward``, and use any box heads.

    Args:
        box_in_features: names of the feature maps to pool, finest first.
        box_pooler: of type ``ROIAlign`` or ``ROIAlignV2``. It stays as ``self.box_pooler``; the
            cascade pools with an equivalent ``RoIPooler``.
        box_heads: S modules, ``[R, C, P, P]`` to ``[R, F]``.
        box_predictors: S ``FastRCNNOutputLayers``. The cascade takes delta weights, loss types and
            inference thresholds from them.
        proposal_matchers: S matchers with one threshold each; background below it.
        stage_loss_weights: S factors of the stages' losses; ``None`` for 1.
        ensemble: how the stages' scores become one, see ``MODEL.CASCADE.ENSEMBLE``.
        pooler_kernel: see ``MODEL.CASCADE.POOLER_KERNEL``.
        suppression: what overlapping detections go through, see ``MODEL.CASCADE.SUPPRESSION``.
        suppression_sigma: see ``MODEL.CASCADE.SUPPRESSION_SIGMA``.
        exits: the exit policy of inference; ``None`` for no exits.
        mask_rules: which detections get a mask; the ``pred_masks`` of others are 0. ``None`` for
            all. Masks for given boxes have no rules, nor do traced ones.
        regime: the training schedule; ``None`` for the plain sum of the stages' losses.
        fast_dtype: run inference on optimised copies of box and mask heads in this type, see
            ``MODEL.CASCADE.FAST.DTYPE``; ``None`` for no copies.
        kwargs: further arguments of :class:`CascadeROIHeads`.

    Attributes:
        cascade: runs the box heads. Not a submodule: it shares the parts of this module.
        stats: how many regions entered and left each stage in the last inference. With several
            threads, each has its own in :class:`~cascade_det.d2.heads_call.HeadsCall`.
        whole_map_reason: why tiles that the exits ask for are not computed; ``None`` once told.

    Raises:
        ValueError: the cascade cannot replace one of the parts.
        ConfigError: a wrong value, see :func:`cascade_det.config.check_heads`, or an unknown name.
    """

    proposal_matcher: Matcher
    whole_map_reason: str | None = NOT_OPTIMISED

    @configurable
    def __init__(
        self,
        *,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        proposal_matchers: Sequence[Matcher],
        stage_loss_weights: Sequence[float] | None = None,
        ensemble: str = "mean_probs",
        pooler_kernel: str = "auto",
        suppression: str = "nms",
        suppression_sigma: float = 0.5,
        exits: ExitPolicy | None = None,
        mask_rules: MaskRules | None = None,
        regime: TrainingSchedule | None = None,
        fast_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_heads=box_heads,
            box_predictors=box_predictors,
            proposal_matchers=proposal_matchers,
            **kwargs,
        )
        check_not_overridden(type(self), CascadeROIHeads, _COMPUTED_BY_THE_CORE)
        cascade = CascadeHead(
            pooler=to_roi_pooler(box_pooler, pooler_kernel),
            box_heads=box_heads,
            box_predictors=box_predictors,
            stage_loss_weights=stage_loss_weights,
            ensemble=ensemble,
            suppression=suppression,
            suppression_sigma=suppression_sigma,
            exits=exits,
            regime=regime,
            **self._rules(),
        )
        self.exits = exits
        self.mask_rules = mask_rules or MaskRules()
        self.regime = cascade.regime
        if self.regime.dynamic is not None:
            self.proposal_matcher = DynamicMatcher(self.proposal_matcher, self.regime)
        # Not by nn.Module.__setattr__, which would register every parameter under a second name.
        self.__dict__["cascade"] = cascade
        self.__dict__["_pooler"] = box_pooler
        self._fast_dtype = fast_dtype
        self._fast_copies: FastCopies | None = None
        self._fast_grids: Sequence[Grid] = ()
        self.cascade: CascadeHead
        self.stats: CascadeStats | None = None
        self.follow_predictors()
        # Here as well, since the trunk may be of any kind.
        self.register_load_state_dict_post_hook(refuse_classifier_names)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a configuration; missing keys of ours get their defaults."""
        cfg = config.with_cascade_keys(cfg)
        config.check_heads(cfg)
        arguments, parts = config.cascade_arguments(cfg), super().from_config(cfg, input_shape)
        masks, of_rpn = config.mask_head_arguments(cfg), config.rpn_channels(cfg)
        widths = [num_features(head.output_shape) for head in parts["box_heads"]]
        channels = common_value(input_shape[name].channels for name in parts["box_in_features"])
        return {
            **parts,
            "stage_loss_weights": arguments["stage_loss_weights"],
            "ensemble": arguments["ensemble"],
            "pooler_kernel": cfg.MODEL.CASCADE.POOLER_KERNEL,
            "suppression": arguments["suppression"],
            "suppression_sigma": arguments["suppression_sigma"],
            "exits": build_exits(config.exit_arguments(cfg), widths, channels, of_rpn),
            "mask_rules": None if masks is None else MaskRules(**masks["rules"]),
            "regime": build_training_schedule(**config.training_arguments(cfg)),
            "fast_dtype": config.fast_heads_dtype(cfg),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return build_box_heads(cfg, input_shape)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if cfg.MODEL.MASK_ON:
            check_mask_heads(cfg)
            cfg = with_stage_heads(cfg)
        parts: dict[str, Any] = super()._init_mask_head(cfg, input_shape)
        return parts

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], Losses]:
        """As in Detectron2; training adds the losses of learned exits, or has only these."""
        if not self.training:
            with current_call().within():
                return super().forward(images, features, proposals, targets)
        assert targets is not None
        if self._has_stage_masks:
            targets = number_objects(targets)
        if self.exits is None or self.exits.learned is None:
            return super().forward(images, features, proposals, targets)
        refuse_tile_head(self.exits.learned.names)
        sampled, losses = proposals, {}
        if not self.regime.exits_alone:
            sampled, losses = super().forward(images, features, proposals, targets)
        self.follow_predictors()
        inputs = self.cascade_inputs(features, proposals)
        objects = [x.gt_boxes.tensor for x in targets], [x.gt_classes.long() for x in targets]
        return sampled, {**losses, **self.cascade.exit_losses(inputs, *objects)}

    def cascade_inputs(
        self, features: Mapping[str, FeatureMap], proposals: list[Instances]
    ) -> CascadeInputs:
        """Inputs of the cascade from the backbone's maps and the proposals of each image."""
        return CascadeInputs(
            [features[name] for name in self.box_in_features],
            [x.proposal_boxes.tensor for x in proposals],
            [x.image_size for x in proposals],
            objectness_logits(proposals),
        )

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Losses | list[Instances]:
        """Losses of sampled proposals in training, detections otherwise."""
        self.follow_predictors()
        inputs = self.cascade_inputs(features, proposals)
        if self.training:
            assert targets is not None
            return self._losses(inputs, proposals, targets)
        warn_of_whole_map(self, inputs.features[0])
        if torch.jit.is_tracing() and self.exits is not None:
            warnings.warn("A traced cascade has no exits: it runs every stage.", stacklevel=2)
        call = current_call()
        detections, stats = self.cascade.detect(
            **vars(inputs), timer=call.timer, started=call.started
        )
        self.stats = call.stats = stats
        log_exit_rates(stats)
        found = [to_instances(*pair) for pair in zip(detections, inputs.image_sizes, strict=True)]
        if self.cascade.masks is not None:
            call.masked = found
        return found

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add masks and keypoints to detections; masks that the cascade made stay."""
        has_any = self.mask_on or self.keypoint_on
        with part(current_call().timer if has_any else None, "masks"):
            return super().forward_with_given_boxes(features, instances)

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> Losses | list[Instances]:
        """In training only the loss of Detectron2's head: heads of stages are in the cascade."""
        call = current_call()
        if self._has_stage_masks:
            if self.training:
                return {}
            if instances is not call.masked:
                # Given boxes, or detections of a trace.
                branch, maps = self._masks(), [features[name] for name in self.box_in_features]
                assert branch is not None
                add_masks(instances, branch, self.cascade.pooler.prepare(maps))
            return instances
        if not self.training and instances is call.masked:
            return instances
        if self.mask_on:
            features = whole_maps(features)
        result: Losses | list[Instances] = super()._forward_mask(features, instances)
        if self.mask_on and call.stats is not None:
            call.stats.detected = call.stats.masks = sum(map(len, instances))
        return result

    @property
    def _has_stage_masks(self) -> bool:
        return self.mask_on and isinstance(self.mask_head, nn.ModuleList)

    def follow_predictors(self) -> None:
        """Pass on to the cascade the parts and settings that a user replaced on this module.

        Raises:
            ValueError: the cascade cannot replace one of the parts.
        """
        cascade, rules, last = self.cascade, self._rules(), self.box_predictor[-1]
        copies = self._copies()
        cascade.box_head = self.box_head if copies is None else copies.get(self.box_head)
        cascade.box_predictor = self.box_predictor
        cascade.exits, cascade.regime = self.exits, self.regime
        cascade.set_masks(None if torch.jit.is_tracing() else self._masks())
        if self.box_pooler is not self.__dict__["_pooler"]:
            cascade.pooler = to_roi_pooler(self.box_pooler, cascade.pooler.kernel)
            self.__dict__["_pooler"] = self.box_pooler
        cascade.targets = replace(cascade.targets, **rules)
        cascade.num_classes = rules["num_classes"]
        cascade.selection = replace(
            cascade.selection,
            score_thresh=last.test_score_thresh,
            nms_thresh=last.test_nms_thresh,
            detections_per_image=last.test_topk_per_image,
        )

    def use_fast_copies(self, dtype: str | None, grids: Sequence[Grid] = ()) -> None:
        """Change ``fast_dtype``; ``grids`` see ``cascade_det.core.fast_heads.fast_box_heads``."""
        self._fast_dtype, self._fast_copies, self._fast_grids = dtype, None, grids

    def _masks(self) -> MaskBranch | None:
        """The mask heads as the cascade runs them; ``None`` without, or for Detectron2 to run."""
        overridden = type(self)._forward_mask is not EarlyExitCascadeROIHeads._forward_mask
        if not self.mask_on or (overridden and not self._has_stage_masks):
            return None
        branch = mask_branch(
            self.mask_head,
            self.mask_pooler,
            same_maps=list(self.mask_in_features) == list(self.box_in_features),
            num_stages=self.num_cascade_stages,
            kernel=self.cascade.pooler.kernel,
            rules=self.mask_rules,
        )
        copies = self._copies()
        if branch is None or copies is None:
            return branch
        return branch.with_heads(copies.get_masks(branch.heads))

    def _copies(self) -> FastCopies | None:
        """Fast copies of the heads for inference if ``fast_dtype`` is set."""
        if self.training:
            self._fast_copies = None  # of weights that are about to change
        if self._fast_dtype is None or self.training or torch.jit.is_tracing():
            return None
        device = next(self.box_head.parameters()).device
        copies = self._fast_copies
        if copies is None or copies.device != device:
            dtype = resolve_fast_dtype(self._fast_dtype, device)
            copies = self._fast_copies = FastCopies(
                pooled_size=self.box_pooler.output_size[0],
                dtype=dtype,
                device=device,
                grids=self._fast_grids,
            )
            if device.type == "cpu":
                keep_freed_memory()
        return copies

    def _rules(self) -> dict[str, Any]:
        """Settings of the predictors and matchers as arguments of the cascade."""
        predictors = self.box_predictor
        for predictor in predictors:
            check_predictor(predictor)
        return {
            "num_classes": self.num_classes,
            "ious": tuple(foreground_threshold(matcher) for matcher in self.proposal_matchers),
            "bbox_reg_weights": tuple(tuple(p.box2box_transform.weights) for p in predictors),
            "box_reg_loss_type": common_value(p.box_reg_loss_type for p in predictors),
            "smooth_l1_beta": common_value(p.smooth_l1_beta for p in predictors),
        }

    def _losses(
        self, inputs: CascadeInputs, proposals: list[Instances], targets: list[Instances]
    ) -> Losses:
        losses = self.cascade.losses_of_regions(
            [as_tensor(x) for x in inputs.features],
            to_labelled_regions(proposals),
            to_ground_truth(targets, masks=self._has_stage_masks),
            inputs.image_sizes,
        )
        log_metrics(self.cascade.metrics)
        for stage, predictor in enumerate(self.box_predictor):
            for name in ("loss_cls", "loss_box_reg"):
                weight = predictor.loss_weight.get(name, 1.0)
                losses[f"{name}_stage{stage}"] = losses[f"{name}_stage{stage}"] * weight
        return losses
