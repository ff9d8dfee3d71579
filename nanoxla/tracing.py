"""Trace a function once, and replay it: what makes a step cheap for the host."""
import zlib

import torch
from torch_xla.experimental.assume_pure import assume_pure_torch


@torch.no_grad()  # assume_pure_torch insists on it when it wraps a function
def trace_once(function, depends_on):
    """A faster `function`, for XLA tensors. The first call traces it, which records hundreds of
    operations. Each later call records a single operation that refers to the trace.

    That is only correct for a pure function: whatever changes from call to call must be an argument
    and a tensor, and whatever it computes must be returned. A Python value that it reads elsewhere
    is frozen at the first call. depends_on: all such values. Traces are cached by the function's
    name, so a hash of depends_on is added to the name."""
    def pure(*tensors):
        # backward() in this thread. By default autograd does it in a thread of its own, which may
        # hold on to gradients for a moment after it has handed them over, and on a busy machine
        # until the next torch_xla.sync(). The sync would then compute these as well, from the
        # inputs of the trace, which have no data: a segmentation fault.
        with torch.autograd.set_multithreading_enabled(False):
            return function(*tensors)

    pure.__name__ = f"{function.__name__}_{zlib.crc32(repr(depends_on).encode())}"
    return assume_pure_torch(pure, use_cache=True)
