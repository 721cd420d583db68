"""The HTTP gateway: turns requests in the dialects that clients speak into calls of the inference server."""
