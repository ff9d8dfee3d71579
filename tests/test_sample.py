"""sample.py: the tokens that a model generates, their text, and the command."""
import contextlib
import dataclasses
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch_xla.debug.metrics as met
from conftest import ROOT, TINY, run, save_model

import sample
from model import Llama, ModelConfig, load_model
from nanoxla import checkpoint, files
from nanoxla.checkpoint import find_checkpoint
from nanoxla.errors import UserError
from nanoxla.tokenizer import load_tokenizer
from sample import Decoder, sample_token, stream

MODEL = ModelConfig(vocab_size=300, dim=48, n_layers=2, n_heads=3, hidden_dim=64, context=384)
ONE_LAYER = dataclasses.replace(MODEL, n_layers=1)


def load(run_directory):
    """The model of a run's newest checkpoint."""
    path = find_checkpoint(run_directory)
    return load_model(*checkpoint.load(path), path).eval()


@pytest.fixture(scope="module")
def random_run(trained, tmp_path_factory):
    """A run with the tokenizer of `trained`, random weights and a longer context."""
    out_dir = tmp_path_factory.mktemp("random")
    save_model(out_dir, MODEL, trained / "tokenizer.model")
    return out_dir


@pytest.fixture(scope="module")
def processor(trained):
    return load_tokenizer(trained / "tokenizer.model")


# --- tokens -------------------------------------------------------------------------------------


def generate(*arguments, **options):
    """The token ids of a single continuation."""
    return (token for token, in sample.generate(*arguments, **options))


