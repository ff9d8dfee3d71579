"""Train a Llama on all cores of a TPU (or, slowly, on a CPU) with PyTorch/XLA.

    python train.py config/fwedu_124m.py                    # on a TPU v5e-8
    python train.py config/demo.py --max_steps=100          # a config file, then changes to it
    python train.py --help                                  # every key with its type, default and meaning

Read `worker` first: it is what runs on each core, and all else here serves it. Three things to know about XLA:
an operation on an XLA tensor only writes a node into a graph; torch_xla.sync() compiles the graph, or finds it compiled,
and starts it on the device without waiting; reading a number (.cpu(), print, if) does wait. So the loop keeps every step
the same graph, and lets the device work on a step while Python writes down the next.
"""
import os
import sys

if os.environ.get("TPU_PROCESS_ADDRESSES") == "local":  # Kaggle's image sets it, and then the 8 processes do not find
    for name in ("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID"):  # one another; must be gone before torch_xla loads
        os.environ.pop(name, None)

import inspect
import math
import re
import time
import zlib
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from torch.func import functional_call
from torch_xla.experimental.assume_pure import assume_pure_torch

import data
import flash_attention
from checkpoint import Saver, checkpoint_to_resume, read_state, restore
from metrics import Log, due
from model import Llama, ModelConfig, num_parameters
from process import UserError, read_assignments, run_command, run_on_all_cores

# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(ModelConfig):
    out_dir: str = "out/run"  # where metrics.jsonl and checkpoints/ go
    data_dir: str = "data"  # where the shards are
    train_glob: str = "train_*.bin"  # training shards in data_dir
    val_glob: str = "val_*.bin"  # validation shards in data_dir
    tokenizer: str = ""  # SentencePiece model stored with every checkpoint; default: the one data_dir/meta.json names
    batch_size: int = 256  # windows per optimiser step, over all cores
    micro_batch_size: int = 8  # windows per core per forward pass; fewer need less memory
    max_steps: int = 1_000  # optimiser steps of the whole run
    learning_rate: float = 6e-4  # peak, reached after warmup_steps
    min_lr: float = 0.0  # where the cosine ends
    warmup_steps: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW: memory of the gradient's mean
    beta2: float = 0.95  # AdamW: memory of the gradient's mean square
    grad_clip: float = 1.0  # largest global norm of the averaged gradient; 0 does not clip
    dtype: str = "bfloat16"  # of matmuls: bfloat16 | float32 (a TPU rounds those to bfloat16 too); all else is float32
    peak_tflops: float = 197.0  # of one core in bfloat16, for mfu: 197 is a TPU v5e
    seed: int = 0  # of the initial weights and of the order of the data
    log_every: int = 10  # steps between rows in metrics.jsonl (step 1 has one too), and between looks for a wish to stop
    eval_every: int = 1_000  # steps between evaluations, and one at the end; 0 never evaluates
    eval_batches: int = 8  # batches of batch_size windows in an evaluation
    checkpoint_every: int = 1_000  # steps between checkpoints, and one at the end; 0 saves only that one
    keep_checkpoints: int = 2  # newest checkpoints kept
    max_hours: float = 0.0  # stop in time to have saved after so many hours, startup included; 0 does not
    max_skipped: int = 10  # more updates in a row left out because loss or gradient is not finite end the run, when it logs
    resume: str = "auto"  # auto: go on from the newest checkpoint in out_dir | never: refuse a used out_dir | a checkpoint


