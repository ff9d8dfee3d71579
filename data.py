"""Which windows of the shards make up a step, and two commands that make and inspect shards:

    python data.py prepare --input texts/ --tokenizer tok.model --vocab-size 4096 --out data/mine
    python data.py inspect data/mine

A shard is a file of token ids, as a rule little-endian uint16 without a header. All shards together
form a ring of tokens: the last is followed by the first. An epoch cuts the ring into windows of
`context` tokens, beginning at a random origin, and reads each window once, in a random order. (It
reads one token more for each: the target of the last position.) As an example, take two shards of
20 and 23 tokens, context = 4, seed = 0. Each character is one token: a letter names its shard, a
digit its window, and a dot belongs to no window.

    shards    aaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbbbbb
    epoch 0   4455556666777788889999...000011112222333344   origin 25, order 4 3 9 5 0 7 1 8 6 2
    epoch 1   788889999...0000111122223333444455556666777   origin 12, order 1 9 4 0 2 8 3 6 5 7

Window 9 of epoch 0 runs from one shard into the next, and window 4 around the end of the ring.
Three tokens are left over and make no window. They differ from epoch to epoch, because the origin
moves. For the same reason a text is not cut at the same places twice.

With batch_size = 4, step 0 reads the windows 4 3 9 5 of epoch 0, and step 2 reads 6 2 of epoch 0
and 1 9 of epoch 1. On two cores, core 0 reads the first half of each batch, core 1 the second.

The order is computed, not stored: a step's windows are a function of (seed, step). So resuming
needs no loader state, the batches are the same on any number of cores, and a terabyte of shards
needs no more memory than a megabyte."""
import argparse
import hashlib
import math
import mmap
import sys

import numpy as np

from nanoxla.documents import KNOWN
from nanoxla.errors import UserError, run_command
from nanoxla.inspect_shards import inspect
from nanoxla.prepare import prepare
from nanoxla.shard_formats import SHARD_FORMATS
from nanoxla.shards import (
    TOKEN_DTYPE,
    allow_open_files,
    find_shards,
    open_shards,
    other_formats,
    out_of_vocabulary,
    tokenizer_path,
)
from nanoxla.tokenizer import load_tokenizer

# --- the order of the windows -------------------------------------------------------------------

ROUNDS = 8


def permute(numbers, size, keys):
    """A pseudorandom permutation of 0 .. size - 1, applied to numbers [n]. keys: uint64
    [ROUNDS], which choose the permutation.

    Storing a shuffled list would take memory. Instead, lay the numbers out in a rectangle of rows x
    columns >= size. A round moves each number within its row, by a hash of the row, or within its
    column, by a hash of the column. Either can be undone, so no two numbers collide, and eight
    rounds mix well. (This is a Feistel network.) The rectangle may have a few cells too many: a
    number that lands on a cell >= size is permuted again, until it lands below size. (This is cycle
    walking: https://doi.org/10.1007/3-540-45760-7_9.)"""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    numbers = numbers.astype(np.uint64)
    walking = np.ones(len(numbers), bool)  # true until a number has landed below size
    while walking.any():
        row, column = np.divmod(numbers[walking], np.uint64(columns))
        for i, key in enumerate(keys):
            if i % 2:
                row = (row + splitmix64(column ^ key)) % np.uint64(rows)
            else:
                column = (column + splitmix64(row ^ key)) % np.uint64(columns)
        numbers[walking] = row * np.uint64(columns) + column
        walking = numbers >= size
    return numbers.astype(np.int64)


def splitmix64(x):
    """A hash, uint64 -> uint64 below 2^32: the finaliser of SplitMix64
    (https://doi.org/10.1145/2714064.2660195). Only the upper half of its result is used: those bits
    are mixed best."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(32)


def window_starts(samples, num_tokens, context, seed):
    """Where windows start on the ring, as token positions [n]. samples [n]: their places in the
    reading order of the run, from 0. Sample i is the window that epoch i // W reads at place i % W,
    where W = num_tokens // context is the number of windows of an epoch."""
    num_windows = num_tokens // context
    epochs, positions = np.divmod(samples, num_windows)
    starts = np.empty(len(samples), np.int64)
    for epoch in np.unique(epochs):
        random = np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS + 1, np.uint64)
        *keys, origin = random
        chosen = epochs == epoch
        window = permute(positions[chosen], num_windows, keys)
        starts[chosen] = (int(origin) % num_tokens + window * context) % num_tokens
    return starts


