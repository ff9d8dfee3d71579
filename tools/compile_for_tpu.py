"""Compile the train step for a TPU v5e on a machine that has none, and print what the TPU's own compiler says of it.

    python tools/compile_for_tpu.py config/fwedu_124m.py [--key=value ...] [--topology v5e:2x4] [--json FILE] [--hlo FILE]

Whether a model, a micro_batch_size, an attention fit the chip's memory, and about how long a step takes, before any TPU time is
spent on it. The graphs are those that train.py's train_step and evaluate make, called here with torch_xla.sync replaced by a
function that keeps the pending graph instead of running it. libtpu, which compiles them, works on any x86-64 machine.

The estimate is no forecast: it says what a step takes if nothing ever waits. It adds up
  operations         the cycles that the compiler expects of each. A fusion counts for the source line that it ends with.
  gather, scatter, sort   of the embedding: the compiler has no estimate; here the bytes they read and write / 819 GB/s.
  flash attention    no estimate either. A kernel of flash_attention.py is a straight line of instruction bundles, one a cycle,
                     run for each window and each 128 lanes of heads: libtpu compiles it alone, and its bundles are counted.
  all-reduce         2 (n - 1) / n x bytes / 90 GB/s: a ring over n chips that sends both ways at 45 GB/s, which is what a link
                     of a v5e does (https://jax-ml.github.io/scaling-book/tpus), with nothing else going on meanwhile.
and leaves out whatever waits for the host (host_ms says whether that can keep up, see host_time.py) or for memory that the
compiler did not foresee, the launching of graphs, and checkpoints.

Exit code 1: it does not compile, or does not fit. Outside of tests, all private calls of jax and torch_xla are in this file.
"""
import argparse
import os
import sys
from importlib.util import find_spec

parser = argparse.ArgumentParser(description="Compile train.py's step for a TPU v5e on a machine without one.")
parser.add_argument("config", help="a config file, as for train.py; --key=value changes keys of it")
parser.add_argument("--topology", default="v5e:2x4", help="chips, one core each (%(default)s)")
parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
parser.add_argument("--hlo", metavar="FILE", help="write the graphs, as HLO protos, to FILE.0, FILE.1, ...")

if __name__ == "__main__":  # what follows must be in the environment before torch_xla and libtpu load
    arguments, overrides = parser.parse_known_args()
    version, _, shape = arguments.topology.partition(":")
    sides = shape.split("x")
    if version != "v5e" or not all(side.isdigit() and int(side) for side in sides) or len(sides) != 2:
        parser.error(f"--topology {arguments.topology}: expected v5e:ROWSxCOLUMNS, as in v5e:2x4")
    if not (find_spec("jax") and find_spec("libtpu")):
        parser.error('needs jax and libtpu: pip install "torch_xla[tpu,pallas]==2.9.0"')
    cores = int(sides[0]) * int(sides[1])
    os.environ |= {
        "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(cores), "JAX_PLATFORMS": "cpu",
        "XLA_IR_DEBUG": "1", "XLA_HLO_DEBUG": "1",  # names of scopes in the graphs
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": f"v5litepod-{cores}", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else libtpu looks for a TPU, and for others that use it
        "LIBTPU_INIT_ARGS": "--xla_tpu_use_enhanced_launch_barrier=false --xla_latency_hiding_scheduler_rerun=1 "
        "--xla_tpu_prefer_async_allgather_to_allreduce=true --xla_tpu_enable_flash_attention=false "
        "--xla_enable_async_all_gather=true --xla_enable_async_collective_permute=true",  # as torch_xla sets it on a v5e
    }

import collections
import contextlib
import gc
import json
import math
import re
import tempfile
import time
import weakref
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from host_time import host_ms
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from torch.overrides import TorchFunctionMode

import flash_attention
import train
from model import flops_per_token
from process import Progress, alone, run_command, write_file