RULES = (  # keys, what must hold for each, the same in words
    ("dim n_layers n_heads hidden_dim context batch_size micro_batch_size max_steps log_every eval_batches keep_checkpoints",
     lambda x: x >= 1, "at least 1"),
    ("warmup_steps seed eval_every checkpoint_every min_lr weight_decay grad_clip max_hours max_skipped",
     lambda x: 0 <= x < math.inf, "at least 0"),
    ("rope_theta norm_eps learning_rate peak_tflops", lambda x: 0 < x < math.inf, "more than 0"),
    ("beta1 beta2", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("vocab_size", lambda x: 2 <= x <= data.LARGEST_VOCABULARY, f"from 2 to {data.LARGEST_VOCABULARY} (shards are uint16)"),
    ("attention", lambda x: x in ("math", "flash"), "math or flash"),
    ("dtype", lambda x: x in ("bfloat16", "float32"), "bfloat16 or float32"),
)


def load_config(path, overrides=()):
    """Defaults, under the assignments of the Python file `path`, under overrides like "--max_steps=100"."""
    return check_config(read_assignments(Config, path, overrides))


def check_config(values):
    """Config(**values), if every value makes sense by itself and with the others."""
    for keys, holds, expected in RULES:
        for key in keys.split():
            value = values.get(key, getattr(Config, key))
            if not holds(value):
                raise UserError(f"{key} = {value!r}, expected {expected}")
    try:
        config = Config(**values)
    except ValueError as error:
        raise UserError(error) from None
    if config.warmup_steps > config.max_steps:
        raise UserError(f"warmup_steps = {config.warmup_steps} is more than max_steps = {config.max_steps}")
    return config


def check_batch_size(config, cores):
    if config.batch_size % (cores * config.micro_batch_size):
        raise UserError(f"batch_size = {config.batch_size} is not a multiple of {cores} cores x micro_batch_size = "
                        f"{config.micro_batch_size}")


def check_attention(config, device_type):
    if config.attention == "flash" and device_type != "TPU":
        raise UserError(f"attention = 'flash' runs on a TPU and this is a {device_type}; use --attention=math")
    if config.attention == "flash" and not flash_attention.supports(config):
        raise UserError(f"attention = 'flash' needs multiples of {flash_attention.LANES} for dim = {config.dim} and context = "
                        f"{config.context}, which is at most {flash_attention.LONGEST}, and dim / n_heads = "
                        f"{config.dim // config.n_heads} must divide {flash_attention.LANES}; use --attention=math")
    if config.attention == "flash" and not find_spec("jax"):
        raise UserError('attention = \'flash\' needs jax: pip install "torch_xla[tpu,pallas]==2.9.0", or use --attention=math')


def print_help():
    print(__doc__.split("\n\n")[1], "\n\nKeys, with type, default and meaning:\n")
    for line in inspect.getsource(ModelConfig).splitlines() + inspect.getsource(Config).splitlines():
        if match := re.match(r"    (\w+): (\w+) = (.+?)  # (.+)", line):  # the comments above are the documentation
            print("  --{:18} {:6} {:12} {}".format(*match.groups()))


# --- optimisation -----------------------------------------------------------------------------------------------------


def learning_rate(step, config):
    """The learning rate of `step`, counted from 0."""
    # 1) linear warm-up, which ends on the peak
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    # 2) then half a cosine down to min_lr
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)  # from 0 to 1
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101) after clipping by global norm.

    torch.optim.AdamW would do, but for XLA: it keeps its hyper-parameters as Python numbers, which end up as constants of
    the graph when they are 0 or 1, so that a schedule compiles the step anew in the middle of a run. Here what changes
    from step to step comes in one small tensor, and the moments exist from the start: one graph, whatever the step.

    An update whose loss or gradient is not finite is left out: weights and moments stay, and `skipped` [2] counts such
    updates, all of them and those in a row. An `if` would have to read the device; so the graph computes with a learning
    rate and weights of 0 instead.
    """

    def __init__(self, parameters, config):
        self.config = config
        super().__init__(list(parameters), {})
        self.skipped = torch.zeros(2, device=self.param_groups[0]["params"][0].device)
        for p in self.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)  # see zero_grad in train_step
            self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def schedule(self, step):
        """What depends on the step, as one tensor [3]: learning rate and the two bias corrections."""
        return torch.tensor([learning_rate(step, self.config), 1 - self.config.beta1 ** (step + 1),
                             1 - self.config.beta2 ** (step + 1)])

    @torch.no_grad()
    def step(self, schedule, loss):
        """Updates the parameters and returns the gradient's norm before clipping, without reading either. loss: the mean
        over all cores, only to see whether it is finite.

        xm.optimizer_step calls this after it has averaged the gradients over the cores. Clipping belongs here, behind
        the average: clipped before it, each core would shrink its own gradient by another factor.
        """
        lr, correction1, correction2 = schedule.unbind()
        parameters = self.param_groups[0]["params"]
        grad_norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        scale = (self.config.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if self.config.grad_clip else 1.0
        finite = (grad_norm + loss).isfinite()
        zero = torch.zeros_like(grad_norm)
        lr, weight1, weight2 = (torch.where(finite, x, zero) for x in (lr, 1 - self.config.beta1, 1 - self.config.beta2))
        memory1, memory2, decay, step_size = 1 - weight1, 1 - weight2, 1 - lr * self.config.weight_decay, lr / correction1
        for p in parameters:
            grad = torch.where(finite, p.grad * scale, zero)  # 0 * nan would be nan
            exp_avg, exp_avg_sq = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            exp_avg.mul_(memory1).add_(grad * weight1)
            exp_avg_sq.mul_(memory2).add_(grad.square() * weight2)
            if p.dim() >= 2:  # matrices; a norm's weight has no reason to be small
                p.mul_(decay)
            p.sub_(step_size * exp_avg / ((exp_avg_sq / correction2).sqrt() + 1e-8))
        (total, in_a_row), bad = self.skipped.unbind(), 1 - finite.float()
        self.skipped.copy_(torch.stack([total + bad, (in_a_row + bad) * bad]))
        return grad_norm


# --- the run ----------------------------------------------------------------------------------------------------------


class Passes:
    """Forward, and forward with backward, over a micro-batch: each one operation of the graph.

    Writing down the hundreds of operations of a pass takes Python longer than computing them takes a TPU. So that is done
    once: assume_pure_torch keeps what the first call traced, and all later calls refer to it. For a pure function that is the
    same, so these get all that changes as tensors and return the sums: `total` of the losses, and of the gradients.
    """

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.names, self.parameters = zip(*model.named_parameters())
        self.micro_batches = config.batch_size // (xr.world_size() * config.micro_batch_size)  # in a step, on a core
        self.add_loss, self.add_gradients = map(self.traced_once, (self.add_loss, self.add_gradients))

    @torch.no_grad()  # assume_pure_torch insists on it, as its own results have no backward pass
    def traced_once(self, function):
        def pure(*tensors):
            return function(*tensors)

        what_it_depends_on = repr((self.config, self.micro_batches)).encode()
        pure.__name__ = f"{function.__name__}_{zlib.crc32(what_it_depends_on)}"  # by which it is remembered
        return assume_pure_torch(pure, use_cache=True)

    def loss(self, tokens, parameters):
        """Mean loss over the windows tokens [B, T + 1]: each position predicts the next."""
        with torch.autocast("xla", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return functional_call(self.model, dict(zip(self.names, parameters)), (tokens[:, :-1], tokens[:, 1:]))

    def add_loss(self, tokens, parameters, total):
        return total + self.loss(tokens, parameters)

    def add_gradients(self, tokens, parameters, total, gradients):
        """(total, gradients), the latter from last to first. Called for each micro-batch of a step, it adds up the means."""
        with torch.enable_grad():
            loss = self.loss(tokens, parameters) / self.micro_batches
        added = torch.autograd.grad(loss, parameters)
        sums = [gradient + more for gradient, more in zip(gradients, added)]
        return total + loss.detach(), sums[::-1]  # XLA numbers inputs by the last result first. In this order it finds the
        # memory of gradient i for result i, among all of that shape, and adds in place: 6 % of a step


@torch.no_grad()
def train_step(passes, optimizer, batch, step, stop, zero):
    """One optimiser step on this core's windows, batch [n, T + 1] on the host: accumulates the gradients of the
    micro-batches, averages them over the cores, clips, updates. Returns a report that nobody has waited for, a tensor [5]
    on the device: mean loss over all cores, gradient norm, updates skipped so far and in a row, and the number of cores
    on which `stop` is true. zero: a 0 on the device.

    Two graphs: a micro-batch, run for each of them, and the update. Gradients are set to zero after the update, and not to
    None: so the first micro-batch adds to buffers like all others and runs the same graph.
    """
    total = zero
    for tokens in batch.split(passes.config.micro_batch_size):
        old = [p.grad for p in passes.parameters]
        total, gradients = passes.add_gradients(tokens.to(zero.device), passes.parameters, total, old)
        for p in passes.parameters:
            p.grad.copy_(gradients.pop())  # nothing else may hold it at the sync, or it is kept in memory a second time
        torch_xla.sync()
    stop = torch.tensor([float(stop)]).to(zero.device)  # [1], since a 0 or 1 of no dimension would be a constant of the graph
    loss, stops = xm.all_reduce(xm.REDUCE_SUM, torch.cat([total[None] / xr.world_size(), stop])).unbind()
    arguments = {"schedule": optimizer.schedule(step).to(zero.device), "loss": loss}
    grad_norm = xm.optimizer_step(optimizer, optimizer_args=arguments)
    optimizer.zero_grad(set_to_none=False)
    report = torch.stack([loss, grad_norm, *optimizer.skipped.unbind(), stops])
    torch_xla.sync()
    return report


@torch.no_grad()
def evaluate(passes, windows, zero):
    """Mean loss over all cores' windows, of which this core has windows [n, T + 1]. Waits for the device."""
    total, micro_batches = zero, windows.split(passes.config.micro_batch_size)
    for tokens in micro_batches:
        total = passes.add_loss(tokens.to(zero.device), passes.parameters, total)
        torch_xla.sync()
    mean_loss = xm.all_reduce(xm.REDUCE_SUM, total / len(micro_batches), scale=1 / xr.world_size())
    torch_xla.sync()
    return mean_loss.cpu().item()  # torch_xla's own .item() is a race where cores are threads of one process


