"""EleutherAI's lm-evaluation-harness reads the converted demo model. The log-likelihoods that it
reports are those that model.py computes. Needs the eval extra: `make test-eval`."""
import json
import math
import re

import pytest
import torch
from conftest import prepare_speeches, run

from model import load_model
from nanoxla import checkpoint
from nanoxla.tokenizer import load_tokenizer

pytestmark = pytest.mark.eval
QUESTIONS = [
    {"question": "The Senate and House of", "choices": ["Representatives", "windows"], "answer": 0},
    {"question": "the United", "choices": ["zebra", "States", "of of of"], "answer": 1}]
TEXTS = ["Fellow citizens of the Senate and House of Representatives, I am glad.",
         " Two\n\nlines and 1,234 naïve cafés"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/{name}.jsonl}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: '{{choices}}'
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list: [{metric: byte_perplexity}]
"""

GROUP = """
group: quiz
task: [questions]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The out_dir of a short run of config/demo.py on the corpus of the demo, converted to its
    hf/."""
    directory = tmp_path_factory.mktemp("demo")
    train = ["train.py", "config/demo.py", f"--data_dir={directory / 'data'}",
             f"--out_dir={directory / 'run'}", "--max_steps=30", "--warmup_steps=5",
             "--eval_every=0"]
    convert = ["convert_to_hf.py", "--checkpoint", directory / "run"]
    for command in (prepare_speeches(directory), train, convert):
        code, _, err = run(*command)
        assert code == 0, err
    return directory / "run"


@pytest.fixture(scope="module")
def model(demo):
    path = checkpoint.find_checkpoint(demo)
    return load_model(*checkpoint.load(path), path)


@pytest.fixture(scope="module")
def processor(demo):
    return load_tokenizer(demo / "hf/tokenizer.model")


def harness(directory, demo, name, rows, task, model_args=""):
    """Runs the harness offline on a task with these rows. Returns what it logs of each row."""
    (directory / f"{name}.yaml").write_text(TASK.format(name=name, directory=directory) + task)
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(
        "-m", "lm_eval", "--model", "hf", "--tasks", name, "--include_path", directory,
        "--model_args", f"pretrained={demo / 'hf'},dtype=float32{model_args}", "--device", "cpu",
        "--batch_size", 1, "--log_samples", "--output_path", directory / "out",
        env={"HOME": str(directory), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    assert code == 0, err
    samples, = (directory / "out").rglob(f"samples_{name}_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted(logged, key=lambda sample: sample["doc_id"])


def log_likelihood(model, ids, start):
    """ln p(ids[start:] | ids[:start])."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)  # [T, V]
    return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))


def test_the_harness_chooses_by_our_log_likelihoods(demo, model, processor, tmp_path):
    samples = harness(tmp_path, demo, "questions", QUESTIONS, CHOICE)
    for sample, row in zip(samples, QUESTIONS):
        start = 1 + len(processor.encode(row["question"]))
        ours = []
        for choice in row["choices"]:
            ids = [1, *processor.encode(f"{row['question']} {choice}")]
            ours.append(log_likelihood(model, ids, start))
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        assert sample["acc"] == float(ours.index(max(ours)) == row["answer"])


def test_the_harness_reports_our_log_likelihood_of_a_text(demo, model, processor, tmp_path):
    """The harness itself puts bos before a text. add_bos_token=False prevents a second bos, which
    it would count as a token to predict."""
    samples = harness(tmp_path, demo, "texts", [{"text": text} for text in TEXTS], ROLLING,
                      ",add_bos_token=False")
    for sample, text in zip(samples, TEXTS):
        ours = log_likelihood(model, [1, *processor.encode(text)], 1)
        assert float(sample["resps"][0][0]) == pytest.approx(ours, abs=1e-3)


def test_evaluate_prints_the_table_and_writes_it_into_the_model_card(demo, model, processor,
                                                                     tmp_path):
    """On local tasks, as without a network. wikitext_local rates whole texts."""
    for name, rows, task in (("questions", QUESTIONS, CHOICE),
                             ("wikitext_local", [{"text": text} for text in TEXTS],
                              ROLLING.replace("byte_perplexity", "word_perplexity"))):
        (tmp_path / f"{name}.yaml").write_text(
            TASK.format(name=name, directory=tmp_path) + task)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "quiz.yaml").write_text(GROUP)
    env = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = ("tools/evaluate.py", demo, "--include_path", tmp_path, "--batch_size", 1)
    for _ in range(2):  # the second time, the rows in the card are replaced
        code, out, err = run(*command, "--tasks", "quiz,wikitext_local", env=env)
        assert code == 0, err
    figures = {(row["task"], row["metric"]): row["value"]
               for row in json.loads((demo / "hf/evaluation.json").read_text())}
    ours = sum(log_likelihood(model, [1, *processor.encode(text)], 1) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)  # as the harness counts them
    perplexity = math.exp(-ours / words)
    assert figures["wikitext_local", "word_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    card = (demo / "hf/README.md").read_text()
    shown = f"{figures['wikitext_local', 'word_perplexity']:.2f}"
    row = f"| evaluated | wikitext_local, 0-shot, 2 items: word_perplexity {shown} |"
    assert card.count(row) == 1 and card.count("| evaluated |") == len(figures)
    assert shown in out and "questions    acc" in out
    row, = (line.split() for line in out.splitlines() if line.startswith("quiz "))
    assert row[1] == "acc" and row[-1] == "2"  # items
    assert len(out.splitlines()) < 20  # the harness's own output is not in the way

    single = checkpoint.find_checkpoint(demo)
    code, _, err = run("tools/evaluate.py", single)
    assert code == 2 and "is a single checkpoint; convert it with" in err
    code, out, err = run(*command, "--tasks", "questions,wikitext", env=env)  # not on this machine
    assert code == 2 and "the harness failed on wikitext" in err and "questions    acc" in out
    kept = json.loads((demo / "hf/evaluation.json").read_text())
    assert {row["task"] for row in kept} == {"questions"}
