"""The TPU chips of this machine, and the processes that hold them.

A chip belongs to one process at a time. These functions look at device files only, and open no
chip.
"""
import contextlib
import glob
import os
import sys
import time
from pathlib import Path

from nanoxla.errors import UserError

DEVICE_FILES = "/dev/accel[0-9]*", "/dev/vfio/[0-9]*"  # one per chip; which kind depends on the VM


def chips():
    """The device files of the chips, sorted."""
    return sorted(path for pattern in DEVICE_FILES for path in glob.glob(pattern))


def holders():
    """{process number: command line} of the other processes that have opened a chip. Processes of
    other users are not seen."""
    files, found = set(chips()), {}
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid() and not files.isdisjoint(open_files(process)):
            with contextlib.suppress(OSError):  # it has ended
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace").strip()
    return found


def open_files(process):
    """The paths that a process, a directory of /proc, has open. What may not be read is left
    out."""
    with contextlib.suppress(OSError):
        for path in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(path)


def check_free(seconds):
    """Raises UserError if other processes hold chips, and do not release them within so many
    seconds. After a kill -9 it takes a while until the chips are free."""
    deadline, announced = time.monotonic() + seconds, False
    while held := holders():
        if time.monotonic() > deadline:
            raise UserError(f"the TPU is in use by {describe(held)}. Wait until it ends, or end it "
                            f"with: kill {' '.join(map(str, held))}")
        if not announced:
            print(f"waiting up to {seconds} s for the TPU, in use by {describe(held)}",
                  file=sys.stderr, flush=True)
            announced = True
        time.sleep(0.5)


def describe(held):
    """The first of these holders, in words."""
    number, command = next(iter(held.items()))
    others = f" and {len(held) - 1} more" if len(held) > 1 else ""
    return f"process {number} ({command[:80]}){others}"
