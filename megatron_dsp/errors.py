"""The one error class of the package."""


class UsageError(ValueError):
    """Wrong input, found from arguments that are equal on all ranks, so every rank raises it.

    The message is one line that names the value, the rule and the fix. ``launch.run`` prints it once, without a
    traceback.
    """
