"""Resuming: a run ends with the same bytes as one that nothing interrupted."""
import dataclasses
import errno
import io
import json
import os
import shutil

import pytest
from conftest import AS_UNINTERRUPTED, rows, run, train_here
from kill_and_resume import kill_and_resume, outcome

import train
from nanoxla import checkpoint
from nanoxla.checkpoint import list_checkpoints, read_state, state_bytes
from nanoxla.errors import UserError, user_message
from nanoxla.resume import checkpoint_to_resume

# --- resuming -----------------------------------------------------------------------------------


def test_resume_is_bitwise(tiny, uninterrupted, cut_short):
    code, out, err = run("train.py", tiny, f"--out_dir={cut_short}", *AS_UNINTERRUPTED)
    assert code == 0 and "continuing from" in out, err
    assert outcome(cut_short) == outcome(uninterrupted)
    resumed = rows(cut_short)[0][-2:]  # of steps 10 and 12
    assert resumed[0]["compile_s"] > 0 and resumed[1]["compile_s"] == 0


def test_resume_from_a_downloaded_checkpoint_brings_its_history(tiny, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints/step_00000008", tmp_path / "downloaded")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={tmp_path / 'downloaded'}",
               *AS_UNINTERRUPTED)
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_another_run_in_the_same_directory_is_refused(tiny, uninterrupted, train_fails, tmp_path):
    out_dir = f"--out_dir={uninterrupted}"
    message = train_fails(tiny, out_dir, "--learning_rate=0.5", "--n_layers=3")
    assert "n_layers was 2, is 3" in message and "learning_rate was 0.01, is 0.5" in message
    message = train_fails(tiny, out_dir, "--train_glob=train_00001.bin")
    assert "the training data differs: it was train_*.bin" in message
    assert "is train_00001.bin" in message
    assert "not empty" in train_fails(tiny, out_dir, "--resume=never")
    older = uninterrupted / "checkpoints/step_00000008"
    message = train_fails(tiny, out_dir, f"--resume={older}")
    assert "has checkpoints of its own, the newest of them step_00000012" in message


def test_session_keys_and_the_place_of_the_data_may_change(tiny, uninterrupted, tmp_path):
    shutil.copytree(tiny.parent, tmp_path / "moved")
    changes = dict(data_dir=str(tmp_path / "moved"), micro_batch_size=4, log_every=5, eval_every=0,
                   checkpoint_every=3, keep_checkpoints=9, max_hours=9.0, max_skipped=3,
                   peak_tflops=1.0, attention="flash")
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(uninterrupted), **changes)
    fingerprint = train.data.open_data(config)[0].fingerprint()
    assert checkpoint_to_resume(config, fingerprint).name == "step_00000012"


def test_only_a_new_run_reads_its_shards_whole(tiny, uninterrupted, tmp_path, call, monkeypatch):
    scanned = []
    monkeypatch.setattr(train.shards, "check_token_ids", lambda paths, *_: scanned.extend(paths))
    monkeypatch.setattr(train, "run_on_all_cores", lambda *_: None)
    monkeypatch.setattr(train, "tune_environment", lambda *_: None)
    call(train.main, tiny, f"--out_dir={uninterrupted}", *AS_UNINTERRUPTED)
    assert not scanned
    call(train.main, tiny, f"--out_dir={tmp_path}")
    assert [path.name for path in scanned] == ["train_00000.bin", "train_00001.bin",
                                               "val_00000.bin"]


# --- kill -9 ------------------------------------------------------------------------------------


def test_kill_9_loses_nothing():
    assert kill_and_resume(kills=5, seed=1)[0] == 5


# --- damaged checkpoints ------------------------------------------------------------------------

FILES = "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "state.json"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=0.5):
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def make_newer(directory):
    """Raises the format's number, as a later version of the code may do."""
    state = json.loads((directory / "state.json").read_text())
    del state["sha256"]
    (directory / "state.json").write_bytes(state_bytes(state | {"format": state["format"] + 1}))


def put_in_other_weights(directory):
    shutil.copy(directory.with_name("step_00000008") / "model.safetensors", directory)


