"""A Llama, written by hand: RMSNorm, rotary embedding, causal attention, SwiGLU, untied head.

Read it from top to bottom: the config, the layers, a block, the loss, the model. Parameters have
the names of Hugging Face's LlamaForCausalLM, without its prefix "model.". So converting a
checkpoint is a rename.

Shapes:  B  batch                T  time: tokens in a window     D  width of the residual stream
         H  attention heads      K  width of a head, D / H       V  vocabulary
         M  width of the SwiGLU  S  keys: T, or the length of the cache

Precision: parameters are float32. With torch.autocast the caller chooses the precision of the
matrix products and of the residual stream. Norms, rotation, softmax and loss are always computed in
float32.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanoxla.config import POSITIVE, at_least, between, key, one_of, session_key
from nanoxla.errors import UserError
from nanoxla.flash_attention import flash_attention
from nanoxla.shards import MAX_VOCAB_SIZE


@dataclass(frozen=True)
class ModelConfig:
    # A key is a line: type, default, the meaning that --help shows, the values allowed. The value
    # of a session_key may change when a run is resumed; all other keys define the run.
    vocab_size: int = key(32_000, "token ids are 0 .. vocab_size - 1",
                          between(2, MAX_VOCAB_SIZE, "shards are uint16"))
    dim: int = key(768, "width of the residual stream", at_least(1))
    n_layers: int = key(12, "number of blocks", at_least(1))
    n_heads: int = key(12, "attention heads; divides dim", at_least(1))
    hidden_dim: int = key(2_048, "width inside the SwiGLU", at_least(1))
    context: int = key(1_024, "tokens in a window: the longest text the model reads", at_least(1))
    rope_theta: float = key(10_000.0, "base of the rotary frequencies", POSITIVE)
    norm_eps: float = key(1e-5, "added to the mean square in RMSNorm", POSITIVE)
    attention: str = session_key("math", "math: explicit scores, runs everywhere | "
                                         "flash: a kernel, TPU only", one_of("math", "flash"))

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide dim={self.dim}")
        if (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim / n_heads = {self.dim // self.n_heads} is odd; "
                             "the rotary embedding turns pairs")


def num_parameters(config):
    """The number of parameters of Llama(config), and how many of them are in matrix products.

    The embedding is a lookup and the norms multiply elementwise, so neither counts as a product.
    For config/fwedu_124m.py: (134_105_856, 109_510_656)."""
    D, M, V = config.dim, config.hidden_dim, config.vocab_size
    block = 4 * D * D + 3 * D * M  # q, k, v, o; gate, up, down
    in_matmuls = config.n_layers * block + V * D  # the blocks and the head
    norms = config.n_layers * 2 * D + D
    return V * D + in_matmuls + norms, in_matmuls


def flops_per_token(config):
    """Floating-point operations of forward and backward per trained token, as in the PaLM paper
    (https://arxiv.org/abs/2204.02311, appendix B).

    6 per parameter in a matrix product, and 12 T D per layer for the T x T scores and their product
    with the values. The half above the diagonal counts too, even where a kernel skips it."""
    return 6 * num_parameters(config)[1] + 12 * config.n_layers * config.context * config.dim


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arxiv.org/abs/1910.07467).
    Computed in float32; the result has the format of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y.to(x.dtype)


def rotary_tables(config):
    """The cosines and sines of the angles position * theta^(-2i / K), [T, K] each.

    There are K / 2 different angles, and each appears twice: dimension i turns together with
    dimension i + K / 2, as in the Hugging Face weights. (The paper pairs neighbours.)"""
    K = config.dim // config.n_heads
    frequencies = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)  # [K/2]
    positions = torch.arange(config.context, dtype=torch.float32)  # [T]
    angles = torch.outer(positions, frequencies)  # [T, K/2]
    angles = torch.cat((angles, angles), dim=-1)  # [T, K]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + K/2]) of x [B, H, T, K] by the angle of its position
    (https://arxiv.org/abs/2104.09864)."""
    first, second = x.float().chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return (x * cos + quarter_turn * sin).to(x.dtype)


def math_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(K)) v. q [B, H, T, K], k and v [B, H, S, K]; mask [T, S] is true where a
    query may not look. Returns [B, H, T, K]."""
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))  # [B, H, T, S]
    weights = scores.masked_fill(mask, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v  # [B, H, T, K]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_heads, self.layer = config.n_heads, layer
        self.flash = config.attention == "flash"
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        B, T, D = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, D], heads side by side
        if self.flash and cache is None:
            # The kernel rotates q and k, and masks by itself. It takes the width of a head from
            # cos.
            return self.o_proj(flash_attention(q, k, v, cos, sin))
        q, k, v = (x.view(B, T, self.n_heads, -1).transpose(1, 2) for x in (q, k, v))  # B, H, T, K
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, H, S, K]: the whole cache
        y = math_attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # inside: [B, T, M]


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def next_token_loss(x, head, targets):
    """The mean of -log softmax(head(x))[target] in nats. x [B, T, D], targets [B, T]."""
    x, targets = x.flatten(0, 1), targets.flatten()  # [N, D] and [N], where N = B T
    with torch.no_grad():
        target_logits = (x * F.embedding(targets, head.weight)).sum(-1, keepdim=True)  # [N, 1]
    return ShiftedCrossEntropy.apply(head(x), targets, target_logits + 16)


class ShiftedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits [N, V], targets [N]); faster when V is large, by the TPU compiler's
    estimate.

    The loss of a row is log(sum(exp(logits))) - logits[target]. The exponentials may overflow, so
    every implementation subtracts a shift first: log(sum(exp(logits - shift))) + shift is the same
    number for any shift. The usual shift is the row's largest logit. But that is known only once
    all logits have been computed, so the exponentials need a second pass over them.

    Our shift is known before the logits are: the logit of the target, a dot product of two vectors,
    plus 16 as headroom for larger logits. XLA can then sum the exponentials while it computes the
    logits. The sum is never too small: the target alone adds exp(-16). It overflows if a logit is
    88 above the shift, since exp(88) is the limit of float32. That logit is then 88 + 16 above the
    target, so the loss is above 104. The mean is not finite, and the optimiser skips the update
    (see AdamW in train.py).

    The shift need only be near the target's logit. The loss itself takes that logit from `logits`,
    as the head has rounded it, so it is exactly the cross-entropy of these logits.
    """

    @staticmethod
    def forward(ctx, logits, targets, shift):
        log_sum = (logits.float() - shift).exp().sum(-1, keepdim=True).log() + shift  # [N, 1]
        ctx.save_for_backward(logits, targets, log_sum)
        target_logits = torch.where(one_hot(targets, logits), logits.float(), 0.0).sum(-1)  # [N]
        return (log_sum[:, 0] - target_logits).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        logits, targets, log_sum = ctx.saved_tensors
        softmax = (logits.float() - log_sum).exp()
        grad_logits = (softmax - one_hot(targets, logits).float()) * (grad_loss / len(logits))
        return grad_logits.to(logits.dtype), None, None


