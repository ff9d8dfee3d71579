"""kill -9 at random instants of a run that saves a checkpoint after every step.

    python tests/kill_and_resume.py --kills 100

After each kill every complete checkpoint must verify, the newest must be at least as new as the
last that the run reported as saved, and the same command must continue from it. Whenever a run
reaches its end, its weights, moments and metrics must equal those of a run that nothing
interrupted; then another run begins. Three kills in four come while the run trains and saves,
the others while it starts."""
import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import ROOT, rows, train_here, write_tiny

from nanoxla.checkpoint import list_checkpoints, verify
from nanoxla.progress import Progress

STEPS = 150


def outcome(out_dir):
    """What a run leaves behind: the bytes of its last weights and moments, and the columns of its
    rows that do not depend on the machine."""
    checkpoint = list_checkpoints(out_dir)[-1]
    columns = "step loss lr grad_norm tokens skipped val_loss".split()
    return ([(checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")],
            [[{key: row[key] for key in columns if key in row} for row in kind]
             for kind in rows(out_dir)])


def run_until(command, printed, over):
    """Runs the command with its output in the file `printed`. When over(seconds, output) is true,
    kills its process group with SIGKILL. Returns whether it was killed before it ended."""
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file,
                                   start_new_session=True)
    started = time.monotonic()
    try:
        while process.poll() is None and not over(time.monotonic() - started, printed.read_text()):
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), printed.read_text()
    return process.returncode != 0


def random_instant(rng):
    """A function `over` for run_until."""
    if rng.random() < 0.25:
        instant = rng.uniform(0, 8)
        return lambda seconds, output: seconds > instant
    steps, pause = rng.randrange(40), rng.uniform(0, 0.05)

    def after_some_steps(seconds, output):
        if output.count("\nstep") <= steps:
            return False
        time.sleep(pause)
        return True
    return after_some_steps


def never(seconds, output):
    return False


def kill_and_resume(kills, seed):
    """Returns the number of kills that the runs survived, and of runs that reached their end."""
    rng = random.Random(seed)
    with (tempfile.TemporaryDirectory() as name,
          Progress(kills, "kill", "kills survived") as progress):
        directory = Path(name)
        config = write_tiny(directory, max_steps=STEPS, micro_batch_size=16, checkpoint_every=1,
                            eval_every=10)
        train_here(config, f"--out_dir={directory / 'uninterrupted'}")
        expected, out_dir = outcome(directory / "uninterrupted"), directory / "out"
        command = [sys.executable, "train.py", config, f"--out_dir={out_dir}"]
        survived, finished, newest, unfinished = 0, 0, "", True
        while survived < kills or unfinished:
            killed = run_until(command, directory / "printed",
                               random_instant(rng) if survived < kills else never)
            printed = (directory / "printed").read_text()
            if "(compiling" in printed:
                origin = f"continuing from {out_dir}/checkpoints/{newest}" if newest else "starting"
                assert f"{origin} (compiling" in printed, printed
            checkpoints = list_checkpoints(out_dir)
            for checkpoint in checkpoints:
                verify(checkpoint)
            reported = re.findall(r"^saved .*/(step_\d+) in", printed, re.MULTILINE)
            kept = checkpoints[-1].name if checkpoints else ""
            assert kept >= max([newest, *reported]), f"{max([newest, *reported])} is lost"
            newest, unfinished = kept, killed
            if killed:
                survived += 1
                progress.update()
            else:
                assert outcome(out_dir) == expected
                shutil.rmtree(out_dir)
                finished, newest = finished + 1, ""
    return survived, finished


def main():
    parser = argparse.ArgumentParser(description="kill -9 at random instants, and resume.")
    parser.add_argument("--kills", type=int, default=100, help="number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (%(default)s)")
    arguments = parser.parse_args()
    survived, finished = kill_and_resume(arguments.kills, arguments.seed)
    print(f"{survived} of {arguments.kills} kills survived, and nothing saved was lost; "
          f"{finished} runs reached their end with the bytes and rows of an uninterrupted one")


if __name__ == "__main__":
    main()
