"""sample.py on a checkpoint that train.py wrote, and the text it makes of tokens."""
import pytest
import safetensors.torch
import torch
from conftest import TINY, run

import data
from checkpoint import load_model, read_state, sealed, sha256
from sample import generate, pick, stream


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The out_dir of a short run with a tokenizer of 512 tokens, which byte fallback makes complete."""
    out_dir = tmp_path_factory.mktemp("trained")
    text = out_dir / "text.txt"
    text.write_text("we the people of the united states, in order to form a more perfect union\n" * 50)
    data.train_tokenizer(out_dir / "tokenizer.model", [text], 300, 0.0, "text")
    code, _, err = run("train.py", tiny, f"--out_dir={out_dir}", "--vocab_size=300", "--max_steps=3",
                       f"--tokenizer={out_dir / 'tokenizer.model'}")
    assert code == 0, err
    return out_dir


def test_samples_are_reproducible_and_end_in_time(trained):
    command = ["sample.py", "--checkpoint", trained, "--prompt", "we the", "--max-new-tokens", 8, "--num-samples", 2]
    code, out, err = run(*command)
    assert code == 0, err
    assert out.count("we the") == 2 and run(*command)[1] == out
    assert run(*command, "--seed", 5)[1] != out


def test_greedy_tokens_are_the_uncached_models(trained):
    model = load_model(trained / "checkpoints/step_00000003").eval()
    ids = [1, 5, 9]
    generated = list(generate(model, ids, 100, eos=-1, temperature=0))
    assert len(generated) == TINY["context"] - len(ids)
    for token in generated:
        with torch.no_grad():
            assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)

    def share(temperature=1.0, top_k=0, top_p=1.0):
        picked = [pick(logits, temperature, top_k, top_p, draw) for _ in range(4_000)]
        return torch.tensor(picked).bincount(minlength=4) / len(picked)

    torch.testing.assert_close(share(), logits.exp(), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(share(temperature=0.5), logits.mul(2).softmax(0), rtol=0, atol=0.03)
    assert share(temperature=0)[0] == 1 and share(top_p=0.1)[0] == 1


@pytest.mark.parametrize("text", ["we the people", "naïve 中文 😀", " two  spaces\n\nand lines\t"])
def test_streamed_text_is_the_whole_text(trained, text):
    processor = data.load_tokenizer(trained / "tokenizer.model")
    ids = processor.encode(text)
    pieces = list(stream(processor, ids[:1], ids[1:]))
    assert processor.decode(ids[:1]) + "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("arguments, message", [
    (["--checkpoint", "/nowhere"], "no checkpoint in /nowhere"),
    (["--temperature", "-1"], "expected --temperature and --top-k of at least 0"),
    (["--prompt", "a b c d e f g h i j k l m n o p q r s t"], "the model reads 16 and needs room for one more"),
])
def test_a_mistake_is_told_in_one_sentence(trained, arguments, message):
    code, _, err = run("sample.py", "--checkpoint", trained, "--prompt", "we", *arguments)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and message in err


def test_a_damaged_checkpoint_is_told(trained, tmp_path):
    checkpoint = tmp_path / "step_00000003"
    checkpoint.mkdir()
    source = trained / "checkpoints/step_00000003"
    for file in source.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, _, err = run("sample.py", "--checkpoint", checkpoint, "--prompt", "we")
    assert code == 2 and f"{weights} is damaged" in err and "Traceback" not in err
    safetensors.torch.save_file({"other": torch.zeros(1)}, weights)
    state = read_state(checkpoint)  # a checkpoint that agrees with its checksums, but not with its config
    state["files"]["model.safetensors"] = {"bytes": weights.stat().st_size, "sha256": sha256(weights)}
    (checkpoint / "state.json").write_bytes(sealed(state))
    code, _, err = run("sample.py", "--checkpoint", checkpoint, "--prompt", "we")
    assert code == 2 and f"{weights} does not fit" in err and "Traceback" not in err
