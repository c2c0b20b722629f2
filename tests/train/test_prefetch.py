"""Values made ahead: their order, how far ahead, errors and the end of the thread."""

import operator
import threading
from contextlib import closing

import pytest

from monarchrt.train.prefetch import made_ahead


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 5, 100])
def test_all_in_order_and_nothing_is_left(ahead):
    assert list(made_ahead(operator.neg, range(20), ahead=ahead)) == [(key, -key) for key in range(20)]
    assert list(made_ahead(operator.neg, [], ahead=ahead)) == []
    assert not prefetching()


def test_the_next_are_made_before_they_are_asked_for():
    made = {key: threading.Event() for key in range(10)}

    def make(key: int) -> int:
        made[key].set()
        return key

    with closing(made_ahead(make, range(10), ahead=2)) as values:
        assert next(values) == (0, 0)
        assert made[1].wait(20)
        assert made[3].wait(20)  # 1 and 2 wait, 3 is in hand
    assert not prefetching()


def test_no_more_wait_than_may():
    begun = []
    with closing(made_ahead(lambda key: begun.append(key), range(1000), ahead=2)) as values:
        for taken in range(1, 50):
            next(values)
            assert len(begun) <= taken + 3  # two that wait and the one in hand


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_comes_where_its_value_would_have(ahead):
    def make(key: int) -> int:
        if key == 3:
            raise OSError("the disk is gone")
        return key

    taken = []
    with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012
        for _, value in made_ahead(make, range(9), ahead=ahead):
            taken.append(value)
    assert taken == [0, 1, 2]
    assert not prefetching()


def test_who_stops_early_ends_the_thread():
    with closing(made_ahead(lambda key: key, range(1000), ahead=3)) as values:
        assert next(values) == (0, 0)
    assert not prefetching()