def worker(config, checkpoint, deadline, stop_wanted):
    """The training run, as each core runs it. Cores differ in the windows they read, and core 0 also writes. It ends
    early if stop_wanted() on any core, or if by time.monotonic() there is just time to save before the deadline."""
    rank, cores, device = xr.global_ordinal(), xr.world_size(), torch_xla.device()
    check_batch_size(config, cores)
    train_tokens, val_tokens = data.open_data(config)
    if val_tokens:
        starts = val_tokens.fixed_windows(config.eval_batches * config.batch_size)
        val_windows = torch.from_numpy(val_tokens.read(starts[rank::cores]))

    model = Llama(config, config.seed).to(device)
    optimizer, passes = AdamW(model.parameters(), config), Passes(model, config)
    first_step = restore(checkpoint, model, optimizer) if checkpoint else 0
    zero = torch.zeros((), device=device)
    torch_xla.sync()  # from here on weights, moments, gradients and zero are buffers, not recipes
    steps = xm.all_reduce(xm.REDUCE_SUM, torch.tensor([float(first_step)]).to(device))
    torch_xla.sync()
    if steps.cpu().item() != first_step * cores:
        raise UserError(f"step {first_step} is not where all cores start from; out_dir must be on a disk that all hosts share")
    log = Log(config, checkpoint, first_step)
    if rank == 0:
        saver = Saver(config, checkpoint, train_tokens.sha256(), log.say)
        log.say((f"going on from {checkpoint}" if checkpoint else "starting") + " (compiling the first step takes a while)")

    for step in range(first_step, config.max_steps):
        started = time.perf_counter()
        batch = torch.from_numpy(train_tokens.train_batch(step, config.batch_size, config.seed, rank, cores))
        late = rank == 0 and time.monotonic() + 2 * (log.longest + saver.seconds) > deadline
        report = train_step(passes, optimizer, batch, step, late or stop_wanted(), zero)
        log.host_seconds += time.perf_counter() - started
        done = step + 1
        stopping = log.read()  # an earlier step's report, while the device works on this step
        if step == first_step or due(done, config.log_every, config):
            log.pending, log.host_seconds = (done, learning_rate(step, config), report, log.host_seconds), 0.0
        evaluating, saving = val_tokens and due(done, config.eval_every, config), due(done, config.checkpoint_every, config)
        if not (evaluating or saving or stopping):
            continue
        stopping |= log.read()
        if evaluating:
            val_loss = evaluate(passes, val_windows, zero)
            if rank == 0:
                log.write({"step": done, "val_loss": val_loss}, "val loss {val_loss:.4f}")
        if rank == 0 and (saving or stopping) and not log.diverged:
            saver.save(done, model, optimizer, bytes(log.rows), last=stopping or done == config.max_steps)
        log.restart_clock(done)
        if stopping:
            break
    if rank == 0:
        saver.wait()
        log.write_all()
        if log.diverged:
            raise UserError(log.diverged)
        if done < config.max_steps:
            resume = "" if config.resume == "auto" else " with --resume=auto"
            log.say(f"stopped after step {done}; to go on: the same command{resume}")


