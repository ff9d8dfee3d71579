"""Train with several replicas on a CPU: train.py's own worker, under the real xmp.spawn, with a real all-reduce.

    python tests/replicas.py 8 config.py [--key=value ...]        # as train.py would on 8 cores

On a TPU a replica is a process with a core of its own. On the CPU backend they are threads of one process that share an
executor, and torch_xla.sync() as it stands would deadlock; `sync` below is the same with the waiting it needs. Each
replica prints the sha256 of its final weights. BREAK=clip in the environment clips each core's own gradient before the
all-reduce instead of the average after it: what a test has to notice; BREAK=nan makes one replica's loss at step 5 nan.
"""
import hashlib
import math
import os
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["CPU_NUM_DEVICES"] = sys.argv[1]  # where the spawned child, which imports this file anew, finds it
REPLICAS = int(os.environ["CPU_NUM_DEVICES"])
os.environ |= {"PJRT_DEVICE": "CPU", "XLA_THREAD_POOL_SIZE": str(4 * REPLICAS)}  # each execution holds a thread
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch_xla.experimental import assume_pure

import process
import train

BARRIER = threading.Barrier(REPLICAS)
SUBMITTED = threading.Event()
BEFORE = [0]
MODELS = threading.local()
guarded_worker = process.guarded_worker


def graphs_seen():
    """Moves when a graph has been compiled or found in the cache."""
    return (met.metric_data("CompileTime") or [0])[0] + (met.counter_value("CachedCompile") or 0)


def sync():
    """torch_xla.sync() for replicas that are threads. They must run one and the same executable, because its identity
    is part of the all-reduce's meeting point: replica 0 compiles and the others find it in the cache. And all must have
    submitted before anything waits: resetting the all-reduce token does so with the interpreter's lock held."""
    rank = xr.global_ordinal()
    BARRIER.wait()
    if rank == 0:
        BEFORE[0] = graphs_seen()
        SUBMITTED.clear()
    BARRIER.wait()
    while rank and graphs_seen() == BEFORE[0] and not SUBMITTED.is_set():
        time.sleep(0.001)
    time.sleep(0.05 * bool(rank) + 0.01 * rank)  # from compiled to cached; and one after another, or on a
    # busy machine one of eight submissions is left lying in a thread pool's queue
    torch_xla._XLAC._xla_step_marker(torch_xla._XLAC._xla_get_default_device(), [], wait=False, reset_scope=True)
    if rank == 0:
        SUBMITTED.set()
    BARRIER.wait()
    torch_xla._XLAC._set_all_reduce_token(xm._run_step_closures().device, None)
    for tensor in getattr(MODELS, "small", ()):  # reading waits until the execution has ended: two at a time, each with
        tensor.cpu()  # a thread for every replica that waits for the others, would want more threads than there are
    BARRIER.wait()


def clip_then_reduce(reduce_gradients):
    def wrong(optimizer, **kwargs):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for g in gradients:
            g.mul_((optimizer.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        reduce_gradients(optimizer, **kwargs)
    return wrong


def nan_at_step_5(train_step):
    def wrong(passes, optimizer, batch, step, stop, zero):
        nan = torch.full_like(zero, math.nan)
        sync()
        if step == 4 and xr.global_ordinal() == 1:
            zero = nan
        return train_step(passes, optimizer, batch, step, stop, zero)
    return wrong


def remember_model(config, seed, make=train.Llama):
    MODELS.mine = make(config, seed)
    return MODELS.mine


class RememberGradients(train.AdamW):
    def __init__(self, *args):
        super().__init__(*args)
        weight = MODELS.mine.norm.weight
        MODELS.small = weight, weight.grad


def replica(index, *arguments):
    guarded_worker(index, *arguments)
    digest = hashlib.sha256()
    for parameter in MODELS.mine.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    print(f"weights of replica {index}: {digest.hexdigest()}\n", end="", flush=True)
    fallbacks = [name for name in met.counter_names() if name.startswith("aten::")]
    assert not fallbacks, f"{fallbacks} ran on the host: torch_xla counts them in an unguarded table, which threads corrupt"


class PerReplica(threading.local):
    """Stands in for the dict of traced functions: those of another thread hold numbers on another replica's device."""

    def __init__(self):
        self.traced = {}

    def get(self, name, default):
        return self.traced.get(name, default)

    def __getitem__(self, name):
        return self.traced[name]

    def __setitem__(self, name, traced):
        self.traced[name] = traced


assume_pure._XLA_COMPUTATION_CACHE = PerReplica()
torch_xla.sync = sync  # here and in the spawned child, which imports this file anew
train.Llama, train.AdamW = remember_model, RememberGradients

if os.environ.get("BREAK") == "clip":
    xm.reduce_gradients = clip_then_reduce(xm.reduce_gradients)
elif os.environ.get("BREAK") == "nan":
    train.train_step = nan_at_step_5(train.train_step)

if __name__ == "__main__":
    process.guarded_worker = replica
    sys.argv = ["train.py", *sys.argv[2:]]
    process.run_command(train.main)
