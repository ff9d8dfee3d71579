"""tools/plot.py and tools/export_metrics.py: runs that are finished, going on, or damaged."""
import json
import struct
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "tools"))

import export_metrics
import plot

from nanoxla import lock


def write_run(directory, steps=40, damage=False):
    """The metrics.jsonl of a run."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        file.write('{"step": 0, "init_from": "elsewhere"}\n')
        for step in range(1, steps + 1):
            row = dict(step=step, loss=8 / step, lr=1e-3 / step, grad_norm=1 + 1 / step,
                       tokens=step * 1_000, mfu=None)
            if step == 3:
                row["loss"] = None  # it was not finite
            file.write(json.dumps(row) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "val_loss": 8.5 / step}) + "\n")
        if damage:
            file.write('{"step": 7, "lo\n\x00\x00\n[1]\n')
            file.write('{"step": 41, "loss"')  # the line that is being written
    return directory


# --- plot.py ------------------------------------------------------------------------------------


@pytest.fixture
def picture(monkeypatch):
    """The figure that draw() has made, after the call."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield plt.gcf
    plt.get_fignums() and monkeypatch.undo() or plt.close("all")


def test_the_three_curves_of_a_run(tmp_path, call, picture, capsys):
    run = write_run(tmp_path / "run")
    call(plot.main, run)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss, lr, norm = picture().axes
    assert [list(line.get_xdata()) for line in lr.lines] == [list(range(1, 41))]
    raw, smoothed, validation = loss.lines
    assert list(raw.get_xdata()) == [1, 2, *range(4, 41)]
    assert list(validation.get_ydata()) == [0.85, 0.425, 8.5 / 30, 0.2125]
    assert norm.get_xlabel() == "optimiser step" and "nats per token" in loss.get_title("left")


def test_several_runs_over_tokens(tmp_path, call, mistake, picture):
    runs = [write_run(tmp_path / name) for name in "abc"]
    assert "name the picture with --out" in mistake(plot.main, *runs)[1]
    assert f"{tmp_path} is a directory" in mistake(plot.main, *runs, "--out", tmp_path)[1]
    call(plot.main, *runs, "--tokens", "--out", tmp_path / "picture.png")
    loss, _, norm = picture().axes
    assert list(loss.lines[0].get_xdata())[:2] == [1_000, 2_000]
    assert norm.get_xlabel() == "tokens"
    picture().canvas.draw()
    for panel in picture().axes:  # the labels do not overlap
        boxes = sorted((text.get_window_extent() for text in panel.texts), key=lambda box: box.y0)
        assert len(boxes) in (3, 6)
        assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))


def test_damaged_lines_are_skipped_with_a_note(tmp_path, call, picture):
    run = write_run(tmp_path / "run", damage=True)
    _, err = call(plot.main, run)
    assert err == (f"note: skipped 3 damaged lines of {run}/metrics.jsonl, "
                   "the first is line 46\n")
    assert len(picture().axes[1].lines[0].get_xdata()) == 40


def test_the_average_is_one_of_values():
    rows = [{"step": step, "loss": 2.0} for step in range(1, 500)]
    assert plot.Curve(rows, "loss", None).smoothed() == pytest.approx([2.0] * 499)


def test_watching_ends_with_the_run(tmp_path, call, picture, monkeypatch):
    run = write_run(tmp_path / "run")
    owner = lock.own(run)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            owner.close()
    monkeypatch.setattr(plot.time, "sleep", pause)
    out, _ = call(plot.main, run, "--watch", 3)
    assert pauses == [3, 3] and out.count("loss.png") == 3


def test_watching_may_begin_before_the_run(tmp_path, call, picture, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(plot.time, "sleep", lambda seconds: write_run(run))
    out, _ = call(plot.main, run, "--watch", 3)
    assert out == f"waiting for the first row of {run}\n{run / 'loss.png'}\n"


def test_what_cannot_be_drawn(tmp_path, mistake):
    assert "has no metrics.jsonl; expected the out_dir" in mistake(plot.main, tmp_path)[1]
    (tmp_path / "metrics.jsonl").write_text("")
    assert "has no training rows yet" in mistake(plot.main, tmp_path)[1]


# --- export_metrics.py --------------------------------------------------------------------------


def test_tensorboard(tmp_path, call, mistake):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    directory = write_run(tmp_path / "run", damage=True)
    out, _ = call(export_metrics.main, directory, "--to", "tensorboard")
    assert "44 rows" in out
    events = accumulator.EventAccumulator(str(directory / "tensorboard"), {"scalars": 0}).Reload()
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens"} <= set(events.Tags()["scalars"])
    assert "mfu" not in events.Tags()["scalars"]
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in read] == [1, 2, *range(4, 41)]
    assert [value for _, value in read] == pytest.approx([8 / step for step, _ in read])
    assert [event.step for event in events.Scalars("val_loss")] == [10, 20, 30, 40]
    assert "has an earlier export; delete it first" in mistake(
        export_metrics.main, directory, "--to", "tensorboard")[1]


def wandb_records(path):
    """The records of a .wandb file: after a header of 7 bytes, blocks of 32 KB in LevelDB's log
    format, of which each piece has a checksum (4 bytes), a length (2) and a type (1)."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32_768 - position % 32_768 < 7:  # no room for a piece: zeros
            position += 32_768 - position % 32_768
            continue
        length, kind = struct.unpack("<HB", content[position + 4:position + 7])
        record += content[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield proto.Record.FromString(record)
            record = b""


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    directory = write_run(tmp_path / "run", steps=10)
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    code, out, err = run("tools/export_metrics.py", directory, "--to", "wandb", env=env)
    assert code == 0 and "11 rows" in out, err
    path, = tmp_path.glob("wandb/offline-run-*/*.wandb")
    losses = {}
    for record in wandb_records(path):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json)
                 for item in record.history.item}
        if "loss" in items:
            losses[items["step"]] = items["loss"]
    assert losses == pytest.approx({step: 8 / step for step in range(1, 11) if step != 3})


def test_following_ends_with_the_run_and_yields_each_row_once(tmp_path, call, monkeypatch):
    directory = write_run(tmp_path / "run", steps=3)
    path, owner, written = directory / "metrics.jsonl", lock.own(directory), []
    monkeypatch.setattr(export_metrics, "tensorboard_writer",
                        lambda run, config: (written.append, lambda: None))

    def pause(seconds):  # the run is resumed, repeats step 3, and ends
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:3], *lines[3:], '{"step": 4, "loss": 1.0}\n']))
        owner.close()
    monkeypatch.setattr(export_metrics.time, "sleep", pause)
    call(export_metrics.main, directory, "--to", "tensorboard", "--follow")
    assert [row["step"] for row in written] == [1, 2, 3, 4]
