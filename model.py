"""A Llama, written by hand: RMSNorm, rotary embedding, causal attention, SwiGLU, untied head.

Read top to bottom: the leaves first, then a block, then the model. Parameter names are those of the Hugging Face
LlamaForCausalLM (which puts "model." before all but lm_head), so converting a checkpoint is a rename.

Shapes:  B batch   T time (tokens of a window)   S keys attended to (T, or the length of the cache)
         D dim (width)   H heads   K width of a head, D / H   F hidden_dim   V vocab_size

Precision: parameters are float32. The caller chooses the precision of the matrix products with torch.autocast;
norms, softmax, rotation and loss are computed in float32 whatever it chooses.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from flash_attention import flash_attention


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 32_000  # token ids are 0 .. vocab_size - 1
    dim: int = 768  # width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # attention heads; divides dim
    hidden_dim: int = 2_048  # width inside the SwiGLU
    context: int = 1_024  # tokens in a window; the longest the model can read
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    attention: str = "math"  # math: explicit scores, runs everywhere | flash: Pallas kernel, TPU only

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide dim={self.dim}")
        if (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim / n_heads = {self.dim // self.n_heads} is odd; the rotary embedding turns pairs")


def num_parameters(config):
    """Parameters of Llama(config), as (all, in_matmuls). The embedding is looked up and norms multiply elementwise:
    neither is a matrix product. For the reference shape: (134_105_856, 109_510_656)."""
    D, F_, V = config.dim, config.hidden_dim, config.vocab_size
    in_matmuls = config.n_layers * (4 * D * D + 3 * D * F_) + V * D  # q k v o, gate up down; the head
    norms = config.n_layers * 2 * D + D
    return V * D + in_matmuls + norms, in_matmuls


def flops_per_token(config):
    """Floating-point operations of forward + backward per trained token, counted as in the PaLM paper (appendix B):
    6 per matmul parameter, and 12 * T * D per layer for the scores and their product with the values, all T x T of
    them (the causal half that a kernel may skip is counted too)."""
    return 6 * num_parameters(config)[1] + 12 * config.n_layers * config.context * config.dim


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotary_tables(config):
    """cos and sin, [T, K] each, of the angle position * theta^(-2i/K); the K/2 angles are repeated, because
    dimension i turns together with dimension i + K/2 (the convention of the Hugging Face weights)."""
    K = config.dim // config.n_heads
    inverse_wavelength = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)  # [K/2]
    angles = torch.outer(torch.arange(config.context, dtype=torch.float32), inverse_wavelength)  # [T, K/2]
    angles = torch.cat((angles, angles), dim=-1)  # [T, K]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + K/2]) of x [B, H, T, K] by its position's angle (https://arxiv.org/abs/2104.09864)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)  # a quarter turn of every pair
    return (x * cos + turned * sin).to(x.dtype)


def math_attention(q, k, v, future):
    """softmax(q k^T / sqrt(K)) v with every score in the open. q [B, H, T, K], k and v [B, H, S, K],
    future [T, S] true where a query may not look -> [B, H, T, K]."""
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))  # [B, H, T, S]
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v  # [B, H, T, K]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.flash = config.attention == "flash"
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, cos, sin, future, remember):
        B, T, D = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, D], heads side by side
        if self.flash and remember is None:
            return self.o_proj(flash_attention(q, k, v, cos, sin))
        q, k, v = (y.view(B, T, self.n_heads, -1).transpose(1, 2) for y in (q, k, v))  # [B, H, T, K]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if remember is not None:
            k, v = remember(k, v)  # [B, H, S, K]: these keys and values, behind all earlier ones
        y = math_attention(q, k, v, future)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [B, T, F] inside


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, future, remember):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, future, remember)
        return x + self.mlp(self.post_attention_layernorm(x))


def cross_entropy(x, head, targets):
    """Mean of -log softmax(head(x))[target] in nats over all predictions: x [B, T, D], targets [B, T]."""
    x, targets = x.flatten(0, 1), targets.flatten()  # [N, D] and [N], N = B T
    with torch.no_grad():
        shift = (x * F.embedding(targets, head.weight)).sum(-1, keepdim=True) + 16  # [N, 1]
    return CrossEntropy.apply(head(x), targets, shift)


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits [N, V], targets [N]), for a TPU and a large V.

    Softmax is the same whatever is subtracted from a row of logits, but something must be, or exp overflows. Usually that is
    the row's largest logit, and to find it takes a pass over all logits after they are computed. `shift` [N, 1] is known
    before, so XLA sums up the exponentials while it multiplies: the target's logit, but for rounding, plus 16. So the sum has
    exp(-16) in it, which float32 holds as exactly as any number, and overflows only if a loss is above 104: then the mean is
    not finite.
    """

    @staticmethod
    def forward(ctx, logits, targets, shift):
        log_sum = (logits.float() - shift).exp().sum(-1, keepdim=True).log() + shift  # [N, 1]
        ctx.save_for_backward(logits, targets, log_sum)
        of_target = torch.where(is_target(logits, targets), logits.float(), 0.0).sum(-1)  # [N]
        return (log_sum[:, 0] - of_target).mean()

    @staticmethod
    def backward(ctx, dloss):
        logits, targets, log_sum = ctx.saved_tensors
        softmax = (logits.float() - log_sum).exp()
        return ((softmax - is_target(logits, targets).float()) * (dloss / len(logits))).to(logits.dtype), None, None


