"""Train with several replicas on a CPU: train.py's own worker under the real xmp.spawn, with a real
all-reduce.

    python tests/replicas.py 8 config.py [--key=value ...]        # as train.py would on 8 cores

On a TPU a replica is a process with a core of its own. On the CPU backend the replicas are threads
of one process that share an executor, and torch_xla.sync() would deadlock. `sync` below replaces
it, and adds the barriers that threads need. At the end each replica prints the SHA-256 of its
weights.

The environment variable BREAK breaks something that a test has to notice:
    BREAK=clip   clips each core's own gradient before the all-reduce, not the average after it
    BREAK=nan    makes the loss of one replica nan in step 5
"""
import hashlib
import math
import os
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["CPU_NUM_DEVICES"] = sys.argv[1]  # the spawned child imports this file too
REPLICAS = int(os.environ["CPU_NUM_DEVICES"])
# The execution of a graph occupies a thread of this pool while it waits for the other replicas.
os.environ |= {"PJRT_DEVICE": "CPU", "XLA_THREAD_POOL_SIZE": str(4 * REPLICAS)}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch_xla.experimental import assume_pure

import train
from nanoxla import launch
from nanoxla.errors import run_command

BARRIER = threading.Barrier(REPLICAS)
SUBMITTED = threading.Event()
BEFORE = [0]
MODELS = threading.local()
supervised = launch.supervised


# --- torch_xla.sync() for replicas that are threads ---------------------------------------------


def graphs_seen():
    """A count that rises when a graph has been compiled or found in the cache."""
    return (met.metric_data("CompileTime") or [0])[0] + (met.counter_value("CachedCompile") or 0)


def sync():
    """torch_xla.sync() for threads. It differs in two ways:

    - All replicas must run the same executable, since its identity is part of the all-reduce's
      rendezvous. So replica 0 compiles, and the others find the executable in the cache.
    - All replicas must have submitted before any of them waits. Resetting the all-reduce token
      waits, and holds the GIL while it does."""
    rank = xr.global_ordinal()
    BARRIER.wait()
    if rank == 0:
        BEFORE[0] = graphs_seen()
        SUBMITTED.clear()
    BARRIER.wait()
    while rank and graphs_seen() == BEFORE[0] and not SUBMITTED.is_set():
        time.sleep(0.001)
    # Replica 0 puts the executable into the cache shortly after it has compiled it. The others
    # submit one after another: on a busy machine, one of eight simultaneous submissions can stay in
    # the queue of a thread pool.
    time.sleep(0.05 * bool(rank) + 0.01 * rank)
    torch_xla._XLAC._xla_step_marker(torch_xla._XLAC._xla_get_default_device(), [], wait=False,
                                     reset_scope=True)
    if rank == 0:
        SUBMITTED.set()
    BARRIER.wait()
    torch_xla._XLAC._set_all_reduce_token(xm._run_step_closures().device, None)
    # Wait until the execution has ended. Two executions at a time, each with a waiting thread for
    # every replica, would need more threads than the pool has.
    for tensor in getattr(MODELS, "small", ()):
        tensor.cpu()
    BARRIER.wait()


class PerReplica(threading.local):
    """Replaces torch_xla's dict of traced functions by one dict for each thread. What another
    replica has traced holds tensors on that replica's device."""

    def __init__(self):
        self.traced = {}

    def get(self, name, default):
        return self.traced.get(name, default)

    def __getitem__(self, name):
        return self.traced[name]

    def __setitem__(self, name, traced):
        self.traced[name] = traced


# --- what is broken on purpose ------------------------------------------------------------------


def clip_before_reducing(reduce_gradients):
    def broken(optimizer, **kwargs):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for g in gradients:
            g.mul_((optimizer.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        reduce_gradients(optimizer, **kwargs)
    return broken


def nan_at_step_5(train_step):
    def broken(traced, optimizer, batch, step, stop):
        nan = torch.full_like(traced.zero, math.nan)
        sync()
        if step == 4 and xr.global_ordinal() == 1:
            traced.loss_sum = nan
        return train_step(traced, optimizer, batch, step, stop)
    return broken


# --- the run ------------------------------------------------------------------------------------


def remember_model(config, seed, make=train.Llama):
    MODELS.mine = make(config, seed)
    return MODELS.mine


class AdamW(train.AdamW):
    """Remembers a small weight and its gradient: the results of the two graphs of a step."""

    def __init__(self, *args):
        super().__init__(*args)
        weight = MODELS.mine.norm.weight
        MODELS.small = weight, weight.grad


def replica(index, *arguments):
    """Runs train.py's worker under supervision, and prints the hash of its weights."""
    supervised(index, *arguments)
    digest = hashlib.sha256()
    for parameter in MODELS.mine.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    print(f"weights of replica {index}: {digest.hexdigest()}\n", end="", flush=True)
    fallbacks = [name for name in met.counter_names() if name.startswith("aten::")]
    assert not fallbacks, (f"{fallbacks} ran on the host: torch_xla counts these in a table "
                           "without a lock, which threads corrupt")


assume_pure._XLA_COMPUTATION_CACHE = PerReplica()
torch_xla.sync = sync  # here and in the spawned child, which imports this file too
train.Llama, train.AdamW = remember_model, AdamW

if os.environ.get("BREAK") == "clip":
    xm.reduce_gradients = clip_before_reducing(xm.reduce_gradients)
elif os.environ.get("BREAK") == "nan":
    train.train_step = nan_at_step_5(train.train_step)

if __name__ == "__main__":
    launch.supervised = replica
    sys.argv = ["train.py", *sys.argv[2:]]
    run_command(train.main)
