import asyncio
import contextlib
import time
from types import SimpleNamespace

from gateway import gauges, metrics
from gateway.inference import GrpcInference
from gateway.readiness import Report
from tests.support.fake_inference import PIPELINE


class _Readiness:
    """Fails at the first look."""

    looks = 0

    def report(self):
        self.looks += 1
        if self.looks == 1:
            raise ZeroDivisionError
        return Report({}, frozenset(), None)


def _servers():
    """Server and model -> what the gauge tells."""
    (metric,) = metrics.SERVER_MODEL_UP.collect()
    return {(s.labels["server"], s.labels["model"]): s.value for s in metric.samples}


async def test_each_servers_models_are_told(monkeypatch):
    monkeypatch.setattr(gauges, "_INTERVAL_S", 0.001)
    two = GrpcInference(["a:1", "b:1"], 300, 2**20)
    catalog = SimpleNamespace(pipelines=[PIPELINE])
    two.availability.lose("b:1", PIPELINE.name, "it died")
    readiness = _Readiness()
    readiness.looks = 1
    watch = asyncio.create_task(gauges.watch(readiness, catalog, two))
    name = PIPELINE.served_model_name

    async def until(*states):
        deadline = time.monotonic() + 20
        while _servers() != dict(zip((("a:1", name), ("b:1", name)), states, strict=False)):
            assert not watch.done()
            assert time.monotonic() < deadline, (states, _servers())
            await asyncio.sleep(0.001)

    await until(1, 0)
    two.availability.regain("b:1", PIPELINE.name)
    await until(1, 1)
    # A model that was removed is told no more.
    catalog.pipelines = []
    await until()
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    await two.close()


async def test_one_failure_does_not_end_what_is_shown(monkeypatch, caplog):
    monkeypatch.setattr(gauges, "_INTERVAL_S", 0.001)
    readiness = _Readiness()
    watch = asyncio.create_task(gauges.watch(readiness, None, None))
    while readiness.looks < 3 and not watch.done():
        await asyncio.sleep(0.001)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    assert "the state of things cannot be shown at /metrics" in caplog.text
