"""convert_to_hf.py in both directions, against transformers: the installed version, which is 4.57.6
or, with the eval extra, 5.23.0."""
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
import sample
from model import ModelConfig, load_model
from nanoxla import checkpoint, hf_directory
from nanoxla.checkpoint import find_checkpoint, read_state
from nanoxla.hf_directory import hf_name
from nanoxla.hf_tokenizer import tokenizer_json
from nanoxla.tokenizer import load_tokenizer
from train import load_config

# No value is a default that a conversion could forget to write.
UNUSUAL = ModelConfig(vocab_size=600, dim=64, n_layers=3, n_heads=4, hidden_dim=96, context=1_024,
                      rope_theta=5e4, norm_eps=3e-4)
SHORT = dataclasses.replace(UNUSUAL, context=16)
TEXT = """<html>\n<head>\n<title>My Website</title> x</ y</ z</ as> bs> cs> ds>
def f(x):\n    return    x\t# a tab\r\n        1234567890 aaaaaaaaaaaaaaaa ================
we the people of the united states, in order to form a more perfect union; \
Fellow citizens of the Senate
naïve café œuvre 中文日本語 한국어 Ελληνικά русский
"""
HARD_TEXTS = [
    "", " ", "  ", "   ", "a", " a", "  a", "a ", "a  b", "\n", "\n\n", " \n ", "\t", "\r\n",
    "x\ty", "hello\nworld", "😀", "👩\u200d👩\u200d👧 family", "🇩🇪", "中文 日本語 한국어",
    "e\u0301 n\u0303 \u0301", "\u200b\ufeff\u2028", "\ufb01 \u00bd \u212b", "\x00\x01\x02",
    "\x7f\x1b[0m", "\U0010ffff", "<s>", "</s>", "<unk>", "a<s>b", "</s> x", " <s>hello</s>",
    "<0x0A>", "<0x0a", "1234567890", "İ ß", "a" * 50, "=-" * 40, "aaaa=====    \t\t\t",
    *(" " * n + "x = 1" for n in range(3, 50)), "<html>\n<head>\n<title>My Website</title>"]
HARD_TEXTS.append("".join(HARD_TEXTS) * 200)
HARD_TEXTS.append("\n".join(HARD_TEXTS[:-1]) + TEXT * 100)


def stored_model(run_directory):
    """The model of a run's newest checkpoint."""
    path = find_checkpoint(run_directory)
    return load_model(*checkpoint.load(path), path).eval()


def train_tokenizer(directory, vocab_size, **options):
    """Trains a tokenizer like Llama's, apart from the options. Returns its path."""
    (directory / "text.txt").write_text(TEXT * 100)
    like_llama = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
        "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"),
        vocab_size=vocab_size, minloglevel=2, hard_vocab_limit=False, **like_llama | options)
    return directory / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A SentencePiece model of 600 tokens. Some pairs of them spell a control token, and runs of
    spaces have equal scores, as in Mistral's."""
    directory = tmp_path_factory.mktemp("tokenizer")
    path = train_tokenizer(directory, UNUSUAL.vocab_size, split_by_unicode_script=False)
    content, processor = path.read_bytes(), load_tokenizer(path)
    for i in range(UNUSUAL.vocab_size):
        piece = processor.id_to_piece(i)
        if set(piece) == {"▁"} and len(piece) > 1:
            # In the protocol buffer, field 1 (0x0a) is the piece, and field 2 (0x15) its score.
            entry = b"\x0a" + bytes([len(piece.encode())]) + piece.encode() + b"\x15"
            content = content.replace(entry + struct.pack("<f", processor.get_score(i)),
                                      entry + struct.pack("<f", -1e9))
    path.write_bytes(content)
    processor = load_tokenizer(path)
    assert sum(processor.get_score(i) == -1e9 for i in range(UNUSUAL.vocab_size)) > 3
    return path


@pytest.fixture(scope="module")
def unusual(tokenizer, tmp_path_factory):
    """A run with the config UNUSUAL, converted to its hf/ by the real command."""
    out_dir = tmp_path_factory.mktemp("unusual")
    save_model(out_dir, UNUSUAL, tokenizer)
    code, out, err = run("convert_to_hf.py", "--checkpoint", out_dir)
    assert code == 0 and err == "" and f"-> {out_dir / 'hf'}: 30 tensors" in out
    return out_dir


