"""The part of tools/doctor.py that runs on every core: an all-reduce, one step of the model with
each kind of attention, and timed steps of train.py.

    PJRT_DEVICE=CPU python tools/doctor_device.py     # computes the numbers of STORED anew: minutes

On a CPU it uses a small model, and the attention kernel as XLA's CPU compiler understands it.
"""
import dataclasses
import functools
import gc
import json
import math
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

import train
from model import Llama, flops_per_token
from nanoxla import flash_attention, tpu
from nanoxla.errors import UserError, first_line
from nanoxla.log import compilations

# The model for a CPU: as in config/demo.py, but its heads fill the lanes of the attention kernel.
SMALL = dict(vocab_size=4_096, dim=256, n_layers=2, n_heads=4, hidden_dim=512, context=256,
             batch_size=4, micro_batch_size=2, attention="math")
SHAPE = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "context", "rope_theta",
         "norm_eps")
SHARPEN = 2.0  # see first_step

# {shape: {dtype: (loss, gradient norm) of first_step}}, computed on a CPU with attention="math".
STORED = {
    (32_000, 768, 12, 12, 2_048, 1_024, 10_000.0, 1e-5): {  # config/fwedu_124m.py
        "float32": (10.55000, 4.49189), "bfloat16": (10.55007, 4.48381)},
    (4_096, 256, 2, 4, 512, 256, 10_000.0, 1e-5): {  # SMALL
        "float32": (8.39501, 2.44235), "bfloat16": (8.39507, 2.44195)},
}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """By what share two results may differ: of the loss, of the gradient's norm, and of the
    gradients of the projections to q, k and v (the length of the difference)."""
    loss: float
    norm: float
    gradient: float


# bfloat16 rounds each number by up to 1/512, and where it rounds differs between compilers. So the
# results differ by about as much as bfloat16 from float32. On a CPU that is, for fwedu_124m, 2e-5
# of the loss, 4e-4 of the norm and 3 % of the gradients. A kernel that turns q and k the wrong way
# changes their gradients by 100 %, one that scales scores by 1.1 by 13 %.
BFLOAT16 = Tolerance(loss=2e-4, norm=5e-3, gradient=0.1)
FLOAT32 = Tolerance(loss=1e-5, norm=1e-4, gradient=1e-3)

WARM_UP, TIMED = 3, 20  # steps


# --- a step with each kind of attention ---------------------------------------------------------


def first_step(config, attention):
    """The loss and the gradient's norm of the first step, and three vectors: the gradients of the
    projections to q, to k and to v, of all layers. From fixed weights, on a fixed window of random
    tokens, the same on every core: so the result is the same on any number of cores.

    At the start of a training run attention is nearly uniform, and a mistake in it hardly shows in
    the loss. So the weights of q and k are larger here."""
    config = dataclasses.replace(config, attention=attention, batch_size=xr.world_size(),
                                 micro_batch_size=1, grad_clip=0.0)
    model = Llama(config, seed=0)
    attentions = [block.self_attn for block in model.layers]
    with torch.no_grad():
        for each in attentions:
            each.q_proj.weight.mul_(SHARPEN)
            each.k_proj.weight.mul_(SHARPEN)
    model.to(torch_xla.device())
    optimizer = train.AdamW(model.parameters(), config)
    traced = train.TracedModel(model, config)
    torch_xla.sync()
    report = train.train_step(traced, optimizer, random_tokens(config, 1, seed=0), 0, stop=False)
    loss, norm, *_ = report.cpu().tolist()
    # The step has cleared the gradients, but after a first step the first moment is a share of it.
    projections = zip(*((each.q_proj, each.k_proj, each.v_proj) for each in attentions))
    gradients = [torch.cat([optimizer.state[layer.weight]["exp_avg"].cpu() for layer in layers])
                 for layers in projections]
    return loss, norm, gradients


def random_tokens(config, windows, seed):
    """[windows, context + 1]"""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(
        config.vocab_size, size=(windows, config.context + 1), dtype=np.int32))


def compare(config, say, stop_requested):
    """One step with math attention and with flash attention, against each other and against the
    stored values."""
    on_cpu = xr.device_type() == "CPU"
    tolerance = FLOAT32 if on_cpu and config.dtype == "float32" else BFLOAT16
    say("...", "compiling a step with attention=math")
    loss, norm, gradients = first_step(config, "math")
    gc.collect()  # the device's memory
    yield from compare_with_stored(config, loss, norm, tolerance)

    stop_requested()  # a sign of life
    if reason := why_no_flash(config):
        yield "note", f"flash: not tried, since {reason}"
    else:
        say("...", "compiling a step with attention=flash")
        call = as_on_a_cpu if on_cpu else flash_attention.call
        with mock.patch.object(flash_attention, "call", call):
            flash = first_step(config, "flash")
        gc.collect()
        yield from compare_with_math((loss, norm, gradients), flash, tolerance)


