"""The latency model: known times come back, and nothing is faster than it can be."""

import numpy as np
import pytest

from cascade_det.calibration.latency_model import LatencyModel

CONSTANT, PER_CALL, PER_REGION = 30.0, (2.0, 1.5, 0.5), (0.02, 0.01, 0.04)


def true_time(entered):
    time = CONSTANT
    for regions, fixed, each in zip(entered, PER_CALL, PER_REGION, strict=True):
        if regions:
            time += fixed + each * regions
    return time


def random_calls(count, *, seed=0, most=1000):
    """Falling numbers of regions, some of which end in empty stages."""
    rng = np.random.default_rng(seed)
    calls = []
    for _ in range(count):
        entered = np.sort(rng.integers(0, most, 3))[::-1]
        entered[rng.integers(0, 4) :] = 0
        calls.append(entered.tolist())
    return calls


def fit(calls, *, noise=0.0, seed=0, batch_size=1):
    factors = 1 + noise * np.random.default_rng(seed).normal(size=len(calls))
    return LatencyModel.fit(
        calls,
        factors * [true_time(call) for call in calls],
        device_name="toaster",
        batch_size=batch_size,
    )


def test_known_times_come_back():
    model = fit(random_calls(60), batch_size=4)
    assert model.constant == pytest.approx(CONSTANT)
    assert model.per_call == pytest.approx(PER_CALL)
    assert model.per_region == pytest.approx(PER_REGION)
    assert (model.device_name, model.batch_size, model.samples) == ("toaster", 4, 60)
    assert model.spread == pytest.approx(0, abs=1e-9)


def test_noise_is_reported_and_averaged_out():
    model = fit(random_calls(400), noise=0.05)
    # The median of |x| for a normal x is 0.6745 deviations.
    assert model.spread == pytest.approx(0.05 * 0.6745, rel=0.2)
    for call in random_calls(20, seed=9):
        assert model.predict(call) == pytest.approx(true_time(call), rel=0.03)


def test_a_prediction_for_one_call_and_for_many():
    model = fit(random_calls(60))
    calls = [[1000, 100, 40], [300, 0, 0], [0, 0, 0]]
    # 30 + 2 + 20 + 1.5 + 1 + 0.5 + 1.6; 30 + 2 + 6; 30
    wanted = [56.6, 38.0, 30.0]
    assert [model.predict(call) for call in calls] == pytest.approx(wanted)
    assert isinstance(model.predict(calls[0]), float)
    np.testing.assert_allclose(model.predict(np.transpose(calls)), wanted)
    assert model.predict(np.zeros((3, 0))).shape == (0,)


def test_no_part_is_negative_where_plain_least_squares_would_make_it():
    # More regions in the last stage, and less time.
    model = LatencyModel.fit(
        [[100], [200], [400]], [10.0, 9.0, 8.0], device_name="toaster", batch_size=1
    )
    assert model.per_region == (0.0,)
    assert min(model.constant, *model.per_call) >= 0
    assert model.predict([800]) == pytest.approx(8.9, abs=0.3)


