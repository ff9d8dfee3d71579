"""Rate a model on HellaSwag, SciQ and WikiText-2, 0-shot, by EleutherAI's lm-evaluation-harness.

    python tools/evaluate.py out/fwedu_124m                      # hours on a CPU
    python tools/evaluate.py out/demo/hf --limit 50              # the first 50 items of each
    python tools/evaluate.py out/demo --include_path my_tasks/ --tasks my_task

A run's newest checkpoint is converted to RUN/hf first, if that does not exist. Prints a table
beside the run that config/fwedu_124m.py repeats and GPT-2 124M, writes RUN/hf/evaluation.json, and
adds the figures to RUN/hf/README.md.

The harness needs other versions of libraries than training does. So it runs in an environment of
its own, .venv-eval, if `make .venv-eval/installed` has made one. Otherwise it runs in that of this
command, after `pip install "lm-eval[hf]==0.4.13"`. It downloads the tasks from Hugging Face.
Without a network, --include_path names a directory of task files (YAML) that read local data. A
task whose name begins with "wikitext" rates whole texts.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import convert_to_hf
from nanoxla import checkpoint, hf_directory
from nanoxla.errors import UserError, run_command
from nanoxla.files import write_file

# {(task, metric of the harness): (the reference run, GPT-2 124M)}, as the reference's author quotes
# them. The metrics of WikiText-2 that are not quoted are shown without them.
QUOTED = {("hellaswag", "acc_norm"): ("27.51 %", "31.14 %"),
          ("sciq", "acc_norm"): ("59.70 %", "64.40 %"),
          ("wikitext", "word_perplexity"): ("88.01", "37.37")}
SHARES = "acc", "acc_norm", "exact_match", "f1"  # metrics that are shown in per cent
COLUMNS = "task", "metric", "value", "stderr", "items"  # of evaluation.json
MARK = "| evaluated |"  # the first cells of a row in a model card


def harness_python():
    """The Python that has the harness."""
    own = ROOT / ".venv-eval/bin/python"
    if own.exists():
        return own
    if find_spec("lm_eval"):
        return sys.executable
    raise UserError("lm-evaluation-harness is not installed; make .venv-eval/installed gives it an "
                    "environment of its own")


def hf_directory_of(path):
    """The Hugging Face directory at `path`, or that of the run there; makes it if it is missing."""
    if hf_directory.is_hf(path):
        return Path(path)
    source, output = checkpoint.find_checkpoint(path), Path(path, "hf")
    if source.samefile(path):
        raise UserError(f"{path} is a single checkpoint; convert it with convert_to_hf.py "
                        f"--checkpoint {path} --output DIRECTORY, and evaluate DIRECTORY")
    if output.exists():
        print(f"evaluating {output}, which exists; delete it to evaluate a newer checkpoint")
    else:
        convert_to_hf.to_hf(source, output, "float32")
    return output


def run_harness(directory, tasks, arguments):
    """Runs the harness on a Hugging Face directory. tasks: of one kind. Returns its report."""
    # The harness itself puts bos before a text that it rates as a whole. The tokenizer would put a
    # second one there, and the model would have to predict it.
    flags = ",add_bos_token=False" if rated_as_a_whole(tasks[0]) else ""
    with tempfile.TemporaryDirectory() as output:
        command = [harness_python(), "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(tasks),
                   "--model_args", f"pretrained={directory},dtype=float32{flags}",
                   "--num_fewshot", 0, "--batch_size", arguments.batch_size,
                   "--device", arguments.device, "--output_path", output]
        if arguments.limit:
            command += ["--limit", arguments.limit]
        if arguments.include_path:
            command += ["--include_path", arguments.include_path]
        result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if result.returncode:
            raise UserError(f"the harness failed on {', '.join(tasks)}; its last lines are above. "
                            "If it has no network, name local task files with --include_path")
        report, = Path(output).rglob("results_*.json")
        return json.loads(report.read_text())


def rated_as_a_whole(task):
    return task.startswith("wikitext")


def rows_of(report):
    """[(task, metric, value, standard error or None, number of items)] of a report."""
    rows = []
    for task, results in report["results"].items():
        items = num_items(report, task)
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and filtered and not metric.endswith("_stderr"):
                error = results.get(f"{metric}_stderr,{filtered}")
                rows.append((task, metric, value, error if isinstance(error, float) else None,
                             items))
    return rows


def num_items(report, task):
    """task: a task, or a group of tasks or groups, such as mmlu."""
    if members := report.get("group_subtasks", {}).get(task):
        return sum(num_items(report, member) for member in members)
    return report["n-samples"][task]["effective"]


def shown(metric, value):
    return f"{100 * value:.2f} %" if metric in SHARES else f"{value:.2f}"


def print_table(rows):
    print(f"\n{'task':12} {'metric':16} {'this model':>20} {'items':>7} {'reference':>10} "
          f"{'GPT-2 124M':>11}")
    for task, metric, value, error, items in rows:
        reference, gpt2 = QUOTED.get((task, metric), ("", ""))
        spread = f" ± {shown(metric, error)}" if error is not None else ""
        print(f"{task:12} {metric:16} {shown(metric, value) + spread:>20} {items:7,} "
              f"{reference:>10} {gpt2:>11}")


def add_to_card(path, rows):
    """Puts the rows into the table of a model card that convert_to_hf.py wrote, in place of rows
    that an earlier evaluation put there."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines()
             if not line.startswith(MARK)]
    last = max((i for i, line in enumerate(lines) if line.startswith("| ")), default=None)
    if last is None:
        return
    lines[last + 1:last + 1] = [
        f"{MARK} {task}, 0-shot, {items:,} items: {metric} {shown(metric, value)} |"
        for task, metric, value, _, items in rows]
    write_file(path, ("\n".join(lines) + "\n").encode())


def report(directory, rows):
    content = json.dumps([dict(zip(COLUMNS, row)) for row in rows], indent=1)
    write_file(directory / "evaluation.json", content.encode() + b"\n")
    print_table(rows)
    print(f"written to {directory}/evaluation.json")
    card = directory / "README.md"
    if card.is_file():
        add_to_card(card, rows)


def main():
    parser = argparse.ArgumentParser(description="Rate a model by lm-evaluation-harness.")
    add = parser.add_argument
    add("model", help="a run, or a Hugging Face directory")
    add("--tasks", default="hellaswag,sciq,wikitext", help="names of tasks (%(default)s)")
    add("--limit", type=int, help="only the first so many items of each task")
    add("--include_path", metavar="DIR", help="directory of task files, which may read local data")
    add("--device", default="cpu", help="where the harness computes (%(default)s)")
    add("--batch_size", type=int, default=8, help="texts at a time (%(default)s)")
    arguments = parser.parse_args()
    directory = hf_directory_of(arguments.model)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json, and the harness rates texts")
    tasks, rows = arguments.tasks.split(","), []
    try:
        for kind in (False, True):  # each kind with its own flags
            chosen = [task for task in tasks if rated_as_a_whole(task) == kind]
            if chosen:
                rows += rows_of(run_harness(directory, chosen, arguments))
    finally:  # if the second kind fails, the hours of the first are not lost
        if rows:
            report(directory, rows)


if __name__ == "__main__":
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    run_command(main)
