"""sample.py: the tokens that a model generates, the text they make, and the command."""
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

import data
from checkpoint import find_checkpoint, load_model, read_state, sealed, sha256
from model import Llama, ModelConfig
from process import UserError
from sample import Decoder, generate, pick, stream

MODEL = ModelConfig(vocab_size=300, dim=48, n_layers=2, n_heads=3, hidden_dim=64, context=384)


@pytest.fixture(scope="module")
def random_run(trained, tmp_path_factory):
    """A run with the tokenizer of `trained`, and a larger context."""
    out_dir = tmp_path_factory.mktemp("random")
    save_model(out_dir, MODEL, trained / "tokenizer.model")
    return out_dir


# --- tokens -----------------------------------------------------------------------------------------------------------


def uncached(model, ids, count):
    """The likeliest next token, `count` times, each time from all of the text."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


PROMPTS = [[1], [1, 5, 9], list(range(3, 131)), list(range(3, 132)), list(range(3, 203)), [1, 0, 1, 0]]


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_greedy_tokens_are_the_uncached_models(random_run, device):
    expected = load_model(find_checkpoint(random_run)).eval()
    decoder = Decoder(load_model(find_checkpoint(random_run)), device)
    for ids in PROMPTS:
        assert list(generate(decoder, ids, 40, 300, eos=-1, temperature=0)) == uncached(expected, ids, 40)


def test_a_context_that_is_no_multiple_of_a_chunk_can_be_filled_on_xla():
    config = dataclasses.replace(MODEL, context=130, n_layers=1)
    for count in (20, 125, 129):
        ids = list(range(3, 3 + count))
        assert list(generate(Decoder(Llama(config), "xla"), ids, 200, 300, eos=-1, temperature=0)) == \
            uncached(Llama(config), ids, 130 - count)


def test_an_xla_device_compiles_two_graphs_whatever_prompt_and_length():
    decoder = Decoder(Llama(dataclasses.replace(MODEL, hidden_dim=72)), "xla")  # a shape that nobody has compiled yet
    decoder.reserve(1)  # one more, once: the cache's zeros
    before, after = met.metric_data("CompileTime")[0], []
    for ids in PROMPTS:
        assert len(list(generate(decoder, ids, 180, 300, eos=-1, temperature=0.9))) == 180
        after.append(met.metric_data("CompileTime")[0] - before)
    assert after == [1, 2, 2, 2, 2, 2]  # a token; and a chunk of a prompt


def test_generation_ends_where_the_context_does(random_run):
    model = load_model(find_checkpoint(random_run))
    ids = [1] * (MODEL.context - 5)
    for device in ("cpu", "xla"):
        assert len(list(generate(Decoder(model, device), ids, 100, 300, eos=-1))) == 5


def test_generation_ends_with_eos_and_never_draws_padding():
    model = Llama(dataclasses.replace(MODEL, n_layers=1))
    with torch.no_grad():
        model.lm_head.weight[280:] = 100 * model.lm_head.weight[:20]  # the likeliest by far, in one direction or the other
    decoder = Decoder(model)
    drawn = {token for seed in range(10) for token in generate(decoder, [1, 2], 30, 280, eos=-1, temperature=2.0, seed=seed)}
    assert max(drawn) < 280
    first = next(generate(decoder, [1, 2], 30, 280, eos=-1, seed=3))
    assert list(generate(decoder, [1, 2], 30, 280, eos=first, seed=3)) == []


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log()
    draw = torch.Generator().manual_seed(0)

    def share(temperature=1.0, top_k=0, top_p=1.0):
        picked = [pick(logits, temperature, top_k, top_p, draw) for _ in range(4_000)]
        return torch.tensor(picked).bincount(minlength=4) / len(picked)

    torch.testing.assert_close(share(), logits.exp(), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.375, 0.625, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([0.375, 0.625, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(share(temperature=0.5), logits.mul(2).softmax(0), rtol=0, atol=0.03)
    assert share(temperature=0)[1] == share(top_p=0.1)[1] == share(temperature=1e-3)[1] == share(top_p=1e-300)[1] == 1
    assert share(top_k=99).gt(0).all()


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["we the people", "naïve 中文 😀", " two  spaces\n\nand lines\t", "e\u0301 \ufffd \ufffd", ""])
def test_streamed_text_is_the_whole_text(trained, text):
    processor = data.load_tokenizer(trained / "tokenizer.model")
    ids = [processor.bos_id()] + processor.encode(text)
    for start in range(1, len(ids) + 1):
        pieces = list(stream(processor, ids[:start], ids[start:]))
        assert len(pieces) == len(ids) - start + 1  # one for each token, and the rest
        begun = processor.decode(ids[:start])
        if not begun.endswith("\ufffd"):  # the first half of a character has been shown as such
            assert begun + "".join(pieces) == text


def test_streamed_text_of_any_tokens_is_what_sentencepiece_makes_of_them(trained):
    processor = data.load_tokenizer(trained / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    for low in (0, 259):  # with bytes that make no character, and control tokens; and without
        for _ in range(50):
            ids = torch.randint(low, 300, (40,), generator=generator).tolist()
            assert "".join(stream(processor, [1], ids)) == processor.decode([1] + ids)


def test_a_character_appears_when_all_its_bytes_are_there(trained):
    processor = data.load_tokenizer(trained / "tokenizer.model")
    ids = processor.encode("a😀e")
    assert sum(map(processor.is_byte, ids)) == 4
    assert list(stream(processor, ids[:1], ids[1:])) == ["", "", "", "😀", "e", ""]


# --- the command ------------------------------------------------------------------------------------------------------


def test_samples_are_reproducible_and_end_in_time(trained):
    command = ["sample.py", "--checkpoint", trained, "--prompt", "we the", "--max-new-tokens", 8]
    code, out, err = run(*command, "--num-samples", 2)
    assert code == 0 and err == ""
    assert out == run(*command)[1] + run(*command, "--seed", 1)[1]
    first, second, _ = out.split("\n\n")
    assert first != second and first.startswith("we the") and second.startswith("we the")


def test_xla_can_be_asked_for(trained):
    """On a machine without a TPU it is torch_xla's CPU."""
    command = ["sample.py", "--checkpoint", trained, "--prompt", "we the", "--temperature", 0, "--max-new-tokens", 8]
    assert run(*command, "--device", "xla")[:2] == run(*command, "--device", "cpu")[:2]


