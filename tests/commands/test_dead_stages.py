"""Regions without a process, with real files and a real process."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.support.server import wait_until
from triton_embeddings import dead_stages
from triton_embeddings.dead_stages import DeadStages
from triton_embeddings.shared_memory import MIB

PREFIX = "triton_embeddings_1_"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dead_stages, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * MIB))
    monkeypatch.setattr(dead_stages, "_INTERVAL_S", 0)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(dead_stages, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def region(folder, name, mib=1):
    (folder / name).write_bytes(b"x" * mib * MIB)
    return folder / name


def test_a_region_counts_when_its_process_has_been_gone_for_a_while(folder, clock):
    one = DeadStages(PREFIX)
    large = region(folder, f"{PREFIX}a", 20)
    region(folder, "triton_embeddings_12_b", 60)  # another server's
    region(folder, f"{PREFIX}c")
    waits = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", waits, large.name], stdin=subprocess.PIPE, env=os.environ
    ) as process:
        wait_until(lambda: not one._without_process() & {large}, "the process's command line")
        for _ in range(10):
            clock.s += 60
            assert one.reason_for_another_server() is None, "it lives, and what is left has 1 MiB"
        process.kill()
        process.wait()
    assert one.reason_for_another_server() is None, "it has only just died"
    clock.s += 4
    assert one.reason_for_another_server() is None
    clock.s += 2
    reason = one.reason_for_another_server()
    assert reason == "tritonserver does not give back 21 MiB of /dev/shm of 2 stages that died".replace(
        "/dev/shm", str(folder)
    )
    large.unlink()
    assert one.reason_for_another_server() is None, "what is given back is forgotten"
    region(folder, large.name, 20)
    assert one.reason_for_another_server() is None, "and another of that name is new"


def test_many_small_ones_are_too_many_and_of_a_large_dev_shm_a_part_is_enough(folder, clock, monkeypatch):
    monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40))
    one = DeadStages(PREFIX)
    for i in range(31):
        (folder / f"{PREFIX}{i}").touch()
    clock.s += 1
    assert one.reason_for_another_server() is None
    clock.s += 60
    assert one.reason_for_another_server() is None
    (folder / f"{PREFIX}31").touch()
    assert one.reason_for_another_server() is None
    clock.s += 60
    assert "of 32 stages" in one.reason_for_another_server()
    monkeypatch.setattr(dead_stages, "_MOST_BYTES", 8 * MIB)
    two = DeadStages(PREFIX)
    region(folder, f"{PREFIX}0", 8)
    for i in range(1, 32):
        (folder / f"{PREFIX}{i}").unlink()
    assert two.reason_for_another_server() is None
    clock.s += 60
    assert "8 MiB" in two.reason_for_another_server()
    assert "of a stage that died" in two.reason_for_another_server()


def test_it_looks_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(dead_stages, "_INTERVAL_S", 3600)
    one, looks = DeadStages(PREFIX), []
    monkeypatch.setattr(one, "_without_process", lambda: looks.append(time.monotonic()) or set())
    for _ in range(5):
        one.reason_for_another_server()
    assert len(looks) == 1
