"""What every HTTP request passes before its endpoint, one concern each, as plain ASGI."""