# --- reading windows ----------------------------------------------------------------------------


class TokenDataset:
    """Shards as one ring of tokens, read in windows of context + 1 tokens. The last token is only a
    target; the next window on the ring, if there is one, begins with it."""

    def __init__(self, paths, context, vocab_size, shard_format="auto"):
        self.paths, self.context, self.vocab_size = paths, context, vocab_size
        self.shards = open_shards(paths, shard_format)
        for path, shard in zip(paths, self.shards):
            if len(shard) <= context:
                raise UserError(f"{path} holds {len(shard):,} tokens; a window of "
                                f"context={context} needs {context + 1:,} "
                                "(the last is only predicted)")
            # Windows are scattered: reading ahead would fetch 31 more pages for each, for nothing.
            shard.base.madvise(mmap.MADV_RANDOM)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.num_tokens = int(self.ends[-1])

    def fingerprint(self):
        """A checksum of the length and the first and last 2,048 ids of each shard, in any format:
        enough to tell data sets apart without reading them."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(np.int64(len(shard)).tobytes())
            ends = np.concatenate([shard[:2_048], shard[-2_048:]])
            digest.update(ends.astype(TOKEN_DTYPE).tobytes())
        return digest.hexdigest()

    def locate(self, position):
        """The shard (its index) that holds a position on the ring, and the offset in it."""
        i = int(np.searchsorted(self.ends, position, side="right"))
        return i, int(position - self.ends[i]) + len(self.shards[i])

    def byte(self, i, offset):
        """Where in the file of shard i the token at `offset` begins."""
        return self.shards[i].offset + offset * self.shards[i].itemsize

    def read(self, starts):
        """The windows at starts [n], as int32 [n, context + 1]. (torch_xla's embedding takes int32
        or int64 ids, not uint16.) Raises UserError for an id outside the vocabulary: XLA would
        silently clamp it to the last row of the embedding, and train on the wrong token."""
        windows = np.empty((len(starts), self.context + 1), np.int32)
        for window, start in zip(windows, starts):
            i, offset = self.locate(start)
            piece = self.shards[i][offset:offset + len(window)]
            window[:len(piece)] = piece
            if len(piece) < len(window):  # the ring continues in the next shard
                following = self.shards[(i + 1) % len(self.shards)]
                window[len(piece):] = following[:len(window) - len(piece)]
        unsigned = windows.view(np.uint32)  # so a negative id is too large
        if unsigned.max() >= self.vocab_size:
            row, column = np.argwhere(unsigned >= self.vocab_size)[0]
            i, offset = self.locate((starts[row] + column) % self.num_tokens)
            raise out_of_vocabulary(self.paths[i], offset, self.byte(i, offset),
                                    windows[row, column], self.vocab_size)
        return windows

    def prefetch(self, starts):
        """Asks the operating system to fetch the windows at starts [n], and does not wait."""
        for start in starts:
            i, offset = self.locate(start)
            first = self.byte(i, offset) // mmap.PAGESIZE * mmap.PAGESIZE
            last = self.byte(i, min(offset + self.context + 1, len(self.shards[i])))
            self.shards[i].base.madvise(mmap.MADV_WILLNEED, first, last - first)

    def batch(self, step, batch_size, seed, rank, world_size):
        """The share of core `rank` in the batch of `step`: int32 [batch_size / world_size,
        context + 1]. Also prefetches its share of the next batch."""
        share = batch_size // world_size

        def starts(step):
            samples = step * batch_size + rank * share + np.arange(share)
            return window_starts(samples, self.num_tokens, self.context, seed)
        self.prefetch(starts(step + 1))
        return self.read(starts(step))

    def fixed_windows(self, count):
        """Starts [count] of windows for validation: always the same ones, spread evenly."""
        available = (self.num_tokens - 1) // self.context
        if count > available:
            raise UserError(f"evaluation needs eval_batches x batch_size = {count:,} windows, "
                            f"but {self.paths[0].parent} has {available:,} for validation; "
                            "lower eval_batches")
        return np.arange(count) * available // count * self.context


# --- the data of a run --------------------------------------------------------------------------


def open_data(config):
    """The training data, and the validation data (None if the run never evaluates), as
    TokenDatasets. Validates everything about the shards except the ids in them."""
    train = find_shards(config.data_dir, config.train_glob)
    val = find_shards(config.data_dir, config.val_glob) if config.eval_every else []
    if both := set(train) & set(val):
        raise UserError(f"{min(both)} is training and validation data; "
                        "change train_glob or val_glob")
    allow_open_files(len(train) + len(val))
    options = config.context, config.vocab_size, config.shard_format
    return TokenDataset(train, *options), TokenDataset(val, *options) if val else None


def check_data(config):
    """Validates shards and tokenizer before any core starts, all but the ids. Raises UserError.
    Prints a note for shards that are not headerless uint16. Returns the training data, and the
    paths of all shards."""
    train_data, val_data = open_data(config)
    paths = train_data.paths
    if val_data:
        val_data.fixed_windows(config.eval_batches * config.batch_size)
        paths = paths + val_data.paths
    if path := tokenizer_path(config):
        load_tokenizer(path, config.vocab_size)
    for words, number in other_formats(paths, config.shard_format).items():
        print(f"note: {number:,} of {len(paths):,} shards in {config.data_dir} are read as "
              f"{words}; --shard_format overrules this", file=sys.stderr)
    return train_data, paths


# --- the commands -------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Write token shards from text, or report on them.")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("prepare", help="text -> shards", description=prepare.__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("--input", nargs="+", required=True, metavar="PATH", dest="inputs",
                     help=f"files with {KNOWN}, or directories of them; a .txt or .md file is one "
                          "document; - is standard input")
    sub.add_argument("--tokenizer", required=True,
                     help="SentencePiece model; trained if it does not exist")
    sub.add_argument("--out", required=True, help="directory to create")
    sub.add_argument("--vocab-size", type=int, help="size of the tokenizer to train")
    sub.add_argument("--val-fraction", type=float, default=0.005,
                     help="share of the documents for validation (%(default)s)")
    sub.add_argument("--shard-tokens", type=int, default=100_000_000,
                     help="tokens per shard (%(default)s)")
    sub.add_argument("--text-key", default="text",
                     help="JSON key or column of the text; a.b is b in an object a (%(default)s)")
    sub.add_argument("--max-bad", type=float, default=0.01,
                     help="share of the documents that may be skipped because they cannot be read "
                          "(%(default)s)")
    sub.add_argument("--strict", action="store_true",
                     help="end at the first document that cannot be read")
    sub.add_argument("--shuffle-seed", type=int, metavar="N",
                     help="put the documents into a random order (default: that of the files)")
    sub.add_argument("--processes", type=int,
                     help="number of processes that encode (default: one per core)")

    sub = commands.add_parser("inspect", help="report on shards", description=inspect.__doc__)
    sub.add_argument("where", metavar="DIR_OR_GLOB")
    sub.add_argument("--vocab-size", type=int,
                     help="warn about ids at or above this (default: as in meta.json)")
    sub.add_argument("--context", type=int, default=1_024, help="tokens in a window (%(default)s)")
    sub.add_argument("--tokenizer",
                     help="SentencePiece model, to show some text (default: as in meta.json)")
    sub.add_argument("--shard-format", default="auto", choices=SHARD_FORMATS,
                     help="auto: recognise how the shards store ids (default); "
                          "an integer type: so, without a header")

    arguments = vars(parser.parse_args())
    {"prepare": prepare, "inspect": inspect}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    run_command(main)
