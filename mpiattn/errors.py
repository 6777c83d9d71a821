"""The errors that users meet."""


class InputError(ValueError):
    """Bad input, found before the first message; every rank raises the same."""


class WriteError(OSError):
    """A file that could not be written; it is not there, or as it was."""
