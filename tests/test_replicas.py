"""Eight real replicas: train.py's own worker under xmp.spawn, with a real all-reduce (see replicas.py)."""
import re

import numpy as np
import pytest
import safetensors.numpy
from conftest import rows, run


@pytest.fixture(scope="module")
def train_on(tiny, tmp_path_factory):
    """train_on(replicas, **env) -> (training rows, evaluation rows, weights, the replicas' weights' hashes)."""
    def train(replicas, **env):
        out_dir = tmp_path_factory.mktemp(f"replicas{replicas}")
        code, out, err = run("tests/replicas.py", replicas, tiny, f"--out_dir={out_dir}", env=env)
        assert code == 0, err
        training, evaluation = rows(out_dir)
        weights = safetensors.numpy.load_file(out_dir / "checkpoints/step_00000012/model.safetensors")
        return training, evaluation, weights, re.findall(r"weights of replica \d: (\w+)", out)
    return train


@pytest.fixture(scope="module")
def on_one(train_on):
    return train_on(1)


def largest_difference(one, other):
    """Relative, over the rows' losses and gradient norms, evaluations and weights."""
    pairs = [(a[key], b[key]) for a, b in zip(one[0], other[0]) for key in ("loss", "grad_norm")]
    pairs += [(a["val_loss"], b["val_loss"]) for a, b in zip(one[1], other[1])]
    pairs += [(one[2][name], other[2][name]) for name in one[2]]
    return max(np.abs(np.subtract(a, b)).max() / np.abs(a).max() for a, b in pairs)


@pytest.mark.parametrize("replicas", [2, 8])
def test_the_number_of_cores_changes_nothing_but_rounding(train_on, on_one, replicas):
    on_many = train_on(replicas)
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
