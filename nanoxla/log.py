"""What a run reports: metrics.jsonl, with a JSON object (a *row*) per logged step; a line per row
for people; a progress bar.

A step's report (loss, gradient norm, ...) is a tensor on the device. Reading it makes the host
wait until the device has computed it. If the loop read it at once, the device would stand idle
while the host traces the next step. So the loop reads the report of step 1 after it has started
step 2:

    host    | trace 1 | trace 2 |     wait      | log 1 | trace 3 | wait  | log 2 | trace 4 | ...
    device            |         step 1          |         step 2          |         step 3
                      ^ sync starts it          ^ report 1 is ready       ^ report 2 is ready

Only these reports are read: those of steps that are due (every log_every), of the first step of a
session, and of a step before an evaluation or a checkpoint. A callback notes when a report is
ready. The difference of two such times is the duration of the steps in between. (The times of
reading would be wrong: the host may read a report long after it was ready.)

Before an evaluation or a checkpoint, after the last step, and when the run stops, the report is
read at once: the host has to wait for the device anyway. The clock then stops until the next step
begins, so neither evaluations nor checkpoints affect the speed that a row reports.
"""
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch_xla.experimental.callback import on_ready_callback
from tqdm import tqdm

from nanoxla import tpu
from nanoxla.errors import UserError
from nanoxla.files import write_file
from nanoxla.lock import own


def due(step, every, config):
    """Whether something that happens every `every` steps is due after `step` steps. It is always
    due after the last step; with every = 0, only then."""
    return step == config.max_steps or (every > 0 and step % every == 0)


def checkpoint_due(step, config):
    """Whether a checkpoint is due after `step` steps."""
    return due(step, config.checkpoint_every, config) or step == config.decay_start


def compilations():
    """How many graphs this process has compiled, and how many seconds that took."""
    count, nanoseconds, _ = met.metric_data("CompileTime") or (0, 0, ())
    return count, nanoseconds / 1e9


class Times(NamedTuple):
    """Seconds that this session has spent on steps so far."""
    wall: float  # without pauses (evaluations, checkpoints)
    host: float  # of the host: reading batches, tracing and starting steps, without compiling
    compile: float


class Clock:
    """Measures the steps of a run. The time between the last step before a pause and the first step
    after it does not count."""

    def __init__(self):
        self.running_since = None  # None during a pause
        self.wall = self.host = self.compile = 0.0

    def step_begins(self):
        """The host begins to work on a step."""
        self.began, self.compiled_before = time.perf_counter(), compilations()[1]
        if self.running_since is None:
            self.running_since = self.began

    def step_started(self):
        """The host is done with the step, and the device works on it."""
        compiled = compilations()[1] - self.compiled_before
        self.compile += compiled
        self.host += time.perf_counter() - self.began - compiled

    def step_finished(self, finished, pause):
        """The device finished a step at the time `finished`. pause: the next one does not follow at
        once."""
        self.wall += finished - self.running_since
        self.running_since = None if pause else finished


class PendingReport(NamedTuple):
    step: int
    learning_rate: float
    report: torch.Tensor  # on the device
    ready: SimpleQueue  # receives the time at which the report is ready
    pause: bool  # whether an evaluation or a checkpoint follows
    host: float  # Clock.host when the host had started this step
    compile: float  # Clock.compile at the same time


