"""The TPU's attention kernel against math_attention, in Pallas' interpreter for TPU kernels."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from model import Llama, ModelConfig, math_attention, rotary_tables, rotate
from nanoxla import flash_attention
from nanoxla.flash_attention import kernels, lane_tables
from train import load_config


def to_jax(x):
    x, dtype = x.detach(), jnp.bfloat16 if x.dtype == torch.bfloat16 else None
    return jnp.asarray(x.float().numpy(), dtype)


def to_torch(x):
    dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
    return torch.from_numpy(np.array(x.astype(jnp.float32))).to(dtype)


def interpret(kernel, *inputs):
    """Stands in for flash_attention.call."""
    with pltpu.force_tpu_interpret_mode():
        results = kernel(*map(to_jax, inputs))
    return tuple(map(to_torch, results))


def reference(q, k, v, dy, n_heads, cos, sin):
    """y, dq, dk, dv of the attention that model.py computes with attention="math"."""
    B, T, D = q.shape
    q, k, v = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = (x.view(B, T, n_heads, -1).transpose(1, 2) for x in leaves)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = math_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
    y = y.transpose(1, 2).reshape(B, T, D)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def relative_error(x, exact):
    return ((x - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("n_heads, dim, context", [
    (12, 768, 1_024),  # config/fwedu_124m.py
    (4, 256, 384),  # blocks of 128 queries
    (2, 256, 512),  # one head fills the lanes
    (8, 256, 256),  # four heads in the lanes, one block
])
def test_the_kernel_equals_math_attention(n_heads, dim, context):
    """The output and the gradients, in float32, and in bfloat16 within its rounding."""
    cos, sin = rotary_tables(ModelConfig(dim=dim, n_heads=n_heads, context=context))
    draw = torch.Generator().manual_seed(0)
    # 1.5: so that attention is far from uniform
    inputs = [1.5 * torch.randn(1, context, dim, generator=draw) for _ in range(4)]
    forward, backward = kernels(dim // n_heads)
    exact = reference(*inputs, n_heads, cos, sin)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k, v, dy = (x.to(dtype) for x in inputs)
        tables = lane_tables(cos, sin)
        y, log_sums = interpret(forward, q, k, v, *tables)
        found = y, *interpret(backward, q, k, v, *tables, y, log_sums, dy)
        for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, exact):
            assert ours.dtype == dtype
            assert relative_error(ours.float(), theirs) < tolerance, name


def test_a_model_with_flash_attention_equals_one_with_math_attention(monkeypatch):
    """Loss and every gradient: so model.py passes to the kernel what the kernel expects."""
    monkeypatch.setattr(flash_attention, "call", interpret)
    config = ModelConfig(vocab_size=97, dim=128, n_heads=2, n_layers=2, hidden_dim=96, context=256,
                         attention="flash")
    flash = Llama(config, seed=1)
    plain = Llama(dataclasses.replace(config, attention="math"), seed=1)
    tokens = torch.randint(0, 97, (2, 257), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger weights: uniform attention would hide a mistake in it
        for p, q in zip(flash.parameters(), plain.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
            q.copy_(p)
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (flash, plain)]
    assert relative_error(*losses) < 1e-6
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(flash.named_parameters(), plain.parameters()):
        assert relative_error(p.grad, q.grad) < 1e-5, name


@pytest.mark.parametrize("changes, fits", [
    ({}, True), ({"n_heads": 6}, True), ({"n_heads": 24}, True), ({"context": 128}, True),
    ({"context": 2_048}, True), ({"context": 4_096}, False), ({"n_heads": 16}, False),
    ({"n_heads": 3}, False), ({"context": 1_000}, False), ({"dim": 192, "n_heads": 3}, False),
])
def test_which_models_the_kernel_supports(changes, fits):
    config = dataclasses.replace(load_config("config/fwedu_124m.py"), **changes)
    assert flash_attention.supports(config) == fits
