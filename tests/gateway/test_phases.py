import numpy as np
import pytest

from backends.contract import ENCODER_TIMES, IMAGE_TIMES, TOKENIZER_TIMES
from gateway.context import RequestContext
from gateway.phases import header, read_times, record


def answer(tokenizer, encoder, image=None, offset=0.0):
    """Times as stages tell them, from moments in seconds."""
    given = {TOKENIZER_TIMES: tokenizer, ENCODER_TIMES: encoder} | ({IMAGE_TIMES: image} if image else {})
    return {
        name: np.array([[round(1e6 * (moment + offset)) for moment in moments]], np.int64)
        for name, moments in given.items()
    }


def test_the_phases_of_one_request_add_up_to_its_time():
    phases = read_times(answer((11, 12), (13, 15, 20)), 10, 22)
    assert phases == pytest.approx({"tokenise": 1, "queue": 1 + 3, "encode": 5, "head": 2})


def test_images_are_a_phase_of_their_own():
    phases = read_times(answer((13, 14), (15, 16, 18), image=(10.5, 12.5)), 10, 19)
    assert phases == pytest.approx({"image": 2, "tokenise": 1, "queue": 3, "encode": 2, "head": 1})
    assert sum(phases.values()) == pytest.approx(9)


@pytest.mark.parametrize("offset", [-1e6, 1e6])
def test_of_a_server_with_another_clock_the_ways_are_in_head(offset):
    phases = read_times(answer((11, 12), (13, 15, 20), offset=offset), 10, 22)
    assert phases == pytest.approx({"tokenise": 1, "queue": 3, "encode": 5, "head": 3})


def test_entries_that_tell_no_times_have_one_phase():
    assert read_times({}, 10, 12) == {"server": 2}


def test_of_server_requests_side_by_side_the_last_one_counts():
    context = RequestContext("a")
    record(context, 0, 3, {"encode": 3})
    record(context, 0, 5, {"admission": 1, "encode": 4})
    assert context.phases == {"encode": 4, "admission": 1}


def test_server_requests_one_after_the_other_add_up():
    context = RequestContext("a")
    record(context, 0, 3, {"encode": 3})
    record(context, 4, 6, {"encode": 2})
    assert context.phases == {"encode": 5}


def test_the_header_is_in_milliseconds():
    assert header({"encode": 0.0015}, 0.25) == "encode;dur=1.500, total;dur=250.000"
