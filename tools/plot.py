"""Draw the curves of runs: training and validation loss, learning rate, gradient norm.

    python tools/plot.py out/demo                                   # -> out/demo/loss.png
    python tools/plot.py out/a out/b --out compare.png --tokens     # over tokens, not steps
    python tools/plot.py out/demo --watch 30                        # again every 30 s, to the end

Reads metrics.jsonl, so it also works while a run goes on, and after an interruption. Pale lines are
the logged values, strong lines their moving averages. Needs matplotlib (the demo extra), and no
display.
"""
import argparse
import io
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoxla.errors import UserError, run_command
from nanoxla.files import write_file
from nanoxla.lock import holder

# Told apart by the colour-blind, and in print (https://jfly.uni-koeln.de/color, darkened).
COLORS = "#0072b2", "#d55e00", "#00795a", "#a5487b", "#5b5b5b", "#b8860b", "#3a9bd0", "#000000"
HEIGHTS = 2, 1, 1  # of the panels
LABEL_HEIGHT = 0.11  # of a panel of height 1


class Curve:
    """The points of one column of a run."""

    def __init__(self, rows, column, tokens_per_step):
        """tokens_per_step: None to draw over steps."""
        points = [(row["step"], row[column]) for row in rows if is_number(row.get(column))]
        self.x = [step * (tokens_per_step or 1) for step, _ in points]
        self.y = [value for _, value in points]

    def smoothed(self):
        """The exponential moving average, over about 2 % of the points. Its weights add up to 1
        from the first point on."""
        keep = 1 - 1 / max(1, len(self.y) / 50)
        total, weight, averages = 0.0, 0.0, []
        for value in self.y:
            total, weight = keep * total + value, keep * weight + 1
            averages.append(total / weight)
        return averages


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def metrics_path(run):
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; expected the out_dir of a run")
    return path


def parse_rows(path):
    """The rows of a metrics.jsonl, and the numbers of its damaged lines, which are left out."""
    rows, damaged, lines = [], [], path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not is_number(row.get("step")):
                raise ValueError
            rows.append(row)
        except ValueError:
            if line.endswith(b"\n"):  # else the run is just writing it
                damaged.append(number)
    return rows, damaged


def any_training(rows):
    """Whether one of the rows is of training, so that there is a curve to draw."""
    return any(is_number(row.get("loss")) for row in rows)


def read_rows(run):
    """The rows of a run, of which at least one is of training. Prints a note on damaged lines."""
    path = metrics_path(run)
    rows, damaged = parse_rows(path)
    if damaged:
        print(f"note: skipped {len(damaged)} damaged lines of {path}, the first is line "
              f"{damaged[0]}", file=sys.stderr)
    if not any_training(rows):
        raise UserError(f"{run} has no training rows yet")
    return rows


def wait_for_rows(run, pause):
    """Waits until a run, which may not have begun yet, has a training row. pause: seconds between
    two looks."""
    path, waiting = Path(run, "metrics.jsonl"), False
    while not (path.is_file() and any_training(parse_rows(path)[0])):
        if not waiting:
            print(f"waiting for the first row of {run}", flush=True)
        waiting = True
        time.sleep(pause)


def tokens_per_step(run, rows):
    for row in rows:
        if row["step"] and is_number(row.get("tokens")):
            return row["tokens"] / row["step"]
    raise UserError(f"the rows of {run} do not tell tokens; draw over steps, without --tokens")


def draw(runs, over_tokens):
    """The picture of the runs, as the bytes of a PNG file."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    figure, panels = plt.subplots(3, 1, sharex=True, figsize=(7, 8), layout="constrained",
                                  height_ratios=HEIGHTS)
    titles = "cross-entropy (nats per token)", "learning rate", "gradient norm (before clipping)"
    labels = [[], [], []]  # of each panel: (height of the curve's end, text, color)
    for run, color in zip(runs, COLORS):
        rows = read_rows(run)
        scale = tokens_per_step(run, rows) if over_tokens else None
        loss, val, lr, norm = (Curve(rows, column, scale)
                               for column in ("loss", "val_loss", "lr", "grad_norm"))
        name = f"{run}: " if len(runs) > 1 else ""
        for panel, curve in (panels[0], loss), (panels[2], norm):
            panel.plot(curve.x, curve.y, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(curve.x, curve.smoothed(), color=color, linewidth=1.5)
        panels[1].plot(lr.x, lr.y, color=color, linewidth=1.5)
        labels[0].append((loss.smoothed()[-1], f"{name}training (line)", color))
        if val.y:
            panels[0].plot(val.x, val.y, "o", color=color, markersize=5, markerfacecolor="white")
            labels[0].append((val.y[-1], f"{name}validation (o) {val.y[-1]:.4f}", color))
        if len(runs) > 1:
            labels[1] += [(lr.y[-1], str(run), color)] if lr.y else []
            labels[2] += [(norm.smoothed()[-1], str(run), color)] if norm.y else []
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    panels[2].yaxis.set_major_formatter("{x:g}")
    panels[2].yaxis.set_minor_formatter("")
    for panel, title, texts, height in zip(panels, titles, labels, HEIGHTS):
        panel.set_title(title, loc="left", fontsize=11)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        write_labels(panel, texts, LABEL_HEIGHT / height)
    panels[2].set_xlabel("tokens" if over_tokens else "optimiser step", fontsize=11)
    panels[2].xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if len(runs) == 1:
        figure.suptitle(str(runs[0]), x=0.01, ha="left", fontsize=12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    return picture.getvalue()


def write_labels(panel, texts, room):
    """Writes each text to the right of the panel, at the height where its curve ends, or above the
    text below if there is no room. room: the height of a text, as a share of the panel's."""
    free = 0.0  # the lowest height at which nothing is written; 1 is the top of the panel
    to_axes = panel.transData + panel.transAxes.inverted()
    heights = [(to_axes.transform((panel.get_xlim()[1], y))[1], text, color)
               for y, text, color in texts]
    for height, text, color in sorted(heights):
        height = max(height, free)
        panel.annotate(text, (1.01, height), xycoords="axes fraction", color=color, fontsize=9,
                       va="center", annotation_clip=False)
        free = height + room


def main():
    parser = argparse.ArgumentParser(description="Draw the curves of runs.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help=f"out_dir of a run; at most {len(COLORS)}")
    add("--out", type=Path, help="PNG file to write (default, of one run: RUN/loss.png)")
    add("--tokens", action="store_true", help="over tokens instead of optimiser steps")
    add("--watch", type=float, metavar="SECONDS",
        help="wait for the run to begin, and draw again every so many seconds, to its end")
    arguments = parser.parse_args()
    runs = arguments.runs
    if len(runs) > len(COLORS) or (len(runs) > 1 and not arguments.out):
        parser.error(f"several runs: at most {len(COLORS)}, and name the picture with --out")
    out = arguments.out or Path(runs[0], "loss.png")
    if out.is_dir():
        parser.error(f"--out {out} is a directory; name a PNG file")
    for run in runs if arguments.watch is not None else ():
        wait_for_rows(run, arguments.watch)
    while True:
        ended = not any(holder(run) for run in runs)  # before the last rows are read
        picture = draw(runs, arguments.tokens)
        out.parent.mkdir(parents=True, exist_ok=True)
        print(write_file(out, picture), flush=True)
        if arguments.watch is None or ended:
            break
        time.sleep(arguments.watch)


if __name__ == "__main__":
    run_command(main)
