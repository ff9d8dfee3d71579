"""tools/compile_for_tpu.py: libtpu compiles the train step for a TPU v5e-8, without a TPU."""
import json
import re
import sys

import pytest
from conftest import ROOT, run, write_config, write_tiny

sys.path.insert(0, str(ROOT / "tools"))

import compile_for_tpu

from nanoxla.tpu import KINDS

SMALL = dict(vocab_size=1_024, dim=256, n_layers=2, n_heads=4, hidden_dim=512, context=256,
             batch_size=128, micro_batch_size=4, max_steps=1_000, warmup_steps=10, eval_every=500,
             eval_batches=2, attention="flash")


def compile_small(directory, *arguments, **changes):
    """Runs the command on SMALL with changes. Returns (exit code, stdout, stderr)."""
    config = write_config(directory / "small.py", **SMALL | changes)
    return run("tools/compile_for_tpu.py", config, *arguments)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(stdout, the figures in its --json file, the graphs in its --hlo files) for SMALL."""
    directory = tmp_path_factory.mktemp("report")
    code, out, err = compile_small(directory, f"--json={directory / 'figures.json'}",
                                   f"--hlo={directory / 'step'}")
    assert code == 0, err
    return out, json.loads((directory / "figures.json").read_text()), list(directory.glob("step.*"))


def test_the_step_has_the_graphs_memory_and_cycles_it_had(report):
    """Within 5 %. If you change one of these figures, you should know why."""
    _, figures, _ = report
    assert figures["graphs"] == [2, 2]  # a micro-batch, the update; a micro-batch, the mean
    assert figures["hbm_gib"] == pytest.approx(0.0363, rel=0.05)
    assert figures["cycles"]["compiler"] == pytest.approx(1.77e6, rel=0.05)
    assert figures["bundles"] == pytest.approx([982, 1_752], rel=0.05)


TRAIN_HERE = """
import sys
sys.path.insert(0, "tests")
from conftest import train_here
train_here(*sys.argv[1:])
"""


def test_the_compiler_may_overwrite_the_same_inputs_as_in_a_real_run(report, tmp_path):
    """Otherwise the estimate is 6 % off. train.py runs a step and an evaluation here, and XLA dumps
    the graphs that it compiles."""
    changes = dict(attention="math", batch_size=8, max_steps=1, warmup_steps=1, eval_batches=1)
    config = write_tiny(tmp_path, **SMALL | changes)
    code, _, err = run("-c", TRAIN_HERE, config, f"--out_dir={tmp_path / 'out'}",
                       env={"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"})
    assert code == 0, err
    dumps = sorted(tmp_path.glob("*.before_optimizations.txt"))
    headers = [path.read_text().partition("\n")[0] for path in dumps]
    donated = [len(re.findall(r"\(\d+, {}\)", header)) for header in headers]
    _, figures, _ = report
    # The last four: those before them make the initial weights and moments.
    assert donated[-4:] == figures["donated"] == [21, 85, 0, 0]


def test_the_report_adds_up(report):
    out, figures, graphs = report
    ms, cycles = figures["ms"], figures["cycles"]
    assert ms["sum"] == pytest.approx(sum(ms[kind] for kind in ms if kind != "sum"))
    assert figures["tokens_per_s"] == pytest.approx(128 * 256 / ms["sum"] * 1e3)
    parameters = 2 * 1_024 * 256 + 2 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256
    all_reduce_ms = 1e3 * 2 * 7 / 8 * 4 * parameters / 90e9
    assert ms["all_reduce"] == pytest.approx(all_reduce_ms, rel=1e-3)
    programs = 4 * 4 * 2  # micro-batches, windows in each, groups of 128 lanes
    layers = 2
    assert cycles["flash"] == pytest.approx(layers * programs * sum(figures["bundles"]))
    # 2 evaluations of 2 batches. One batch takes less than a step, which also has a backward pass.
    evaluations_ms = figures["hours"] * 3.6e6 - 1_000 * ms["sum"]
    assert 0.1 < evaluations_ms / (2 * 2 * ms["sum"]) < 0.5
    assert any(line.startswith("model.py:") for line in figures["lines"])
    assert "nothing ran on a TPU" in out and "whole run" in out and "host_ms" in out
    assert len(graphs) == 4


def test_a_gather_and_a_scatter_move_rows_and_not_their_table():
    """8,192 tokens look up their embeddings; then their gradients are added to the table's."""
    from tpu_costs import count_cycles
    hlo = """
ENTRY %main {
  %table = f32[32000,768]{1,0} parameter(0)
  %ids = s32[8192]{0} parameter(1)
  %rows = f32[8192,768]{1,0} gather(%table, %ids), metadata={op_name="model.py_1.1/gather"}
  %sums = f32[32000,768]{1,0} scatter(%table, %ids, %rows), metadata={op_name="model.py_2.1/add"}
}"""
    ids, rows = 4 * 8_192, 4 * 8_192 * 768
    chip = KINDS["v5e"]
    by_kind, by_line = count_cycles(hlo, chip, 1, None)
    gather, scatter = ids + 2 * rows, ids + rows + 2 * rows  # it reads the rows that it adds, too
    assert by_line["model.py:1"] == pytest.approx(gather * chip.clock / chip.memory)
    assert by_line["model.py:2"] == pytest.approx(scatter * chip.clock / chip.memory)
    assert by_kind["moved"] == by_kind.total() == by_line.total()


def test_a_float32_model_compiles(tmp_path):
    code, out, err = compile_small(tmp_path, vocab_size=256, dim=128, n_layers=1, n_heads=2,
                                   hidden_dim=128, batch_size=32, dtype="float32")
    assert code == 0 and "flash attention, by bundles" in out, err


def test_a_step_that_does_not_fit_ends_with_exit_code_1(tmp_path):
    code, _, err = compile_small(tmp_path, vocab_size=65_536, dim=128, n_layers=1, n_heads=1,
                                 hidden_dim=128, context=128, batch_size=8 * 2_048,
                                 micro_batch_size=2_048, dtype="float32")
    assert code == 1 and "Traceback" not in err, err
    assert "does not compile" in err and "would exceed memory" in err
    assert "a smaller --micro_batch_size needs less" in err


@pytest.mark.parametrize("argument, message", [
    ("--topology=v4:2x2x1", "expected KIND:ROWSxCOLUMNS, as in v5e:2x4; KIND is v5e or v6e"),
    ("--micro_batch_size=3",
     "batch_size = 128 is not a multiple of 8 cores x micro_batch_size = 3"),
    ("--context=200", "attention = 'flash' needs dim = 256 and context = 200 to be multiples"),
    ("--layers=2", "there is no key 'layers'; the nearest is 'n_layers'"),
])
def test_a_mistake_is_explained(tmp_path, monkeypatch, mistake, argument, message):
    for name in ("set_environment", "tune_environment"):
        monkeypatch.setattr(compile_for_tpu, name, lambda *_: None)
    config = write_config(tmp_path / "small.py", **SMALL)
    _, err = mistake(compile_for_tpu.main, config, argument)
    assert message in err


def test_the_real_command_explains_a_mistake(tmp_path):
    code, _, err = compile_small(tmp_path, "--topology=v5e:8")
    assert code == 2 and "expected KIND:ROWSxCOLUMNS" in err and "Traceback" not in err
