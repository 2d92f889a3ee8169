"""The error class of everything that reads data."""


class DataError(ValueError):
    """Data that cannot be used: the message names the file or folder, the rule and the fix, in one line."""
