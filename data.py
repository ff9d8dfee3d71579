"""Tokens: write shards from text, look at shards, read windows of a training run from them.

    python data.py prepare --input texts/ --tokenizer tok.model --vocab-size 4096 --out data/mine
    python data.py inspect data/mine

A shard is a headerless file of little-endian uint16 token ids. Training sees all shards as one ring of N tokens, and
W = N // context windows of it are an epoch. Which windows make up a step is computed, not stored (see window_starts):
it depends on (seed, step) alone, so a resumed run and a run on another number of cores read exactly the same data, and
a terabyte of shards needs no more host memory than a megabyte.
"""
import argparse
import collections
import gzip
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import signal
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import sentencepiece

from process import Progress, UserError, blocked, end_with_parent, flush, refuse_used, run_command, write_directory, write_file

TOKEN = np.dtype("<u2")
LARGEST_VOCABULARY = 65_536  # what uint16 can name


# --- reading ----------------------------------------------------------------------------------------------------------

ROUNDS = 8


def shuffled(numbers, size, keys):
    """Maps numbers [n] in 0 .. size-1 one-to-one onto 0 .. size-1, in an order that looks random.

    A Feistel network on the rectangle rows x columns >= size: each round shifts one coordinate by a hash of the other,
    which can be undone and so never makes two numbers meet. A result that falls outside goes through again until it
    is inside (cycle walking, https://doi.org/10.1007/3-540-45760-7_9). keys: uint64 [ROUNDS].
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    numbers = numbers.astype(np.uint64)
    walking = np.ones(len(numbers), bool)
    while walking.any():
        row, column = np.divmod(numbers[walking], np.uint64(columns))
        for i, key in enumerate(keys):
            if i % 2:
                row = (row + hashed(column ^ key)) % np.uint64(rows)
            else:
                column = (column + hashed(row ^ key)) % np.uint64(columns)
        numbers[walking] = row * np.uint64(columns) + column
        walking[walking] = numbers[walking] >= size
    return numbers.astype(np.int64)


def hashed(x):
    """The finaliser of SplitMix64: uint64 -> uint64, every input bit reaches every output bit. The shift by 32 at the
    end puts the better-mixed half where the caller's modulo looks."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(32)


def window_starts(samples, num_tokens, context, seed):
    """Where in the ring of num_tokens each sample of a run starts: samples [n] -> token positions [n].

    Sample i is window i % W of epoch i // W. Every epoch has an order of its own, and a grid of its own: the ring is
    cut into windows from another origin, so a sequence is not cut at the same places twice.
    """
    num_windows = num_tokens // context
    epochs, positions = np.divmod(samples, num_windows)
    starts = np.empty(len(samples), np.int64)
    for epoch in np.unique(epochs):
        *keys, origin = np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS + 1, np.uint64)
        chosen = epochs == epoch
        window = shuffled(positions[chosen], num_windows, keys)
        starts[chosen] = (int(origin) % num_tokens + window * context) % num_tokens
    return starts


def find_shards(data_dir, pattern):
    """The sorted paths of data_dir/pattern, at least one."""
    if not os.path.isdir(data_dir):
        raise UserError(f"{data_dir} is not a directory; python data.py prepare makes one with shards in it")
    paths = sorted(Path(data_dir).glob(pattern))
    if not paths:
        raise UserError(f"no file matches {pattern} in {data_dir}; python data.py prepare writes train_*.bin and val_*.bin "
                        "(and eval_every=0 does without the latter)")
    return paths


def open_shard(path):
    """A memory map of the shard's ids: pages are read when touched, shared by all cores, and dropped under pressure."""
    size = os.path.getsize(path)
    if size == 0:
        raise UserError(f"{path} is empty")
    if size % TOKEN.itemsize:
        raise UserError(f"{path} has an odd number of bytes ({size:,}): not a file of uint16 token ids, or cut short")
    return np.memmap(path, dtype=TOKEN, mode="r")


