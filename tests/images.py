"""Install each combination of versions that nanoxla/versions.py names, and try it.

    python tests/images.py                    # or make test-images: half an hour, and 12 GB of disk

In a new virtual environment per combination, .venv-images/NAME: install, train on the CPU, compile
config/fwedu_124m.py for a TPU v5e-8, and run the doctor. A combination whose Python this machine
lacks is reported as not tried. Prints a table, and the end of the output of whatever failed. Exit
code 1: something failed."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nanoxla.versions import TRIED

VENVS = ROOT / ".venv-images"
CONFIG = "config/fwedu_124m.py"
COLUMNS = ("combination", "python", "torch_xla", "jax", "libtpu", "installs",
           "trains on a CPU: loss of steps 1, 20", "compiles: M cycles, HBM GiB", "doctor")


class Failed(Exception):
    pass


def find_python(number):
    """A Python of this version, such as "3.12", on the PATH or installed by pyenv; or None."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [shutil.which(f"python{number}"),
                  *sorted(root.glob(f"versions/{number}.*/bin/python"))]
    if number == "{}.{}".format(*sys.version_info):
        candidates.insert(0, sys.executable)
    for python in filter(None, candidates):
        # The shims of pyenv are on the PATH even for versions that are not installed.
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def run(*command):
    """Returns what the command prints. Raises Failed if its exit code is not 0."""
    result = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"PJRT_DEVICE": "CPU"})
    if result.returncode:
        raise Failed(f"{' '.join(map(str, command))}: exit code {result.returncode}\n"
                     f"{result.stdout[-3000:]}")
    return result.stdout


def packages(tried):
    """What pip is to install: the versions of the combination, and our pins of the others."""
    pins = dict(re.findall(r'"(\w+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    versions = {name: number for name, number in tried.items() if name != "python"}
    versions["jaxlib"] = tried["jax"]
    versions |= {name: pins[name] for name in ("numpy", "sentencepiece", "safetensors", "tqdm")}
    return [f"{name}=={number}" for name, number in versions.items()]


def install(python, tried):
    """Returns the environment's python."""
    venv = VENVS / f"{tried['python']}-{tried['torch_xla']}-{tried['jax']}-{tried['libtpu']}"
    installed = venv / "bin/python"
    if not (venv / "installed").exists():
        run(python, "-m", "venv", venv)
        run(installed, "-m", "pip", "install", "--quiet", *packages(tried))
        (venv / "installed").touch()
    return installed


def train(python):
    """Returns the losses of the first and the last of 20 steps."""
    with tempfile.TemporaryDirectory() as directory:
        pages = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        Path(directory, "pages.jsonl").write_text("".join(
            json.dumps({"text": paragraph}) + "\n" for paragraph in pages.split("\n\n")))
        run(python, "data.py", "prepare", "--input", f"{directory}/pages.jsonl",
            "--out", f"{directory}/data", "--tokenizer", f"{directory}/tokenizer.model",
            "--vocab-size", 400, "--val-fraction", 0.2)
        run(python, "train.py", "config/demo.py", f"--data_dir={directory}/data",
            "--vocab_size=400", f"--out_dir={directory}/out", "--max_steps=20", "--log_every=1",
            "--warmup_steps=5", "--eval_batches=1", "--context=64")
        rows = map(json.loads, Path(directory, "out/metrics.jsonl").open())
        losses = [row["loss"] for row in rows if "loss" in row]
    return f"{losses[0]:.4f}, {losses[-1]:.4f}"


def compile_for_tpu(python):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "figures.json")
        run(python, "tools/compile_for_tpu.py", CONFIG, f"--json={path}")
        figures = json.loads(path.read_text())
    return f"{figures['cycles']['sum'] / 1e6:.2f}, {figures['hbm_gib']:.2f}"


def doctor(python):
    return "ok" if "\nwrong" not in run(python, "tools/doctor.py") else "wrong"


def main():
    table, failures = [], []
    for name, tried in TRIED.items():
        row = [name, *(tried[key] for key in ("python", "torch_xla", "jax", "libtpu"))]
        table.append(row)
        found = find_python(tried["python"])
        if not found:
            row += [f"not tried: no Python {tried['python']} here", "", "", ""]
            continue
        print(f"{name}: installing", flush=True)
        try:
            python = install(found, tried)
        except Failed as failure:
            row += ["fails", "", "", ""]
            failures.append(failure)
            continue
        row.append("yes")
        for step in train, compile_for_tpu, doctor:
            print(f"{name}: {step.__name__}", flush=True)
            try:
                row.append(step(python))
            except Failed as failure:
                row.append("fails")
                failures.append(failure)
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in table:
        print(f"| {' | '.join(row)} |")
    sys.exit("\n\n".join(map(str, failures)) or 0)


if __name__ == "__main__":
    main()
