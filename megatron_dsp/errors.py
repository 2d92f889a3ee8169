"""The one error class of the package."""


class UsageError(ValueError):
    """Wrong input, found from arguments that are equal on all ranks, so every rank raises it.

    The message is one line that names the value, the rule and the fix. ``launch.run`` prints it once, without a
    traceback.
    """


class RankError(UsageError):
    """Wrong input that one rank alone may see, such as its own number. ``launch.run`` prints it with that rank's name."""
