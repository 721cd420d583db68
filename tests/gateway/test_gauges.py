import asyncio
import contextlib

from gateway import gauges
from gateway.readiness import Report


class _Readiness:
    """Fails at the first look."""

    looks = 0

    def report(self):
        self.looks += 1
        if self.looks == 1:
            raise ZeroDivisionError
        return Report({}, frozenset(), None)


async def test_one_failure_does_not_end_what_is_shown(monkeypatch, caplog):
    monkeypatch.setattr(gauges, "_INTERVAL_S", 0.001)
    readiness = _Readiness()
    watch = asyncio.create_task(gauges.watch(readiness, None))
    while readiness.looks < 3 and not watch.done():
        await asyncio.sleep(0.001)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    assert "the state of things cannot be shown at /metrics" in caplog.text
