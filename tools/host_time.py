"""host_ms: the time that Python and torch_xla need to record an optimiser step and to start it.

    python tools/host_time.py config/fwedu_124m.py [--key=value ...]

The host works on the next step while the device computes this one. So the device never waits, as
long as host_ms is less than the device's time for a step.

The step is train.py's own, with all layers, parameters and micro-batches of the config. It runs on
one core of the CPU backend, with a model so narrow that computing takes almost no time. Attention
is `math`: forward and backward are traced once and then replayed, so their content makes no
difference. One thing is missing, since one core needs none: the all-reduce, a single operation.
"""
import os
import sys

os.environ["PJRT_DEVICE"] = "CPU"  # before torch_xla is imported

import dataclasses
import statistics
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
import torch_xla.core.xla_model as xm

import train
from nanoxla.errors import UserError, run_command

WARM_UP = 5  # steps that trace and compile, and do not count


def host_ms(config, cores=8, steps=30):
    """The median time of train_step, in milliseconds. cores: of the real run, which decide how many
    micro-batches each of them has."""
    train.check_batch_size(config, cores)
    micro_batches = config.batch_size // (cores * config.micro_batch_size)
    narrow = dataclasses.replace(config, vocab_size=16, dim=2 * config.n_heads, hidden_dim=8,
                                 context=8, attention="math", batch_size=micro_batches,
                                 micro_batch_size=1)
    model = train.Llama(narrow).to(torch_xla.device())
    optimizer = train.AdamW(model.parameters(), narrow)
    traced = train.TracedModel(model, narrow)
    batch = torch.zeros(micro_batches, narrow.context + 1, dtype=torch.int32)
    torch_xla.sync()
    times = []
    for step in range(WARM_UP + steps):
        xm.wait_device_ops()
        started = time.perf_counter()
        train.train_step(traced, optimizer, batch, step, stop=False)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[WARM_UP:])


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("expected a config first, as in "
                        "python tools/host_time.py config/fwedu_124m.py")
    config = train.load_config(sys.argv[1], sys.argv[2:])
    print(f"host_ms {host_ms(config):.1f}")


if __name__ == "__main__":
    run_command(main)
