"""The exception for everything that the user can mend."""


class UserError(ValueError):
    """Bad input or a condition the user can mend: shown as one line, without a traceback."""
