"""init_from: a new run with the weights of another model. schedule=wsd: a run whose length may
change before its learning rate decays."""
import json

import pytest
import safetensors.torch
import torch
from conftest import rows, train_here, write_tiny

import convert_to_hf
from data import TokenDataset
from model import load_model
from nanoxla import checkpoint
from nanoxla.checkpoint import list_checkpoints
from nanoxla.init_from import find_model, read_model
from nanoxla.shards import find_shards
from nanoxla.tokenizer import train_tokenizer
from train import Config, learning_rate, load_config


def newest(out_dir):
    return list_checkpoints(out_dir)[-1]


def model_bytes(directory):
    return [(directory / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def first_loss(path, config):
    """The loss of these weights on the first batch of a run, computed by plain PyTorch."""
    directory = find_model(path)
    values, weights = read_model(directory)
    model = load_model(values | {"context": config.context}, weights, directory)
    dataset = TokenDataset(find_shards(config.data_dir, config.train_glob), config.context,
                           config.vocab_size)
    batch = torch.from_numpy(dataset.batch(0, config.batch_size, config.seed, 0, 1))
    with torch.no_grad():
        logits = model(batch[:, :-1])
    targets = batch[:, 1:].long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


# --- init_from ----------------------------------------------------------------------------------


def test_a_run_with_the_weights_of_a_run(tiny, uninterrupted, tmp_path, call):
    """Another learning rate, length, seed and context; and it can be resumed."""
    changes = ("--max_steps=4", "--learning_rate=1e-3", "--seed=5", "--context=24",
               "--checkpoint_every=2", f"--init_from={uninterrupted}")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", *changes)
    config = load_config(tiny, changes)
    training, _ = rows(tmp_path / "run")
    assert training[0]["loss"] == pytest.approx(first_loss(uninterrupted, config), abs=1e-5)
    assert training[0]["lr"] == learning_rate(0, config)
    first_row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first_row == {"step": 0, "init_from": str(uninterrupted)}
    # A resumed run does not begin anew: the weights that init_from names are not read again.
    newest(tmp_path / "run").rename(tmp_path / "expected")
    (tmp_path / "run/metrics.jsonl").unlink()
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", *changes)
    assert model_bytes(newest(tmp_path / "run")) == model_bytes(tmp_path / "expected")
    call(convert_to_hf.main, "--checkpoint", tmp_path / "run")
    card = (tmp_path / "run/hf/README.md").read_text()
    assert f"| started from | the weights of {uninterrupted} |" in card


def test_a_run_with_the_weights_of_a_hugging_face_directory(trained, tiny, tmp_path, call):
    call(convert_to_hf.main, "--checkpoint", trained, "--output", tmp_path / "hf")
    changes = ("--vocab_size=300", "--max_steps=3", f"--init_from={tmp_path / 'hf'}",
               f"--tokenizer={trained / 'tokenizer.model'}")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", *changes)
    expected = first_loss(trained, load_config(tiny, changes))
    assert rows(tmp_path / "run")[0][0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_model_of_another_shape_is_refused(tiny, uninterrupted, tmp_path, train_fails):
    message = train_fails(tiny, f"--out_dir={tmp_path}", f"--init_from={uninterrupted}",
                          "--dim=64", "--n_layers=3")
    assert "is a model of another shape than this config; for its shape, add --dim=32 " \
           "--n_layers=2" in message


def test_weights_that_are_not_finite_are_refused(trained, tiny, tmp_path, train_fails, mistake,
                                                 call):
    call(convert_to_hf.main, "--checkpoint", trained, "--output", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, path)
    message = "norm.weight has values that are not finite: the weights are damaged"
    assert message in train_fails(tiny, f"--out_dir={tmp_path / 'run'}", "--vocab_size=300",
                                  f"--init_from={tmp_path / 'hf'}")
    out_dir = tmp_path / "imported"
    assert message in mistake(convert_to_hf.main, "--from-hf", tmp_path / "hf",
                              "--output", out_dir)[1]
    assert not out_dir.exists()


def test_the_refusal_to_resume_names_init_from(tiny, uninterrupted, train_fails):
    message = train_fails(tiny, f"--out_dir={uninterrupted}", "--max_steps=24")
    assert "max_steps was 12, is 24" in message
    assert f"--init_from={newest(uninterrupted)} starts it with these weights" in message


def test_a_run_under_resume_search_may_be_the_start_of_another(tiny, uninterrupted, tmp_path):
    """On Kaggle, both are under /kaggle/input."""
    train_here(tiny, f"--out_dir={tmp_path}", "--max_steps=3", "--eval_every=0",
               f"--init_from={uninterrupted}", f"--resume_search={uninterrupted}")
    assert newest(tmp_path).name == "step_00000003"


def test_another_tokenizer_gives_a_warning(trained, tmp_path, tiny, call, capsys):
    other = tmp_path / "tokenizer.model"
    (tmp_path / "text.txt").write_text("completely different words are in this one\n" * 50)
    train_tokenizer(other, [tmp_path / "text.txt"], 290, 0.0, "text")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", "--vocab_size=300", "--max_steps=3",
               f"--init_from={trained}", f"--tokenizer={other}", "--eval_every=0")
    assert f"warning: {other} is not the tokenizer of {newest(trained)}" in capsys.readouterr().err


def test_a_checkpoint_from_before_these_keys_is_continued(tiny, uninterrupted, tmp_path):
    """state.json of an older version lacks the keys; their defaults stand for what it did."""
    out_dir = tmp_path / "run"
    state = checkpoint.read_state(uninterrupted / "checkpoints/step_00000008")
    for name in ("init_from", "schedule", "decay_steps"):
        del state["config"][name]
    source = uninterrupted / "checkpoints/step_00000008"
    target = out_dir / "checkpoints/step_00000008"
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "state.json").write_bytes(checkpoint.state_bytes(state))
    train_here(tiny, f"--out_dir={out_dir}", "--log_every=2", "--checkpoint_every=4")
    assert model_bytes(newest(out_dir)) == model_bytes(newest(uninterrupted))


# --- schedule=wsd -------------------------------------------------------------------------------


def test_wsd_is_warm_up_then_constant_then_linear():
    config = Config(schedule="wsd", max_steps=100, warmup_steps=10, decay_steps=20,
                    learning_rate=1.0, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.6) and rates[99] == pytest.approx(0.2 + 0.8 / 20)
    constant = Config(schedule="wsd", max_steps=10, warmup_steps=0, learning_rate=1.0)
    assert {learning_rate(step, constant) for step in range(10)} == {1.0}


@pytest.fixture(scope="module")
def wsd(tmp_path_factory):
    """A directory with a config, wsd/tiny.py; `long`, a run of 30 steps; and `short`, one of 20.
    Both decay over the last 8."""
    directory = tmp_path_factory.mktemp("wsd")
    config = write_tiny(directory, schedule="wsd", decay_steps=8, max_steps=30, keep_checkpoints=1,
                        checkpoint_every=7)
    train_here(config, f"--out_dir={directory / 'long'}")
    train_here(config, f"--out_dir={directory / 'short'}", "--max_steps=20")
    return directory


def test_a_wsd_run_keeps_the_checkpoint_from_which_it_can_be_extended(wsd):
    kept = [path.name for path in list_checkpoints(wsd / "short")]
    assert kept == ["step_00000012", "step_00000020"]


def test_a_wsd_run_that_is_extended_equals_one_planned_so(wsd, tmp_path):
    train_here(wsd / "tiny.py", f"--out_dir={tmp_path}",
               f"--resume={wsd / 'short/checkpoints/step_00000012'}")
    assert model_bytes(newest(tmp_path)) == model_bytes(newest(wsd / "long"))
    def losses(run):
        return [(row["step"], row["loss"], row["lr"]) for row in rows(run)[0]]
    assert losses(tmp_path) == losses(wsd / "long")


@pytest.mark.parametrize("changes", [["--max_steps=30"], ["--decay_steps=4"],
                                     ["--max_steps=30", "--schedule=cosine", "--decay_steps=0"]])
def test_after_the_decay_has_begun_its_length_is_fixed(wsd, train_fails, changes):
    message = train_fails(wsd / "tiny.py", f"--out_dir={wsd / 'short'}", "--max_steps=20", *changes)
    assert "belongs to another run" in message


def test_a_wsd_run_may_not_become_so_short_that_it_should_decay_already(wsd, train_fails, tmp_path):
    message = train_fails(wsd / "tiny.py", f"--out_dir={tmp_path}", "--max_steps=18",
                          f"--resume={wsd / 'short/checkpoints/step_00000012'}")
    assert "max_steps was 20, is 18" in message


@pytest.mark.parametrize("changes, message", [
    ("--decay_steps=5", "decay_steps needs schedule=wsd"),
    ("--schedule=wsd --decay_steps=11", "max_steps = 12 - decay_steps = 11"),
    ("--schedule=linear", "schedule = 'linear', expected cosine or wsd")])
def test_schedules_that_cannot_be(tiny, train_fails, changes, message):
    assert message in train_fails(tiny, *changes.split())