def why_no_flash(config):
    """Why the attention kernel is not tried, or None."""
    if not flash_attention.supports(config):
        return "the kernel does not fit this model"
    if xr.device_type() == "CPU":
        return None if find_spec("jax") else "jax is not installed"
    return None if config.attention == "flash" else "attention = 'math'"


def compare_with_stored(config, loss, norm, tolerance):
    stored = STORED.get(tuple(getattr(config, key) for key in SHAPE))
    here = f"math: loss {loss:.4f}, gradient norm {norm:.4f}"
    if not stored:
        yield "note", f"{here}; no values are stored for a model of this shape"
        return
    expected_loss, expected_norm = stored[config.dtype]
    there = f"on a CPU they were {expected_loss:.4f} and {expected_norm:.4f}"
    if (differs(loss, expected_loss, tolerance.loss)
            or differs(norm, expected_norm, tolerance.norm)):
        yield "wrong", (f"{here}; {there}: this machine computes something else. Install versions "
                        "that have been tried (above); if they are, do not train here, and report "
                        "this line")
    else:
        yield "ok", f"{here}; {there}"


def compare_with_math(math_, flash, tolerance):
    """math_, flash: results of first_step."""
    (loss, norm, gradients), (flash_loss, flash_norm, flash_gradients) = math_, flash
    shares = [((b - a).norm() / a.norm()).item() for a, b in zip(gradients, flash_gradients)]
    here = (f"flash: loss {flash_loss:.4f}, gradient norm {flash_norm:.4f}; the gradients of q, k, "
            f"v differ from those with math by {', '.join(f'{share:.2%}' for share in shares)}")
    if (differs(flash_loss, loss, tolerance.loss) or differs(flash_norm, norm, tolerance.norm)
            or not all(share <= tolerance.gradient for share in shares)):
        yield "wrong", (f"{here} (allowed: {tolerance.loss:.2%} of the loss, {tolerance.norm:.1%} "
                        f"of the norm, {tolerance.gradient:.1%} of the gradients): the attention "
                        "kernel is wrong here. Use --attention=math, and report this line")
    else:
        yield "ok", f"{here} ({tolerance.gradient:.1%} allowed)"


def differs(x, expected, tolerance):
    """Whether x differs from what was expected. nan always does."""
    return not abs(x - expected) <= tolerance * abs(expected)


def as_on_a_cpu(kernel, *inputs):
    """Stands in for flash_attention.call: the same kernel, by Pallas' interpreter, as an operation
    of the graph."""
    from torch_xla.experimental.custom_kernel import to_jax_shape_dtype_struct

    computation = interpreted(kernel, *map(to_jax_shape_dtype_struct, inputs))
    return torch_xla._XLAC._xla_user_computation("xla::attention", list(inputs), computation)


@functools.cache
def interpreted(kernel, *shapes):
    """The kernel as plain XLA operations, for arguments of these shapes."""
    import jax
    import torch_xla.core.xla_builder as xb
    from jax.experimental import pallas

    jax.config.update("jax_platforms", "cpu")
    call = functools.partial(pallas.pallas_call, interpret=True)
    with mock.patch.object(pallas, "pallas_call", call):
        lowered = jax.jit(kernel, keep_unused=True).lower(*shapes)
    proto = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xb.computation_from_module_proto("attention", proto)


# --- the other checks ---------------------------------------------------------------------------


def all_reduce(cores):
    """The sum over the cores of their numbers, counted from 1. cores: how many there should be."""
    numbers = torch.tensor([xr.global_ordinal() + 1.0, 1.0]).to(torch_xla.device())
    total = xm.all_reduce(xm.REDUCE_SUM, numbers)
    torch_xla.sync()
    total, answered = map(int, total.cpu().tolist())
    expected = answered * (answered + 1) // 2
    if answered != xr.world_size() or total != expected or answered < cores:
        yield "wrong", (f"all-reduce: {answered} of {cores} cores answered, and their numbers add "
                        f"up to {total} instead of {expected}. Restart the machine")
    else:
        yield "ok", f"all-reduce: {answered} core{'s' * (answered > 1)} answered"


def lower_kernels(config):
    """Both passes of the kernel, lowered for a TPU."""
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    K = config.dim // config.n_heads
    dtype = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
    x = jax.ShapeDtypeStruct((config.micro_batch_size, config.context, config.dim), dtype)
    table = jax.ShapeDtypeStruct((config.context, flash_attention.LANES), jnp.float32)
    forward, backward = flash_attention.kernels(K)
    inputs = x, x, x, table, table
    y, log_sums = flash_attention.exported(forward, *inputs).out_avals
    flash_attention.exported(backward, *inputs, y, log_sums, x)
    yield "ok", "kernel: jax lowers both passes of flash attention for a TPU"