CLOCK = 197e12 / (4 * 128 * 128 * 2)  # Hz: the 197 TFLOP/s of a v5e are 4 matrix units of 128 x 128 multiply-adds a cycle
LINK = 90e9  # bytes/s of one link between chips, both ways together
MEMORY = 819e9  # bytes/s of a chip's HBM
HBM = 15.75  # GiB of the chip's 16 that the compiler gives to a program


# --- the graphs -------------------------------------------------------------------------------------------------------


class SourceLines(TorchFunctionMode):
    """Names what is put into the graph by the line of this repository that asked for it, the backward pass of a line too."""

    def __init__(self):
        super().__init__()
        self.scopes = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        frame = sys._getframe(1)
        while frame and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
        scope = torch_xla._XLAC.profiler.scope_pusher(line)  # until it is deleted
        result = function(*arguments, **(keywords or {}))
        del scope
        if isinstance(result, torch.Tensor) and result.grad_fn:
            self.name_backward(result.grad_fn, line)
        return result

    def name_backward(self, node, line):
        """All of `node` and of what led to it that has no name yet was added by `line`."""
        if node is None or "line" in node.metadata or node.name().endswith("AccumulateGrad"):
            return
        node.metadata["line"] = line  # in the node, as a set of nodes would keep their tensors from being freed
        node.register_prehook(lambda *_: self.scopes.append(torch_xla._XLAC.profiler.scope_pusher(line)))
        node.register_hook(lambda *_: self.scopes.clear())
        for before, _ in node.next_functions:
            self.name_backward(before, line)


@dataclass
class Graph:
    proto: bytes  # an HLO module
    line: str  # of train.py, where it was to be run
    donated: list  # for each argument whether an output may take its memory: it may that of a tensor that is overwritten
    others: int  # bytes of the tensors that are on the device meanwhile and not in this graph
    runs: int = 0
    hbm: int = 0  # bytes in use when it runs, as compiled; like the next ones known when it is
    by_kind: collections.Counter = None  # cycles of one run, by what they are spent on
    by_line: collections.Counter = None  # and by source line


class Recorder:
    """In place of torch_xla.sync: keeps the graph, and puts zeros where its results would be."""

    def __init__(self):
        self.graphs, self.real_sync = {}, torch_xla.sync
        self.remember_buffers()

    def tensors(self):
        """All tensors on the device, in the order in which torch_xla has them."""
        gc.collect()  # or what is left of a tracing would be among them
        found = {torch_xla._XLAC._xla_get_tensor_id(t): t for t in gc.get_objects()
                 if issubclass(type(t), torch.Tensor) and t.device.type == "xla"}
        return [found[key] for key in sorted(found)]

    def remember_buffers(self):
        xm.wait_device_ops()  # a tensor that is still being computed has no buffer yet
        self.owners = collections.defaultdict(list)  # of a buffer: it can have several, such as a parameter and its alias
        for t in self.tensors():
            with contextlib.suppress(RuntimeError):  # it has none: a placeholder of a function that was traced
                self.owners[torch_xla._XLAC._get_tensors_handle([t])[0]].append(weakref.ref(t))

    def sync(self):
        tensors = self.tensors()
        pending = [t for t, needed in zip(tensors, torch_xla._XLAC._check_tensor_need_materialization(tensors)) if needed]
        if not pending:
            return
        text = re.sub(r", metadata={[^}]*}", "", torch_xla._XLAC._get_xla_tensors_hlo(pending))  # names of scopes are numbered
        inputs = torch_xla._XLAC._get_tensors_handle(torch_xla._XLAC._get_tensors_xla_device_data_node(pending)[1])
        owners = {handle: [t for ref in refs if (t := ref()) is not None] for handle, refs in self.owners.items()}
        replaced = set(map(id, pending))  # these get a new buffer, so the graph may write over their old one
        free = {handle for handle, sharing in owners.items() if any(id(t) in replaced for t in sharing)}
        used, frame = free.union(inputs), sys._getframe(1)
        graph = Graph(torch_xla._XLAC._get_xla_tensors_hlo_proto(pending),
                      f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}", [handle in free for handle in inputs],
                      sum(sharing[0].nbytes for handle, sharing in owners.items() if sharing and handle not in used))
        self.graphs.setdefault(text, graph).runs += 1
        self.graphs[text].others = max(self.graphs[text].others, graph.others)
        with torch.no_grad():
            for t in pending:
                t.copy_(torch.zeros(t.shape, dtype=t.dtype))
        self.real_sync()  # puts them on the device: a number would be a constant of the next graph
        self.remember_buffers()


