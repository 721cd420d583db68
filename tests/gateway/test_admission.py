"""Who is sent to the server next, who is refused, and when a refused one may come back."""

import asyncio
import itertools
import random
from dataclasses import dataclass, field, replace

import pytest

from gateway.admission import Admission, AdmissionLimits
from gateway.context import Lane
from gateway.errors import TooManyRequests
from gateway.lane import Price
from tests.support.figures import show

BUDGET = 100
FAST, SLOW = Lane.INTERACTIVE, Lane.BULK
LIMITS = AdmissionLimits(2.0, 0.75, {FAST: 1000, SLOW: 4000}, 10_000)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Server:
    """Answers in the order in which it was sent to, when the test says so."""

    def __init__(self, limits=LIMITS):
        self.clock = Clock()
        self.admission = Admission(limits, self.clock)
        self.queue = self.admission.queue("tiny", "org/tiny", BUDGET)
        self.sent = []
        self.running = asyncio.Queue()
        self.tasks = []

    async def ask(self, name, parts, lane=None, key=None):
        """A client request of server requests with so many tokens; a byte a token."""
        total = sum(parts)
        keys = itertools.count()
        with self.queue.enter(Price(total, total), lane, lambda: key or (name, next(keys))) as ticket:

            async def send(tokens):
                async with ticket.turn(tokens, tokens):
                    self.sent.append((name, tokens))
                    answer = asyncio.Event()
                    self.running.put_nowait((tokens, answer))
                    await answer.wait()

            await asyncio.gather(*map(send, parts))

    def start(self, *arguments, **options):
        task = asyncio.create_task(self.ask(*arguments, **options))
        self.tasks.append(task)
        return task

    async def answer(self, seconds=0.0):
        """The oldest server request is answered, `seconds` later."""
        tokens, event = await self.running.get()
        self.clock.now += seconds
        event.set()
        await settle()
        return tokens

    async def finish(self):
        """All that was asked is answered."""
        rest = asyncio.gather(*self.tasks, return_exceptions=True)
        while not rest.done():
            if self.running.empty():
                await settle()
            else:
                await self.answer()

    @property
    def state(self):
        return self.admission.states()["tiny"]


