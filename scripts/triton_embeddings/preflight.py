"""What is looked at before anything is started. Raises CommandError."""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.access import Access
from gateway.keys import UnusableKeys
from gateway.settings import Settings
from triton_embeddings.errors import CommandError


def check_packages() -> None:
    """Raises CommandError when another package of the same name hides one of ours."""
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not any((Path(place) / "packed_attention.py").is_file() for place in places):
        raise CommandError(
            "the package `kernels` of Hugging Face is installed and hides this project's own; "
            "take it away with: pip uninstall kernels"
        )


def check_paths(*paths: Path) -> None:
    """Raises CommandError for a path that the Python backend would cut at a blank: it starts its
    processes by a shell.
    """
    for path in paths:
        if any(character.isspace() for character in str(path.resolve())):
            raise CommandError(
                f"tritonserver cannot work in {path.resolve()}: move it to a path without blanks"
            )


def read_gateway_settings(flags: Mapping[str, Any]) -> Settings:
    """What the gateway will read, looked at before anything is started.

    `flags` stand on the command line, and win over the environment.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = (
            f"--{name.replace('_', '-')}" if name in flags else f"the environment's GATEWAY_{name.upper()}"
        )
        reason = first["msg"].removeprefix("Value error, ")
        # What stands in a key is nobody's business.
        shown = "wrong" if name.endswith(("_key", "_password")) else repr(first["input"])
        raise CommandError(f"{where} is {shown}: {reason[:1].lower()}{reason[1:]}") from error


def check_strangers(settings: Settings) -> Access:
    """The keys and the certificate that the gateway will read, looked at before anything is started."""
    try:
        access = Access(settings)
    except UnusableKeys as error:
        raise CommandError(str(error)) from error
    certificate, key = settings.tls_cert_file, settings.tls_key_file
    if key is not None and certificate is None:
        raise CommandError("GATEWAY_TLS_KEY_FILE is set, and GATEWAY_TLS_CERT_FILE is not: give both")
    if certificate is not None:
        try:
            # Never None: then somebody would have to sit there and type it.
            password = settings.tls_key_password.get_secret_value() if settings.tls_key_password else ""
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=password)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CommandError(
                f"the certificate {certificate} with the key {key or 'in it'} cannot be used: {reason}; both "
                "are PEM files, and a key with a password needs GATEWAY_TLS_KEY_PASSWORD"
            ) from error
    return access
