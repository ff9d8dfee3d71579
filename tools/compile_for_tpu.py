"""Compile the train step for a TPU on a machine that has none, and report memory and time.

    python tools/compile_for_tpu.py config/fwedu_124m.py
    python tools/compile_for_tpu.py config/fwedu_124m.py --micro_batch_size=16 --topology v6e:1x1

It answers, before any TPU time is spent: does this model, with this micro_batch_size and attention,
fit the chip's memory, and how long does a step take? The compiler is the TPU's own, libtpu. It
works on any Linux x86-64 machine. The graphs are those of train.py's train_step and evaluate
(tpu_graphs.py). docs/tpu_compiler.md explains the report.

The estimate leaves out all waiting, but it is no lower bound: the compiler expects some operations
to take longer than they do. docs/tpu_compiler.md compares it with measured times. It is the sum of

  operations         The cycles that the compiler expects for each operation.
  gather, scatter,   Used by the embedding. The compiler has no estimate, so these count as the time
  sort               to read and write their rows at the speed of the chip's memory (HBM).
  flash attention    Here the compiler has no estimate either. A kernel of flash_attention.py is a
                     program without branches: one instruction bundle a cycle, for each window and
                     each 128 lanes of heads. libtpu compiles the kernel alone, and its bundles are
                     counted, or the cycles of the busiest matrix unit, if they are more.
  all-reduce         2 (n - 1) / n x bytes / speed of a link: a ring of n chips that send in both
                     directions, with no other work meanwhile.

The speeds are in nanoxla/tpu.py. Left out are waiting for the host (host_ms says whether the host
can keep up; see host_time.py), waiting for memory that the compiler did not foresee, the launching
of graphs, and checkpoints.

Exit code 1: the step does not compile, or does not fit.
"""
import argparse
import json
import os
import re
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nanoxla.environment import mend_environment, problems, tune_environment
from nanoxla.errors import UserError, run_command
from nanoxla.files import write_file
from nanoxla.processes import call_in_new_process
from nanoxla.progress import Progress
from nanoxla.tpu import KINDS

MEASURED = 0.79, 1.15  # measured / estimated, of programs of others: check_estimate.py


def parse_arguments():
    """The arguments, the strings "--key=value" that override the config, the kind of chip (a key of
    nanoxla/tpu.py's KINDS), and the number of cores."""
    parser = argparse.ArgumentParser(
        description="Compile train.py's step for a TPU on a machine that has none.")
    add = parser.add_argument
    add("config", help="a config file, as for train.py; --key=value overrides its keys")
    add("--topology", default="v5e:2x4",
        help="kind, rows and columns of chips, with one core each (%(default)s)")
    add("--json", metavar="FILE", help="write the figures to FILE too")
    add("--hlo", metavar="FILE", help="write the graphs, as HLO protos, to FILE.0, FILE.1, ...")
    arguments, overrides = parser.parse_known_args()
    parts = re.fullmatch(rf"({'|'.join(KINDS)}):([1-9]\d*)x([1-9]\d*)", arguments.topology)
    if not parts:
        parser.error(f"--topology {arguments.topology}: expected KIND:ROWSxCOLUMNS, as in v5e:2x4; "
                     f"KIND is {' or '.join(KINDS)}")
    if not (find_spec("jax") and find_spec("libtpu")):
        parser.error('needs jax and libtpu: pip install "torch_xla[tpu,pallas]==2.9.0"')
    return arguments, overrides, parts[1], int(parts[2]) * int(parts[3])


def set_environment(kind, cores):
    """Sets variables of this process, if torch_xla, jax and libtpu are not imported yet, and of the
    processes that it starts. Raises UserError for a variable that would change the graphs."""
    mend_environment()
    os.environ |= {
        "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(cores), "JAX_PLATFORMS": "cpu",
        "XLA_IR_DEBUG": "1", "XLA_HLO_DEBUG": "1",  # keep the names of operations in the graphs
        # Without these, libtpu looks for a TPU, and for other processes that use it.
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": f"{KINDS[kind].accelerator}-{cores}",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": "--xla_tpu_use_enhanced_launch_barrier=false"}  # torch_xla's first flag
    for problem in problems():
        raise UserError(problem)
    import torch_xla
    torch_xla._setup_libtpu_flags()  # adds the others that it sets on this kind of chip


def compile_all(graphs, topology):
    """Returns the optimised HLO of each Graph, and sets its hbm_bytes. Exits with 1 if one does not
    compile."""
    from jax.errors import JaxRuntimeError
    from tpu_costs import compile_graph

    texts = []
    with Progress(len(graphs), "graph", "compiling") as progress:
        for graph in graphs:
            try:
                hlo, graph.hbm_bytes = compile_graph(graph, topology)
            except JaxRuntimeError as error:
                progress.close()
                reason = str(error).split(" :: ")[0][:1000]
                sys.exit(f"does not compile: the graph of {graph.line}: {reason}. If the reason is "
                         "memory, a smaller --micro_batch_size needs less")
            texts.append(hlo)
            progress.update()
    return texts


