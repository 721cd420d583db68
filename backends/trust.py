"""Whether code that a checkpoint brings may run."""

from __future__ import annotations

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.options import ServingOptions


def check_trust(checkpoint: Checkpoint, head: str, options: ServingOptions) -> None:
    """Raises CheckpointError when the head would run code of the checkpoint and nobody has allowed that."""
    own = [module for module in checkpoint.modules if module.code is not None]
    if head == "dense" and own and not options.trust_remote_code:
        raise CheckpointError(
            f"{checkpoint.path}/modules.json names {own[0].kind}, a class in {own[0].code}: code that the "
            "checkpoint brings. Read it, and give --trust-remote-code if it may run"
        )
