"""Draw the loss curves of a run: training and validation loss over optimiser steps.

    python tools/plot.py out/demo                               # -> out/demo/loss.png
    python tools/plot.py out/demo --out assets/demo_loss.png

Reads metrics.jsonl, so it also works while the run goes on. Needs matplotlib (the demo extra).
"""
import argparse
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoxla.errors import UserError, run_command
from nanoxla.files import write_file


def read_losses(run, column):
    """Two lists, steps and values, of the rows of a run in which `column` is a number."""
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; expected the out_dir of a run")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    found = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(run):
    """The picture as the bytes of a PNG file."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    training, validation = (read_losses(run, column) for column in ("loss", "val_loss"))
    if not training[0]:
        raise UserError(f"{run} has no training rows yet")
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    axes.plot(*training, color="tab:blue", linewidth=1.2, label="training loss")
    if validation[0]:
        axes.plot(*validation, "o-", color="tab:orange", markersize=5, label="validation loss")
        axes.annotate(f"{validation[1][-1]:.4f}", (validation[0][-1], validation[1][-1]),
                      xytext=(0, 9), textcoords="offset points", ha="center", color="tab:orange")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(str(run), loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def main():
    parser = argparse.ArgumentParser(description="Draw the loss curves of a run.")
    parser.add_argument("run", help="the run's out_dir")
    parser.add_argument("--out", type=Path, help="PNG file to write (default: RUN/loss.png)")
    arguments = parser.parse_args()
    out = arguments.out or Path(arguments.run, "loss.png")
    picture = draw(arguments.run)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(write_file(out, picture))


if __name__ == "__main__":
    run_command(main)
