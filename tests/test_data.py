"""data.py: the order in which windows are read, what is in the shards, and the two commands."""
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from conftest import run, start

import data
from data import ROUNDS, TokenDataset, permute, window_starts
from nanoxla import shards as shards_module
from nanoxla.documents import KNOWN
from nanoxla.errors import UserError
from nanoxla.prepare import ShardWriter
from nanoxla.shards import check_token_ids

# --- the order of the windows -------------------------------------------------------------------

RINGS = [  # (tokens, context): 1, 2, 3, 10 and 100,003 windows
    (7, 7), (17, 8), (31, 10), (107, 10), (100_003 * 16 + 5, 16)]


def epochs_of(num_tokens, context, seed, count):
    num_windows = num_tokens // context
    starts = window_starts(np.arange(count * num_windows), num_tokens, context, seed)
    return starts.reshape(count, num_windows)


def origin_and_order(starts, num_tokens, context):
    """Recovers an epoch's origin and order from its starts. The origin comes after the largest gap,
    because the gap contains the tokens that are left over."""
    ascending = np.sort(starts)
    gaps = np.diff(ascending, prepend=ascending[-1] - num_tokens)
    origin = ascending[np.argmax(gaps)]
    return origin, (starts - origin) % num_tokens // context


def test_the_example_at_the_top_of_data_py_is_right():
    lines = [line.split() for line in data.__doc__.splitlines() if line.startswith("    epoch")]
    assert len(lines) == 2
    for starts, (_, epoch, drawing, _, origin, _, *order) in zip(epochs_of(43, 4, 0, 2), lines):
        found, windows = origin_and_order(starts, 43, 4)
        assert f"{found}," == origin and list(map(str, windows)) == order, epoch
        expected = np.full(43, ".")
        for begin, window in zip(starts, windows):
            expected[np.arange(begin, begin + 4) % 43] = window
        assert "".join(expected) == drawing


@pytest.mark.parametrize("seed", [0, 1337])
@pytest.mark.parametrize("num_tokens, context", RINGS)
def test_an_epoch_reads_each_window_once(num_tokens, context, seed):
    epochs = epochs_of(num_tokens, context, seed, 3)
    for starts in epochs:
        origin, order = origin_and_order(starts, num_tokens, context)
        assert (np.sort(order) == np.arange(num_tokens // context)).all()
        assert (starts == (origin + order * context) % num_tokens).all()
    # The same in batches, from the last sample to the first. Some contain the end of an epoch.
    samples = np.arange(epochs.size)[::-1]
    batches = [window_starts(batch, num_tokens, context, seed)
               for batch in np.array_split(samples, 7) if len(batch)]
    assert (np.concatenate(batches)[::-1] == epochs.ravel()).all()


def test_every_epoch_and_every_seed_has_its_own_order_and_origin():
    num_tokens, context = 10_009, 10
    found = [origin_and_order(starts, num_tokens, context)
             for seed in range(3) for starts in epochs_of(num_tokens, context, seed, 5)]
    assert len({origin for origin, _ in found}) == 15
    assert len({order.tobytes() for _, order in found}) == 15


def assert_uniform(counts, freedom):
    """Pearson's chi-square is within five standard deviations: neither lumpy nor too even."""
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_order_looks_random(seed):
    num_windows, context = 100_000, 16
    num_tokens = num_windows * context + 5
    for starts in epochs_of(num_tokens, context, seed, 2):
        _, order = origin_and_order(starts, num_tokens, context)
        early_or_late = np.histogram2d(np.arange(num_windows), order, bins=10)[0]
        assert_uniform(early_or_late, 9 * 9)
        for lag in (1, 2, 317):  # 317 windows are a row of permute's rectangle
            steps = (order[lag:] - order[:-lag]) % num_windows
            assert_uniform(np.histogram(steps, bins=100, range=(0, num_windows))[0], 99)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 100, 101, 65_536, 100_003])
def test_permute_is_one_to_one(size):
    keys = np.random.SeedSequence(size).generate_state(ROUNDS, np.uint64)
    assert (np.sort(permute(np.arange(size), size, keys)) == np.arange(size)).all()


# --- reading windows ----------------------------------------------------------------------------

CONTEXT = 9


