"""convert_to_hf.py, there and back, against the transformers that is installed: 4.57.6 or, with the eval extra, 5.23.0."""
import dataclasses
import json
import os
import re
import shutil
import struct

import pytest
import safetensors
import safetensors.torch
import sentencepiece
import torch
from conftest import ROOT, limit_file_size, rows, run, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import convert_to_hf
import data
from checkpoint import find_checkpoint, load_model, load_tensors, read_state, write
from convert_to_hf import hf_name, load_hf, tokenizer_json
from model import ModelConfig
from sample import Decoder, generate
from train import load_config

UNUSUAL = ModelConfig(vocab_size=600, dim=64, n_layers=3, n_heads=4, hidden_dim=96, context=1_024, rope_theta=5e4,
                      norm_eps=3e-4)
TEXT = """<html>\n<head>\n<title>My Website</title> x</ y</ z</ as> bs> cs> ds>
def f(x):\n    return    x\t# a tab\r\n        1234567890 aaaaaaaaaaaaaaaa ================
we the people of the united states, in order to form a more perfect union; Fellow citizens of the Senate
naïve café œuvre 中文日本語 한국어 Ελληνικά русский
"""
HARD = ["", " ", "  ", "   ", "a", " a", "  a", "a ", "a  b", "\n", "\n\n", " \n ", "\t", "\r\n", "x\ty", "hello\nworld", "😀",
        "👩\u200d👩\u200d👧 family", "🇩🇪", "中文 日本語 한국어", "e\u0301 n\u0303 \u0301", "\u200b\ufeff\u2028",
        "\ufb01 \u00bd \u212b", "\x00\x01\x02", "\x7f\x1b[0m", "\U0010ffff", "<s>", "</s>", "<unk>", "a<s>b", "</s> x",
        " <s>hello</s>", "<0x0A>", "<0x0a", "1234567890", "İ ß", "a" * 50, "=-" * 40, "aaaa=====    \t\t\t",
        *(" " * n + "x = 1" for n in range(3, 50)),
        "<html>\n<head>\n<title>My Website</title>"]
HARD.append("".join(HARD) * 200)  # 100 kB
HARD.append("\n".join(HARD[:-1]) + TEXT * 100)


def train_tokenizer(directory, vocab_size, **options):
    """A tokenizer like Llama's, but for the options."""
    (directory / "text.txt").write_text(TEXT * 100)
    like_llama = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                      allow_whitespace_only_pieces=True, split_digits=True)
    sentencepiece.SentencePieceTrainer.train(input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"),
                                             vocab_size=vocab_size, minloglevel=2, hard_vocab_limit=False,
                                             **like_llama | options)
    return directory / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A SentencePiece model of 600 tokens, some of which can be joined to the spelling of a control token; runs of spaces have
    the same score, as in Mistral's."""
    directory = tmp_path_factory.mktemp("tokenizer")
    path = train_tokenizer(directory, UNUSUAL.vocab_size, split_by_unicode_script=False)
    content, processor = path.read_bytes(), data.load_tokenizer(path)
    for i in range(UNUSUAL.vocab_size):
        piece = processor.id_to_piece(i)
        if set(piece) == {"▁"} and len(piece) > 1:  # in the protocol buffer: field 1, the piece, and field 2, its score
            entry = b"\x0a" + bytes([len(piece.encode())]) + piece.encode() + b"\x15"
            content = content.replace(entry + struct.pack("<f", processor.get_score(i)), entry + struct.pack("<f", -1e9))
    path.write_bytes(content)
    assert sum(data.load_tokenizer(path).get_score(i) == -1e9 for i in range(UNUSUAL.vocab_size)) > 3
    return path


@pytest.fixture(scope="module")
def unusual(tokenizer, tmp_path_factory):
    """A run whose model has no default value that could be forgotten; converted to its hf/."""
    out_dir = tmp_path_factory.mktemp("unusual")
    save_model(out_dir, UNUSUAL, tokenizer)
    code, out, err = run("convert_to_hf.py", "--checkpoint", out_dir)
    assert code == 0 and err == "" and f"-> {out_dir / 'hf'}: 30 tensors" in out
    return out_dir


