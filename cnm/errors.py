"""What the command line turns into one line and exit code 2."""


class InputError(ValueError):
    """Something the user gave (a file, a row, an option) is wrong.

    The message is one line that names the file or option, the item, what was found and what to do.
    """
