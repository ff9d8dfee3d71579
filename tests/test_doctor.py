"""tools/doctor.py finds what is wrong with a machine, and says so in a line each."""
import dataclasses
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run, start, wait_for_line

sys.path.insert(0, str(ROOT / "tools"))

import doctor
import doctor_device

from nanoxla import flash_attention, lock, tpu, versions
from train import load_config

FWEDU = "config/fwedu_124m.py"


@pytest.fixture
def says(monkeypatch, call):
    """says(*arguments) calls the doctor without the device part, expects exit code 1, and returns
    the only line that says that something is wrong."""
    monkeypatch.setattr(doctor, "check_device", lambda *_: (False, {}))

    def wrong(*arguments):
        out = []
        monkeypatch.setattr(doctor, "print_finding", lambda *finding: out.append(finding))
        with pytest.raises(SystemExit) as exit:
            call(doctor.main, *arguments)
        assert exit.value.code == 1
        [text] = [text for kind, text in out if kind == "wrong"]
        assert "\n" not in text
        return text
    return wrong


def test_the_command_on_this_machine():  # 30 s
    code, out, err = run("tools/doctor.py")
    assert code == 0 and "Traceback" not in err, out + err
    for finding in ("ok    environment", "note  data: data/fwedu is not a directory", "ok    disk",
                    "ok    memory", "ok    out_dir", "ok    all-reduce: 1 core answered",
                    "ok    kernel: jax lowers both passes", "ok    math: loss 8.39",
                    "ok    flash: loss 8.39", "ok    20 steps: "):
        assert re.search(f"^{finding}", out, re.MULTILINE), finding
    header, _, row = out.splitlines()[-3:]
    assert header.count("|") == row.count("|") and "config/fwedu_124m.py (small model)" in row


def test_a_mistake_of_the_user(mistake):
    assert "there is no key 'dimm'" in mistake(doctor.main, FWEDU, "--dimm=3")[1]
    assert "can't be read" in mistake(doctor.main, "no/such.py")[1]


# --- bad machines -------------------------------------------------------------------------------


def test_versions_that_were_not_tried_together(monkeypatch, says):
    found = {"python": "3.12", "torch": "2.13.0", "torch_xla": "2.9.0", "jax": "0.8.0",
             "libtpu": None}
    monkeypatch.setattr(versions, "installed", lambda: found)
    text = says(FWEDU, "--attention=math")
    assert text == ("versions: python 3.12, torch 2.13.0, torch_xla 2.9.0, jax 0.8.0, libtpu is "
                    "missing: not tried together. Try: pip install jax==0.7.1 jaxlib==0.7.1 "
                    "libtpu==0.0.21 torch==2.9.0")
    known = dict(versions.TRIED["our default"], python="3.14")
    assert list(doctor.check_versions(known))[0][0] == "note"


def test_a_torch_that_does_not_load(monkeypatch, says):
    def broken(name):
        raise ImportError("_XLAC.so: undefined symbol: _ZN5torch4lazy\n" + 200 * "more\n")
    monkeypatch.setattr(doctor, "import_module", broken)
    assert says(FWEDU).startswith("imports: ImportError: _XLAC.so: undefined symbol: _ZN5torch4lazy"
                                  ": torch and torch_xla do not fit together. Try: pip install ")


@pytest.mark.parametrize("name, value, text", [
    ("XLA_USE_BF16", "1", "environment: XLA_USE_BF16 is set: it silently makes weights, moments "
                          "and loss bfloat16. Unset it"),
    ("PJRT_DEVICE", "XLA", "environment: PJRT_DEVICE is 'XLA'; expected TPU or CPU, or unset it"),
])
def test_variables(monkeypatch, says, name, value, text):
    monkeypatch.setattr(doctor, "check_device", lambda *_: pytest.fail("started the device part"))
    monkeypatch.setenv(name, value)
    assert says(FWEDU).startswith(text)


def test_a_batch_that_does_not_fit(says):
    assert "batch_size = 256 is not a multiple of 1 cores" in says(FWEDU, "--micro_batch_size=7")


def test_shards_with_a_damaged_description(tmp_path):
    (tmp_path / "train_0.bin").write_bytes(bytes(99))
    (tmp_path / "meta.json").write_text("{")
    found = list(doctor.check_data(load_config(FWEDU, [f"--data_dir={tmp_path}"])))
    assert [kind for kind, _ in found] == ["wrong", "wrong"]
    assert "meta.json is not JSON" in found[1][1]


