"""The formats of shards: which are read, which are refused, and which are never doubted."""
import io
import json
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run, write_tiny

import data
import train
from nanoxla.errors import UserError
from nanoxla.shard_formats import recognise
from nanoxla.shards import check_token_ids

sys.path.insert(0, str(ROOT / "tools"))

import doctor

IDS = np.random.default_rng(0).integers(0, 4_096, 30_001)


def config(directory, **changes):
    return SimpleNamespace(**dict(data_dir=str(directory), train_glob="*.bin", val_glob="",
                                  context=16, vocab_size=4_096, eval_every=0, tokenizer="",
                                  shard_format="auto") | changes)


def llm_c(ids, magic=20240520, version=1, missing=0):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) + missing
    return header.tobytes() + ids.tobytes()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def checked(config):
    """The training data, after the checks that come before a run."""
    train_data, paths = data.check_data(config)
    check_token_ids(paths, config.vocab_size, config.shard_format)
    return train_data


def refusal(path, shard_format="auto"):
    with pytest.raises(UserError) as error:
        recognise(path, shard_format)
    return str(error.value)


# --- read ---------------------------------------------------------------------------------------

READ = {  # format as `inspect` prints it: the file
    "uint16 without a header": IDS.astype("<u2").tobytes(),
    "llm.c, uint16 after a 1,024-byte header": llm_c(IDS.astype("<u2")),
    "llm.c, uint32 after a 1,024-byte header": llm_c(IDS.astype("<u4"), 20240801, 7),
    ".npy, uint16 after a 128-byte header": npy(IDS.astype("<u2")),
    ".npy, uint32 after a 128-byte header": npy(IDS.astype("<u4")),
    ".npy, int32 after a 128-byte header": npy(IDS.astype(">i4")),
    ".npy, int64 after a 128-byte header": npy(IDS),
    "uint32 without a header": IDS.astype("<u4").tobytes(),
    "int64 without a header": IDS.tobytes(),
}


@pytest.mark.parametrize("words", READ)
def test_every_format_gives_the_same_batches(tmp_path, call, capsys, words):
    (tmp_path / "a.bin").write_bytes(READ[words])
    dataset = checked(config(tmp_path))
    note = f"note: 1 of 1 shards in {tmp_path} are read as {words}; --shard_format overrules this\n"
    assert capsys.readouterr().err == ("" if words == "uint16 without a header" else note)

    plain = tmp_path / "plain"
    IDS.astype("<u2").tofile(plain)
    expected = data.TokenDataset([plain], 16, 4_096, "uint16")
    assert dataset.fingerprint() == expected.fingerprint()
    for step in (0, 3, 400):  # 468 steps are an epoch
        assert (dataset.batch(step, 4, 0, 0, 1) == expected.batch(step, 4, 0, 0, 1)).all()

    printed, _ = call(data.main, "inspect", tmp_path, "--vocab-size", "4096")
    formats = [line for line in printed.splitlines() if line.startswith("format: ")]
    assert formats == [f"format: {words}"] * (words != "uint16 without a header")
    assert f"30,001       0 - {IDS.max()}" in printed and "WARNING" not in printed


def test_formats_may_be_mixed(tmp_path, call):
    for i, content in enumerate(READ.values()):
        (tmp_path / f"{i}.bin").write_bytes(content)
    dataset = data.TokenDataset(sorted(tmp_path.iterdir()), 16, 4_096)
    ring = np.concatenate([IDS] * len(READ))
    starts = np.arange(len(READ)) * len(IDS) + len(IDS) - 8  # half in one shard, half in the next
    assert (dataset.read(starts) == ring[(starts[:, None] + np.arange(17)) % len(ring)]).all()
    printed, _ = call(data.main, "inspect", tmp_path)
    assert "format: int64 without a header (1 of them)\n" in printed


def test_the_fingerprint_of_uint16_shards_is_that_of_older_versions(tmp_path):
    dataset = train.data.open_data(train.load_config(write_tiny(tmp_path)))[0]
    assert dataset.fingerprint() == (
        "f8e48cba1f913f5dc3097ade408e1c85469cadc9a26de4fa846e2cd20ca66cbd")


