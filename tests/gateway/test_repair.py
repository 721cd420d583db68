"""The lock that keeps two gateways from loading one stage."""

import os
import tempfile

import pytest

from gateway.repair import _lock


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"triton-embeddings-{os.getuid()}"


def test_one_at_a_time_and_each_entry_by_itself(folder):
    with (
        _lock("a:1", "m.encoder") as first,
        _lock("a:1", "m.encoder") as second,
        _lock("a:1", "m.x") as other,
    ):
        assert (first, second, other) == (True, False, True)
    with _lock("a:1", "m.encoder") as again:
        assert again
    assert (folder.stat().st_mode & 0o777, len(list(folder.iterdir()))) == (0o700, 2)


@pytest.mark.parametrize("trap", ["a link", "open to all", "a file", "read-only", "a link inside"])
def test_what_others_have_put_there_is_not_followed_and_repairs_go_on(
    folder, tmp_path, trap, caplog, monkeypatch
):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    if trap == "a link":
        folder.symlink_to(victim)
    elif trap == "a file":
        folder.touch()
    elif trap == "read-only":
        # Nobody makes a folder there, root neither.
        monkeypatch.setattr(tempfile, "tempdir", "/proc")
    else:
        folder.mkdir(0o700)
        if trap == "a link inside":
            (folder / "a:1-m.encoder.lock").symlink_to(victim / "file")
        else:
            folder.chmod(0o777)
    with _lock("a:1", "m.encoder") as is_ours:
        assert is_ours
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").read_text() == "precious"
    assert "may load m.encoder anew at once" in caplog.text