def test_the_row_names_the_changes_that_decide_its_speed(monkeypatch, call):
    monkeypatch.setattr(doctor, "check_device", lambda *_: (False, dict.fromkeys(
        ("tokens_per_s", "mfu", "step_ms", "host_ms", "compiles", "hbm_gib"), 1.0)))
    printed, _ = call(doctor.main, FWEDU, "--batch_size", "128", "--micro-batch-size=2",
                      "--seed=1")
    assert "config/fwedu_124m.py --batch_size=128 --micro_batch_size=2 (small" in printed


def test_a_full_disk(monkeypatch, says):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2e9))
    assert says(FWEDU) == (
        "disk: 2.0 GB are free for out/fwedu_124m; 2 checkpoints and one being written need 5.1 GB."
        " Make room, or choose another --out_dir or --keep_checkpoints=1")


def test_kaggle_keeps_20_gb(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    config = load_config(FWEDU, ["--out_dir=/kaggle/working/run", "--keep_checkpoints=20"])
    [(kind, text)] = doctor.check_disk(config, 134_105_856)
    assert kind == "wrong" and "20.0 GB are free" in text


def test_too_little_memory():
    [(kind, text)] = doctor.check_memory(500_000_000_000, 8)
    assert kind == "wrong" and "End other programs" in text
    assert [kind for kind, _ in doctor.check_memory(1_000_000, 1)] == ["ok"]


def test_an_out_dir_that_another_run_owns(says, tmp_path):
    with lock.own(tmp_path):
        text = says(FWEDU, f"--out_dir={tmp_path}")
    assert text.startswith(f"out_dir: another run is writing to {tmp_path}: process {os.getpid()}")


HOLDER = """
import sys, time
file = open(sys.argv[1])
print("open", flush=True)
time.sleep(60)
"""


def test_chips_that_another_process_holds(monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    (tmp_path / "holder.py").write_text(HOLDER)
    monkeypatch.setattr(tpu, "DEVICE_FILES", (str(tmp_path / "accel[0-9]*"),))
    monkeypatch.setattr(tpu, "kind", lambda: "v5e")
    monkeypatch.setattr(doctor, "CHIPS_BUSY", 0)
    holder = start(tmp_path / "holder.py", tmp_path / "accel0")
    try:
        wait_for_line(holder, "open")
        [(kind, text)] = doctor.check_chips("TPU")
        assert kind == "wrong" and f"the TPU is in use by process {holder.pid}" in text
    finally:
        holder.kill()
        holder.communicate()
    assert list(doctor.check_chips("TPU")) == [("ok", "chips: 1, and no other process holds one")]
    assert "unset PJRT_DEVICE" in list(doctor.check_chips("CPU"))[0][1]
    monkeypatch.setattr(tpu, "DEVICE_FILES", ())
    assert "none found" in list(doctor.check_chips("TPU"))[0][1]


HANGS = """
import sys, time
sys.path[:0] = {root!r}, {root!r} + "/tools"
import doctor
from nanoxla.errors import run_command
doctor.HANG_MINUTES = 0.02
if __name__ == "__main__":
    run_command(doctor.main)
else:
    time.sleep(60)  # the worker never begins
"""


def test_a_worker_that_hangs(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS.format(root=str(ROOT)))
    code, out, err = run(tmp_path / "hangs.py", timeout=50)
    assert code == 1 and "has been waiting for its core of the TPU for 0.02 minutes" in err
    assert "...   starting 1 worker; if one does not answer for" in out
    assert "wrong a worker ended; see above." in out


# --- the device part, in this process -----------------------------------------------------------


def small(**changes):
    return dataclasses.replace(load_config(FWEDU), **doctor_device.SMALL | changes)


def compare(config):
    return list(doctor_device.compare(config, lambda *_: None, lambda: False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stored_values_of_the_small_model(dtype):
    """And flash equals math."""
    loss, norm, _ = doctor_device.first_step(small(dtype=dtype), "math")
    stored = doctor_device.STORED[tuple(getattr(small(), key) for key in doctor_device.SHAPE)]
    assert (loss, norm) == pytest.approx(stored[dtype], abs=2e-5 if dtype == "float32" else 5e-4)
    assert [kind for kind, _ in compare(small(dtype=dtype))] == ["ok", "ok"]


def test_a_kernel_with_a_wrong_sign(monkeypatch):
    """It turns q and k by the angle of their position backwards."""
    tables = flash_attention.lane_tables
    monkeypatch.setattr(flash_attention, "lane_tables",
                        lambda cos, sin: tables(cos, -sin))
    (math, _), (flash, text) = compare(small(max_steps=38_000))  # another graph than before
    assert (math, flash) == ("ok", "wrong") and "Use --attention=math" in text


def test_a_loss_that_differs_from_the_stored_one(monkeypatch):
    shape = tuple(getattr(small(), key) for key in doctor_device.SHAPE)
    monkeypatch.setitem(doctor_device.STORED, shape, {"bfloat16": (8.4, 2.44138)})
    [(kind, text)] = doctor_device.compare_with_stored(small(), 8.3949, 2.4414,
                                                       doctor_device.BFLOAT16)
    assert kind == "wrong" and "on a CPU they were 8.4000" in text
    [(kind, _)] = doctor_device.compare_with_stored(small(), float("nan"), 2.44,
                                                    doctor_device.BFLOAT16)
    assert kind == "wrong"
    [(kind, _)] = doctor_device.compare_with_stored(small(dim=128), 1.0, 1.0,
                                                    doctor_device.BFLOAT16)
    assert kind == "note"


def test_graphs_compiled_during_the_timed_steps(monkeypatch):
    counts = iter([(6, 0.0), (8, 0.0)])
    monkeypatch.setattr(doctor_device, "compilations", lambda: next(counts))
    monkeypatch.setattr(doctor_device, "TIMED", 2)
    [(kind, text)] = doctor_device.time_steps(small(), {}, lambda *_: None,
                                               lambda: False)
    assert kind == "wrong" and "but 2 graphs were compiled in between" in text


def test_a_core_that_is_missing():
    [(kind, text)] = doctor_device.all_reduce(8)
    assert kind == "wrong" and text.startswith("all-reduce: 1 of 8 cores answered")


def test_an_exception_becomes_a_finding(monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 17 GiB of 15.75\nand a hundred lines")

    def run_here(spawn, worker, arguments, hang_minutes):
        worker(*arguments, lambda: False)
    monkeypatch.setattr(doctor_device, "compare", failing)
    monkeypatch.setattr(doctor, "run_on_all_cores", run_here)
    assert doctor.check_device(load_config(FWEDU), "CPU", 1) == (True, {})
    out, err = capsys.readouterr()
    assert ("wrong a step with each attention: RuntimeError: RESOURCE_EXHAUSTED: 17 GiB of 15.75. "
            "If it is memory, use a smaller --micro_batch_size") in out
    assert "hundred" not in out


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_on_all_cores", lambda spawn, worker, arguments, _:
                        worker(*arguments, lambda: True))
    assert doctor.check_device(load_config(FWEDU), "CPU", 1) == (True, {})
    assert capsys.readouterr().out.splitlines()[1:] == ["wrong stopped before the last check"]


# --- the row ------------------------------------------------------------------------------------


def test_the_row_of_a_tpu(monkeypatch):
    config = load_config(FWEDU)
    monkeypatch.setattr(tpu, "kind", lambda: "v5e")
    estimate = doctor.estimated_ms(config, 8)
    figures = {"tokens_per_s": 1_048_576.0, "mfu": 0.512, "step_ms": 250.0, "host_ms": 48.0,
               "compiles": 0, "hbm_gib": 4.93}
    row = doctor.row(figures, versions.TRIED["the image of Kaggle"], "v5litepod-8, 8 cores", FWEDU,
                     estimate)
    assert row.split(" | ")[1:] == [
        "v5litepod-8, 8 cores", "3.12", "2.8.0", "0.7.2", "0.0.17", FWEDU, "1,048,576", "51.2%",
        "250.0", "48.0", "0", "4.93", "182.0 (1.37) |"]
    assert doctor.estimated_ms(config, 4) is None
    assert doctor.estimated_ms(dataclasses.replace(config, micro_batch_size=16), 8) is None
    monkeypatch.setattr(tpu, "kind", lambda: "v6e")
    assert doctor.estimated_ms(config, 8) != estimate
