r"""attention="flash": causal attention as a TPU kernel, written in JAX's Pallas.

Read math_attention and rotate in model.py first: this computes the same. But the [T, T] scores
never reach the TPU's main memory (HBM). They live in VMEM, the core's on-chip memory, for a block
of queries at a time. All scores of a block fit, so the softmax is the plain one, and needs no
running maximum, unlike FlashAttention's. The backward pass computes the scores again. The rest of
its softmax is two numbers per query: the forward pass saves log(sum(exp(scores))), and the sum over
P * dP is a dot product of y and its gradient.

How the kernel is cut up. Pallas runs a *program* for each point of a *grid*: here for each window b
and each group g of 128 columns. A *BlockSpec* says which part of an array a program sees, and hands
it over as a *ref*: q_ref[...] reads that part into VMEM. Here the part is q[b, :, 128 g : 128
(g+1)].

A program sees 128 columns of all T tokens. The TPU calls them lanes: its vector unit has 128. With
K = 64 they are two heads:

                         lanes 0 .......... 63   64 ........... 127
                 t = 0   |       head 0       |       head 1       |
                 t = 1   |       head 0       |       head 1       |
                  ...    |                    |                    |

It takes the queries in blocks of Q. A block sees the N keys up to its own end; only among the last
Q of them do scores have to be masked (marked by a backslash; not to scale):

                         keys   0  Q  2Q 3Q
                 block 0       [\]
                 block 1       [   \]
                 block 2       [      \]
                 block 3       [         \]

The matrix unit multiplies 128 x 128, so two heads of 64 share the lanes. Moving each head to an
axis of its own would leave half of the lanes empty. Instead, to get the scores of head 0, the
kernel sets the lanes of head 1 to zero in q: zeros add nothing to a dot product, and the matrix
unit takes the same time with or without them.

Shapes:  B batch   T time   D width   K width of a head   L = 128 lanes
         H heads   Q queries in a block   N keys that the block sees
"""
import functools
import math

import torch

from nanoxla import versions
from nanoxla.errors import UserError

LANES = 128
BLOCK = 256  # queries. With fewer the matrix unit waits; with more, more work is masked out.
MOSAIC_FORMAT = 4  # of the lowered kernel: libtpu 0.0.17 reads up to 4, libtpu 0.0.21 up to 7
MAX_CONTEXT = 2_048  # blocks and heads are unrolled, and a longer program takes minutes to compile


