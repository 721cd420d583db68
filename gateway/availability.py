"""Which ensembles cannot answer at the moment, on which server, and who waits until they can. Of a model that
takes images texts are answered while only the stage of images is gone.

A request that met a dead process is sent again when its model is back. How long a request waits is counted
from the loss and not from its own beginning: of a model that stays away it learns at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Loss:
    """Since when an ensemble does not answer, and why."""

    reason: str
    since: float
    """time.monotonic() of the loss; of one that was lost again before it came back, of the first."""
    last_seen: float
    """time.monotonic() of the latest sign that it is lost."""


@dataclass
class Availability:
    """Shared by those who meet a loss, those who mend it, and those who wait."""

    wait_s: float
    """How long after a loss requests still wait."""
    on_loss: list[Callable[[str, str, bool], None]] = field(default_factory=list)
    """Called at every sign of a loss with address, ensemble, and whether it is the first sign."""
    _losses: dict[tuple[str, str], Loss] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def lose(self, address: str, ensemble: str, reason: str) -> None:
        """The ensemble does not answer on that server."""
        now = time.monotonic()
        before = self._losses.get((address, ensemble))
        self._losses[address, ensemble] = Loss(reason, before.since if before else now, now)
        for tell in self.on_loss:
            tell(address, ensemble, before is None)
        self._tell()

    def regain(self, address: str, ensemble: str) -> None:
        """It answers again."""
        if self._losses.pop((address, ensemble), None) is not None:
            self._tell()

    def loss(self, address: str, ensemble: str) -> Loss | None:
        """None where it answers, as far as is known."""
        return self._losses.get((address, ensemble))

    async def usable(
        self, ensemble: str, addresses: Sequence[str], deadline: float | None = None
    ) -> list[str]:
        """The servers where the ensemble answers, as soon as there are any; none when it was lost everywhere
        for longer than requests wait, or at the deadline, a time.monotonic().
        """
        while True:
            losses = {address: self.loss(address, ensemble) for address in addresses}
            if good := [address for address, loss in losses.items() if loss is None]:
                return good
            last = max(loss.since for loss in losses.values() if loss is not None)
            until = last + self.wait_s if deadline is None else min(deadline, last + self.wait_s)
            try:
                async with asyncio.timeout(max(0, until - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                return []

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