@pytest.fixture(params=[[50, 37, 64], [10, 10, 10, 10], [41]], ids=str)
def shards(request, tmp_path):
    """The paths of shards of random ids below 1,000, and all the ids."""
    ids = [np.random.default_rng(size + i).integers(0, 1_000, size)
           for i, size in enumerate(request.param)]
    paths = [tmp_path / f"train_{i:05d}.bin" for i in range(len(ids))]
    for path, shard in zip(paths, ids):
        shard.astype("<u2").tofile(path)
    return paths, np.concatenate(ids)


def test_windows_run_across_shards_and_around_the_ring(shards):
    paths, ids = shards
    windows = TokenDataset(paths, CONTEXT, 1_000).read(np.arange(len(ids)))  # from every position
    ring = np.concatenate([ids, ids[:CONTEXT]])
    assert windows.dtype == np.int32 and windows.shape == (len(ids), CONTEXT + 1)
    assert (windows == np.lib.stride_tricks.sliding_window_view(ring, CONTEXT + 1)).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_any_number_of_cores_reads_the_same_data(shards, world_size):
    dataset = TokenDataset(shards[0], CONTEXT, 1_000)
    for step in (7, 0, 2, 0):  # in any order, repeatedly, across the ends of epochs
        samples = np.arange(step * 16, step * 16 + 16)
        expected = dataset.read(window_starts(samples, dataset.num_tokens, CONTEXT, seed=3))
        shares = [dataset.batch(step, 16, 3, rank, world_size) for rank in range(world_size)]
        assert (np.concatenate(shares) == expected).all()
        assert {len(share) for share in shares} == {16 // world_size}


def test_validation_windows_are_fixed_and_spread_evenly(shards):
    dataset = TokenDataset(shards[0], CONTEXT, 1_000)
    available = (dataset.num_tokens - 1) // CONTEXT
    for count in range(1, available + 1):
        starts = dataset.fixed_windows(count)
        assert (starts == TokenDataset(shards[0], CONTEXT, 1_000).fixed_windows(count)).all()
        assert starts[0] == 0 and starts[-1] + CONTEXT < dataset.num_tokens
        assert len(starts) == count and (starts % CONTEXT == 0).all()
        gaps = np.diff(starts, append=available * CONTEXT) // CONTEXT
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    with pytest.raises(UserError, match=f"{available + 1} windows, but .* has {available} for val"):
        dataset.fixed_windows(available + 1)


READ_MUCH = """
import re, sys, data
from pathlib import Path

def anonymous_megabytes():  # without the pages of files, which the kernel can drop
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) / 1024

before = anonymous_megabytes()
dataset = data.TokenDataset(sorted(Path(sys.argv[1]).iterdir()), context=128, vocab_size=100)
assert dataset.num_tokens == 10**10
print(max(anonymous_megabytes() for step in range(1_000)
          if len(dataset.batch(step, 32, 0, 0, 1))) - before)
"""


def test_ten_billion_tokens_need_no_more_memory(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.bin").touch()
        os.truncate(tmp_path / f"{i}.bin", 2 * 10**9)  # sparse: it takes no space on the disk
    code, out, err = run("-c", READ_MUCH, tmp_path)
    assert code == 0 and float(out) < 100, err


def test_a_shard_shorter_than_a_window_is_refused(tmp_path):
    np.zeros(CONTEXT, "<u2").tofile(tmp_path / "a.bin")
    message = r"a\.bin holds 9 tokens; a window of context=9 needs 10"
    with pytest.raises(UserError, match=message):
        TokenDataset([tmp_path / "a.bin"], CONTEXT, 100)


@pytest.mark.parametrize("names, position, offset", [
    ("ab", 47, 6), ("ab", 45, 0), ("ba", 57, 6), ("ab", None, 6)],
    ids=["next shard", "start of the next shard", "around the ring", "check_token_ids"])
def test_an_id_outside_the_vocabulary_is_located(tmp_path, monkeypatch, names, position, offset):
    def read(paths, vocab_size):
        if position is None:
            return check_token_ids(paths, vocab_size)
        return TokenDataset(paths, CONTEXT, vocab_size).read(np.array([20, position]))

    monkeypatch.setattr(shards_module, "SCAN_TOKENS", 3)  # the id is not in the first piece
    np.full(50, 499, "<u2").tofile(tmp_path / "a.bin")
    np.where(np.arange(10) == offset, 500, 0).astype("<u2").tofile(tmp_path / "b.bin")
    paths = [tmp_path / f"{name}.bin" for name in names]
    read(paths, 501)
    message = (rf"b\.bin holds token id 500 at token {offset} \(byte {2 * offset}\); "
               "ids must be below vocab_size=500")
    with pytest.raises(UserError, match=message):
        read(paths, 500)


# --- prepare ------------------------------------------------------------------------------------


def make_documents():
    """1,000 different documents in an invented language, 2 MB. They contain all that a tokenizer
    could spoil: runs of spaces, line ends, digits, characters outside its vocabulary."""
    rng = random.Random(0)
    syllables = "the an ing er on re st in al ed or ou en at m b".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(1_000)]
    after = [" "] * 40 + [". ", ", ", "\n", "\n\n", "\r\n", "\t", "  ", " 😀", " 1972 ",
                          " naïve 中文 ", "\n    "]
    return ["".join(word + rng.choice(after) for word in rng.choices(words, k=300))
            for _ in range(1_000)]


DOCUMENTS = make_documents()


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory with the documents in every format, a tokenizer trained on them, and `out`
    prepared from texts/."""
    path = tmp_path_factory.mktemp("corpus")
    blank = " \n\n"  # not a document
    for i, text in enumerate([*DOCUMENTS, blank]):
        write(path / "texts" / f"{i // 500}" / f"{i:04d}.txt", text.encode())
    lines = [json.dumps({"id": i, "text": text}) + "\n"
             for i, text in enumerate([*DOCUMENTS, blank])]
    (path / "docs.jsonl").write_text("".join(lines) + "\n")
    (path / "docs.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), 1))
    (path / "docs.parquet").write_bytes(parquet(body=[*DOCUMENTS, blank]))
    (path / "twice.jsonl").write_text("".join(lines[::-1] * 2))
    (path / "big.jsonl").write_text("".join(lines * 12))  # takes seconds: time to interrupt it
    out = prepare(path, "texts", path / "out", "--vocab-size", 400)
    assert "tok.model: 400 tokens" in out
    return path


def command(corpus, source, out, *options):
    return ["prepare", "--input", corpus / source, "--tokenizer", corpus / "tok.model",
            "--out", out, "--val-fraction", 0.1, *options]


def prepare(corpus, source, out, *options):
    """Runs the real command, and returns its stdout."""
    code, printed, err = run("data.py", *command(corpus, source, out, *options))
    assert code == 0, err
    assert re.search(r"tokens in [\d.]+ s, [\d,]+ tokens/s with \d+ processes", printed)
    assert_complete(out)
    return printed


def assert_complete(out):
    """meta.json describes every file, and there is no other."""
    meta = json.loads((out / "meta.json").read_text())
    entries = [shard for split in meta["splits"].values() for shard in split["shards"]]
    expected = {"meta.json", "tokenizer.model"} | {entry["file"] for entry in entries}
    assert {path.name for path in out.iterdir()} == expected
    for entry in entries:
        assert (out / entry["file"]).stat().st_size == 2 * entry["tokens"]
    tokenizer = (out / "tokenizer.model").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() == meta["tokenizer_sha256"]
    for split, entry in meta["splits"].items():
        ids = all_ids(out, split)
        assert len(ids) == entry["tokens"] and ids.max() < meta["vocab_size"]
        assert entry["documents"] == (ids == meta["bos_id"]).sum() == (ids == meta["eos_id"]).sum()
    assert not out.with_name(out.name + ".partial").exists()


def all_ids(out, split):
    return np.concatenate([np.fromfile(path, "<u2") for path in sorted(out.glob(f"{split}_*.bin"))])


def checksums(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def load_processor(out):
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def decoded(out, split):
    """The texts of the documents in a split."""
    processor, ids = load_processor(out), all_ids(out, split)
    pieces = np.split(ids, np.flatnonzero(ids == processor.bos_id())[1:])
    return processor.decode([piece[1:-1].tolist() for piece in pieces])


def test_documents_are_bos_ids_eos_and_decode_to_themselves(corpus):
    processor = load_processor(corpus / "out")
    entries = json.loads((corpus / "out" / "meta.json").read_text())["splits"]
    for split in ("train", "val"):
        texts = decoded(corpus / "out", split)
        assert texts == [text for text in DOCUMENTS if text in set(texts)]
        assert entries[split]["bytes"] == sum(len(text.encode()) for text in texts)
        expected = [[processor.bos_id(), *processor.encode(text), processor.eos_id()]
                    for text in texts]
        assert all_ids(corpus / "out", split).tolist() == list(itertools.chain(*expected))


def test_the_split_is_by_document_and_equal_texts_go_together(corpus, tmp_path):
    prepare(corpus, "twice.jsonl", tmp_path / "out")
    train, val = (set(decoded(corpus / "out", split)) for split in ("train", "val"))
    assert train | val == set(DOCUMENTS) and not train & val and 70 <= len(val) <= 130
    assert set(decoded(tmp_path / "out", "train")) == train
    assert set(decoded(tmp_path / "out", "val")) == val


@pytest.mark.parametrize("source, options", [
    ("docs.jsonl", ("--processes", 1)), ("docs.jsonl.gz", ("--processes", 3)),
    ("docs.parquet", ("--text-key", "body"))])
def test_shards_depend_neither_on_the_format_nor_on_the_processes(corpus, tmp_path, source,
                                                                  options):
    prepare(corpus, source, tmp_path / "out", *options)
    assert checksums(tmp_path / "out") == checksums(corpus / "out")


def test_shard_tokens_cuts_the_same_ids(corpus, tmp_path):
    prepare(corpus, "docs.jsonl", tmp_path / "out", "--shard-tokens", 100_000)
    sizes = [path.stat().st_size // 2 for path in sorted((tmp_path / "out").glob("train_*.bin"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {100_000}
    for split in ("train", "val"):
        assert (all_ids(tmp_path / "out", split) == all_ids(corpus / "out", split)).all()


@pytest.mark.parametrize("total, sizes", [
    (1_000, [1_000]), (2_009, [1_000, 1_009]), (2_010, [1_000, 1_000, 10])])
def test_a_last_shard_below_one_percent_is_merged(tmp_path, total, sizes):
    writer, ids = ShardWriter(tmp_path, "train", 1_000), np.arange(total, dtype="<u2")
    for piece in np.array_split(ids, 7):
        writer.append(piece)
    assert [shard["tokens"] for shard in writer.close()["shards"]] == sizes
    assert (all_ids(tmp_path, "train") == ids).all()


def test_shards_written_by_prepare_are_not_scanned_again(corpus, tmp_path):
    shutil.copytree(corpus / "out", tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("*.bin"))
    with paths[0].open("r+b") as file:
        file.write(np.array([60_000], "<u2").tobytes())
    check_token_ids(paths, 400)  # does not notice, because it does not read the shard
    with pytest.raises(UserError, match="60000 at token 0 "):
        check_token_ids(paths, 399)  # a smaller vocabulary than prepare's: reads the shards
    os.truncate(paths[0], paths[0].stat().st_size - 2)
    with pytest.raises(UserError, match="60000 at token 0 "):
        check_token_ids(paths, 400)  # no longer the file that prepare wrote


# --- prepare, interrupted -----------------------------------------------------------------------


@pytest.fixture
def running(corpus, tmp_path):
    """A running `prepare` that writes tmp_path/out, in a process group of its own."""
    process = start("data.py", *command(corpus, "big.jsonl", tmp_path / "out"))
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["all processes", "the first process"])
def test_a_killed_prepare_leaves_nothing_that_looks_complete(corpus, tmp_path, running, kill):
    wait_for(tmp_path / "out.partial" / "train_00000.bin", running)
    kill(running.pid, signal.SIGKILL)
    running.communicate(timeout=5)  # returns when the last of its processes is gone
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    prepare(corpus, "docs.jsonl", tmp_path / "out")
    assert checksums(tmp_path / "out") == checksums(corpus / "out")


@pytest.mark.parametrize("awaited, delay", [
    ("out.partial", 0.1), ("out.partial/train_00000.bin", 0)],
    ids=["while the other processes start", "while they encode"])
def test_ctrl_c_leaves_nothing(tmp_path, running, awaited, delay):
    wait_for(tmp_path / awaited, running)
    time.sleep(delay)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert os.listdir(tmp_path) == []


# --- mistakes in prepare ------------------------------------------------------------------------


def damaged(content):
    """Changes the bytes of a gzip or parquet file that describe how the rest is encoded."""
    return content[:10] + bytes(byte ^ 0x5A for byte in content[10:60]) + content[60:]


NOISE = random.Random(0).randbytes(3_000).hex()
LINE = json.dumps({"text": NOISE}).encode() + b"\n"
TRAIN = " --tokenizer DIR/new.model --vocab-size"
MISTAKES = {  # name: (file in DIR, its content, options, part of the message)
    "missing input": ("a.txt", b"x", "--input DIR/b.txt", "--input DIR/b.txt does not exist"),
    "unknown suffix": ("a.doc", b"x", "--input DIR/a.doc",
                       f"DIR/a.doc: expected one of {KNOWN}"),
    "no text files": ("sub/a.xml", b"x", "--input DIR/sub", f"no {KNOWN} file in DIR/sub"),
    "not UTF-8": ("a.txt", b"abc\xff", "--input DIR/a.txt",
                  "DIR/a.txt is not UTF-8: byte 0xff at offset 3"),
    "not JSON": ("a.jsonl", LINE + b"{\n", "--input DIR/a.jsonl",
                 "DIR/a.jsonl:2 is not a JSON object"),
    "no key": ("a.jsonl", LINE, "--input DIR/a.jsonl --text-key k",
               "DIR/a.jsonl:1: expected a JSON object whose 'k' is a str"),
    "not a string": ("a.jsonl", LINE + b'{"text": 3}', "--input DIR/a.jsonl",
                  "DIR/a.jsonl:2: expected a JSON object whose"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud83d"}', "--input DIR/a.jsonl",
                              "DIR/a.jsonl:1 is not a JSON object"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(LINE)[:-20], "--input DIR/a.jsonl.gz",
                       "DIR/a.jsonl.gz is not a complete gzip file"),
    "damaged gzip": ("a.jsonl.gz", damaged(gzip.compress(LINE)), "--input DIR/a.jsonl.gz",
                     "DIR/a.jsonl.gz"),
    "no column": ("a.parquet", parquet(k=["x"]), "--input DIR/a.parquet",
                  "DIR/a.parquet has no column 'text' of strings"),
    "column of numbers": ("a.parquet", parquet(text=[1, 2]), "--input DIR/a.parquet",
                          "DIR/a.parquet"),
    "truncated parquet": ("a.parquet", parquet(text=["x"])[:-9], "--input DIR/a.parquet",
                          "DIR/a.parquet is not a readable parquet"),
    "damaged parquet": ("a.parquet", damaged(parquet(text=[NOISE])), "--input DIR/a.parquet",
                        "DIR/a.parquet"),
    "--out in use": ("full/a", b"", "--out DIR/full",
                     "--out DIR/full exists and is not an empty directory"),
    "no tokenizer": ("a.txt", b"x", "--tokenizer DIR/no.model",
                     "DIR/no.model does not exist; give --vocab-size to train"),
    "not a tokenizer": ("a.txt", b"x", "--tokenizer DIR/a.txt",
                        "DIR/a.txt is not a SentencePiece model"),
    "other vocabulary size": ("a.txt", b"x", "--vocab-size 500",
                              "tok.model exists with 400 tokens and --vocab-size says 500"),
    "over 65,536 tokens": ("a.txt", b"x", TRAIN + " 65537",
                           "--vocab-size 65,537 does not fit uint16 shards; expected 1 to 65,536"),
    "too large for the text": ("a.txt", b"x", TRAIN + " 60000",
                               "a vocabulary of 60,000 could not be trained on this text"),
    "not JSON, training": ("a.jsonl", LINE + b"{\n", "--input DIR/a.jsonl" + TRAIN + " 400",
                           "DIR/a.jsonl:2 is not a JSON"),
    "empty, training": ("a.txt", b"", "--input DIR/a.txt" + TRAIN + " 400", "error: "),
    "--val-fraction 0": ("a.txt", b"x", "--val-fraction 0",
                         "--val-fraction 0.0: expected a number between 0 and 1"),
    "no val document": ("a.txt", b"x", "--val-fraction 1e-9",
                        "no document fell into the val split: 1 documents with text"),
    "no document": ("a.txt", b" \n", "--input DIR/a.txt",
                    "no document fell into the train split: 0 documents with text"),
}


def error_in(err):
    """The line on stderr that explains the mistake. A progress line may precede it."""
    lines = err.splitlines()
    assert len(lines) <= 2 and lines[-1].startswith("error: "), err
    return lines[-1]


def make_mistake(name, corpus, tmp_path):
    """Writes the files of a mistake. Returns the arguments of the command that meets it, and a part
    of the message."""
    parts = [part.replace("DIR", str(tmp_path)) if isinstance(part, str) else part
             for part in MISTAKES[name]]
    file, content, options, message = parts
    write(tmp_path / file, content)
    write(tmp_path / "good.txt", b"the one text\n")
    return command(corpus, tmp_path / "good.txt", tmp_path / "out", *options.split()), message


def files_below(directory):
    return {path for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_prepare_explains_a_mistake_and_leaves_nothing(corpus, tmp_path, mistake, name):
    arguments, message = make_mistake(name, corpus, tmp_path)
    before = files_below(tmp_path)
    assert message in error_in(mistake(data.main, *arguments)[1])
    assert files_below(tmp_path) == before and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["--out in use", "not JSON", "damaged gzip"])
def test_the_real_command_explains_a_mistake_and_leaves_nothing(corpus, tmp_path, name):
    arguments, message = make_mistake(name, corpus, tmp_path)
    before = files_below(tmp_path)
    code, out, err = run("data.py", *arguments)
    assert code == 2 and out == "" and message in error_in(err)
    assert files_below(tmp_path) == before and not list(tmp_path.glob("out*"))


# --- inspect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, options, message", [
    (None, "DIR/a.bin", "no file matches a.bin in DIR"),
    (None, "DIR/no/where", "DIR/no is not a directory"),
    (b"", "DIR", "DIR/a.bin is empty"),
    (b"123", "DIR/a.bin", "DIR/a.bin has 3 bytes, not a multiple of 2"),
    (b"1234", "DIR --context 0", "--context"),
])
def test_inspect_explains_a_mistake(tmp_path, mistake, content, options, message):
    if content is not None:
        write(tmp_path / "a.bin", content)
    arguments = options.replace("DIR", str(tmp_path)).split()
    _, err = mistake(data.main, "inspect", *arguments)
    assert message.replace("DIR", str(tmp_path)) in error_in(err)


def test_inspect_shows_the_known_ids_of_the_beginning(corpus, tmp_path, call):
    ids = all_ids(corpus / "out", "train")[:9].tolist()
    np.save(tmp_path / "a.npy", np.array([-1, *ids, 5_000], "i4"))
    printed, _ = call(data.main, "inspect", tmp_path / "a.npy", "--tokenizer",
                      corpus / "tok.model")
    text = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tok.model")).decode(ids)
    assert text and f"a.npy begins: {text!r}" in printed


def test_inspect_reports_what_is_in_the_shards(corpus):
    code, printed, err = run("data.py", "inspect", corpus / "out", "--context", 100)
    assert code == 0 and "WARNING" not in printed, err
    for split in ("train", "val"):
        ids, documents = all_ids(corpus / "out", split), len(decoded(corpus / "out", split))
        row = (f"{split}_00000.bin {len(ids):,} {ids.min()} - {ids.max()} {documents:,} "
               f"{len(ids) // 100:,}")
        assert row in re.sub(" +", " ", printed)
    assert f"begins: {DOCUMENTS[0][:20]!r}"[:-1] in printed


IDS = np.array([1, 5, 399, 2], "<u2")


@pytest.mark.parametrize("content, options, warning", [
    (IDS.tobytes(), (), None),
    (IDS.tobytes(), ("--vocab-size", "399"),
     r"a\.bin holds token id 399 at token 2 \(byte 4\); .* vocab_size=399"),
], ids=["no problem", "id outside the vocabulary"])
def test_inspect_warns_about(tmp_path, call, content, options, warning):
    write(tmp_path / "a.bin", content)
    printed, _ = call(data.main, "inspect", tmp_path, *options)
    warnings = [line for line in printed.splitlines() if line.startswith("WARNING: ")]
    assert "1 shards" in printed and len(warnings) == bool(warning)
    assert re.search(warning or "", "".join(warnings))
