"""The train step compiled for a TPU v5e-8 by libtpu, which needs no TPU: tools/compile_for_tpu.py."""
import json
import re

import pytest
from conftest import run, write_tiny

SMALL = dict(vocab_size=1_024, dim=256, n_layers=2, n_heads=4, hidden_dim=512, context=256, batch_size=128, micro_batch_size=4,
             max_steps=1_000, warmup_steps=10, eval_every=500, eval_batches=2, attention="flash")


@pytest.fixture(scope="module")
def compile_for_tpu(tmp_path_factory):
    """compile_for_tpu(*arguments, **changes to SMALL) -> (exit code, stdout, stderr, the figures or None)."""
    def call(*arguments, **changes):
        directory = tmp_path_factory.mktemp("compile")
        config, figures = directory / "small.py", directory / "figures.json"
        config.write_text("".join(f"{key} = {value!r}\n" for key, value in (SMALL | changes).items()))
        code, out, err = run("tools/compile_for_tpu.py", config, f"--json={figures}", *arguments)
        return code, out, err, json.loads(figures.read_text()) if figures.exists() else None
    return call


@pytest.fixture(scope="module")
def report(compile_for_tpu, tmp_path_factory):
    hlo = tmp_path_factory.mktemp("hlo") / "step"
    code, out, err, figures = compile_for_tpu(f"--hlo={hlo}")
    assert code == 0, err
    return out, figures, hlo


def test_the_step_compiles_for_a_tpu_into_as_many_graphs_and_as_much_memory_as_it_should(report):
    """The figures of the day they were written, with 5 % to spare: who makes them grow, or sees fewer, should know why."""
    _, figures, _ = report
    assert figures["graphs"] == [2, 2]  # a micro-batch, the update; a micro-batch, the mean
    assert figures["hbm_gib"] == pytest.approx(0.0363, rel=0.05)
    assert figures["cycles"]["compiler"] == pytest.approx(1.77e6, rel=0.05)
    assert figures["bundles"] == pytest.approx([1_225, 2_052], rel=0.05)


def test_it_lets_the_compiler_write_over_the_buffers_that_torch_xla_lets_it(report, tmp_path):
    """Or the estimate is 6 % off. train.py itself runs a step and an evaluation here, and XLA dumps what it was given."""
    config = write_tiny(tmp_path, **SMALL | dict(attention="math", batch_size=8, max_steps=1, warmup_steps=1, eval_batches=1))
    code, _, err = run("train.py", config, f"--out_dir={tmp_path / 'out'}",
                       env={"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"})
    assert code == 0, err
    modules = [path.read_text().partition("\n")[0] for path in sorted(tmp_path.glob("*.before_optimizations.txt"))]
    donors = [len(re.findall(r"\(\d+, {}\)", module)) for module in modules]
    _, figures, _ = report
    assert donors[-4:] == figures["donated"] == [21, 85, 0, 0]  # the first ones make the weights


def test_the_report_adds_up(report):
    out, figures, hlo = report
    assert figures["ms"]["sum"] == pytest.approx(sum(ms for kind, ms in figures["ms"].items() if kind != "sum"))
    assert figures["tokens_per_s"] == pytest.approx(128 * 256 / figures["ms"]["sum"] * 1e3)
    parameters = 2 * 1_024 * 256 + 2 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256
    assert figures["ms"]["all_reduce"] == pytest.approx(1e3 * 2 * 7 / 8 * 4 * parameters / 90e9, rel=1e-3)
    programs = 4 * 4 * 2  # micro-batches, windows in each, groups of 128 lanes
    assert figures["cycles"]["flash"] == pytest.approx(programs * 2 * sum(figures["bundles"]))  # 2 layers
    evaluations = figures["hours"] * 3.6e6 - 1_000 * figures["ms"]["sum"]  # 2 of 2 batches each, without a backward pass
    assert 0.1 < evaluations / (2 * 2 * figures["ms"]["sum"]) < 0.5
    assert any(line.startswith("model.py:") for line in figures["lines"])
    assert "nothing ran on a TPU" in out and "whole run" in out and "host_ms" in out
    assert len(list(hlo.parent.glob("step.*"))) == 4


def test_a_float32_model_compiles_too(compile_for_tpu):
    code, _, err, figures = compile_for_tpu(n_layers=1, dtype="float32")
    assert code == 0, err
    assert figures["cycles"]["flash"] > 0


def test_what_does_not_fit_ends_in_1(compile_for_tpu):
    code, out, err, _ = compile_for_tpu(n_layers=1, vocab_size=65_536, batch_size=8 * 1_024, micro_batch_size=1_024)
    assert code == 1 and "Traceback" not in err, err
    assert "does not compile" in err and "would exceed memory" in err and "a smaller --micro_batch_size needs less" in err


@pytest.mark.parametrize("arguments, message", [
    (["--topology=v5e:8"], "expected v5e:ROWSxCOLUMNS"),
    (["--topology=v4:2x2x1"], "expected v5e:ROWSxCOLUMNS"),
    (["--micro_batch_size=3"], "batch_size = 128 is not a multiple of 8 cores x micro_batch_size = 3"),
    (["--context=200"], "attention = 'flash' needs multiples of 128"),
    (["--layers=2"], "there is no key 'layers'; the nearest is 'n_layers'"),
])
def test_a_mistake_is_told(compile_for_tpu, arguments, message):
    code, _, err, figures = compile_for_tpu(*arguments)
    assert code == 2 and message in err and "Traceback" not in err and figures is None
