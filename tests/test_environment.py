"""What differs on a user's machine: environment variables, versions, chips that are in use."""
import os
import subprocess
import sys

import pytest
from conftest import ended, run, start, wait_for_line
from torch_xla._internal import tpu as topology

import sample
import train
from nanoxla import environment, tpu, versions
from nanoxla.environment import (
    VMEM_LIMIT,
    check_environment,
    mend_environment,
    problems,
    tune_environment,
    unknown_libtpu_flags,
)
from nanoxla.errors import UserError, user_message
from nanoxla.flash_attention import check_attention

KAGGLE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_ID": "0",
          "TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1",
          "TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1"}
ONE_CHIP = {"TPU_VISIBLE_CHIPS": "0", "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}


# --- variables ----------------------------------------------------------------------------------


def settings_of_workers(monkeypatch, variables, chips=8):
    """The settings that torch_xla gives to the workers of a host with these variables."""
    monkeypatch.setattr(topology, "num_available_chips", lambda: chips)
    mended = dict(variables)
    mend_environment(mended)
    found = []
    for rank in range(chips):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(mended))
            assert topology.num_local_processes() == chips
            topology.configure_topology(rank, chips)
            found.append(tuple(os.environ[name] for name in (
                "TPU_VISIBLE_CHIPS", "TPU_PROCESS_PORT", "CLOUD_TPU_TASK_ID", "TPU_PROCESS_BOUNDS",
                "TPU_PROCESS_ADDRESSES")))
    return found


