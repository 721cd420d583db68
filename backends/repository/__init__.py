"""Writes and reads the model repository that the server is pointed at.

Needs neither torch nor transformers.
"""
