"""Environment variables that break torch_xla, or that silently change what it computes."""
import os

from nanoxla.errors import UserError


def mend_environment():
    """Kaggle's image sets TPU_PROCESS_ADDRESSES=local. Then the 8 processes of a TPU v5e-8 do not
    find one another ("Could not find SliceBuilder port"). Without the two variables they do."""
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
    """For the workers that are about to start. XLA's CPU backend allocates its buffers anew in
    each step, and huge memory pages make a step a tenth faster. (Read by the C library of a new
    process.)"""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
