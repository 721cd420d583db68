"""What /proc tells of processes; tests/server/test_faults.py has those of the real server."""

import os
import signal
import subprocess

from gateway.local_stubs import stand_still


def test_only_processes_that_are_all_stopped_stand_still():
    with subprocess.Popen(["sleep", "300"]) as one, subprocess.Popen(["sleep", "300"]) as other:
        try:
            assert not stand_still([one.pid])
            os.kill(one.pid, signal.SIGSTOP)
            os.waitpid(one.pid, os.WUNTRACED)
            assert stand_still([one.pid])
            assert not stand_still([one.pid, other.pid]), "one of them runs"
            os.kill(one.pid, signal.SIGCONT)
            os.waitpid(one.pid, os.WCONTINUED)
            assert not stand_still([one.pid])
        finally:
            one.kill()
            other.kill()
    assert not stand_still([one.pid]), "it has ended"
    assert not stand_still([]), "nothing is known of a server elsewhere"
