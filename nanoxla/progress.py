"""On a terminal a progress bar with the time left; in a file or a pipe plain lines."""
import sys
import threading

from tqdm import tqdm

# By default tqdm makes a semaphore that is shared between processes. A process that exits abruptly
# would leave it behind, and Python would report a leak. A lock between threads is enough here.
tqdm.set_lock(threading.RLock())


class Progress(tqdm):
    """On a terminal a bar with an ETA; elsewhere one line every 30 seconds."""

    def __init__(self, total, unit, description, initial=0):
        self.plain = not sys.stderr.isatty()
        line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        super().__init__(total=total, initial=initial, unit=unit, desc=description,
                         unit_scale=True, leave=False, mininterval=30 if self.plain else 0.1,
                         bar_format=line if self.plain else None)

    def display(self, msg=None, pos=None):
        closing = msg == ""
        if not self.plain:
            super().display(msg, pos)
        elif self.n > self.initial and (not self.total or self.n < self.total) and not closing:
            print(self, file=sys.stderr, flush=True)


def note(line):
    """Prints a line on stderr, above the bar if there is one."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
