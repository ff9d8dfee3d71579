"""Train a Llama on all cores of a TPU (or, slowly, on a CPU) with PyTorch/XLA.

    python train.py config/fwedu_124m.py                # on a TPU v5e-8
    python train.py config/demo.py --max_steps=100      # a config file, and changes to it
    python train.py --help                              # every key: type, default, meaning

Read model.py first. Then this file in order: the config, the learning rate, the optimiser, one
training step, and `worker`, the loop that every core runs.

PyTorch/XLA in five sentences. An operation on an XLA tensor computes nothing; it records a node in
a graph ("tracing"). torch_xla.sync() starts the recorded graph on the device and does not wait for
it. If the graph is new, XLA compiles it first, which takes seconds or minutes. Reading a number
(.cpu(), print, if) does wait. So a fast loop records the same few graphs in every step, and reads
nothing that the device is still computing.
"""
import sys

from nanoxla.environment import check_environment, mend_environment, tune_environment

mend_environment()  # torch_xla reads the environment once, when it is imported below

import math
import time
from dataclasses import dataclass

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from torch.func import functional_call

import data
import nanoxla.config
from model import Llama, ModelConfig, flops_per_token, num_parameters
from nanoxla import shards, tpu
from nanoxla.checkpoint import read_state
from nanoxla.config import BELOW_ONE, POSITIVE, at_least, between, key, one_of, session_key
from nanoxla.errors import UserError, run_command
from nanoxla.flash_attention import check_attention
from nanoxla.init_from import check_init_from, load_initial_weights
from nanoxla.launch import run_on_all_cores
from nanoxla.lock import check_not_owned
from nanoxla.log import TrainingLog, checkpoint_due, due
from nanoxla.resume import checkpoint_to_resume
from nanoxla.saver import Saver, restore
from nanoxla.tracing import trace_once

# --- the config ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(ModelConfig):
    # To add a key, add a line: type, default, the meaning that --help shows, the values allowed.
    out_dir: str = session_key("out/run", "directory of metrics.jsonl and checkpoints/")
    data_dir: str = session_key("data", "directory of the shards")
    train_glob: str = session_key("train_*.bin", "training shards in data_dir")
    val_glob: str = session_key("val_*.bin", "validation shards in data_dir")
    shard_format: str = session_key("auto", "auto: recognise how the shards store ids | an integer "
                                            "type: so, without a header",
                                    one_of(*data.SHARD_FORMATS))
    tokenizer: str = session_key("", "SentencePiece model to store in every checkpoint; "
                                     "default: the one that data_dir/meta.json names")
    batch_size: int = key(256, "windows per optimiser step, over all cores", at_least(1))
    micro_batch_size: int = session_key(8, "windows per core per forward pass", at_least(1))
    max_steps: int = key(1_000, "optimiser steps of the whole run", at_least(1))
    learning_rate: float = key(6e-4, "peak, reached after warmup_steps", POSITIVE)
    min_lr: float = key(0.0, "learning rate at the end of the schedule", at_least(0))
    schedule: str = key("cosine", "after the warm-up: a cosine; or constant, then a linear decay",
                        one_of("cosine", "wsd"))
    warmup_steps: int = key(100, "steps of linear warm-up", at_least(0))
    decay_steps: int = key(0, "steps of linear decay at the end; schedule=wsd only", at_least(0))
    weight_decay: float = key(0.1, "AdamW's weight decay; matrices only", at_least(0))
    beta1: float = key(0.9, "AdamW's decay rate of the first moment", BELOW_ONE)
    beta2: float = key(0.95, "AdamW's decay rate of the second moment", BELOW_ONE)
    grad_clip: float = key(1.0, "clip the averaged gradient to this norm; 0: do not", at_least(0))
    dtype: str = key("bfloat16", "number format of matrix products and residual stream; the rest "
                                 "is float32", one_of("bfloat16", "float32"))
    peak_tflops: float = session_key(0.0, "peak of one core in bfloat16, for mfu; 0: that of the "
                                          "chip, if it is a v5e or v6e; else there is no mfu",
                                     at_least(0))
    seed: int = key(0, "random seed of the weights and of the order of the data",
                    between(0, 2**63 - 1, "63 bits"))
    log_every: int = session_key(10, "steps between log rows and between stop checks", at_least(1))
    eval_every: int = session_key(1_000, "steps between evaluations; 0: none", at_least(0))
    eval_batches: int = session_key(8, "batches of batch_size in an evaluation", at_least(1))
    checkpoint_every: int = session_key(1_000, "steps between checkpoints; 0: only at the end",
                                        at_least(0))
    keep_checkpoints: int = session_key(2, "newest checkpoints to keep", at_least(1))
    max_hours: float = session_key(0.0, "stop early enough to finish saving within this many "
                                        "hours, counting start-up; 0: no limit", at_least(0))
    max_skipped: int = session_key(10, "stop if more than this many updates in a row were "
                                       "skipped as not finite; checked every log_every steps",
                                   at_least(0))
    resume: str = session_key("auto", "auto: from the newest checkpoint in out_dir, or else in "
                                      "resume_search, if any | never: start a new run, in an "
                                      "unused out_dir | the path of a checkpoint or a run")
    resume_search: str = session_key("/kaggle/input", "directory that resume=auto searches for "
                                                      "this run if out_dir has no checkpoint")
    init_from: str = key("", "start a new run with the weights of this run, checkpoint or "
                             "Hugging Face directory")
    hang_minutes: float = session_key(15.0, "end the run if a core does not come to its next step "
                                            "for this long; 0: wait forever", at_least(0))

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps > self.max_steps - self.decay_steps:
            less = f" - decay_steps = {self.decay_steps}" if self.decay_steps else ""
            raise ValueError(f"warmup_steps = {self.warmup_steps} is more than "
                             f"max_steps = {self.max_steps}{less}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} is more than "
                             f"learning_rate = {self.learning_rate}")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError("decay_steps needs schedule=wsd; a cosine decays all the time")

    @property
    def decay_start(self):
        """The number of steps before a wsd run begins to decay. max_steps may change until then, so
        the checkpoint of that step is never deleted. 0: there is none."""
        return self.max_steps - self.decay_steps if self.schedule == "wsd" else 0