async def settle():
    """All tasks run until they wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_server_has_two_budgets_at_once_and_the_rest_waits():
    server = Server()
    server.start("list", [50] * 10, SLOW)
    await settle()
    assert server.state.in_flight_tokens == 2 * BUDGET
    assert server.state.lanes[SLOW].queued_tokens == 300
    assert server.state.lanes[SLOW].queued_requests == 1
    for _ in range(10):
        assert server.state.in_flight_tokens <= 2 * BUDGET
        await server.answer()
    assert server.state.in_flight_tokens == 0
    assert server.state.lanes[SLOW].queued_tokens == server.state.lanes[SLOW].queued_requests == 0


async def test_each_server_that_answers_has_two_budgets():
    server = Server()
    server.admission.queue("tiny", "org/tiny", BUDGET, servers=3)
    server.start("list", [50] * 20, SLOW)
    await settle()
    assert server.state.in_flight_tokens == 6 * BUDGET
    server.admission.queue("tiny", "org/tiny", BUDGET, servers=1)
    for _ in range(8):
        await server.answer()
    assert server.state.in_flight_tokens == 2 * BUDGET, "two were lost"
    await server.finish()


async def test_a_server_request_over_the_bound_runs_alone():
    server = Server()
    server.start("huge", [500], SLOW)
    server.start("other", [10], SLOW)
    await settle()
    assert server.sent == [("huge", 500)]
    await server.answer()
    assert server.sent == [("huge", 500), ("other", 10)]
    await server.finish()


async def test_the_size_says_the_lane_where_nobody_does():
    server = Server()
    server.start("full", [1000], SLOW)
    await settle()
    server.start("one budget", [50] * 2)
    server.start("more", [51, 50])
    await settle()
    assert server.state.lanes[FAST].queued_tokens + server.state.in_flight_tokens - 1000 == 100
    assert server.state.lanes[SLOW].queued_tokens == 101
    await server.finish()


async def test_a_short_query_does_not_wait_for_a_huge_list_of_bulk():
    server = Server()
    server.start("list", [100] * 30, SLOW)
    await settle()
    server.start("query", [5])
    await settle()
    assert server.sent[-1] == ("query", 5), "by the express account, at once"
    await server.finish()


async def test_a_short_query_waits_for_one_budget_of_a_huge_list_in_its_own_lane():
    """Also where the list says that it is urgent, and the express account is taken."""
    worst = 0
    for parts in ([100] * 9, [50] * 18, [25] * 36, [10] * 90):
        server = Server()
        server.start("list", parts, FAST)
        await settle()
        server.start("first", [50], FAST)
        await settle()
        before = len(server.sent)
        server.start("query", [5], FAST)
        await settle()
        while ("query", 5) not in server.sent:
            await server.answer()
        ahead = sum(tokens for _, tokens in server.sent[before : server.sent.index(("query", 5))])
        worst = max(worst, ahead)
        await server.finish()
    show(f"at most {worst} tokens were sent before the query; the budget is {BUDGET}")
    assert worst <= BUDGET


async def test_lanes_advance_by_their_shares_where_both_have_work():
    server = Server(replace(LIMITS, max_queued_tokens={FAST: 10**6, SLOW: 10**6}))
    for i in range(200):
        server.start("fast", [20], FAST)
        server.start("slow", [20], SLOW)
        if i % 20 == 0:
            server.start("slow", [100] * 3, SLOW)
    await settle()
    while server.state.lanes[FAST].queued_tokens:
        await server.answer()
    sent = {name: sum(tokens for other, tokens in server.sent if other == name) for name in ("fast", "slow")}
    share = sent["fast"] / sum(sent.values())
    show(f"of the tokens {share:.1%} were interactive, where 75 % are its share")
    assert 0.72 < share < 0.78
    await server.finish()


async def test_a_stream_of_urgent_requests_does_not_starve_bulk():
    server = Server()
    server.start("bulk", [100] * 3, SLOW)
    await settle()
    for i in range(40):
        server.start("fast", [20], FAST)
        await settle()
        if i > 5:
            await server.answer()
    sent = [name for name, _ in server.sent]
    assert sent.count("bulk") == 3
    await server.finish()


async def test_a_lane_that_had_no_work_has_not_saved_up_turns():
    server = Server(replace(LIMITS, max_queued_tokens={FAST: 10**6, SLOW: 10**6}))
    for _ in range(100):
        server.start("slow", [50], SLOW)
    for _ in range(90):
        await server.answer()
    for _ in range(100):
        server.start("slow", [50], SLOW)
        server.start("fast", [50], FAST)
    await settle()
    start = len(server.sent)
    for _ in range(40):
        await server.answer()
    assert [name for name, _ in server.sent[start:]].count("slow") >= 8
    await server.finish()


async def test_each_waits_a_bounded_time_however_many_come_after():
    """First in, first out within a lane: nothing that comes later is sent earlier."""
    server = Server()
    for i in range(20):
        server.start(i, [40], FAST)
    await server.finish()
    assert [name for name, _ in server.sent] == list(range(20))


async def test_more_than_may_wait_is_refused_as_a_whole_and_at_once():
    server = Server()
    server.start("running", [100] * 2, FAST)
    await settle()
    server.start("waiting", [90] * 5, FAST)
    server.start("waiting", [90] * 5, FAST)
    await settle()
    with pytest.raises(TooManyRequests) as caught:
        await server.ask("refused", [60] * 2, FAST)
    assert caught.value.message == (
        "the model org/tiny is busy: 900 tokens of interactive requests wait already, at most 1000 may, and "
        "this one has 120 (the operator can raise the limit with GATEWAY_MAX_QUEUED_TOKENS); try again in "
        "1.0 s"
    )
    assert caught.value.retry_after_s == 1
    assert server.state.lanes[FAST].rejected == 1
    assert server.state.lanes[FAST].queued_tokens == 900, "nothing of it is left"
    server.start("fits", [50] * 2, FAST)
    server.start("other lane", [50] * 20, SLOW)
    await server.finish()
    assert {name for name, _ in server.sent} == {"running", "waiting", "fits", "other lane"}


async def test_bytes_that_wait_have_a_bound_too():
    server = Server(replace(LIMITS, max_queued_bytes=250))
    server.start("running", [100] * 2, SLOW)
    await settle()
    server.start("waiting", [100] * 2, SLOW)
    await settle()
    with pytest.raises(
        TooManyRequests, match=r"200 bytes of bulk .* at most 250 .* has 60 .* GATEWAY_MAX_QUEUED_BYTES"
    ):
        await server.ask("refused", [30] * 2, SLOW)
    await server.finish()


async def test_who_was_refused_for_its_bytes_is_told_when_they_are_gone_and_let_in_then():
    server = Server(replace(LIMITS, max_queued_bytes=2500))
    # Of one request no more than half of the lane's tokens counts, but all of its bytes do.
    server.start("huge", [100] * 24, SLOW)
    for _ in range(2):
        await server.answer(seconds=0.5)
    assert server.state.lanes[SLOW].queued_bytes == 2000
    assert server.state.tokens_per_s == pytest.approx(200, rel=0.2)
    rate = server.state.tokens_per_s
    told = []
    for i in range(2):
        with pytest.raises(TooManyRequests, match="GATEWAY_MAX_QUEUED_BYTES") as caught:
            await server.ask("refused", [100] * 6, SLOW, key=f"refused {i}")
        told.append(caught.value.retry_after_s)
    show(f"2000 bytes wait at {rate:.0f} tokens/s; told to come back after {told[0]:.1f} and {told[1]:.1f} s")
    assert told == pytest.approx([2000 / rate, 2000 / rate + 600 / (0.6 * rate)])
    server.start("others", [100] * 4, SLOW)
    await settle()
    server.clock.now += told[0]
    # Newcomers have taken the room; the place is kept all the same.
    server.start("refused", [100] * 6, SLOW, key="refused 0")
    await settle()
    assert server.state.lanes[SLOW].queued_bytes == 3000
    assert server.state.lanes[SLOW].rejected == 2
    await server.finish()


async def test_an_empty_lane_takes_anything_and_keeps_nobody_out_with_it():
    server = Server()
    server.start("running", [100] * 2, SLOW)
    await settle()
    server.start("larger than the bound", [100] * 50, SLOW)
    await settle()
    assert server.state.lanes[SLOW].queued_tokens == 5000
    server.start("half of the bound", [100] * 20, SLOW)
    await settle()
    with pytest.raises(TooManyRequests, match="4000 tokens of bulk requests wait already, at most 4000 may"):
        await server.ask("more", [10], SLOW)
    await server.finish()
    assert server.sent.count(("larger than the bound", 100)) == 50
    assert server.sent.index(("half of the bound", 100)) < 6, "they take turns"


async def test_a_request_larger_than_the_bound_is_told_when_to_come_and_let_in_then():
    """Though the lane is never empty."""
    server = Server()
    server.start("before", [100] * 30, SLOW)
    for _ in range(10):
        await server.answer(seconds=0.5)
    rate = server.state.tokens_per_s
    assert server.state.lanes[SLOW].queued_tokens == 1800
    with pytest.raises(TooManyRequests, match="at most 4000 may, and this one has 9000") as caught:
        await server.ask("huge", [100] * 90, SLOW, key="huge")
    assert caught.value.retry_after_s == pytest.approx(1800 / rate)
    server.start("others", [100] * 2, SLOW)
    await settle()
    server.clock.now += caught.value.retry_after_s
    with pytest.raises(TooManyRequests):
        await server.ask("another huge", [100] * 90, SLOW, key="another")
    server.start("huge", [100] * 90, SLOW, key="huge")
    await settle()
    assert server.state.lanes[SLOW].queued_tokens == 11_000
    assert server.state.lanes[SLOW].rejected == 2
    await server.finish()


async def test_the_rate_is_measured_while_the_server_is_busy_only():
    server = Server()
    server.start("alone", [100], FAST)
    await server.answer(seconds=1)
    assert server.state.tokens_per_s == pytest.approx(100, rel=0.06)
    server.clock.now += 1000
    server.start("queue", [100] * 40, SLOW)
    for _ in range(40):
        await server.answer(seconds=0.5)
    show(f"measured {server.state.tokens_per_s:.0f} tokens/s of 200")
    assert server.state.tokens_per_s == pytest.approx(200, rel=0.05)


async def test_how_long_to_wait_is_what_waits_by_the_rate():
    server = Server()
    for _ in range(2):
        server.start("queue", [100] * 20, SLOW)
    for _ in range(20):
        await server.answer(seconds=0.5)
    assert server.state.lanes[SLOW].queued_tokens == 1800
    server.start("more", [100] * 20, SLOW)
    await settle()
    with pytest.raises(TooManyRequests) as caught:
        await server.ask("refused", [100] * 3, SLOW)
    assert caught.value.retry_after_s == pytest.approx(3800 / 200, rel=0.05)
    server.start("urgent", [100] * 9, FAST)
    await settle()
    with pytest.raises(TooManyRequests) as caught:
        await server.ask("refused too", [100] * 3, SLOW)
    # After those who were refused before, at nine tenths, and by what bulk has while others wait.
    assert caught.value.retry_after_s == pytest.approx(3800 / 50, rel=0.05)
    await server.finish()


@dataclass
class Outcome:
    """Of a flood."""

    answered: int = 0
    told: int = 0
    in_vain: int = 0
    """Who were told before, and came back when they were told to."""
    waits: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


async def flood(seconds, seconds_each):
    """Ten times as many clients as the server can answer, each with one request of 40 tokens at a time.
    `seconds_each(elapsed)` is what one takes; 0.4 did before.
    """
    server = Server(replace(LIMITS, max_queued_tokens={FAST: 1000, SLOW: 1000}))
    rng = random.Random(7)
    events = []
    order = itertools.count()
    outcome = Outcome()

    def later(after, name, has_waited):
        events.append((server.clock.now + after, next(order), name, has_waited))

    server.start("before", [40] * 20, FAST)
    for _ in range(20):
        await server.answer(seconds=0.4)
    for i in range(250):
        later(rng.random(), (i, 0), False)
    begin = served_at = server.clock.now
    pending, begun = {}, {}
    while server.clock.now < begin + seconds:
        events.sort()
        at, _, name, has_waited = events[0]
        each = seconds_each(server.clock.now - begin)
        if not server.running.empty() and served_at + each <= at:
            server.clock.now = served_at = max(served_at + each, server.clock.now)
            await server.answer()
            outcome.answered += 1
            for task, client in [(t, c) for t, c in pending.items() if t.done()]:
                del pending[task]
                outcome.latencies.append(server.clock.now - begun[client])
                later(rng.random() * 0.2, (client[0], client[1] + 1), False)
            continue
        if server.running.empty():
            served_at = at
        events.pop(0)
        server.clock.now = begun[name] = max(at, server.clock.now)
        task = asyncio.create_task(server.ask(name, [40], FAST, key=name))
        await settle()
        if task.done() and isinstance(task.exception(), TooManyRequests):
            outcome.in_vain += has_waited
            wait = task.exception().retry_after_s
            outcome.waits.append(wait)
            outcome.told += 1
            later(wait + rng.random() * 0.5, name, True)
        else:
            pending[task] = name
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    show(
        f"{outcome.answered} answered, {max(outcome.latencies):.1f} s after they came; {outcome.told} "
        f"told when to come back and {outcome.in_vain} of them in vain; waits of {min(outcome.waits):.1f} to "
        f"{max(outcome.waits):.1f} s"
    )
    return outcome


async def test_who_waits_as_long_as_it_is_told_is_let_in():
    """For ten minutes, though new requests come all the time."""
    outcome = await flood(600, lambda elapsed: 0.4)
    assert outcome.answered > 0.97 * 600 / 0.4, "the server has always work"
    assert outcome.told > 500
    assert outcome.in_vain == 0


async def test_next_to_nobody_comes_in_vain_when_the_server_becomes_much_slower():
    """Two fifths of its rate, from when most were told when to come."""
    outcome = await flood(600, lambda elapsed: 0.4 if elapsed < 60 else 1.0)
    assert outcome.answered > 0.97 * (60 / 0.4 + 540), "the server has always work"
    assert outcome.told > 500
    assert outcome.in_vain <= 0.02 * outcome.told
    # Twice the lane of those who have places, and what the server has.
    assert max(outcome.latencies) < 1.05 * (2000 + 200) / 40


async def test_places_of_those_who_do_not_come_are_given_up():
    server = Server()
    for _ in range(3):
        server.start("queue", [100] * 4, FAST)
        await settle()
    # The server does 1000 tokens/s: those who are refused are told to come after one second, and later.
    for _ in range(4):
        await server.answer(seconds=0.1)
    server.start("more", [100] * 4, FAST)
    await settle()
    assert server.state.lanes[FAST].queued_tokens == 1000
    for i in range(30):
        with pytest.raises(TooManyRequests):
            await server.ask(f"gone {i}", [100], FAST)
    for _ in range(6):
        await server.answer(seconds=0.1)
    assert server.state.lanes[FAST].queued_tokens == 400
    server.clock.now += 0.8
    server.start("new", [100], FAST)
    await settle()
    assert server.state.lanes[FAST].rejected == 30, "half of the queue is open to everybody"
    with pytest.raises(TooManyRequests, match=r"500 tokens .* room for \d+ is kept for those who were told"):
        await server.ask("another", [100] * 2, FAST)
    server.clock.now += 100
    server.start("another", [100] * 5, FAST)
    await settle()
    assert server.state.lanes[FAST].rejected == 31
    await server.finish()


async def test_what_is_cancelled_leaves_the_queue():
    server = Server()
    running = server.start("running", [100] * 2, SLOW)
    gone = server.start("gone", [100] * 3, SLOW)
    server.start("after", [100], SLOW)
    await settle()
    gone.cancel()
    await settle()
    assert server.state.lanes[SLOW].queued_tokens == 100
    assert server.state.lanes[SLOW].queued_requests == 1
    running.cancel()
    await settle()
    assert server.sent[-1] == ("after", 100), "also what was at the server makes room"
    assert server.state.in_flight_tokens == 100
    await server.finish()
    assert server.state.in_flight_tokens == 0


async def test_cancelled_in_the_moment_of_its_turn():
    server = Server()
    server.start("running", [200], SLOW)
    gone = server.start("gone", [100], SLOW)
    await settle()
    _, event = await server.running.get()
    event.set()
    await asyncio.sleep(0)
    # Its turn is granted, and it has not run since.
    gone.cancel()
    await settle()
    assert server.state.in_flight_tokens == 0
    assert server.state.lanes[SLOW].queued_tokens == 0


async def test_the_figures_come_out_even_whatever_happens():
    rng = random.Random(3)
    server = Server()
    for i in range(300):
        parts = [rng.randint(1, 120) for _ in range(rng.randint(1, 6))]
        server.start(i, parts, rng.choice([None, FAST, SLOW]))
        await settle()
        if rng.random() < 0.3:
            rng.choice(server.tasks).cancel()
        while rng.random() < 0.7 and not server.running.empty():
            await server.answer(seconds=0.01)
        assert server.state.in_flight_tokens <= 2 * BUDGET * 1.25
    await server.finish()
    state = server.state
    assert state.in_flight_tokens == 0
    for lane in state.lanes.values():
        assert (lane.queued_tokens, lane.queued_bytes, lane.queued_requests) == (0, 0, 0)
