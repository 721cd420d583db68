"""One file for each kernel. They take tensors and know nothing of the rest of the project."""