DAMAGES = {  # name: (function of the checkpoint's directory, part of the message)
    f"{damage.__name__} {file}":
        (lambda directory, damage=damage, file=file: damage(directory / file), file)
    for damage in (truncate, flip, os.unlink) for file in FILES
} | {
    "flip the last byte of state.json":
        (lambda directory: flip(directory / "state.json", 0.9999), "state.json"),
    "put in a file":
        (lambda directory: (directory / "notes.txt").write_text(""), "notes.txt is not part"),
    "put in other weights": (put_in_other_weights, "model.safetensors is damaged"),
    "empty": (empty, "has no state.json"),
    "make newer": (make_newer, "has format 3, of another version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
        tiny, uninterrupted, tmp_path, capsys, train_fails, damage):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before, damaged = list_checkpoints(tmp_path / "run")
    inflict, expected = DAMAGES[damage]
    inflict(damaged)
    message = train_fails(tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={damaged}")
    assert str(damaged) in message and expected in message
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path / "run"))
    fingerprint = json.loads((before / "state.json").read_text())["data_sha256"]
    assert checkpoint_to_resume(config, fingerprint) == before
    warning = capsys.readouterr().err
    assert expected in warning
    assert "renamed to step_00000012.set_aside, continuing from the previous one" in warning
    assert damaged.with_name("step_00000012.set_aside").exists()


def test_a_checkpoint_that_is_whole_is_not_set_aside(tiny, uninterrupted, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run")[-1]
    (newest / ".ipynb_checkpoints").mkdir()  # Jupyter does that when state.json is opened
    config = dataclasses.replace(train.load_config(tiny), out_dir=str(tmp_path / "run"))
    fingerprint = read_state(newest)["data_sha256"]
    assert checkpoint_to_resume(config, fingerprint) == newest

    class NetworkFile(io.BytesIO):
        def read(self, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr("nanoxla.files.open", lambda *_: NetworkFile(), raising=False)
    with pytest.raises(OSError, match="Input/output error") as failure:
        checkpoint_to_resume(config, fingerprint)
    assert user_message(failure.value).startswith(f"error: {newest}/")
    assert list_checkpoints(tmp_path / "run")[-1] == newest


def test_if_every_checkpoint_is_damaged_nothing_is_overwritten(tiny, uninterrupted, tmp_path,
                                                               train_fails):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for directory in list_checkpoints(tmp_path / "run"):
        flip(directory / "model.safetensors")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = train_fails(tiny, f"--out_dir={tmp_path / 'run'}")
    for name in ("step_00000012", "step_00000008"):
        assert f"{name}/model.safetensors is damaged" in message
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_continues_bitwise_from_before_a_damaged_checkpoint(tiny, uninterrupted, tmp_path,
                                                                  capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/step_00000012/optimizer.safetensors")
    train_here(tiny, f"--out_dir={tmp_path / 'run'}", *AS_UNINTERRUPTED, "--keep_checkpoints=1")
    assert "optimizer.safetensors is damaged" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_a_damaged_checkpoint_is_not_sampled_from(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints/step_00000012", tmp_path / "damaged")
    flip(tmp_path / "damaged/model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        checkpoint.load(tmp_path / "damaged")


# --- the next session of a notebook -------------------------------------------------------------


@pytest.fixture
def kaggle_input(cut_short, tmp_path):
    """A read-only directory that holds the output of an earlier session, as /kaggle/input does."""
    directory = tmp_path / "input"
    shutil.copytree(cut_short, directory / "notebooks/me/nanoxla/out/run")
    for path in [*directory.rglob("*"), directory]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield directory
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o755)


def test_auto_continues_from_the_output_of_an_earlier_session(
        tiny, uninterrupted, kaggle_input, tmp_path):
    before = {path: path.stat() for path in kaggle_input.rglob("*")}
    train_here(tiny, f"--out_dir={tmp_path / 'new'}", f"--resume_search={kaggle_input}",
               *AS_UNINTERRUPTED)
    assert outcome(tmp_path / "new") == outcome(uninterrupted)
    assert [path.name for path in list_checkpoints(tmp_path / "new")] == ["step_00000012"]
    after = {path: path.stat() for path in kaggle_input.rglob("*")}
    assert before.keys() == after.keys()
    assert all(before[path].st_mtime_ns == after[path].st_mtime_ns for path in before)


def test_auto_starts_no_new_run_beside_checkpoints_that_do_not_fit(
        tiny, kaggle_input, tmp_path, train_fails):
    search = f"--out_dir={tmp_path / 'new'}", f"--resume_search={kaggle_input}"
    message = train_fails(tiny, *search, "--learning_rate=1")
    assert "no checkpoint in" in message and "learning_rate was 0.01, is 1.0" in message
    assert message.strip().endswith("To start a new run, add --resume=never")
