"""Places that are kept for those who were told to come back."""

import pytest

from gateway.places import Places
from tests.support.figures import show

LANE = 1000


def test_they_are_told_one_after_the_other_at_six_tenths_of_the_rate():
    places = Places(LANE)
    waits = [places.keep(i, 60, now=100.0, wait_s=2.0, tokens_per_s=100.0) for i in range(4)]
    assert waits == pytest.approx([2, 3, 4, 5])
    assert places.keep("later", 60, now=110.0, wait_s=2.0, tokens_per_s=100.0) == 2


def test_a_place_is_taken_once_and_not_before_its_time():
    places = Places(LANE)
    places.keep("a", 10, now=0.0, wait_s=2.0, tokens_per_s=100.0)
    assert not places.take("a", 1.5)
    assert not places.take("b", 2.0)
    assert places.take("a", 2.5)
    assert not places.take("a", 2.5)
    assert not places


def test_requests_that_ask_the_same_have_a_place_each():
    places = Places(LANE)
    for _ in range(3):
        places.keep("same", 60, now=0.0, wait_s=1.0, tokens_per_s=100.0)
    assert [places.take("same", now) for now in (1.0, 1.5, 2.0, 3.0, 3.5)] == [True, False, True, True, False]


def test_what_is_expected_until_a_time():
    places = Places(LANE)
    for i in range(10):
        places.keep(i, 60, now=0.0, wait_s=1.0, tokens_per_s=100.0)
    expected = [places.tokens_until(time, 0.0, 100.0) for time in (0.9, 1.0, 2.0, 5.5, 99.0)]
    assert expected == [0, 60, 120, 330, 600]


def test_very_long_waits_are_told_as_they_are_and_their_places_kept():
    places = Places(LANE)
    assert places.keep("a", 10, now=0.0, wait_s=170.0, tokens_per_s=1.0) == 170
    assert places.take("a", 170.0)


def test_a_flood_that_never_comes_back_takes_little_memory_and_waits_grow_short_again():
    """2000 requests a second, of which the server answers 10: as many places are kept as ten times the lane
    need, and no more.
    """
    places = Places(LANE)
    waits, most = [], 0
    for i in range(600_000):
        now = i / 2000
        waits.append(places.keep(i, 10, now, wait_s=1.0, tokens_per_s=100.0))
        most = max(most, len(places._in_order), len(places._by_key))
    show(
        f"{most} places at most; told to wait up to {max(waits):.0f} s, {waits[-1]:.1f} s after five minutes"
    )
    assert most <= 16 * LANE / 10
    assert max(waits) <= 1 + 16 * LANE / 60
    assert waits[-1] < 20
    assert places.tokens_until(1000.0, 300.0, 100.0) < 100, "and next to no room is kept"


def test_of_small_requests_the_number_is_bounded():
    places = Places(10**9)
    for i in range(20_000):
        places.keep(i, 3, now=0.0, wait_s=1.0, tokens_per_s=100.0)
    assert len(places._in_order) == len(places._by_key) == 10_000
