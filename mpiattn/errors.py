"""The error that bad input raises."""


class InputError(ValueError):
    """Bad input, found before the first message; every rank raises the same."""
