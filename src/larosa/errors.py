"""The one exception for mistakes a user can mend."""


class LarosaError(ValueError):
    """A mistake in the input: the message is one line that names the file, key or shape and the mend.

    The command line prints the message alone and exits with 1; every other exception is a defect.
    """
