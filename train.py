"""Train a Llama on all cores of a TPU (or, slowly, on a CPU) with PyTorch/XLA.

    python train.py config/fwedu_124m.py                    # on a TPU v5e-8
    python train.py config/demo.py --max_steps=100          # a config file, then changes to it
    python train.py --help                                  # every key with its type, default and meaning

Read `worker` first: it is what runs on each core, and all else here serves it. Three things to know about XLA:
an operation on an XLA tensor only writes a node into a graph; torch_xla.sync() compiles the graph, or finds it compiled,
and starts it on the device without waiting; reading a number (.item(), print, if) does wait. So the loop keeps every step
the same graph, and lets the device work on a step while Python writes down the next.
"""
import os
import sys

if os.environ.get("TPU_PROCESS_ADDRESSES") == "local":  # Kaggle's image sets it, and then the 8 processes do not find
    for name in ("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID"):  # one another; must be gone before torch_xla loads
        os.environ.pop(name, None)

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import re
import tempfile
import threading
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from tqdm import tqdm

import data
from checkpoint import checkpoint_to_resume, read_state, restore, save
from data import UserError
from model import Llama, ModelConfig, flops_per_token, num_parameters

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
    log_every: int = 10  # steps between rows in metrics.jsonl; step 1 has one too
    eval_every: int = 1_000  # steps between evaluations, and one at the end; 0 never evaluates
    eval_batches: int = 8  # batches of batch_size windows in an evaluation
    checkpoint_every: int = 1_000  # steps between checkpoints, and one at the end; 0 saves only that one
    keep_checkpoints: int = 2  # newest checkpoints kept
    resume: str = "auto"  # auto: go on from the newest checkpoint in out_dir | never: refuse a used out_dir | a checkpoint


RULES = (  # keys, what must hold for each, the same in words
    ("dim n_layers n_heads hidden_dim context batch_size micro_batch_size max_steps log_every eval_batches keep_checkpoints",
     lambda x: x >= 1, "at least 1"),
    ("warmup_steps seed eval_every checkpoint_every min_lr weight_decay grad_clip", lambda x: 0 <= x < math.inf, "at least 0"),
    ("rope_theta norm_eps learning_rate peak_tflops", lambda x: 0 < x < math.inf, "more than 0"),
    ("beta1 beta2", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("vocab_size", lambda x: 2 <= x <= data.LARGEST_VOCABULARY, f"from 2 to {data.LARGEST_VOCABULARY} (shards are uint16)"),
    ("attention", lambda x: x in ("math", "flash"), "math or flash"),
    ("dtype", lambda x: x in ("bfloat16", "float32"), "bfloat16 or float32"),
)


def load_config(path, overrides=()):
    """Defaults, under the assignments of the Python file `path`, under overrides like "--max_steps=100"."""
    values = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec"), values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} can't be read: {error}") from None
    except Exception as error:
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    values = {key: typed(key, value, path) for key, value in values.items() if not key.startswith("__")}
    for argument in overrides:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument}: expected --key=value; python train.py --help lists the keys")
        values[key] = typed(key, value, "the command line", parse=True)
    return check_config(values)