def greedy_without_cache(model, ids, count):
    """The `count` likeliest next tokens, each computed from the whole text."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


PROMPTS = [[1], [1, 5, 9], list(range(3, 131)), list(range(3, 132)), list(range(3, 203)),
           [1, 0, 1, 0]]


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_greedy_tokens_equal_those_without_a_cache(random_run, device):
    model, decoder = load(random_run), Decoder(load(random_run), device)
    for ids in PROMPTS:
        tokens = list(generate(decoder, ids, 40, 300, eos=-1, temperature=0))
        assert tokens == greedy_without_cache(model, ids, 40)


def test_xla_fills_a_context_that_is_not_a_multiple_of_the_chunk():
    config = dataclasses.replace(ONE_LAYER, context=130)
    for length in (20, 125, 129):
        ids = list(range(3, 3 + length))
        tokens = list(generate(Decoder(Llama(config), "xla"), ids, 200, 300, eos=-1, temperature=0))
        assert tokens == greedy_without_cache(Llama(config), ids, 130 - length)


def test_xla_compiles_two_graphs_for_all_prompts_and_lengths():
    shape_of_its_own = dataclasses.replace(MODEL, hidden_dim=72)  # no other test compiles it
    decoder = Decoder(Llama(shape_of_its_own), "xla")
    decoder.reserve(1)  # compiles one more graph, once: it makes the cache's zeros
    before, compiled = met.metric_data("CompileTime")[0], []
    for ids in PROMPTS:
        assert len(list(generate(decoder, ids, 180, 300, eos=-1, temperature=0.9))) == 180
        compiled.append(met.metric_data("CompileTime")[0] - before)
    assert compiled == [1, 2, 2, 2, 2, 2]  # a single token; and a chunk of a prompt


def test_generation_stops_at_the_end_of_the_context(random_run):
    model = load(random_run)
    ids = [1] * (MODEL.context - 5)
    for device in ("cpu", "xla"):
        assert len(list(generate(Decoder(model, device), ids, 100, 300, eos=-1))) == 5


def test_generation_stops_at_eos_and_never_draws_padding():
    model = Llama(ONE_LAYER)
    with torch.no_grad():  # by far the likeliest tokens, in one direction or the other
        model.lm_head.weight[280:] = 100 * model.lm_head.weight[:20]
    decoder = Decoder(model)
    drawn = set()
    for seed in range(10):
        drawn.update(generate(decoder, [1, 2], 30, 280, eos=-1, temperature=2.0, seed=seed))
    assert max(drawn) < 280
    first = next(generate(decoder, [1, 2], 30, 280, eos=-1, seed=3))
    assert list(generate(decoder, [1, 2], 30, 280, eos=first, seed=3)) == []


@pytest.mark.parametrize("prompt", [[1], [1, 5, 9, 2, 7]])
def test_texts_generated_together_equal_each_alone(random_run, prompt):
    decoder, options = Decoder(load(random_run)), {"temperature": 1.5, "top_k": 50}
    drawn = [token for seed in range(5) for token in
             generate(decoder, prompt, 60, 300, eos=-1, seed=seed, **options)]
    eos = max(set(drawn[20:]), key=drawn.count)  # so some end early, at different lengths
    alone = [list(generate(decoder, prompt, 60, 300, eos, seed=seed, **options))
             for seed in range(5)]
    assert len({len(tokens) for tokens in alone}) > 1
    steps = list(sample.generate(decoder, prompt, 60, 300, eos, count=5, **options))
    together = [list(tokens) for tokens in zip(*steps)]
    assert together == [tokens + [eos] * (len(steps) - len(tokens)) for tokens in alone]


def test_draws_follow_temperature_top_k_and_top_p():
    probabilities = torch.tensor([0.3, 0.5, 0.05, 0.15])
    logits, generator = probabilities.log(), torch.Generator().manual_seed(0)

    def frequencies(temperature=1.0, top_k=0, top_p=1.0):
        drawn = [sample_token(logits, temperature, top_k, top_p, generator) for _ in range(4_000)]
        return torch.tensor(drawn).bincount(minlength=4) / len(drawn)

    def expect(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.03)

    two_likeliest = torch.tensor([0.375, 0.625, 0, 0])
    expect(frequencies(), probabilities)
    expect(frequencies(top_k=2), two_likeliest)
    expect(frequencies(top_p=0.6), two_likeliest)
    expect(frequencies(temperature=0.5), logits.mul(2).softmax(0))
    for options in ({"temperature": 0}, {"temperature": 1e-3}, {"top_p": 0.1}, {"top_p": 1e-300}):
        assert frequencies(**options)[1] == 1
    assert frequencies(top_k=99).gt(0).all()


def test_logits_that_are_not_finite_raise_an_error():
    model = Llama(ONE_LAYER)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        next(generate(Decoder(model), [1, 2], 5, 300, eos=-1, temperature=0))


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "we the people", "naïve 中文 😀", " two  spaces\n\nand lines\t", "e\u0301 \ufffd \ufffd", ""])
def test_streamed_pieces_add_up_to_the_text(processor, text):
    ids = [processor.bos_id(), *processor.encode(text)]
    for start in range(1, len(ids) + 1):
        pieces = list(stream(processor, ids[:start], ids[start:]))
        assert len(pieces) == len(ids) - start + 1  # one for each token, and the rest
        prompt = processor.decode(ids[:start])
        if not prompt.endswith("\ufffd"):  # otherwise it ends within a character
            assert prompt + "".join(pieces) == text


def test_streamed_pieces_of_random_tokens_add_up_to_sentencepieces_text(processor):
    generator = torch.Generator().manual_seed(0)
    for low in (0, 259):  # with control tokens and bytes that are not text; without them
        for _ in range(50):
            ids = torch.randint(low, 300, (40,), generator=generator).tolist()
            assert "".join(stream(processor, [1], ids)) == processor.decode([1, *ids])


def test_a_character_appears_with_its_last_byte(processor):
    ids = processor.encode("a😀e")
    assert sum(map(processor.is_byte, ids)) == 4
    assert list(stream(processor, ids[:1], ids[1:])) == ["", "", "", "😀", "e", ""]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def sampled(call):
    """sampled(*arguments) calls the command in this process. Returns (stdout, stderr)."""
    return lambda *arguments: call(sample.main, *arguments)


def test_a_seed_gives_the_same_text_on_every_device(trained, sampled):
    """On a machine without a TPU, --device xla is torch_xla's CPU."""
    command = ["--checkpoint", trained, "--prompt", "we the", "--max-new-tokens", 8]
    code, out, err = run("sample.py", *command, "--device", "xla", "--num-samples", 2)
    assert code == 0 and err == ""
    assert out == sampled(*command)[0] + sampled(*command, "--seed", 1)[0]
    first, second, _ = out.split("\n\n")
    assert first != second and first.startswith("we the") and second.startswith("we the")


def test_samples_appear_in_the_order_of_their_seeds(random_run, sampled):
    command = ["--checkpoint", random_run, "--prompt", "we", "--max-new-tokens", 6]
    count = sample.ROWS + 2  # the last two are a group of their own
    together = sampled(*command, "--num-samples", count, "--seed", 3)[0]
    assert together == "".join(sampled(*command, "--seed", 3 + i)[0] for i in range(count))


def test_an_empty_prompt_starts_a_document_and_a_full_context_prints_a_note(trained, sampled,
                                                                            processor):
    out, err = sampled("--checkpoint", trained, "--prompt", "", "--temperature", 0.9)
    assert f"context of {TINY['context']} tokens is full" in err
    tokens = list(generate(Decoder(load(trained)), [processor.bos_id()], 200, 300,
                           processor.eos_id(), 0.9, 50))
    assert len(tokens) == TINY["context"] - 1 and out == processor.decode(tokens) + "\n\n"