class Tokens:
    """The shards `paths` as one ring of `num_tokens` tokens, read in windows of context + 1."""

    def __init__(self, paths, context, vocab_size):
        self.paths, self.context, self.vocab_size = paths, context, vocab_size
        self.shards = [open_shard(path) for path in paths]
        for path, shard in zip(paths, self.shards):
            if len(shard) <= context:
                raise UserError(f"{path} holds {len(shard):,} tokens; a window of context={context} needs "
                                f"{context + 1:,} (the last is only predicted)")
            shard.base.madvise(mmap.MADV_RANDOM)  # or a touched page brings 31 others along, for nothing
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.num_tokens = int(self.ends[-1])
        self.num_windows = self.num_tokens // context

    def sha256(self):
        """Tells these tokens from others without reading all of them: of each shard's length and first and last 4 KB."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(np.int64(len(shard)).tobytes() + shard[:2_048].tobytes() + shard[-2_048:].tobytes())
        return digest.hexdigest()

    def locate(self, position):
        """A position on the ring as (index of the shard, offset in it)."""
        i = int(np.searchsorted(self.ends, position, side="right"))
        return i, int(position - self.ends[i]) + len(self.shards[i])

    def read(self, starts):
        """starts [n], token positions on the ring -> int32 [n, context + 1]. (XLA has no use for uint16.)"""
        windows = np.empty((len(starts), self.context + 1), np.int32)
        for window, start in zip(windows, starts):
            i, offset = self.locate(start)
            piece = self.shards[i][offset:offset + len(window)]
            window[:len(piece)] = piece
            if len(piece) < len(window):  # the ring goes on with the next shard
                window[len(piece):] = self.shards[(i + 1) % len(self.shards)][:len(window) - len(piece)]
        if windows.max() >= self.vocab_size:  # XLA would silently clamp it to the last row of the embedding
            row, column = np.argwhere(windows >= self.vocab_size)[0]
            i, offset = self.locate((starts[row] + column) % self.num_tokens)
            raise out_of_vocabulary(self.paths[i], offset, windows[row, column], self.vocab_size)
        return windows

    def prefetch(self, starts):
        """Has the operating system fetch the windows at starts [n] from the disk, and does not wait for it."""
        for start in starts:
            i, offset = self.locate(start)
            first = offset * TOKEN.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            last = min((offset + self.context + 1) * TOKEN.itemsize, self.shards[i].nbytes)
            self.shards[i].base.madvise(mmap.MADV_WILLNEED, first, last - first)

    def train_batch(self, step, batch_size, seed, rank, world_size):
        """Core `rank`'s share of the batch of `step`: int32 [batch_size / world_size, context + 1]."""
        share = batch_size // world_size
        this, following = (window_starts(np.arange(share) + s * batch_size + rank * share, self.num_tokens, self.context, seed)
                           for s in (step, step + 1))
        self.prefetch(following)
        return self.read(this)

    def fixed_windows(self, count):
        """Starts [count] of windows spread evenly over the shards, always the same ones: for validation."""
        available = (self.num_tokens - 1) // self.context
        if count > available:
            raise UserError(f"evaluation asks for eval_batches x batch_size = {count:,} windows and {self.paths[0].parent} "
                            f"has {available:,} for validation; lower eval_batches")
        return np.arange(count) * available // count * self.context


def out_of_vocabulary(path, offset, token, vocab_size):
    return UserError(f"{path} holds token id {token} at token {offset:,} (byte {offset * TOKEN.itemsize:,}); "
                     f"ids must be below vocab_size={vocab_size}")


def first_out_of_vocabulary(path, offset, ids, vocab_size):
    """The error for the first of `ids`, which stand at `offset` of the shard, that is not below vocab_size, or None."""
    if ids.max() < vocab_size:
        return None
    first = int(np.argmax(ids >= vocab_size))
    return out_of_vocabulary(path, offset + first, ids[first], vocab_size)


