"""Is this machine fit for a run? Run this first on a new one. It takes half a minute
on a CPU, and on a TPU some minutes, most of them compiling.

    python tools/doctor.py                          # for config/fwedu_124m.py
    python tools/doctor.py CONFIG [--key=value ...]

Each finding is a line: ok, or what is wrong and what to do. "note" is worth knowing. The last line
is a row for the table in README.md. On a TPU the steps are those of CONFIG, on a CPU those of a
small model. From a CPU (the longest lines are shortened here):

    ok    versions: python 3.11, torch 2.9.0, torch_xla 2.9.0, jax 0.7.1, libtpu 0.0.21 (...)
    ok    environment: no variable that would end a run or change what it computes
    ok    config: attention = 'flash' and batch_size = 256 are possible on 1 core
    note  config: attention = 'flash' runs on a TPU only; to train on this CPU, use ...
    note  data: data/fwedu is not a directory; python data.py prepare makes one with shards in it
    note  tokenizer: none is known for this data, so sample.py will have none; name one with ...
    ok    disk: 58.5 GB are free for out/fwedu_124m; 2 checkpoints and one being written need 5.1 GB
    ok    memory: 22.0 GiB are free, about 2.9 are needed for 1 worker; 2 processors
    ok    out_dir: no other run writes to out/fwedu_124m
    ...   starting 1 worker; if one does not answer for 5 minutes, that is reported
    ok    all-reduce: 1 core answered
    ok    kernel: jax lowers both passes of flash attention for a TPU
    ...   compiling a step with attention=math
    ok    math: loss 8.3951, gradient norm 2.4416; on a CPU they were 8.3951 and 2.4419
    ...   compiling a step with attention=flash
    ok    flash: loss 8.3950, gradient norm 2.4422; the gradients of q, k, v differ from those ...
    ...   compiling the step of this config
    ok    20 steps: 3,193 tokens/s, 320.7 ms a step, of which Python takes 318.3; nothing was ...

Exit code 0: nothing is wrong; 1: something is; 2: a mistake in CONFIG or in --key=value. Nothing is
written except in a temporary directory.
"""
import json
import os
import shutil
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoxla import environment, lock, tpu, versions
from nanoxla.checkpoint import list_checkpoints
from nanoxla.config import split_overrides
from nanoxla.errors import UserError, first_line, run_command
from nanoxla.launch import run_on_all_cores

DEFAULT = "config/fwedu_124m.py"
GIB = 2**30
KAGGLE_DISK = 20e9  # bytes that /kaggle/working keeps
IMPORTED = 0.9 * GIB  # memory of a worker that has imported everything; measured, without a TPU
CHIPS_BUSY = 20  # seconds: after a kill -9 it takes some until the chips are free
HANG_MINUTES = 5

# The time of a step by tools/compile_for_tpu.py, in ms: {(config, kind of chip, cores): ms}.
ESTIMATES = {(DEFAULT, "v5e", 8): 182.0, (DEFAULT, "v5e", 1): 1311.0,
             (DEFAULT, "v6e", 8): 83.4, (DEFAULT, "v6e", 1): 599.4}
# A model with other values of these keys takes another time.
DECIDE_SPEED = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "context", "attention",
                "batch_size", "micro_batch_size", "dtype")

COLUMNS = ("date", "device", "python", "torch_xla", "jax", "libtpu", "config", "tokens/s", "MFU",
           "step ms", "host ms", "compiles", "HBM GiB", "estimated ms (measured / estimated)")


def print_finding(kind, text):
    print(f"{kind:5} {text}", flush=True)


# --- checks that need no device: each yields findings (kind, text) ------------------------------


def check_versions(found):
    words = ", ".join(f"{name} {number or 'is missing'}" for name, number in found.items())
    if name := versions.tried_as(found):
        yield "ok", f"versions: {words} ({name})"
    elif any(found == tried | {"python": found["python"]} for tried in versions.TRIED.values()):
        yield "note", f"versions: {words}; not tried with this Python"
    else:
        yield "wrong", (f"versions: {words}: not tried together. Try: "
                        f"{versions.install_line(found)}")


def check_environment():
    problems = list(environment.problems())
    for problem in problems:
        yield "wrong", f"environment: {problem}"
    if note := environment.slow_note():
        yield "note", f"environment: {note}"
    if not problems:
        yield "ok", "environment: no variable that would end a run or change what it computes"


def check_imports(found):
    try:
        for name in ("torch", "torch_xla"):
            import_module(name)
    except Exception as error:  # ImportError, or whatever a half fitting library raises
        yield "wrong", (f"imports: {type(error).__name__}: {first_line(error)}: torch and "
                        f"torch_xla do not fit together. Try: {versions.install_line(found)}")


