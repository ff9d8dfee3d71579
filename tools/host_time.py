"""How long Python and torch_xla need to write down and dispatch an optimiser step: host_ms. While that is less than the device
needs for a step, the device never waits.

    python tools/host_time.py config/fwedu_124m.py [--key=value ...]

The step is train.py's own, with all layers, parameters and micro-batches of the config, on the CPU and on one core, but so
narrow that computing it takes no time to speak of. Attention is `math`: the passes are traced once and replayed, so what is in
them makes no difference here. What one core does not do is the all-reduce of the gradients: one operation.
"""
import os
import sys

os.environ["PJRT_DEVICE"] = "CPU"

import dataclasses
import statistics
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch_xla
import torch_xla.core.xla_model as xm

import train
from process import UserError, run_command


def host_ms(config, cores=8, steps=30):
    """Median milliseconds of train_step, of which the first ones, which trace and compile, don't count. cores: of the run, only
    to know how many micro-batches each of them has."""
    micro_batches = config.batch_size // (cores * config.micro_batch_size)
    narrow = dataclasses.replace(config, vocab_size=16, dim=2 * config.n_heads, hidden_dim=8, context=8, attention="math",
                                 batch_size=micro_batches, micro_batch_size=1)
    device = torch_xla.device()
    model = train.Llama(narrow).to(device)
    optimizer, passes = train.AdamW(model.parameters(), narrow), train.Passes(model, narrow)
    zero, batch = torch.zeros((), device=device), torch.zeros(micro_batches, narrow.context + 1, dtype=torch.int32)
    torch_xla.sync()
    times = []
    for step in range(steps + 5):
        xm.wait_device_ops()
        started = time.perf_counter()
        train.train_step(passes, optimizer, batch, step, False, zero)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[5:])


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("expected a config first, as in python tools/host_time.py config/fwedu_124m.py")
    print(f"host_ms {host_ms(train.load_config(sys.argv[1], sys.argv[2:])):.1f}")


if __name__ == "__main__":
    run_command(main)
