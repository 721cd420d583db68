"""The gateway as a process of its own, with several workers."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from tests.support.server import wait_until


def check_that_one_scrape_tells_of_all(url):
    """Whichever worker answers, health checks that others answered are in its numbers."""

    def scrape():
        # A connection each: the workers take them in turn.
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            return answer.read().decode()

    def count(text):
        found = re.search(r'^triton_embeddings_requests_total\{.*"/health".* (\d+)\.0$', text, re.MULTILINE)
        return int(found[1])

    before = count(scrape())
    for _ in range(20):
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    scrapes = [scrape() for _ in range(10)]
    assert [count(text) for text in scrapes] == [before + 20] * 10
    assert all("\ntriton_embeddings_server_up 0.0\n" in text for text in scrapes), "there is no server"


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
        check_that_one_scrape_tells_of_all(f"http://127.0.0.1:{port}")
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