@pytest.mark.parametrize("added", [
    {},
    {"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0"},  # as Kaggle's image sets them
    ONE_CHIP,  # left by xmp.spawn(nprocs=1) in a notebook
    {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,4,1"},
    {"TPU_PROCESS_PORT": "8476"},
    {"TPU_VISIBLE_DEVICES": "0,1,2,3"},
])
def test_every_worker_gets_a_chip_of_its_own(monkeypatch, added):
    addresses = ",".join(f"localhost:{8476 + rank}" for rank in range(8))
    expected = [(str(rank), str(8476 + rank), str(rank), "2,4,1", addresses) for rank in range(8)]
    assert settings_of_workers(monkeypatch, KAGGLE | added) == expected


@pytest.mark.parametrize("renamed", [
    ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID"), ("TPU_HOST_BOUNDS", "TPU_PROCESS_BOUNDS"),
    ("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS")])
def test_a_host_that_is_described_by_the_other_names_works(monkeypatch, renamed):
    variables = dict(KAGGLE)
    variables[renamed[1]] = variables.pop(renamed[0])
    assert settings_of_workers(monkeypatch, variables) == settings_of_workers(monkeypatch, KAGGLE)


def test_the_hosts_of_a_pod_slice_number_their_workers_in_turn(monkeypatch):
    """v5e:4x8: eight hosts of four chips."""
    hosts = [settings_of_workers(monkeypatch, KAGGLE | {
        "TPU_ACCELERATOR_TYPE": "v5litepod-32", "TPU_WORKER_HOSTNAMES": "a,b,c,d,e,f,g,h",
        "TPU_HOST_BOUNDS": "2,4,1", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
        "TPU_WORKER_ID": str(host), "CLOUD_TPU_TASK_ID": str(host)}, chips=4)
        for host in range(8)]
    workers = [worker for host in hosts for worker in host]
    assert [int(task) for _, _, task, _, _ in workers] == list(range(32))
    assert {bounds for *_, bounds, _ in workers} == {"4,8,1"}
    assert len({addresses for *_, addresses in workers}) == 1
    assert workers[0][-1].split(",")[4] == "b:8476"


def test_a_clean_environment_stays_as_it_is(capsys):
    variables = {"HOME": "/root", "PJRT_DEVICE": "TPU", "LIBTPU_INIT_ARGS": "--a=1 --b=2"} | KAGGLE
    mended = dict(variables)
    mend_environment(mended)
    assert mended == variables and capsys.readouterr().err == ""


def test_what_torch_xla_sets_needs_no_note(capsys):
    """On a TPU it adds flags to those that the variable has, and none are "", so a blank comes
    first. tools/doctor.py then imports train.py, which mends again."""
    variables = {"LIBTPU_INIT_ARGS": " --xla_tpu_use_enhanced_launch_barrier=false --b=1"}
    mend_environment(variables)
    assert variables["LIBTPU_INIT_ARGS"] == "--xla_tpu_use_enhanced_launch_barrier=false --b=1"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", environment.REMOVED)
def test_variables_that_break_a_run_are_removed_with_a_note(name, capsys):
    variables = {"HOME": "/root", name: "1"}
    mend_environment(variables)
    assert variables == {"HOME": "/root"}
    # libtpu itself sets CLOUD_TPU_TASK_ID, so a note about it would come for nothing.
    note = capsys.readouterr().err
    assert (note.endswith(f"the command would fail: {name}\n") or
            not note and name == "CLOUD_TPU_TASK_ID")


@pytest.mark.parametrize("name, value, mended", [
    ("LIBTPU_INIT_ARGS", "--a=1\n--xla_tpu_use_enhanced_launch_barrier=true --b",
     "--a=1 --xla_tpu_use_enhanced_launch_barrier=false --b"),
    ("PT_XLA_DEBUG", "true", None), ("PT_XLA_DEBUG", "1", "1"),
    ("TPU_SKIP_MDS_QUERY", "false", None), ("TPU_SKIP_MDS_QUERY", "1", None),
    ("TPU_LIBRARY_PATH", "/nowhere/libtpu.so", None), ("TPU_LIBRARY_PATH", "/bin/sh", "/bin/sh"),
    ("TPU_HOST_BOUNDS", "1,1,1", "1,1,1")])
def test_other_variables_are_mended(name, value, mended):
    variables = {name: value}
    mend_environment(variables)
    assert variables.get(name) == mended


@pytest.mark.parametrize("name, value, message", [
    ("XLA_USE_BF16", "1", "XLA_USE_BF16 is set: it silently makes weights, moments and loss"),
    ("PJRT_DEVICE", "XLA", "PJRT_DEVICE is 'XLA'; expected TPU or CPU, or unset it"),
    ("LOCAL_WORLD_SIZE", "8", "started this command several times; start it once"),
    ("XLA_FLAGS", "--xla_dump_to=x --xla_tpu_foo=true", "XLA_FLAGS has --xla_tpu_foo, a flag of"),
    ("LIBTPU_INIT_ARGS", "--xla_tpu_no_such_flag=1", "which this libtpu does not know")])
def test_variables_that_end_a_run_are_refused(monkeypatch, name, value, message):
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    assert list(problems()) == []
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_environment()


def test_flags_are_checked_before_torch_xla_has_chosen_the_tpu(monkeypatch):
    monkeypatch.delenv("PJRT_DEVICE")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_no_such_flag=1")
    assert list(problems()) == []
    monkeypatch.setattr(tpu, "chips", lambda: ["/dev/accel0"])
    assert ["which this libtpu does not know" in problem for problem in problems()] == [True]


def test_flags_are_looked_for_in_the_libtpu_that_will_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "libtpu.so").write_bytes(b"\0a_flag\0")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    assert unknown_libtpu_flags("--a_flag=1 --xla_tpu_use_enhanced_launch_barrier=false") == [
        "xla_tpu_use_enhanced_launch_barrier"]
    variables = {}
    tune_environment("TPU", "v5e", variables)
    assert variables == {}


def test_slow_variables_are_noted(monkeypatch, capsys):
    monkeypatch.setenv("XLA_HLO_DEBUG", "1")
    check_environment()
    assert capsys.readouterr().err == "note: XLA_HLO_DEBUG is set, which slows training down\n"


def test_flags_that_torch_xla_sets_are_known_to_libtpu():
    flags = "--xla_tpu_use_enhanced_launch_barrier=false --xla_latency_hiding_scheduler_rerun=1"
    assert unknown_libtpu_flags(flags) == []


