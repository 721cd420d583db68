"""What an operator may set; the only reader of the environment (GATEWAY_HOST, GATEWAY_PORT and so on)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gateway.admission import AdmissionLimits
from gateway.context import Lane
from gateway.image_hosts import ImageHosts

_TRACES = "/v1/traces"


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
    api_key: SecretStr | None = None
    """One key that opens everything but metrics and admin routes; `gateway/keys.py` says what a key is."""
    api_keys_file: Path | None = None
    """Keys of many clients, with what each may do; read anew when it changes."""
    admin_key: SecretStr | None = None
    """The operator's own: for /admin, which is off without it, and for /metrics."""
    metrics: bool | None = None
    """Whether /metrics is there; without it, where it has a key or the host is loopback."""
    starter_key: SecretStr | None = None
    """Set by the command that starts the gateway, which lists the models with it."""
    cors_origins: str = ""
    """Web pages of these origins may call the gateway: https://app.example.com, commas between them, or *."""
    tls_cert_file: Path | None = None
    """A PEM file with the certificate, and the chain behind it: HTTPS is spoken then."""
    tls_key_file: Path | None = None
    """Its private key, where that is not in the same file."""
    tls_key_password: SecretStr | None = None
    """Of that key, where it has one."""
    max_connections: int = Field(1000, ge=1)
    """Connections that are open at once; those beyond are told so with 503, and closed."""
    max_headers: int = Field(100, ge=1)
    """Header fields of one request."""
    max_header_bytes: int = Field(32 * 2**10, ge=1)
    """Of one request's first line and header fields; more is refused with 431."""
    header_timeout_s: float = Field(20.0, gt=0)
    """A client that has not sent its headers by then is cut off."""
    body_timeout_s: float = Field(300.0, gt=0)
    """Waiting for a client's body, in all; longer is refused with 408. And for it to take a large answer."""
    min_bytes_per_s: int = Field(512, ge=0)
    """Slower clients are cut off, those that send a body and those that read an answer."""
    progress_window_s: float = Field(20.0, gt=0)
    """What that is measured over."""
    max_body_bytes: int = Field(32 * 2**20, ge=1)
    """Larger request bodies are refused with 413."""
    max_body_bytes_total: int = Field(256 * 2**20, ge=1)
    """Of all bodies that are being read, in each gateway process; those that do not fit beside them are
    refused with 503. Of each the first 64 KiB are not counted.
    """
    max_text_bytes: int = Field(8 * 2**20, ge=1)
    """Of one text as UTF-8. What can matter of a text to a model is cut from it far below."""
    max_prompt_bytes: int = Field(64 * 2**10, ge=1)
    """Of a prompt or an instruction, which go with every text of a request."""
    max_items: int = Field(2048, ge=1)
    """Inputs of one request; OpenAI's own limit."""
    max_documents: int = Field(10_000, ge=1)
    """Documents of one rerank request, pairs of one for scores, texts of one to classify."""
    max_token_ids: int = Field(1_000_000, ge=1)
    """Token ids of one request, in all its items."""
    max_answer_bytes: int = Field(256 * 2**20, ge=1)
    """Numbers of one answer, before they are written as JSON: vectors of every token add up."""
    max_answer_bytes_total: int = Field(512 * 2**20, ge=1)
    """Of all answers until their clients have them, in each gateway process; those that do not fit beside
    them are refused with 503. Of each the first 256 KiB are not counted.
    """
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
    """A request that is not answered this long after it came fails with 504; it may ask for less time."""
    in_flight_budgets: float = Field(2.0, ge=0.5)
    """Token budgets of a model (--max-batch-tokens) that each server has at once, from each gateway process;
    the rest waits in the gateway. Short urgent requests may have a quarter of it besides.
    """
    interactive_share: float = Field(0.75, gt=0, lt=1)
    """Of a model's tokens, where interactive and bulk requests wait; the rest is of bulk requests."""
    max_queued_tokens: int = Field(250_000, ge=1)
    """Tokens of interactive requests that wait for a model, in each gateway process; more are refused with
    429, but for those who come back when they were told to, who may make it twice as much. About one for two
    bytes of text; of one request no more than half of the bound is counted.
    """
    max_queued_bulk_tokens: int = Field(2_000_000, ge=1)
    """The same of bulk requests."""
    max_queued_bytes: int = Field(256 * 2**20, ge=1)
    """Texts and images that wait for a model in each of the two lanes, in each gateway process; twice as
    much where those who were told to come back do.
    """
    canary_interval_s: float = Field(5.0, gt=0)
    """How often a model without traffic is asked whether it still answers."""
    patience_s: float = Field(60.0, gt=0)
    """How long a busy model may be silent before /ready doubts it; one that fails is told at once."""
    ping_interval_s: float = Field(0.5, gt=0)
    """How often every stage of every model is asked whether its process is there."""
    hang_timeout_s: float = Field(2.0, gt=0)
    """How long a stage that should answer at once may be silent before it is taken for dead; one that
    computes in the meantime has `patience_s`.
    """
    repair_wait_s: float = Field(30.0, ge=0)
    """How long after the loss of a model requests wait until it is back, before they fail with 503."""
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
    """How long a stopping gateway works on the requests that it has accepted; the rest gets 503."""

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
    def admission_limits(self) -> AdmissionLimits:
        """What of each model's work is let in."""
        return AdmissionLimits(
            self.in_flight_budgets,
            self.interactive_share,
            {Lane.INTERACTIVE: self.max_queued_tokens, Lane.BULK: self.max_queued_bulk_tokens},
            self.max_queued_bytes,
        )

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
