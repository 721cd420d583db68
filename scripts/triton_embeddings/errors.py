"""The error of the commands."""


class CommandError(Exception):
    """One line for a person: the cause, and the flag or step that mends it."""