SCAN_TOKENS = 1 << 23  # 16 MB at a time: what a scan keeps in memory


def scan(paths, description):
    """Yields (path, offset, ids [<= SCAN_TOKENS]) over all tokens of all shards, with progress."""
    shards = [open_shard(path) for path in paths]
    with Progress(sum(len(shard) for shard in shards), "token", description) as progress:
        for path in paths:
            for offset in itertools.count(0, SCAN_TOKENS):
                ids = np.fromfile(path, TOKEN, SCAN_TOKENS, offset=offset * TOKEN.itemsize)
                if not len(ids):
                    break
                yield path, offset, ids
                progress.update(len(ids))


def check_token_ids(paths, vocab_size):
    """Raises for the first id >= vocab_size. Reads every shard, but for those that `prepare` wrote and vouches for."""
    for path, offset, ids in scan([path for path in paths if not vouched(path, vocab_size)], "checking token ids"):
        if error := first_out_of_vocabulary(path, offset, ids, vocab_size):
            raise error


META_FORMAT = 1


def read_meta(directory):
    """What `prepare` wrote about the shards in `directory`; {} where there is nothing, or a meta.json of somebody else's."""
    path = Path(directory) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it or prepare the data again") from None
    return meta if isinstance(meta, dict) and meta.get("format") == META_FORMAT else {}


def vouched(path, vocab_size):
    meta = read_meta(path.parent)
    written = {shard["file"]: shard["tokens"] for split in meta.get("splits", {}).values() for shard in split["shards"]}
    return meta.get("vocab_size", math.inf) <= vocab_size and \
        written.get(path.name) == os.path.getsize(path) / TOKEN.itemsize


# --- the data of a run, as train.py's config names it -----------------------------------------------------------------


def tokenizer_path(config):
    """The tokenizer that belongs to the data, or None where nobody named one."""
    if config.tokenizer:
        return Path(config.tokenizer)
    name = read_meta(config.data_dir).get("tokenizer")
    return name and Path(config.data_dir, name)


def open_data(config):
    """The training tokens, and the validation tokens or None. Raises for all that is wrong with the shards but their ids."""
    train = find_shards(config.data_dir, config.train_glob)
    val = find_shards(config.data_dir, config.val_glob) if config.eval_every else []
    if both := set(train) & set(val):
        raise UserError(f"{min(both)} is training and validation data; change train_glob or val_glob")
    val_tokens = Tokens(val, config.context, config.vocab_size) if val else None
    return Tokens(train, config.context, config.vocab_size), val_tokens


def check_data(config):
    """Raises for all that is wrong with shards and tokenizer, before any core starts. Returns the training tokens."""
    train_tokens, val_tokens = open_data(config)
    if val_tokens:
        val_tokens.fixed_windows(config.eval_batches * config.batch_size)
    if source := tokenizer_path(config):
        load_tokenizer(source, config.vocab_size)
    check_token_ids(train_tokens.paths + (val_tokens.paths if val_tokens else []), config.vocab_size)
    return train_tokens


# --- inspect ----------------------------------------------------------------------------------------------------------


