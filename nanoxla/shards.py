"""Token shards on disk: opening them, checking them, and the meta.json that `data.py prepare`
writes.

`prepare` writes little-endian uint16 token ids without a header. nanoxla/shard_formats.py describes
the other formats that are read.
"""
import collections
import json
import math
import os
import resource
from pathlib import Path

import numpy as np

from nanoxla.errors import UserError
from nanoxla.progress import Progress
from nanoxla.shard_formats import recognise

TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 65_536  # the number of different uint16 ids
SCAN_TOKENS = 1 << 23  # tokens that a scan holds in memory: 16 MB of uint16
OTHER_FILES = 128  # that a process may have open besides its shards
META_FORMAT = 1  # the version of meta.json


def find_shards(data_dir, pattern):
    """The sorted paths that match data_dir/pattern. Raises UserError if there is none."""
    if not os.path.isdir(data_dir):
        raise UserError(f"{data_dir} is not a directory; python data.py prepare makes one with "
                        "shards in it")
    try:
        paths = sorted(Path(data_dir).glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{pattern!r} is not a pattern of file names in {data_dir}, "
                        f"such as train_*.bin: {error}") from None
    if not paths:
        raise UserError(f"no file matches {pattern} in {data_dir}; python data.py prepare writes "
                        "train_*.bin and val_*.bin (eval_every=0 needs no val_*.bin)")
    return paths


def formats_of(paths, shard_format):
    """The ShardFormat of each file; see recognise. Shards that `prepare` wrote are not doubted."""
    trusted = written_by_prepare(paths, math.inf) if shard_format == "auto" else ()
    return [recognise(path, "uint16" if path in trusted else shard_format) for path in paths]


def open_shards(paths, shard_format="auto"):
    """Memory maps of the token ids of shards. Raises UserError for a file that cannot be a shard.

    The operating system reads a page from the disk when it is first used, shares it between all
    processes, and drops it when memory is short."""
    return [np.memmap(path, found.dtype, "r", found.start, found.tokens)
            for path, found in zip(paths, formats_of(paths, shard_format))]


def other_formats(paths, shard_format):
    """{ShardFormat in words: number of shards}, without those that are as `prepare` writes them."""
    return collections.Counter(str(found) for found in formats_of(paths, shard_format)
                               if found.header or found.dtype != TOKEN_DTYPE)


def allow_open_files(shards):
    """Raises the limit of open files, if it is too low for this many memory maps: each has a file
    descriptor. Raises UserError if the system does not allow that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + OTHER_FILES
    if needed > hard != resource.RLIM_INFINITY:
        raise UserError(f"{shards:,} shards need {needed:,} open files, and the system allows "
                        f"{hard:,}. Raise it (ulimit -n {needed}, or ask the administrator), or "
                        "join the shards into fewer, larger ones")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# --- checking the ids ---------------------------------------------------------------------------


def out_of_vocabulary(path, offset, byte, token, vocab_size):
    """The error for the id `token`, which is at `offset` (in tokens) of a shard."""
    return UserError(f"{path} holds token id {token} at token {offset:,} (byte {byte:,}); "
                     f"ids must be below vocab_size={vocab_size}")


def first_out_of_vocabulary(path, found, offset, ids, vocab_size):
    """The error for the first id in `ids` that is not below vocab_size, or None. `ids` begin at
    `offset` of the shard, whose ShardFormat is `found`."""
    unsigned = ids.view(ids.dtype.str.replace("i", "u"))  # so a negative id is too large
    if unsigned.max() < vocab_size:
        return None
    first = int(np.argmax(unsigned >= vocab_size))
    byte = found.start + (offset + first) * found.dtype.itemsize
    return out_of_vocabulary(path, offset + first, byte, ids[first], vocab_size)


def scan(paths, description, shard_format):
    """Yields (path, ShardFormat, offset, ids) over all tokens of all shards, SCAN_TOKENS at a time,
    and shows its progress."""
    formats = formats_of(paths, shard_format)
    with Progress(sum(found.tokens for found in formats), "token", description) as progress:
        for path, found in zip(paths, formats):
            for offset in range(0, found.tokens, SCAN_TOKENS):
                ids = np.fromfile(path, found.dtype, min(SCAN_TOKENS, found.tokens - offset),
                                  offset=found.start + offset * found.dtype.itemsize)
                yield path, found, offset, ids
                progress.update(len(ids))


def check_token_ids(paths, vocab_size, shard_format="auto"):
    """Raises UserError for the first id that is not below vocab_size. XLA would silently replace it
    with the last id. Skips shards that `prepare` wrote, if its vocabulary was not larger."""
    trusted = written_by_prepare(paths, vocab_size)
    unknown = [path for path in paths if path not in trusted]
    for path, found, offset, ids in scan(unknown, "checking token ids", shard_format):
        if error := first_out_of_vocabulary(path, found, offset, ids, vocab_size):
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


def written_by_prepare(paths, vocab_size):
    """The set of the paths that meta.json lists, with their present size and ids below
    vocab_size."""
    tokens = {}
    for directory in {path.parent for path in paths}:
        meta = read_meta(directory)
        if meta.get("vocab_size", math.inf) <= vocab_size:
            tokens |= {directory / shard["file"]: shard["tokens"]
                       for split in meta.get("splits", {}).values() for shard in split["shards"]}
    return {path for path in paths
            if tokens.get(path) == os.path.getsize(path) / TOKEN_DTYPE.itemsize}


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
