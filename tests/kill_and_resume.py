"""kill -9 at random instants of a run that saves a checkpoint after every step: nothing may be lost or changed by it.

    python tests/kill_and_resume.py --kills 100

After each kill every directory with a checkpoint's name must verify, the newest must be no older than the last that the run
said it had saved, and the same command must go on from just that. Whenever a run gets to its end, its weights, moments and
metrics must be those of a run that nobody interrupted, and another run is begun. Three kills in four come while it trains
and saves, the others while it starts.
"""
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

from conftest import ROOT, rows, write_tiny

from checkpoint import list_checkpoints, verify
from process import Progress

STEPS = 150


def outcome(out_dir):
    """What a run leaves: the bytes of its last weights and moments, and its rows but for what depends on the machine."""
    checkpoint = list_checkpoints(out_dir)[-1]
    kept = "step loss lr grad_norm tokens skipped val_loss".split()
    return ([(checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")],
            [[{key: row[key] for key in kept if key in row} for row in kind] for kind in rows(out_dir)])


def run_until(command, printed, over):
    """Runs the command, whose output goes to the file `printed`, to its end or until over(seconds, output): kill -9 then
    to the whole group of processes. Returns whether it was killed."""
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
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


def random_instant(chance):
    """A function for run_until."""
    if chance.random() < 0.25:
        instant = chance.uniform(0, 8)
        return lambda seconds, output: seconds > instant
    steps, pause = chance.randrange(40), chance.uniform(0, 0.05)

    def after_some_steps(seconds, output):
        if output.count("\nstep") <= steps:
            return False
        time.sleep(pause)
        return True
    return after_some_steps


def kill_and_resume(kills, seed):
    """Returns how many kills the runs survived, which is `kills`, and how many of them got to their end."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, Progress(kills, "kill", "kills survived") as progress:
        directory = Path(name)
        config = write_tiny(directory, max_steps=STEPS, micro_batch_size=16, checkpoint_every=1, eval_every=10)
        command = [sys.executable, "train.py", config, f"--out_dir={directory / 'straight'}"]
        assert not run_until(command, directory / "printed", lambda *_: False)
        expected, finished, out_dir = outcome(directory / "straight"), 0, directory / "out"
        command[-1] = f"--out_dir={out_dir}"
        survived, newest, begun = 0, "", True
        while survived < kills or begun:
            over = random_instant(chance) if survived < kills else lambda *_: False
            killed = run_until(command, directory / "printed", over)
            printed = (directory / "printed").read_text()
            if "(compiling" in printed:
                assert (f"going on from {out_dir}/checkpoints/{newest} " if newest else "starting ") in printed, printed
            checkpoints = list_checkpoints(out_dir)
            for checkpoint in checkpoints:
                verify(checkpoint)
            said = re.findall(r"^saved .*/(step_\d+) in", printed, re.MULTILINE)
            kept = checkpoints[-1].name if checkpoints else ""
            assert kept >= max([newest, *said]), f"{max([newest, *said])} is lost"
            newest, begun = kept, killed
            if killed:
                survived += 1
                progress.update()
            else:
                assert outcome(out_dir) == expected
                shutil.rmtree(out_dir)
                finished, newest = finished + 1, ""
    return survived, finished


def main():
    parser = argparse.ArgumentParser(description="kill -9 at random instants, and go on.")
    parser.add_argument("--kills", type=int, default=100, help="how often (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (%(default)s)")
    arguments = parser.parse_args()
    survived, finished = kill_and_resume(arguments.kills, arguments.seed)
    print(f"{survived} of {arguments.kills} kills survived, nothing saved was lost; {finished} runs got to their end with the "
          "bytes and rows of one that nobody interrupted")


if __name__ == "__main__":
    main()