def inspect(where, vocab_size=None, context=1_024, tokenizer=None):
    """Prints, for any shards (a directory, a file or a glob), what a training run would want to know of them."""
    if context < 1:
        raise UserError(f"--context {context}: expected at least 1")
    where = Path(where)
    paths = find_shards(where, "*.bin") if where.is_dir() else find_shards(where.parent, where.name)
    meta = read_meta(paths[0].parent)
    vocab_size = vocab_size or meta.get("vocab_size")
    if tokenizer is None and meta.get("tokenizer"):
        tokenizer = paths[0].parent / meta["tokenizer"]
    processor = load_tokenizer(tokenizer) if tokenizer else None
    eos = processor.eos_id() if processor else 2  # 2: Llama's

    reports = {path: {"tokens": 0, "min": LARGEST_VOCABULARY, "max": 0, "eos": 0, "odd zeros": 0} for path in paths}
    for path, offset, ids in scan(paths, "reading"):
        report = reports[path]
        report["tokens"] += len(ids)
        report["min"], report["max"] = min(report["min"], int(ids.min())), max(report["max"], int(ids.max()))
        report["eos"] += int(np.count_nonzero(ids == eos))
        report["odd zeros"] += int(np.count_nonzero(ids[1::2] == 0))
        if vocab_size and "bad" not in report and (error := first_out_of_vocabulary(path, offset, ids, vocab_size)):
            report["bad"] = error
    width = max(len(path.name) for path in paths)
    print(f"{'shard':{width}}  {'tokens':>15}  {'ids':>13}  {'documents':>11}  {'windows':>11}")
    for path, report in reports.items():
        ids = f"{report['min']} - {report['max']}"
        print(f"{path.name:{width}}  {report['tokens']:15,}  {ids:>13}  {report['eos']:11,}  {report['tokens'] // context:11,}")
    total = sum(report["tokens"] for report in reports.values())
    print(f"{len(paths)} shards, {total:,} tokens, {total // context:,} windows of {context:,}; "
          f"documents are counted by their end, id {eos}")
    for path, report in reports.items():
        if "bad" in report:
            print(f"WARNING: {report['bad']}")
        if report["tokens"] > 2 and report["odd zeros"] == report["tokens"] // 2:
            print(f"WARNING: {path}: every second id is 0; these look like 32-bit ids")
        if warning := header_warning(path):
            print(f"WARNING: {path}: {warning}")
    if processor:
        start = np.fromfile(paths[0], TOKEN, 48).astype(int)
        known = [int(token) for token in start if token < processor.vocab_size()]
        print(f"{paths[0].name} begins: {processor.decode(known)!r}")


def header_warning(path):
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(b"\x93NUM"):
        return "this is a .npy file; shards have no header (write the array with .tofile)"
    if head == (20240520).to_bytes(4, "little"):
        return "this shard has the 1,024-byte header of llm.c; cut it off with tail -c +1025"
    return None


# --- prepare ----------------------------------------------------------------------------------------------------------

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
LARGEST_DOCUMENT = 256 << 20  # bytes; a document is encoded in one piece
BATCH_BYTES = 1 << 20  # text sent to a process at a time
TOKENIZER_BYTES = 100 << 20  # size of the files (packed, if they are) of which a new tokenizer is trained on a share


def find_inputs(inputs):
    """The files named, and the files with a known suffix below the directories named, sorted."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif not path.exists():
            raise UserError(f"--input {path} does not exist")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"--input {path}: expected one of {' '.join(SUFFIXES)} or a directory of them")
        else:
            files.append(path)
    if not files:
        raise UserError(f"no {' '.join(SUFFIXES)} file in {' '.join(map(str, inputs))}")
    return files


def raw_documents(path, text_key):
    """Yields (where, kind, bytes, position in the file) for each document; nothing is decoded or parsed yet, because
    that is the work of many processes and this is the work of one."""
    if path.suffix == ".txt":
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise UserError(f"{path} is {path.stat().st_size / 2**20:,.0f} MB; a .txt file is one document and may have "
                            f"{LARGEST_DOCUMENT >> 20} MB. Split it, or put one document a line into a .jsonl file")
        raw = path.read_bytes()
        yield str(path), "text", raw, len(raw)
    elif path.suffix == ".parquet":
        yield from parquet_documents(path, text_key)
    else:
        with path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            try:
                for number, line in enumerate(lines, start=1):
                    yield f"{path}:{number}", "json", line, file.tell() if lines is not file else None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is not a whole gzip file: {error}") from None


def parquet_documents(path, text_key):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = {field.name: field.type for field in file.schema_arrow}
        if columns.get(text_key) not in (pyarrow.string(), pyarrow.large_string()):
            raise UserError(f"{path} has no column {text_key!r} of strings; see --text-key. Its columns: "
                            f"{', '.join(f'{name} ({kind})' for name, kind in columns.items())}")
        size, row = path.stat().st_size, 0
        for batch in file.iter_batches(batch_size=1_000, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield f"{path}: row {row}", "text", (text or "").encode(), int(size * row / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the operating system's word, not pyarrow's
            raise
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def batches(files, text_key, progress):
    """Yields lists of (where, kind, bytes), BATCH_BYTES at a time, and moves the progress (bytes of the files)."""
    batch, size = [], 0
    for path in files:
        before = 0
        for where, kind, raw, position in raw_documents(path, text_key):
            batch.append((where, kind, raw))
            size += len(raw)
            if position is None:  # a plain file read line by line
                position = before + len(raw)
            progress.update(position - before)
            before = position
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def text_of(where, kind, raw, text_key):
    """The document's text: the file's, or the value of text_key in the JSON object of the line."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}") from None
    if kind == "text" or not text.strip():
        return text
    try:
        value = json.loads(text)[text_key]
        value.encode()  # half a surrogate pair is legal JSON and no text
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not a JSON object with valid text: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: expected a JSON object whose {text_key!r} is a string; see --text-key") from None


