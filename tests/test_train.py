"""train.py: the schedule, the optimiser, the graphs, the config, and what a run reports."""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from conftest import ROOT, TINY, rows, run, train_here, write_config

import nanoxla.config
import train
from model import Llama, flops_per_token, num_parameters
from nanoxla import log, model_card, shards
from nanoxla.prepare import prepare
from train import AdamW, Config, TracedModel, learning_rate, load_config, train_step

REFERENCE = load_config("config/fwedu_124m.py")


# --- the learning rate and the shipped configs --------------------------------------------------


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
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate(0, Config(max_steps=5, warmup_steps=0, learning_rate=1.0)) == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_the_arithmetic_at_the_top_of_every_config_is_right(path):
    text, config = path.read_text(), load_config(path)
    assert config.batch_size % config.micro_batch_size == 0
    assert config.out_dir == f"out/{path.stem}"
    total, in_matmuls = num_parameters(config)
    tokens = config.batch_size * config.context
    for number in (total, in_matmuls, flops_per_token(config), tokens):
        assert f"{number:,}" in text
    compute = config.max_steps * tokens * flops_per_token(config)
    assert f"{compute:.2e}".replace("+", "") in text
    assert f"= {total * 4 * 3 / 1e9:.2f} GB" in text


def test_the_reference_run_is_one_epoch():
    text = (ROOT / "config/fwedu_124m.py").read_text()
    windows = 9_940_492_288 // REFERENCE.context
    steps = math.ceil(windows / REFERENCE.batch_size)
    assert f"{windows:,} windows" in text and f"-> {steps:,}" in text
    assert REFERENCE.max_steps == steps
    assert 8 * 8 * REFERENCE.micro_batch_size == REFERENCE.batch_size


# --- the optimiser and the step -----------------------------------------------------------------


def test_adamw_equals_torch_adamw_after_clip_grad_norm():
    config = Config(learning_rate=1e-2, warmup_steps=5, max_steps=20, weight_decay=0.2,
                    grad_clip=0.5, beta1=0.8, beta2=0.95)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw) for shape in ((7, 5), (5,), (3, 7))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in weights] for _ in range(2))
    optimizer = AdamW(ours, config)
    groups = [{"params": [p], "weight_decay": 0.2 if p.dim() == 2 else 0.0} for p in theirs]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8)
    for step in range(20):
        for p, q in zip(ours, theirs):
            size = 0.01 if step % 2 else 1  # one is below the clipping threshold, one above
            p.grad = torch.randn(p.shape, generator=draw) * size
            q.grad = p.grad.clone()
        norm = optimizer.step(optimizer.schedule(step), torch.tensor(1.0))
        for group in reference.param_groups:
            group["lr"] = learning_rate(step, config)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5))
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def train_steps(config, steps):
    """Trains on the XLA device, with random batches. Yields each loss without reading it. Every
    seventh step wishes to stop, which must not change the graph."""
    device, draw = torch_xla.device(), torch.Generator().manual_seed(0)
    model = Llama(config, seed=0).to(device)
    optimizer, traced = AdamW(model.parameters(), config), TracedModel(model, config)
    torch_xla.sync()
    shape = len(steps), config.batch_size, config.context + 1
    batches = torch.randint(0, config.vocab_size, shape, dtype=torch.int32, generator=draw)
    for step, batch in zip(steps, batches):
        yield train_step(traced, optimizer, batch, step, stop=step % 7 == 6)[0]


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_accumulating_gradients_changes_only_the_rounding(micro_batch_size):
    config = Config(**TINY | {"batch_size": 8})
    one_by_one = [loss.item() for loss in train_steps(config, range(8))]
    config = dataclasses.replace(config, micro_batch_size=micro_batch_size)
    losses = [loss.item() for loss in train_steps(config, range(8))]
    assert losses == pytest.approx(one_by_one, rel=1e-5)