def print_report(config, chip, figures, step):
    """step: the Graphs of a step."""
    tokens, ms, cycles = config.batch_size * config.context, figures["ms"], figures["cycles"]
    in_step, in_evaluation = figures["graphs"]
    print(f"HBM per core      {figures['hbm_gib']:.2f} GiB of {chip.hbm}")
    print(f"graphs            {in_step} for a step, {in_evaluation} for an evaluation")
    for graph in step:
        print(f"    {graph.line:12}  {graph.runs} x {graph.by_kind.total() / 1e6:7.2f} M cycles, "
              f"{graph.hbm_bytes / 2**30:5.2f} GiB, "
              f"{sum(graph.donated)} of {len(graph.donated)} inputs may be overwritten")
    print(f"\nestimate for a step of {tokens:,} tokens     M cycles      ms")
    names = {"compiler": "operations, by the compiler", "moved": "gather, scatter, sort, by bytes",
             "flash": "flash attention, by bundles", "all_reduce": "all-reduce, by bytes",
             "sum": "sum"}
    for kind, name in names.items():
        if kind in ms:
            print(f"    {name:40} {cycles[kind] / 1e6:8.2f} {ms[kind]:7.1f}")
    print(f"tokens/s          {figures['tokens_per_s']:,.0f}")
    print(f"MFU               {figures['mfu']:.1%}")
    low, high = (ms["sum"] * ratio for ratio in MEASURED)
    print(f"range             {low:,.0f} to {high:,.0f} ms: the few measured programs took "
          f"{MEASURED[0]} to {MEASURED[1]} times their estimate")
    print(f"whole run         {figures['hours']:.2f} hours, evaluations included")
    slow = figures["host_ms"] > ms["sum"] / 2
    print(f"host_ms           {figures['host_ms']:.1f} on this machine, while the device computes"
          + (": more than half of its time, so it may have to wait" if slow else ""))
    print("\nmost expensive lines, forward and backward")
    for line, cycles_of_line in figures["lines"].items():
        print(f"    {cycles_of_line / 1e6:7.2f} M  {line:20} {source(line)}".rstrip())


def source(line):
    """The beginning of the source line that is called, for example, "model.py:145"."""
    name, _, number = line.partition(":")
    if not number:
        return ""
    path = ROOT / name if (ROOT / name).exists() else ROOT / "nanoxla" / name
    return path.read_text().splitlines()[int(number) - 1].strip()[:64]


def main():
    arguments, overrides, kind, cores = parse_arguments()
    set_environment(kind, cores)
    tune_environment("TPU", kind)
    chip = KINDS[kind]
    from host_time import host_ms
    from tpu_costs import count_cycles, estimate, kernel_bundles, kernel_cycles
    from tpu_graphs import record

    from nanoxla.flash_attention import check_attention
    from train import check_batch_size, load_config

    config = load_config(arguments.config, overrides)
    check_batch_size(config, cores)
    check_attention(config, "TPU")
    print(f"{arguments.config} for {arguments.topology}, compiled by libtpu {version('libtpu')}; "
          "nothing ran on a TPU", flush=True)
    step, evaluation = record(config, cores)
    graphs = [*step, *evaluation]
    if arguments.hlo:
        for i, graph in enumerate(graphs):
            write_file(Path(f"{arguments.hlo}.{i}"), graph.proto)

    started = time.perf_counter()
    compiled = compile_all(graphs, arguments.topology)
    print(f"compiles          yes, in {time.perf_counter() - started:.0f} s", flush=True)
    bundles = attention = None
    if config.attention == "flash":
        bundles = kernel_bundles(config, arguments.topology)
        attention = kernel_cycles(config, bundles)
    for graph, hlo in zip(graphs, compiled):
        graph.by_kind, graph.by_line = count_cycles(hlo, chip, cores, attention)
    figures = estimate(config, chip, cores, step, evaluation)
    figures["bundles"] = bundles
    # In a process without the names of operations, which take time to record.
    figures["host_ms"] = call_in_new_process(host_ms, config, cores, environment={
        "XLA_IR_DEBUG": "0", "XLA_HLO_DEBUG": "0", "CPU_NUM_DEVICES": "1"})
    print_report(config, chip, figures, step)
    if arguments.json:
        settings = {"config": arguments.config, "overrides": overrides,
                    "topology": arguments.topology}
        versions = {name: version(name) for name in ("torch", "torch_xla", "jax", "libtpu")}
        content = settings | figures | {"versions": versions}
        write_file(Path(arguments.json), json.dumps(content, indent=1).encode() + b"\n")
    if figures["hbm_gib"] > chip.hbm:
        sys.exit("does not fit; a smaller --micro_batch_size needs less")


if __name__ == "__main__":
    run_command(main)