def load_config(path, overrides=()):
    """The defaults; over them the config file `path`; over both, strings "--key=value"."""
    return nanoxla.config.load(Config, path, overrides)


def check_batch_size(config, cores):
    if config.batch_size % (cores * config.micro_batch_size):
        raise UserError(f"batch_size = {config.batch_size} is not a multiple of {cores} cores x "
                        f"micro_batch_size = {config.micro_batch_size}")


# --- learning rate and optimiser ----------------------------------------------------------------


def learning_rate(step, config):
    """The learning rate of `step`, counted from 0."""
    # 1) linear warm-up; its last step has the peak
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    # 2) wsd (warm-up, stable, decay): the peak, and in the last decay_steps a line to min_lr
    if config.schedule == "wsd":
        share = min(1.0, (config.max_steps - step) / max(1, config.decay_steps))
        return config.min_lr + share * (config.learning_rate - config.min_lr)
    # 2) or half a cosine, from the peak down to min_lr
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101), after clipping by global
    norm. An update whose loss or gradient is not finite is skipped.

    Why not torch.optim.AdamW? By default it computes the learning rate and the bias corrections as
    Python numbers. torch_xla makes a Python number an input of the graph, except 0 and 1, which it
    makes constants. So a value that reaches 0 or 1 changes the graph, and the step is compiled
    again in the middle of the run: for beta2 = 0.95 that is the 325th step, where sqrt(1 -
    beta2^325) rounds to 1 in float32. Here, everything that depends on the step comes in one small
    tensor, and the moments exist from the start: one graph, whatever the step.
    """

    def __init__(self, parameters, config):
        self.config = config
        super().__init__(list(parameters), {})
        # How many updates were skipped, in total and in a row up to now.
        self.skipped = torch.zeros(2, device=self.param_groups[0]["params"][0].device)
        for p in self.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)  # zeros and never None: see train_step
            self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def schedule(self, step):
        """The numbers that depend on the step, as a tensor [3]: the learning rate, and the bias
        corrections of the two moments."""
        return torch.tensor([learning_rate(step, self.config),
                             1 - self.config.beta1 ** (step + 1),
                             1 - self.config.beta2 ** (step + 1)])

    @torch.no_grad()
    def step(self, schedule, loss):
        """Updates the parameters. Returns the gradient's norm before clipping, which stays on the
        device. loss: the mean over all cores; only whether it is finite matters.

        xm.optimizer_step calls this after it has averaged the gradients over the cores. Clipping
        has to come after the average: before it, each core would shrink its own gradient by a
        different factor."""
        config, parameters = self.config, self.param_groups[0]["params"]
        lr, correction1, correction2 = schedule.unbind()
        grad_norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        scale = (config.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if config.grad_clip else 1.0

        # Skip an update that is not finite. An `if` would have to read the device, so the graph
        # always updates. An update to be skipped has a learning rate of 0, and gives weight 0 to
        # the gradient and weight 1 to the old moment: nothing changes.
        finite = (grad_norm + loss).isfinite()
        zero = torch.zeros_like(grad_norm)
        lr, weight1, weight2 = (torch.where(finite, x, zero)
                                for x in (lr, 1 - config.beta1, 1 - config.beta2))
        beta1, beta2 = 1 - weight1, 1 - weight2
        decay, step_size = 1 - lr * config.weight_decay, lr / correction1
        for p in parameters:
            grad = torch.where(finite, p.grad * scale, zero)  # since 0 * nan is nan
            exp_avg, exp_avg_sq = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            exp_avg.mul_(beta1).add_(grad * weight1)
            exp_avg_sq.mul_(beta2).add_(grad.square() * weight2)
            if p.dim() >= 2:  # matrices decay; the weights of the norms have no reason to be small
                p.mul_(decay)
            p.sub_(step_size * exp_avg / ((exp_avg_sq / correction2).sqrt() + 1e-8))
        (total, in_a_row), bad = self.skipped.unbind(), 1 - finite.float()
        self.skipped.copy_(torch.stack([total + bad, (in_a_row + bad) * bad]))
        return grad_norm


# --- one step -----------------------------------------------------------------------------------


class TracedModel:
    """Loss and gradients of a micro-batch, without tracing them anew for each.

    Recording the hundreds of operations of forward and backward takes Python longer than a TPU
    needs, by estimate, to compute them. So only the first call records them. Each later call
    records a single operation that refers to that first trace (nanoxla/tracing.py). This requires
    pure functions: the sums of loss and gradients so far go in, and the new sums come out.
    """

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.names, self.parameters = zip(*model.named_parameters())
        self.device = self.parameters[0].device
        self.micro_batches = config.batch_size // (xr.world_size() * config.micro_batch_size)
        # The sync in `worker` turns this zero into a buffer on the device: an input of the
        # micro-batch graph. A Python 0 would be a constant, and the first micro-batch of a step
        # would be another graph.
        self.zero = torch.zeros((), device=self.device)
        self.loss_sum = self.zero
        depends_on = config, self.micro_batches  # Python values that the traces freeze
        self.add_loss = trace_once(self.add_loss, depends_on)
        self.add_loss_and_gradients = trace_once(self.add_loss_and_gradients, depends_on)

    def loss(self, tokens, parameters):
        """Mean loss over tokens [B, T + 1]: every position predicts the next token."""
        with torch.autocast("xla", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return functional_call(self.model, dict(zip(self.names, parameters)),
                                   (tokens[:, :-1], tokens[:, 1:]))

    def add_loss(self, tokens, parameters, loss_sum):
        return loss_sum + self.loss(tokens, parameters)

    def add_loss_and_gradients(self, tokens, parameters, loss_sum, gradient_sums):
        """The new sums of loss and gradients; the latter in reverse order of the parameters."""
        with torch.enable_grad():
            loss = self.loss(tokens, parameters) / self.micro_batches  # so the sum is a mean
        gradients = torch.autograd.grad(loss, parameters)
        gradient_sums = [total + gradient for total, gradient in zip(gradient_sums, gradients)]
        return loss_sum + loss.detach(), gradient_sums[::-1]

    def accumulate_loss(self, tokens):
        self.loss_sum = self.add_loss(tokens.to(self.device), self.parameters, self.loss_sum)

    def accumulate_gradients(self, tokens):
        """Adds to loss_sum and to p.grad of every parameter.

        The traced function returns the sums of the gradients in reverse order, for speed only. For
        each result in turn, XLA reuses the memory of the first input of the same shape that is
        still free. torch_xla lists the old gradients last to first. With the new sums last to first
        as well, each gets the memory of its own old gradient, and XLA adds in place. By the
        compiler's estimate that saves 6 % of a step.

        These sums are local variables, gone before the sync. Whatever Python still refers to at the
        sync becomes a result of the graph with memory of its own: each sum would exist twice, there
        and in p.grad."""
        old = [p.grad for p in self.parameters]
        self.loss_sum, sums = self.add_loss_and_gradients(
            tokens.to(self.device), self.parameters, self.loss_sum, old)
        for p, gradient_sum in zip(self.parameters, reversed(sums)):
            p.grad.copy_(gradient_sum)

    def take_loss_sum(self):
        """What has been added to loss_sum. In training it is the mean over the micro-batches of a
        step, in evaluation their sum. The next sum starts from 0."""
        taken, self.loss_sum = self.loss_sum, self.zero
        return taken


@torch.no_grad()
def train_step(traced, optimizer, batch, step, stop):
    """Starts one optimiser step on this core's share of the batch, [n, T + 1] on the host, and
    returns without waiting. stop: whether this core has been asked to stop.

    Returns a report, a tensor [5] on the device: the mean loss over all cores, the gradient's norm,
    the updates skipped in total and in a row, and the number of cores that were asked to stop.
    """
    # The micro-batch graph, run once for each: forward, backward, add to the sums. The sync ends
    # it. Without the sync all micro-batches would form one large graph: longer to compile, and with
    # the activations of all of them in memory.
    for tokens in batch.split(traced.config.micro_batch_size):
        traced.accumulate_gradients(tokens)
        torch_xla.sync()

    # The update graph: average over the cores, clip, update. The stop flag has the shape [1].
    # Without dimensions, a new 0 or 1 would be a constant of the graph, like a Python number: a
    # request to stop would make a different graph, and XLA would compile again.
    stop = torch.tensor([float(stop)]).to(traced.device)
    # The sum is already a mean over this core's micro-batches. A sum over the cores follows.
    loss = traced.take_loss_sum()[None] / xr.world_size()
    loss, stops = xm.all_reduce(xm.REDUCE_SUM, torch.cat([loss, stop])).unbind()
    schedule = optimizer.schedule(step).to(traced.device)
    grad_norm = xm.optimizer_step(optimizer, optimizer_args={"schedule": schedule, "loss": loss})
    # Zeros, not None: gradients are inputs of the micro-batch graph, so the first micro-batch of a
    # step needs some to add to, like all the others. Without them it would have to be a different
    # graph.
    optimizer.zero_grad(set_to_none=False)
    report = torch.stack([loss, grad_norm, *optimizer.skipped.unbind(), stops])
    torch_xla.sync()
    return report


@torch.no_grad()
def evaluate(traced, windows):
    """The mean loss over the windows of all cores. windows [n, T + 1]: this core's share. Waits for
    the result."""
    micro_batches = windows.split(traced.config.micro_batch_size)
    for tokens in micro_batches:
        traced.accumulate_loss(tokens)
        torch_xla.sync()
    loss = traced.take_loss_sum() / len(micro_batches)
    mean_loss = xm.all_reduce(xm.REDUCE_SUM, loss, scale=1 / xr.world_size())
    torch_xla.sync()
    return mean_loss.cpu().item()  # .cpu() first: .item() of an XLA tensor is not thread-safe


# --- the run ------------------------------------------------------------------------------------


def worker(config, checkpoint, deadline, stop_requested):
    """The training run, as every core runs it. Cores read different windows; core 0 also writes.

    deadline: the value of time.monotonic() by which the run must have saved. stop_requested: a
    function that returns whether the user asked to stop.

    A run compiles six graphs, whatever its length. At the start: the zeros of moments and gradients
    (weights are uploaded, not computed), and check_all_cores_start_at. In train_step: a
    micro-batch, and the update. In evaluate: a micro-batch without gradients, and the mean loss."""
    rank, cores, device = xr.global_ordinal(), xr.world_size(), torch_xla.device()
    check_batch_size(config, cores)

    # the data: training windows are read step by step, validation windows once
    train_data, val_data = data.open_data(config)
    if val_data:
        starts = val_data.fixed_windows(config.eval_batches * config.batch_size)
        val_windows = torch.from_numpy(val_data.read(starts[rank::cores]))
        bytes_per_token = shards.bytes_per_token(val_data.paths)

    # model and optimiser, and the checkpoint that the run continues from
    model = Llama(config, config.seed)
    if config.init_from and not checkpoint:
        load_initial_weights(model, config)
    model.to(device)
    optimizer = AdamW(model.parameters(), config)
    traced = TracedModel(model, config)
    step = first_step = restore(checkpoint, model, optimizer) if checkpoint else 0
    torch_xla.sync()  # or the first step would also compute the zeros, and be another graph
    check_all_cores_start_at(first_step, device)

    # what reports, saves, and decides when to stop
    log = TrainingLog(config, checkpoint, first_step, flops_per_token(config))
    saver = Saver(config, num_parameters(config)[0], checkpoint, train_data.fingerprint(), log)
    log.say((f"continuing from {checkpoint}" if checkpoint else "starting")
            + " (compiling the first step takes a while)")

    def stop_wanted():
        # After a request the run goes on to the next report, and then saves. Allow twice the
        # sum of the longest interval and the longest save so far.
        time_to_stop = 2 * (log.longest_interval + saver.longest_save)
        late = rank == 0 and time.monotonic() + time_to_stop > deadline
        return stop_requested() or late  # always called: it tells the launcher that we live

    while step < config.max_steps:
        # one optimiser step: record its graphs, start them, do not wait
        log.step_begins()
        batch = train_data.batch(step, config.batch_size, config.seed, rank, cores)
        report = train_step(traced, optimizer, torch.from_numpy(batch), step, stop_wanted())
        lr = learning_rate(step, config)
        step += 1

        # hand in its report, and read the one before while the device works on this step
        stopping = log.training(step, lr, report)

        # once in a while: the validation loss (all cores take part)
        if val_data and due(step, config.eval_every, config):
            log.validation(step, evaluate(traced, val_windows), bytes_per_token)

        # once in a while, and before stopping: a checkpoint (core 0 writes it in the background)
        if (stopping or checkpoint_due(step, config)) and not log.diverged:
            saver.save(step, model, optimizer, last=stopping or step == config.max_steps)
        if stopping:
            break

    saver.wait()
    log.close(step)


def check_all_cores_start_at(step, device):
    """Raises UserError unless all cores found the checkpoint of the same step."""
    steps = xm.all_reduce(xm.REDUCE_SUM, torch.tensor([float(step)]).to(device))
    torch_xla.sync()
    if steps.cpu().item() != step * xr.world_size():
        raise UserError(f"not all cores start from step {step}, as this one does; "
                        "out_dir must be on a disk that all hosts share")


def main():
    session_start = time.monotonic()
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__.split("\n\n")[1], "\n\nKeys, with type, default and meaning:\n")
        return nanoxla.config.print_keys(Config)
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("expected a config first, as in python train.py config/demo.py; "
                        "--help lists the keys")
    config = load_config(sys.argv[1], sys.argv[2:])
    check_environment()
    check_attention(config, xr.device_type())  # device_type() does not open the TPU: workers do
    if xr.device_type() == "TPU":
        tpu.check_free(seconds=30)
    check_not_owned(config.out_dir)
    train_data, paths = data.check_data(config)
    checkpoint = checkpoint_to_resume(config, train_data.fingerprint())
    # Reads all shards, so only once in a run. A run resumed has the same training data, by its
    # fingerprint; and every window is checked again when it is read.
    if not (checkpoint and read_state(checkpoint)["data_sha256"]):
        shards.check_token_ids(paths, config.vocab_size, config.shard_format)
    if config.init_from and not checkpoint:
        check_init_from(config)

    (total, in_matmuls), tokens = num_parameters(config), config.batch_size * config.context
    print(f"{total:,} parameters, {in_matmuls:,} of them in matmuls | {config.max_steps:,} steps x "
          f"{tokens:,} tokens = {config.max_steps * tokens:,} | {config.out_dir}")
    if checkpoint and read_state(checkpoint)["step"] >= config.max_steps:
        return print(f"{checkpoint} is the last checkpoint of this run: nothing to do")
    tune_environment(xr.device_type(), tpu.kind())
    deadline = session_start + 3600 * (config.max_hours or math.inf)
    run_on_all_cores(xmp.spawn, worker, (config, checkpoint, deadline), config.hang_minutes)


if __name__ == "__main__":
    run_command(main)
