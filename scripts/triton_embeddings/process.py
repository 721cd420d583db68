"""Child processes that never outlive this one, and the signals that end them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A process in a session of its own: Ctrl-C reaches this process only, which stops its children
    in order.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        output: IO[bytes] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(part) for part in command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    @property
    def pid(self) -> int:
        """Of its process group and session, too."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, waits, and kills what is left of its session."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self.kill()
        self._process.wait()

    def kill(self) -> None:
        """Ends it and its own children at once, without waiting for it: a signal's handler may call this."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Stop:
    """Set by Ctrl-C, SIGTERM or SIGHUP. The second one ends the children at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._children: list[Child] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)
        # nohup has SIGHUP ignored: that is to stay.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._set)

    def watch_over(self, child: Child) -> Child:
        """Makes a child one of those that the second signal ends."""
        self._children.append(child)
        return child

    def forget(self, child: Child) -> None:
        """It has ended by itself."""
        self._children.remove(child)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            for child in self._children:
                child.kill()
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Waits that long; whether it is time to stop."""
        return self._event.wait(timeout_s)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