def fraction(text, salt):
    """A number in [0, 1) that depends on the text alone: equal documents go to the same split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "big") / 2**64


def load_tokenizer(path, vocab_size=None):
    """A SentencePieceProcessor that shards can be written with, and that a model with vocab_size ids can use: it has as many,
    or fewer by what pads a vocabulary to a multiple of 128."""
    if not Path(path).is_file():
        raise UserError(f"there is no tokenizer {path}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{path} is not a SentencePiece model") from None
    if processor.vocab_size() > LARGEST_VOCABULARY:
        raise UserError(f"{path} has {processor.vocab_size():,} tokens; uint16 shards can name {LARGEST_VOCABULARY:,}")
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UserError(f"{path} has no bos or no eos token; documents are stored as bos + ids + eos")
    if vocab_size is not None and not 0 <= vocab_size - processor.vocab_size() < 128:
        raise UserError(f"{path} has {processor.vocab_size():,} tokens and vocab_size is {vocab_size:,}; expected the same "
                        "number, or less than 128 more for padding")
    return processor


def train_tokenizer(path, files, vocab_size, val_fraction, text_key):
    """Trains a SentencePiece BPE vocabulary on TOKENIZER_BYTES' worth of the training split and writes it to `path`.

    Made the way Llama's is: identity normalisation, byte fallback, split digits. So decode(encode(text)) == text, but for
    the character U+2581, SentencePiece's own sign for a space.
    """
    share = TOKENIZER_BYTES / max(1, sum(file.stat().st_size for file in files))
    raised = []

    def lines():
        try:
            with Progress(sum(file.stat().st_size for file in files), "B", "reading for the tokenizer") as progress:
                for document in itertools.chain.from_iterable(batches(files, text_key, progress)):
                    text = text_of(*document, text_key)
                    if fraction(text, b"split") >= val_fraction and fraction(text, b"tokenizer") < share:
                        yield from filter(None, text.splitlines())
        except BaseException as error:  # SentencePiece would make a RuntimeError of anything
            raised.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, character_coverage=0.99995, max_sentence_length=1 << 16, num_threads=os.cpu_count(),
            minloglevel=2)
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        raise UserError(f"a vocabulary of {vocab_size:,} could not be trained on this text: "
                        f"{str(error).splitlines()[-1]}") from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(path), model.getvalue())


class ShardWriter:
    """Appends ids to directory/SPLIT_00000.bin, SPLIT_00001.bin, ..., shard_tokens each."""

    def __init__(self, directory, split, shard_tokens):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.sizes = [0]
        self.documents = self.bytes = 0

    def path(self, i):
        return self.directory / f"{self.split}_{i:05d}.bin"

    def append(self, ids):
        while len(ids):
            if self.sizes[-1] == self.shard_tokens:
                self.sizes.append(0)
            piece = ids[:self.shard_tokens - self.sizes[-1]]
            with self.path(len(self.sizes) - 1).open("ab") as file:
                file.write(piece.tobytes())
            self.sizes[-1] += len(piece)
            ids = ids[len(piece):]

    def close(self):
        """Flushes all to the disk and returns the split's entry in meta.json."""
        if len(self.sizes) > 1 and self.sizes[-1] < self.shard_tokens // 100:  # too short a rest to hold a window, maybe
            rest = self.path(len(self.sizes) - 1)
            with self.path(len(self.sizes) - 2).open("ab") as file:
                file.write(rest.read_bytes())
            rest.unlink()
            self.sizes[-2:] = [self.sizes[-2] + self.sizes[-1]]
        for i in range(len(self.sizes)):
            flush(self.path(i))
        return {"documents": self.documents, "tokens": sum(self.sizes), "bytes": self.bytes,
                "shards": [{"file": self.path(i).name, "tokens": size} for i, size in enumerate(self.sizes)]}


