"""`data.py prepare`: writes token shards from text.

The main process reads documents and writes token ids. A pool of processes decodes, splits and
encodes the documents. (Threads would not help: converting SentencePiece's ids to an array holds the
GIL.)
"""
import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoxla.documents import (
    batches,
    document_text,
    find_inputs,
    in_validation_split,
    total_size,
)
from nanoxla.errors import UserError
from nanoxla.files import check_unused, fsync, write_directory, write_file
from nanoxla.processes import exit_with_parent, signals_blocked
from nanoxla.progress import Progress
from nanoxla.shards import MAX_VOCAB_SIZE, META_FORMAT, TOKEN_DTYPE
from nanoxla.tokenizer import load_tokenizer, train_tokenizer

SPLITS = "train", "val"


class ShardWriter:
    """Appends ids to directory/SPLIT_00000.bin, SPLIT_00001.bin, ..., shard_tokens each."""

    def __init__(self, directory, split, shard_tokens):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.sizes = [0]  # of each shard, in tokens
        self.documents = self.bytes = 0  # of the split; the bytes are those of the text

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
        """Flushes the shards to the disk. Returns the split's entry in meta.json."""
        if len(self.sizes) > 1 and self.sizes[-1] < self.shard_tokens // 100:
            self.merge_last_two()  # the last shard may be too short for a window
        for i in range(len(self.sizes)):
            fsync(self.path(i))
        shards = [{"file": self.path(i).name, "tokens": size} for i, size in enumerate(self.sizes)]
        return {"documents": self.documents, "tokens": sum(self.sizes), "bytes": self.bytes,
                "shards": shards}

    def merge_last_two(self):
        last = self.path(len(self.sizes) - 1)
        with self.path(len(self.sizes) - 2).open("ab") as file:
            file.write(last.read_bytes())
        last.unlink()
        self.sizes[-2:] = [self.sizes[-2] + self.sizes[-1]]


class Encoded(NamedTuple):
    """The documents of a batch that belong to one split, encoded."""
    ids: np.ndarray  # bos + ids + eos of each document, joined
    documents: int
    bytes: int  # length of their text


class Encoder:
    """Encodes batches of documents. Each process of the pool has one, in Encoder.current."""

    def __init__(self, tokenizer, val_fraction, text_key):
        self.processor = load_tokenizer(tokenizer)
        self.val_fraction, self.text_key = val_fraction, text_key

    def __call__(self, batch):
        """Encodes a list of RawDocuments. Returns {split: Encoded}. Drops blank documents."""
        splits = {split: [] for split in SPLITS}
        for document in batch:
            text = document_text(document, self.text_key)
            if text.strip():
                in_val = in_validation_split(text, self.val_fraction)
                splits["val" if in_val else "train"].append(text)
        return {split: self.encode_texts(texts) for split, texts in splits.items()}

    def encode_texts(self, texts):
        ids = self.processor.encode(texts, add_bos=True, add_eos=True)
        flat = np.fromiter(itertools.chain.from_iterable(ids), TOKEN_DTYPE, sum(map(len, ids)))
        return Encoded(flat, len(texts), sum(len(text.encode()) for text in texts))

    @classmethod
    def start(cls, *arguments):
        """Called once in each process of the pool, when it starts."""
        exit_with_parent()
        cls.current = cls(*arguments)

    @classmethod
    def encode(cls, batch):
        return cls.current(batch)