def with_id(token):
    return np.where(np.arange(500) == 480, token, IDS[:500])


@pytest.mark.parametrize("content, found", [
    (npy(with_id(-100)), r"-100 at token 480 \(byte 3,968\)"),
    (llm_c(with_id(128_000).astype("<u4"), 20240801, 7), r"128000 at token 480 \(byte 2,944\)"),
    (with_id(128_000).astype("<u4").tobytes(), r"128000 at token 480 \(byte 1,920\)"),
], ids=["negative", "llm.c", "uint32"])
def test_an_id_that_no_uint16_can_hold_is_refused(tmp_path, content, found):
    (tmp_path / "a.bin").write_bytes(content)
    message = f"a.bin holds token id {found}; ids must be below vocab_size=4096"
    with pytest.raises(UserError, match=message):
        checked(config(tmp_path))
    with pytest.raises(UserError, match=message):
        data.open_data(config(tmp_path))[0].read(np.array([470]))


# --- refused ------------------------------------------------------------------------------------

MENDED = {  # name: the file, a part of the message
    "big-endian uint16": (IDS.astype(">u2").tobytes(), "looks like big-endian uint16;"),
    "big-endian uint32": (IDS.astype(">u4").tobytes(), "looks like big-endian uint32;"),
    "big-endian int64": (IDS.astype(">i8").tobytes(), "looks like big-endian int64;"),
    "two dimensions": (npy(IDS[:-1].reshape(2, -1)), "of int64, shape (2, 15000); expected one"),
    "columns first": (npy(np.asfortranarray(IDS[:-1].reshape(-1, 2))), "shape (15000, 2)"),
    "floats": (npy(IDS.astype("f8")), "is a .npy file of float64, shape (30001,); expected"),
}


@pytest.mark.parametrize("name", MENDED)
def test_the_message_contains_a_command_that_mends_the_file(tmp_path, name):
    content, message = MENDED[name]
    path = tmp_path / "it's $HOME" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(content)
    found = refusal(path)
    assert f"{path} " in found and message in found and "\n" not in found
    command = re.search(r"To rewrite it: python (.*)|to rewrite it: python (.*)", found)
    subprocess.run(f"{sys.executable} {command[1] or command[2]}", shell=True, check=True)
    ids = data.open_shards([path])[0]
    assert (ids == IDS[:len(ids)]).all() and len(ids) >= 30_000
    assert os.listdir(path.parent) == ["a.bin"]


def test_in_a_read_only_directory_the_command_writes_a_copy_here(tmp_path, monkeypatch):
    content, _ = MENDED["big-endian uint16"]
    path, here = tmp_path / "input/a.bin", tmp_path / "here"
    path.parent.mkdir()
    path.write_bytes(content)
    here.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    command, note = re.search(r"to rewrite it: python (.*) (\(it writes the copy here.*)",
                              refusal(path)).groups()
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=here)
    assert path.read_bytes() == content and os.listdir(here) == ["a.bin"]
    assert (data.open_shards([here / "a.bin"])[0] == IDS).all()


