"""The figures that README.md states, made anew: the demo's losses, and what the TPU's compiler says
about config/fwedu_124m.py. `make test-guards`: eight minutes on two CPU cores.

If you change one of these figures, you should know why, and change the pages that state it."""
import json

import pytest
from conftest import prepare_speeches, rows, run

pytestmark = pytest.mark.slow


def test_the_demo_learns_as_it_did(tmp_path):
    for command in (prepare_speeches(tmp_path),
                    ("train.py", "config/demo.py", f"--data_dir={tmp_path / 'data'}",
                     f"--out_dir={tmp_path / 'run'}")):
        code, _, err = run(*command, timeout=3_000)
        assert code == 0, err
    training, evaluations = rows(tmp_path / "run")
    losses = {row["step"]: row["loss"] for row in training}
    # Another processor rounds sums in another way, and the difference grows from step to step.
    assert losses[1] == pytest.approx(8.3601, abs=1e-3)
    assert losses[100] == pytest.approx(5.596, abs=0.05)
    assert losses[1_300] == pytest.approx(4.039, abs=0.05)
    assert evaluations[-1]["val_loss"] == pytest.approx(4.072, abs=0.03)


def test_the_real_step_compiles_to_what_it_did(tmp_path):
    report = tmp_path / "figures.json"
    code, _, err = run("tools/compile_for_tpu.py", "config/fwedu_124m.py", f"--json={report}",
                       timeout=3_000)
    assert code == 0, err
    figures = json.loads(report.read_text())
    assert figures["graphs"] == [2, 2]
    assert figures["hbm_gib"] == pytest.approx(3.36, rel=0.03)
    assert figures["cycles"]["sum"] == pytest.approx(273.6e6, rel=0.01)
    assert figures["cycles"]["flash"] == pytest.approx(43.8e6, rel=0.01)