def typed(key, value, where, parse=False):
    """`value`, if `key` is a config key and the value has its type; with `parse`, value is a string to make it of."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    if key not in types:
        nearest = difflib.get_close_matches(key, types, n=1, cutoff=0)[0]
        raise UserError(f"{where}: there is no key {key!r}; the nearest is {nearest!r}")
    kind = types[key]
    if parse or (kind is float and type(value) is int):
        with contextlib.suppress(ValueError):
            value = kind(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} = {value!r}, expected {kind.__name__}")
    return value


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
    """

    def __init__(self, parameters, config):
        self.config = config
        super().__init__(list(parameters), {})
        for p in self.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)  # see zero_grad in train_step
            self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def schedule(self, step):
        """What depends on the step, as one tensor [3]: learning rate and the two bias corrections."""
        return torch.tensor([learning_rate(step, self.config), 1 - self.config.beta1 ** (step + 1),
                             1 - self.config.beta2 ** (step + 1)])

    @torch.no_grad()
    def step(self, schedule):
        """Updates the parameters and returns the gradient's norm before clipping, without reading either.

        xm.optimizer_step calls this after it has averaged the gradients over the cores. Clipping belongs here, behind
        the average: clipped before it, each core would shrink its own gradient by another factor.
        """
        lr, correction1, correction2 = schedule.unbind()
        beta1, beta2, eps = self.config.beta1, self.config.beta2, 1e-8
        parameters = self.param_groups[0]["params"]
        grad_norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        scale = (self.config.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if self.config.grad_clip else 1.0
        for p in parameters:
            grad = p.grad * scale
            exp_avg, exp_avg_sq = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.lerp_(grad.square(), 1 - beta2)
            if p.dim() >= 2:  # matrices; a norm's weight has no reason to be small
                p.mul_(1 - lr * self.config.weight_decay)
            p.sub_(lr / correction1 * exp_avg / ((exp_avg_sq / correction2).sqrt() + eps))
        return grad_norm


# --- what a run reports -----------------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl for programs, one aligned line for people, and on a terminal a bar with the time that is left.

    A number that the device is still computing is not waited for: `training` keeps it, and `flush` reads it a step later,
    while the device is busy with that step.
    """

    def __init__(self, config, first_step):
        self.config = config
        self.path = Path(config.out_dir, "metrics.jsonl")
        rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= first_step]
        data.write_file(self.path, "".join(kept).encode())
        tqdm.set_lock(threading.RLock())  # its default is a semaphore between processes, reported as leaked if this one ends
        self.bar = tqdm(total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False,
                        disable=not sys.stderr.isatty())
        self.pending, self.host_seconds = None, 0.0
        self.restart_clock(first_step)

    def restart_clock(self, step):
        """Begins the interval that the next row's speed is of; what happened before it does not count."""
        self.since_step, self.since = step, time.perf_counter()

    def training(self, step, loss, grad_norm):
        self.pending = step, loss, grad_norm, self.host_seconds
        self.host_seconds = 0.0

    def flush(self):
        if self.pending is None:
            return
        step, loss, grad_norm, host_seconds = self.pending
        self.pending = None
        config, loss, grad_norm = self.config, loss.item(), grad_norm.item()
        if not math.isfinite(loss + grad_norm):  # before it is saved over the good checkpoints
            raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}: diverged; start with a lower learning_rate")
        steps, seconds = step - self.since_step, time.perf_counter() - self.since
        tokens_per_s = steps * config.batch_size * config.context / seconds
        mfu = tokens_per_s * flops_per_token(config) / (config.peak_tflops * 1e12 * xr.world_size())
        row = {"step": step, "loss": loss, "lr": learning_rate(step - 1, config), "grad_norm": grad_norm,
               "tokens": step * config.batch_size * config.context, "tokens_per_s": tokens_per_s,
               "step_ms": 1e3 * seconds / steps, "host_ms": 1e3 * host_seconds / steps,
               "mfu": mfu if xr.device_type() == "TPU" else None, "compiles": met.metric_data("CompileTime")[0]}
        self.write(row, "loss {loss:7.4f} | lr {lr:.2e} | grad norm {grad_norm:6.3f} | "
                        "{step_ms:7.1f} ms (host {host_ms:5.1f}) | {tokens_per_s:9,.0f} tok/s" +
                        (" | mfu {mfu:.1%}" if row["mfu"] else ""))
        self.bar.update(step - self.bar.n)
        self.restart_clock(step)

    def write(self, row, line):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.write(f"step {row['step']:6d}/{self.config.max_steps} | {line.format(**row)}", file=sys.stdout)
        sys.stdout.flush()


# --- the run ----------------------------------------------------------------------------------------------------------


