"""Regions and processes of stages, with real files and real processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.server import wait_until
from triton_embeddings import dead_stages
from triton_embeddings.dead_stages import DeadStages
from triton_embeddings.shared_memory import MIB

PREFIX = f"triton_embeddings_{os.getpid()}_ab_"
ENCODER, HEAD = "/m/tiny.encoder/1/model.py", "/m/tiny.dense/1/model.py"


@pytest.fixture
def server(monkeypatch):
    """Starts stages with their regions, in a folder of the kind that /dev/shm is."""
    processes = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        monkeypatch.setattr(dead_stages, "SHARED_MEMORY", folder)
        monkeypatch.setattr(
            dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=8 * MIB, free=4 * MIB)
        )
        monkeypatch.setattr(dead_stages, "_INTERVAL_S", 0)
        monkeypatch.setattr(dead_stages, "_PAUSE_S", 0)

        def start(stage, region, mib=1, group=None):
            (folder / region).write_bytes(b"x" * int(mib * MIB))
            code = "import sys; sys.stdin.read()"
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", code, stage, region, "1048576"],
                stdin=subprocess.PIPE,
                env=os.environ,
                process_group=os.getpgid(0) if group is None else group,
            )
            processes.append(process)
            said = Path(f"/proc/{process.pid}/cmdline")
            wait_until(lambda: region.encode() in said.read_bytes(), "its command line")
            return process

        yield SimpleNamespace(folder=folder, start=start, group=os.getpgid(0))
        for process in processes:
            process.kill()
            process.communicate()


def end(process):
    process.kill()
    process.wait()


def test_a_region_counts_when_its_stage_has_died_and_was_loaded_anew(server):
    one = DeadStages(PREFIX)

    def looks(times):
        return [one.reason_for_another_server(server.group) for _ in range(times)]

    (server.folder / f"{PREFIX}never").write_bytes(b"x" * 3 * MIB)  # nobody was started with it
    encoder = server.start(ENCODER, f"{PREFIX}a", 2)
    server.start(HEAD, f"{PREFIX}b", 2)
    assert looks(5) == [None] * 5, "they live"
    end(encoder)
    assert looks(9) == [None] * 9, "it is not loaded anew, so that it may not be unloaded yet"
    second = server.start(ENCODER, f"{PREFIX}c", 0.5)
    assert looks(1) == [None], "it has only just been"
    (told,) = set(looks(3))
    assert (
        told == f"tritonserver does not give back 2 MiB of {server.folder}, and threads, of a stage that died"
    )
    end(second)
    assert looks(1) == [told], "that the next died too gives nothing back"
    (server.folder / f"{PREFIX}a").unlink()
    assert looks(3) == [None] * 3, "a control: it is gone"
    server.start(ENCODER, f"{PREFIX}d", 2)
    assert looks(4) == [None] * 4, "half a MiB of the second is not too much"


def test_where_there_is_no_room_for_another_it_counts_without(server, monkeypatch):
    one = DeadStages(PREFIX)
    encoder = server.start(ENCODER, f"{PREFIX}a", 2)
    monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=8 * MIB, free=MIB))
    assert [one.reason_for_another_server(server.group) for _ in range(9)] == [None] * 9, "it lives"
    end(encoder)
    *before, told = (one.reason_for_another_server(server.group) for _ in range(4))
    assert before == [None] * 3
    assert "give back 2 MiB" in told


def test_many_small_ones_are_too_many_also_where_stages_die_at_each_look(server, monkeypatch):
    large = SimpleNamespace(total=2**40, free=2**39)
    monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: large)
    one = DeadStages(PREFIX)
    told = []
    for i in range(18):
        # Two processes of one stage are one death.
        both = [server.start(ENCODER, f"{PREFIX}{i}.{j}", 0) for j in range(2)]
        told.append(one.reason_for_another_server(server.group))
        for process in both:
            end(process)
    assert told[:17] == [None] * 17
    assert "of 16 stages that died" in told[17]


@pytest.mark.parametrize("total", [0, 2**40])
def test_of_a_large_dev_shm_less_than_an_eighth_is_enough_and_one_without_a_size_has_a_bound(
    server, monkeypatch, total
):
    monkeypatch.setattr(
        dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=total, free=total // 2)
    )
    one = DeadStages(PREFIX)
    for name in "ab":
        process = server.start(ENCODER, f"{PREFIX}{name}")
        assert one.reason_for_another_server(server.group) is None
        end(process)
    server.start(ENCODER, f"{PREFIX}c")
    assert [one.reason_for_another_server(server.group) for _ in range(3)] == [None] * 3
    monkeypatch.setattr(dead_stages, "_MOST_BYTES", 2 * MIB)
    assert "2 MiB" in one.reason_for_another_server(server.group)


def test_another_servers_stages_and_strange_files_are_none_of_its_own(server):
    one = DeadStages(PREFIX)
    (server.folder / os.fsdecode(f"{PREFIX}\xff".encode("latin-1"))).touch()
    for name in "ab":
        other = server.start(ENCODER, f"{PREFIX}{name}", 2, group=0)
        assert one.reason_for_another_server(server.group) is None
        end(other)
    server.start(ENCODER, f"{PREFIX}c", 2, group=0)
    assert [one.reason_for_another_server(server.group) for _ in range(3)] == [None] * 3


def test_where_it_cannot_look_there_is_no_reason(server, monkeypatch):
    one = DeadStages(PREFIX)
    monkeypatch.setattr(dead_stages, "SHARED_MEMORY", server.folder / "none")
    assert one.reason_for_another_server(server.group) is None


def test_it_looks_now_and_then_and_is_heeded_once_a_minute(server, monkeypatch):
    monkeypatch.setattr(dead_stages, "_INTERVAL_S", 3600)
    one, looks = DeadStages(PREFIX), []
    monkeypatch.setattr(one, "_look", looks.append)
    for _ in range(5):
        one.reason_for_another_server(server.group)
    assert looks == [server.group]
    monkeypatch.setattr(dead_stages, "_INTERVAL_S", 0)
    monkeypatch.setattr(dead_stages, "_PAUSE_S", 3600)
    two = DeadStages(PREFIX)
    monkeypatch.setattr(two, "_look", lambda _: "too much")
    assert [two.reason_for_another_server(server.group) for _ in range(3)] == ["too much", None, None]
