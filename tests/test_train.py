"""What train.py promises: the schedule, the optimiser, one graph, the config's errors, a run and its continuation."""
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from conftest import ROOT, TINY, rows, run

import train
from model import Llama, flops_per_token, num_parameters
from train import AdamW, Config, learning_rate, load_config

REFERENCE = load_config("config/fwedu_124m.py")


def test_learning_rate_of_the_reference():
    assert learning_rate(0, REFERENCE) == pytest.approx(6e-7, rel=1e-12)
    assert learning_rate(999, REFERENCE) == pytest.approx(6e-4, rel=1e-12)
    assert learning_rate(1_000, REFERENCE) == 6e-4
    assert learning_rate(37_919, REFERENCE) == pytest.approx(1.086e-12, rel=1e-3)
    assert learning_rate(37_920, REFERENCE) == 0


def test_learning_rate_rises_then_falls_to_min_lr():
    config = Config(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[100] == pytest.approx(0.1)
    assert learning_rate(0, Config(max_steps=5, warmup_steps=0, learning_rate=1.0)) == 1.0


def assert_stated(text, config):
    """The parameters, FLOPs and size of a checkpoint in a config's opening comment are those of the config."""
    total, in_matmuls = num_parameters(config)
    for number in (total, in_matmuls, flops_per_token(config), config.batch_size * config.context):
        assert f"{number:,}" in text
    compute = config.max_steps * config.batch_size * config.context * flops_per_token(config)
    assert f"{compute:.2e}".replace("+", "") in text
    assert f"= {total * 4 * 3 / 1e9:.2f} GB" in text


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_its_arithmetic_is_right(path):
    config = load_config(path)
    assert config.batch_size % config.micro_batch_size == 0
    assert config.out_dir == f"out/{path.stem}"
    assert_stated(path.read_text(), config)


def test_the_reference_run_is_one_epoch():
    text = (ROOT / "config/fwedu_124m.py").read_text()
    windows = 9_940_492_288 // REFERENCE.context
    assert f"{windows:,} windows" in text and f"-> {math.ceil(windows / REFERENCE.batch_size):,}" in text
    assert REFERENCE.max_steps == math.ceil(windows / REFERENCE.batch_size)
    assert 8 * 4 * REFERENCE.micro_batch_size == REFERENCE.batch_size


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_adamw_equals_torchs_after_clip_grad_norm():
    config = Config(learning_rate=1e-2, warmup_steps=5, max_steps=20, weight_decay=0.2, grad_clip=0.5, beta1=0.8, beta2=0.95)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((7, 5), (5,), (3, 7))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizer = AdamW(ours, config)
    reference = torch.optim.AdamW([{"params": [p], "weight_decay": 0.2 if p.dim() == 2 else 0.0} for p in theirs],
                                  betas=(0.8, 0.95), eps=1e-8)
    for step in range(20):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=draw) * (0.01 if step % 2 else 1)  # clipped and not clipped
            q.grad = p.grad.clone()
        norm = optimizer.step(optimizer.schedule(step), torch.tensor(1.0))
        for group in reference.param_groups:
            group["lr"] = learning_rate(step, config)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5))
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def batches(config, count):
    draw = torch.Generator().manual_seed(0)
    shape = count, config.batch_size, config.context + 1
    return torch.randint(0, config.vocab_size, shape, dtype=torch.int32, generator=draw)


