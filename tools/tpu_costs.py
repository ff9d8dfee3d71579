"""Compiles recorded graphs (tpu_graphs.py) with libtpu, and adds up their memory and cycles.

compile_for_tpu.py explains what the estimate includes and leaves out.
"""
import collections
import math
import os
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies

from model import flops_per_token
from nanoxla import flash_attention
from nanoxla.processes import call_in_new_process

# --- compiling ----------------------------------------------------------------------------------


def compile_graph(graph, topology):
    """Compiles a Graph for all chips of a topology, such as "v5e:2x4". Returns the optimised HLO as
    text, and the bytes of HBM in use while the graph runs. Raises jax.errors.JaxRuntimeError if it
    does not compile."""
    executable = compile_module(stable_hlo(graph), chips_of(topology))
    memory = executable.get_compiled_memory_stats()
    own_bytes = (memory.argument_size_in_bytes + memory.output_size_in_bytes
                 - memory.alias_size_in_bytes + memory.temp_size_in_bytes
                 + memory.generated_code_size_in_bytes)
    return executable.hlo_modules()[0].to_string(), own_bytes + graph.other_bytes


def chips_of(topology):
    """The chips of a topology, as JAX devices."""
    # One chip per host, because libtpu by default wants four, and refuses 1x1.
    return topologies.get_topology_desc(topology, platform="tpu",
                                        chips_per_host_bounds=[1, 1, 1]).devices


def compile_module(module, devices):
    """Compiles StableHLO bytecode for these devices, one replica on each."""
    options = xla_client.CompileOptions()
    build = options.executable_build_options
    options.num_replicas = build.num_replicas = len(devices)
    options.num_partitions = build.num_partitions = 1
    replicas = np.arange(len(devices)).reshape(-1, 1)
    options.device_assignment = xla_client.DeviceAssignment.create(replicas)
    return devices[0].client.compile(
        module, executable_devices=xla_client.DeviceList(tuple(devices)), compile_options=options)


def stable_hlo(graph):
    """The Graph in the form that the compiler takes, with its donated inputs marked."""
    text = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(graph.proto))
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        main, = (operation for operation in module.body.operations
                 if getattr(operation, "name", None) and operation.name.value == "main")
        donated = ir.DictAttr.get({"jax.buffer_donor": ir.BoolAttr.get(True)})
        kept = ir.DictAttr.get({})
        main.arg_attrs = ir.ArrayAttr.get([donated if d else kept for d in graph.donated])
        return mlir.module_to_bytecode(module)


# --- counting cycles ----------------------------------------------------------------------------


def count_cycles(hlo, chip, cores, attention):
    """The cycles of one run of a compiled graph, as two Counters: by kind and by source line.

    hlo: optimised HLO as text, one instruction per line, such as

        %fusion.7 = bf16[8192,768]{1,0} fusion(%p.1, %p.2), metadata={op_name="model.py_145.2/dot"},
            backend_config={"estimated_cycles":"70610"}

    chip: one of nanoxla/tpu.py's KINDS. attention: the cycles of its kernel for a layer, forward
    and backward; None if there is none."""
    by_kind, by_line = collections.Counter(), collections.Counter()
    sizes = {}  # {name of an instruction: bytes of its results}
    for instruction in hlo[hlo.index("\nENTRY "):].splitlines():
        match = re.match(r"\s+(?:ROOT )?(%\S+) = (.*?) ([a-z-]+)\((.*?)\)", instruction)
        if not match:
            continue
        name, results, opcode, operands = match.groups()
        sizes[name] = num_bytes(results)
        line = source_line(instruction)
        if estimated := re.search(r'"estimated_cycles":"(\d+)"', instruction):
            kind, cycles = "compiler", float(estimated[1])
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction:
            kind, line = "flash", "flash_attention.py"
            backward = results.count("[") == 3  # dq, dk and dv; forward has two results
            cycles = attention[backward]
        elif opcode in ("all-reduce", "all-reduce-start"):
            sent = 2 * (cores - 1) / cores * sizes[name]
            kind, cycles = "all_reduce", chip.clock * sent / chip.link
        elif opcode in ("fusion", "gather", "scatter", "sort"):
            inputs = [sizes.get(operand, 0) for operand in re.findall(r"%[\w.-]+", operands)]
            kind, cycles = "moved", chip.clock * moved_bytes(sizes[name], inputs) / chip.memory
        elif opcode == "while":
            raise NotImplementedError("the graph has a loop; its body would be counted only once")
        else:
            continue
        by_kind[kind] += cycles
        by_line[line] += cycles
    return by_kind, by_line


def moved_bytes(result, inputs):
    """The bytes that a gather, scatter or sort reads and writes. result, inputs: sizes in bytes.

    A gather reads from a table, its first input, only the rows that are its result. A scatter also
    has an input of rows to add to its table; it reads and writes only these rows there, in place.
    A sort is small, and counts as a gather."""
    others = inputs[1:]
    is_scatter = len(others) > 1 and result == inputs[0]
    return sum(others) + 2 * (max(others) if is_scatter else result)


