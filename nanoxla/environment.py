"""Environment variables that break torch_xla, change what it computes, or slow it down.

A command that a notebook starts inherits whatever earlier cells, the image and other people's
recipes have set.
"""
import mmap
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from nanoxla import tpu
from nanoxla.errors import UserError

REMOVED = (
    # torch_xla sets these for each worker, but keeps a value that is there already. Then all
    # workers get the same one: all open chip 0, or wait for each other at the wrong address.
    "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_PORT", "CLOUD_TPU_TASK_ID", "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES", "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "PJRT_LOCAL_PROCESS_RANK", "PJRT_LOCAL_PROCESS_COUNT",
    # Every worker would be core 0 of a run of its own.
    "XLA_USE_SPMD", "XLA_AUTO_SPMD",
    # Other graphs than the tested ones: a crash, wrong results, twice the memory.
    "XLA_USE_EAGER_DEBUG_MODE", "XLA_DISABLE_FUNCTIONALIZATION", "XLA_NO_SPECIAL_SCALARS",
    "XLA_ENABLE_PARAM_ALIASING", "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB",
    # A TPU cannot read this cache, only fill the disk with it.
    "XLA_PERSISTENT_CACHE_PATH",
    # Attention kernels that JAX cannot lower, or libtpu cannot compile.
    "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_JIT",
)
SLOW = ("PT_XLA_DEBUG", "PT_XLA_DEBUG_LEVEL", "XLA_IR_DEBUG", "XLA_HLO_DEBUG", "XLA_SYNC_WAIT",
        "XLA_SAVE_TENSORS_FILE", "XLA_EMIT_STEPLOG", "XLA_TPU_MAX_INFLIGHT_COMPUTATIONS")

# On a v5e, XLA may use 22 MiB of the on-chip memory (VMEM) for one operation; by default it is 16.
# By the compiler's estimate, a step of config/fwedu_124m.py gets 2 % shorter (docs/tuning.md).
VMEM_LIMIT = "--xla_tpu_scoped_vmem_limit_kib=22528"


def mend_environment(environment=os.environ):
    """Removes or replaces variables that would break a run, and prints a note if there were any.
    Call it before torch_xla is imported: it reads most of them only then."""
    in_metadata = environment.get("TPU_SKIP_MDS_QUERY", "") in ("", "0", "false")
    if in_metadata or not environment.get("TPU_ACCELERATOR_TYPE"):
        # torch_xla takes any value for yes, and then needs TPU_ACCELERATOR_TYPE. No note: `import
        # jax` sets it on every machine without a TPU.
        environment.pop("TPU_SKIP_MDS_QUERY", None)
    if "LIBTPU_INIT_ARGS" in environment:  # importing torch_xla leaves a blank at its beginning
        environment["LIBTPU_INIT_ARGS"] = " ".join(environment["LIBTPU_INIT_ARGS"].split())
    before = dict(environment)
    if "TPU_SKIP_MDS_QUERY" in environment:
        # It describes this host by whichever variable of a pair is there, so keep one of them.
        for kept, removed in (("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID"),
                              ("TPU_HOST_BOUNDS", "TPU_PROCESS_BOUNDS"),
                              ("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS")):
            if removed in environment:
                environment.setdefault(kept, environment[removed])
    for name in REMOVED:
        environment.pop(name, None)
    if not environment.get("PT_XLA_DEBUG", "0").isdigit():
        environment.pop("PT_XLA_DEBUG")  # importing torch_xla would fail
    if not Path(environment.get("TPU_LIBRARY_PATH", "/")).exists():
        environment.pop("TPU_LIBRARY_PATH")
    if "LIBTPU_INIT_ARGS" in environment:
        # `import jax` in a notebook adds this flag as true, and torch_xla's collectives may hang.
        environment["LIBTPU_INIT_ARGS"] = re.sub(
            r"(--xla_tpu_use_enhanced_launch_barrier)(=\w+)?", r"\1=false",
            environment["LIBTPU_INIT_ARGS"])
    before.pop("CLOUD_TPU_TASK_ID", None)  # no note: a libtpu in the parent process sets it
    changed = sorted(name for name in before if environment.get(name) != before[name])
    if changed:
        print(f"note: changed in the environment, or the command would fail: {', '.join(changed)}",
              file=sys.stderr)


