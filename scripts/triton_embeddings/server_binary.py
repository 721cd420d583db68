"""Finds tritonserver, and makes the one inside the nvidia-pytriton wheel usable from the command line.

Also the command `tritonserver` itself in an environment where the server comes from the wheel: it starts the
real binary with the same arguments, plus what the wheel's server cannot know: where its Python backend lies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton_embeddings.addresses import LOOPBACK
from triton_embeddings.errors import CommandError

_CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
_SCRATCH = "repository-"
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver that can be started."""

    path: Path
    arguments: tuple[str, ...]
    """What it must be told besides the arguments of a person."""
    environment: dict[str, str]
    """The whole environment that it runs in."""


def find_server() -> ServerBinary:
    """The tritonserver on PATH, in /opt/tritonserver, or inside the nvidia-pytriton wheel, in this order.

    Raises CommandError when there is none, or when its Python backend cannot run with this Python.
    """
    installed = _installed_server()
    if installed is not None:
        return ServerBinary(installed, (), _environment([]))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            "no tritonserver on PATH, in /opt/tritonserver or in this environment; install it with: pip "
            "install nvidia-pytriton==0.7.0 'numpy<2'"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    backends = _assemble_backends(root)
    libraries = [str(root.parent.parent / "nvidia_pytriton.libs"), str(_libpython_folder())]
    arguments = (f"--backend-directory={backends}",)
    return ServerBinary(root / "bin" / "tritonserver", arguments, _environment(libraries))


def state_directory() -> Path:
    """Where this environment keeps what it makes at run time: inside the environment, else in the
    temporary folder.
    """
    inside = Path(sys.prefix) / "var" / "triton-embeddings"
    try:
        inside.mkdir(parents=True, exist_ok=True)
    except OSError:
        outside = Path(tempfile.gettempdir()) / f"triton-embeddings-{os.getuid()}"
        outside.mkdir(mode=0o700, parents=True, exist_ok=True)
        return outside
    return inside


def scratch_directory() -> Path:
    """A folder's path for this process alone. What killed processes left behind is deleted first."""
    state = state_directory()
    for left in state.glob(f"{_SCRATCH}*"):
        if not Path(f"/proc/{left.name.removeprefix(_SCRATCH)}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return state / f"{_SCRATCH}{os.getpid()}"


def main() -> None:
    """The command `tritonserver`: becomes the real one.

    Listens on loopback unless the arguments say otherwise.
    """
    try:
        server = find_server()
    except CommandError as error:
        sys.stderr.write(f"tritonserver: {error}\n")
        sys.exit(1)
    given = sys.argv[1:]
    own = [*server.arguments, *(f"--{kind}-address={LOOPBACK}" for kind in ("http", "grpc", "metrics"))]
    names = {argument.split("=")[0] for argument in given}
    extra = [argument for argument in own if argument.split("=")[0] not in names]
    os.execve(server.path, [str(server.path), *extra, *given], server.environment)


def _installed_server() -> Path | None:
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for candidate in (*(folder / "tritonserver" for folder in folders), _CONTAINER):
        if candidate.is_file() and os.access(candidate, os.X_OK) and _is_binary(candidate):
            return candidate
    return None


def _is_binary(file: Path) -> bool:
    """Tells the real server from this package's own command of the same name."""
    with file.open("rb") as stream:
        return stream.read(len(_ELF)) == _ELF


def _assemble_backends(root: Path) -> Path:
    """A backends folder with this Python's stub beside the Python backend, where the server looks for it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(
            sorted((p.name for p in (root / "python_backend_stubs").iterdir()), key=_version_key)
        )
        raise CommandError(
            f"this server has no Python backend for Python {version}; make the environment with one "
            f"of {known}"
        )
    folder = state_directory() / "backends" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(f for f in (root / "backends" / "python").iterdir() if f.is_file()), stub):
        target = folder / source.name
        if target.is_file() and target.stat().st_size == source.stat().st_size and os.access(target, os.X_OK):
            continue
        # Another process may do the same at this moment: rename is atomic.
        temporary = folder / f".{source.name}.{os.getpid()}"
        shutil.copyfile(source, temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    return folder.parent


def _version_key(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _libpython_folder() -> Path:
    """Where this Python's shared library lies: the stub is linked to it."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    places += [f"{base}/{multiarch}" for base in ("/usr/lib", "/lib", "/usr/local/lib")] + [
        "/usr/lib64",
        "/usr/local/lib",
    ]
    for place in places:
        if place and (Path(place) / name).is_file():
            return Path(place)
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    raise CommandError(
        f"{name} is missing, which the server's Python backend needs; install it (Debian, Ubuntu: apt-get "
        f"install {package}) or use a Python that was built with --enable-shared"
    )


def _environment(libraries: list[str]) -> dict[str, str]:
    environment = dict(os.environ)
    # The stub takes the first Python on PATH, and with it this environment's packages.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.prefix) / "bin"), environment.get("PATH", os.defpath)]
    )
    if libraries:
        given = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *([given] if given else [])])
    # Large tensors go through fresh memory otherwise, page fault by page fault: measured 2 to 3 times slower.
    for name, value in {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TOP_PAD_": "268435456",
        # oneDNN keeps what it has compiled for a shape, 0.2 to 0.7 MB each, 1024 of them unless told: an
        # encoder with texts of all lengths had 2.4 GB after 40 minutes. There is room for those that come
        # again and again (backends.forward.row_size).
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512",
    }.items():
        environment.setdefault(name, value)
    return environment