def test_train_mends_the_environment_before_it_imports_torch_xla(tiny, tmp_path):
    code, out, err = run("train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=3", env={
        "PT_XLA_DEBUG": "true", "XLA_USE_EAGER_DEBUG_MODE": "1", "XLA_USE_SPMD": "1"})
    assert code == 0 and "step      3/3" in out, err
    assert err == ("note: changed in the environment, or the command would fail: PT_XLA_DEBUG, "
                   "XLA_USE_EAGER_DEBUG_MODE, XLA_USE_SPMD\n")


# --- versions -----------------------------------------------------------------------------------


def test_flash_is_refused_with_versions_that_were_not_tried(tiny, monkeypatch):
    flash = train.load_config("config/fwedu_124m.py")
    for tried in versions.TRIED.values():
        monkeypatch.setattr(versions, "installed", lambda tried=tried: tried)
        check_attention(flash, "TPU")
    for changed, line in [
            ({"jax": "0.8.1"}, "pip install jax==0.7.2 jaxlib==0.7.2 libtpu==0.0.21.1$"),
            ({"libtpu": None, "python": "3.12"},
             "pip install jax==0.7.1 jaxlib==0.7.1 libtpu==0.0.21$"),
            ({"libtpu": "1", "torch_xla": "2.8.0", "torch": "2.8.0"},
             "pip install jax==0.7.2 jaxlib==0.7.2 libtpu==0.0.17$"),
            ({"libtpu": "1", "torch_xla": "2.7.0", "python": "3.11"},
             "libtpu==0.0.21 torch_xla==2.9.0$"),
                ({"libtpu": "1", "torch": "2.10.0"},
                 "pip install jax==0.7.2 jaxlib==0.7.2 libtpu==0.0.21.1 torch==2.9.0$")]:
        other = versions.TRIED["the image of Colab"] | changed
        monkeypatch.setattr(versions, "installed", lambda other=other: other)
        with pytest.raises(UserError, match=f"Use --attention=math, or: .*{line}"):
            check_attention(flash, "TPU")
    check_attention(train.load_config(tiny), "TPU")  # math needs neither


def test_a_kernel_that_libtpu_refuses_is_told_in_a_line():
    dump = "INTERNAL: Mosaic failed to compile TPU kernel: Bad lhs type\n\nThe MLIR:" + "\nop" * 200
    message = user_message(RuntimeError(dump))
    assert message == ("error: libtpu does not compile the attention kernel: INTERNAL: Mosaic "
                       "failed to compile TPU kernel: Bad lhs type. Use --attention=math")


def test_this_environment_is_one_of_those_tried():
    assert versions.tried_as(versions.installed())


# --- chips --------------------------------------------------------------------------------------


@pytest.fixture
def busy_chip(tmp_path, monkeypatch):
    """A file that stands in for a chip, and a process that holds it."""
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(tpu, "DEVICE_FILES", (str(tmp_path / "accel[0-9]*"),))
    process = start("-c", f"import time; f = open('{tmp_path / 'accel0'}'); print('opened', "
                          "flush=True); time.sleep(100)", "train.py")
    wait_for_line(process, "opened")
    yield process
    process.kill()
    ended(process)


def test_who_holds_a_chip_is_found_and_named(busy_chip):
    assert [os.path.basename(path) for path in tpu.chips()] == ["accel0"]
    assert list(tpu.holders()) == [busy_chip.pid]
    with pytest.raises(UserError, match=rf"the TPU is in use by process {busy_chip.pid} \(.*python"
                                        rf".* Wait until it ends, or end it with: kill"):
        tpu.check_free(seconds=0)


@pytest.fixture
def pci(tmp_path, monkeypatch):
    """pci(vendor and device, ...): this machine has these PCI devices."""
    def set_devices(*devices):
        for number, ids in enumerate(devices):
            (tmp_path / str(number)).mkdir()
            for name, value in zip(("vendor", "device"), ids.split()):
                (tmp_path / str(number) / name).write_text(f"{value}\n")
        monkeypatch.setattr(tpu, "PCI_DEVICES", tmp_path)
    return set_devices


@pytest.mark.parametrize("device, kind, peak", [
    ("0x1ae0 0x0063", "v5e", 197e12), ("0x1ae0 0x006f", "v6e", 918e12),
    ("0x1ae0 0x005e", None, None), ("0x8086 0x0063", None, None)])