def main():
    session_start = time.monotonic()
    if "--help" in sys.argv or "-h" in sys.argv:
        return print_help()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("expected a config first, as in python train.py config/demo.py; --help lists the keys")
    config = load_config(sys.argv[1], sys.argv[2:])
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise UserError(f"{name} is set: it silently makes weights, moments and loss bfloat16. Unset it; "
                            "dtype=bfloat16 computes in bfloat16 and keeps those in float32")
    check_attention(config, xr.device_type())
    train_tokens = data.check_data(config)
    checkpoint = checkpoint_to_resume(config, train_tokens.sha256())
    (total, in_matmuls), tokens = num_parameters(config), config.batch_size * config.context
    print(f"{total:,} parameters, {in_matmuls:,} of them in matmuls | {config.max_steps:,} steps x {tokens:,} tokens "
          f"= {config.max_steps * tokens:,} | {config.out_dir}")
    if checkpoint and read_state(checkpoint)["step"] >= config.max_steps:
        return print(f"{checkpoint} is the end of this run: nothing to do")
    if xr.device_type() == "CPU":  # there XLA allocates its buffers anew in each step, and huge pages take a tenth off it
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read by the worker's glibc when it starts
    run_on_all_cores(xmp.spawn, worker, config, checkpoint, session_start + 3600 * (config.max_hours or math.inf))


if __name__ == "__main__":
    run_command(main)