def train_steps(config, steps):
    """Trains on the XLA device for the given step numbers, wishing to stop at every seventh; yields each loss, unread."""
    device = torch_xla.device()
    model = Llama(config, seed=0).to(device)
    optimizer, passes = AdamW(model.parameters(), config), train.Passes(model, config)
    zero = torch.zeros((), device=device)
    torch_xla.sync()
    for step, batch in zip(steps, batches(config, len(steps))):
        yield train.train_step(passes, optimizer, batch, step, step % 7 == 6, zero)[0]


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_accumulating_gradients_changes_nothing_but_rounding(micro_batch_size):
    config = Config(**TINY | {"batch_size": 8})
    by_one = [loss.item() for loss in train_steps(config, range(8))]
    config = dataclasses.replace(config, micro_batch_size=micro_batch_size)
    assert [loss.item() for loss in train_steps(config, range(8))] == pytest.approx(by_one, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_graph_for_400_steps_and_nothing_read(dtype):
    """Through warm-up, decay, lr = 0, and step 324, where 1 - 0.95^t becomes 1.0 in float32: a Python number of 0 or 1 in
    a graph would be a constant of it, and a new value a new graph. Nor is any number read from the device meanwhile."""
    config = Config(**TINY | {"batch_size": 2, "max_steps": 400, "warmup_steps": 50, "dtype": dtype, "beta2": 0.95})
    seen = []
    for _ in train_steps(config, range(401)):  # step 400 is one past the end: lr = 0
        seen.append((met.metric_data("CompileTime")[0], (met.metric_data("TransferFromDeviceTime") or [0])[0],
                     sum(met.counter_value(name) for name in met.counter_names() if name.startswith("aten::"))))
    assert learning_rate(400, config) == 0
    assert set(seen[1:]) == {seen[1]}


def test_a_python_number_in_the_step_would_be_noticed(monkeypatch):
    original, calls = AdamW.step, itertools.count()
    monkeypatch.setattr(AdamW, "step", lambda *args, **kwargs: original(*args, **kwargs) * (0.0 if next(calls) == 5 else 0.5))
    config = Config(**TINY | {"batch_size": 2, "max_steps": 10})
    compiled = [met.metric_data("CompileTime")[0] for _ in train_steps(config, range(10))]
    assert len(set(compiled[1:])) > 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_reports_what_it_does(straight):
    training, evaluation = rows(straight)
    assert [row["step"] for row in training] == [1, 2, 4, 6, 8, 10, 12] and [row["step"] for row in evaluation] == [6, 12]
    first, last = training[0], training[-1]
    assert list(first) == "step loss lr grad_norm tokens tokens_per_s step_ms host_ms mfu compiles skipped".split()
    assert first["loss"] == pytest.approx(math.log(64), abs=0.1) and last["loss"] < first["loss"] - 0.1
    assert last["tokens"] == 12 * 16 * 16 and last["lr"] == learning_rate(11, Config(**TINY))
    assert len({row["compiles"] for row in training if row["step"] in (4, 6)}) == 1
    assert evaluation[1]["val_loss"] == pytest.approx(last["loss"], abs=0.3)
    lines = (straight / "stdout").read_text().splitlines()
    assert len([line for line in lines if line.startswith("step")]) == 9
    assert f"{num_parameters(Config(**TINY))[0]:,} parameters" in lines[0]


def test_a_checkpoint_says_what_it_is_of(straight):
    state = json.loads((straight / "checkpoints/step_00000012/state.json").read_text())
    assert state["step"] == 12 and state["tokens"] == 12 * 16 * 16
    assert TINY.items() - {("log_every", 1), ("checkpoint_every", 0)} <= state["config"].items()


def test_only_the_newest_checkpoints_are_kept(straight):
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_help_lists_every_key():
    code, out, _ = run("train.py", "--help")
    assert code == 0
    for field in dataclasses.fields(Config):
        assert any(line.split()[:2] == [f"--{field.name}", field.type.__name__] and len(line.split()) > 4
                   for line in out.splitlines()), field.name


# --- mistakes of the user ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument, message", [
    ("--learning_rat=1", "no key 'learning_rat'; the nearest is 'learning_rate'"),
    ("--batch_size=many", "batch_size = 'many', expected int"),
    ("--max_steps=1.5", "max_steps = '1.5', expected int"),
    ("--learning_rate=nan", "learning_rate = nan, expected more than 0"),
    ("--learning_rate=-1", "learning_rate = -1.0, expected more than 0"),
    ("--beta2=1", "beta2 = 1.0, expected from 0 to below 1"),
    ("--dtype=float16", "dtype = 'float16', expected bfloat16 or float32"),
    ("--attention=flash", "attention = 'flash' runs on a TPU and this is a CPU; use --attention=math"),
    ("--n_heads=0", "n_heads = 0, expected at least 1"),
    ("--n_heads=3", "n_heads=3 does not divide dim=32"),
    ("--n_heads=32", "dim / n_heads = 1 is odd"),
    ("--warmup_steps=100", "warmup_steps = 100 is more than max_steps = 12"),
    ("--vocab_size=65537", "vocab_size = 65537, expected from 2 to 65536"),
    ("--context=4000", "val_00000.bin holds 4,000 tokens; a window of context=4000 needs 4,001"),
    ("--eval_batches=100", "has 249 for validation; lower eval_batches"),
    ("--val_glob=none_*.bin", "no file matches none_*.bin"),
    ("--val_glob=train_00001.bin", "train_00001.bin is training and validation data"),
    ("--data_dir=/nowhere", "/nowhere is not a directory"),
    ("--tokenizer=/nowhere.model", "there is no tokenizer /nowhere.model"),
    ("--vocab_size=50", "train_00000.bin holds token id 57 at token 26 (byte 52); ids must be below vocab_size=50"),
    ("--resume=/nowhere", "no checkpoint in /nowhere"),
    ("max_steps=3", "max_steps=3: expected --key=value"),
])
def test_a_mistake_is_told_in_one_sentence(tiny, tmp_path, fails_with, argument, message):
    assert message in fails_with(tiny, f"--out_dir={tmp_path}", argument)


