"""What a run reports: metrics.jsonl for programs, one aligned line for people, and on a terminal a bar with the time left."""
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from tqdm import tqdm

from model import flops_per_token
from process import write_file


def due(done, every, config):
    """Whether something that happens every so many steps, and at the end of the run, happens after `done` steps."""
    return done == config.max_steps or (every and done % every == 0)


class Log:
    """All cores read the reports of the steps, since what these say of stopping concerns them all; core 0 writes. A report
    that the device is still computing is not waited for: it is kept in `pending`, and read a step later, while the device
    is busy with that step.
    """

    def __init__(self, config, checkpoint, first_step):
        self.config, self.writes = config, xr.global_ordinal() == 0
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.rows = bytearray(Path(checkpoint, "metrics.jsonl").read_bytes() if checkpoint else b"")
        self.write_all()  # each step is in it once: what a run logged after its last checkpoint happens again
        self.bar = tqdm(total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False,
                        disable=not (self.writes and sys.stderr.isatty()))
        self.pending, self.diverged = None, ""
        self.looked, self.longest = None, 0.0  # when a report was last read; the longest time between two
        self.restart_clock(first_step)

    def restart_clock(self, step, host_seconds=0.0):
        """Begins the interval that the next row's speed is of; what happened before it does not count."""
        self.since_step, self.since, self.host_seconds = step, time.perf_counter(), host_seconds

    def read(self):
        """Reads the report that is pending, if any. Returns whether all cores stop now."""
        if self.pending is None:
            return False
        (step, lr, report, host_seconds), self.pending = self.pending, None
        loss, grad_norm, skipped, skipped_in_a_row, stops = report.tolist()
        now = time.perf_counter()
        self.longest, self.looked = max(self.longest, now - (self.looked or now)), now
        if self.writes and (step == 1 or due(step, self.config.log_every, self.config)):
            self.training(step, lr, loss, grad_norm, int(skipped), host_seconds)
        self.restart_clock(step, self.host_seconds)
        if skipped_in_a_row > self.config.max_skipped:
            self.diverged = (f"step {step}: loss {loss}, gradient norm {grad_norm}, {skipped_in_a_row:.0f} updates skipped in "
                             "a row: diverged; start again with a lower learning_rate")
        return bool(stops or self.diverged)

    def training(self, step, lr, loss, grad_norm, skipped, host_seconds):
        config, steps, seconds = self.config, step - self.since_step, time.perf_counter() - self.since
        tokens_per_s = steps * config.batch_size * config.context / seconds
        mfu = tokens_per_s * flops_per_token(config) / (config.peak_tflops * 1e12 * xr.world_size())
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
               "tokens": step * config.batch_size * config.context, "tokens_per_s": tokens_per_s,
               "step_ms": 1e3 * seconds / steps, "host_ms": 1e3 * host_seconds / steps,
               "mfu": mfu if xr.device_type() == "TPU" else None, "compiles": met.metric_data("CompileTime")[0],
               "skipped": skipped}
        self.write(row, "loss {loss:7.4f} | lr {lr:.2e} | grad norm {grad_norm:6.3f} | "
                        "{step_ms:7.1f} ms (host {host_ms:5.1f}) | {tokens_per_s:9,.0f} tok/s" +
                        (" | mfu {mfu:.1%}" if row["mfu"] else "") + (" | {skipped} updates skipped" if skipped else ""))
        self.bar.update(step - self.bar.n)

    def write(self, row, line):
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in row.items()}  # as in JSON
        addition = json.dumps(finite).encode() + b"\n"
        self.rows += addition
        try:
            if self.path.exists() and self.path.stat().st_size + len(addition) == len(self.rows):
                with self.path.open("ab") as file:
                    file.write(addition)
            else:  # the disk was full, or somebody removed it
                self.write_all()
        except OSError as error:
            self.say(f"warning: step {row['step']} is not in {self.path}: {error}; training goes on")
        self.say(f"step {row['step']:6d}/{self.config.max_steps} | {line.format(**row)}")

    def write_all(self):
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, self.rows)

    def say(self, line):
        with contextlib.suppress(OSError):  # a reader that is gone, as tee is after Ctrl-C, ends no run
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
