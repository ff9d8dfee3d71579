"""The traps of PyTorch/XLA as experiments on the CPU, wrong and right side by side.

    python tools/xla_traps.py                  # all of them: half a minute
    python tools/xla_traps.py item grad-none   # these; --help lists the names

Every trap is a function that can be read alone. It measures what many programs do (wrong) and what
train.py does (right). docs/xla_traps.md lists the symptoms.
"""
import os
import sys

os.environ["PJRT_DEVICE"] = "CPU"  # before torch_xla is imported

import argparse
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch_xla._internal import pjrt

import train
from data import TokenDataset
from nanoxla.environment import check_environment
from nanoxla.errors import UserError, run_command
from nanoxla.log import compilations
from nanoxla.processes import call_in_new_process
from nanoxla.shards import TOKEN_DTYPE

TRAPS = {}  # {name: (function, file, the text in it that avoids the trap)}


def trap(file, text):
    """A decorator for an experiment. Its docstring says what is wrong. It returns the measurements:
    {what: (wrong, right)}."""
    def register(function):
        TRAPS[function.__name__.replace("_", "-")] = function, file, text
        return function
    return register


def on_device(*shape):
    """Ones, uploaded: an input of the next graph and no operation in it."""
    return torch.ones(shape).to(torch_xla.device())


def graphs(function, *arguments):
    """How many graphs XLA compiles in function(*arguments)."""
    before = compilations()[0]
    function(*arguments)
    return compilations()[0] - before


# --- graphs that are compiled again -------------------------------------------------------------


@trap("train.py", "return torch.tensor([learning_rate(step, self.config),")
def python_number():
    """torch_xla makes a Python number an input of the graph, but 0 and 1 become constants of it. An
    index or a length is always a constant. So the graph differs, and XLA compiles again."""
    table, weight, gradient = on_device(5, 31), on_device(31), on_device(31)

    def update(rates):
        for lr in rates:
            weight.sub_(lr * gradient)
            torch_xla.sync()

    def wrong_pick(indices):
        for i in indices:
            weight.copy_(table[i])
            torch_xla.sync()

    def right_pick(indices):
        for i in indices:
            weight.copy_(table.index_select(0, i)[0])
            torch_xla.sync()
    # The shape is [1]: a new 0 or 1 without dimensions is a constant, like a Python number.
    rates, indices = [0.0, 0.5, 1.0, 0.5, 0.0], range(5)
    rate_tensors, index_tensors = ([torch.tensor([x]).to(table.device) for x in numbers]
                                   for numbers in (rates, indices))
    return {"graphs, lr = 0, 0.5, 1, 0.5, 0": (graphs(update, rates), graphs(update, rate_tensors)),
            "graphs, rows 0 to 4 of a table": (graphs(wrong_pick, indices),
                                               graphs(right_pick, index_tensors))}


@trap("train.py", "lr, correction1, correction2 = schedule.unbind()")
def adamw():
    """torch.optim.AdamW computes sqrt(1 - beta2^step) as a Python number. For beta2 = 0.95 it
    rounds to 1 in float32 at step 325, and the step is compiled again in the middle of the run."""
    weight, loss = torch.nn.Parameter(on_device(37)), on_device()
    zeros = {name: torch.zeros(37).to(weight.device) for name in ("exp_avg", "exp_avg_sq")}
    theirs = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    theirs.state[weight] = {"step": torch.tensor(319.0), **zeros}
    weight.grad = on_device(37)
    ours = train.AdamW([torch.nn.Parameter(on_device(37))], train.Config(beta2=0.95))
    torch_xla.sync()

    def wrong(step):
        theirs.step()
        torch_xla.sync()

    def right(step):
        ours.step(ours.schedule(step - 1).to(weight.device), loss)  # its steps count from 0
        torch_xla.sync()

    def compiled(update):
        return ", ".join(str(step) for step in range(320, 331) if graphs(update, step))
    return {"compiled, of steps 320 to 330": (compiled(wrong), compiled(right))}


