import pytest

from backends.contract import ErrorCode, StageFailure


@pytest.mark.parametrize("item", [None, 0, 17])
def test_a_failure_survives_the_server_s_wrapping(item):
    failure = StageFailure(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED, "the text has 9 tokens: too many, at item 3: x", item
    )
    for prefix in ("", "in ensemble 'a-b.c', ", "[request id: 7] "):
        assert StageFailure.parse(prefix + str(failure)) == failure


def test_other_texts_are_no_failures():
    assert StageFailure.parse("Stub process 'x_0_0' is not healthy.") is None
    assert StageFailure.parse("an internal error: broken") is None