def test_the_peak_is_that_of_the_chips_unless_the_config_says_another(pci, device, kind, peak):
    network = "0x1ae0 0x0042"  # by the same vendor
    pci(network, device, device)
    assert tpu.kind() == kind
    assert tpu.peak_flops(train.Config()) == peak
    assert tpu.peak_flops(train.Config(peak_tflops=275.0)) == 275e12


def test_the_kinds_of_chips_are_those_that_torch_xla_and_jax_know():
    from jax._src import hardware_utils

    for name, kind in tpu.KINDS.items():
        vendor, device = kind.pci_ids
        assert vendor == topology._GOOGLE_PCI_VENDOR_ID
        assert device in topology._TPU_PCI_DEVICE_IDS
        assert hardware_utils._TPU_PCI_DEVICE_IDS[device].name == name


def test_a_chip_that_is_released_in_time_is_free(busy_chip, capsys):
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); "
                                            f"os.kill({busy_chip.pid}, 9)"])
    tpu.check_free(seconds=30)
    assert capsys.readouterr().err.count("waiting up to 30 s for the TPU, in use by process") == 1


def test_sample_says_who_holds_the_tpu_and_takes_one_chip(busy_chip, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PJRT_DEVICE": "TPU"})
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda name: True)  # libtpu
    with pytest.raises(UserError, match=rf"in use by process {busy_chip.pid} .*--device cpu"):
        sample.open_device()
    assert {name: os.environ[name] for name in ONE_CHIP} == ONE_CHIP
    os.environ["XLA_USE_BF16"] = "1"
    with pytest.raises(UserError, match="XLA_USE_BF16 is set"):
        sample.open_device()
    assert sample.open_device("cpu") == "cpu"


# --- one run owns its out_dir -------------------------------------------------------------------


def test_a_second_run_in_the_same_out_dir_is_refused(tiny, tmp_path):
    command = "train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000", "--eval_every=0"
    first = start(*command)
    wait_for_line(first, "step")
    code, out, err = run(*command, "--learning_rate=1e-3")
    assert code == 2 and "starting" not in out, err
    owner = (tmp_path / "lock").read_text()
    assert err.startswith(f"error: another run is writing to out_dir {tmp_path}: {owner}. Stop ")
    assert owner.startswith(f"process {first.pid} on ")
    first.kill()
    second = start(*command)  # needs no help
    wait_for_line(second, "step")
    second.terminate()
    assert ended(second)[0] == 0
    ended(first)


def test_two_runs_started_at_once_end_in_one_run(tiny, tmp_path):
    command = "train.py", tiny, f"--out_dir={tmp_path}", "--max_steps=100000", "--eval_every=0"
    pair = [start(*command), start(*command)]
    codes = []
    while not codes:
        codes = [process.poll() for process in pair if process.poll() is not None]
    assert codes == [2]
    for process in pair:
        process.terminate()
    results = sorted(ended(process)[:2] for process in pair)
    assert [code for code, _ in results] == [0, 2] and "stopped after step" in results[0][1]


def test_a_v5e_gets_more_vmem_and_a_cpu_huge_pages(monkeypatch):
    variables = {"LIBTPU_INIT_ARGS": "--a=1"}
    for chip in "v6e", None:
        tune_environment("TPU", chip, variables)
        assert variables == {"LIBTPU_INIT_ARGS": "--a=1"}
    for _ in range(2):
        tune_environment("TPU", "v5e", variables)
        assert variables == {"LIBTPU_INIT_ARGS": f"--a=1 {VMEM_LIMIT}"}
    own = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304"}
    tune_environment("TPU", "v5e", own)
    assert own == {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304"}
    assert unknown_libtpu_flags(VMEM_LIMIT) == []
    on_cpu, without = {}, {}
    tune_environment("CPU", None, on_cpu)
    monkeypatch.setattr(environment, "libtpu_path", lambda: None)
    tune_environment("TPU", "v5e", without)
    assert without == {} and on_cpu == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
