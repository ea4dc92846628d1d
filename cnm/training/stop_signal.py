"""SIGINT and SIGTERM ask a run to stop after the update under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ECHO_SECONDS = 5.0  # in which a signal comes a second time from a launcher


class StopSignal:
    """The first signal is noted, the second one raises KeyboardInterrupt at once.

    Not so where it comes right behind the first among several processes: a terminal or service signals all of them, and
    torchrun its own once more.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self, *, quiet: bool, several: bool) -> None:
        self.received: int | None = None
        self.quiet = quiet
        self.several = several
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted in the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, _frame: object) -> None:
        if self.received is not None:
            if self.several and time.monotonic() - self._since < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.received, self._since = signum, time.monotonic()
        if not self.quiet:  # not through print: the signal may have come in the middle of one
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, b"\nsaving after this update; a second signal stops at once without saving\n")
