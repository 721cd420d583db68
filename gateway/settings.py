"""What an operator may set; the only reader of the environment (GATEWAY_HOST, GATEWAY_PORT and so on)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gateway.image_hosts import ImageHosts

_TRACES = "/v1/traces"


class Settings(BaseSettings):
    """Read once at start, never changed afterwards."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(30000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    """Processes that answer HTTP on the port; what is limited is limited for each."""
    server: str = "127.0.0.1:8001"
    """host:port of the inference server's gRPC interface."""
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
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False
    """One log line for each request, which costs throughput."""
    server_metrics: str = ""
    """host:port of each server's own metrics, with commas between them; /metrics tells them too."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector that takes OTLP over HTTP, as http://localhost:4318; traces go to its
    /v1/traces. Empty is off.
    """
    multiprocess_folder: Path | None = Field(None, validation_alias="PROMETHEUS_MULTIPROC_DIR")
    """Where several workers keep the numbers for /metrics; made at start where there are several."""
    drain_timeout_s: int = Field(30, ge=1)
    """How long a stopping gateway waits for the requests that it has accepted."""

    @field_validator("image_hosts")
    @classmethod
    def _check_hosts(cls, text: str) -> str:
        ImageHosts.parse(text)
        return text

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(
                "it should be a URL that begins with http:// or https://, such as http://localhost:4318"
            )
        return url.rstrip("/").removesuffix(_TRACES)

    @property
    def traces_url(self) -> str:
        """Where spans go; empty where they go nowhere."""
        return self.otlp_endpoint + _TRACES if self.otlp_endpoint else ""

    @property
    def metrics_servers(self) -> list[str]:
        """host:port of each."""
        return [server.strip() for server in self.server_metrics.split(",") if server.strip()]

    @property
    def fetches_images(self) -> bool:
        """Whether images may be given as URLs of the web."""
        return self.allow_image_urls or not ImageHosts.parse(self.image_hosts).is_empty
