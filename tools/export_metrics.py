"""Write the metrics of a run for TensorBoard or Weights & Biases.

    python tools/export_metrics.py out/demo --to tensorboard     # -> out/demo/tensorboard
    tensorboard --logdir out/demo/tensorboard
    python tools/export_metrics.py out/demo --to wandb --follow  # beside the run, to its end

The names are those of metrics.jsonl. Needs `pip install tensorboard`, or `pip install wandb`, which
takes its settings from the environment (WANDB_PROJECT, WANDB_MODE=offline, ...). Before a second
export for TensorBoard, delete RUN/tensorboard.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plot import metrics_path, parse_rows, wait_for_rows

from nanoxla.checkpoint import list_checkpoints, read_state
from nanoxla.errors import UserError, run_command
from nanoxla.files import is_used
from nanoxla.lock import holder

POLL = 5  # seconds between two looks for new rows


def new_rows(path, exported):
    """Yields the rows of metrics.jsonl that are newer than those exported so far, and notes them in
    exported, {whether it is an evaluation row: its last step}. A resumed run may have written a
    step anew: it has the same numbers, and is not yielded again."""
    for row in parse_rows(path)[0]:
        kind, step = "val_loss" in row, row["step"]
        if step > exported.get(kind, 0):
            exported[kind] = step
            yield row


def numbers(row):
    """{column: value} of a row, without its step and without what is not a number."""
    return {column: value for column, value in row.items()
            if column != "step" and isinstance(value, int | float)}


def tensorboard_writer(run, config):
    """Returns functions write(row) and close()."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard's files need its package: pip install tensorboard") from None
    out = Path(run, "tensorboard")
    if is_used(out):
        raise UserError(f"{out} has an earlier export; delete it first")
    writer = SummaryWriter(out)
    writer.add_text("config", "\n".join(f"    {key} = {config[key]!r}" for key in config))

    def write(row):
        for column, value in numbers(row).items():
            writer.add_scalar(column, value, row["step"])
        writer.flush()
    print(f"tensorboard --logdir {out}", flush=True)
    return write, writer.close


def wandb_writer(run, config):
    """Returns functions write(row) and close()."""
    try:
        import wandb
    except ImportError:
        raise UserError("Weights & Biases needs its package: pip install wandb") from None
    session = wandb.init(name=Path(run).name, config=config)

    def write(row):
        session.log(numbers(row) | {"step": row["step"]})  # rows of both kinds may have one step
    session.define_metric("*", step_metric="step")
    return write, session.finish


def main():
    parser = argparse.ArgumentParser(description="Write metrics for TensorBoard or W&B.")
    add = parser.add_argument
    add("run", help="out_dir of a run")
    add("--to", required=True, choices=["tensorboard", "wandb"])
    add("--follow", action="store_true", help="go on until the run ends")
    arguments = parser.parse_args()
    run = arguments.run
    if arguments.follow:
        wait_for_rows(run, POLL)
    path = metrics_path(run)
    checkpoints = list_checkpoints(run)
    config = read_state(checkpoints[-1])["config"] if checkpoints else {}
    if not config:
        print("note: without the config, since the run has no checkpoint yet", file=sys.stderr)
    writers = {"tensorboard": tensorboard_writer, "wandb": wandb_writer}
    write, close = writers[arguments.to](run, config)
    exported, count = {}, 0
    while True:
        ended = not holder(run)  # before the last rows are read
        for row in new_rows(path, exported):
            write(row)
            count += 1
        if not arguments.follow or ended:
            break
        time.sleep(POLL)
    close()
    print(f"{count} rows of {run} written for {arguments.to}")


if __name__ == "__main__":
    run_command(main)