def supports(config):
    """Whether the kernel fits a model: its heads fill groups of lanes, its context fills blocks."""
    return (LANES % (config.dim // config.n_heads) == 0 and config.dim % LANES == 0
            and config.context % LANES == 0 and config.context <= MAX_CONTEXT)


def check_attention(config, device_type):
    """Raises UserError if config.attention cannot run on this kind of device ("TPU", "CPU")."""
    if config.attention != "flash":
        return
    if device_type != "TPU":
        raise UserError(f"attention = 'flash' runs on a TPU and this is a {device_type}; "
                        "use --attention=math")
    if not supports(config):
        raise UserError(
            f"attention = 'flash' needs dim = {config.dim} and context = {config.context} to be "
            f"multiples of {LANES}, context to be at most {MAX_CONTEXT}, and dim / n_heads = "
            f"{config.dim // config.n_heads} to divide {LANES}; use --attention=math")
    found = versions.installed()
    tried = sorted({(each["jax"], each["libtpu"]) for each in versions.TRIED.values()})
    if (found["jax"], found["libtpu"]) not in tried:
        pairs = ", ".join(f"jax {jax} with libtpu {libtpu}" for jax, libtpu in tried)
        raise UserError(f"attention = 'flash' was tried with {pairs}; here are jax {found['jax']} "
                        f"and libtpu {found['libtpu']}. Use --attention=math, or: "
                        f"{versions.install_line(found)}")


@functools.cache
def kernels(K):
    """The two passes for heads of width K, as functions of JAX arrays:

        forward(q, k, v, cos, sin) -> y, log_sums
        backward(q, k, v, cos, sin, y, log_sums, dy) -> dq, dk, dv

    q, k, v, y and the gradients are [B, T, D]; cos and sin are [T, L], made by lane_tables.
    log_sums [B, H, 1, T] in float32: log(sum(exp(scores))) of each query.
    """
    import jax  # only now: torch_xla has to open the TPU first
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def iota(shape, axis):
        """The index along `axis`, for each element of an array."""
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def dot(a, b, axis_of_a, axis_of_b):
        return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())),
                                   preferred_element_type=jnp.float32)

    def matmul(a, b):  # a b
        return dot(a, b, 1, 0)

    def matmul_nt(a, b):  # a b^T
        return dot(a, b, 1, 1)

    def matmul_tn(a, b):  # a^T b
        return dot(a, b, 0, 0)

    def rotate(x, cos, sin):
        """rotate of model.py for x [T, L] in float32. The quarter turn exchanges the halves of each
        head; the minus sign of the quarter turn is part of sin, see lane_tables. With -sin it
        rotates the other way."""
        in_first_half = iota(x.shape, 1) % K < K // 2
        exchanged = jnp.where(in_first_half,
                              pltpu.roll(x, LANES - K // 2, 1), pltpu.roll(x, K // 2, 1))
        return x * cos + exchanged * sin

    def rotated(q_ref, k_ref, cos, sin):
        q, k = (rotate(ref[...].astype(jnp.float32), cos, sin) for ref in (q_ref, k_ref))
        return (q / math.sqrt(K)).astype(q_ref.dtype), k.astype(k_ref.dtype)

    def blocks(T):
        """For each block: its queries, the keys it sees, and for each head which of the lanes [Q,
        L] belong to it."""
        Q = math.gcd(T, BLOCK)
        head_of_lane = iota((Q, LANES), 1) // K
        lanes_of_heads = [head_of_lane == head for head in range(LANES // K)]
        for end in range(Q, T + 1, Q):
            yield slice(end - Q, end), slice(end), lanes_of_heads

    def scores(q, k):
        """q k^T, [Q, N], and -inf for a key later than the query. Those are among the last Q
        keys."""
        Q = len(q)
        allowed = iota((Q, Q), 1) <= iota((Q, Q), 0)  # key <= query
        diagonal = jnp.where(allowed, matmul_nt(q, k[-Q:]), -jnp.inf)
        return jnp.concatenate([matmul_nt(q, k[:-Q]), diagonal], 1) if len(k) > Q else diagonal

    def transposed_scores(q, k):
        """k q^T, [N, Q]: the same numbers the other way round."""
        Q = len(q)
        allowed = iota((Q, Q), 0) <= iota((Q, Q), 1)  # key <= query
        diagonal = jnp.where(allowed, matmul_nt(k[-Q:], q), -jnp.inf)
        return jnp.concatenate([matmul_nt(k[:-Q], q), diagonal], 0) if len(k) > Q else diagonal

    def rows(x):
        """x [Q, L] as [heads, K, Q]: queries along the lanes, as in transposed_scores."""
        return x.T.reshape(-1, K, len(x))

    # Forward, for the queries of a block:    S = q k^T,   P = softmax(S),   y = P v
    # The scores of all heads come first. So the matrix unit is busy during a softmax.

    def forward_program(q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, log_sums_ref):
        q, k = rotated(q_ref, k_ref, cos_ref[...], sin_ref[...])  # [T, L]
        v = v_ref[...]  # [T, L]
        for queries, keys, lanes_of_heads in blocks(len(q)):
            y = log_sums = jnp.zeros((len(lanes_of_heads[0]), LANES), jnp.float32)  # [Q, L]
            of_heads = [scores(jnp.where(lanes, q[queries], 0), k[keys])  # [Q, N]
                        for lanes in lanes_of_heads]
            for lanes, s in zip(lanes_of_heads, of_heads):
                shift = s.max(1, keepdims=True)  # [Q, 1]
                weights = jnp.exp(s - shift)
                denominator = weights.sum(1, keepdims=True)  # [Q, 1]
                y = jnp.where(lanes, matmul(weights.astype(v.dtype), v[keys]) / denominator, y)
                log_sums = jnp.where(lanes, shift + jnp.log(denominator), log_sums)
            y_ref[queries, :] = y.astype(y_ref.dtype)
            log_sums_ref[:, :, queries] = rows(log_sums)[:, :1]  # the same in all K rows

    # Backward, from dy:    dv = P^T dy     dP = dy v^T     dS = P * (dP - rowsum(P * dP))
    #                       dq = dS k       dk = dS^T q     rowsum(P * dP) = rowsum(y * dy)
    # The code computes S, P and dS transposed, as [N, Q]. So P^T dy and dS^T q are plain products,
    # and only dS k needs a transposition. Every block adds to dk and dv of all the keys it sees.

    def backward_program(q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, log_sums_ref, dy_ref,
                         dq_ref, dk_ref, dv_ref, dk_sum, dv_sum):
        cos, sin = cos_ref[...], sin_ref[...]
        q, k = rotated(q_ref, k_ref, cos, sin)  # [T, L]
        v, dy = v_ref[...], dy_ref[...]  # [T, L]
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)
        for queries, keys, lanes_of_heads in blocks(len(q)):
            dq = jnp.zeros((len(lanes_of_heads[0]), LANES), jnp.float32)  # [Q, L]
            y_dy = y_ref[queries, :].astype(jnp.float32) * dy[queries].astype(jnp.float32)
            row_sums = rows(y_dy).sum(1, keepdims=True)  # [heads, 1, Q]
            for head, lanes in enumerate(lanes_of_heads):
                head_q = jnp.where(lanes, q[queries], 0)  # [Q, L]
                head_dy = jnp.where(lanes, dy[queries], 0)  # [Q, L]
                s = transposed_scores(head_q, k[keys])  # [N, Q]
                p = jnp.exp(s - log_sums_ref[head, :, queries])
                dp = matmul_nt(v[keys], head_dy)  # [N, Q]
                ds = (p * (dp - row_sums[head])).astype(q.dtype)
                dv_sum[keys, :] += matmul(p.astype(q.dtype), head_dy)
                dk_sum[keys, :] += matmul(ds, head_q)
                dq = jnp.where(lanes, matmul_tn(ds, k[keys]), dq)
            dq = rotate(dq / math.sqrt(K), cos[queries], -sin[queries])
            dq_ref[queries, :] = dq.astype(dq_ref.dtype)
        dk_ref[...] = rotate(dk_sum[...], cos, -sin).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    def on_grid(program, *inputs, outputs, scratch=()):
        """Runs the program for each window and group of lanes of the [B, T, D] arrays. outputs:
        arrays with the shapes and dtypes of the results."""
        B, T, D = inputs[0].shape
        parts = {  # what a program sees of an array, by the array's dimensions
            2: pl.BlockSpec((T, LANES), lambda b, g: (0, 0)),  # cos and sin, the same for all
            3: pl.BlockSpec((None, T, LANES), lambda b, g: (b, 0, g)),
            4: pl.BlockSpec((None, LANES // K, 1, T), lambda b, g: (b, g, 0, 0)),  # log_sums
        }
        return pl.pallas_call(
            program, grid=(B, D // LANES), name=program.__name__,
            in_specs=[parts[x.ndim] for x in inputs],
            out_specs=[parts[len(x.shape)] for x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            scratch_shapes=[pltpu.VMEM((T, LANES), dtype) for dtype in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"),
                                                 vmem_limit_bytes=64 << 20),
        )(*inputs)

    def forward(q, k, v, cos, sin):
        B, T, D = q.shape
        log_sums = jax.ShapeDtypeStruct((B, D // K, 1, T), jnp.float32)
        return on_grid(forward_program, q, k, v, cos, sin, outputs=[q, log_sums])

    def backward(q, k, v, cos, sin, y, log_sums, dy):
        return on_grid(backward_program, q, k, v, cos, sin, y, log_sums, dy, outputs=[q, k, v],
                       scratch=[jnp.float32] * 2)

    return forward, backward


def lane_tables(cos, sin):
    """The tables [T, K] of model.py repeated for every head in the lanes, [T, L]. The sign of the
    quarter turn moves into sin."""
    K = cos.size(1)
    sign = torch.where(torch.arange(K, device=sin.device) < K // 2, -1.0, 1.0)
    return cos.repeat(1, LANES // K), (sin * sign).repeat(1, LANES // K)


@functools.cache
def exported(kernel, *shapes):
    """The kernel, lowered for a TPU and for arguments of these shapes, as a jax.export.Exported.
    What a TPU gets is then exactly what tools/compile_for_tpu.py compiles."""
    lower_without_tpu()
    import jax.export
    # Whoever calls the exported kernel does so on JAX's default device: the CPU.
    checks = [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(kernel), platforms=["tpu"], disabled_checks=checks)(*shapes)


def lower_without_tpu():
    """Lets JAX lower kernels for a TPU without opening it. To choose a format, JAX would ask the
    TPU's own libtpu how old it is. For that it would open the TPU a second time, while torch_xla
    holds it. So JAX gets no TPU, and a fixed format: the newest that all libtpu of
    nanoxla/versions.py read."""
    import jax
    from jax._src import cloud_tpu_init, tpu_custom_call
    jax.config.update("jax_platforms", "cpu")  # stronger than the variable JAX_PLATFORMS
    cloud_tpu_init.running_in_cloud_tpu_vm = False
    tpu_custom_call.get_ir_version = lambda context: MOSAIC_FORMAT


def call(kernel, *inputs):
    """kernel(*inputs) for XLA tensors, recorded as one operation. Returns a list of tensors."""
    device = inputs[0].device
    if device.type != "xla":
        raise RuntimeError(f'attention="flash" is a TPU kernel and the model is on "{device}"; '
                           'use attention="math"')
    from torch_xla.experimental.custom_kernel import (
        make_kernel_from_pallas,
        to_jax_shape_dtype_struct,
    )

    lowered = exported(kernel, *map(to_jax_shape_dtype_struct, inputs))
    outputs = [(x.shape, getattr(torch, x.dtype.name)) for x in lowered.out_avals]
    return make_kernel_from_pallas(lowered.call, lambda *_: outputs)(*inputs)


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, K, *inputs):
        ctx.K = K
        y, log_sums = call(kernels(K)[0], *inputs)
        ctx.save_for_backward(*inputs, y, log_sums)
        return y

    @staticmethod
    def backward(ctx, dy):
        dq, dk, dv = call(kernels(ctx.K)[1], *ctx.saved_tensors, dy)
        return None, dq, dk, dv, None, None


def flash_attention(q, k, v, cos, sin):
    """Causal attention of q, k, v [B, T, D], heads side by side, after rotating q and k by the
    tables cos and sin [T, K] of model.py. Returns [B, T, D]. See `supports` for the models it
    fits."""
    return FlashAttention.apply(cos.size(1), q, k, v, *lane_tables(cos, sin))
