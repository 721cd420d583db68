"""What an operator may set; the only reader of the environment (GATEWAY_HOST, GATEWAY_PORT and so on)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gateway.image_hosts import ImageHosts


class Settings(BaseSettings):
    """Read once at start, never changed afterwards."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(30000, ge=0, le=65535)
    reuse_port: bool = False
    """Whether other gateways with this setting may listen on the same port, so that one takes over from
    another.
    """
    workers: int = Field(1, ge=1, le=64)
    """Processes that answer HTTP on the port; what is limited is limited for each."""
    server: str = "127.0.0.1:8001"
    """host:port of the inference server's gRPC interface; of several, with commas between them."""
    max_body_bytes: int = Field(32 * 2**20, ge=1)
    """Larger request bodies are refused with 413."""
    max_items: int = Field(2048, ge=1)
    """Inputs of one request; OpenAI's own limit."""
    max_documents: int = Field(10_000, ge=1)
    """Documents of one rerank request, pairs of one for scores, texts of one to classify."""
    max_token_ids: int = Field(1_000_000, ge=1)
    """Token ids of one request, in all its items."""
    max_answer_bytes: int = Field(256 * 2**20, ge=1)
    """Numbers of one answer, before they are written as JSON: vectors of every token add up."""
    max_tokenize_bytes: int = Field(256 * 2**10, ge=1)
    """Text of one request to /tokenize, whose answer is a hundred times larger."""
    max_products: int = Field(10**11, ge=1)
    """Multiplications of one request for similarities: seconds of a processor."""
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    """Of one encoded image file, sent or fetched."""
    allow_image_urls: bool = False
    """Whether images are fetched from the web, where they have public addresses."""
    image_hosts: str = ""
    """The only hosts that images are fetched from, with commas between them; `gateway/image_hosts.py` reads
    them. Any entry allows it.
    """
    image_timeout_s: float = Field(10.0, gt=0)
    """Of one fetch, with its redirects."""
    images_timeout_s: float = Field(30.0, gt=0)
    """Of all images of one request, waiting for a turn included."""
    max_image_redirects: int = Field(3, ge=0)
    request_timeout_s: float = Field(300.0, gt=0)
    """After this long without an answer from the server a request fails with 504."""
    canary_interval_s: float = Field(5.0, gt=0)
    """How often a model without traffic is asked whether it still answers."""
    patience_s: float = Field(60.0, gt=0)
    """How long a busy model may be silent before /ready doubts it; one that fails is told at once."""
    admin: bool = False
    """Whether models can be added, replaced and removed over HTTP (/admin/models): by everybody who can reach
    the gateway.
    """
    ping_interval_s: float = Field(0.5, gt=0)
    """How often every stage of every model is asked whether its process is there."""
    hang_timeout_s: float = Field(2.0, gt=0)
    """How long a stage that should answer at once may be silent before it is taken for dead; one that
    computes in the meantime has `patience_s`.
    """
    repair_wait_s: float = Field(30.0, ge=0)
    """How long after the loss of a model requests wait until it is back, before they fail with 503."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_timeout_s: int = Field(30, ge=1)
    """How long a stopping gateway works on the requests that it has accepted; the rest gets 503."""

    @field_validator("image_hosts")
    @classmethod
    def _check_hosts(cls, text: str) -> str:
        ImageHosts.parse(text)
        return text

    @field_validator("server")
    @classmethod
    def _check_server(cls, text: str) -> str:
        for address in text.split(","):
            host, _, port = address.strip().rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(
                    f"{address.strip()!r} is no host:port; with several, put commas between them"
                )
        return text

    @property
    def servers(self) -> list[str]:
        """host:port of each inference server."""
        return [address.strip() for address in self.server.split(",")]

    @property
    def fetches_images(self) -> bool:
        """Whether images may be given as URLs of the web."""
        return self.allow_image_urls or not ImageHosts.parse(self.image_hosts).is_empty