@pytest.fixture
def convert(call):
    """convert(*arguments) calls convert_to_hf.py in this process. Returns what it prints on
    stderr."""
    return lambda *arguments: call(convert_to_hf.main, *arguments)[1]


# --- to Hugging Face ----------------------------------------------------------------------------


def test_logits_over_a_full_context_equal_transformers(unusual):
    theirs = AutoModelForCausalLM.from_pretrained(unusual / "hf").eval()
    tokens = torch.randint(0, UNUSUAL.vocab_size, (2, UNUSUAL.context),
                           generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, stored_model(unusual)(tokens)
    assert type(theirs) is LlamaForCausalLM and theirs.dtype == torch.float32
    assert logits.std() > 0.5 and (logits - expected).abs().max() < 1e-4


def test_greedy_text_equals_transformers(unusual, call, capsys):
    directory = unusual / "hf"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    capsys.readouterr()  # transformers 5 shows a progress bar
    for prompt in ("we the people", "", " <html>\n"):
        ids = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**ids, max_new_tokens=200, do_sample=False)[0]
        for source in (unusual, directory):
            out, err = call(sample.main, "--checkpoint", source, "--prompt", prompt,
                            "--temperature", 0)
            assert err == ""
            assert out == tokenizer.decode(theirs, skip_special_tokens=True) + "\n\n"


