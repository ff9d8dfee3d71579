"""How good is the estimate of compile_for_tpu.py? Compares it with times that others measured on a
TPU and published.

    python tools/check_estimate.py            # ten minutes; needs what compile_for_tpu.py needs

Two kinds of programs, all on one chip and in bfloat16:

  product     n x n x n, by XLA. On a v5e: https://docs.jax.dev/en/latest/pallas/tpu/matmul.html. On
              a v6e: https://vorushin.github.io/blog/llm-pretraining-tpu-v6e-50usd. These times
              contain a start from Python, about 0.1 ms: a product of 1,024 took 0.12 ms on the v5e,
              one of 256 took 0.15 ms on the v6e.
  train step  131,072 tokens, from the same blog; the code is 08_tpu_ablations.py, revision 38, of
              https://github.com/vorushin/tpuchat. This file has an equivalent program: 8 layers of
              width 1,024; 4 heads of 256, which share keys and values; AdamW; 16 micro-batches. The
              loss computes its logits twice, in 8 chunks. The compiler has no estimate for the
              attention kernel (JAX's splash attention). Only its products are counted, at the
              chip's peak, so the whole estimate is too low rather than too high.

They were measured with other versions of libtpu than this one.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from compile_for_tpu import set_environment
from jax._src.interpreters import mlir
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from tpu_costs import chips_of, compile_module, count_cycles

from nanoxla.errors import run_command
from nanoxla.flash_attention import lower_without_tpu
from nanoxla.processes import call_in_new_process
from nanoxla.tpu import KINDS

TRAIN_STEP = "train step"
PUBLISHED = {  # ms
    "v5e": {4_096: 0.82729, 8_192: 6.04715, TRAIN_STEP: 1e3 * 131_072 / 148_829},
    "v6e": {8_192: 1.72, TRAIN_STEP: 1e3 * 131_072 / 433_606}}

LAYERS, D, HEADS, K, HIDDEN, VOCABULARY = 8, 1_024, 4, 256, 3_072, 32_768
T, WINDOWS, MICRO_BATCHES, CHUNKS, BLOCK = 2_048, 4, 16, 8, 1_024


# --- the train step -----------------------------------------------------------------------------


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def weights():
    layer = dict(q=array(D, HEADS, K), k=array(D, 1, K), v=array(D, 1, K), o=array(HEADS, K, D),
                 gate=array(D, HIDDEN), up=array(D, HIDDEN), down=array(HIDDEN, D))
    return dict(embed=array(VOCABULARY, D), head=array(D, VOCABULARY), layers=[layer] * LAYERS)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotate(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)


def attention(q, k, v):
    blocks = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq",
                            "block_kv_dq"), BLOCK)
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * HEADS)
    return jax.vmap(splash.make_splash_mha(mask, block_sizes=splash.BlockSizes(**blocks),
                                           head_shards=1, q_seq_shards=1))(q, k, v)


def block(w, x, cos, sin):
    """x: [WINDOWS, T, D]"""
    h = norm(x)
    q, k, v = (jnp.einsum("btd,dhk->bhtk", h, w[name]) for name in "qkv")
    q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
    x += jnp.einsum("bhtk,hkd->btd", attention(q, k, v), w["o"])
    h = norm(x)
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


@jax.checkpoint  # the backward pass computes the logits again
def chunk_loss(x, head, targets):
    """The sum over tokens x [n, D]; the logits are capped."""
    logits = 15 * jnp.tanh(x @ head / 15)
    logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    target_logits = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return (jnp.log(jnp.exp(logits).sum(-1)) - target_logits).sum()


def loss(w, tokens, targets):
    angles = jnp.outer(jnp.arange(T, dtype=jnp.float32), 10_000 ** (-jnp.arange(0, K, 2) / K))
    cos, sin = (f(angles).astype(jnp.bfloat16) for f in (jnp.cos, jnp.sin))
    x = norm(w["embed"][tokens])
    for layer in w["layers"]:
        x = block(layer, x, cos, sin)
    x, targets = (jnp.split(each, CHUNKS) for each in (norm(x).reshape(-1, D), targets.ravel()))
    return sum(chunk_loss(a, w["head"], b) for a, b in zip(x, targets)) / (WINDOWS * T)


def micro_batch(sums, w, tokens, targets):
    """Adds the gradients to their sums."""
    return jax.tree.map(jnp.add, sums, jax.grad(loss)(w, tokens, targets))


def update(sums, w, first, second, lr, correction1, correction2):
    """AdamW. lr and both corrections: scalars."""
    tree = jax.tree.map
    sums = tree(lambda g: g / MICRO_BATCHES, sums)
    first = tree(lambda m, g: 0.9 * m + 0.1 * g, first, sums)
    second = tree(lambda v, g: 0.95 * v + 0.05 * g * g, second, sums)
    w = tree(lambda p, m, v: p - lr * (m / correction1 / (jnp.sqrt(v / correction2) + 1e-8)
                                       + 0.1 * p), w, first, second)
    return tree(jnp.zeros_like, sums), w, first, second


# --- its estimate -------------------------------------------------------------------------------


def milliseconds(kind, function, *shapes, donated=()):
    """The estimate for function(arrays of these shapes), without its attention kernels."""
    lowered = jax.jit(function, donate_argnums=donated).trace(*shapes).lower(
        lowering_platforms=("tpu",))
    executable = compile_module(mlir.module_to_bytecode(lowered.compiler_ir()),
                                chips_of(f"{kind}:1x1"))
    by_kind, _ = count_cycles(executable.hlo_modules()[0].to_string(), KINDS[kind], 1, (0, 0))
    return 1e3 * by_kind.total() / KINDS[kind].clock


def estimates(kind):
    """{program: ms}"""
    lower_without_tpu()
    found = {n: milliseconds(kind, jnp.matmul, array(n, n), array(n, n))
             for n in PUBLISHED[kind] if n != TRAIN_STEP}

    tokens, scalar = array(WINDOWS, T, dtype=jnp.int32), array()
    # Of the blocks of scores, three of four are not masked. There are 2 products forward, and in
    # the two kernels of the backward pass 3 and 4.
    flops = 9 * 2 * 0.75 * T * T * K * HEADS * WINDOWS * LAYERS
    each = milliseconds(kind, micro_batch, weights(), weights(), tokens, tokens, donated=[0])
    at_the_end = milliseconds(kind, update, *[weights()] * 4, *[scalar] * 3, donated=[0, 1, 2, 3])
    found[TRAIN_STEP] = MICRO_BATCHES * (each + 1e3 * flops / KINDS[kind].peak) + at_the_end
    return found


def main():
    print("| program | chip | measured, ms | estimated, ms | measured / estimated |\n"
          "|---|---|---|---|---|")
    for kind, published in PUBLISHED.items():
        set_environment(kind, 1)
        estimated = call_in_new_process(estimates, kind)  # libtpu reads the environment once
        for program, measured in published.items():
            name = program if program == TRAIN_STEP else f"product, n = {program:,}"
            print(f"| {name} | {kind} | {measured:.3g} | {estimated[program]:.3g} | "
                  f"{measured / estimated[program]:.2f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
