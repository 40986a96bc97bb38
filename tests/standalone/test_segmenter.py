"""A segmenter: its laws, and what is refused."""

import pytest
import torch
from small_segmenter import LEVELS, SEGMENTER, labelled
from torch.nn import functional as F

from cascade_det.config import check_config, get_cfg
from cascade_det.config.tree import changed
from cascade_det.errors import ConfigError
from cascade_det.standalone.build_segmenter import build_segmenter

TRUNKS = ("resnet", "mobilenet_v2", "mobilenet_v3_large", "efficientvit", "hatnet", "pvtv2")


def build(*options):
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, *options])
    torch.manual_seed(0)
    return build_segmenter(cfg)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_learns_in_all_its_parts(trunk):
    if trunk == "pvtv2":
        pytest.importorskip("timm")
    name = f"build_{trunk}_backbone"
    segmenter = build("MODEL.BACKBONE.NAME", name, "MODEL.PVTV2.NAME", "b0").train()
    losses = segmenter.losses([labelled(75, 90), labelled(64, 101)])
    assert losses.keys() == {"loss_sem_seg"}
    losses["loss_sem_seg"].backward()
    unused = [name for name, p in segmenter.named_parameters() if p.grad is None]
    assert unused == []


def test_pyramids_are_decoded_too():
    segmenter = build(
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", LEVELS),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4", "p5"]),
    )
    (found,) = segmenter.segment([labelled(40, 70)]).sem_seg
    assert found.shape == (3, 40, 70)
    assert not segmenter.backbone.fpn_output2.weight.requires_grad  # that map is not read


def test_scores_have_the_size_of_the_file():
    """Bilinear, of the part that is not padding."""
    segmenter = build()
    small = labelled(50, 61)
    large = {**small, "height": 100, "width": 305}
    (own,), (resized,) = (segmenter.segment([one]).sem_seg for one in (small, large))
    expected = F.interpolate(own[None], (100, 305), mode="bilinear")[0]
    torch.testing.assert_close(resized, expected)


def test_a_batch_of_one_size_is_its_images_one_by_one():
    segmenter = build()
    batch = [labelled(64, 75), labelled(64, 75)]
    together = segmenter.segment(batch).sem_seg
    alone = [segmenter.segment([one]).sem_seg[0] for one in batch]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_the_sum_of_all_levels_is_the_prediction():
    segmenter = build().eval()
    one = labelled(64, 96)
    with torch.no_grad():
        images, _ = segmenter.preprocess([one])
        maps = segmenter.backbone(images)
        decoded = segmenter.sem_seg_head.decoder([maps[name] for name in LEVELS[::-1]])
        expected = sum(
            F.interpolate(head(x), (64, 96), mode="bilinear")
            for head, x in zip(segmenter.sem_seg_head.heads, decoded, strict=True)
        )
    torch.testing.assert_close(segmenter.segment([one]).sem_seg[0], expected[0])


EXIT = "MODEL.CASCADE_DECODER.EXIT"


@pytest.mark.parametrize("kind", ["image", "patch"])
def test_exits_leave_earlier_levels_as_the_answer(kind):
    """Below every confidence all leave after level 0, above it none does."""
    options = f"{EXIT}.ENABLED", True, f"{EXIT}.KIND", kind, f"{EXIT}.THRESHOLDS"
    one = labelled(64, 96)
    found = build(*options, [1e-6]).segment([one], levels=True)
    # Not equal: by exits, logits are resized once, and not from each level.
    assert (found.sem_seg[0].argmax(0) == found.levels[0][0]).float().mean() > 0.95
    assert [sum(left.values()) > 0 for left in found.stats.left] == [True, False, False, False]
    found = build(*options, [1.1]).segment([one], levels=True)
    assert (found.sem_seg[0].argmax(0) == found.levels[-1][0]).float().mean() > 0.95
    assert found.stats.left[:3] == [{"confident": 0}] * 3


def test_levels_are_the_decoder_cut_off():
    segmenter = build().eval()
    one = labelled(64, 96)
    found = segmenter.segment([one], levels=True)
    with torch.no_grad():
        images, _ = segmenter.preprocess([one])
        maps = segmenter.backbone(images)
        logits = segmenter.sem_seg_head([maps[name] for name in LEVELS[::-1]])
    total = torch.zeros(3, 64, 96)
    for level, x in zip(found.levels, logits, strict=True):
        total += F.interpolate(x, (64, 96), mode="bilinear")[0]
        assert torch.equal(level[0], total.argmax(0))
    assert torch.equal(found.sem_seg[0].argmax(0), found.levels[-1][0])


def test_exits_use_the_weights_of_now():
    segmenter = build(f"{EXIT}.ENABLED", True)
    exits = segmenter.sem_seg_head.exits

    def bias():
        return exits.sparse_levels()[0].up_bias.clone()

    first = bias()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=0.1, fused=True)
    segmenter.train().losses([labelled(64, 96)])["loss_sem_seg"].backward()
    optimizer.step()
    trained = bias()
    assert not torch.equal(trained, first)
    segmenter.load_state_dict(build().state_dict())
    torch.testing.assert_close(bias(), first)