# --- to Hugging Face --------------------------------------------------------------------------------------------------


def test_logits_over_a_full_context_equal_transformers(unusual):
    theirs = AutoModelForCausalLM.from_pretrained(unusual / "hf").eval()
    ours = load_model(find_checkpoint(unusual)).eval()
    tokens = torch.randint(0, UNUSUAL.vocab_size, (2, UNUSUAL.context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert type(theirs) is LlamaForCausalLM and theirs.dtype == torch.float32
    assert logits.std() > 0.5 and (logits - expected).abs().max() < 1e-4


def test_greedy_text_equals_transformers(unusual):
    directory = unusual / "hf"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt in ("we the people", "", " <html>\n"):
        ids = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**ids, max_new_tokens=200, do_sample=False)[0]
        for source in (unusual, directory):
            code, out, err = run("sample.py", "--checkpoint", source, "--prompt", prompt, "--temperature", 0)
            assert (code, err) == (0, "")
            assert out == tokenizer.decode(theirs, skip_special_tokens=True) + "\n\n"


@pytest.mark.parametrize("which", ["unusual", "trained"])
def test_token_ids_equal_sentencepiece_and_decode_to_the_text(which, request, tmp_path):
    out_dir = request.getfixturevalue(which)
    assert run("convert_to_hf.py", "--checkpoint", out_dir, "--output", tmp_path / "hf")[0] == 0
    processor = data.load_tokenizer(tmp_path / "hf/tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in HARD:
        ids = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [processor.bos_id()] + ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode([processor.bos_id()] + ids, skip_special_tokens=True) == text == processor.decode(ids)
    assert tokenizer.bos_token_id == processor.bos_id() and tokenizer.eos_token_id == processor.eos_id()
    assert len(tokenizer) == processor.vocab_size()
    assert tokenizer.model_max_length == read_state(find_checkpoint(out_dir))["config"]["context"]


def test_spelled_control_tokens_could_be_joined_but_are_not(tokenizer):
    """The test above would pass by luck with a tokenizer in which no two pieces make up "</s>"."""
    vocab = tokenizer_json(data.load_tokenizer(tokenizer))["model"]
    assert any("</s>" == left + right for left in vocab["vocab"] for right in vocab["vocab"])
    assert not any("</s>" == left + right for left, right in vocab["merges"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_wanted_dtype(unusual, tmp_path, dtype):
    code, out, err = run("convert_to_hf.py", "--checkpoint", unusual, "--output", tmp_path / "hf", "--dtype", dtype)
    assert code == 0, err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    for name, p in load_model(find_checkpoint(unusual)).named_parameters():
        assert torch.equal(theirs.state_dict()[hf_name(name)], p.to(theirs.dtype)), name
    with safetensors.safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "hf/model.safetensors").stat().st_mode == (tmp_path / "hf/config.json").stat().st_mode


def test_the_config_says_what_transformers_makes_of_it(unusual):
    """No key of ours is unknown to LlamaConfig, and none is read as something else."""
    written, config = json.loads((unusual / "hf/config.json").read_text()), LlamaConfig.from_pretrained(unusual / "hf")
    again = config.to_dict()
    keys = written.keys() - {"torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters"}  # new names or old ones
    assert {key: again[key] for key in keys} == {key: written[key] for key in keys}
    rope = again.get("rope_parameters") or {"rope_theta": again["rope_theta"], "rope_type": "default"}
    assert rope == {"rope_theta": UNUSUAL.rope_theta, "rope_type": "default"}
    generation = json.loads((unusual / "hf/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_the_model_card_has_the_numbers_of_the_run(trained, tmp_path):
    assert run("convert_to_hf.py", "--checkpoint", trained, "--output", tmp_path / "hf")[0] == 0
    card = (tmp_path / "hf/README.md").read_text()
    training, evaluation = rows(trained)
    for expected in (f"{training[-1]['loss']:.4f} at step 3", f"{evaluation[-1]['val_loss']:.4f} at step 3",
                     "768 tokens in 3 steps", "2 layers, width 32", "vocabulary 300", "peak learning rate 0.01"):
        assert expected in card
    assert "None" not in card and str(trained) not in card and str(ROOT) not in card


def test_needs_neither_transformers_nor_tokenizers(trained, tmp_path):
    code = ("import runpy, sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None; "
            f"sys.argv = ['', '--checkpoint', {str(trained)!r}, '--output', {str(tmp_path / 'hf')!r}]; "
            "runpy.run_path('convert_to_hf.py', run_name='__main__')")
    assert run("-c", code)[::2] == (0, "")
    assert run("convert_to_hf.py", "--checkpoint", trained, "--output", tmp_path / "again")[0] == 0
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("options, reason", [
    ({"byte_fallback": False}, "it has no tokens for single bytes"),
    ({"model_type": "unigram"}, "is not the union of two others"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it changes the text"),
    ({"add_dummy_prefix": False}, "it changes the text"),
    ({"user_defined_symbols": ["<|sep|>"]}, "is not the union of two others"),
])
def test_a_tokenizer_that_transformers_would_read_otherwise_is_left_out(tmp_path, options, reason):
    tokenizer = train_tokenizer(tmp_path, 400, **options)
    size = data.load_tokenizer(tokenizer).vocab_size()
    save_model(tmp_path, dataclasses.replace(UNUSUAL, vocab_size=size, context=16), tokenizer)
    code, _, err = run("convert_to_hf.py", "--checkpoint", tmp_path)
    assert code == 0 and err.startswith("warning: without a tokenizer") and reason in err and len(err.splitlines()) == 1
    assert not list((tmp_path / "hf").glob("*token*"))


# --- from Hugging Face ------------------------------------------------------------------------------------------------


def test_there_and_back_gives_the_same_bytes(unusual, tmp_path):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    weights = safetensors.torch.load_file(unusual / "hf/model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # transformers once stored these
    safetensors.torch.save_file(weights, tmp_path / "hf/model.safetensors")
    code, _, err = run("convert_to_hf.py", "--from-hf", tmp_path / "hf", "--output", tmp_path / "back")
    assert code == 0 and err == ""
    before, after = (load_tensors(find_checkpoint(path), "model") for path in (unusual, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    states = [read_state(find_checkpoint(path)) for path in (unusual, tmp_path / "back")]
    assert states[0]["config"] == states[1]["config"] and states[0]["tokenizer_sha256"] == states[1]["tokenizer_sha256"]


def their_model(directory, **changes):
    """A Llama as transformers makes and saves one, in several files; returned too."""
    torch.manual_seed(0)
    config = LlamaConfig(**dict(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                num_attention_heads=4, max_position_embeddings=128, initializer_range=0.1) | changes)
    if hasattr(config, "rope_parameters"):  # transformers 5, which says it nowhere else
        config.rope_parameters["rope_theta"] = 500.0
    else:
        config.rope_theta = 500.0
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return model


@pytest.mark.parametrize("changes, note", [
    ({}, ""),
    ({"num_key_value_heads": 1, "rms_norm_eps": 1e-5}, "1 key-value heads for 4 heads; here each head has a copy"),
    ({"num_key_value_heads": 2, "tie_word_embeddings": True}, "one matrix for embedding and head; here the head is a copy"),
])
def test_a_published_model_keeps_its_logits(tmp_path, changes, note):
    theirs = their_model(tmp_path / "theirs", **changes)
    tokens = torch.randint(0, 600, (2, 128), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    code, _, err = run("convert_to_hf.py", "--from-hf", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert code == 0 and note in err and "without a tokenizer" in err
    assert (load_model(find_checkpoint(tmp_path / "ours"))(tokens) - expected).abs().max() < 1e-4
    assert run("convert_to_hf.py", "--checkpoint", tmp_path / "ours", "--output", tmp_path / "again")[0] == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert (again(tokens).logits - expected).abs().max() < 1e-4


def test_an_imported_model_is_trained_further(tiny, trained, tmp_path):
    """The first loss is the imported model's on the first batch, not ln V; a config of another shape is refused."""
    assert run("convert_to_hf.py", "--checkpoint", trained, "--output", tmp_path / "hf")[0] == 0
    assert run("convert_to_hf.py", "--from-hf", tmp_path / "hf", "--output", tmp_path / "imported")[0] == 0
    command = ["train.py", tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={tmp_path / 'imported'}", "--max_steps=3"]
    code, _, err = run(*command, "--vocab_size=300")
    assert code == 0, err
    config = load_config(tiny)
    tokens = data.Tokens(data.find_shards(config.data_dir, config.train_glob), config.context, 300)
    batch = torch.from_numpy(tokens.train_batch(0, config.batch_size, config.seed, 0, 1))
    loss = load_model(find_checkpoint(trained))(batch[:, :-1], batch[:, 1:]).item()
    training, _ = rows(tmp_path / "run")
    assert [row["step"] for row in training] == [1, 2, 3] and abs(training[0]["loss"] - loss) < 1e-5
    tokenizer = tmp_path / "run/checkpoints/step_00000003/tokenizer.model"
    assert tokenizer.read_bytes() == (trained / "tokenizer.model").read_bytes()
    shutil.rmtree(tmp_path / "run")
    code, _, err = run(*command, "--vocab_size=301", "--dim=64")
    assert code == 2 and "vocab_size was 300, is 301; dim was 32, is 64" in err


def test_the_text_of_a_hugging_face_directory_is_the_runs(unusual):
    model, other = load_hf(unusual / "hf"), load_model(find_checkpoint(unusual))
    for seed in range(3):
        ids, expected = (list(generate(Decoder(m), [1, 300], 50, 600, eos=2, seed=seed)) for m in (model, other))
        assert ids == expected


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(mistake):
    """Calls the command's main, and expects one sentence on stderr, behind notes."""
    def call(arguments, message):
        out, err = mistake(convert_to_hf.main, *arguments)
        assert out == "" and re.search(message, err), err
        assert [line.startswith("error: ") for line in err.splitlines() if not line.startswith("note: ")] == [True]
    return call


def tree(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mistral"}, "model_type = 'mistral', and this model can do 'llama' only"),
    ({"model_type": None}, "model_type = None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*LlamaForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "rope_scaling = .*llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_scaling = .*linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope_parameters = .*yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
    ({"rope_parameters": [1]}, "rope_parameters = "),
    ({"rope_theta": 1e4}, "contradicts itself: rope_theta is "),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ({"num_hidden_layers": 10**9}, "describes .* parameters"),
    ({"vocab_size": 10**30}, "vocab_size = 1000000"),
    ({"max_position_embeddings": 10**9}, "a context of 1,000,000,000"),
    ({"head_dim": 8}, "4 heads of head_dim = 8 .* do not make up hidden_size = 64"),
    ({"num_key_value_heads": 3}, "3 key-value heads do not make up"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size = None, expected a positive int"),
    ({"hidden_size": "64"}, "hidden_size = '64', expected a positive int"),
    ({"num_hidden_layers": 4}, "lacks, or should not have, the tensor model.layers.3"),
    ({"num_hidden_layers": 2}, "lacks, or should not have, the tensor model.layers.2"),
    ({"intermediate_size": 90}, r"has the shape \[.*\], and by config.json it is"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
    ({"vocab_size": 1_000}, "model.embed_tokens.weight has the shape"),
])
def test_what_this_model_cannot_express_is_refused(refused, unusual, tmp_path, change, message):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def make_int8(path):
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].char()}, path)


@pytest.mark.parametrize("spoil, message", [
    (lambda hf: (hf / "config.json").unlink(), "there is no .*config.json"),
    (lambda hf: (hf / "config.json").write_text("{"), "config.json is damaged"),
    (lambda hf: (hf / "config.json").write_text("[]"), "config.json is damaged"),
    (lambda hf: (hf / "model.safetensors").unlink(), "has no model.safetensors; weights in another form"),
    (lambda hf: cut(hf / "model.safetensors"), "model.safetensors can't be read"),
    (lambda hf: (hf / "tokenizer.model").write_bytes(b"?"), "tokenizer.model is not a SentencePiece model"),
    (lambda hf: make_int8(hf / "model.safetensors"), "lm_head.weight is torch.int8"),
])
def test_half_a_hugging_face_directory_is_refused(refused, unusual, tmp_path, spoil, message):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    spoil(tmp_path / "hf")
    refused(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_of_another_model_is_refused(refused, unusual, trained, tmp_path):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    shutil.copy(trained / "tokenizer.model", tmp_path / "hf")
    refused(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"], "has 300 tokens and vocab_size is 600")
    save_model(tmp_path / "run", dataclasses.replace(UNUSUAL, context=16), trained / "tokenizer.model")
    refused(["--checkpoint", tmp_path / "run"], "has 300 tokens and vocab_size is 600")
    save_model(tmp_path / "small", dataclasses.replace(UNUSUAL, context=16, vocab_size=299), trained / "tokenizer.model")
    refused(["--checkpoint", tmp_path / "small"], "has 300 tokens and vocab_size is 299")
    save_model(tmp_path / "padded", dataclasses.replace(UNUSUAL, context=16, vocab_size=384), trained / "tokenizer.model")
    assert run("convert_to_hf.py", "--checkpoint", tmp_path / "padded")[0] == 0
    assert sorted(path.name for path in tmp_path.rglob("hf*")) == ["hf", "hf"]


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "tokenizer.model", "state.json"])
def test_half_a_checkpoint_is_refused(refused, trained, tmp_path, name):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step_00000003" / name).unlink()
    refused(["--checkpoint", tmp_path], f"has no {name}|{name} is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_what_is_no_checkpoint_is_refused(refused, unusual, tmp_path):
    refused(["--checkpoint", tmp_path], f"no checkpoint in {tmp_path}")
    refused(["--checkpoint", tmp_path / "nowhere"], f"no checkpoint in {tmp_path / 'nowhere'}")
    refused(["--checkpoint", unusual / "hf", "--output", tmp_path / "out"], "no checkpoint in")
    refused(["--from-hf", unusual], "--from-hf needs --output")
    refused(["--from-hf", unusual, "--output", tmp_path / "x", "--dtype", "float16"], "takes no --checkpoint and no --dtype")
    refused(["--checkpoint", ""], "no checkpoint in .;")
    shutil.copytree(find_checkpoint(unusual), tmp_path / "alone")
    refused(["--checkpoint", tmp_path / "alone"], "is in no run's checkpoints/; name a directory with --output")
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def test_an_output_that_is_not_empty_is_left_as_it_is(refused, unusual, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file"):
        refused(["--checkpoint", unusual, "--output", output], "exists and is not an empty directory")
        refused(["--from-hf", unusual / "hf", "--output", output], "exists and is not an empty directory")
    before = tree(unusual)
    refused(["--checkpoint", unusual], "hf exists and is not an empty directory")
    assert tree(unusual) == before and tree(tmp_path) == {tmp_path / "file": b"x"}
    (tmp_path / "file").unlink()
    assert run("convert_to_hf.py", "--checkpoint", unusual, "--output", tmp_path)[0] == 0
    assert (tmp_path / "config.json").exists()


def test_a_full_disk_leaves_nothing(unusual, tmp_path):
    full = limit_file_size(200_000)  # the weights need more
    for arguments in (["--checkpoint", unusual], ["--from-hf", unusual / "hf"]):
        code, out, err = run("convert_to_hf.py", *arguments, "--output", tmp_path / "out", preexec_fn=full)
        assert code == 2 and out == "" and re.fullmatch("error: .* can't be written: .*File too large.*\n", err)
        assert os.listdir(tmp_path) == []


def test_weights_that_overflow_in_half_precision_are_refused(refused, tokenizer, tmp_path):
    model = save_model(tmp_path / "small", dataclasses.replace(UNUSUAL, context=16), tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    state = read_state(find_checkpoint(tmp_path / "small"))
    write(tmp_path / "run/checkpoints/step_00000000", {"model": dict(model.named_parameters())},
          {"metrics.jsonl": b"", "tokenizer.model": tokenizer.read_bytes()}, state)
    refused(["--checkpoint", tmp_path / "run", "--dtype", "float16"], "lm_head.weight has values too large for float16")
    assert run("convert_to_hf.py", "--checkpoint", tmp_path / "run", "--dtype", "bfloat16")[0] == 0
