"""The mathematics of model.py, against transformers and against its own promises."""
import dataclasses

import pytest
import torch
import torch_xla
from transformers import LlamaConfig, LlamaForCausalLM

from convert_to_hf import hf_name
from model import (
    KVCache,
    Llama,
    ModelConfig,
    flops_per_token,
    load_model,
    next_token_loss,
    num_parameters,
)
from nanoxla.errors import UserError
from train import load_config

SMALL = ModelConfig(vocab_size=97, dim=48, n_layers=3, n_heads=4, hidden_dim=80, context=32,
                    rope_theta=500.0, norm_eps=1e-5)


@pytest.fixture
def tokens():
    shape = 3, SMALL.context + 1
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_logits_loss_and_every_gradient_equal_transformers(tokens):
    ours = Llama(SMALL, seed=3)
    with torch.no_grad():  # larger weights: uniform attention would hide a mistake in it
        for p in ours.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=SMALL.vocab_size, hidden_size=SMALL.dim, intermediate_size=SMALL.hidden_dim,
        num_hidden_layers=SMALL.n_layers, num_attention_heads=SMALL.n_heads,
        max_position_embeddings=SMALL.context, rms_norm_eps=SMALL.norm_eps,
        rope_theta=SMALL.rope_theta, tie_word_embeddings=False, attn_implementation="eager"))
    theirs.load_state_dict({hf_name(name): p for name, p in ours.state_dict().items()})

    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    their_logits = theirs(inputs).logits
    assert relative_error(ours(inputs), their_logits) < 1e-5
    loss = ours(inputs, targets)
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    assert relative_error(loss, their_loss) < 1e-5
    loss.backward()
    their_loss.backward()
    their_parameters = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, their_parameters.pop(hf_name(name)).grad) < 1e-5, name
    assert not their_parameters


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("gap", [0, 30, 60, 79, 87, 100])
def test_the_loss_is_exact_however_unlikely_the_target(gap, dtype, tolerance):
    """Loss and gradients against F.cross_entropy in float64, where the largest logit is `gap` above
    the target's. On the XLA device, which flushes numbers that are too small for float32 to
    zero."""
    draw, device = torch.Generator().manual_seed(0), torch_xla.device()
    x = torch.randn(2, 8, 16, generator=draw).to(dtype)
    head = torch.nn.Linear(16, 40, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(40, 16, generator=draw) * 0.1)
        x[..., 0] = 1
        head.weight[:, 0] = torch.cat([torch.tensor([0.0]), torch.full((39,), gap - 40.0)])
        head.weight[1, 0] = gap
    targets = torch.zeros(2, 8, dtype=torch.int32)
    leaves = [x.to(device).requires_grad_(), head.to(device).weight]
    loss = next_token_loss(leaves[0], head, targets.to(device))
    ours = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    logits = exact[0].flatten(0, 1) @ exact[1].T
    their_loss = torch.nn.functional.cross_entropy(logits, targets.flatten().long())
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    for mine, theirs in zip(ours, torch.autograd.grad(their_loss, exact)):
        assert relative_error(mine.cpu().double(), theirs) < tolerance


def test_no_logit_depends_on_a_later_token(tokens):
    model = Llama(SMALL)
    before = model(tokens[:, :-1])
    for t in (1, 7, SMALL.context - 1):
        changed = tokens[:, :-1].clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("config", [
    SMALL, ModelConfig(vocab_size=10, dim=6, n_layers=1, n_heads=3, hidden_dim=4, context=5)])
def test_parameters_are_counted_exactly(config):
    model = Llama(config)
    matrices = [p.numel() for name, p in model.named_parameters()
                if p.dim() == 2 and name != "embed_tokens.weight"]
    total = sum(p.numel() for p in model.parameters())
    assert num_parameters(config) == (total, sum(matrices))


def test_the_reference_shape_has_the_reference_numbers():
    config = load_config("config/fwedu_124m.py")
    assert num_parameters(config) == (134_105_856, 109_510_656)
    assert flops_per_token(config) == 770_310_144


def test_first_loss_of_the_untrained_reference_model():
    """ln 32000 + 768 * 0.02^2 / 2 = 10.527: a uniform guess, and the variance of random logits."""
    config = dataclasses.replace(load_config("config/fwedu_124m.py"), attention="math")
    model, draw = Llama(config, config.seed), torch.Generator().manual_seed(0)
    # The loss of one window has a standard deviation of 0.017, so take several.
    tokens = torch.randint(0, config.vocab_size, (4, config.context + 1), generator=draw)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert 10.50 < loss < 10.56


def test_reading_with_a_cache_gives_the_same_logits(tokens):
    model, tokens = Llama(SMALL).eval(), tokens[:, :-1]
    cache = KVCache(SMALL, batch_size=len(tokens), device="cpu")
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 1, 20, 5], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-6)


def test_flash_attention_outside_a_tpu_says_what_to_do(tokens):
    with pytest.raises(RuntimeError, match='use attention="math"'):
        Llama(dataclasses.replace(SMALL, attention="flash"))(tokens[:, :-1])


def test_the_same_seed_gives_the_same_weights():
    first, same, other = (Llama(SMALL, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_load_model_restores_the_weights_and_refuses_others():
    model, values = Llama(SMALL, 5), dataclasses.asdict(SMALL) | {"batch_size": 7}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in load_model(values, weights, "here").named_parameters():
        assert torch.equal(p, weights[name])
    older = {key: value for key, value in values.items() if key != "norm_eps"}  # a key added later
    assert load_model(older, weights, "here").config.norm_eps == 1e-5
    with pytest.raises(UserError, match="here lacks the tensor norm.weight"):
        others = weights.keys() - {"norm.weight"}
        load_model(values, {name: weights[name] for name in others}, "here")
    larger = weights | {"embed_tokens.weight": torch.zeros(98, 48)}
    with pytest.raises(UserError, match=r"here: lm_head.weight has the shape \[97, 48\]; .*98, 48"):
        load_model(values | {"vocab_size": 98}, larger, "here")


def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32(tokens):
    """In particular the loss. The reference run logged 10.5078125, a mean of bfloat16 numbers:
    seven times 10.5 and once 10.5625."""
    device = torch_xla.device()
    model, tokens = Llama(SMALL).to(device), tokens.to(device)
    with torch.autocast("xla", torch.bfloat16):
        loss, logits = model(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1])
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    exact = Llama(SMALL)(tokens.cpu()[:, :-1], tokens.cpu()[:, 1:]).item()
    assert loss.item() == pytest.approx(exact, rel=1e-3)
    assert loss.item() != torch.tensor(loss.item()).bfloat16().item()
