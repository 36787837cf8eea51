"""The one exception for what the user must mend: shown without a traceback, exit code 2, never retried."""


class UserError(ValueError):
    """One line a problem: what is wrong, the value received, what is allowed, the next step."""