def test_a_stage_that_nothing_entered_costs_nothing():
    calls = [[n, n // 2, 0] for n in (0, 10, 50, 200, 500, 700, 900)]
    model = fit(calls)
    assert (model.per_call[2], model.per_region[2]) == (0.0, 0.0)
    assert model.predict([200, 100, 0]) == pytest.approx(true_time([200, 100, 0]), rel=0.05)


class TestPerImage:
    entered = np.array([[100, 300, 0, 200, 500], [10, 0, 0, 40, 50], [1, 0, 0, 0, 5]])

    def test_one_by_one(self):
        model = fit(random_calls(60))
        wanted = np.mean([true_time(column) for column in self.entered.T])
        assert model.per_image(self.entered) == pytest.approx(wanted)

    def test_in_batches(self):
        model = fit(random_calls(60), batch_size=2)
        # The last image is half of a batch of two like it.
        batches = [[400, 10, 1], [200, 40, 0], [1000, 100, 10]]
        first, second, third = (true_time(batch) for batch in batches)
        wanted = (first + second + third / 2) / 5
        assert model.per_image(self.entered) == pytest.approx(wanted)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="6 measured calls for 3 stages: measure at least 7"):
        fit(random_calls(6))


def test_in_words():
    model = LatencyModel(50.04, (1.0, 2.5), (0.0123, 0.1), "Some CPU", 4, 96, 0.031)
    assert str(model) == (
        "50.0 ms for a call with 4 image(s) on Some CPU, and for each stage that is entered, "
        "stage 0: 1.0 ms and 12 us per region; stage 1: 2.5 ms and 100 us per region. Fitted to "
        "96 calls; half of them are predicted to within 3 %."
    )


@pytest.fixture(scope="module")
def with_masks():
    calls, rng = random_calls(60), np.random.default_rng(3)
    masks = rng.integers(0, 100, 60)
    of_masks = 4.0 * (masks > 0) + 0.5 * masks
    return LatencyModel.fit(
        calls,
        of_masks + [true_time(call) for call in calls],
        device_name="toaster",
        batch_size=2,
        masks=masks,
        mask_milliseconds=of_masks,
    )


class TestMasks:
    def test_they_have_a_part_of_their_own(self, with_masks):
        assert (with_masks.per_mask_call, with_masks.per_mask) == pytest.approx((4.0, 0.5))
        assert with_masks.constant == pytest.approx(CONSTANT)
        assert with_masks.per_region == pytest.approx(PER_REGION)
        assert with_masks.predict([100, 0, 0], 10) == pytest.approx(30 + 2 + 2 + 4 + 5)
        assert with_masks.predict([100, 0, 0]) == pytest.approx(30 + 2 + 2)
        assert "for masks 4.0 ms and 500 us each" in str(with_masks)

    def test_per_image(self, with_masks):
        """Batches of two: the fixed part once for both, not at all for a batch without masks."""
        entered = np.array([[100, 100, 100, 100], [0] * 4, [0] * 4])
        stages = (30 + 2 + 4) / 2
        masks = (4 + 0.5 * 12) / 4
        assert with_masks.per_image(entered, [12, 0, 0, 0]) == pytest.approx(stages + masks)
        assert with_masks.per_image(entered) == pytest.approx(stages)

    def test_a_cascade_without_masks(self):
        model = fit(random_calls(60))
        assert (model.per_mask_call, model.per_mask) == (0, 0)
        assert "mask" not in str(model)


class TestTiles:
    """Milliseconds per tile: dense, open, later and whole."""

    rates = np.array([0.02, 0.035, 0.015, 0.01])

    def calls(self, count):
        """Regions and tiles of calls with 100 tiles, of which some have no gate."""
        rng = np.random.default_rng(3)
        tiles = []
        for index in range(count):
            opened = rng.integers(0, 50)
            later = rng.integers(0, 50)
            kinds = ((100, 0, 0, 0), (0, opened, later, 0), (0, opened, 0, 100))
            tiles.append(kinds[index % 3])
        return random_calls(count, seed=2), np.array(tiles)

    def fitted(self, batch_size=1):
        regions, tiles = self.calls(60)
        in_maps = 11.0 + tiles @ self.rates
        return LatencyModel.fit(
            regions,
            np.array([true_time(call) for call in regions]) + in_maps,
            device_name="toaster",
            batch_size=batch_size,
            tiles=tiles,
            map_milliseconds=in_maps,
        )

    def test_known_times_come_back(self):
        model = self.fitted()
        assert model.per_tile == pytest.approx(self.rates)
        assert model.constant == pytest.approx(CONSTANT + 11)
        assert model.per_region == pytest.approx(PER_REGION)
        for call, tiles in zip(*self.calls(9), strict=True):
            wanted = true_time(call) + 11 + tiles @ self.rates
            assert model.predict(call, tiles=tiles) == pytest.approx(wanted)
        assert "for each tile of the finest map 20.0 us without a tile gate" in str(model)

    def test_kinds_that_no_call_had_are_not_free(self):
        """A gate that only closes all tiles, or opens all, says nothing of open ones."""
        tiles = np.array([(100, 0, 0, 0), (0, 0, 0, 100)] * 30)
        in_maps = 11.0 + tiles @ self.rates
        model = LatencyModel.fit(
            random_calls(60),
            np.array([true_time(call) for call in random_calls(60)]) + in_maps,
            device_name="toaster",
            batch_size=1,
            tiles=tiles,
            map_milliseconds=in_maps,
        )
        dense, opened, later, whole = model.per_tile
        assert opened == later == dense
        assert dense - whole == pytest.approx(0.01)

    def test_an_open_tile_takes_no_less_than_one_of_the_whole_map(self):
        """Whatever noise says."""
        regions, tiles = self.calls(60)
        in_maps = 11.0 + tiles @ [0.02, 0.005, 0.01, 0.01]
        model = LatencyModel.fit(
            regions,
            np.array([true_time(call) for call in regions]) + in_maps,
            device_name="toaster",
            batch_size=1,
            tiles=tiles,
            map_milliseconds=in_maps,
        )
        assert model.per_tile[1] >= model.per_tile[0] > 0

    def test_they_count_per_image_in_batches(self):
        model = self.fitted(batch_size=2)
        entered = np.array([[100, 300, 200], [10, 0, 40], [1, 0, 0]])
        tiles = np.array([[100, 0, 0], [0, 30, 10], [0, 20, 0], [0, 0, 100]])
        # The last image is half of a batch of two like it.
        first = true_time([400, 10, 1]) + 2.0 + 30 * 0.035 + 20 * 0.015
        second = true_time([400, 80, 0]) + 20 * 0.035 + 200 * 0.01
        wanted = (first + 11 + (second + 11) / 2) / 3
        assert model.per_image(entered, 0, tiles) == pytest.approx(wanted)

    def test_without_a_gate_there_are_none(self):
        model = fit(random_calls(60))
        assert model.per_tile == ()
        assert model.predict([100, 10, 0], tiles=[850, 0, 0, 0]) == model.predict([100, 10, 0])
        assert "tile" not in str(model)