@pytest.mark.parametrize("text, message", [
    ("learning_rte = 1e-3", "no key 'learning_rte'; the nearest is 'learning_rate'"),
    ("max_steps = 'ten'", "max_steps = 'ten', expected int"),
    ("max_steps = True", "max_steps = True, expected int"),
    ("max_steps = 10\nbatch_size = 4 *", "line 2: SyntaxError"),
    ("max_steps = 10\nbatch_size = four", "line 2: NameError"),
])
def test_a_mistake_in_a_config_file_names_the_place(tmp_path, fails_with, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    told = fails_with(path)
    assert message in told and str(path) in told


def test_no_config_is_told(fails_with):
    assert "expected a config first" in fails_with()
    assert "config /nowhere.py can't be read" in fails_with("/nowhere.py")


def test_damaged_shards_are_told(tiny, tmp_path, fails_with):
    for name in ("train_00000.bin", "val_00000.bin"):
        shutil.copy(tiny.parent / name, tmp_path)
    shard = tmp_path / "train_00000.bin"
    with shard.open("ab") as file:
        file.write(np.array([64], "<u2").tobytes())
    assert f"{shard} holds token id 64 at token 20,000 (byte 40,000)" in fails_with(tiny, f"--data_dir={tmp_path}")
    with shard.open("ab") as file:
        file.write(b"x")
    assert f"{shard} has an odd number of bytes (40,003)" in fails_with(tiny, f"--data_dir={tmp_path}")
    shard.write_bytes(b"")
    assert f"{shard} is empty" in fails_with(tiny, f"--data_dir={tmp_path}")


@pytest.mark.parametrize("env, arguments, message", [
    ({"XLA_USE_BF16": "1"}, [], "XLA_USE_BF16 is set"),
    ({}, ["--micro_batch_size=3"], "batch_size = 16 is not a multiple of 1 cores x micro_batch_size = 3"),
])
def test_a_mistake_is_told_by_the_real_command(tiny, tmp_path, env, arguments, message):
    code, _, err = run("train.py", tiny, f"--out_dir={tmp_path}", *arguments, env=env)
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "checkpoints").exists()


def test_kaggles_environment_is_mended_before_torch_xla_sees_it():
    script = "import train, os; print([name in os.environ for name in ('TPU_PROCESS_ADDRESSES', 'CLOUD_TPU_TASK_ID')])"
    for addresses, kept in (("local", "[False, False]"), ("10.0.0.1:8476", "[True, True]")):
        _, out, err = run("-c", script, env={"TPU_PROCESS_ADDRESSES": addresses, "CLOUD_TPU_TASK_ID": "0"})
        assert out.strip() == kept, err
