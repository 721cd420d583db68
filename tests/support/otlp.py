"""A collector that takes OTLP over HTTP, as the SDK (protobuf) and the server (JSON) send it."""

import base64
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]


@dataclass
class Collector:
    url: str
    spans: list[Span] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    """Content types that came."""

    def of_trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            kind = self.headers["Content-Type"].split(";")[0]
            assert self.path == "/v1/traces"
            made.spans += read(kind, body)
            made.kinds.add(kind)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(kind: str, body: bytes) -> list[Span]:
    """The spans of one export. In JSON ids are written in hexadecimal, in protobuf they are bytes."""
    if kind == "application/json":
        content = json.loads(body)
    else:
        message = ExportTraceServiceRequest.FromString(body)
        content = json_format.MessageToDict(message)
        for span in _spans(content):
            for name in ("traceId", "spanId", "parentSpanId"):
                span[name] = _hex(span.get(name, ""))
    return [
        Span(
            _attributes(resource["resource"]).get("service.name", ""),
            span["name"],
            span["traceId"].lower(),
            span["spanId"].lower(),
            span.get("parentSpanId", "").lower(),
            _attributes(span),
        )
        for resource in content["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def _spans(content: Any) -> Iterator[Any]:
    for resource in content["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            yield from scope["spans"]


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()


def _attributes(holder: Any) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in holder.get("attributes", [])}