def counters():
    """Graphs compiled, transfers from the device, and operations that fell back to the host."""
    return (met.metric_data("CompileTime")[0],
            (met.metric_data("TransferFromDeviceTime") or [0])[0],
            sum(met.counter_value(name) for name in met.counter_names() if "aten::" in name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_400_steps_compile_nothing_new_and_read_nothing(dtype):
    """Through warm-up, decay, a learning rate of 0, and step 324, where sqrt(1 - 0.95^325) becomes
    1.0 in float32. A Python number that becomes 0 or 1 would change the graph."""
    config = Config(**TINY | {"batch_size": 2, "max_steps": 400, "warmup_steps": 50, "dtype": dtype,
                              "beta2": 0.95})
    # Step 400 is one past the end: its learning rate is 0.
    seen = [counters() for _ in train_steps(config, range(401))]
    assert learning_rate(400, config) == 0
    assert set(seen[1:]) == {seen[1]}


def test_a_python_number_in_the_step_would_be_noticed(monkeypatch):
    original, calls = AdamW.step, itertools.count()

    def step(*args, **kwargs):
        return original(*args, **kwargs) * (0.0 if next(calls) == 5 else 0.5)
    monkeypatch.setattr(AdamW, "step", step)
    config = Config(**TINY | {"batch_size": 2, "max_steps": 10})
    compiled = [met.metric_data("CompileTime")[0] for _ in train_steps(config, range(10))]
    assert len(set(compiled[1:])) > 1


# --- what a run reports -------------------------------------------------------------------------


def test_a_run_reports_each_logged_step_and_each_evaluation(uninterrupted):
    training, evaluation = rows(uninterrupted)
    assert [row["step"] for row in training] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in evaluation] == [6, 12]
    first, last = training[0], training[-1]
    columns = ("step loss lr grad_norm tokens tokens_per_s step_ms host_ms mfu compiles skipped "
               "compile_s")
    assert list(first) == columns.split()
    assert first["loss"] == pytest.approx(math.log(64), abs=0.1)
    assert last["loss"] < first["loss"] - 0.1
    assert last["tokens"] == 12 * 16 * 16 and last["lr"] == learning_rate(11, Config(**TINY))
    assert evaluation[1]["val_loss"] == pytest.approx(last["loss"], abs=0.3)
    lines = (uninterrupted / "stdout").read_text().splitlines()
    assert len([line for line in lines if line.startswith("step")]) == 9
    assert f"{num_parameters(Config(**TINY))[0]:,} parameters" in lines[0]


def test_only_the_first_row_of_a_session_contains_compilation(uninterrupted):
    first, *others = rows(uninterrupted)[0]
    assert first["compile_s"] > 0 and all(row["compile_s"] == 0 for row in others)


def test_a_run_compiles_six_graphs(uninterrupted):
    """Two at the start, two for a step, two for an evaluation: see `worker`."""
    compiles = [row["compiles"] for row in rows(uninterrupted)[0]]
    assert compiles == [4, 4, 4, 4, 6, 6, 6]  # the first evaluation is after step 6


def test_the_state_of_a_checkpoint_describes_the_run(uninterrupted):
    state = json.loads((uninterrupted / "checkpoints/step_00000012/state.json").read_text())
    assert state["step"] == 12 and state["tokens"] == 12 * 16 * 16
    changed = {("log_every", 1), ("checkpoint_every", 0)}
    assert TINY.items() - changed <= state["config"].items()


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000012"]


# --- the speed in each row ----------------------------------------------------------------------


class SimulatedDevice:
    """Executes steps one after another, each in step_s seconds, while the host does other
    things."""

    def __init__(self, step_s):
        self.step_s, self.free_at = step_s, 0.0

    def start(self):
        """Starts a step. Returns its report."""
        self.free_at = max(self.free_at, time.perf_counter()) + self.step_s
        return SimulatedReport(self.free_at)


class SimulatedReport:
    def __init__(self, ready_at):
        self.ready_at = ready_at

    def cpu(self):
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))
        return torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0])

    def call_when_ready(self, callback):
        delay = max(0.0, self.ready_at - time.perf_counter())
        threading.Timer(delay, callback, [self]).start()


@pytest.mark.parametrize("log_every", [1, 2, 3, 10])
@pytest.mark.parametrize("host_s, device_s", [(0.02, 0.06), (0.06, 0.02)],
                         ids=["the host waits for the device", "the device waits for the host"])
