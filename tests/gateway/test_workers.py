"""The gateway as a process of its own, with several workers."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from tests.support.server import wait_until


def test_workers_share_a_port_and_end_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GATEWAY_PORT": str(port), "GATEWAY_WORKERS": "2"}
    gateway = subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, cwd=tmp_path)
    try:

        def health():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    return answer.status == 200
            except (urllib.error.URLError, ConnectionError):
                return False

        wait_until(health, "the gateway to answer")
        children = subprocess.check_output(
            ["ps", "--ppid", str(gateway.pid), "-o", "args=", "-ww"], text=True
        )
        assert children.count("multiprocessing.spawn") == 2
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) == 0
        assert not health()
    finally:
        gateway.kill()
        gateway.wait()