@trap("train.py", "optimizer.zero_grad(set_to_none=False)")
def grad_none():
    """zero_grad sets gradients to None. Then the first micro-batch of a step stores a gradient and
    the others add to it: two graphs of the whole forward and backward pass."""
    def two_steps(set_to_none, width):
        weight, x = torch.nn.Parameter(on_device(width)), on_device(width)
        weight.grad = None if set_to_none else torch.zeros(width).to(x.device)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for micro_batch in range(6):
            # backward() in this thread: one of its own could hold a gradient until after the sync.
            with torch.autograd.set_multithreading_enabled(False):
                (weight * x).square().sum().backward()
            torch_xla.sync()
            if micro_batch % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none)
                torch_xla.sync()
    return {"graphs, 2 steps, 6 micro-batches": (graphs(two_steps, True, 41),
                                                 graphs(two_steps, False, 43))}


@trap("data.py", "windows = np.empty((len(starts), self.context + 1), np.int32)")
def shape():
    """Every new shape is a new graph: texts of different lengths, and the smaller last batch of an
    epoch. Cut the texts into windows of one length, and let a batch run on into the next epoch."""
    def run(batches, width):
        weight = on_device(width)
        for batch in batches:
            loss = (batch.to(weight.device)[..., None] * weight).tanh().sum()
            torch_xla.sync()
            loss.cpu()
    texts = [torch.ones(length) for length in (16, 9, 12, 16, 5, 14)]
    windows = torch.cat(texts).split(12)
    epoch, two_epochs = torch.ones(20, 12), torch.ones(40, 12)
    return {"graphs, 6 texts": (graphs(run, texts, 47), graphs(run, windows, 53)),
            "graphs, 2 epochs of 20 windows": (graphs(run, 2 * epoch.split(8), 47),
                                               graphs(run, two_epochs.split(8), 53))}


# --- time and memory ----------------------------------------------------------------------------


@trap("train.py", "stopping = log.training(step, lr, report)")
def item():
    """.item() waits for the device. Meanwhile the host traces nothing, and then the device is idle
    until the host has traced the next step. Read seldom, and one step late."""
    weight = (torch.randn(512, 512) / 23).to(torch_xla.device())

    def twenty_steps(read):
        x, before, times = on_device(512, 512), None, []
        reads = (met.metric_data("TransferFromDeviceTime") or [0])[0]
        for step in range(20):
            started = time.perf_counter()
            for _ in range(10):
                x = (x @ weight).tanh()
            loss = x.square().mean()
            torch_xla.sync()
            read(step, loss, before)
            before = loss
            times.append(1e3 * (time.perf_counter() - started))
        return met.metric_data("TransferFromDeviceTime")[0] - reads, statistics.median(times)
    wrong = twenty_steps(lambda step, loss, before: loss.item())
    right = twenty_steps(lambda step, loss, before: before.cpu() if step % 10 == 9 else None)
    return dict(zip(["reads in 20 steps", "ms of the host, median step"], zip(wrong, right)))


@trap("train.py", "p.grad.copy_(gradient_sum)")
def held_twice():
    """Whatever Python still refers to at the sync is a result of the graph, with memory of its own.
    Here it is the list of the new gradient sums, which p.grad holds already."""
    def add_to_gradients(keep, width):
        gradients, new = [on_device(1024, width) for _ in range(8)], on_device(1024, width)
        for _ in range(2):  # the first compiles
            buffers = met.counter_value("CreateDataHandles")
            sums = [old + new for old in gradients]
            for i in range(8):
                gradients[i].copy_(sums[i])
            if not keep:
                del sums
            torch_xla.sync()
            xm.wait_device_ops()
        results = met.counter_value("CreateDataHandles") - buffers
        return results, results * new.nbytes / 1e6
    return dict(zip(["results of the graph", "MB of results"],
                    zip(add_to_gradients(True, 1024), add_to_gradients(False, 1025))))


# --- wrong numbers ------------------------------------------------------------------------------


def clip_on_this_core():
    """(norm of the gradient, its distance from that of one core with the whole batch), clipped
    before and after the average."""
    from replicas import sync  # tests/replicas.py: torch_xla.sync() for cores that are threads
    rank, cores = xr.global_ordinal(), xr.world_size()
    own = torch.randn(cores, 1000, generator=torch.Generator().manual_seed(0)) / 1000**0.5
    own[0] *= 20  # of norm 20; the others have norm 1

    def clip(gradient, limit=1.0):
        return gradient * (limit / (gradient.norm() + 1e-6)).clamp(max=1.0)

    def average(gradient):
        return xm.all_reduce(xm.REDUCE_SUM, gradient, scale=1 / cores)
    mine = own[rank].to(torch_xla.device())
    wrong, right, one_core = average(clip(mine)), clip(average(mine)), clip(own.mean(0))
    sync()
    return [(g.norm().item(), (g - one_core).norm().item()) for g in (wrong.cpu(), right.cpu())]


