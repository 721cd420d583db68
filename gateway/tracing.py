"""OpenTelemetry: FastAPI makes a span of each request, which goes on in the server's stages.

Off, nothing of the SDK is imported. On, spans go over OTLP/HTTP to GATEWAY_OTLP_ENDPOINT; the SDK's own
variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS ...) hold besides. A request
with a `traceparent` continues that trace, and unless the sampler says otherwise is traced if that is. What
the gateway traces the server traces, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from gateway.context import RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# Of probes nobody wants to read.
_UNTRACED = frozenset({"/health", "/ready", "/metrics"})
_SERVICE_NAME = "triton-embeddings-gateway"


def make_provider(url: str) -> TracerProvider:
    """Sends spans to a URL such as http://collector:4318/v1/traces."""
    # Not before somebody wants them.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    resource = Resource({"service.name": _SERVICE_NAME}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
    return provider


def fastapi_options(provider: TracerProvider | None) -> dict[str, Any]:
    """FastAPI's own `telemetry`: one span for each request, and nothing of what it holds."""
    return {
        "tracing": provider is not None,
        "tracer_provider": provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": _is_untraced,
    }


def begin(context: RequestContext) -> None:
    """Names the request in its span, and the span in what is sent to the server."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attribute("request.id", context.request_id)
    if context.scope.get("query_string"):
        # FastAPI has put it there; it may be text of a user.
        span.set_attribute("url.query", "REDACTED")
    own = span.get_span_context()
    context.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"


def describe(context: RequestContext) -> None:
    """Puts what is known of the request into its span."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    if context.model:
        span.set_attribute("gen_ai.request.model", context.model)
    for phase, seconds in context.phases.items():
        span.set_attribute(f"phase.{phase}_ms", round(1000 * seconds, 3))


def _is_untraced(scope: MutableMapping[str, Any] | Mapping[str, Any]) -> bool:
    return scope["type"] != "http" or scope["path"] in _UNTRACED