def start(*arguments):
    """Starts the command in a new process, with pipes for bytes."""
    command = [sys.executable, "sample.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_prompts_come_line_by_line_and_text_appears_at_once(random_run, sampled):
    arguments = ["--checkpoint", random_run, "--max-new-tokens", 5, "--temperature", 0]
    process = start(*arguments)
    process.stdin.write(b"we the\n")
    process.stdin.flush()
    out = os.read(process.stdout.fileno(), 100)  # while the command waits for the next prompt
    assert out.startswith(b"we the")
    rest, err = process.communicate(b"\npeople\\nof\r\n")
    assert process.returncode == 0 and err == b""
    expected = [sampled(*arguments, "--prompt", text)[0] for text in ("we the", "", "people\nof")]
    assert (out + rest).decode() == "".join(expected) and expected[2].startswith("people\nof")


def test_a_prompt_that_is_not_utf8_is_an_error(trained):
    process = start("--checkpoint", trained, "--max-new-tokens", 3)
    out, err = process.communicate(b"we\n\xff\n")
    assert process.returncode == 2 and out.startswith(b"we")
    assert err.startswith(b"error: ") and err.endswith(b" is not UTF-8\n")


def test_a_closed_standard_input_is_an_error(trained):
    command = [sys.executable, "sample.py", "--checkpoint", trained]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "", *command], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == b"error: standard input is closed; give a --prompt\n"


def on_a_terminal(typed, *arguments):
    """Runs the command on a terminal, and types one of `typed` after each "prompt> ". Returns the
    exit code and the text that the terminal shows."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "sample.py", *map(str, arguments)], cwd=ROOT,
                               stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown, sent = b"", 0
    with contextlib.suppress(OSError):  # raised when the process has closed the terminal
        while True:
            shown += os.read(controller, 1 << 16)
            if shown.count(b"prompt> ") > sent:
                os.write(controller, typed[sent].encode())
                sent += 1
    os.close(controller)
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def test_a_terminal_asks_for_prompts_and_shows_the_speed(random_run):
    too_long, control_d = "we " * 500 + "\n", "\x04"
    typed = [too_long, "people of\n", control_d]
    code, shown = on_a_terminal(typed, "--checkpoint", random_run, "--max-new-tokens", 7)
    assert code == 0, shown
    assert "error: the prompt has" in shown and "Traceback" not in shown
    last_line = shown.strip().splitlines()[-1]
    assert re.fullmatch(r"\[\d tokens in \d+\.\d s, \d+\.\d tokens/s\]", last_line)


def test_a_reader_that_quits_is_not_an_error(trained):
    process = start("--checkpoint", trained, "--prompt", "we", "--num-samples", 99)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    err = process.stderr.read().decode().splitlines()
    assert [line for line in err if line and "is full]" not in line] == []


def test_the_default_is_the_run_that_saved_last(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run with a checkpoint under out/"):
        find_checkpoint(None)
    checkpoints = trained / "checkpoints"
    for name in ("b", "a"):
        shutil.copytree(checkpoints, tmp_path / "out" / name / "checkpoints")
    os.utime(tmp_path / "out/b/checkpoints/step_00000003", (0, 0))
    shutil.copytree(checkpoints, tmp_path / "out/c.partial/checkpoints")  # of a killed conversion
    assert find_checkpoint(None) == Path("out/a/checkpoints/step_00000003")


@pytest.mark.parametrize("arguments, message", [
    (["--checkpoint", "/nowhere"], "no checkpoint in /nowhere"),
    (["--temperature", "-1"], "--temperature -1.0: expected 0, or from 0.001 to 1000"),
    (["--temperature", "nan"], "--temperature nan: expected 0, or from 0.001 to 1000"),
    (["--top-p", "0"], "expected --top-k of at least 0 and --top-p above 0"),
    (["--seed", str(2**63)], "expected a --seed of at least 0"),
    (["--prompt", "\udcff"], "is not UTF-8"),  # Python's str for the byte \xff
    (["--num-samples", "0"], "expected --max-new-tokens and --num-samples of at least 1"),
    (["--prompt", "a b c d e f g h i j k l m n o p q r s t"],
     "context of 16 has room for 15 and a new token"),
])
def test_mistakes_are_reported_in_one_line(mistake, trained, arguments, message):
    out, err = mistake(sample.main, "--checkpoint", trained, "--prompt", "we", *arguments)
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err
    assert out == ""


def test_a_damaged_checkpoint_is_an_error(mistake, trained, tmp_path):
    path = tmp_path / "step_00000003"
    shutil.copytree(trained / "checkpoints/step_00000003", path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    _, err = mistake(sample.main, "--checkpoint", path, "--prompt", "we")
    assert f"{weights} is damaged" in err
    # The same with checksums that match the weights, which do not match the config.
    safetensors.torch.save_file({"other": torch.zeros(1)}, weights)
    state = checkpoint.read_state(path)
    state["files"]["model.safetensors"] = {"bytes": weights.stat().st_size,
                                           "sha256": files.sha256(weights)}
    (path / "state.json").write_bytes(checkpoint.state_bytes(state))
    _, err = mistake(sample.main, "--checkpoint", path, "--prompt", "we")
    assert f"{path} lacks the tensor" in err
