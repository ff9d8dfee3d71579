"""Do float32 weights matter? Trains the model of config/demo.py in several precisions, with several
seeds, and compares the validation losses.

    make demo                                    # once: the data
    python tools/precision_study.py              # about half an hour on two CPU cores
    python tools/precision_study.py --steps 50 --seeds 1 --n_layers=12 --dim=96 --hidden_dim=256

Every variant multiplies matrices in bfloat16. They differ in what else is rounded to bfloat16:

    float32 weights      nothing: weights, moments, gradients and residual stream are float32
    all bfloat16         weights, gradients, moments and loss, as XLA_USE_BF16=1 does
    bfloat16 stream      the residual stream, after the embedding and at every sum, as train.py does
    bfloat16 all-reduce  the gradient of each of 8 cores, and their sum after each core is added

There are two experiments. "cosine": from random weights, over a cosine. "small": the float32 run of
the same seed goes on at 1 % of the peak learning rate, as near the end of a long cosine. All
validation losses are computed in float32. docs/precision.md has the results.

Writes OUT/results.json and OUT/precision.png.
"""
import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PJRT_DEVICE"] = "CPU"

import torch
import torch_xla

import data
import train
from model import Llama
from nanoxla.errors import UserError, run_command
from nanoxla.files import write_file
from nanoxla.progress import Progress

LOW = torch.bfloat16
SMALL = 0.01  # of the peak learning rate


class Variant(NamedTuple):
    """What is rounded to bfloat16."""
    everything: bool = False  # weights, gradients, moments and loss
    stream: bool = False
    all_reduce: bool = False


VARIANTS = {"float32 weights": Variant(), "all bfloat16": Variant(everything=True),
            "bfloat16 stream": Variant(stream=True),
            "bfloat16 all-reduce": Variant(all_reduce=True)}
IN_SMALL = "float32 weights", "all bfloat16"


# --- the variants -------------------------------------------------------------------------------


def rounded(x):
    """x with the values that bfloat16 has, in its own dtype."""
    return x.to(LOW).to(x.dtype)


def build(config, variant, weights):
    """The model of a variant. weights: {name: array}, or None for random ones."""
    model = Llama(config, config.seed)
    if weights:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    if variant.everything:
        for p in model.parameters():
            p.data = p.data.to(LOW)
    return model.to(torch_xla.device())


class Passes(train.TracedModel):
    """Loss and gradients as a variant rounds them."""

    def __init__(self, model, config, variant):
        self.variant = variant
        super().__init__(model, config)

    def loss(self, tokens, parameters):
        loss = super().loss(tokens, parameters)
        return rounded(loss) if self.variant.everything else loss

    def add_loss_and_gradients(self, tokens, parameters, loss_sum, gradient_sums):
        """With one window per micro-batch, a micro-batch is a core of a ring of 8: it rounds its
        gradient, adds the sum that it receives, and sends the rounded sum on."""
        loss_sum, sums = super().add_loss_and_gradients(tokens, parameters, loss_sum, gradient_sums)
        if self.variant.all_reduce:
            sums = [rounded(old + rounded(new - old)) for new, old in
                    zip(sums, reversed(gradient_sums))]
        return loss_sum, sums


class CountingAdamW(train.AdamW):
    """Counts the weights that a step leaves as they were."""

    def __init__(self, parameters, config):
        super().__init__(parameters, config)
        self.unchanged = torch.zeros((), device=self.skipped.device)

    @torch.no_grad()
    def step(self, schedule, loss):
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        grad_norm = super().step(schedule, loss)
        count = sum((p == old).sum() for p, old in zip(parameters, before))
        self.unchanged.copy_(count / sum(p.numel() for p in parameters))
        return grad_norm


# --- one run ------------------------------------------------------------------------------------


