"""Items prepared in a thread."""

import threading

import pytest

from cascade_det.data.read_ahead import read_ahead
from cascade_det.errors import DatasetError


def test_results_in_order():
    assert list(read_ahead(lambda x: x * x, range(7))) == [x * x for x in range(7)]
    assert list(read_ahead(str, [])) == []


def test_the_next_item_is_worked_on_and_no_later_one():
    started = {item: threading.Event() for item in range(5)}
    results = read_ahead(lambda item: started[item].set() or item, range(5))
    assert next(results) == 0
    assert started[1].wait(10)
    assert next(results) == 1
    assert started[2].wait(10)
    assert not started[3].is_set()
    results.close()
    assert not started[3].is_set()


def test_an_error_comes_in_the_place_of_its_result():
    def read(item):
        if item == 2:
            raise DatasetError("broken")
        return item

    results = read_ahead(read, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DatasetError, match="broken"):
        next(results)