def jit_for_tpu(function, jit=jax.jit, **options):
    """jax.jit. But where torch_xla asks it for a Pallas kernel, it lowers that for a TPU, even if there is none."""
    jitted = jit(function, **options)
    if sys._getframe(1).f_globals["__name__"] != "torch_xla.experimental.custom_kernel":
        return jitted
    return SimpleNamespace(lower=lambda *inputs, **options: jitted.trace(*inputs, **options).lower(lowering_platforms=("tpu",)))


def record(config, cores):
    """The graphs of an optimiser step and those of an evaluation of one batch, as two lists of Graph."""
    jax.jit = jit_for_tpu
    device = torch_xla.device()
    xm.set_replication(device, xm.get_xla_supported_devices())  # xr.world_size() is now `cores`
    model = train.Llama(config).to(device)
    optimizer, passes = train.AdamW(model.parameters(), config), train.Passes(model, config)
    zero = torch.zeros((), device=device)
    torch_xla.sync()
    windows = torch.zeros(config.batch_size // cores, config.context + 1, dtype=torch.int32)
    graphs, sync = [], torch_xla.sync
    for function, arguments in ((train.train_step, (passes, optimizer, windows, 0, False, zero)),
                                (train.evaluate, (passes, windows, zero))):
        recorder = Recorder()
        torch_xla.sync = recorder.sync
        with SourceLines():
            function(*arguments)
        torch_xla.sync = sync
        graphs.append(list(recorder.graphs.values()))
    return graphs


# --- compiling them ---------------------------------------------------------------------------------------------------


def compile_graph(graph, devices):
    """The graph as libtpu compiles it for all devices: (optimised HLO as text, bytes of HBM in use when it runs)."""
    module_text = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(graph.proto))
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(module_text)
        main = next(op for op in module.body.operations if getattr(op, "name", None) and op.name.value == "main")
        main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get({"jax.buffer_donor": ir.BoolAttr.get(True)} if donated else {})
                                           for donated in graph.donated])
        bytecode = mlir.module_to_bytecode(module)
    options = xla_client.CompileOptions()
    build = options.executable_build_options
    options.num_replicas = build.num_replicas = len(devices)
    options.num_partitions = build.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(len(devices)).reshape(-1, 1))
    executable = devices[0].client.compile(bytecode, executable_devices=xla_client.DeviceList(tuple(devices)),
                                           compile_options=options)
    memory = executable.get_compiled_memory_stats()
    size = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes +
            memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    return executable.hlo_modules()[0].to_string(), size + graph.others


# --- what they cost ---------------------------------------------------------------------------------------------------


