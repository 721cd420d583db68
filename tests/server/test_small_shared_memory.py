"""Where /dev/shm is as small as Docker makes it. Figures are printed (-s)."""

import numpy as np
import pytest

from tests.support.checkpoints import sentence_transformer
from tests.support.load import tell
from tests.support.server import COMMAND, serve

# As a container has it that nobody gave more.
SIZE = "64m"
pytestmark = pytest.mark.timeout(900)
MOUNT = f"mount -t tmpfs -o size={SIZE} tmpfs /dev/shm"


def test_all_stages_and_large_requests_within_64_mb(tmp_path):
    """A mount of this process's own; it takes the rights of root, or a user namespace."""
    checkpoint = sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})
    command = ("unshare", "--mount", "sh", "-c", f'{MOUNT} && exec "$@"', "sh", COMMAND, "serve")
    with serve(tmp_path / "output", checkpoint, "--dtype", "float32", command=command) as serving:
        texts = [f"text {i} of a long list of words that takes room " * 8 for i in range(2048)]
        status, body = serving.post({"model": "tiny", "input": texts[:1], "truncate": True})
        assert status == 200, body
        alone = np.array(body["data"][0]["embedding"])
        status, body = serving.post({"model": "tiny", "input": texts, "truncate": True})
        tell(f"\n2048 texts with {SIZE} of /dev/shm: {status} {str(body)[:200]}")
        assert status == 200
        assert np.allclose(np.array(body["data"][0]["embedding"]), alone, atol=1e-4)
        tokens = {"model": "tiny", "inputs": texts[:512], "truncate": True}
        status, body = serving.post(tokens, "/embed_all")
        tell(f"all vectors of 512 texts with {SIZE} of /dev/shm: {status} {str(body)[:200]}")
        assert status in (200, 413, 503)
        status, body = serving.post({"model": "tiny", "input": texts[:1], "truncate": True})
        assert status == 200, body
        assert np.allclose(np.array(body["data"][0]["embedding"]), alone, atol=1e-4)
        assert serving.stop(90) == 0
