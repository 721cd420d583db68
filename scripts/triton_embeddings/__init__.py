"""The commands: add, remove and list models, and serve them."""
