"""Whether a server that runs still answers: one that stands still keeps its port, and never ends by itself.

Only what takes a connection and then says nothing is silent. A port that is closed is no silence: the server
opens it when all its models are loaded. Tries are counted, and not seconds, so that a machine that was halted
itself, or on which this process gets no processor either, does not make a server look dead.
"""

from __future__ import annotations

import http.client
import threading

# Threads of their own answer for the server's health, in a millisecond, whatever it computes or loads: on a
# starved machine they are late by a turn or two of its scheduler, but not by ten seconds.
_MOST_TRIES = 5
_TRY_TIMEOUT_S = 2.0
_INTERVAL_S = 1.0


class Heartbeat:
    """Asks a server's health for as long as it is not stopped, in a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Of its HTTP interface."""
        self._address = (host, port)
        self._misses = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def has_stopped(self) -> bool:
        """Whether the server has taken connections for about ten seconds and answered none."""
        return self._misses >= _MOST_TRIES

    def reset(self) -> None:
        """Another process is the server now."""
        self._misses = 0

    def stop(self) -> None:
        """Asks no more."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0 if self._misses else _INTERVAL_S):
            self._misses = self._misses + 1 if self._is_silent() else 0

    def _is_silent(self) -> bool:
        connection = http.client.HTTPConnection(*self._address, timeout=_TRY_TIMEOUT_S)
        try:
            connection.request("GET", "/v2/health/live")
            connection.getresponse()
        except TimeoutError:
            return True
        except (OSError, http.client.HTTPException):
            # Closed, or closed under the question: whoever looks after the process sees it end.
            return False
        finally:
            connection.close()
        return False
