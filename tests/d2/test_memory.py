"""The memory of the heads beside Detectron2's."""

import pytest

pytest.importorskip("detectron2.modeling", exc_type=ImportError)

from memory_meter import peak_bytes
from small_cascades import CHANNELS, make_scene
from small_plugin import detect, twins

pytestmark = pytest.mark.needs_detectron2

REGIONS, SIZE = 1000, 14
CROPS = REGIONS * CHANNELS * SIZE**2 * 4


def test_heads_take_no_more_than_detectron2s():
    ours, theirs = twins(["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", SIZE])
    scene = make_scene(num_proposals=(REGIONS,), num_objects=(3,), image_sizes=((240, 320),))
    peaks = {
        heads: peak_bytes(lambda heads=heads: detect(heads, scene)) for heads in (ours, theirs)
    }
    assert CROPS < peaks[ours] <= peaks[theirs]