def forward(model, tokens, config):
    """Mean loss over the windows tokens [B, T + 1]: each position predicts the next."""
    with torch.autocast("xla", torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return model(tokens[:, :-1], targets=tokens[:, 1:])


def train_step(model, optimizer, batch, step, zero, config):
    """One optimiser step on this core's windows, batch [n, T + 1] on the host: accumulates the gradients of the
    micro-batches, averages them over the cores, clips, updates. Returns the mean loss over all cores and the gradient
    norm as tensors on the device, which nobody has waited for. zero: a 0 on the device.

    Gradients are set to zero after the last micro-batch, not before the first: so the first one adds to buffers like all
    others and runs the same graph. A gradient of None, or a fresh torch.zeros for the loss, would be a second graph.
    """
    micro_batches = batch.split(config.micro_batch_size)
    total = zero
    for i, tokens in enumerate(micro_batches):
        loss = forward(model, tokens.to(zero.device), config) / len(micro_batches)
        loss.backward()
        total = total + loss.detach()
        if i + 1 < len(micro_batches):
            torch_xla.sync()
    schedule = optimizer.schedule(step).to(zero.device)
    grad_norm = xm.optimizer_step(optimizer, optimizer_args={"schedule": schedule})
    optimizer.zero_grad(set_to_none=False)
    mean_loss = xm.all_reduce(xm.REDUCE_SUM, total, scale=1 / xr.world_size())
    torch_xla.sync()
    return mean_loss, grad_norm


@torch.no_grad()
def evaluate(model, windows, zero, config):
    """Mean loss over all cores' windows, of which this core has windows [n, T + 1]. Waits for the device."""
    micro_batches = windows.split(config.micro_batch_size)
    total = zero
    for tokens in micro_batches:
        total = total + forward(model, tokens.to(zero.device), config) / len(micro_batches)
        torch_xla.sync()
    mean_loss = xm.all_reduce(xm.REDUCE_SUM, total, scale=1 / xr.world_size())
    torch_xla.sync()
    return mean_loss.item()


def worker(config, checkpoint):
    """The training run, as each core runs it. Cores differ in the windows they read, and core 0 also writes."""
    rank, cores, device = xr.global_ordinal(), xr.world_size(), torch_xla.device()
    if config.batch_size % (cores * config.micro_batch_size):
        raise UserError(f"batch_size = {config.batch_size} is not a multiple of {cores} cores x micro_batch_size = "
                        f"{config.micro_batch_size}")
    train_tokens, val_tokens = data.open_data(config)
    if val_tokens:
        starts = val_tokens.fixed_windows(config.eval_batches * config.batch_size)
        val_windows = torch.from_numpy(val_tokens.read(starts[rank::cores]))

    model = Llama(config, config.seed).to(device)
    optimizer = AdamW(model.parameters(), config)
    first_step = restore(checkpoint, model, optimizer) if checkpoint else 0
    zero = torch.zeros((), device=device)
    torch_xla.sync()  # from here on weights, moments, gradients and zero are buffers, not recipes
    log = Log(config, first_step) if rank == 0 else None

    for step in range(first_step, config.max_steps):
        started = time.perf_counter()
        batch = train_tokens.train_batch(step, config.batch_size, config.seed, rank, cores)
        loss, grad_norm = train_step(model, optimizer, torch.from_numpy(batch), step, zero, config)
        done = step + 1
        evaluating, saving = val_tokens and due(done, config.eval_every, config), due(done, config.checkpoint_every, config)
        if log:
            log.host_seconds += time.perf_counter() - started
            log.flush()  # an earlier step's numbers, while the device works on this step
            if done == 1 or due(done, config.log_every, config):
                log.training(done, loss, grad_norm)
        if not (evaluating or saving):
            continue
        if log:
            log.flush()
        if evaluating:
            val_loss = evaluate(model, val_windows, zero, config)
            if log:
                log.write({"step": done, "val_loss": val_loss}, "val loss {val_loss:.4f}")
        if saving and log:
            save(config, done, model, optimizer)
        if log:
            log.restart_clock(done)


def due(done, every, config):
    """Whether something that happens every so many steps, and at the end of the run, happens after `done` steps."""
    return done == config.max_steps or (every and done % every == 0)


def guarded_worker(index, config, checkpoint, failure):
    """Runs `worker`. The others would wait in the next all-reduce for ever for a core that failed: so the first to fail
    says why, in the file `failure` and on stderr, and ends its process, at which xmp.spawn ends all."""
    data.end_with_parent()
    try:
        worker(config, checkpoint)
    except BaseException as error:
        try:
            with open(failure, "x") as file:  # x: by one core only
                print(data.told(error) or traceback.format_exc(), file=sys.stderr, flush=True)
                file.write("2" if data.told(error) else "1")
        except FileExistsError:
            time.sleep(5)  # another was first: let it finish its sentence
        os._exit(1)


def main():
    if "--help" in sys.argv or "-h" in sys.argv:
        return print_help()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("expected a config first, as in python train.py config/demo.py; --help lists the keys")
    config = load_config(sys.argv[1], sys.argv[2:])
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise UserError(f"{name} is set: it silently makes weights, moments and loss bfloat16. Unset it; "
                            "dtype=bfloat16 computes in bfloat16 and keeps those in float32")
    if config.attention == "flash" and xr.device_type() != "TPU":
        raise UserError(f"attention = 'flash' runs on a TPU and this is a {xr.device_type()}; use --attention=math")
    data.check_data(config)
    checkpoint = checkpoint_to_resume(config)
    total, in_matmuls = num_parameters(config)
    tokens = config.batch_size * config.context
    print(f"{total:,} parameters, {in_matmuls:,} of them in matmuls | {config.max_steps:,} steps x {tokens:,} tokens "
          f"= {config.max_steps * tokens:,} | {config.out_dir}")
    if checkpoint and read_state(checkpoint)["step"] >= config.max_steps:
        return print(f"{checkpoint} is the end of this run: nothing to do")
    if not data.tokenizer_path(config):
        print("no tokenizer is known for this data, so sample.py will have none; name one with --tokenizer=PATH")
    print(f"going on from {checkpoint}" if checkpoint else "starting", "(compiling the first step takes a while)", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        failure = Path(directory, "exit_code")
        data.end_on_interrupt("the same command goes on from the newest checkpoint, if there is one")
        try:
            xmp.spawn(guarded_worker, args=(config, checkpoint, failure))
        except BrokenProcessPool:
            sys.exit(int(failure.read_text() or 1) if failure.exists() else "a worker process was killed, perhaps for memory")


if __name__ == "__main__":
    data.run_command(main)