class TrainingLog:
    """Every core reads the reports, because a report also says whether to stop. Core 0 writes."""

    def __init__(self, config, checkpoint, first_step, flops_per_token):
        """Begins with the rows in the checkpoint that the run continues from (None for a new run).
        Rows that a killed run logged after its last checkpoint are dropped: their steps are run
        again."""
        self.config, self.first_step = config, first_step
        self.flops_per_token = flops_per_token
        self.peak_flops = tpu.peak_flops(config) if xr.device_type() == "TPU" else None
        self.is_writer = xr.global_ordinal() == 0
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.rows = bytearray()
        if checkpoint:
            self.rows += Path(checkpoint, "metrics.jsonl").read_bytes()
        elif config.init_from:
            self.rows += json.dumps({"step": 0, "init_from": config.init_from}).encode() + b"\n"
        if self.is_writer:
            self.lock = own(config.out_dir)
            self.write_all()
        self.bar = tqdm(total=config.max_steps, initial=first_step, unit="step", leave=False,
                        dynamic_ncols=True, disable=not (self.is_writer and sys.stderr.isatty()))
        self.pending = None
        self.clock, self.row_step, self.row_times = Clock(), first_step, Times(0.0, 0.0, 0.0)
        # When the last report was ready (inf: there is none), and the longest time between two.
        self.last_ready, self.longest_interval = math.inf, 0.0
        self.stopping, self.diverged = False, ""

    def step_begins(self):
        self.clock.step_begins()

    def training(self, step, learning_rate, report):
        """Takes the report of a step that has been started, and reads the report before it. Returns
        whether to stop now: the same answer, after the same step, on all cores."""
        config = self.config
        self.clock.step_started()
        self.read_pending()
        pause = due(step, config.eval_every, config) or checkpoint_due(step, config)
        if pause or step == self.first_step + 1 or due(step, config.log_every, config):
            ready = SimpleQueue()
            on_ready_callback(report, lambda _: ready.put(time.perf_counter()))
            self.pending = PendingReport(step, learning_rate, report, ready, pause,
                                         self.clock.host, self.clock.compile)
        if pause or self.stopping:
            self.read_pending()
        return self.stopping

    def read_pending(self):
        """Waits for the pending report, if there is one."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        loss, grad_norm, skipped, in_a_row, stops = pending.report.cpu().tolist()
        finished = pending.ready.get()
        self.clock.step_finished(finished, pending.pause)
        self.longest_interval = max(self.longest_interval, finished - self.last_ready)
        self.last_ready = finished
        # A resumed session reads its first report too, to time it, but writes no row for it: the
        # rows are those of an uninterrupted run.
        if pending.step == 1 or due(pending.step, self.config.log_every, self.config):
            self.write_training_row(pending, loss, grad_norm, int(skipped))
        if in_a_row > self.config.max_skipped:
            self.diverged = (f"step {pending.step}: loss {loss}, gradient norm {grad_norm}, "
                             f"{in_a_row:.0f} updates skipped in a row: the run has diverged; "
                             "start again with a lower learning_rate")
        self.stopping |= bool(stops or self.diverged)

    def write_training_row(self, pending, loss, grad_norm, skipped):
        config, step = self.config, pending.step
        times = Times(self.clock.wall, pending.host, pending.compile)
        wall, host, compile_s = (now - then for now, then in zip(times, self.row_times))
        steps, self.row_step, self.row_times = step - self.row_step, step, times
        step_seconds = (wall - compile_s) / steps
        tokens_per_s = config.batch_size * config.context / step_seconds
        flops = tokens_per_s * self.flops_per_token
        mfu = flops / (self.peak_flops * xr.world_size()) if self.peak_flops else None
        row = {"step": step, "loss": loss, "lr": pending.learning_rate, "grad_norm": grad_norm,
               "tokens": step * config.batch_size * config.context, "tokens_per_s": tokens_per_s,
               "step_ms": 1e3 * step_seconds, "host_ms": 1e3 * host / steps,
               "mfu": mfu, "compiles": compilations()[0], "skipped": skipped,
               "compile_s": compile_s}
        line = ("loss {loss:7.4f} | lr {lr:.2e} | grad norm {grad_norm:6.3f} | "
                "{step_ms:7.1f} ms (host {host_ms:5.1f}) | {tokens_per_s:9,.0f} tok/s")
        line += " | mfu {mfu:.1%}" if row["mfu"] else ""
        line += " | {skipped} updates skipped" if skipped else ""
        line += " | compiled for {compile_s:.1f} s" if compile_s else ""
        self.write(row, line)
        self.bar.update(step - self.bar.n)

    def validation(self, step, val_loss, bytes_per_token):
        """val_loss: in nats per token. bytes_per_token: of the validation data; None if unknown."""
        row, line = {"step": step, "val_loss": val_loss}, "val loss {val_loss:.4f}"
        if bytes_per_token:  # bits per byte can be compared between tokenizers
            row["val_bpb"] = val_loss / math.log(2) / bytes_per_token
            line += " | {val_bpb:.4f} bits per byte"
        self.write(row, line)

    def write(self, row, line):
        """Appends a row to metrics.jsonl and prints it, as `line` formats it."""
        if not self.is_writer:
            return
        in_json = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                   for key, value in row.items()}  # JSON has no nan
        addition = json.dumps(in_json).encode() + b"\n"
        self.rows += addition
        try:
            if self.path.exists() and self.path.stat().st_size + len(addition) == len(self.rows):
                with self.path.open("ab") as file:
                    file.write(addition)
            else:  # rows are missing: the disk was full, or the file was removed
                self.write_all()
        except OSError as error:
            self.say(f"warning: step {row['step']} is not in {self.path}: {error}; "
                     "training continues")
        self.say(f"step {row['step']:6d}/{self.config.max_steps} | {line.format(**row)}")

    def write_all(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, self.rows)

    def say(self, line):
        """Prints a line above the progress bar, on core 0."""
        if self.is_writer:
            with contextlib.suppress(OSError):  # the reader of our output has quit: train on
                self.bar.write(line, file=sys.stdout)
                sys.stdout.flush()

    def close(self, step):
        """Ends the run after `step` steps. Raises UserError on core 0 if it diverged."""
        if not self.is_writer:
            return
        self.write_all()
        self.lock.close()
        if self.diverged:
            raise UserError(self.diverged)
        if step < self.config.max_steps:
            flag = "" if self.config.resume == "auto" else " with --resume=auto"
            self.say(f"stopped after step {step}; to resume, run the same command{flag}")