@trap("train.py", "xm.optimizer_step(optimizer, optimizer_args=")
def clip():
    """Each core clips its own gradient before the average. The cores shrink theirs by different
    factors, so the update has another direction, and depends on the number of cores."""
    # What xmp.spawn does in the process that it starts: on a CPU the cores are threads.
    of_cores = call_in_new_process(
        pjrt._run_thread_per_device, 0, 1, clip_on_this_core, pjrt.initialize_multiprocess,
        environment={"CPU_NUM_DEVICES": "4", "XLA_THREAD_POOL_SIZE": "16"})
    return dict(zip(["norm of the update, limit 1", "distance from one core's update"],
                    zip(*of_cores[0])))


@trap("data.py", "if unsigned.max() >= self.vocab_size:")
def token_id():
    """XLA clamps an id outside the vocabulary to the last row of the embedding, and trains on it.
    Plain PyTorch raises an error on a CPU. On a TPU nothing checks the ids but the host."""
    config = train.Config(vocab_size=53, dim=8, n_layers=1, n_heads=1, hidden_dim=8, context=2)
    on_cpu, on_xla = train.Llama(config), train.Llama(config).to(torch_xla.device())

    def loss(model, token):
        inputs = torch.tensor([[1, token]]).to(model.norm.weight.device)
        return f"loss {model(inputs, torch.ones_like(inputs)).item():.4f}"

    def raised(function, *arguments):
        try:
            function(*arguments)
        except (IndexError, UserError) as error:
            return type(error).__name__
    with tempfile.NamedTemporaryFile() as shard:
        np.array([1, 999, 2], TOKEN_DTYPE).tofile(shard.name)
        dataset = TokenDataset([Path(shard.name)], config.context, config.vocab_size)
        return {"id 52, the last": (loss(on_xla, 52), loss(on_cpu, 52)),
                "id 999, right: plain PyTorch": (loss(on_xla, 999), raised(loss, on_cpu, 999)),
                "id 999, right: data.py": (loss(on_xla, 999), raised(dataset.read, [0]))}


def update_a_hundred_times():
    """The dtype that PyTorch shows, the weights that are what they were (in percent), and the mean
    distance that a weight has moved."""
    start = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = start.to(torch_xla.device())
    rounded, lr = weight.cpu(), torch.tensor([1e-5]).to(weight.device)
    for _ in range(100):
        weight.sub_(lr)
        torch_xla.sync()
    moved = (weight.cpu() - rounded).abs()
    return str(weight.dtype), 100 * (moved == 0).float().mean().item(), moved.mean().item()


@trap("train.py", 'torch.autocast("xla", torch.bfloat16')
def bf16():
    """XLA_USE_BF16 makes all weights bfloat16, and PyTorch still shows float32. An update below
    half the spacing of such numbers changes nothing. So train.py keeps weights in float32."""
    wrong = call_in_new_process(update_a_hundred_times, environment={"XLA_USE_BF16": "1"})
    return dict(zip(["dtype that PyTorch shows", "% of weights unchanged",
                     "mean move (100 x 1e-5)"], zip(wrong, update_a_hundred_times())))


# --- the command --------------------------------------------------------------------------------


def line_of(file, text):
    """The number of the only line of the file with this text."""
    lines = [i for i, line in enumerate((ROOT / file).read_text().splitlines(), 1) if text in line]
    [number] = lines
    return number


def show(name):
    function, file, text = TRAPS[name]
    started = time.perf_counter()
    rows = function()
    print(f"{name}\n    {function.__doc__}\n\n{'':38}{'wrong':>16}{'right':>16}")
    for what, values in rows.items():
        wrong, right = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
        print(f"    {what:34}{wrong:>16}{right:>16}")
    print(f"\n    avoided in {file}:{line_of(file, text)}: {text}   "
          f"[{time.perf_counter() - started:.1f} s]\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description="The traps of PyTorch/XLA as experiments.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"names:\n  {' '.join(TRAPS)}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args().names
    check_environment()
    if unknown := set(names) - set(TRAPS):
        raise UserError(f"no trap {min(unknown)!r}; there are {' '.join(TRAPS)}")
    for name in names or TRAPS:
        show(name)


if __name__ == "__main__":
    run_command(main)
