"""One run owns its out_dir: a second one, started by mistake, is refused.

Core 0, which writes everything, holds a lock on the file out_dir/lock. The operating system
releases the lock when the process ends, even by kill -9, so no lock has to be removed by hand.
"""
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from nanoxla.errors import UserError
from nanoxla.files import try_lock

PATIENCE = 5  # seconds: after a kill -9 of the main process, a worker may still be ending


def own(out_dir):
    """Makes this process the owner of out_dir, until it ends or closes the file returned here.
    Raises UserError if another process is the owner."""
    path = Path(out_dir, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    wait_until(lambda: lock_or_warn(file), out_dir)
    file.truncate(0)
    main = multiprocessing.parent_process()  # the command that the user started, or None: this one
    file.write(f"process {main.pid if main else os.getpid()} on {socket.gethostname()}, started "
               f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def check_not_owned(out_dir):
    """Raises UserError if another process owns out_dir."""
    wait_until(lambda: holder(out_dir) is None, out_dir)


def wait_until(free, out_dir):
    """Waits until free() is true. Raises UserError if it is still false after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not free():
        if time.monotonic() > deadline:
            raise UserError(f"another run is writing to out_dir {out_dir}: {holder(out_dir)}. Stop "
                            "that run, wait for its end, or choose another out_dir")
        time.sleep(0.1)


def holder(out_dir):
    """The process that owns out_dir, in words, or None."""
    try:
        with Path(out_dir, "lock").open("r+") as file:
            return None if lock_or_warn(file) else file.read()
    except OSError:  # there is no such file, or it may not be written
        return None


def lock_or_warn(file):
    """try_lock, but also true, after a warning, on a disk that knows no locks."""
    try:
        return try_lock(file)
    except OSError as error:  # some network disks
        print(f"warning: {file.name} can't be locked ({error.strerror}): make sure that no other "
              "run uses this out_dir", file=sys.stderr)
    return True
