"""Configuration keys: their table, files, checks, and translation to keyword arguments.

The ``*_keys`` modules have one row per key: default, values, unit and help. ``load_config`` reads
YAML and command-line options, ``check_config`` checks keys by themselves and against each other,
and only the ``*_arguments`` functions read keys: everything behind them takes plain values.
"""

from cascade_det.config.backbone_arguments import backbone_arguments, backbone_maps, trunk_maps
from cascade_det.config.checks import (
    check_backbone,
    check_config,
    check_heads,
    check_run,
    check_segmenter,
    check_unread_cascade,
    check_unread_decoder,
)
from cascade_det.config.exit_summary import exit_summary
from cascade_det.config.loading import (
    ConfigFiles,
    History,
    Setting,
    load_config,
    merge_config,
    with_cascade_keys,
)
from cascade_det.config.model_arguments import (
    box_head_arguments,
    box_head_configs,
    cascade_arguments,
    detector_arguments,
    exit_arguments,
    exit_values,
    fast_arguments,
    fast_heads_dtype,
    mask_head_arguments,
    pooler_arguments,
    rpn_arguments,
    training_arguments,
    with_exits,
)
from cascade_det.config.run_arguments import (
    augmentation_arguments,
    datasets_arguments,
    input_arguments,
    optimizer_arguments,
    scheduler_arguments,
    semantic_datasets_arguments,
    semantic_input_arguments,
    semantic_train_loader_arguments,
    shadow_arguments,
    test_loader_arguments,
    train_loader_arguments,
    trainer_arguments,
)
from cascade_det.config.scaling import (
    check_processes,
    scale_to_batch,
    scale_to_epochs,
    scale_to_world_size,
    synchronised_norms,
)
from cascade_det.config.segmenter_arguments import (
    is_segmenter,
    map_exit_arguments,
    segmenter_arguments,
)
from cascade_det.config.segmenter_checks import require_detector, require_one_scale
from cascade_det.config.tree import add_cascade_config, changed, changed_keys, flat, get_cfg

__all__ = [
    "ConfigFiles",
    "History",
    "Setting",
    "add_cascade_config",
    "augmentation_arguments",
    "backbone_arguments",
    "backbone_maps",
    "box_head_arguments",
    "box_head_configs",
    "cascade_arguments",
    "changed",
    "changed_keys",
    "check_backbone",
    "check_config",
    "check_heads",
    "check_processes",
    "check_run",
    "check_segmenter",
    "check_unread_cascade",
    "check_unread_decoder",
    "datasets_arguments",
    "detector_arguments",
    "exit_arguments",
    "exit_summary",
    "exit_values",
    "fast_arguments",
    "fast_heads_dtype",
    "flat",
    "get_cfg",
    "input_arguments",
    "is_segmenter",
    "load_config",
    "map_exit_arguments",
    "mask_head_arguments",
    "merge_config",
    "optimizer_arguments",
    "pooler_arguments",
    "require_detector",
    "require_one_scale",
    "rpn_arguments",
    "scale_to_batch",
    "scale_to_epochs",
    "scale_to_world_size",
    "scheduler_arguments",
    "segmenter_arguments",
    "semantic_datasets_arguments",
    "semantic_input_arguments",
    "semantic_train_loader_arguments",
    "shadow_arguments",
    "synchronised_norms",
    "test_loader_arguments",
    "train_loader_arguments",
    "trainer_arguments",
    "training_arguments",
    "trunk_maps",
    "with_cascade_keys",
    "with_exits",
]