def test_ignored_pixels_and_padding_change_no_loss():
    segmenter = build().eval()  # norms do not see the batch
    one = labelled(64, 96)
    one["sem_seg"][:20] = 255
    other = {**one, "image": one["image"], "sem_seg": torch.full((64, 96), 255)}
    given = []
    segmenter.loss.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    together = segmenter.losses([one, other])["loss_sem_seg"]
    (logits, labels), *_ = given
    # Of the same logits in float64: those of another batch, and their sums, round otherwise.
    both = segmenter.loss([x.double() for x in logits], labels)
    alone = segmenter.loss([x[:1].double() for x in logits], labels[:1])
    torch.testing.assert_close(both, alone)
    torch.testing.assert_close(together, alone.float())


def test_padding_is_ignored():
    segmenter = build()
    seen = []
    segmenter.loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    batch = [labelled(40, 50), labelled(64, 33)]
    segmenter.losses(batch)
    (labels,) = seen
    assert labels.shape == (2, 64, 50)
    for found, one in zip(labels, batch, strict=True):
        rows, columns = one["sem_seg"].shape
        assert torch.equal(found[:rows, :columns], one["sem_seg"])
        assert (found == 255).sum() == found.numel() - rows * columns


def test_keys_reach_the_decoder_and_the_loss():
    node = "MODEL.CASCADE_DECODER"
    segmenter = build(
        *(f"{node}.FUSE", "concat", f"{node}.FINEST_GATE", 32, f"{node}.SUBSETS", "singletons"),
        *(f"{node}.SUBSET_MEAN", True, f"{node}.CE_WEIGHT", 0.6, f"{node}.DICE_WEIGHT", 0.4),
        *("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 9, "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 2.0),
    )
    decoder, loss = segmenter.sem_seg_head.decoder, segmenter.loss
    assert decoder.fuse == "concat"
    assert decoder.AG1.psi[0].in_channels == 32
    assert build(f"{node}.FINEST_GATE", 8).sem_seg_head.decoder.AG1.psi[0].in_channels == 8
    assert (loss.subsets, loss.mean, loss.ignore_value) == ("singletons", True, 9)
    assert (loss.ce_weight, loss.dice_weight, segmenter.loss_weight) == (0.6, 0.4, 2.0)


def test_the_loss_of_a_segmenter_can_be_watched():
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, "CASCADE.VALIDATION_LOSS", True, "DATASETS.TEST", ("a",)])
    for metric in ("validation/loss_sem_seg", "validation/total_loss"):
        check_config(changed(cfg, "CASCADE.BEST_METRIC", metric))
    with pytest.raises(ConfigError, match="losses are validation/total_loss, validation/loss_sem"):
        check_config(changed(cfg, "CASCADE.BEST_METRIC", "validation/loss_rpn_cls"))


def test_segmenting_restores_the_mode():
    segmenter = build().train()
    segmenter.segment([labelled(32, 32)])
    assert all(module.training for module in segmenter.modules())
    assert segmenter.segment([]).sem_seg == []


def test_bad_batches():
    segmenter = build()
    with pytest.raises(ValueError, match="batch is empty"):
        segmenter.losses([])
    with pytest.raises(ValueError, match=r"labels of shape \[3, 4\] for \[32, 32\] pixels"):
        segmenter.losses([{**labelled(32, 32), "sem_seg": torch.zeros(3, 4).long()}])
    with pytest.raises(ValueError, match=r"uint8 tensor \[3, H, W\]"):
        segmenter.segment([{"image": torch.zeros(1, 8, 8)}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2"]), "two maps or more"),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res4"]), r"out of \['res2', 'res3'"),
        (("MODEL.RESNETS.OUT_FEATURES", ["res4"]), "OUT_FEATURES is .* needs res2, res3, res5"),
        (("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"), "Supported: 'CascadeSemSegHead'"),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"), r"FPN\.IN_FEATURES is \[\]"),
        (("MODEL.CASCADE.EXIT.ENABLED", True), r"EXIT\.ENABLED is True, but segmenters"),
        (("TEST.AUG.ENABLED", True), r"TEST\.AUG\.ENABLED is True.*Set it to False"),
        (
            (f"{EXIT}.ENABLED", True, f"{EXIT}.THRESHOLDS", [0.9, 0.9]),
            r"THRESHOLDS is \[0.9, 0.9\]. Give one number, or one for each of the 4",
        ),
        (
            (f"{EXIT}.ENABLED", True, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1),
            "a single class is always certain",
        ),
        (("MODEL.CASCADE_DECODER.FUSE", "sum"), "Supported: 'add', 'concat'"),
        (
            ("MODEL.CASCADE_DECODER.CE_WEIGHT", 0.0, "MODEL.CASCADE_DECODER.DICE_WEIGHT", 0.0),
            "both 0",
        ),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        build(*options)
