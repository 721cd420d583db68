"""What `serve` tells other commands of this user while it serves: which repository its server looks at."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from triton_embeddings.errors import CommandError
from triton_embeddings.server_binary import state_directory


@contextlib.contextmanager
def noted(grpc_port: int, repository: Path) -> Iterator[None]:
    """While it lasts, the server with that port looks at that repository, and no other command may start one
    there: a port is free while the server that has it is started again, and gRPC shares one silently.

    Raises CommandError.
    """
    file = _note(grpc_port)
    descriptor = _open_alone(file, grpc_port)
    try:
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, json.dumps({"repository": str(repository.resolve()), "process": os.getpid()}).encode()
        )
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def repository_of(grpc_port: int) -> Path:
    """The repository of the server with that port. Raises CommandError."""
    try:
        said = json.loads(_note(grpc_port).read_bytes())
    except (FileNotFoundError, ValueError) as error:  # nothing stands in it yet
        raise CommandError(
            f"no server was started here with the gRPC port {grpc_port}; say which port it has with "
            "--grpc-port, or which repository it looks at with --model-repository"
        ) from error
    return Path(said["repository"])


def _open_alone(file: Path, grpc_port: int) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CommandError(
                f"another triton-embeddings serve has the gRPC port {grpc_port}, though nothing listens "
                f"there at the moment ({file} says which process it is); stop that, or give another port "
                "with --grpc-port"
            ) from None
        # Else it was another's, who has taken it away since it was opened.
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _note(grpc_port: int) -> Path:
    return state_directory() / f"serving-{grpc_port}.json"