def test_speeds_are_right_whichever_waits(tiny, tmp_path, monkeypatch, log_every, host_s,
                                          device_s):
    """With an evaluation and a checkpoint every 4 steps. The first step after these takes host_s
    and device_s, since nothing overlaps; the others take the larger of the two."""
    config = dataclasses.replace(load_config(tiny), out_dir=str(tmp_path), log_every=log_every,
                                 eval_every=4, checkpoint_every=4, max_steps=14)
    monkeypatch.setattr(log, "on_ready_callback", SimulatedReport.call_when_ready)
    training_log, device = log.TrainingLog(config, None, 0, 1), SimulatedDevice(device_s)
    for step in range(1, config.max_steps + 1):
        training_log.step_begins()
        time.sleep(host_s)
        training_log.training(step, 1e-3, device.start())
        if step % 4 == 0:
            time.sleep(0.1)  # an evaluation
            training_log.validation(step, 2.0, None)
    training_log.close(config.max_steps)

    def expected(step):
        return host_s + device_s if step % 4 == 1 else max(host_s, device_s)
    training, before = rows(tmp_path)[0], 0
    for row in training:
        steps = range(before + 1, row["step"] + 1)
        mean = sum(map(expected, steps)) / len(steps)
        assert row["step_ms"] == pytest.approx(1e3 * mean, abs=12), row
        assert row["host_ms"] == pytest.approx(1e3 * host_s, abs=12), row
        assert row["tokens_per_s"] * row["step_ms"] / 1e3 == pytest.approx(16 * 16)
        before = row["step"]
    assert before == config.max_steps