def is_target(logits, targets):
    """[N, V]: a comparison, which XLA computes on the way, where an index would have to reach into the logits."""
    return torch.arange(logits.size(-1), device=targets.device, dtype=targets.dtype) == targets[:, None]


class KVCache:
    """Keys and values of the tokens read so far, for generating one token at a time.

    Shapes never change and the position is a tensor (of shape [1]: a 0 or 1 without a dimension would be a constant of the
    graph), so XLA compiles one graph per number of new tokens, not one per position. Slots from `position` on hold stale
    values, which no query sees before they are overwritten: a prompt may be padded and `position` set back to its true length.
    """

    def __init__(self, config, batch_size, device, length=None):
        """length: tokens there is room for, at most the context, which is the default."""
        self.length = length or config.context
        shape = (batch_size, config.n_heads, self.length, config.dim // config.n_heads)  # [B, H, S, K]
        self.keys = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.position = torch.zeros(1, device=device, dtype=torch.long)  # where the next token goes

    def remember(self, layer, positions):
        """A function that stores k, v [B, H, T, K] of `layer` at `positions` [T] and returns all, [B, H, S, K]."""
        def store(k, v):
            return self.keys[layer].index_copy_(2, positions, k), self.values[layer].index_copy_(2, positions, v)
        return store


class Llama(nn.Module):
    """Llama(config, seed): weights normal with deviation 0.02, norms 1, drawn on the CPU from a generator of their own,
    so that every core of every run starts from the same weights (torch.manual_seed does not reach an XLA device)."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # [T, K]
        self.register_buffer("sin", sin, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens, targets=None, cache=None):
        """tokens [B, T], integers below vocab_size.

        Training and evaluation: with targets [B, T], returns the mean cross-entropy in nats, a float32 scalar.
        Otherwise returns logits [B, T, V]; with a cache, tokens continue what the cache holds and are added to it.
        XLA clamps an id that is out of range instead of raising: whoever reads the data has to check it.
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.lm_head(x)  # [B, T, V]
        return cross_entropy(x, self.lm_head, targets)

    def hidden(self, tokens, cache=None):
        """What the head makes logits of, [B, T, D]. Arguments as above."""
        T = tokens.size(1)
        if cache is None:
            positions = torch.arange(T, device=tokens.device)  # [T]
            key_positions = positions  # S = T
            cos, sin = self.cos[:T], self.sin[:T]  # [T, K]
        else:
            positions = cache.position + torch.arange(T, device=tokens.device)
            key_positions = torch.arange(cache.length, device=tokens.device)  # S = the cache's length
            cos, sin = self.cos[positions], self.sin[positions]
        future = key_positions > positions[:, None]  # [T, S]: a query sees itself and what came before

        x = self.embed_tokens(tokens)  # [B, T, D]
        for i, block in enumerate(self.layers):
            remember = None if cache is None else cache.remember(i, positions)
            x = block(x, cos, sin, future, remember)
        if cache is not None:
            cache.position = cache.position + T
        return self.norm(x)
