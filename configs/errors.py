"""The one exception for problems that the user must fix: no traceback, exit code 2, never retried."""


class UserError(ValueError):
    """One line for each problem: what is wrong, the value received, what is allowed, the next step."""
