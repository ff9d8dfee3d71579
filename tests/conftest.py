import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ |= {"PJRT_DEVICE": "CPU", "JAX_PLATFORMS": "cpu"}  # before anything imports torch_xla or jax
import torch
import torch_xla

import checkpoint
import data
from model import Llama
from process import run_command

torch_xla.device()  # autograd counts the devices at its first backward, and must find the XLA device among them
ROOT = Path(__file__).parent.parent

TINY = dict(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48, context=16, batch_size=16, micro_batch_size=1,
            max_steps=12, warmup_steps=3, learning_rate=1e-2, grad_clip=0.1, dtype="float32", log_every=1, eval_every=6,
            eval_batches=2, checkpoint_every=0)


def run(*command, env=None, timeout=300, **options):
    """Runs a command in the repository, as a user would, and returns (exit code, stdout, stderr)."""
    process = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | (env or {}), text=True,
                             capture_output=True, timeout=timeout, **options)
    return process.returncode, process.stdout, process.stderr


def rows(out_dir):
    """The rows of metrics.jsonl, training and evaluation."""
    parsed = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if "loss" in row], [row for row in parsed if "val_loss" in row]


def write_tiny(directory, **changes):
    """A config file for a model that trains in seconds, and shards whose next token can partly be learned."""
    noise = np.random.default_rng(0)
    tokens = np.cumsum(noise.choice([1, 2, 3, 29], 40_000, p=[0.7, 0.1, 0.1, 0.1])) % TINY["vocab_size"]
    tokens[:20_000].astype("<u2").tofile(directory / "train_00000.bin")
    tokens[20_000:36_000].astype("<u2").tofile(directory / "train_00001.bin")
    tokens[36_000:].astype("<u2").tofile(directory / "val_00000.bin")
    config = directory / "tiny.py"
    values = TINY | {"data_dir": str(directory)} | changes
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """The out_dir of an uninterrupted run, through the real command."""
    out_dir = tmp_path_factory.mktemp("straight")
    code, out, err = run("train.py", tiny, f"--out_dir={out_dir}", "--log_every=2", "--checkpoint_every=4")
    assert code == 0, err
    (out_dir / "stdout").write_text(out)
    return out_dir


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The out_dir of a short run with a tokenizer of 300 tokens, which byte fallback makes complete."""
    out_dir = tmp_path_factory.mktemp("trained")
    text = out_dir / "text.txt"
    text.write_text("we the people of the united states, in order to form a more perfect union\n" * 50)
    data.train_tokenizer(out_dir / "tokenizer.model", [text], 300, 0.0, "text")
    code, _, err = run("train.py", tiny, f"--out_dir={out_dir}", "--vocab_size=300", "--max_steps=3",
                       f"--tokenizer={out_dir / 'tokenizer.model'}")
    assert code == 0, err
    return out_dir


def save_model(out_dir, config, tokenizer):
    """A run in out_dir whose checkpoint has random weights, so large that attention is far from uniform and a mistake shows.
    Returns the model."""
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        model.lm_head.weight[3:259] = 0  # tokens of single bytes are never the likeliest: most sequences of them are no text
    content = tokenizer.read_bytes()
    checkpoint.write(out_dir / "checkpoints/step_00000000", {"model": dict(model.named_parameters())},
                     {"metrics.jsonl": b"", "tokenizer.model": content}, checkpoint.describe(0, 0, config, None, content))
    return model.eval()


def limit_file_size(size):
    """A preexec_fn for a process that can write no file of more bytes, as if the disk were full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Calls a command's main in this process, which is quick, expects exit code 2 and returns (stdout, stderr)."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        out, err = capsys.readouterr()
        assert exit.value.code == 2, err
        return out, err
    return call


@pytest.fixture
def fails_with(monkeypatch, mistake):
    """Calls train.py's main with a mistake, and returns the one line on stderr."""
    import train

    def call(*arguments):
        monkeypatch.setattr(train, "run_on_all_cores", lambda *args: pytest.fail("training was started"))
        _, message = mistake(train.main, *arguments)
        lines = [line for line in message.splitlines() if "checking token ids" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), message
        return message
    return call
