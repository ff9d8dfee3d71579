"""Eight real replicas: train.py's own worker under xmp.spawn, with a real all-reduce (see replicas.py)."""
import re

import numpy as np
import pytest
import safetensors.numpy
from conftest import rows, run


@pytest.fixture(scope="module")
def train_on(tiny, tmp_path_factory):
    """train_on(replicas, **env) -> (training rows, evaluation rows, weights, the replicas' weights' hashes)."""
    def train(replicas, arguments=(), **env):
        out_dir = tmp_path_factory.mktemp(f"replicas{replicas}")
        code, out, err = run("tests/replicas.py", replicas, tiny, f"--out_dir={out_dir}", *arguments, env=env)
        assert code == 0, err
        training, evaluation = rows(out_dir)
        weights = safetensors.numpy.load_file(out_dir / "checkpoints/step_00000012/model.safetensors")
        return training, evaluation, weights, re.findall(r"weights of replica \d: (\w+)", out)
    return train


@pytest.fixture(scope="module")
def on_one(train_on):
    return train_on(1)


@pytest.fixture(scope="module")
def on_eight(train_on):
    return train_on(8)


# Losses, gradient norms and evaluations of this run by commit 943399a, before the step was tuned for the TPU.
BEFORE_TUNING = {
    "loss": [4.189484596252441, 4.085198879241943, 3.9195592403411865, 3.7308645248413086, 3.555291175842285,
             3.357412815093994, 3.340341091156006, 3.1695899963378906, 3.108158588409424, 2.9257400035858154,
             2.896185874938965, 2.908841371536255],
    "grad_norm": [0.8555409908294678, 0.8148432374000549, 0.7800449132919312, 0.8445250391960144, 0.7203022241592407,
                  0.776518702507019, 0.7260962128639221, 0.7662938237190247, 0.7365424633026123, 0.7510929107666016,
                  0.7669820785522461, 0.7503203749656677],
    "val_loss": [3.3009941577911377, 2.943451404571533],
}


BEFORE_TUNING_IN_BFLOAT16 = {
    "loss": [4.1894741, 4.0851407, 3.9195328, 3.7308733, 3.5551863, 3.3576653, 3.3402646, 3.1696689, 3.1085215,
        2.9260628, 2.8959527, 2.9093556],
    "grad_norm": [0.8555403, 0.8147920, 0.7798307, 0.8441837, 0.7204522, 0.7763655, 0.7264913, 0.7666332,
        0.7362813, 0.7512075, 0.7675714, 0.7506415],
    "val_loss": [3.3011572, 2.9436290],
}


@pytest.mark.parametrize("replicas", [1, 8])
def test_tuning_has_not_changed_a_number(on_one, on_eight, replicas):
    training, evaluation, *_ = on_one if replicas == 1 else on_eight
    for of_run, key in ((training, "loss"), (training, "grad_norm"), (evaluation, "val_loss")):
        assert [row[key] for row in of_run] == pytest.approx(BEFORE_TUNING[key], rel=1e-5)


def test_nor_in_bfloat16_but_by_its_rounding(train_on):
    training, evaluation, *_ = train_on(1, arguments=["--dtype=bfloat16"])
    for of_run, key in ((training, "loss"), (training, "grad_norm"), (evaluation, "val_loss")):
        assert [row[key] for row in of_run] == pytest.approx(BEFORE_TUNING_IN_BFLOAT16[key], rel=2e-3)


def largest_difference(one, other):
    """Relative, over the rows' losses and gradient norms, evaluations and weights."""
    pairs = [(a[key], b[key]) for a, b in zip(one[0], other[0]) for key in ("loss", "grad_norm")]
    pairs += [(a["val_loss"], b["val_loss"]) for a, b in zip(one[1], other[1])]
    pairs += [(one[2][name], other[2][name]) for name in one[2]]
    return max(np.abs(np.subtract(a, b)).max() / np.abs(a).max() for a, b in pairs)


@pytest.mark.parametrize("replicas", [2, 8])
def test_the_number_of_cores_changes_nothing_but_rounding(train_on, on_one, on_eight, replicas):
    on_many = on_eight if replicas == 8 else train_on(replicas)
    assert [row["step"] for row in on_many[0]] == list(range(1, 13)) and [row["step"] for row in on_many[1]] == [6, 12]
    assert largest_difference(on_one, on_many) < 1e-4
    assert len(on_many[3]) == replicas and len(set(on_many[3])) == 1, "replicas ended with different weights"
    assert on_one[0][-1]["loss"] < on_one[0][0]["loss"] - 0.1, "nothing was learned, so nothing was compared"


def test_clipping_before_the_average_is_noticed(train_on, on_one):
    assert largest_difference(on_one, train_on(8, BREAK="clip")) > 1e-2


def test_one_failing_core_ends_all(tiny, tmp_path):
    """Its message comes once, with the exit code of a user's mistake, within seconds and not at a time-out."""
    for name in ("train_00000.bin", "train_00001.bin", "val_00000.bin"):
        (tmp_path / name).write_bytes((tiny.parent / name).read_bytes())
    shard = np.memmap(tmp_path / "train_00000.bin", "<u2", "r+")
    shard[::512] = 999  # a few of the windows; meta.json vouches for them, so that it is not found before the start
    shard.flush()
    (tmp_path / "meta.json").write_text('{"format": 1, "vocab_size": 64, "tokenizer": null, "splits": {"train": {"shards": ['
                                        '{"file": "train_00000.bin", "tokens": 20000}]}}}')
    code, out, err = run("tests/replicas.py", 8, tiny, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", timeout=120)
    message = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(message) == 1 and "train_00000.bin holds token id 999 at token" in message[0], err
    assert "Traceback" not in err
