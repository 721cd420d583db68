import os
import subprocess
import sys

from tests.conftest import ROOT

# As scripts/triton_embeddings/server_binary.py sets it for the stages.
KEEPS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
# Every second of 64 blocks of 4 MiB is freed; prints how much memory is held then, and after giving it back.
CODE = """
import re
import numpy as np
from backends.process_memory import give_back

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

blocks = [np.ones(2**22, np.uint8) for _ in range(64)]
del blocks[::2]
before = held()
give_back()
print(before, held())
"""


def test_what_lies_free_between_other_blocks_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={**os.environ, **KEEPS},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert before > 250, "else nothing was kept, and this shows nothing"
    assert before - after > 100
