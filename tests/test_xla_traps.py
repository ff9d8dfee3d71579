"""tools/xla_traps.py: every experiment shows its trap, and names the line that avoids it."""
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import xla_traps
from xla_traps import TRAPS, line_of


def rows(name):
    """The measurements of a trap: a list of (wrong, right)."""
    return list(TRAPS[name][0]().values())


@pytest.mark.parametrize("name, measured", [
    ("python-number", [(3, 1), (5, 1)]),
    ("adamw", [("320, 325", "320")]),
    ("grad-none", [(3, 2)]),  # one of them is the update
    ("shape", [(5, 1), (2, 1)]),
])
def test_wrong_compiles_more_graphs(name, measured):
    assert rows(name) == measured


def test_item_reads_in_every_step():
    reads, host_ms = rows("item")
    assert reads == (20, 2) and min(host_ms) > 0


def test_a_held_tensor_is_one_more_result():
    results, megabytes = rows("held-twice")
    assert results == (16, 8) and megabytes[0] > 1.9 * megabytes[1]


def test_clipping_after_the_average_equals_one_core():
    norm, distance = rows("clip")
    assert norm[1] == pytest.approx(1, abs=1e-5)
    assert distance[0] > 0.1 and distance[1] < 1e-5


def test_an_id_out_of_range_is_clamped_and_the_host_finds_it():
    last, plain, data = rows("token-id")
    assert plain == (last[0], "IndexError") and data == (last[0], "UserError")


def test_bfloat16_weights_lose_small_updates():
    dtype, unchanged, move = rows("bf16")
    assert dtype == ("torch.float32", "torch.float32")
    assert unchanged[0] > 50 and unchanged[1] == 0
    assert move[1] == pytest.approx(1e-3, rel=1e-3) and move[0] < move[1] / 2


@pytest.mark.parametrize("name", TRAPS)
def test_the_line_that_avoids_a_trap_exists_and_the_page_has_the_command(name):
    _, file, text = TRAPS[name]
    assert text in (ROOT / file).read_text().splitlines()[line_of(file, text) - 1]
    assert f"`{name}`" in (ROOT / "docs/xla_traps.md").read_text()


def test_the_command_prints_a_table_and_the_line(call):
    out, _ = call(xla_traps.main, "token-id")
    assert "wrong" in out and "IndexError" in out
    _, file, text = TRAPS["token-id"]
    assert f"avoided in {file}:{line_of(file, text)}: {text}" in out


def test_an_unknown_name_is_a_mistake(mistake):
    _, message = mistake(xla_traps.main, "itme")
    assert message.startswith("error: no trap 'itme'; there are python-number adamw")