def source_line(instruction):
    """The source line that SourceLines named an instruction after. A fusion of several operations
    has the name of the last one."""
    name = re.search(r'op_name="([^"]*)"', instruction)
    lines = re.findall(r"(\w+\.py)_(\d+)", name[1]) if name else []
    return ":".join(lines[-1]) if lines else "all-reduce and others without a line"


def num_bytes(shapes):
    """The size of all arrays in an HLO type, such as (f32[8,128]{1,0}, bf16[2])."""
    widths = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
    return sum(widths.get(dtype, 4) * math.prod(int(side) for side in sides.split(",") if side)
               for dtype, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes))


# --- the attention kernels ----------------------------------------------------------------------


def kernel_cycles(config, bundles):
    """The cycles of both kernels for a layer of a micro-batch: a program for each window and each
    128 lanes of heads. bundles: as kernel_bundles counts them."""
    programs = config.micro_batch_size * config.dim // flash_attention.LANES
    return [programs * each for each in bundles]


def kernel_bundles(config, topology):
    """The cycles of the forward and the backward kernel of flash_attention.py, for one program: a
    window and 128 lanes of heads. A program needs a cycle for each instruction bundle, or the time
    of the busiest matrix unit, if that is longer."""
    # libtpu learns where to dump when it is loaded, so load it in a new process.
    with tempfile.TemporaryDirectory() as directory:
        dump = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environment = {"LIBTPU_INIT_ARGS": f"{os.environ['LIBTPU_INIT_ARGS']} {dump}"}
        return call_in_new_process(compile_kernels, config, topology, directory,
                                   environment=environment)


def compile_kernels(config, topology, directory):
    """Compiles both kernels, and counts the bundles in libtpu's dump in `directory`."""
    T, L = config.context, flash_attention.LANES
    devices = chips_of(topology)[:1]
    group = jax.ShapeDtypeStruct((1, T, L), config.dtype)  # of q, k, v and dy
    table = jax.ShapeDtypeStruct((T, L), "float32")  # of cosines and sines
    inputs = group, group, group, table, table

    def count_bundles(kernel, *shapes):
        with mlir.make_ir_context():
            module = ir.Module.parse(flash_attention.exported(kernel, *shapes).mlir_module())
            compile_module(mlir.module_to_bytecode(module), devices)
        dump, = (path for path in Path(directory).glob("*-final_bundles.txt")
                 if kernel.__name__ in path.name and "schedule-analysis" not in path.name)
        text = dump.read_text()
        bundles = len(re.findall(r"^ *0x[0-9a-f]+ ", text, re.MULTILINE))
        # On a v5e, a vmatmul passes 16 rows of bfloat16 through one matrix unit, a row in a cycle.
        # The scheduler starts them faster than that, so the unit may take longer than the bundles.
        # (A v6e's products have another name, and their rate is not published.)
        of_units = collections.Counter(re.findall(r"vmatmul\.bf16\S*\.mxu(\d)", text))
        return max(bundles, 16 * max(of_units.values(), default=0))

    forward, backward = flash_attention.kernels(config.dim // config.n_heads)
    y, log_sums = flash_attention.exported(forward, *inputs).out_avals
    return [count_bundles(forward, *inputs), count_bundles(backward, *inputs, y, log_sums, group)]


# --- the estimate -------------------------------------------------------------------------------


def estimate(config, chip, cores, step, evaluation):
    """The figures of the report, as a dict. step, evaluation: lists of compiled Graphs."""
    cycles = add_up(step, "by_kind")
    total = sum(cycles.values())
    milliseconds = {kind: 1e3 * count / chip.clock for kind, count in cycles.items()}
    seconds, tokens = total / chip.clock, config.batch_size * config.context
    flops = tokens * flops_per_token(config)
    batch_seconds = sum(add_up(evaluation, "by_kind").values()) / chip.clock
    # Every eval_every steps, and at the end.
    evaluations = math.ceil(config.max_steps / config.eval_every) if config.eval_every else 0
    run_seconds = config.max_steps * seconds + evaluations * config.eval_batches * batch_seconds
    return {
        "hbm_gib": max(graph.hbm_bytes for graph in (*step, *evaluation)) / 2**30,
        "graphs": [len(step), len(evaluation)],
        "donated": [sum(graph.donated) for graph in (*step, *evaluation)],
        "cycles": cycles | {"sum": total},
        "ms": milliseconds | {"sum": 1e3 * seconds},
        "tokens_per_s": tokens / seconds,
        "mfu": flops / seconds / (cores * (1e12 * config.peak_tflops or chip.peak)),
        "hours": run_seconds / 3600,
        "lines": dict(add_up(step, "by_line").most_common(10)),
    }


def add_up(graphs, attribute):
    """The sum of a Counter of all graphs, over all their runs."""
    total = collections.Counter()
    for graph in graphs:
        for key, cycles in getattr(graph, attribute).items():
            total[key] += graph.runs * cycles
    return total
