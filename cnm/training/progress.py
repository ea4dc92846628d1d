"""Progress for people: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0  # at least this long between two plain lines


class Progress:
    """Progress through ``total`` updates, on standard error.

    Args:
        total: updates of the whole run.
        done: updates made before, by the run that is resumed.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.total = total
        self.done = self.first = done
        self.quiet = quiet
        self.started = self.last_line = time.monotonic()
        self.figures: dict[str, str] = {}  # the latest
        self.bar: tqdm | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="update", dynamic_ncols=True, smoothing=0.1)

    def advance(self, epoch: str, figures: dict[str, str] | None = None) -> None:
        """One update is done. ``figures`` come where they are fresh: loss, learning rate, samples/s."""
        self.done += 1
        if self.quiet:
            return
        self.figures = figures or self.figures
        first = self.done == self.first + 1
        if self.bar is not None:
            self.bar.set_description(epoch, refresh=False)
            if figures:
                self.bar.set_postfix(figures, refresh=False)
            self.bar.update()
        elif first or time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / (self.done - self.first) * (self.total - self.done)
            shown = [epoch, f"update {self.done}/{self.total}"]
            shown += [f"{name} {value}" for name, value in self.figures.items()]
            self.say("  ".join([*shown, f"{tqdm.format_interval(left)} left"]))

    def say(self, line: str) -> None:
        """A line for the user, above the bar where there is one."""
        if self.quiet:
            return
        try:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        except OSError:  # a pipe that nobody reads any more, a full disk: no reason to stop training
            self.quiet = True

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