def check_config(config, device, cores):
    """device: "TPU" or "CPU"."""
    import train
    from nanoxla.flash_attention import check_attention

    mistakes = []
    for check in (lambda: train.check_batch_size(config, cores),
                  lambda: check_attention(config, "TPU")):
        try:
            check()
        except UserError as error:
            mistakes.append(error)
            yield "wrong", f"config: {error}"
    if not mistakes:
        yield "ok", (f"config: attention = {config.attention!r} and batch_size = "
                     f"{config.batch_size} are possible on {cores} core{'s' * (cores > 1)}")
    if config.attention == "flash" and device == "CPU":
        yield "note", ("config: attention = 'flash' runs on a TPU only; to train on this CPU, use "
                       "--attention=math")


def check_data(config):
    import data
    from nanoxla.shards import tokenizer_path
    from nanoxla.tokenizer import load_tokenizer

    try:
        train_data, val_data = data.open_data(config)
        if val_data:
            val_data.fixed_windows(config.eval_batches * config.batch_size)
        yield "ok", (f"data: {train_data.num_tokens:,} tokens in {len(train_data.paths)} files of "
                     f"{config.data_dir}")
    except UserError as error:
        directory = Path(config.data_dir)
        absent = not directory.is_dir() or not any(directory.iterdir())
        yield "note" if absent else "wrong", f"data: {error}"
    path = None
    try:
        path = tokenizer_path(config)
        if path:
            load_tokenizer(path, config.vocab_size)
            yield "ok", f"tokenizer: {path}"
        else:
            yield "note", ("tokenizer: none is known for this data, so sample.py will have none; "
                           "name one with --tokenizer=PATH")
    except UserError as error:
        yield "note" if path and not path.exists() else "wrong", f"tokenizer: {error}"


def check_disk(config, parameters):
    out_dir = Path(config.out_dir).resolve()
    disk = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free, limit = shutil.disk_usage(disk).free, ""
    if out_dir.is_relative_to("/kaggle/working"):
        used = sum(path.lstat().st_size for path in Path("/kaggle/working").rglob("*"))
        free, limit = min(free, KAGGLE_DISK - used), " (Kaggle keeps 20 GB of /kaggle/working)"
    kept = config.keep_checkpoints
    missing = max(1, kept + 1 - len(list_checkpoints(out_dir)))
    needed = missing * 12 * parameters * 1.05  # a weight and two moments, 4 bytes each
    text = (f"disk: {free / 1e9:.1f} GB are free for {config.out_dir}{limit}; {kept} checkpoints "
            f"and one being written need {needed / 1e9:.1f} GB")
    if free < needed:
        yield "wrong", f"{text}. Make room, or choose another --out_dir or --keep_checkpoints=1"
    else:
        yield "ok", text


def check_memory(parameters, cores):
    """Every worker imports the libraries and makes the model, 4 bytes per parameter; core 0 holds a
    copy of weights and moments while it saves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    needed = cores * (IMPORTED + 4 * parameters) + 12 * parameters
    processors = len(os.sched_getaffinity(0))
    text = (f"memory: {free / GIB:.1f} GiB are free, about {needed / GIB:.1f} are needed for "
            f"{cores} worker{'s' * (cores > 1)}; {processors} processors")
    if free < needed:
        yield "wrong", f"{text}. End other programs, or take a machine with more memory"
    elif processors < cores:
        yield "note", f"{text}: fewer than cores, so Python may be too slow for the device"
    else:
        yield "ok", text


def check_lock(out_dir):
    if holder := lock.holder(out_dir):
        yield "wrong", (f"out_dir: another run is writing to {out_dir}: {holder}. Stop that run, "
                        "wait for its end, or choose another --out_dir")
    else:
        yield "ok", f"out_dir: no other run writes to {out_dir}"


def check_chips(device):
    chips = tpu.chips()
    if device != "TPU":
        if chips:
            yield "note", (f"chips: this machine has {len(chips)} and PJRT_DEVICE={device}, so "
                           "training would not use them; unset PJRT_DEVICE")
        return
    if not chips:
        yield "wrong", ("chips: none found. In a notebook, choose a TPU as accelerator; for a test "
                        "on a CPU, set PJRT_DEVICE=CPU")
        return
    if not tpu.kind():
        yield "note", (f"chips: not {' or '.join(tpu.KINDS)}; there is no MFU unless peak_tflops "
                       "is set")
    try:
        tpu.check_free(CHIPS_BUSY)
        yield "ok", f"chips: {len(chips)}, and no other process holds one"
    except UserError as error:
        yield "wrong", f"chips: {error}"


# --- the device, and the row to paste -----------------------------------------------------------


def check_device(config, device, cores):
    """Runs doctor_device.py on every core, which prints its findings. Returns whether something was
    wrong, and the figures of the timed steps."""
    import dataclasses

    import torch_xla.distributed.xla_multiprocessing as xmp
    from doctor_device import SMALL, worker

    tried = dataclasses.replace(config, **SMALL) if device == "CPU" else config
    print_finding("...", f"starting {cores} worker{'s' * (cores > 1)}; if one does not answer for "
                         f"{HANG_MINUTES:g} minutes, that is reported")
    with tempfile.TemporaryDirectory() as directory:
        ended = None
        try:
            run_on_all_cores(xmp.spawn, worker, (tried, config, cores, directory), HANG_MINUTES)
        except (Exception, SystemExit) as error:
            code = error.code if isinstance(error, SystemExit) else None
            ended = "a worker ended; see above" if isinstance(code, int) else first_line(error)
        path = Path(directory, "findings.jsonl")
        findings = [json.loads(line) for line in path.open()] if path.exists() else []
        failed = Path(directory, "failed")
        if failed.exists():
            ended = failed.read_text()
    figures = findings[-1][2] if findings else {}  # complete after the last check
    if ended:
        print_finding("wrong", f"{ended}. If it is memory, use a smaller --micro_batch_size; if "
                               "the attention kernel, --attention=math; else restart the machine")
    elif not figures:
        print_finding("wrong", "stopped before the last check")
    wrong = ended or not figures or any(kind == "wrong" for kind, *_ in findings)
    return bool(wrong), figures


def device_name(device, cores):
    if device != "TPU":
        return f"{device}, {len(os.sched_getaffinity(0))} processors"
    try:
        from torch_xla import tpu as of_torch_xla
        kind = of_torch_xla.get_tpu_env()["ACCELERATOR_TYPE"]
    except Exception:  # it asks the machine's metadata
        kind = "TPU"
    return f"{kind}, {cores} cores"


def estimated_ms(config, cores):
    """The compiler's estimate for a step, or None."""
    import train
    for (path, *machine), ms in ESTIMATES.items():
        other = train.load_config(Path(__file__).parent.parent / path)
        if machine == [tpu.kind(), cores] and all(getattr(config, key) == getattr(other, key)
                                                  for key in DECIDE_SPEED):
            return ms
    return None