class Encoder:
    """What a process of the pool keeps: called with a list of raw documents, returns {split: (ids, documents, bytes)}.

    Processes rather than SentencePiece's threads, because turning ids into an array holds the interpreter's lock."""

    def __init__(self, tokenizer, val_fraction, text_key):
        self.processor = load_tokenizer(tokenizer)
        self.val_fraction, self.text_key = val_fraction, text_key

    def __call__(self, batch):
        splits = {"train": [], "val": []}
        for document in batch:
            text = text_of(*document, self.text_key)
            if text.strip():
                splits["val" if fraction(text, b"split") < self.val_fraction else "train"].append(text)
        encoded = {}
        for split, texts in splits.items():
            ids = self.processor.encode(texts, add_bos=True, add_eos=True)
            flat = np.fromiter(itertools.chain.from_iterable(ids), TOKEN, sum(map(len, ids)))
            encoded[split] = flat, len(texts), sum(len(text.encode()) for text in texts)
        return encoded

    @classmethod
    def start(cls, *args):
        end_with_parent()
        cls.current = cls(*args)

    @classmethod
    def encode(cls, batch):
        return cls.current(batch)


def encode_files(files, tokenizer, writers, val_fraction, text_key, processes):
    """Encodes all documents into the writers, in the order of the files. Memory is bounded: no more than three batches
    per process are under way, and results are written in the order in which they were asked for."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), Encoder.start,
                               (tokenizer, val_fraction, text_key))
    under_way = collections.deque()

    def write_oldest():
        for split, (ids, documents, size) in under_way.popleft().result().items():
            writers[split].append(ids)
            writers[split].documents += documents
            writers[split].bytes += size

    try:
        with Progress(sum(file.stat().st_size for file in files), "B", "encoding") as progress:
            for batch in batches(files, text_key, progress):
                if len(under_way) == 3 * processes:
                    write_oldest()
                with blocked(signal.SIGINT):  # by submit, which starts the processes
                    under_way.append(pool.submit(Encoder.encode, batch))
            while under_way:
                write_oldest()
    except BrokenProcessPool:
        raise UserError("a process that encoded text was killed, perhaps for memory; try fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(inputs, tokenizer, out, vocab_size=None, val_fraction=0.005, shard_tokens=100_000_000, text_key="text",
            processes=None):
    """Encodes text files into shards, `out`/train_*.bin and val_*.bin, and describes them in `out`/meta.json.

    A document is stored as bos + ids + eos. The validation split is a fraction of the documents, chosen by a hash of
    their text. Everything is written to OUT.partial, which is renamed to `out` when all of it is on the disk.
    """
    out, tokenizer = Path(out), Path(tokenizer)
    refuse_used(out, "--out")
    if vocab_size is not None and not 0 < vocab_size <= LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size:,} does not fit uint16 shards; expected 1 to {LARGEST_VOCABULARY:,}")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a number between 0 and 1")
    if shard_tokens < 1 or (processes is not None and processes < 1):
        raise UserError("--shard-tokens and --processes are at least 1")
    files = find_inputs(inputs)
    if not tokenizer.exists():
        if vocab_size is None:
            raise UserError(f"--tokenizer {tokenizer} does not exist; give --vocab-size to train one on the input")
        train_tokenizer(tokenizer, files, vocab_size, val_fraction, text_key)
        print(f"trained {tokenizer}: {vocab_size:,} tokens")
    processor = load_tokenizer(tokenizer)
    if vocab_size not in (None, processor.vocab_size()):
        raise UserError(f"{tokenizer} exists with {processor.vocab_size():,} tokens and --vocab-size says {vocab_size:,}")

    processes = processes or len(os.sched_getaffinity(0))
    with write_directory(out) as partial:
        writers = {split: ShardWriter(partial, split, shard_tokens) for split in ("train", "val")}
        started = time.perf_counter()
        encode_files(files, str(tokenizer), writers, val_fraction, text_key, processes)
        seconds = time.perf_counter() - started
        for split, writer in writers.items():
            if writer.documents == 0:
                raise UserError(f"no document fell into the {split} split: {sum(w.documents for w in writers.values())} "
                                f"documents with text, --val-fraction {val_fraction}")
        meta = {"format": META_FORMAT, "dtype": "uint16", "vocab_size": processor.vocab_size(), "tokenizer": "tokenizer.model",
                "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(), "bos_id": processor.bos_id(),
                "eos_id": processor.eos_id(), "val_fraction": val_fraction,
                "splits": {split: writer.close() for split, writer in writers.items()}}
        write_file(partial / "tokenizer.model", tokenizer.read_bytes())
        write_file(partial / "meta.json", json.dumps(meta, indent=1).encode())
    for split, entry in meta["splits"].items():
        print(f"{split:5}  {entry['documents']:,} documents, {entry['bytes']:,} bytes -> {entry['tokens']:,} tokens, "
              f"{len(entry['shards'])} shards ({entry['bytes'] / entry['tokens']:.2f} bytes per token)")
    total = sum(entry["tokens"] for entry in meta["splits"].values())
    print(f"{out}: {total:,} tokens in {seconds:.1f} s, {total / seconds:,.0f} tokens/s with {processes} processes")


def main():
    parser = argparse.ArgumentParser(description="Write token shards from text, or look at shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("prepare", help="text -> shards", description=prepare.__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH", dest="inputs",
                     help=f"{' '.join(SUFFIXES)} files, or directories of them; a .txt file is one document")
    sub.add_argument("--tokenizer", required=True, help="SentencePiece model; trained if it does not exist")
    sub.add_argument("--out", required=True, help="directory to make")
    sub.add_argument("--vocab-size", type=int, help="size of the tokenizer to train")
    sub.add_argument("--val-fraction", type=float, default=0.005, help="share of the documents held out (%(default)s)")
    sub.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (%(default)s)")
    sub.add_argument("--text-key", default="text", help="JSON key or parquet column of the text (%(default)s)")
    sub.add_argument("--processes", type=int, help="processes that encode (default: one per core)")
    sub = commands.add_parser("inspect", help="report on shards", description=inspect.__doc__)
    sub.add_argument("where", metavar="DIR_OR_GLOB")
    sub.add_argument("--vocab-size", type=int, help="warn about ids from here on (default: what meta.json says)")
    sub.add_argument("--context", type=int, default=1_024, help="tokens in a window (%(default)s)")
    sub.add_argument("--tokenizer", help="SentencePiece model, to show some text (default: what meta.json says)")
    arguments = vars(parser.parse_args())
    {"prepare": prepare, "inspect": inspect}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    run_command(main)
