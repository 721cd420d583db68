import importlib.machinery
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from triton_embeddings import server_binary
from triton_embeddings.addresses import Addresses, claim_port
from triton_embeddings.errors import CommandError
from triton_embeddings.preflight import check_paths
from triton_embeddings.process import Child, Stop
from triton_embeddings.server_log import explain_exit

WRITE_PID = "import os, signal, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); "
STUBBORN = WRITE_PID + "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
MILD = WRITE_PID + "time.sleep(600)"


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pid_in(file):
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_what_does_not_end_is_killed_with_its_children(tmp_path):
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}, sys.argv[1]])"
    child = Child("x", [sys.executable, "-c", script, str(tmp_path / "pid")], os.environ)
    grandchild = pid_in(tmp_path / "pid")
    child.stop(0.2)
    assert child.exit_code is not None
    wait_until(lambda: not is_alive(grandchild))


def test_children_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, sys, time; from triton_embeddings.process import Child; Child('x', [sys.executable, "
        f"'-c', {MILD!r}, sys.argv[1]], os.environ); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "pid")])
    child = pid_in(tmp_path / "pid")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(child))


def test_set_up_that_is_stopped_stops_what_it_runs(tmp_path):
    """SIGTERM in the middle of an installation."""
    setup = tmp_path / "scripts" / "setup"
    setup.parent.mkdir()
    setup.write_text((ROOT / "scripts" / "setup").read_text())
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    # Stands in for the virtual environment's Python, and so for pip.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{MILD}" {tmp_path / "pid"}\n')
    python.chmod(0o755)
    code = (
        f"import importlib.machinery as m; s = m.SourceFileLoader('s', {str(setup)!r}).load_module(); "
        f"s.find_python = lambda: {str(python)!r}; s.main()"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.DEVNULL)
    child = pid_in(tmp_path / "pid")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    wait_until(lambda: not is_alive(child))
    assert not (tmp_path / ".venv" / ".ready").exists()


def load_setup(path):
    loader = importlib.machinery.SourceFileLoader("setup_script", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("setup_script", loader))
    loader.exec_module(module)
    return module


def test_an_activated_environment_is_not_made_anew_from_itself(tmp_path):
    """After `source .venv/bin/activate`, python3 is the environment's own."""
    load = "import importlib.machinery as m; setup = m.SourceFileLoader('s', 'scripts/setup').load_module(); "
    find = load + "print(setup.find_python())"
    command = [ROOT / ".venv" / "bin" / "python", "-W", "ignore", "-c", find]
    found = Path(subprocess.check_output(command, cwd=ROOT, text=True).strip())
    assert not found.is_relative_to(ROOT)
    before = (ROOT / ".venv" / ".ready").stat().st_mtime_ns
    made = subprocess.run(
        [ROOT / ".venv" / "bin" / "python", ROOT / "scripts" / "setup"], capture_output=True, check=True
    )
    assert made.stdout == b""
    assert (ROOT / ".venv" / ".ready").stat().st_mtime_ns == before


def test_set_up_runs_once_and_again_when_something_changed(tmp_path, monkeypatch):
    setup = load_setup(ROOT / "scripts" / "setup")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    venv, inputs, ran = tmp_path / ".venv", tmp_path / "inputs", []

    def run(text, commands, log):
        ran.append(text.split("] ")[1])
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()

    def prepare():
        ran.clear()
        setup.prepare(venv, lambda venv: [("packages", [])], [inputs])
        return list(ran)

    monkeypatch.setattr(setup, "run", run)
    inputs.write_text("1")
    assert prepare() == ["virtual environment", "packages"]
    assert prepare() == []
    inputs.write_text("2")
    assert prepare() == ["packages"]
    (venv / "bin" / "python").unlink()
    assert prepare() == ["virtual environment", "packages"]
    monkeypatch.setattr(setup, "ROOT", tmp_path / "moved")
    (tmp_path / "moved").mkdir()
    assert prepare() == ["virtual environment", "packages"]


def test_zero_is_any_free_port():
    port = claim_port("127.0.0.1", 0, "--port")
    assert port > 0
    assert claim_port("127.0.0.1", port, "--port") == port


def test_an_address_of_another_machine_is_explained():
    with pytest.raises(
        CommandError, match=r"192\.0\.2\.1 is no address of this machine; give another with --host"
    ):
        claim_port("192.0.2.1", 1, "--port")


def test_all_ports_that_cannot_be_used_are_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [listener.getsockname()[1] for listener in (one, two)]
        with pytest.raises(CommandError) as caught:
            Addresses("127.0.0.1", ports[0], 0, ports[1], 0).claim()
    assert re.fullmatch(
        rf"port {ports[0]} .* with --port; port {ports[1]} .* with --grpc-port", str(caught.value)
    )


def test_one_port_for_two_is_refused():
    port = claim_port("127.0.0.1", 0, "--port")
    with pytest.raises(
        CommandError, match=rf"--port and --http-port are both {port}; give one of them another"
    ):
        Addresses("127.0.0.1", port, port, 0, 0).claim()


def test_a_path_with_a_blank_is_refused(tmp_path):
    check_paths(tmp_path)
    with pytest.raises(CommandError, match=r"cannot work in .*/my models: move it to a path without blanks"):
        check_paths(tmp_path / "my models")


def test_the_second_signal_ends_the_children_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stop = Stop()
    child = stop.watch_over(Child("x", [sys.executable, "-c", "import time; time.sleep(600)"], os.environ))
    try:
        assert not stop.wait(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        assert child.exit_code is None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: child.exit_code is not None)
    finally:
        child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.wait(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_server_s_log_tells_which_model_failed(tmp_path):
    log = tmp_path / "server.log"
    log.write_text(
        "I1121 fine\n"
        'E1121 1 model_lifecycle.cc:642] "failed to load '
        "'org-x.y.encoder' version 1: Internal: TritonModelException: /m lacks 3 "
        '\\"weights\\"\\n\\nAt:\\n /x.py(1)"\n'
        "E1121 another\n"
    )
    text = explain_exit("tritonserver", 1, log)
    assert text.startswith('the model org-x.y cannot be loaded: /m lacks 3 "weights" (the server')
    assert str(log) in text
    assert explain_exit("gateway", 3, log).startswith("gateway ended with exit code 3")
    assert explain_exit("gateway", -6, log).startswith("gateway was killed by SIGABRT (")
    assert "SIGKILL, as the system does where memory runs out (" in explain_exit("gateway", -9, log)


def test_a_missing_libpython_names_the_package(monkeypatch):
    monkeypatch.setattr(server_binary.Path, "is_file", lambda self: False)
    with pytest.raises(
        CommandError, match=r"libpython3\.\d+\.so\.1\.0 is missing.*apt-get install libpython3\.\d+"
    ):
        server_binary._libpython_folder()


def test_without_any_server_the_way_to_one_is_told(monkeypatch):
    monkeypatch.setattr(server_binary, "_installed_server", lambda: None)
    monkeypatch.setattr(server_binary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install nvidia-pytriton==0\.7\.0"):
        server_binary.find_server()


def test_a_server_on_the_path_is_taken_and_our_own_command_is_not(tmp_path, monkeypatch):
    for folder, content in (("ours", b"#!/usr/bin/env python3\n"), ("theirs", b"\x7fELF...")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tritonserver").write_bytes(content)
        (tmp_path / folder / "tritonserver").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'ours'}:{tmp_path / 'theirs'}")
    server = server_binary.find_server()
    assert server.path == tmp_path / "theirs" / "tritonserver"
    assert server.arguments == ()


def test_an_entry_that_is_not_whole_is_named(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "E1 model_repository_manager.cc:703] Invalid argument: ensemble tiny contains models that are not "
        "available or ambiguous: tiny.tokens\n"
    )
    text = explain_exit("tritonserver", 1, log)
    assert text.startswith(
        "the model tiny is not whole: contains models that are not available or ambiguous: tiny."
    )
    assert "write it anew with triton-embeddings add" in text