REFUSED = {
    "llm.c, too short": (llm_c(IDS.astype("<u2"), missing=5),
                         "version 1, 30,006 tokens of uint16; expected version 1 and 61,036 bytes, "
                         "found 61,026"),
    "llm.c, other version": (llm_c(IDS.astype("<u2"), version=2), "version 2, 30,001 tokens"),
    "uint32, cut": (IDS.astype("<u4").tobytes()[:-2], "has 120,002 bytes, not a multiple of 4"),
    ".npy, cut": (npy(IDS)[:-1], "is a .npy file that can't be read: "),
    ".npy, half a header": (npy(IDS)[:50], "is a .npy file that can't be read: "),
    ".npy, nothing": (npy(IDS[:0]), "a.bin is empty"),
    ".npy of objects": (npy(np.array([{}])), "is a .npy file that can't be read: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_file_is_refused(tmp_path, mistake, name):
    content, message = REFUSED[name]
    (tmp_path / "a.bin").write_bytes(content)
    assert message in refusal(tmp_path / "a.bin")
    assert message in mistake(data.main, "inspect", tmp_path)[1]


def test_the_doctor_and_a_run_refuse_a_wrong_format(tmp_path, train_fails):
    tiny = write_tiny(tmp_path, vocab_size=65_536)
    IDS.astype(">u2").tofile(tmp_path / "train_00001.bin")
    message = "train_00001.bin looks like big-endian uint16"
    findings = dict(doctor.check_data(train.load_config(tiny)))
    assert message in findings["wrong"] and findings["wrong"].startswith("data: ")
    assert message in train_fails(tiny, f"--out_dir={tmp_path / 'out'}")


# --- not doubted --------------------------------------------------------------------------------


def ordinary(vocab_size, size):
    """Yields sequences of ids below vocab_size."""
    random = np.random.default_rng(vocab_size + size)
    uniform = random.integers(0, vocab_size, size)
    yield uniform
    yield np.sort(uniform)
    for exponent in (1.1, 1.5, 3):
        yield random.zipf(exponent, size).clip(max=2**40) % vocab_size
    for step in (1, 2, 7):
        yield np.arange(size) * step % vocab_size
    for constant in (0, 1, 255, vocab_size // 256 * 255, vocab_size - 1):
        yield np.full(size, constant)
        yield np.where(np.arange(size) % 1_024 < 100, uniform, constant)  # padded documents
    yield np.arange(size) % 2
    yield random.choice(uniform[:9], size)  # a few different ids
    yield np.where(np.isin(np.arange(size), [0, 2, 4, 6]), np.arange(size) + 4, 0) % vocab_size


@pytest.mark.parametrize("vocab_size", [2, 4, 64, 256, 300, 4_096, 32_000, 50_257, 65_536])
@pytest.mark.parametrize("size", [9, 100, 300, 1_000, 30_000])
def test_ordinary_shards_are_not_doubted(tmp_path, vocab_size, size):
    for ids in ordinary(vocab_size, size):
        ids.astype("<u2").tofile(tmp_path / "a.bin")
        assert recognise(tmp_path / "a.bin", "auto") == ("", 0, np.dtype("<u2"), size), ids


@pytest.mark.parametrize("content", [*READ.values(), MENDED["big-endian uint16"][0]])
def test_shard_format_overrules(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    found = data.open_data(config(tmp_path, shard_format="uint16"))[0].shards[0]
    assert found.dtype == "<u2" and found.tobytes() == content


def test_shards_of_prepare_are_not_doubted(tmp_path):
    path = tmp_path / "train_00000.bin"
    IDS.astype("<u4").tofile(path)
    shards = [{"file": path.name, "tokens": 2 * len(IDS)}]
    meta = {"format": 1, "vocab_size": 400, "splits": {"train": {"shards": shards}}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert len(data.open_shards([path])[0]) == 2 * len(IDS)
    shards[0]["tokens"] -= 1  # no longer the file that prepare wrote
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert len(data.open_shards([path])[0]) == len(IDS)


# --- many shards --------------------------------------------------------------------------------

OPEN = """
import json, sys, data
from types import SimpleNamespace
from nanoxla.errors import run_command

def main():
    train, val = data.open_data(SimpleNamespace(**json.loads(sys.argv[1])))
    print(len(train.shards), len(val.shards))
run_command(main)
"""


def limit_open_files(soft, hard):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_open_files(tmp_path):
    for i in range(300):
        IDS[:17].astype("<u2").tofile(tmp_path / f"{i}.{'val' if i < 50 else 'bin'}")
    arguments = json.dumps(vars(config(tmp_path, val_glob="*.val", eval_every=1)))
    code, out, err = run("-c", OPEN, arguments, preexec_fn=limit_open_files(64, 600))
    assert (code, out) == (0, "250 50\n"), err
    code, out, err = run("-c", OPEN, arguments, preexec_fn=limit_open_files(64, 400))
    assert code == 2 and err == (
        "error: 300 shards need 428 open files, and the system allows 400. Raise it (ulimit -n "
        "428, or ask the administrator), or join the shards into fewer, larger ones\n")
    code, out, err = run("data.py", "inspect", tmp_path, preexec_fn=limit_open_files(64, 64))
    assert code == 0 and "250 shards, " in out, err