def train_once(config, variant, weights):
    """Trains one model. Returns a dict: its validation loss in float32; at some steps, the learning
    rate and the share of weights that the step left unchanged; and its weights, in float32."""
    torch.set_num_threads(1)
    if not variant.stream:  # model.py asks this for the stream only, and this process ends with us
        torch.is_autocast_enabled = lambda *_: False
    train_data, val_data = data.open_data(config)
    device = torch_xla.device()
    model = build(config, variant, weights)
    optimizer = CountingAdamW(model.parameters(), config)
    passes = Passes(model, config, variant)
    torch_xla.sync()
    unchanged = []
    for step in range(config.max_steps):
        batch = train_data.batch(step, config.batch_size, config.seed, rank=0, world_size=1)
        train.train_step(passes, optimizer, torch.from_numpy(batch), step, stop=False)
        if step % max(1, config.max_steps // 20) == 0 or step == config.max_steps - 1:
            share = optimizer.unchanged.cpu().item()
            unchanged.append((step, train.learning_rate(step, config), share))
    weights = {name: p.detach().cpu().float().numpy() for name, p in model.named_parameters()}
    return {"val_loss": val_loss(config, weights, val_data, device), "unchanged": unchanged,
            "weights": weights}


@torch.no_grad()
def val_loss(config, weights, val_data, device):
    """The mean loss of float32 weights over the validation windows, computed in float32."""
    # Another `dtype` and `micro_batch_size` than in training: a trace of its own.
    config = dataclasses.replace(config, dtype="float32", micro_batch_size=config.batch_size,
                                 eval_every=1)
    model = build(config, Variant(), weights)
    starts = val_data.fixed_windows(config.eval_batches * config.batch_size)
    windows = torch.from_numpy(val_data.read(starts)).split(config.batch_size)
    cpu = [model(part[:, :-1].to(device), part[:, 1:].to(device)).cpu() for part in windows]
    return torch.stack(cpu).mean().item()


# --- the study ----------------------------------------------------------------------------------


def small_config(config):
    """Half as many steps at a small, constant learning rate, over other windows."""
    return dataclasses.replace(config, schedule="wsd", warmup_steps=0, seed=config.seed + 1_000,
                               learning_rate=SMALL * config.learning_rate,
                               max_steps=config.max_steps // 2)


def study(base, seeds):
    """{experiment: {variant: [result of each seed]}}. Two runs at a time, each in a process of its
    own: traces are cached by the config, and a trace of one variant must not serve another."""
    results = {"cosine": {name: [None] * seeds for name in VARIANTS},
               "small": {name: [None] * seeds for name in IN_SMALL}}
    context = multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool,
          Progress(seeds * (len(VARIANTS) + len(IN_SMALL)), "run", "training") as progress):
        jobs = {}

        def submit(kind, name, seed, config, weights=None):
            job = pool.submit(train_once, config, VARIANTS[name], weights)
            jobs[job] = kind, name, seed, config

        for seed, name in itertools.product(range(seeds), VARIANTS):
            windows = 1 if VARIANTS[name].all_reduce else base.batch_size
            submit("cosine", name, seed,
                   dataclasses.replace(base, seed=seed, micro_batch_size=windows))
        while jobs:
            done, _ = wait(jobs, return_when=FIRST_COMPLETED)
            for job in done:
                kind, name, seed, config = jobs.pop(job)
                result = job.result()
                weights = result.pop("weights")
                results[kind][name][seed] = result
                if (kind, name) == ("cosine", "float32 weights"):
                    for other in IN_SMALL:
                        submit("small", other, seed, small_config(config), weights)
                progress.update()
    return results


def differences(variants, name):
    """Of each seed: the validation loss of a variant, minus that of float32 weights."""
    return [run["val_loss"] - reference["val_loss"]
            for run, reference in zip(variants[name], variants["float32 weights"])]


def seed_spread(variants):
    """The standard deviation of the validation losses with float32 weights."""
    return statistics.pstdev(run["val_loss"] for run in variants["float32 weights"])


def print_table(results):
    print(f"spread of the seeds: {seed_spread(results['cosine']):.4f}")
    print(f"{'':8} {'':20} {'val loss of each seed':26} {'mean':>7}  "
          f"{'minus float32 weights: mean, each seed':40} {'unchanged at the end':>20}")
    for kind, variants in results.items():
        for name, runs in variants.items():
            losses = [run["val_loss"] for run in runs]
            minus = differences(variants, name)
            unchanged = statistics.mean(run["unchanged"][-1][2] for run in runs)
            print(f"{kind:8} {name:20} {' '.join(f'{x:.4f}' for x in losses):26} "
                  f"{statistics.mean(losses):7.4f}  {statistics.mean(minus):+.4f}: "
                  f"{' '.join(f'{x:+.4f}' for x in minus):30} {unchanged:20.1%}")


def draw(results):
    """The picture, as the bytes of a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import io

    import matplotlib.pyplot as plt

    figure, (losses, shares) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = [(kind, name) for kind, variants in results.items() for name in list(variants)[1:]]
    for row, (kind, name) in enumerate(reversed(names)):
        values = differences(results[kind], name)
        losses.plot(values, [row] * len(values), "o", color="#0072b2", alpha=0.7)
    losses.set_yticks(range(len(names)), [f"{name} ({kind})" for kind, name in reversed(names)])
    spread = seed_spread(results["cosine"])
    losses.axvline(0, color="gray", linewidth=0.8)
    losses.axvspan(-spread, spread, color="gray", alpha=0.15, linewidth=0)
    losses.set_title("loss minus that of float32 weights (nats);\n"
                     "a point per seed, gray: spread of the seeds", loc="left", fontsize=10)
    for name, color in zip(IN_SMALL, ("#0072b2", "#d55e00")):
        points = results["cosine"][name][0]["unchanged"]
        shares.plot([step for step, _, _ in points], [share for *_, share in points], color=color)
        step, _, share = points[3 * len(points) // 4]
        shares.annotate(name, (step, share), xytext=(-8, 6), ha="right",
                        textcoords="offset points", color=color, fontsize=9)
    shares.set_title("share of weights that a step leaves\nunchanged, over the cosine", loc="left",
                     fontsize=10)
    shares.set_xlabel("optimiser step")
    shares.set_ylim(-0.03, 1.03)
    for panel in (losses, shares):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def main():
    parser = argparse.ArgumentParser(
        description="Compare precisions on the demo's model; --key=value changes its config.")
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of each cosine (%(default)s)")
    add("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    add("--data", default="data/demo", help="the demo's shards (%(default)s)")
    add("--out", type=Path, default=Path("out/precision"), help="directory to write (%(default)s)")
    arguments, overrides = parser.parse_known_args()
    if arguments.steps < 20 or arguments.seeds < 1:
        raise UserError("expected at least 20 --steps and 1 seed")
    base = train.load_config(ROOT / "config/demo.py", [
        f"--max_steps={arguments.steps}", f"--warmup_steps={arguments.steps // 10}",
        "--dtype=bfloat16", f"--data_dir={arguments.data}", *overrides])
    data.check_data(base)
    results = study(base, arguments.seeds)
    print_table(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_file(arguments.out / "results.json", json.dumps(results, indent=1).encode())
    print(write_file(arguments.out / "precision.png", draw(results)))


if __name__ == "__main__":
    run_command(main)