def one_hot(targets, logits):
    """[N, V], true at each row's target. XLA fuses this comparison into the pass over the logits;
    indexing would be a pass of its own."""
    ids = torch.arange(logits.size(-1), device=targets.device, dtype=targets.dtype)  # [V]
    return ids == targets[:, None]


class KVCache:
    """The keys and values of the tokens read so far, for generating one token at a time.

    To suit XLA, shapes never change and the position is a tensor, so one graph serves every
    position. (It has the shape [1]: for torch_xla a new 0 or 1 without dimensions is a constant,
    like a Python number.) Slots from `position` on hold stale values, which no query sees before
    they are overwritten. So a prompt may be padded: `seek` its true length, and the padding is
    stale."""

    def __init__(self, config, batch_size, device, length=None):
        """length: the number of tokens to make room for. Default and maximum: the context."""
        self.batch_size, self.length = batch_size, length or config.context
        shape = batch_size, config.n_heads, self.length, config.dim // config.n_heads  # B, H, S, K
        self.keys = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.position = torch.zeros(1, device=device, dtype=torch.long)  # of the next token
        self.slots = torch.arange(self.length, device=device)  # [S]: attention reads these

    def seek(self, position, slots):
        """Continues at `position` [1]. Attention reads `slots` [S]."""
        self.position, self.slots = position, slots

    def advance(self, count):
        """Moves on by `count` tokens, and returns their positions [count]."""
        self.new_positions = self.position + torch.arange(count, device=self.position.device)
        self.position = self.position + count
        return self.new_positions

    def update(self, layer, k, v):
        """Stores k and v [B, H, T, K] of the newest T tokens; with B = 1, for every text. Yields
        the keys of B texts in self.slots, then the values, [B, H, S, K] each; both have to be
        asked for, since each is stored only then."""
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached.index_copy_(2, self.new_positions, new.expand(self.batch_size, -1, -1, -1))
            yield cached[:len(new), :, :self.slots.size(0)]


class Llama(nn.Module):
    """Matrices are drawn from a normal distribution with standard deviation 0.02; the weights of
    the norms start at 1. The draws are made on the CPU, with a generator of their own, so every
    core starts from the same weights. (torch.manual_seed does not seed an XLA device.)"""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
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
        """tokens [B, T]: ids below vocab_size. XLA silently clamps a larger id, so check the data
        first.

        With targets [B, T]: the mean cross-entropy in nats, a float32 scalar. Without: the logits
        [B, T, V]. With a cache, the tokens continue the cached text and are added to it."""
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.lm_head(x)  # [B, T, V]
        return next_token_loss(x, self.lm_head, targets)

    def hidden(self, tokens, cache=None):
        """The final hidden states, [B, T, D]: the input of lm_head."""
        T = tokens.size(1)
        if cache is None:
            positions = key_positions = torch.arange(T, device=tokens.device)  # [T], S = T
            cos, sin = self.cos[:T], self.sin[:T]  # [T, K]
        else:
            positions = cache.advance(T)  # [T]
            key_positions = cache.slots  # [S]
            cos, sin = self.cos[positions], self.sin[positions]  # [T, K]
        mask = key_positions > positions[:, None]  # [T, S]: no query sees a later key

        x = self.embed_tokens(tokens)  # [B, T, D]
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is like the products
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        return self.norm(x)


def load_model(values, weights, source):
    """A Llama on the CPU with stored weights, for sampling and converting.

    values: a dict with keys of ModelConfig; others are ignored. weights: {name: tensor}. Raises
    UserError, which names `source`, if the two do not match."""
    keys = {entry.name for entry in dataclasses.fields(ModelConfig)}
    config = {key: value for key, value in values.items() if key in keys}
    model = Llama(ModelConfig(**config | {"attention": "math"}))  # math runs on every device
    expected = {name: list(p.shape) for name, p in model.named_parameters()}
    if missing := expected.keys() - weights.keys():
        raise UserError(f"{source} lacks the tensor {min(missing)}")
    if unexpected := weights.keys() - expected.keys():
        raise UserError(f"{source} has an unexpected tensor {min(unexpected)}")
    for name, shape in expected.items():
        if list(weights[name].shape) != shape:
            raise UserError(f"{source}: {name} has the shape {list(weights[name].shape)}; "
                            f"its config implies {shape}")
    model.load_state_dict(weights)
    return model
