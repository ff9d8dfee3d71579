"""data.py prepare: the formats, documents that cannot be read, killing and resuming, shuffling."""
import gzip
import io
import json
import os
import random
import signal
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from conftest import run, start
from test_data import DOCUMENTS, all_ids, assert_complete, checksums, decoded

import data
from nanoxla import texts as texts_module
from nanoxla.documents import batches, find_inputs
from nanoxla.encode import Words, independent_words
from nanoxla.errors import UserError
from nanoxla.shards import TOKEN_DTYPE, read_meta
from nanoxla.texts import Skipped, read_texts
from nanoxla.tokenizer import load_tokenizer, train_tokenizer

# --- the formats --------------------------------------------------------------------------------

TEXTS = ['one "quoted", text', "two\nlines\r\nand \t tabs  ", "naïve 中文 😀"]
ROWS = [{"id": i, "text": text, "meta": {"body": text[::-1]}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter):
    file = io.StringIO()
    quoted = [['id', 'text'], *([str(row["id"]), row["text"]] for row in ROWS)]
    for cells in quoted:
        file.write(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n")
    return file.getvalue().encode()


def columns(kind):
    file, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, file)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with new(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    return file.getvalue()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read(*files, text_key="text"):
    """The texts of the files, and the faults of all batches."""
    found = [read_texts(batch, text_key) for batch, _ in batches(list(files), text_key)]
    return [text for texts, _ in found for text in texts], [faults for _, faults in found if faults]


FORMATS = {  # file name: content
    "a.jsonl": LINES, "A.JSONL": LINES, "a.jsonl.gz": gzip.compress(LINES),
    "two members.jsonl.gz": gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
    "a.jsonl.zst": zstd(LINES), "two frames.jsonl.zst": zstd(LINES[:50]) + zstd(LINES[50:]),
    "lines.json": b" \n" + LINES,
    "a.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()), "a.json.zst": zstd(LINES),
    "a.csv": table(","), "bom.csv": b"\xef\xbb\xbf" + table(","), "a.tsv": table("\t"),
    "a.csv.gz": gzip.compress(table(",")), "a.parquet": columns("parquet"),
    "stream.arrow": columns("stream"), "file.arrow": columns("file")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    files = find_inputs([tmp_path])
    assert read(*files) == (TEXTS, [])
    size = sum(read for _, read in batches(files, "text"))
    assert size <= len(FORMATS[name])  # for the progress bar


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a.txt.gz", "a.md.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    content = "\n".join(TEXTS).encode()
    pack = {".gz": gzip.compress, ".zst": zstd}.get(name[-3:] if "gz" in name else name[-4:], bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert read(*find_inputs([tmp_path / name])) == (["\n".join(TEXTS)], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "stream.arrow"])
def test_a_nested_key(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert read(tmp_path / name, text_key="meta.body") == ([text[::-1] for text in TEXTS], [])


def test_a_key_that_contains_a_dot_wins_over_a_nested_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "this", "a": {"b": "not this"}}')
    assert read(tmp_path / "a.jsonl", text_key="a.b") == (["this"], [])


def test_a_directory_is_read_through_links_and_each_file_once(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/.hidden").mkdir()
    (tmp_path / "in/.store").mkdir()
    for name in ("in/b.txt", "in/sub/a.txt", "in/x.xml", "in/sub/y.PDF", "in/sub/z.pdf",
                 "elsewhere/c.txt", "in/dataset_info.json", "in/._b.txt",
                 "in/.hidden/not_this.txt", "in/.store/d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "in/a_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/also").symlink_to(tmp_path / "in/sub")
    (tmp_path / "in/texts").symlink_to(tmp_path / "in/.store")
    found = find_inputs([tmp_path / "in"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "in/a_link/c.txt", "in/b.txt", "in/sub/a.txt", "in/texts/d.txt"]
    assert capsys.readouterr().err == (
        "note: 4 other files were passed over: .PDF, .pdf, .xml, dataset_info.json\n")


@pytest.mark.parametrize("name, mend", [
    ("a.pdf", "pdftotext"), ("a.zip", "unzip"), ("a.tar.gz", "tar xzf"),
    ("a", "put its text into")])
def test_a_file_that_cannot_be_read_comes_with_a_mend(tmp_path, name, mend):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: expected one of \.txt .*; .*{mend}"):
        find_inputs([tmp_path / name])


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"[" * 10, "a.json is not a JSON array"),
    ("a.json", b'[{"text": "%s"}]' % (b"x" * 3_000), r"array and larger .* jq -c '\.\[\]'"),
    ("a.jsonl.zst", zstd(LINES)[:-9], "a.jsonl.zst is not a complete zstd file"),
    ("a.jsonl.zst", LINES, "a.jsonl.zst is not a complete zstd file"),
    ("a.txt.gz", gzip.compress(LINES)[:-9], "a.txt.gz is not a complete gzip file"),
    ("a.csv", b"id,body\n1,x\n", "a.csv has no column 'text'; see --text-key. .*: id, body"),
    ("a.csv", b"", "a.csv has no column 'text'"),
    ("a.arrow", columns("stream")[:400], "a.arrow is not a readable arrow file")])
def test_a_file_that_is_damaged_ends_it(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("nanoxla.documents.MAX_DOCUMENT_BYTES", 2_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


# --- documents that cannot be read --------------------------------------------------------------


@pytest.mark.parametrize("name, content, fault, message", [
    ("a.jsonl", b'{"text": null}', "no text", "{}:2: expected .* 'text' is a string"),
    ("a.jsonl", b'{"content": "x", "a": {"b": "y", "c": 1}}', "no text",
     "{}:2: .* has strings at: content, a.b"),
    ("a.jsonl", b"[1]", "no text", "{}:2: expected a JSON object"),
    ("a.jsonl", b"{", "not JSON", "{}:2 is not a JSON object"),
    ("a.jsonl", b'{"text": "\xff"}', "not UTF-8", "{}:2 is not UTF-8: byte 0xff"),
    ("a.jsonl", b'{"text": "%s"}' % (b"x" * 3_000), "too large", "{}:2 is larger than "),
    ("a.txt", b"x" * 2_001, "too large", "{} is larger than .* Split it"),
    ("a.csv", b"\xff", "not UTF-8", "{}:3 is not UTF-8"),
    ("a.csv", None, "no text", "{}:3: 'text' is null"),
    ("a.parquet", None, "no text", "{}: row 2: 'text' is null")])
def test_a_bad_document_is_skipped(tmp_path, monkeypatch, name, content, fault, message):
    monkeypatch.setattr("nanoxla.documents.MAX_DOCUMENT_BYTES", 2_000)
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", content, " ", "three"]}), path)
    elif name == "a.csv":
        cell = b"2" if content is None else b"2," + content
        path.write_bytes(b"id,text\n1,one\n" + cell + b"\n3, \n4,three\n")
    elif name == "a.txt":
        path.write_bytes(content)
    else:
        path.write_bytes(b'{"text": "one"}\n' + content + b'\n\n{"text": "three"}\n')
    texts, faults = read(path)
    assert texts == ([] if name == "a.txt" else ["one", "three"])
    ((count, found),) = faults[0].values()
    assert list(faults[0]) == [fault] and count == 1
    with pytest.raises(UserError, match=message.format(path)):
        raise UserError(found)


def test_skipped_shows_the_first_of_a_kind_and_ends_at_max_bad(monkeypatch, capsys):
    monkeypatch.setattr(texts_module, "ENOUGH", 100)
    skipped = Skipped(max_bad=0.1, strict=False)
    skipped.add(10, {"no text": [5, "a:1 has no text"]})  # too many, but it is early
    skipped.add(80, {"no text": [1, "a:9 has no text"], "not JSON": [1, "a:10 is not JSON"]})
    assert capsys.readouterr().err == "skipped: a:1 has no text\nskipped: a:10 is not JSON\n"
    skipped.add(3, {})
    assert skipped.counts == {"no text": 6, "not JSON": 1} and skipped.seen == 100
    with pytest.raises(UserError, match="11 of 104 .* --max-bad 0.1 of them; the first: a:1 has"):
        skipped.add(0, {"no text": [4, "a:99"]})
    with pytest.raises(UserError, match="^a:1 has no text$"):
        Skipped(max_bad=1, strict=True).add(1, {"no text": [1, "a:1 has no text"]})


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory with a tokenizer and 8 MB of documents, which all differ."""
    path = tmp_path_factory.mktemp("prepare")
    lines = [json.dumps({"text": f"{copy}: {text}"}) + "\n"
             for copy in range(4) for text in DOCUMENTS]
    (path / "docs.jsonl").write_text("".join(lines))
    (path / "small.jsonl").write_text("".join(lines[:200]))
    train_tokenizer(path / "tok.model", [path / "small.jsonl"], 400, 0.1, "text")
    return path


def command(corpus, out, *options, source="docs.jsonl"):
    return ["prepare", "--input", corpus / source, "--tokenizer", corpus / "tok.model",
            "--out", out, "--val-fraction", "0.1", *options]


def test_bad_documents_are_counted_and_old_readers_do_not_mind(corpus, tmp_path, call):
    good = (corpus / "small.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' + good + "{\n{\n")
    out, err = call(data.main, *command(tmp_path, tmp_path / "out", "--max-bad", "0.02",
                                        source="a.jsonl", ), "--tokenizer", corpus / "tok.model")
    assert "skipped: 1 no text, 2 not JSON" in out and err.count("skipped: ") == 2
    assert read_meta(tmp_path / "out")["skipped"] == {"no text": 1, "not JSON": 2}
    call(data.main, *command(corpus, tmp_path / "good", source="small.jsonl"))
    for split in ("train", "val"):
        assert (all_ids(tmp_path / "out", split) == all_ids(tmp_path / "good", split)).all()


def test_training_a_tokenizer_skips_the_same_documents(corpus, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text((corpus / "small.jsonl").read_text() + "{\n")
    files = [tmp_path / "a.jsonl"]
    train_tokenizer(tmp_path / "t.model", files, 400, 0.1, "text", Skipped(0.01, False))
    assert (tmp_path / "t.model").read_bytes() == (corpus / "tok.model").read_bytes()
    with pytest.raises(UserError, match="a.jsonl:201 is not a JSON object"):
        train_tokenizer(tmp_path / "t.model", files, 400, 0.1, "text", Skipped(0.01, True))


@pytest.mark.parametrize("kind", ["JSON lines", "text"])
def test_standard_input(corpus, tmp_path, kind):
    texts = ["{} is text"] + [f"line {i}  {text.split()[0]}" for i, text in enumerate(DOCUMENTS)]
    texts = texts[kind == "text":][:100]
    lines = [json.dumps({"text": text}) if kind == "JSON lines" else text for text in texts]
    arguments = command(corpus, tmp_path / "out")
    arguments[2] = "-"
    code, _, err = run("data.py", *arguments, input="\n".join(lines) + "\n")
    assert code == 0, err
    found = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    assert sorted(found) == sorted(texts)


def test_standard_input_cannot_train_a_tokenizer(tmp_path, mistake):
    _, err = mistake(data.main, "prepare", "--input", "-", "--tokenizer", tmp_path / "t.model",
                     "--vocab-size", 400, "--out", tmp_path / "out")
    assert "standard input can be read only once" in err


# --- killed, and resumed ------------------------------------------------------------------------

SLOW = """
import sys, time, data, nanoxla.prepare as prepare
prepare.SAVE_SECONDS, prepare.BUCKET_BYTES = 0.0, 1 << 20
shuffled = prepare.ShufflingWriter.shuffled
prepare.ShufflingWriter.shuffled = lambda *arguments: time.sleep(0.02) or shuffled(*arguments)
data.main()
"""
SHUFFLE = "--shuffle-seed", "3"


@pytest.fixture
def many_buckets(monkeypatch):
    monkeypatch.setattr("nanoxla.prepare.BUCKET_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """{options: the checksums of a run that nothing interrupted}."""
    found = {}
    for options in ((), SHUFFLE):
        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        code, _, err = run("-c", SLOW.replace("0.02", "0"),
                           *command(corpus, out, "--shard-tokens", 500_000, *options))
        assert code == 0, err
        found[options] = checksums(out)
    return found


def kill_when(ready, arguments):
    """Starts SLOW with the arguments, and kills it (-9) as soon as ready() is true."""
    process = start("-c", SLOW, *arguments)
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("phase, options", [
    ("encoding", ()), ("encoding", SHUFFLE), ("shuffling", SHUFFLE)])
def test_after_a_kill_the_same_command_goes_on(corpus, tmp_path, call, many_buckets, uninterrupted,
                                               phase, options):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = command(corpus, out, "--shard-tokens", "500000", *options)

    def batches_done():
        path = partial / "progress.json"
        return json.loads(path.read_bytes())["done"]["batches"] if path.exists() else 0

    if phase == "encoding":
        kill_when(batches_done, arguments)
        before = batches_done()
        kill_when(lambda: batches_done() > before, arguments)  # once more, after resuming
        with (partial / "train_99999.bin").open("wb") as file:  # begun after the last record
            file.write(bytes(99))
    else:
        kill_when((partial / "train_00001.bin").exists, arguments)
    assert 0 < batches_done() and not out.exists()
    _, err = call(data.main, *arguments, "--processes", "1", "--max-bad", "0.5")
    assert f"going on from {partial}: " in err
    assert checksums(out) == uninterrupted[options]
    assert_complete(out)


def test_after_a_failure_the_work_so_far_stays(corpus, tmp_path, call, mistake, monkeypatch):
    monkeypatch.setattr("nanoxla.prepare.SAVE_SECONDS", 0)
    (tmp_path / "a.jsonl").write_text((corpus / "docs.jsonl").read_text() + "{\n" * 100)
    arguments = [*command(tmp_path, tmp_path / "out", source="a.jsonl"),
                 "--tokenizer", corpus / "tok.model"]
    _, err = mistake(data.main, *arguments)
    assert "out.partial keeps what is done: the same command goes on" in err
    assert err.splitlines()[-1].startswith("error: 100 of 4,100 documents cannot be read")
    _, err = call(data.main, *arguments, "--max-bad", "0.1")
    assert "going on from" in err and read_meta(tmp_path / "out")["skipped"] == {"not JSON": 100}
    assert len(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == 4_000


def test_out_may_be_below_the_input(corpus, tmp_path, call, many_buckets, uninterrupted):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/docs.jsonl").write_bytes((corpus / "docs.jsonl").read_bytes())
    out, partial = tmp_path / "in/out", tmp_path / "in/out.partial"
    arguments = [*command(tmp_path, out, "--shard-tokens", "500000", source="in"),
                 "--tokenizer", str(corpus / "tok.model")]
    kill_when((partial / "progress.json").exists, arguments)
    _, err = call(data.main, *arguments)
    assert f"going on from {partial}: " in err and checksums(out) == uninterrupted[()]


def test_a_new_tokenizer_in_out_is_refused_before_the_work(corpus, tmp_path, mistake):
    out = tmp_path / "out"
    _, err = mistake(data.main, *command(corpus, out), "--tokenizer", out / "new.model",
                     "--vocab-size", "300")
    assert "new.model would be in --out, which has to be empty" in err and not out.exists()


def test_a_file_that_appears_in_out_costs_no_work(corpus, tmp_path, call, mistake, monkeypatch):
    monkeypatch.setattr("nanoxla.prepare.SAVE_SECONDS", 0)
    out, arguments = tmp_path / "out", command(corpus, tmp_path / "out")
    monkeypatch.setattr("nanoxla.prepare.check_unused", lambda *_: None)
    out.mkdir()
    (out / "notes.txt").touch()
    _, err = mistake(data.main, *arguments)
    assert f"{out} is no longer empty" in err and "same command goes on" in err
    (out / "notes.txt").unlink()
    _, err = call(data.main, *arguments)
    assert "going on from" in err
    assert_complete(out)


def test_another_job_begins_anew(corpus, tmp_path, call, many_buckets, uninterrupted):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    kill_when((partial / "progress.json").exists, command(corpus, out, "--shard-tokens", "400000"))
    _, err = call(data.main, *command(corpus, out, "--shard-tokens", "500000"))
    assert "going on" not in err and checksums(out) == uninterrupted[()]


def test_a_second_prepare_into_the_same_directory_is_refused(corpus, tmp_path, mistake):
    arguments = command(corpus, tmp_path / "out")

    def refused():
        if not (tmp_path / "out.partial/train_00000.bin").exists():
            return False
        _, err = mistake(data.main, *arguments)
        assert "another process is writing" in err
        return True
    kill_when(refused, arguments)


def test_shuffling_moves_every_document_once(corpus, tmp_path, call, monkeypatch):
    monkeypatch.setattr("nanoxla.prepare.BUCKET_BYTES", 50_000)
    for name, seed, processes in (("a", 3, 1), ("b", 3, 2), ("c", 4, 2)):
        call(data.main, *command(corpus, tmp_path / name, "--shuffle-seed", seed,
                                 "--processes", processes, source="small.jsonl"))
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    lines = (corpus / "small.jsonl").read_text().splitlines()
    order = [json.loads(line)["text"] for line in lines]
    for split in ("train", "val"):
        a, c = (decoded(tmp_path / name, split) for name in "ac")
        assert sorted(a) == sorted(c) == sorted(text for text in order if text in set(a)) and a != c
    places = np.array([order.index(text) for text in decoded(tmp_path / "a", "train")])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.2


# --- word by word -------------------------------------------------------------------------------

MODELS = {  # name: (options of SentencePiece's trainer, whether its words are independent)
    "as ours": ({}, True),
    "unknown characters": ({"byte_fallback": False}, True),
    "own symbols": ({"user_defined_symbols": ["<x>", "the", "▁▁"]}, True),
    "unigram": ({"model_type": "unigram"}, False),
    "spaces removed": ({"remove_extra_whitespaces": True}, False),
    "no space before": ({"add_dummy_prefix": False}, False),
    "space as suffix": ({"treat_whitespace_as_suffix": True}, False),
    "normalised": ({"normalization_rule_name": "nmt_nfkc"}, False),
    "own symbol of two words": ({"user_defined_symbols": ["a b"]}, False)}
PARTS = [" "] * 8 + ["  ", "▁", "\n", "\t", "the", "a", "b", "er", "in", "<x>", "<s>", "</s>", "7",
                     "é", "😀", "中", "\u00a0", "\x00", "<0x41>", "x" * 70]


@pytest.mark.parametrize("name", MODELS)
def test_words_give_the_ids_of_the_whole_text(tmp_path, name):
    options, independent = MODELS[name]
    options = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                   remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                   split_digits=True, minloglevel=2) | options
    lines = (line for text in DOCUMENTS[:50] for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "m"), vocab_size=400, **options)
    processor = load_tokenizer(tmp_path / "m.model")
    assert independent_words(processor) == independent
    if independent:
        rng, words = random.Random(0), Words(processor)
        texts = ["".join(rng.choices(PARTS, k=rng.randint(1, 30))) for _ in range(3_000)]
        for text in [" ", "  ", "▁", "a ", " a", "a▁ b", *texts, *DOCUMENTS[:50]]:
            assert words.encode(text) == np.array(processor.encode(text), TOKEN_DTYPE).tobytes()


def test_words_forget_when_they_are_many(corpus, monkeypatch):
    monkeypatch.setattr("nanoxla.encode.MAX_WORDS", 5)
    processor = load_tokenizer(corpus / "tok.model")
    words, text = Words(processor), DOCUMENTS[0]
    assert words.encode(text) == np.array(processor.encode(text), TOKEN_DTYPE).tobytes()
    assert 0 < len(words) <= 5
