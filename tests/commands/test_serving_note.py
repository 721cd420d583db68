"""What serve tells other commands, with real processes."""

import subprocess
import sys

import pytest

from triton_embeddings import serving_note
from triton_embeddings.errors import CommandError
from triton_embeddings.serving_note import noted, repository_of


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_note, "state_directory", lambda: tmp_path)


def test_other_commands_find_the_repository_while_it_is_served(tmp_path):
    with noted(8001, tmp_path / "models"), noted(8101, tmp_path / "others"):
        assert repository_of(8001) == tmp_path / "models"
        assert repository_of(8101) == tmp_path / "others"
    with pytest.raises(CommandError, match="no server was started here with the gRPC port 8001; say which"):
        repository_of(8001)
    (tmp_path / "serving-8001.json").touch()
    with pytest.raises(CommandError, match="no server was started here"):
        repository_of(8001)


def test_a_port_has_one_server(tmp_path):
    with noted(8001, tmp_path):
        with pytest.raises(CommandError, match="another triton-embeddings serve has the gRPC port 8001"):
            noted(8001, tmp_path).__enter__()
        with noted(8002, tmp_path):
            assert repository_of(8001) == repository_of(8002)
    with noted(8001, tmp_path / "next"):
        assert repository_of(8001) == tmp_path / "next"


def test_a_killed_one_leaves_the_port_free(tmp_path):
    code = (
        "import os, signal, pathlib; from triton_embeddings import serving_note as n; "
        f"n.state_directory = lambda: pathlib.Path({str(tmp_path)!r}); "
        f"note = n.noted(8001, pathlib.Path({str(tmp_path)!r})); note.__enter__(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert repository_of(8001) == tmp_path, "nobody took it away"
    with noted(8001, tmp_path / "next"):
        assert repository_of(8001) == tmp_path / "next"
