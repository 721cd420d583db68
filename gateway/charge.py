"""What a request takes out of the budget of its key before its answer says what it has cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gateway import metrics
from gateway.context import RequestContext
from gateway.errors import TooManyRequests


def check(context: RequestContext) -> None:
    """Raises TooManyRequests for a new request of a key that has used up its tokens."""
    budget = context.budget
    if budget is None or context.is_charged or not (wait_s := budget.wait_s()):
        return
    metrics.count_refusal_of_key(context)
    raise TooManyRequests(
        f"the key {context.key_name!r} has used more than its {budget.tokens_per_minute} tokens a minute; "
        f"try again in {wait_s:.1f} s, or ask the operator of this server for more",
        retry_after_s=wait_s,
    )


@contextlib.contextmanager
def charged(context: RequestContext, price: int, sent: Callable[[], int]) -> Iterator[None]:
    """Takes out what work may cost while it is under way, so that what comes meanwhile sees it. An answer
    says what it has cost in truth; where there is none, what was `sent` to the server stays charged.
    """
    context.charge(price)
    try:
        yield
    except BaseException:
        context.charge(sent() - price)
        raise
    context.charge(-price)
