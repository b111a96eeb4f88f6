"""The one exception a user is meant to read: what was wrong, where, and what to do."""


class RotorError(Exception):
    """A mistake in the input or the environment. Commands print its text after `error: ` and exit with status 1."""
