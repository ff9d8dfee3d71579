"""Environment variables that break torch_xla, silently change what it computes, or make it
faster."""
import os

from nanoxla.errors import UserError


def mend_environment():
    """Removes TPU_PROCESS_ADDRESSES and CLOUD_TPU_TASK_ID if the former is "local", as Kaggle's
    image sets it. With them, the 8 processes of a TPU v5e-8 do not find one another ("Could not
    find SliceBuilder port")."""
    if os.environ.get("TPU_PROCESS_ADDRESSES") == "local":
        for name in ("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID"):
            os.environ.pop(name, None)


def check_environment():
    """Raises UserError if a variable would make torch_xla replace float32 by bfloat16
    everywhere."""
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise UserError(
                f"{name} is set: it silently makes weights, moments and loss bfloat16. Unset it; "
                "dtype=bfloat16 computes in bfloat16 and keeps those in float32")


def use_huge_pages():
    """Makes the processes started from now on use huge memory pages. XLA's CPU backend allocates
    its buffers anew in each step, and huge pages make a step a tenth faster. (The C library reads
    the variable when a process starts.)"""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
