"""Everything that runs inside the server's Python backend, or that writes the model repository's entries."""
