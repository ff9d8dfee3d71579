"""attention="flash": attention for the TPU, as a kernel in JAX's Pallas. Read math_attention in model.py first: this computes
the same, and the rotary embedding before it, but the [T, T] scores never reach the TPU's main memory (HBM).

A program of the grid has all queries, keys and values of one window and of as many heads as lie side by side in the 128 lanes
of the vector unit, as the projections left them: no head is moved to an axis of its own. It takes the queries in blocks, and a
block sees the keys up to its own end, so most of what lies above the diagonal is not computed. All scores of a block are in the
chip's own memory (VMEM) at once. So the softmax is the plain one, and the backward pass computes it again instead of reading
what the forward pass would have had to store. Heads are told apart by zeros in the lanes of the others: that costs the matrix
unit nothing, which multiplies 128 x 128 in any case.

Shapes:  B batch   T time   D dim   K width of a head   L = 128 lanes   Q queries in a block   N keys that a block sees
"""
import functools
import math

import torch

LANES = 128
BLOCK = 256  # queries: with fewer the matrix unit waits, with more it computes more that the causal mask throws away
LONGEST = 2_048  # context: blocks and heads are written out one after the other, and longer programs take minutes to compile


def supports(config):
    """Whether the kernel fits the model: whole groups of heads in the lanes, whole blocks of queries, and not too many."""
    return (LANES % (config.dim // config.n_heads) == 0 and config.dim % LANES == 0 and config.context % LANES == 0
            and config.context <= LONGEST)


@functools.cache
def kernels(K):
    """The two passes for heads of width K, as functions of JAX arrays: forward(q, k, v, cos, sin) -> y and
    backward(q, k, v, cos, sin, dy) -> dq, dk, dv. q, k, v, y are [B, T, D], cos and sin [T, L] as by lane_tables."""
    import jax  # not before torch_xla has taken hold of the TPU
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def iota(shape, axis):
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def dot(a, b, axis_of_a=1, axis_of_b=0):
        """Their product, summed over these axes in float32."""
        return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)

    def rotate(x, cos, sin):
        """As in model.py, but the quarter turn's sign is in sin; with -sin it turns back. x [T, L], float32."""
        turned = jnp.where(iota(x.shape, 1) % K < K // 2, pltpu.roll(x, LANES - K // 2, 1), pltpu.roll(x, K // 2, 1))
        return x * cos + turned * sin

    def rotated(q_ref, k_ref, cos, sin):
        q, k = (rotate(ref[...].astype(jnp.float32), cos, sin) for ref in (q_ref, k_ref))
        return (q / math.sqrt(K)).astype(q_ref.dtype), k.astype(k_ref.dtype)

    def blocks(T):
        """For each block its queries, the keys it sees, and for each head which lanes [Q, L] are its."""
        Q = math.gcd(T, BLOCK)
        head_of_lane = iota((Q, LANES), 1) // K
        for end in range(Q, T + 1, Q):
            yield slice(end - Q, end), slice(end), [head_of_lane == head for head in range(LANES // K)]

    def scores(q, k, key_axis):
        """q k^T [Q, N], or with key_axis 0 its transpose, and -inf where a query may not look: in the last Q keys."""
        Q = len(q)
        product = (lambda k: dot(q, k, 1, 1)) if key_axis else (lambda k: dot(k, q, 1, 1))
        allowed = iota((Q, Q), key_axis) <= iota((Q, Q), 1 - key_axis)
        diagonal = jnp.where(allowed, product(k[-Q:]), -jnp.inf)
        return jnp.concatenate([product(k[:-Q]), diagonal], key_axis) if len(k) > Q else diagonal

    def forward_program(q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref):
        q, k = rotated(q_ref, k_ref, cos_ref[...], sin_ref[...])  # [T, L]
        v = v_ref[...]  # [T, L]
        for queries, keys, heads in blocks(len(q)):
            y = jnp.zeros((len(heads[0]), LANES), jnp.float32)  # [Q, L]
            for lanes in heads:
                s = scores(jnp.where(lanes, q[queries], 0), k[keys], key_axis=1)  # [Q, N]
                weights = jnp.exp(s - s.max(1, keepdims=True))
                denominator = weights.sum(1, keepdims=True)  # [Q, 1]
                y = jnp.where(lanes, dot(weights.astype(v.dtype), v[keys]) / denominator, y)
            y_ref[queries, :] = y.astype(y_ref.dtype)

    def backward_program(q_ref, k_ref, v_ref, cos_ref, sin_ref, dy_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum):
        cos, sin = cos_ref[...], sin_ref[...]
        q, k = rotated(q_ref, k_ref, cos, sin)  # [T, L]
        v, dy = v_ref[...], dy_ref[...]  # [T, L]
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)
        for queries, keys, heads in blocks(len(q)):
            dq = jnp.zeros((len(heads[0]), LANES), jnp.float32)  # [Q, L]
            for lanes in heads:
                head_q, head_dy = jnp.where(lanes, q[queries], 0), jnp.where(lanes, dy[queries], 0)  # [Q, L]
                s = scores(head_q, k[keys], key_axis=0)  # [N, Q]: so that only ds has to be transposed, for dq
                weights = jnp.exp(s - s.max(0, keepdims=True))
                weights = weights / weights.sum(0, keepdims=True)
                dweights = dot(v[keys], head_dy, 1, 1)
                ds = weights * (dweights - (weights * dweights).sum(0, keepdims=True))  # the softmax's derivative
                ds = ds.astype(q.dtype)
                dv_sum[keys, :] += dot(weights.astype(q.dtype), head_dy)
                dk_sum[keys, :] += dot(ds, head_q)
                dq = jnp.where(lanes, dot(ds, k[keys], 0, 0), dq)
            dq_ref[queries, :] = rotate(dq / math.sqrt(K), cos[queries], -sin[queries]).astype(dq_ref.dtype)
        dk_ref[...] = rotate(dk_sum[...], cos, -sin).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    def on_grid(program, q, *others, outputs, scratch=()):
        """Runs program for each window and group of heads of the [B, T, D] arrays."""
        B, T, D = q.shape
        group = pl.BlockSpec((None, T, LANES), lambda b, g: (b, 0, g))
        table = pl.BlockSpec((T, LANES), lambda b, g: (0, 0))
        return pl.pallas_call(
            program, grid=(B, D // LANES), name=program.__name__, scratch_shapes=[pltpu.VMEM((T, LANES), t) for t in scratch],
            in_specs=[table if x.ndim == 2 else group for x in (q, *others)],
            out_specs=[group] * outputs, out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * outputs,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 << 20),
        )(q, *others)

    def forward(q, k, v, cos, sin):
        return on_grid(forward_program, q, k, v, cos, sin, outputs=1)[0]

    def backward(q, k, v, cos, sin, dy):
        return on_grid(backward_program, q, k, v, cos, sin, dy, outputs=3, scratch=[jnp.float32] * 2)

    return forward, backward


def lane_tables(cos, sin):
    """model.py's tables [T, K] for a whole row of lanes, [T, L]; the sign of the quarter turn goes into sin."""
    K = cos.size(1)
    sign = torch.where(torch.arange(K, device=sin.device) < K // 2, -1.0, 1.0)
    return cos.repeat(1, LANES // K), (sin * sign).repeat(1, LANES // K)


@functools.cache
def exported(kernel, *shapes):
    """kernel for a TPU and arguments of these shapes. jax.export writes kernels in the format of weeks ago; jax.jit in its
    newest, and jax 0.7.1's newest is too new for libtpu 0.0.21, which torch_xla 2.9.0 goes with."""
    import jax.export

    return jax.export.export(jax.jit(kernel), platforms=["tpu"])(*shapes).call


def call(kernel, outputs, q, *others):
    """kernel(q, *others) for tensors: an operation of the lazy graph, with so many outputs of q's shape and dtype."""
    if q.device.type != "xla":
        raise RuntimeError(f'attention="flash" is a TPU kernel and the model is on "{q.device}"; use attention="math"')
    from torch_xla.experimental.custom_kernel import make_kernel_from_pallas, to_jax_shape_dtype_struct

    kernel = exported(kernel, *map(to_jax_shape_dtype_struct, (q, *others)))
    return make_kernel_from_pallas(kernel, lambda q, *_: [(q.shape, q.dtype)] * outputs)(q, *others)


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, K, *inputs):
        ctx.K = K
        ctx.save_for_backward(*inputs)
        return call(kernels(K)[0], 1, *inputs)

    @staticmethod
    def backward(ctx, dy):
        dq, dk, dv = call(kernels(ctx.K)[1], 3, *ctx.saved_tensors, dy)
        return None, dq, dk, dv, None, None


def flash_attention(q, k, v, cos, sin):
    """Causal attention of q, k, v [B, T, D], heads one after the other, rotated by model.py's tables cos and sin [T, K].
    Returns [B, T, D]. For models that `supports` is true of."""
    return FlashAttention.apply(cos.size(1), q, k, v, *lane_tables(cos, sin))
