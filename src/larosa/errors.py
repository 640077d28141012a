"""The one exception for mistakes a user can mend, and the commonest of them: a choice that there is not."""

from enum import StrEnum
from typing import TypeVar

Choice = TypeVar("Choice", bound=StrEnum)


class LarosaError(ValueError):
    """A mistake in the input: the message is one line that names the file, key or shape and the mend.

    The command line prints the message alone and exits with 1; every other exception is a defect.
    """


def choose(kind: type[Choice], value: str, name: str) -> Choice:
    """The choice of that value; `name` is what the message calls the kind.

    Raises:
        LarosaError: there is none.
    """
    try:
        return kind(value)
    except ValueError:
        raise LarosaError(f"unknown {name} '{value}': one of {', '.join(kind)}") from None