def encode_files(files, tokenizer, writers, val_fraction, text_key, processes):
    """Encodes all documents of the files and appends them to writers, {split: ShardWriter}.

    Results are written in the order in which they were submitted, so the shards do not depend on
    the number of processes. At most three batches per process are in progress, to bound memory."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), Encoder.start,
                               (tokenizer, val_fraction, text_key))
    in_progress = collections.deque()

    def write_oldest():
        for split, encoded in in_progress.popleft().result().items():
            writers[split].append(encoded.ids)
            writers[split].documents += encoded.documents
            writers[split].bytes += encoded.bytes

    try:
        with Progress(total_size(files), "B", "encoding") as progress:
            for batch in batches(files, text_key, progress):
                if len(in_progress) == 3 * processes:
                    write_oldest()
                with signals_blocked(signal.SIGINT):  # the new processes ignore Ctrl-C
                    in_progress.append(pool.submit(Encoder.encode, batch))
            while in_progress:
                write_oldest()
    except BrokenProcessPool:
        raise UserError("a process that encoded text was killed, perhaps for lack of memory; "
                        "try fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(inputs, tokenizer, out, vocab_size=None, val_fraction=0.005,
            shard_tokens=100_000_000, text_key="text", processes=None):
    """Encodes text files into shards, OUT/train_*.bin and OUT/val_*.bin, and describes them in
    OUT/meta.json.

    A document is stored as bos + ids + eos. The validation split is a fraction of the documents,
    chosen by a hash of their text. Everything is written to OUT.partial, which is renamed to OUT
    when all of it is on the disk.
    """
    out, tokenizer = Path(out), Path(tokenizer)
    check_unused(out, "--out")
    if vocab_size is not None and not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size:,} does not fit uint16 shards; "
                        f"expected 1 to {MAX_VOCAB_SIZE:,}")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a number between 0 and 1")
    if shard_tokens < 1 or (processes is not None and processes < 1):
        raise UserError("--shard-tokens and --processes: expected at least 1")
    files = find_inputs(inputs)
    processor = open_or_train(tokenizer, files, vocab_size, val_fraction, text_key)

    processes = processes or len(os.sched_getaffinity(0))
    with write_directory(out) as partial:
        writers = {split: ShardWriter(partial, split, shard_tokens) for split in SPLITS}
        started = time.perf_counter()
        encode_files(files, str(tokenizer), writers, val_fraction, text_key, processes)
        seconds = time.perf_counter() - started
        for split, writer in writers.items():
            if writer.documents == 0:
                documents = sum(writer.documents for writer in writers.values())
                raise UserError(f"no document fell into the {split} split: {documents} documents "
                                f"with text, --val-fraction {val_fraction}")
        meta = {"format": META_FORMAT, "dtype": "uint16", "vocab_size": processor.vocab_size(),
                "tokenizer": "tokenizer.model",
                "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
                "bos_id": processor.bos_id(), "eos_id": processor.eos_id(),
                "val_fraction": val_fraction,
                "splits": {split: writer.close() for split, writer in writers.items()}}
        write_file(partial / "tokenizer.model", tokenizer.read_bytes())
        write_file(partial / "meta.json", json.dumps(meta, indent=1).encode())
    print_summary(out, meta["splits"], seconds, processes)


def open_or_train(tokenizer, files, vocab_size, val_fraction, text_key):
    """Loads the tokenizer. If the file does not exist, trains it first."""
    if not tokenizer.exists():
        if vocab_size is None:
            raise UserError(f"--tokenizer {tokenizer} does not exist; "
                            "give --vocab-size to train one on the input")
        train_tokenizer(tokenizer, files, vocab_size, val_fraction, text_key)
        print(f"trained {tokenizer}: {vocab_size:,} tokens")
    processor = load_tokenizer(tokenizer)
    if vocab_size not in (None, processor.vocab_size()):
        raise UserError(f"{tokenizer} exists with {processor.vocab_size():,} tokens "
                        f"and --vocab-size says {vocab_size:,}")
    return processor


def print_summary(out, splits, seconds, processes):
    for split, entry in splits.items():
        print(f"{split:5}  {entry['documents']:,} documents, {entry['bytes']:,} bytes -> "
              f"{entry['tokens']:,} tokens, {len(entry['shards'])} shards "
              f"({entry['bytes'] / entry['tokens']:.2f} bytes per token)")
    total = sum(entry["tokens"] for entry in splits.values())
    print(f"{out}: {total:,} tokens in {seconds:.1f} s, {total / seconds:,.0f} tokens/s "
          f"with {processes} processes")
