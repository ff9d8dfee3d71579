"""Token shards on disk: opening them, checking them, and the meta.json that `data.py prepare`
writes.

A shard is a headerless file of little-endian uint16 token ids.
"""
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np

from nanoxla.errors import UserError
from nanoxla.progress import Progress

TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 65_536  # the number of different uint16 ids
SCAN_TOKENS = 1 << 23  # tokens that a scan holds in memory: 16 MB
META_FORMAT = 1  # the version of meta.json


def find_shards(data_dir, pattern):
    """The sorted paths that match data_dir/pattern. Raises UserError if there is none."""
    if not os.path.isdir(data_dir):
        raise UserError(f"{data_dir} is not a directory; python data.py prepare makes one with "
                        "shards in it")
    paths = sorted(Path(data_dir).glob(pattern))
    if not paths:
        raise UserError(f"no file matches {pattern} in {data_dir}; python data.py prepare writes "
                        "train_*.bin and val_*.bin (eval_every=0 needs no val_*.bin)")
    return paths


def open_shard(path):
    """A memory map of a shard's token ids. Raises UserError if the file cannot be a shard.

    The operating system reads a page from the disk when it is first used, shares it between all
    processes, and drops it when memory is short."""
    size = os.path.getsize(path)
    if size == 0:
        raise UserError(f"{path} is empty")
    if size % TOKEN_DTYPE.itemsize:
        raise UserError(f"{path} has an odd number of bytes ({size:,}): it does not hold uint16 "
                        "token ids, or it was cut short")
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r")


# --- checking the ids ---------------------------------------------------------------------------


def out_of_vocabulary(path, offset, token, vocab_size):
    """The error for the id `token`, which is at `offset` (in tokens) of a shard."""
    return UserError(f"{path} holds token id {token} at token {offset:,} "
                     f"(byte {offset * TOKEN_DTYPE.itemsize:,}); "
                     f"ids must be below vocab_size={vocab_size}")


def first_out_of_vocabulary(path, offset, ids, vocab_size):
    """The error for the first id in `ids` that is not below vocab_size, or None. `ids` begin at
    `offset` of the shard."""
    if ids.max() < vocab_size:
        return None
    first = int(np.argmax(ids >= vocab_size))
    return out_of_vocabulary(path, offset + first, ids[first], vocab_size)


def scan(paths, description):
    """Yields (path, offset, ids) over all tokens of all shards, SCAN_TOKENS at a time, and shows
    its progress."""
    shards = [open_shard(path) for path in paths]
    with Progress(sum(len(shard) for shard in shards), "token", description) as progress:
        for path in paths:
            for offset in itertools.count(0, SCAN_TOKENS):
                ids = np.fromfile(path, TOKEN_DTYPE, SCAN_TOKENS,
                                  offset=offset * TOKEN_DTYPE.itemsize)
                if not len(ids):
                    break
                yield path, offset, ids
                progress.update(len(ids))


def check_token_ids(paths, vocab_size):
    """Raises UserError for the first id that is not below vocab_size. XLA would silently replace it
    with the last id. Skips shards that `prepare` wrote, if its vocabulary was not larger."""
    unknown = [path for path in paths if not written_by_prepare(path, vocab_size)]
    for path, offset, ids in scan(unknown, "checking token ids"):
        if error := first_out_of_vocabulary(path, offset, ids, vocab_size):
            raise error


# --- meta.json ----------------------------------------------------------------------------------


def read_meta(directory):
    """The meta.json that `prepare` wrote into a directory; {} if there is none, or if another
    program wrote it."""
    path = Path(directory) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it, or prepare the data "
                        "again") from None
    return meta if isinstance(meta, dict) and meta.get("format") == META_FORMAT else {}


def written_by_prepare(path, vocab_size):
    """Whether meta.json lists this shard, with its present size and ids below vocab_size."""
    meta = read_meta(path.parent)
    tokens = {shard["file"]: shard["tokens"]
              for split in meta.get("splits", {}).values() for shard in split["shards"]}
    return (meta.get("vocab_size", math.inf) <= vocab_size
            and tokens.get(path.name) == os.path.getsize(path) / TOKEN_DTYPE.itemsize)


def tokenizer_path(config):
    """The tokenizer of a run's data: the one that the config names, else the one that meta.json
    names, else None."""
    if config.tokenizer:
        return Path(config.tokenizer)
    name = read_meta(config.data_dir).get("tokenizer")
    return name and Path(config.data_dir, name)


def bytes_per_token(paths):
    """The bytes of text per token of these shards, if they are a whole split that `prepare` wrote;
    else None."""
    meta = read_meta(paths[0].parent)
    for split in meta.get("splits", {}).values():
        if {shard["file"] for shard in split["shards"]} == {path.name for path in paths}:
            return split["bytes"] / split["tokens"]
    return None