@pytest.mark.parametrize("name", ["unusual", "trained"])
def test_token_ids_equal_sentencepiece_and_decode_to_the_text(name, request, tmp_path, convert):
    out_dir = request.getfixturevalue(name)
    convert("--checkpoint", out_dir, "--output", tmp_path / "hf")
    processor = load_tokenizer(tmp_path / "hf/tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    bos = processor.bos_id()
    for text in HARD_TEXTS:
        ids = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [bos, *ids]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode([bos, *ids], skip_special_tokens=True) == text
        assert processor.decode(ids) == text
    assert tokenizer.bos_token_id == bos and tokenizer.eos_token_id == processor.eos_id()
    assert len(tokenizer) == processor.vocab_size()
    context = read_state(find_checkpoint(out_dir))["config"]["context"]
    assert tokenizer.model_max_length == context


def test_no_merge_spells_a_control_token(tokenizer):
    """With a tokenizer of which no two pieces spell "</s>", the test above could pass by luck."""
    bpe = tokenizer_json(load_tokenizer(tokenizer))["model"]
    assert any("</s>" == left + right for left in bpe["vocab"] for right in bpe["vocab"])
    assert not any("</s>" == left + right for left, right in bpe["merges"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_requested_dtype(unusual, tmp_path, convert, dtype):
    convert("--checkpoint", unusual, "--output", tmp_path / "hf", "--dtype", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    for name, p in stored_model(unusual).named_parameters():
        assert torch.equal(theirs.state_dict()[hf_name(name)], p.to(theirs.dtype)), name
    weights = tmp_path / "hf/model.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert weights.stat().st_mode == (tmp_path / "hf/config.json").stat().st_mode


def test_transformers_reads_the_config_as_it_was_written(unusual):
    """LlamaConfig knows every key, and reads none of them as something else."""
    written = json.loads((unusual / "hf/config.json").read_text())
    read = LlamaConfig.from_pretrained(unusual / "hf").to_dict()
    renamed = {"torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters"}
    for key in written.keys() - renamed:  # versions 4 and 5 name these differently
        assert read[key] == written[key]
    rope = {"rope_theta": UNUSUAL.rope_theta, "rope_type": "default"}
    version_4 = {"rope_theta": read.get("rope_theta"), "rope_type": "default"}
    assert (read.get("rope_parameters") or version_4) == rope
    generation = json.loads((unusual / "hf/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_the_model_card_states_the_numbers_of_the_run(trained, tmp_path, convert):
    convert("--checkpoint", trained, "--output", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    training, evaluation = rows(trained)
    for expected in (f"{training[-1]['loss']:.4f} at step 3",
                     f"{evaluation[-1]['val_loss']:.4f} at step 3",
                     "768 tokens in 3 steps", "2 layers, width 32", "vocabulary 300",
                     "peak learning rate 0.01"):
        assert expected in card
    for unexpected in ("None", str(trained), str(ROOT)):
        assert unexpected not in card


def test_conversion_needs_neither_transformers_nor_tokenizers(trained, tmp_path, convert):
    arguments = ["", "--checkpoint", str(trained), "--output", str(tmp_path / "without")]
    code = ("import runpy, sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None; "
            f"sys.argv = {arguments!r}; "
            "runpy.run_path('convert_to_hf.py', run_name='__main__')")
    assert run("-c", code)[::2] == (0, "")
    convert("--checkpoint", trained, "--output", tmp_path / "with")
    for path in (tmp_path / "without").iterdir():
        assert path.read_bytes() == (tmp_path / "with" / path.name).read_bytes()


@pytest.mark.parametrize("options, reason", [
    ({"byte_fallback": False}, "it has no tokens for single bytes"),
    ({"model_type": "unigram"}, "is not the union of two others"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it changes the text"),
    ({"add_dummy_prefix": False}, "it changes the text"),
    ({"user_defined_symbols": ["<|sep|>"]}, "is not the union of two others"),
])
def test_a_tokenizer_that_transformers_cannot_express_is_omitted(tmp_path, convert, options,
                                                                 reason):
    tokenizer = train_tokenizer(tmp_path, 400, **options)
    size = load_tokenizer(tokenizer).vocab_size()
    save_model(tmp_path, dataclasses.replace(SHORT, vocab_size=size), tokenizer)
    err = convert("--checkpoint", tmp_path)
    assert err.startswith("warning: the output has no tokenizer") and reason in err
    assert len(err.splitlines()) == 1 and not list((tmp_path / "hf").glob("*token*"))


# --- from Hugging Face --------------------------------------------------------------------------


def test_a_round_trip_gives_the_same_bytes(unusual, tmp_path, convert):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    weights = safetensors.torch.load_file(unusual / "hf/model.safetensors")
    # Old versions of transformers stored such a tensor.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    safetensors.torch.save_file(weights, tmp_path / "hf/model.safetensors")
    assert convert("--from-hf", tmp_path / "hf", "--output", tmp_path / "back") == ""
    before, after = find_checkpoint(unusual), find_checkpoint(tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.model", "state.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()


def their_model(directory, **changes):
    """A Llama that transformers makes, and saves in several files."""
    torch.manual_seed(0)
    values = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1}
    config = LlamaConfig(**values | changes)
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters["rope_theta"] = 500.0
    else:
        config.rope_theta = 500.0
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return model


@pytest.mark.parametrize("changes, note", [
    ({}, ""),
    ({"num_key_value_heads": 1, "rms_norm_eps": 1e-5},
     "1 key-value heads for 4 heads; here each head gets its own copy"),
    ({"num_key_value_heads": 2, "tie_word_embeddings": True},
     "one matrix for embedding and head; here the head is a copy"),
])
def test_a_published_model_keeps_its_logits(tmp_path, convert, changes, note):
    theirs = their_model(tmp_path / "theirs", **changes)
    tokens = torch.randint(0, 600, (2, 128), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    err = convert("--from-hf", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert note in err and "the output has no tokenizer" in err
    assert (stored_model(tmp_path / "ours")(tokens) - expected).abs().max() < 1e-4
    convert("--checkpoint", tmp_path / "ours", "--output", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert (again(tokens).logits - expected).abs().max() < 1e-4


def test_an_imported_model_trains_further(tiny, trained, tmp_path, convert, train_fails):
    """The first loss is that of the imported model on the first batch, not ln V."""
    convert("--checkpoint", trained, "--output", tmp_path / "hf")
    convert("--from-hf", tmp_path / "hf", "--output", tmp_path / "imported")
    arguments = [tiny, f"--out_dir={tmp_path / 'run'}", f"--resume={tmp_path / 'imported'}",
                 "--max_steps=3"]
    code, _, err = run("train.py", *arguments, "--vocab_size=300")
    assert code == 0, err
    config = dataclasses.replace(load_config(tiny), vocab_size=300)
    train_data, _ = data.open_data(config)
    batch = torch.from_numpy(train_data.batch(0, config.batch_size, config.seed, 0, 1))
    loss = stored_model(trained)(batch[:, :-1], batch[:, 1:]).item()
    training, _ = rows(tmp_path / "run")
    assert [row["step"] for row in training] == [1, 2, 3]
    assert abs(training[0]["loss"] - loss) < 1e-5
    tokenizer = tmp_path / "run/checkpoints/step_00000003/tokenizer.model"
    assert tokenizer.read_bytes() == (trained / "tokenizer.model").read_bytes()
    shutil.rmtree(tmp_path / "run")
    message = train_fails(*arguments, "--vocab_size=301", "--dim=64")
    assert "vocab_size was 300, is 301; dim was 32, is 64" in message


def test_a_hugging_face_directory_samples_the_text_of_its_run(unusual):
    directory = unusual / "hf"
    models = load_model(*hf_directory.read(directory), directory), stored_model(unusual)
    for seed in range(3):
        theirs, ours = (list(sample.generate(sample.Decoder(model), [1, 300], 50, 600, eos=2,
                                             seed=seed)) for model in models)
        assert theirs == ours


# --- mistakes -----------------------------------------------------------------------------------


@pytest.fixture
def refuses(mistake):
    """refuses(arguments, message) calls the command in this process, and expects the one-line error
    `message`, a regular expression. Notes may precede it."""
    def call(arguments, message):
        out, err = mistake(convert_to_hf.main, *arguments)
        assert out == "" and re.search(message, err), err
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ")
    return call


def files_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mistral"}, "model_type = 'mistral'; model.py supports only 'llama'"),
    ({"model_type": None}, "model_type = None"),
    ({"architectures": ["LlamaForSequenceClassification"]},
     "architectures = .*LlamaForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None},
     "rope_scaling = .*llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
     "rope_scaling = .*linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope_parameters = .*yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
    ({"rope_parameters": [1]}, "rope_parameters = "),
    ({"rope_theta": 1e4}, "contradicts itself: rope_theta is "),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ({"num_hidden_layers": 10**9}, "describes .* parameters"),
    ({"vocab_size": 10**30}, "vocab_size = 1000000"),
    ({"max_position_embeddings": 10**9}, "a context of 1,000,000,000"),
    ({"head_dim": 8}, "4 heads of head_dim = 8 .* do not make up hidden_size = 64"),
    ({"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 1}, "head_dim = 1 is odd"),
    ({"num_key_value_heads": 3}, "3 key-value heads do not make up"),
    ({"num_key_value_heads": 2}, r"k_proj.weight has the shape \[64, 64\]; its config implies"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size = None, expected a positive int"),
    ({"hidden_size": "64"}, "hidden_size = '64', expected a positive int"),
    ({"num_hidden_layers": 4}, "lacks the tensor layers.3"),
    ({"num_hidden_layers": 2}, "has an unexpected tensor layers.2"),
    ({"intermediate_size": 90}, r"has the shape \[.*\]; its config implies"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
    ({"vocab_size": 1_000}, "embed_tokens.weight has the shape"),
])
def test_a_config_that_model_py_cannot_compute_is_refused(refuses, unusual, tmp_path, change,
                                                          message):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuses(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(path, change):
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


def head_as_int8(tensors):
    return tensors | {"lm_head.weight": tensors["lm_head.weight"].char()}


def norm_without_prefix(tensors):
    return tensors | {"norm.weight": tensors.pop("model.norm.weight")}


@pytest.mark.parametrize("damage, message", [
    (lambda hf: (hf / "config.json").unlink(), "there is no .*config.json"),
    (lambda hf: (hf / "config.json").write_text("{"), "config.json is damaged"),
    (lambda hf: (hf / "config.json").write_text("[]"), "config.json is damaged"),
    (lambda hf: (hf / "model.safetensors").unlink(),
     "has no model.safetensors; weights in another form"),
    (lambda hf: truncate(hf / "model.safetensors"), "model.safetensors can't be read"),
    (lambda hf: (hf / "tokenizer.model").write_bytes(b"?"),
     "tokenizer.model is not a SentencePiece model"),
    (lambda hf: change_tensors(hf / "model.safetensors", head_as_int8),
     "lm_head.weight is torch.int8"),
    (lambda hf: change_tensors(hf / "model.safetensors", norm_without_prefix),
     "should not have the tensor norm.weight"),
])
def test_a_damaged_hugging_face_directory_is_refused(refuses, unusual, tmp_path, damage, message):
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    refuses(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"], message)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_of_another_model_is_refused(refuses, convert, unusual, trained, tmp_path):
    other = trained / "tokenizer.model"
    shutil.copytree(unusual / "hf", tmp_path / "hf")
    shutil.copy(other, tmp_path / "hf")
    refuses(["--from-hf", tmp_path / "hf", "--output", tmp_path / "out"],
            "has 300 tokens and vocab_size is 600")
    for vocab_size in (600, 299):
        save_model(tmp_path / f"{vocab_size}", dataclasses.replace(SHORT, vocab_size=vocab_size),
                   other)
        refuses(["--checkpoint", tmp_path / f"{vocab_size}"],
                f"has 300 tokens and vocab_size is {vocab_size}")
    save_model(tmp_path / "padded", dataclasses.replace(SHORT, vocab_size=384), other)
    convert("--checkpoint", tmp_path / "padded")
    assert sorted(tmp_path.rglob("hf*")) == [tmp_path / "hf", tmp_path / "padded/hf"]


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "tokenizer.model",
                                  "state.json"])
def test_an_incomplete_checkpoint_is_refused(refuses, trained, tmp_path, name):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step_00000003" / name).unlink()
    refuses(["--checkpoint", tmp_path], f"has no {name}|{name} is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_arguments_that_do_not_fit_are_refused(refuses, unusual, tmp_path):
    refuses(["--checkpoint", tmp_path], f"no checkpoint in {tmp_path}")
    refuses(["--checkpoint", tmp_path / "nowhere"], f"no checkpoint in {tmp_path / 'nowhere'}")
    refuses(["--checkpoint", unusual / "hf", "--output", tmp_path / "out"], "no checkpoint in")
    refuses(["--checkpoint", ""], "no checkpoint in .;")
    refuses(["--from-hf", unusual], "--from-hf needs --output")
    refuses(["--from-hf", unusual, "--output", tmp_path / "x", "--dtype", "float16"],
            "takes no --checkpoint and no --dtype")
    shutil.copytree(find_checkpoint(unusual), tmp_path / "moved")
    refuses(["--checkpoint", tmp_path / "moved"],
            "is not in the checkpoints/ of a run; name a directory with --output")
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_an_output_that_is_not_empty_is_refused(refuses, convert, unusual, tmp_path):
    (tmp_path / "file").write_text("x")
    before = files_in(unusual)
    for output in (tmp_path, tmp_path / "file"):
        for source in (["--checkpoint", unusual], ["--from-hf", unusual / "hf"]):
            refuses([*source, "--output", output], "exists and is not an empty directory")
    refuses(["--checkpoint", unusual], "hf exists and is not an empty directory")
    assert files_in(unusual) == before and files_in(tmp_path) == {tmp_path / "file": b"x"}


def test_an_empty_output_is_filled(refuses, convert, unusual, tmp_path, monkeypatch):
    convert("--checkpoint", unusual, "--output", tmp_path)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refuses(["--checkpoint", unusual, "--output", "."], "--output is the current directory")


def test_a_full_disk_leaves_no_files(unusual, tmp_path):
    full = limit_file_size(200_000)  # less than the weights need
    for arguments in (["--checkpoint", unusual], ["--from-hf", unusual / "hf"]):
        code, out, err = run("convert_to_hf.py", *arguments, "--output", tmp_path / "out",
                             preexec_fn=full)
        assert code == 2 and out == ""
        assert re.fullmatch("error: .* can't be written: .*File too large.*\n", err)
        assert os.listdir(tmp_path) == []


def test_weights_that_overflow_in_half_precision_are_refused(refuses, convert, tokenizer, tmp_path):
    model = save_model(tmp_path / "small", SHORT, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    checkpoint.write(tmp_path / "run/checkpoints/step_00000000",
                     {"model": dict(model.named_parameters())},
                     {"metrics.jsonl": b"", "tokenizer.model": tokenizer.read_bytes()},
                     read_state(find_checkpoint(tmp_path / "small")))
    refuses(["--checkpoint", tmp_path / "run", "--dtype", "float16"],
            "lm_head.weight has values too large for float16")
    convert("--checkpoint", tmp_path / "run", "--dtype", "bfloat16")
