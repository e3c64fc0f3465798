"""What a user can mend: errors whose message says the value, why it is wrong and what to do.

The command line shows these in one line. Anything else that is raised is a fault of ours, and keeps its traceback, so
a library's error becomes one of these only where it is known what it means.
"""

from __future__ import annotations


class UserError(Exception):
    """The cause lies with what was given, or with the machine, and the message says what to do."""


class InputError(UserError, ValueError):
    """A value that cannot be used."""


class InputTypeError(UserError, TypeError):
    """A value of the wrong type."""


class NotFoundError(UserError, FileNotFoundError):
    """Something named is not there."""


class ExistsError(UserError, FileExistsError):
    """Something in the way, which is not overwritten."""


class EnvironmentFault(UserError, OSError):
    """The machine or the network refused: disk, permissions, Hub."""


class Interrupted(KeyboardInterrupt):
    """
    Stopped by a signal, in good order.

    Args:
        message (`str`): How to go on, in one line.
        code (`int`): What the command line exits with: 128 and the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