def row(figures, found, device, name, estimate):
    """The table row. estimate: in ms, or None."""
    def shown(key, form="{:.1f}"):
        return form.format(figures[key]) if figures.get(key) is not None else "-"

    ratio = f" ({figures['step_ms'] / estimate:.2f})" if estimate and figures else ""
    cells = [time.strftime("%Y-%m-%d"), device,
             *(found[key] or "-" for key in ("python", "torch_xla", "jax", "libtpu")), name,
             shown("tokens_per_s", "{:,.0f}"), shown("mfu", "{:.1%}"), shown("step_ms"),
             shown("host_ms"), shown("compiles", "{}"), shown("hbm_gib", "{:.2f}"),
             f"{estimate:.1f}{ratio}" if estimate else "-"]
    return f"| {' | '.join(cells)} |"


def main():
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        return print(__doc__)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    wrong = False

    def healthy(findings):
        """Prints the findings. Returns whether none is wrong."""
        kinds = []
        for kind, text in findings:
            print_finding(kind, text)
            kinds.append(kind)
        nonlocal wrong
        wrong |= "wrong" in kinds
        return "wrong" not in kinds

    environment.mend_environment()
    found = versions.installed()
    healthy(check_versions(found))
    usable = healthy(check_environment())
    if not healthy(check_imports(found)):
        sys.exit(1)

    import torch_xla.runtime as xr

    import train
    from model import num_parameters
    config = train.load_config(path, arguments)
    device, parameters = xr.device_type(), num_parameters(config)[0]
    cores = max(1, len(tpu.chips())) if device == "TPU" else 1
    usable &= healthy(check_config(config, device, cores))
    healthy(check_data(config))
    healthy(check_disk(config, parameters))
    healthy(check_memory(parameters, cores))
    healthy(check_lock(config.out_dir))
    usable &= healthy(check_chips(device))
    if not usable:
        print_finding("note", "the device was not tried; mend what is wrong, and run this again")
        sys.exit(1)

    environment.tune_environment(device, tpu.kind())
    failed, figures = check_device(config, device, cores)
    wrong |= failed
    if not figures:
        sys.exit(1)
    changes = [f"--{key}={value}" for key, value in split_overrides(arguments)
               if key in DECIDE_SPEED]
    name, estimate = " ".join([path, *changes]), None
    if device == "TPU":
        cores = figures.get("cores", cores)
        estimate = estimated_ms(config, cores)
        if not estimate:
            print_finding("note", "no estimate is stored for this config and number of cores; "
                                  f"python tools/compile_for_tpu.py {name} makes one")
    else:
        name += " (small model)"
    print(f"\nthe row for the table in README.md:\n\n| {' | '.join(COLUMNS)} |\n"
          f"|{'---|' * len(COLUMNS)}")
    print(row(figures, found, device_name(device, cores), name, estimate))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