@pytest.mark.parametrize("log_every", [1, 2, 3, 10])
def test_the_rows_step_times_add_up_to_the_wall_time(tiny, tmp_path, monkeypatch, log_every):
    """Wall time without evaluations, saves and compilation, of train.py's own loop on the CPU."""
    config = dataclasses.replace(
        load_config(tiny), out_dir=str(tmp_path), dim=128, hidden_dim=256, context=64,
        micro_batch_size=16, max_steps=22, log_every=log_every, eval_every=4, checkpoint_every=4)
    paused, began = [], []

    def timed(function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            paused.append(time.perf_counter() - started)
            return result
        return call

    def step_begins(self, original=log.Clock.step_begins):
        began.append(time.perf_counter())
        original(self)
    monkeypatch.setattr(log.Clock, "step_begins", step_begins)
    monkeypatch.setattr(train, "evaluate", timed(train.evaluate))
    monkeypatch.setattr(train.Saver, "save", timed(train.Saver.save))
    compiled = log.compilations()[1]
    train.worker(config, None, math.inf, lambda: False)
    wall = time.perf_counter() - began[0] - sum(paused)

    training = rows(tmp_path)[0]
    steps = np.diff([0] + [row["step"] for row in training])
    in_steps = sum(row["step_ms"] * n for row, n in zip(training, steps)) / 1e3
    compile_s = sum(row["compile_s"] for row in training)
    assert 0 < compile_s <= log.compilations()[1] - compiled
    assert in_steps == pytest.approx(wall - compile_s, rel=0.1)

    # Steps before and after a pause take as long as all others.
    times = {row["step"]: row["step_ms"] for row in training if not row["compile_s"]}
    median = np.median(list(times.values()))
    for phase in range(4):
        of_phase = [time for step, time in times.items() if step % 4 == phase]
        if len(of_phase) > 3:
            assert median / 1.6 < np.median(of_phase) < 1.6 * median, (phase, times)


# --- the config ---------------------------------------------------------------------------------


def help_of(config_class):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        nanoxla.config.print_keys(config_class)
    return {line.split()[0].removeprefix("--"): line for line in text.getvalue().splitlines()}


def test_help_lists_every_key():
    code, out, _ = run("train.py", "--help")
    assert code == 0
    for name, line in help_of(Config).items():
        assert line in out.splitlines(), name
    for entry in dataclasses.fields(Config):
        name, kind, default, *meaning = help_of(Config)[entry.name].split(maxsplit=3)
        assert (kind, default) == (entry.type.__name__, repr(entry.default)) and meaning, line


def test_a_new_key_takes_one_line(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Extended(Config):
        label_smoothing: float = nanoxla.config.key(0.1, "share of the others", train.BELOW_ONE)

    assert "share of the others (at least 0 and below 1)" in help_of(Extended)["label_smoothing"]
    path = write_config(tmp_path / "config.py", label_smoothing=0.2)
    assert nanoxla.config.load(Extended, path).label_smoothing == 0.2
    with pytest.raises(train.UserError, match="= 1.0, expected at least 0 and below 1"):
        nanoxla.config.load(Extended, path, ["--label_smoothing=1"])


@pytest.mark.parametrize("argument, message", [
    ("--learning_rat=1", "no key 'learning_rat'; the nearest is 'learning_rate'"),
    ("--batch_size=many", "batch_size = 'many', expected int"),
    ("--max_steps=1.5", "max_steps = '1.5', expected int"),
    ("--learning_rate=nan", "learning_rate = nan, expected more than 0"),
    ("--learning_rate=-1", "learning_rate = -1.0, expected more than 0"),
    ("--min_lr=1", "min_lr = 1.0 is more than learning_rate ="),
    ("--beta2=1", "beta2 = 1.0, expected at least 0 and below 1"),
    ("--dtype=float16", "dtype = 'float16', expected bfloat16 or float32"),
    ("--attention=flash",
     "attention = 'flash' runs on a TPU and this is a CPU; use --attention=math"),
    ("--n_heads=0", "n_heads = 0, expected at least 1"),
    ("--n_heads=3", "n_heads=3 does not divide dim=32"),
    ("--n_heads=32", "dim / n_heads = 1 is odd"),
    ("--warmup_steps=100", "warmup_steps = 100 is more than max_steps = 12"),
    ("--vocab_size=65537", "vocab_size = 65537, expected from 2 to 65536"),
    ("--context=4000",
     "val_00000.bin holds 4,000 tokens; a window of context=4000 needs 4,001"),
    ("--eval_batches=100", "has 249 for validation; lower eval_batches"),
    ("--val_glob=none_*.bin", "no file matches none_*.bin"),
    ("--val_glob=train_00001.bin", "train_00001.bin is training and validation data"),
    ("--data_dir=/nowhere", "/nowhere is not a directory"),
    ("--tokenizer=/nowhere.model", "there is no tokenizer /nowhere.model"),
    ("--vocab_size=50", "train_00000.bin holds token id 57 at token 26 (byte 52); "
                        "ids must be below vocab_size=50"),
    ("--resume=/nowhere", "no checkpoint in /nowhere"),
    ("max_steps=3", "max_steps=3: expected --key=value"),
])
def test_a_wrong_argument_is_explained_in_one_line(tiny, tmp_path, train_fails, argument, message):
    assert message in train_fails(tiny, f"--out_dir={tmp_path}", argument)


def test_bits_per_byte(tmp_path, capsys):
    """val_bpb: known if `prepare` wrote the whole validation split."""
    text = "".join(f"{{\"text\": \"{'the people of the union ' * 20}{i}\"}}\n" for i in range(60))
    (tmp_path / "text.jsonl").write_text(text)
    prepare([tmp_path / "text.jsonl"], tmp_path / "tokenizer.model", tmp_path / "data", 300, 0.5)
    config = write_config(tmp_path / "tiny.py", **TINY | dict(
        vocab_size=300, data_dir=str(tmp_path / "data"), eval_batches=1))
    train_here(config, f"--out_dir={tmp_path / 'run'}")
    split = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["val"]
    for row in rows(tmp_path / "run")[1]:
        bits = row["val_loss"] / math.log(2) * split["tokens"]
        assert row["val_bpb"] == pytest.approx(bits / split["bytes"])
    assert f"| {row['val_bpb']:.4f} bits per byte" in capsys.readouterr().out
    card = model_card.model_card({"step": 0, "versions": {}}, [row], train.Config(), (1, 1), "x")
    assert f"nats per token; {row['val_bpb']:.4f} bits per byte)" in card
    paths = sorted((tmp_path / "data").glob("*.bin"))
    assert shards.bytes_per_token(paths) is None  # not one split


def test_arguments_mean_what_they_say(tiny, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SHARDS", "/data/shards")
    for arguments in (["--max-steps=5", "--out_dir=~/run", "--data-dir=$SHARDS/a"],
                      ["--max_steps", "5", "--out-dir", "~/run", "--data_dir", "${SHARDS}/a"]):
        config = load_config(tiny, arguments)
        assert (config.max_steps, config.out_dir, config.data_dir) == (
            5, "/home/me/run", "/data/shards/a")
    assert load_config(tiny, ["--min_lr", "1e-4", "--seed", "3"]).seed == 3


@pytest.mark.parametrize("arguments", [["--max_steps"], ["--max_steps", "--seed=1"], ["5"],
                                       ["--max_steps=5", "6"]])
def test_an_argument_without_a_key_or_value_is_refused(tiny, train_fails, arguments):
    assert "expected --key=value" in train_fails(tiny, *arguments)


def test_a_config_may_import_and_compute(tmp_path):
    """As nanoGPT's configs do."""
    path = tmp_path / "config.py"
    path.write_text("import time\nfrom math import sqrt\n_cores = 8\n"
                    "def _double(x):\n    return 2 * x\n"
                    "batch_size = _cores * 4\nmax_steps = int(sqrt(_double(80_000)))\n"
                    "out_dir = 'out/' + time.strftime('%Y')\ndata_dir = '~/data'\n")
    config = load_config(path)
    assert (config.batch_size, config.max_steps) == (32, 400)
    assert re.fullmatch(r"out/\d{4}", config.out_dir)
    assert config.data_dir == str(Path.home() / "data")


@pytest.mark.parametrize("text, message", [
    ("cores = 8", "no key 'cores'; the nearest is"),
    ("cores = 8", ". The name of a helper variable has to begin with _"),
    ("learning_rte = 1e-3", "no key 'learning_rte'; the nearest is 'learning_rate'"),
    ("max_steps = 'ten'", "max_steps = 'ten', expected int"),
    ("max_steps = True", "max_steps = True, expected int"),
    ("max_steps = 10\nbatch_size = 4 *", "line 2: SyntaxError"),
    ("max_steps = 10\nbatch_size = four", "line 2: NameError"),
])
def test_a_mistake_in_a_config_file_is_located(tmp_path, train_fails, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    error = train_fails(path)
    assert message in error and str(path) in error


def test_a_missing_config_is_explained(train_fails):
    assert "expected a config first" in train_fails()
    assert "config /nowhere.py can't be read" in train_fails("/nowhere.py")


def test_damaged_shards_are_explained(tiny, tmp_path, train_fails):
    for name in ("train_00000.bin", "val_00000.bin"):
        shutil.copy(tiny.parent / name, tmp_path)
    shard, data_dir = tmp_path / "train_00000.bin", f"--data_dir={tmp_path}"
    with shard.open("ab") as file:
        file.write(np.array([64], "<u2").tobytes())
    assert (f"{shard} holds token id 64 at token 20,000 (byte 40,000)"
            in train_fails(tiny, data_dir))
    with shard.open("ab") as file:
        file.write(b"x")
    assert f"{shard} has 40,003 bytes, not a multiple of 2" in train_fails(tiny, data_dir)
    shard.write_bytes(b"")
    assert f"{shard} is empty" in train_fails(tiny, data_dir)


@pytest.mark.parametrize("env, arguments, message", [
    ({"XLA_USE_BF16": "1"}, [], "XLA_USE_BF16 is set"),
    ({}, ["--micro_batch_size=3"],
     "batch_size = 16 is not a multiple of 1 cores x micro_batch_size = 3"),
])
def test_the_real_command_explains_a_mistake(tiny, tmp_path, env, arguments, message):
    code, _, err = run("train.py", tiny, f"--out_dir={tmp_path}", *arguments, env=env)
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "checkpoints").exists()
