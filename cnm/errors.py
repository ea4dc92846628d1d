"""The errors that the command line reports in one line, with exit code 2."""

import re

# Characters that would end a line or move the cursor, if a message quotes a name from a file.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave (a file, a row, an option) is wrong.

    The message is one line that names the file or option, the item, what was found and what to do; control characters
    in what it quotes are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message))