def test_prompts_come_line_by_line_from_a_pipe(random_run):
    command = ["sample.py", "--checkpoint", random_run, "--max-new-tokens", 5, "--temperature", 0]
    code, out, err = run(*command, input="we the\n\npeople\\nof\r\n")
    assert code == 0 and err == ""
    alone = [run(*command, "--prompt", prompt)[1] for prompt in ("we the", "", "people\nof")]
    assert out == "".join(alone) and alone[2].startswith("people\nof")


def on_a_terminal(typed, *arguments):
    """What a terminal shows when sample.py runs there and these lines are typed."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "sample.py", *map(str, arguments)], cwd=ROOT, stdin=terminal, stdout=terminal,
                               stderr=terminal)
    os.close(terminal)
    shown, sent = b"", 0
    with contextlib.suppress(OSError):  # which says that the process has closed it
        while True:
            shown += os.read(controller, 1 << 16)
            if shown.count(b"prompt> ") > sent:
                os.write(controller, typed[sent].encode())
                sent += 1
    os.close(controller)
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def test_a_terminal_is_asked_for_prompts_and_told_the_speed(random_run):
    control_d = "\x04"
    typed = ["we " * 500 + "\n", "people of\n", control_d]
    code, shown = on_a_terminal(typed, "--checkpoint", random_run, "--max-new-tokens", 7)
    assert code == 0, shown
    assert "error: the prompt has" in shown and "Traceback" not in shown
    assert re.fullmatch(r"\[\d tokens in \d+\.\d s, \d+\.\d tokens/s\]", shown.strip().splitlines()[-1])


def test_a_line_that_is_not_utf8_and_a_closed_input_are_told(trained):
    command = [sys.executable, "sample.py", "--checkpoint", trained, "--max-new-tokens", "3"]
    done = subprocess.run(command, input=b"we\n\xff\n", cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stdout.startswith(b"we") and done.stderr.endswith(b" is not UTF-8\n")
    done = subprocess.run(["sh", "-c", '"$@" <&-', "", *command], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stderr == b"error: standard input is closed; give a --prompt\n"


def test_text_appears_as_it_is_generated(random_run):
    command = [sys.executable, "sample.py", "--checkpoint", random_run, "--max-new-tokens", "5"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"we the\n")
    process.stdin.flush()
    assert os.read(process.stdout.fileno(), 100).startswith(b"we the")  # while it waits for the next prompt
    process.communicate()


def test_weights_that_are_not_numbers_are_told():
    model = Llama(dataclasses.replace(MODEL, n_layers=1))
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        next(generate(Decoder(model), [1, 2], 5, 300, eos=-1, temperature=0))


def test_an_empty_prompt_begins_a_document_and_a_full_context_is_said(trained):
    code, out, err = run("sample.py", "--checkpoint", trained, "--prompt", "", "--temperature", 0.9)
    assert code == 0 and f"context of {TINY['context']} tokens is full" in err
    model = load_model(find_checkpoint(trained))
    processor = data.load_tokenizer(trained / "tokenizer.model")
    tokens = list(generate(Decoder(model), [processor.bos_id()], 200, 300, processor.eos_id(), 0.9, 50))
    assert len(tokens) == TINY["context"] - 1 and out == processor.decode(tokens) + "\n\n"


def test_a_reader_that_has_seen_enough_is_no_error(trained):
    process = subprocess.Popen([sys.executable, "sample.py", "--checkpoint", trained, "--prompt", "we", "--num-samples", "99"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert [line for line in process.stderr.read().splitlines() if line and "is full]" not in line] == []


def test_the_default_is_the_run_that_saved_last(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run with a checkpoint under out/"):
        find_checkpoint(None)
    for name in ("b", "a"):
        shutil.copytree(trained / "checkpoints", tmp_path / "out" / name / "checkpoints")
    os.utime(tmp_path / "out/b/checkpoints/step_00000003", (0, 0))
    shutil.copytree(trained / "checkpoints", tmp_path / "out/c.partial/checkpoints")  # what a killed conversion leaves
    assert find_checkpoint(None) == Path("out/a/checkpoints/step_00000003")


@pytest.mark.parametrize("arguments, message", [
    (["--checkpoint", "/nowhere"], "no checkpoint in /nowhere"),
    (["--temperature", "-1"], "--temperature -1.0: expected 0, or from 0.001 to 1000"),
    (["--temperature", "nan"], "--temperature nan: expected 0, or from 0.001 to 1000"),
    (["--top-p", "0"], "expected --top-k of at least 0 and --top-p above 0"),
    (["--seed", str(2**63)], "expected a --seed of at least 0"),
    (["--prompt", "\udcff"], "is not UTF-8"),  # as Python passes on the byte
    (["--num-samples", "0"], "expected --max-new-tokens and --num-samples of at least 1"),
    (["--prompt", "a b c d e f g h i j k l m n o p q r s t"], "the model reads 16 and needs room for one more"),
])
def test_a_mistake_is_told_in_one_sentence(trained, arguments, message):
    code, out, err = run("sample.py", "--checkpoint", trained, "--prompt", "we", *arguments)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and message in err and not out


def test_a_damaged_checkpoint_is_told(trained, tmp_path):
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(trained / "checkpoints/step_00000003", checkpoint)
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
