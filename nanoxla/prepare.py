"""`data.py prepare`: writes token shards from text.

A pool of processes (nanoxla/encode.py) encodes documents, and the main process writes their ids.
What it has written is recorded every few seconds, so that the same command goes on after a kill.
"""
import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from nanoxla.documents import STDIN, find_inputs, total_size
from nanoxla.encode import SPLITS, encode_files
from nanoxla.errors import UserError
from nanoxla.files import (
    check_unused,
    empty,
    fsync,
    partial_of,
    sha256,
    write_directory,
    write_file,
)
from nanoxla.progress import Progress, note
from nanoxla.shards import MAX_VOCAB_SIZE, META_FORMAT, TOKEN_DTYPE
from nanoxla.texts import Skipped
from nanoxla.tokenizer import load_tokenizer, train_tokenizer

PROGRESS = "progress.json"  # in OUT.partial: what is done
SAVE_SECONDS = 10  # between records, or 20 times as long as a record takes
BUCKET_BYTES = 64 << 20  # of the input; shuffling has one bucket at a time in memory
MAX_BUCKETS = 1024


class ShardWriter:
    """Appends ids to directory/SPLIT_00000.bin, SPLIT_00001.bin, ..., shard_tokens each. Goes on
    after the shards that exist; documents, bytes: how many these hold."""

    def __init__(self, directory, split, shard_tokens, documents=0, bytes=0):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.documents, self.bytes = documents, bytes  # of the split; the bytes are of the text
        shards = sorted(directory.glob(f"{split}_*.bin"))
        self.sizes = [path.stat().st_size // TOKEN_DTYPE.itemsize for path in shards] or [0]

    def path(self, i):
        return self.directory / f"{self.split}_{i:05d}.bin"

    def add(self, encoded):
        """Writes the documents of an Encoded."""
        self.write(encoded)
        self.documents += len(encoded.lengths)
        self.bytes += encoded.bytes

    def write(self, encoded):
        self.append(encoded.ids)

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


class ShufflingWriter(ShardWriter):
    """A ShardWriter that puts the documents into a random order, all orders being equally likely.

    They may exceed the memory. So each document first goes to a random one of some files, the
    buckets, and close() appends one after the other to the shards, each in a random order."""

    def __init__(self, seed, buckets, *arguments):
        super().__init__(*arguments)
        self.seed, self.buckets = seed, buckets
        (self.directory / "buckets").mkdir(exist_ok=True)

    def bucket(self, i):
        return self.directory / "buckets" / f"{self.split}_{i:04d}"

    def write(self, encoded):
        # A generator for each call: what it draws may not depend on where a kill came between.
        random = np.random.default_rng([self.seed, self.documents, 0])
        buckets = random.integers(self.buckets, size=len(encoded.lengths))
        order, ends = np.argsort(buckets, kind="stable"), np.cumsum(encoded.lengths)
        for i in np.unique(buckets):
            with self.bucket(i).open("ab") as file:
                for j in order[slice(*np.searchsorted(buckets[order], [i, i + 1]))]:
                    length = int(encoded.lengths[j])
                    file.write(length.to_bytes(4, "little"))
                    file.write(encoded.ids[ends[j] - length:ends[j]].tobytes())

    def close(self):
        with Progress(self.buckets, "bucket", f"shuffling {self.split}") as progress:
            for i in range(self.buckets):
                self.append(self.shuffled(i))
                progress.update()
        return super().close()

    def shuffled(self, i):
        """The ids of a bucket, its documents in a random order."""
        content = memoryview(self.bucket(i).read_bytes() if self.bucket(i).exists() else b"")
        documents, start = [], 0
        while start < len(content):
            length = int.from_bytes(content[start:start + 4], "little")
            end = start + 4 + length * TOKEN_DTYPE.itemsize
            documents.append(content[start + 4:end])
            start = end
        order = np.random.default_rng([self.seed, i, 1]).permutation(len(documents))
        return np.frombuffer(b"".join(documents[j] for j in order), TOKEN_DTYPE)


class Work:
    """What `prepare` has done so far. PARTIAL/progress.json records it.

    job: a dict that decides what the shards will be. Work on an equal job goes on from what is
    recorded. Work on another one deletes it."""

    def __init__(self, partial, job, skipped):
        self.partial, self.job, self.skipped = partial, job, skipped
        self.done = self.load() or {"batches": 0, "read": 0, "seconds": 0, "complete": False,
                                    "splits": {}, "seen": 0, "skipped": {}}
        skipped.restart(self.done["seen"], self.done["skipped"])
        self.writers = {}
        for split in SPLITS:
            arguments = partial, split, job["shard_tokens"], *self.done["splits"].get(split, ())
            self.writers[split] = (
                ShardWriter(*arguments) if job["shuffle_seed"] is None else
                ShufflingWriter(job["shuffle_seed"], job["buckets"], *arguments))

    def files(self):
        return {str(path.relative_to(self.partial)): path for path in self.partial.rglob("*")
                if path.is_file() and path.name != PROGRESS}

    def load(self):
        """What is recorded of an equal job, or None. Cuts the files to their sizes at that time."""
        with contextlib.suppress(OSError, ValueError):
            recorded = json.loads((self.partial / PROGRESS).read_bytes())
            sizes, files = recorded["sizes"], self.files()
            if recorded["job"] == self.job and all(
                    name in files and files[name].stat().st_size >= size
                    for name, size in sizes.items()):
                for name, path in files.items():
                    os.truncate(path, sizes[name]) if name in sizes else path.unlink()
                note(f"going on from {self.partial}: {recorded['done']['seen']:,} documents are "
                     "done")
                return recorded["done"]
        empty(self.partial)
        return None

    def save(self):
        """Records what is done. The files come first: a record must not promise what a power
        failure could lose."""
        for path in self.partial.rglob("*"):
            fsync(path)
        self.done |= {"seen": self.skipped.seen, "skipped": self.skipped.counts,
                      "splits": {split: [writer.documents, writer.bytes]
                                 for split, writer in self.writers.items()}}
        sizes = {name: path.stat().st_size for name, path in self.files().items()}
        record = {"job": self.job, "done": self.done, "sizes": sizes}
        write_file(self.partial / PROGRESS, json.dumps(record).encode())

    def encode(self, files, tokenizer, processes):
        """Encodes the rest of the documents."""
        done, before, started = self.done, self.done["seconds"], time.perf_counter()
        save_at = started + SAVE_SECONDS
        results = encode_files(files, str(tokenizer), self.job["val_fraction"],
                               self.job["text_key"], processes, done["batches"])
        with (Progress(total_size(files), "B", "encoding", done["read"]) as progress,
              contextlib.closing(results)):
            for splits, faults, read in results:
                for split, encoded in splits.items():
                    self.writers[split].add(encoded)
                self.skipped.add(sum(len(part.lengths) for part in splits.values()), faults)
                progress.update(read)
                now = time.perf_counter()
                done |= {"batches": done["batches"] + 1, "read": done["read"] + read,
                         "seconds": before + now - started}
                if now > save_at:
                    self.save()
                    saved = time.perf_counter()
                    save_at = saved + max(SAVE_SECONDS, 20 * (saved - now))
        self.skipped.check()
        for split, writer in self.writers.items():
            if writer.documents == 0:
                documents = sum(writer.documents for writer in self.writers.values())
                raise UserError(f"no document fell into the {split} split: {documents} documents "
                                f"with text, --val-fraction {self.job['val_fraction']}")
        done["complete"] = True
        self.save()


def prepare(inputs, tokenizer, out, vocab_size=None, val_fraction=0.005,
            shard_tokens=100_000_000, text_key="text", processes=None, max_bad=0.01, strict=False,
            shuffle_seed=None):
    """Encodes text files into shards, OUT/train_*.bin and OUT/val_*.bin, and describes them in
    OUT/meta.json.

    A document is stored as bos + ids + eos. The validation split is a fraction of the documents,
    chosen by a hash of their text. Everything is written to OUT.partial, which is renamed to OUT
    when all of it is on the disk. After a kill, the same command goes on from OUT.partial.
    """
    out, tokenizer = Path(out), Path(tokenizer)
    check_unused(out, "--out")
    if vocab_size is not None and not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size:,} does not fit uint16 shards; "
                        f"expected 1 to {MAX_VOCAB_SIZE:,}")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a number between 0 and 1")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad}: expected a number from 0 to 1")
    if shard_tokens < 1 or (processes is not None and processes < 1):
        raise UserError("--shard-tokens and --processes: expected at least 1")
    if shuffle_seed is not None and shuffle_seed < 0:
        raise UserError(f"--shuffle-seed {shuffle_seed}: expected at least 0")
    own = out.resolve(), partial_of(out)
    if not tokenizer.exists() and tokenizer.resolve().is_relative_to(own[0]):
        raise UserError(f"--tokenizer {tokenizer} would be in --out, which has to be empty; name "
                        "another place. --out gets a copy")
    # --out may be below an input directory. What a killed call has left there is no input.
    files, skipped = find_inputs(inputs, without=own), Skipped(max_bad, strict)
    processor = open_or_train(tokenizer, files, vocab_size, val_fraction, text_key, skipped)
    processes = processes or len(os.sched_getaffinity(0))
    job = {"tokenizer": sha256(tokenizer), "val_fraction": val_fraction, "text_key": text_key,
           "shard_tokens": shard_tokens, "strict": strict, "shuffle_seed": shuffle_seed,
           "buckets": (MAX_BUCKETS if STDIN in files else
                       min(1 + total_size(files) // BUCKET_BYTES, MAX_BUCKETS)),
           "files": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
                     for file in files]}
    with write_directory(out, PROGRESS) as partial:
        work = Work(partial, job, skipped)
        if not work.done["complete"]:
            work.encode(files, tokenizer, processes)
        meta = {"format": META_FORMAT, "dtype": "uint16", "vocab_size": processor.vocab_size(),
                "tokenizer": "tokenizer.model", "tokenizer_sha256": job["tokenizer"],
                "bos_id": processor.bos_id(), "eos_id": processor.eos_id(),
                "val_fraction": val_fraction,
                "splits": {split: writer.close() for split, writer in work.writers.items()},
                "skipped": skipped.counts}
        if shuffle_seed is not None:
            meta["shuffle_seed"] = shuffle_seed
            shutil.rmtree(partial / "buckets")
        write_file(partial / "tokenizer.model", tokenizer.read_bytes())
        write_file(partial / "meta.json", json.dumps(meta, indent=1).encode())
    print_summary(out, meta, work.done["seconds"], processes)


def open_or_train(tokenizer, files, vocab_size, val_fraction, text_key, skipped):
    """Loads the tokenizer. If the file does not exist, trains it first."""
    if not tokenizer.exists():
        if vocab_size is None:
            raise UserError(f"--tokenizer {tokenizer} does not exist; "
                            "give --vocab-size to train one on the input")
        if STDIN in files:
            raise UserError("--input -: standard input can be read only once, and training "
                            f"--tokenizer {tokenizer} would read it first; name one that exists")
        train_tokenizer(tokenizer, files, vocab_size, val_fraction, text_key, skipped)
        print(f"trained {tokenizer}: {vocab_size:,} tokens")
    processor = load_tokenizer(tokenizer)
    if vocab_size not in (None, processor.vocab_size()):
        raise UserError(f"{tokenizer} exists with {processor.vocab_size():,} tokens "
                        f"and --vocab-size says {vocab_size:,}")
    return processor


def print_summary(out, meta, seconds, processes):
    for split, entry in meta["splits"].items():
        print(f"{split:5}  {entry['documents']:,} documents, {entry['bytes']:,} bytes -> "
              f"{entry['tokens']:,} tokens, {len(entry['shards'])} shards "
              f"({entry['bytes'] / entry['tokens']:.2f} bytes per token)")
    if meta["skipped"]:
        print("skipped: " + ", ".join(f"{n:,} {fault}" for fault, n in meta["skipped"].items()))
    total = sum(entry["tokens"] for entry in meta["splits"].values())
    print(f"{out}: {total:,} tokens in {seconds:.1f} s, {total / seconds:,.0f} tokens/s "
          f"with {processes} processes")