def count_bundles(config, topology):
    """Instruction bundles of the forward and the backward kernel for one window and 128 lanes of heads, in a process of its
    own: libtpu writes its dump to the directory that its arguments name when it is loaded."""
    T, dtype = config.context, config.dtype
    device = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    group = jax.ShapeDtypeStruct((1, T, flash_attention.LANES), dtype)
    table = jax.ShapeDtypeStruct((T, flash_attention.LANES), "float32")
    counts = []
    directory = Path(re.search(r"--xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])
    for kernel, gradients in zip(flash_attention.kernels(config.dim // config.n_heads), ((), (group,))):
        shapes = group, group, group, table, table, *gradients
        jax.jit(flash_attention.exported(kernel, *shapes), in_shardings=device, out_shardings=device).lower(*shapes).compile()
        (dump,) = [path for path in directory.glob("*-final_bundles.txt")
                   if kernel.__name__ in path.name and "schedule-analysis" not in path.name]
        counts.append(len(re.findall(r"^ *0x[0-9a-f]+ ", dump.read_text(), re.MULTILINE)))
    return counts


def cost(text, config, cores, bundles):
    """Of a compiled graph, run once: cycles by what they are spent on and cycles by source line, as two Counters."""
    programs = config.micro_batch_size * config.dim // flash_attention.LANES
    by_kind, by_line = collections.Counter(), collections.Counter()
    sizes = {}  # of each instruction's results, in bytes
    for instruction in text[text.index("\nENTRY "):].splitlines():
        match = re.match(r"\s+(?:ROOT )?(%\S+) = (.*?) ([a-z-]+)\((.*?)\)", instruction)
        if not match:
            continue
        name, results, opcode, operands = match.groups()
        sizes[name] = bytes_of(results)
        lines = re.findall(r"(\w+\.py)_(\d+)", (re.search(r'op_name="([^"]*)"', instruction) or [""])[0])
        line = ":".join(lines[-1]) if lines else "moves and others without a line"
        if estimated := re.search(r'"estimated_cycles":"(\d+)"', instruction):
            kind, cycles = "compiler", float(estimated[1])
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction:
            kind, line = "flash", "flash_attention.py"
            cycles = programs * bundles[results.startswith("(")]  # the backward kernel has several results
        elif opcode in ("all-reduce", "all-reduce-start"):
            kind, cycles = "all_reduce", CLOCK * 2 * (cores - 1) / cores * sizes[name] / LINK
        elif opcode in ("fusion", "gather", "scatter", "sort"):
            moved = sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%[\w.-]+", operands))
            kind, cycles = "moved", CLOCK * moved / MEMORY
        elif opcode == "while":
            raise NotImplementedError("a loop, whose body would count once")
        else:
            continue
        by_kind[kind] += cycles
        by_line[line] += cycles
    return by_kind, by_line


def bytes_of(shapes):
    """Of all arrays in an HLO type such as (f32[8,128]{1,0}, bf16[2])."""
    width = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
    return sum(width.get(dtype, 4) * math.prod(map(int, filter(None, sides.split(","))))
               for dtype, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes))


def total(costs):
    """The sum of (Counter, times)."""
    result = collections.Counter()
    for counter, times in costs:
        for key, value in counter.items():
            result[key] += value * times
    return result


def estimate(config, cores, step, evaluation):
    """All figures of the report, of the compiled graphs of a step and of an evaluation."""
    kinds, lines = (total((getattr(graph, by), graph.runs) for graph in step) for by in ("by_kind", "by_line"))
    milliseconds = {kind: 1e3 * cycles / CLOCK for kind, cycles in kinds.items()}
    step_ms, tokens = sum(milliseconds.values()), config.batch_size * config.context
    evaluations = -(-config.max_steps // config.eval_every) if config.eval_every else 0  # one at the end as well
    evaluation_ms = config.eval_batches * 1e3 / CLOCK * sum(graph.by_kind.total() * graph.runs for graph in evaluation)
    return {
        "hbm_gib": max(graph.hbm for graph in (*step, *evaluation)) / 2**30,
        "graphs": [len(step), len(evaluation)],
        "donated": [sum(graph.donated) for graph in (*step, *evaluation)],
        "cycles": dict(kinds) | {"sum": kinds.total()},
        "ms": milliseconds | {"sum": step_ms},
        "tokens_per_s": 1e3 * tokens / step_ms,
        "mfu": 1e3 * tokens / step_ms * flops_per_token(config) / (cores * config.peak_tflops * 1e12),
        "hours": (config.max_steps * step_ms + evaluations * evaluation_ms) / 3.6e6,
        "lines": dict(lines.most_common(10)),
    }


# --- the report -------------------------------------------------------------------------------------------------------


def print_report(config, figures, step):
    tokens, ms, cycles = config.batch_size * config.context, figures["ms"], figures["cycles"]
    print(f"HBM per core      {figures['hbm_gib']:.2f} GiB of {HBM}")
    print(f"graphs            {figures['graphs'][0]} for a step, {figures['graphs'][1]} for an evaluation")
    for graph in step:
        print(f"    {graph.line:12}  {graph.runs} x {graph.by_kind.total() / 1e6:7.2f} M cycles, {graph.hbm / 2**30:5.2f} GiB, "
              f"{sum(graph.donated)} of {len(graph.donated)} inputs may be written over")
    print(f"\nestimate for a step of {tokens:,} tokens     M cycles      ms")
    for kind, name in (("compiler", "operations, by the compiler"), ("moved", "gather, scatter, sort, by bytes"),
                       ("flash", "flash attention, by bundles"), ("all_reduce", "all-reduce, by bytes"), ("sum", "sum")):
        if kind in ms:
            print(f"    {name:40} {cycles[kind] / 1e6:8.2f} {ms[kind]:7.1f}")
    print(f"tokens/s          {figures['tokens_per_s']:,.0f}\nMFU               {figures['mfu']:.1%}\n"
          f"whole run         {figures['hours']:.2f} hours, evaluations included\n"
          f"host_ms           {figures['host_ms']:.1f} on this machine, while the device computes"
          + ("" if figures["host_ms"] < ms["sum"] / 2 else ": more than half of its time, so it may have to wait"))
    print("\nmost expensive lines, forward and backward")
    for line, cycles_of_line in figures["lines"].items():
        name, _, number = line.partition(":")
        text = (ROOT / name).read_text().splitlines()[int(number) - 1].strip() if number else ""
        print(f"    {cycles_of_line / 1e6:7.2f} M  {line:20} {text[:90]}".rstrip())


def main():
    config = train.load_config(arguments.config, overrides)
    train.check_batch_size(config, cores)
    train.check_attention(config, "TPU")
    devices = topologies.get_topology_desc(arguments.topology, platform="tpu").devices
    host = alone(host_ms, config, cores, environment={"XLA_IR_DEBUG": "0", "XLA_HLO_DEBUG": "0", "CPU_NUM_DEVICES": "1"})
    bundles = None
    if config.attention == "flash":
        with tempfile.TemporaryDirectory() as directory:
            dump = f" --xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
            bundles = alone(count_bundles, config, arguments.topology,
                            environment={"LIBTPU_INIT_ARGS": os.environ["LIBTPU_INIT_ARGS"] + dump})
    step, evaluation = record(config, cores)
    graphs = *step, *evaluation
    if arguments.hlo:
        for i, graph in enumerate(graphs):
            write_file(Path(f"{arguments.hlo}.{i}"), graph.proto)
    started = time.perf_counter()
    print(f"{arguments.config} for {arguments.topology}, compiled by libtpu {installed('libtpu')}; nothing ran on a TPU",
          flush=True)
    with Progress(len(graphs), "graph", "compiling") as progress:
        for graph in graphs:
            try:
                text, graph.hbm = compile_graph(graph, devices)
            except jax.errors.JaxRuntimeError as error:
                progress.close()
                reason = str(error).split(" :: ")[0][:1000]
                sys.exit(f"does not compile: the graph that {graph.line} would run: {reason}. If it is the memory, a smaller "
                         "--micro_batch_size needs less")
            graph.by_kind, graph.by_line = cost(text, config, cores, bundles)
            progress.update()
    print(f"compiles          yes, in {time.perf_counter() - started:.0f} s")
    figures = estimate(config, cores, step, evaluation) | {"bundles": bundles, "host_ms": host}
    print_report(config, figures, step)
    if arguments.json:
        versions = {name: installed(name) for name in ("torch", "torch_xla", "jax", "libtpu")}
        settings = {"config": arguments.config, "overrides": overrides, "topology": arguments.topology}
        write_file(Path(arguments.json), json.dumps(settings | figures | {"versions": versions}, indent=1).encode() + b"\n")
    if figures["hbm_gib"] > HBM:
        sys.exit("does not fit; a smaller --micro_batch_size needs less")


if __name__ == "__main__":
    run_command(main)
