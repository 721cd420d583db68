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

PREFIX = "triton_embeddings_1_ab_"
ENCODER, HEAD = "/m/tiny.encoder/1/model.py", "/m/tiny.dense/1/model.py"


@pytest.fixture
def server(monkeypatch):
    """Starts stages with their regions, in a folder of the kind that /dev/shm is."""
    processes = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        monkeypatch.setattr(dead_stages, "SHARED_MEMORY", folder)
        monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * MIB))
        monkeypatch.setattr(dead_stages, "_INTERVAL_S", 0)

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

    (server.folder / f"{PREFIX}never").write_bytes(b"x" * 30 * MIB)  # nobody was started with it
    encoder = server.start(ENCODER, f"{PREFIX}a", 20)
    server.start(HEAD, f"{PREFIX}b", 20)
    assert looks(5) == [None] * 5, "they live"
    end(encoder)
    assert looks(5) == [None] * 5, "it is not loaded anew, so that it may not be unloaded yet"
    second = server.start(ENCODER, f"{PREFIX}c")
    assert looks(1) == [None], "it has only just been"
    (told,) = set(looks(3))
    assert told == f"tritonserver does not give back 20 MiB of {server.folder} of a stage that died"
    end(second)
    assert looks(1) == [told], "that the next died too gives nothing back"
    (server.folder / f"{PREFIX}a").unlink()
    assert looks(3) == [None] * 3, "a control: it is gone"
    server.start(ENCODER, f"{PREFIX}d", 20)
    assert looks(4) == [None] * 4, "1 MiB of the second is not too much"


def test_many_small_ones_are_too_many_also_where_stages_die_at_each_look(server, monkeypatch):
    monkeypatch.setattr(dead_stages.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40))
    one = DeadStages(PREFIX)
    told = []
    for i in range(18):
        process = server.start(ENCODER, f"{PREFIX}{i}", 0)
        told.append(one.reason_for_another_server(server.group))
        end(process)
    assert told[:17] == [None] * 17
    assert "0 MiB" in told[17]
    assert "of 16 stages that died" in told[17]


def test_of_a_large_dev_shm_less_than_an_eighth_is_enough_and_one_without_a_size_has_a_bound(
    server, monkeypatch
):
    for total in (0, 2**40):
        monkeypatch.setattr(
            dead_stages.shutil, "disk_usage", lambda _, total=total: SimpleNamespace(total=total)
        )
        one = DeadStages(PREFIX)
        for name in "ab":
            process = server.start(ENCODER, f"{PREFIX}{name}{total}", 9)
            assert one.reason_for_another_server(server.group) is None
            end(process)
        server.start(ENCODER, f"{PREFIX}c{total}")
        assert [one.reason_for_another_server(server.group) for _ in range(3)] == [None] * 3
        monkeypatch.setattr(dead_stages, "_MOST_BYTES", 18 * MIB)
        assert "18 MiB" in one.reason_for_another_server(server.group)
        monkeypatch.undo()
        monkeypatch.setattr(dead_stages, "SHARED_MEMORY", server.folder)
        monkeypatch.setattr(dead_stages, "_INTERVAL_S", 0)


def test_another_servers_stages_and_strange_files_are_none_of_its_own(server):
    one = DeadStages(PREFIX)
    (server.folder / os.fsdecode(f"{PREFIX}\xff".encode("latin-1"))).touch()
    for name in "ab":
        other = server.start(ENCODER, f"{PREFIX}{name}", 20, group=0)
        assert one.reason_for_another_server(server.group) is None
        end(other)
    server.start(ENCODER, f"{PREFIX}c", 20, group=0)
    assert [one.reason_for_another_server(server.group) for _ in range(3)] == [None] * 3


def test_where_it_cannot_look_there_is_no_reason(server, monkeypatch):
    one = DeadStages(PREFIX)
    monkeypatch.setattr(dead_stages, "SHARED_MEMORY", server.folder / "none")
    assert one.reason_for_another_server(server.group) is None


def test_it_looks_now_and_then(server, monkeypatch):
    monkeypatch.setattr(dead_stages, "_INTERVAL_S", 3600)
    one, looks = DeadStages(PREFIX), []
    monkeypatch.setattr(one, "_look", looks.append)
    for _ in range(5):
        one.reason_for_another_server(server.group)
    assert looks == [server.group]