def time_steps(config, figures, say, stop_requested):
    """TIMED steps of train.py with the config's batch, timed as train.py does: the report of a step
    is read after the next one has been started. Adds to the dict `figures`."""
    say("...", "compiling the step of this config")
    cores = xr.world_size()
    train.check_batch_size(config, cores)
    model = Llama(config, config.seed).to(torch_xla.device())
    optimizer = train.AdamW(model.parameters(), config)
    traced = train.TracedModel(model, config)
    torch_xla.sync()
    batch = random_tokens(config, config.batch_size // cores, seed=1 + xr.global_ordinal())
    report, host = None, 0.0
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            report.cpu()  # waits
            compiled, began = compilations()[0], time.perf_counter()
        stop_requested()
        before, previous = time.perf_counter(), report
        report = train.train_step(traced, optimizer, batch, step, stop=False)
        host += (time.perf_counter() - before) * (step >= WARM_UP)
        if step > WARM_UP:
            previous.cpu()
    loss, _, skipped, *_ = report.cpu().tolist()
    seconds = (time.perf_counter() - began) / TIMED
    compiled = compilations()[0] - compiled

    tokens_per_s = config.batch_size * config.context / seconds
    figures |= {"tokens_per_s": tokens_per_s, "step_ms": 1e3 * seconds,
                "host_ms": 1e3 * host / TIMED, "compiles": compiled, "hbm_gib": device_memory(),
                "mfu": None, "cores": cores}
    speed = (f"{TIMED} steps: {tokens_per_s:,.0f} tokens/s, {1e3 * seconds:.1f} ms a step, of "
             f"which Python takes {figures['host_ms']:.1f}")
    if xr.device_type() == "TPU" and (peak := tpu.peak_flops(config)):
        figures["mfu"] = tokens_per_s * flops_per_token(config) / (peak * cores)
        speed += f", MFU {figures['mfu']:.1%} of {peak / 1e12:g} TFLOP/s a core"
    if compiled:
        yield "wrong", (f"{speed}; but {compiled} graphs were compiled in between, and each takes "
                        "a minute of the run. Install versions that have been tried")
    elif skipped or not math.isfinite(loss):
        yield "wrong", (f"{speed}; but the loss is {loss} and {skipped:.0f} updates were skipped. "
                        "A chip computes wrongly, or the learning rate is far too high")
    else:
        yield "ok", f"{speed}; nothing was compiled"


def device_memory():
    """GiB of the device's memory that this process has used at most, or None if the device does not
    tell."""
    try:
        memory = xm.get_memory_info(torch_xla.device())
        return (memory.get("peak_bytes_used") or memory["bytes_used"]) / 2**30
    except (RuntimeError, KeyError):
        return None


def worker(config, real_config, cores, directory, stop_requested):
    """All of it, on every core. Core 0 prints the findings, and writes them and the figures to
    directory/findings.jsonl. A core that fails writes the reason to directory/failed."""
    from doctor import print_finding

    figures, is_writer = {}, xr.global_ordinal() == 0

    def say(*finding):
        if is_writer:
            print_finding(*finding)
            with Path(directory, "findings.jsonl").open("a") as file:
                file.write(json.dumps([*finding, figures]) + "\n")

    phases = {"all-reduce": lambda: all_reduce(cores),
              "kernel": lambda: lower_kernels(real_config),
              "a step with each attention": lambda: compare(config, say, stop_requested),
              "timed steps": lambda: time_steps(config, figures, say, stop_requested)}
    if xr.device_type() != "CPU" or why_no_flash(real_config):
        del phases["kernel"]  # on a TPU the step with flash attention lowers it
    for name, phase in phases.items():
        if stop_requested():
            return
        try:
            for finding in phase():
                say(*finding)
        except Exception as error:
            text = f"{name}: {type(error).__name__}: {first_line(error)}"
            try:
                with Path(directory, "failed").open("x") as file:  # the first core that fails
                    file.write(text)
            except FileExistsError:
                pass
            raise UserError(f"core {xr.global_ordinal()} failed") from None


def main():
    for shape in STORED:
        for dtype in ("float32", "bfloat16"):
            config = train.Config(**dict(zip(SHAPE, shape)), dtype=dtype)
            loss, norm, _ = first_step(config, "math")
            print(shape, dtype, (round(loss, 5), round(norm, 5)), flush=True)


if __name__ == "__main__":
    main()
