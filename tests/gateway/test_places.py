"""Places that are kept for those who were told to come back."""

import pytest

from gateway.places import Places
from tests.support.figures import show


def test_they_are_told_one_after_the_other_at_seven_tenths_of_the_rate():
    places = Places()
    waits = [places.keep(i, 70, now=100.0, wait_s=2.0, tokens_per_s=100.0) for i in range(4)]
    assert waits == pytest.approx([2, 3, 4, 5])
    assert places.keep("later", 70, now=110.0, wait_s=2.0, tokens_per_s=100.0) == 2


def test_a_place_is_taken_once_and_not_before_its_time():
    places = Places()
    places.keep("a", 10, now=0.0, wait_s=2.0, tokens_per_s=100.0)
    assert not places.take("a", 1.5)
    assert not places.take("b", 2.0)
    assert places.take("a", 2.5)
    assert not places.take("a", 2.5)
    assert not places


def test_requests_that_ask_the_same_have_a_place_each():
    places = Places()
    for _ in range(3):
        places.keep("same", 70, now=0.0, wait_s=1.0, tokens_per_s=100.0)
    assert [places.take("same", now) for now in (1.0, 1.5, 2.0, 3.0, 3.5)] == [True, False, True, True, False]


def test_what_is_expected_until_a_time():
    places = Places()
    for i in range(10):
        places.keep(i, 70, now=0.0, wait_s=1.0, tokens_per_s=100.0)
    expected = [places.tokens_until(time, 0.0, 100.0) for time in (0.9, 1.0, 2.0, 5.5, 99.0)]
    assert expected == [0, 70, 140, 385, 700]


def test_of_very_long_waits_no_place_is_kept():
    places = Places()
    assert places.keep("a", 10, now=0.0, wait_s=61.0, tokens_per_s=1.0) == 60
    assert not places


def test_where_nobody_comes_back_waits_grow_short_again():
    """A flood of clients that give up when they are refused: 2000 requests a second, of which the server
    answers 10.
    """
    places = Places()
    waits = []
    for i in range(120_000):
        now = i / 2000
        places.forget(now)
        waits.append(places.keep(i, 10, now, wait_s=1.0, tokens_per_s=100.0))
    first, last = max(waits[:10_000]), min(waits[-1000:])
    show(f"told to wait up to {first:.0f} s at first, and {last:.1f} s after a minute")
    assert first == 60
    assert last < 20
    assert places.tokens_until(1000.0, 60.0, 100.0) < 100, "and next to no room is kept"
