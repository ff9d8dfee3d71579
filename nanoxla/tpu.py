"""The TPU chips of this machine: which kind they are, and which processes hold them.

A chip belongs to one process at a time. These functions look at files of the system only, and open
no chip.
"""
import contextlib
import glob
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from nanoxla.errors import UserError

DEVICE_FILES = "/dev/accel[0-9]*", "/dev/vfio/[0-9]*"  # one per chip; which kind depends on the VM
PCI_DEVICES = Path("/sys/bus/pci/devices")


class Kind(NamedTuple):
    """A kind of TPU whose chips have one core each."""
    accelerator: str  # what torch_xla and libtpu call it: "v6e" in "v6e-8", which has 8 chips
    pci_ids: tuple  # of vendor and device, as torch_xla knows them
    peak: float  # FLOP/s in bfloat16
    flops_per_cycle: int  # of all matrix units together
    memory: float  # bytes/s of the main memory (HBM)
    hbm: float  # GiB of it that the compiler gives to a program
    link: float  # bytes/s between two chips, both directions together

    @property
    def clock(self):
        """Hz"""
        return self.peak / self.flops_per_cycle


# Peak and memory: https://docs.cloud.google.com/tpu/docs/v5e and .../v6e. Links:
# https://jax-ml.github.io/scaling-book/tpus. That book gives a v5e 1.5 GHz. For a v6e no clock is
# published, and the number of its units is: once 4, now 2. libtpu 0.0.21 counts on 4: it expects a
# product of 4,096 x 4,096 x 4,096 to take fewer cycles than 2 units would need.
KINDS = {
    "v5e": Kind("v5litepod", ("0x1ae0", "0x0063"), peak=197e12, flops_per_cycle=4 * 128 * 128 * 2,
                memory=819e9, hbm=15.75, link=90e9),
    "v6e": Kind("v6e", ("0x1ae0", "0x006f"), peak=918e12, flops_per_cycle=4 * 256 * 256 * 2,
                memory=1_638e9, hbm=31.5, link=180e9),
}


def kind():
    """The key in KINDS of this machine's chips, or None: it has none, or others."""
    for directory in PCI_DEVICES.glob("*"):
        ids = tuple((directory / name).read_text().strip() for name in ("vendor", "device"))
        for name, each in KINDS.items():
            if each.pci_ids == ids:
                return name
    return None


def peak_flops(config):
    """The peak of a core in FLOP/s: as the config says, or else that of this machine's chips. None
    if neither is known."""
    if config.peak_tflops:
        return 1e12 * config.peak_tflops
    name = kind()
    return KINDS[name].peak if name else None


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