def check_environment():
    """Raises UserError if a variable would end the run, or silently change what it computes. Prints
    a note about variables that slow it down."""
    for problem in problems():
        raise UserError(problem)
    if note := slow_note():
        print(f"note: {note}", file=sys.stderr)


def slow_note():
    """A sentence about the variables that slow training down, or None if none is set."""
    slow = [name for name in SLOW if os.environ.get(name, "0") not in ("", "0")]
    return f"{', '.join(slow)} is set, which slows training down" if slow else None


def problems():
    """A sentence for each variable that would end a run, or silently change what it computes."""
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name, "0") not in ("", "0"):
            yield (f"{name} is set: it silently makes weights, moments and loss bfloat16. Unset "
                   "it; dtype=bfloat16 computes in bfloat16 and keeps those in float32")
    device = os.environ.get("PJRT_DEVICE")
    if device not in (None, "TPU", "CPU"):
        yield f"PJRT_DEVICE is {device!r}; expected TPU or CPU, or unset it"
    if os.environ.get("LOCAL_WORLD_SIZE", "1") not in ("", "1"):
        yield ("torchrun or a similar launcher started this command several times; start it once, "
               "with python: it starts a process for each core itself")
    for flag in re.findall(r"--(?:xla_tpu|megascale)\w*", os.environ.get("XLA_FLAGS", "")):
        yield (f"XLA_FLAGS has {flag}, a flag of libtpu, and XLA aborts at flags that it does not "
               "know. Unset XLA_FLAGS, or move the flag to LIBTPU_INIT_ARGS")
    if device == "TPU" or (device is None and tpu.chips()):
        for flag in unknown_libtpu_flags(os.environ.get("LIBTPU_INIT_ARGS", "")):
            yield (f"LIBTPU_INIT_ARGS has --{flag}, which this libtpu does not know, and it exits "
                   "at such flags. Remove it: training needs none")


def unknown_libtpu_flags(arguments):
    """The flags in `arguments` whose names are not in libtpu's binary."""
    names, path = re.findall(r"--(\w+)", arguments), libtpu_path()
    if not names or not path:
        return []
    with path.open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return [name for name in names if library.find(b"\0" + name.encode() + b"\0") < 0]


def libtpu_path():
    """The libtpu that torch_xla will load, or None if it has none."""
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return Path(path)
    spec = find_spec("libtpu")
    return Path(spec.submodule_search_locations[0], "libtpu.so") if spec else None


def use_one_chip():
    """Makes this process open the first chip of the TPU only. Call it after mend_environment, and
    before torch_xla is imported."""
    os.environ |= {"TPU_VISIBLE_CHIPS": "0", "TPU_PROCESS_BOUNDS": "1,1,1",
                   "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}


def tune_environment(device, kind, environment=os.environ):
    """Sets variables that make a step faster, in processes started and a libtpu loaded from now on.
    device: "TPU" or "CPU"; kind: of the chips, a key of nanoxla/tpu.py's KINDS, or None."""
    if device == "CPU":
        # XLA's CPU backend allocates its buffers anew in each step. Huge memory pages make a step a
        # tenth faster. (The C library reads the variable when a process starts.)
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    elif kind == "v5e":  # by the same estimate, a v6e needs 3 % longer with this limit
        flags, name = environment.get("LIBTPU_INIT_ARGS", ""), VMEM_LIMIT.partition("=")[0]
        if name not in flags and libtpu_path() and not unknown_libtpu_flags(VMEM_LIMIT):
            environment["LIBTPU_INIT_ARGS"] = f"{flags} {VMEM_LIMIT}".strip()
