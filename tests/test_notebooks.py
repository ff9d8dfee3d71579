"""notebooks/: every code cell is executed as Jupyter does it, on a tiny model, without a network.
Only the cell of parameters is replaced. Stand-ins: a directory for what Kaggle attaches, a script
for Hugging Face's `hf`, a module for google.colab."""
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, TINY, train_here, write_tiny
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from packaging.specifiers import SpecifierSet
from test_layout import check, help_of

from nanoxla.checkpoint import list_checkpoints

NOTEBOOKS = ROOT / "notebooks"
NAMES = ["kaggle.ipynb", "colab.ipynb"]
SESSION = "--checkpoint_every=4 --log_every=1"


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook):
    cell, = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return cell


def parameters_of(notebook):
    values = {}
    exec(parameters_cell(notebook).source, values)
    return {name: value for name, value in values.items() if name.isupper()}


# --- without executing them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_its_outputs_are_cleared(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert code_cells(notebook)[0] == parameters_cell(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    for text, code in zip(notebook.cells, notebook.cells[1:]):  # each is explained
        assert code.cell_type == "markdown" or text.cell_type == "markdown", code.id


def commands(name):
    """The words of every line that begins with !, with the values of the parameters."""
    notebook = read(name)
    later = dict(PLACE="shards", DATA="shards", MODEL="tokenizer.model", hours=1.0)
    values = parameters_of(notebook) | later
    for cell in code_cells(notebook):
        for line in re.findall(r"^ *!(.*)", cell.source.replace("\\\n", " "), re.MULTILINE):
            yield shlex.split(line.format(**values))


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_notebook_take_the_arguments_it_shows(name):
    scripts = []
    for words in commands(name):
        if words[0] == "hf":
            listed = subprocess.run([Path(sys.executable).with_name("hf"), words[1], "--help"],
                                    text=True, capture_output=True, check=True).stdout
            assert all(word in listed for word in words if word.startswith("--")), words
        elif words[:3] == ["python", "-m", "pip"]:
            check_requirements(words[5:])
        elif words[0] == "python":
            scripts.append(words[1])
            if words[1] == "tools/doctor.py":  # it takes the keys of train.py
                assert help_of("tools/doctor.py")
                words = ["python", "train.py", *words[2:]]
            check(words)
        else:
            assert words[0] in ("git", "du"), words
    assert scripts == ["tools/doctor.py", "data.py", "train.py", "tools/plot.py", "sample.py",
                       "convert_to_hf.py"]


def check_requirements(requirements):
    """The stock images have versions of their own. What a notebook accepts must include ours."""
    pins = dict(re.findall(r'"(\w+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert requirements
    for requirement in requirements:
        package, allowed = re.fullmatch(r"([a-z]+)(.+)", requirement).groups()
        assert pins[package] in SpecifierSet(allowed), requirement


def test_kernel_metadata_asks_for_a_tpu_and_the_internet():
    metadata = json.loads((NOTEBOOKS / "kernel-metadata.json").read_text())
    assert metadata["code_file"] == "kaggle.ipynb" and metadata["kernel_type"] == "notebook"
    assert metadata["machine_shape"] == "TpuV5E8"
    assert metadata["enable_tpu"] and metadata["enable_internet"] and not metadata["enable_gpu"]
    # Kaggle derives the address of a notebook from its title, and the two must agree.
    assert metadata["id"].split("/")[1] == metadata["title"].replace(" ", "-")
    text = "".join(cell.source for cell in read("kaggle.ipynb").cells)
    assert metadata["id"] in text and "kaggle kernels push -p notebooks" in " ".join(text.split())


# --- the cells that choose, one by one ----------------------------------------------------------


class Shell:
    """In place of IPython: records the commands of a cell, and lets them end with exit_code."""

    def __init__(self, values, exit_code=0):
        self.values, self.exit_code, self.commands = values, exit_code, []

    def system(self, command):
        self.commands.append(command.format(**self.values))
        self.values["_exit_code"] = self.exit_code

    def run_line_magic(self, name, line):
        assert name == "cd"


def run_cell(name, id, exit_code=0, **values):
    """Executes a cell in this process, after the imports. Returns (variables, commands)."""
    notebook = read(name)
    values = parameters_of(notebook) | values
    shell = Shell(values, exit_code)
    values |= {"get_ipython": lambda: shell, "_exit_code": 0}
    source, = (cell.source for cell in notebook.cells if cell.id == "code")
    exec(source.split("\nif ")[0], values)
    source, = (cell.source for cell in notebook.cells if cell.id == id)
    exec(TransformerManager().transform_cell(source), values)
    return values, shell.commands


def test_shards_that_are_attached_are_used_in_place(tmp_path):
    shard = tmp_path / "datasets/me/shards/fwedu_train_0.bin"
    shard.parent.mkdir(parents=True)
    shard.touch()
    values, commands = run_cell("kaggle.ipynb", "data", INPUT=str(tmp_path))
    assert values["PLACE"] == str(tmp_path) and not commands


def test_shards_are_downloaded_to_the_first_place_with_room(tmp_path, monkeypatch):
    free = {"/full": 20e9, "/roomy": 100e9, "/also": 100e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(
        0, 0, free[place]))
    values, (command,) = run_cell("kaggle.ipynb", "data", INPUT=str(tmp_path), SCRATCH=list(free))
    assert values["PLACE"] == "/roomy/shards" and "--local-dir /roomy/shards" in command
    with pytest.raises(RuntimeError, match="none of .* has 21 GB free"):
        run_cell("kaggle.ipynb", "data", INPUT=str(tmp_path), SCRATCH=["/full"])
    with pytest.raises(RuntimeError, match="the download failed"):
        run_cell("kaggle.ipynb", "data", exit_code=1, INPUT=str(tmp_path), SCRATCH=["/roomy"])


def test_a_download_that_broke_off_continues_where_it_is(tmp_path):
    (tmp_path / "shm/shards").mkdir(parents=True)
    scratch = [str(tmp_path), f"{tmp_path}/shm"]
    values, _ = run_cell("kaggle.ipynb", "data", INPUT=f"{tmp_path}/input", SCRATCH=scratch)
    assert values["PLACE"] == f"{tmp_path}/shm/shards"


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_stops_the_notebook_when_its_command_fails(name):
    for id in "code", "doctor":
        with pytest.raises(RuntimeError):
            run_cell(name, id, exit_code=1, REPOSITORY="x", CODE="/nowhere")
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        run_cell(name, "code")


@pytest.mark.parametrize("name", NAMES)
def test_shards_and_tokenizer_that_do_not_fit_are_refused(name, stand_in):
    shards = stand_in / "me/shards"
    values, (command,) = run_cell(name, "check", PLACE=str(shards), VOCAB_SIZE=300)
    assert values["DATA"] == str(shards) and values["MODEL"] == f"{shards}/tokenizer.model"
    assert command.startswith("python data.py inspect")
    # a pattern with a directory
    values, _ = run_cell(name, "check", PLACE=str(stand_in), VOCAB_SIZE=300,
                         TRAIN_GLOB="me/shards/train_*.bin", VAL_GLOB="me/shards/val_*.bin")
    assert values["DATA"] == str(stand_in)  # to which the two patterns are relative
    with pytest.raises(RuntimeError, match="300 tokens, expected 32,000"):
        run_cell(name, "check", PLACE=str(shards))
    with pytest.raises(RuntimeError, match=r"VAL_GLOB = 'valid\*.bin'.*val_00000.bin"):
        run_cell(name, "check", PLACE=str(shards), VAL_GLOB="valid*.bin")
    with pytest.raises(RuntimeError, match="the shards do not fit"):
        run_cell(name, "check", exit_code=1, PLACE=str(shards), VOCAB_SIZE=300)


# --- whole notebooks ----------------------------------------------------------------------------

HF = '''#!{python}
"""Stands in for Hugging Face's command: copies a directory, or one file of it."""
import argparse, shutil
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["download"])
parser.add_argument("repository")
parser.add_argument("file", nargs="?")
parser.add_argument("--repo-type", default="model")
parser.add_argument("--local-dir", required=True)
arguments = parser.parse_args()
source = Path("{hub}", arguments.repository)
assert arguments.repo_type == ("model" if arguments.file else "dataset")
shutil.copytree(source, arguments.local_dir, dirs_exist_ok=True, ignore=lambda _, names:
                [name for name in names if arguments.file not in (None, name)])
'''
COLAB = '''
from pathlib import Path
def mount(path):
    Path(path, "MyDrive").mkdir(parents=True)
def flush_and_unmount():
    Path("{drive}", "unmounted").touch()
'''


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository of the files here, committed or not."""
    directory = tmp_path_factory.mktemp("repository")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@localhost", "-C"]
    listed = subprocess.run([*git, ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
                            text=True, capture_output=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    for command in ["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]:
        subprocess.run([*git, directory, *command], check=True)
    return directory


@pytest.fixture(scope="module")
def stand_in(trained, tmp_path_factory):
    """A directory with the Hugging Face repositories me/shards, me/shards-alone (without a
    tokenizer) and me/llama (with nothing else), and a config file, tiny.py."""
    hub = tmp_path_factory.mktemp("hub")
    alone = hub / "me/shards-alone"
    alone.mkdir(parents=True)
    write_tiny(alone, vocab_size=300).rename(hub / "tiny.py")
    shutil.copytree(alone, hub / "me/shards")
    (hub / "me/llama").mkdir()
    for name in "me/shards", "me/llama":
        shutil.copy(trained / "tokenizer.model", hub / name)
    return hub


@pytest.fixture(scope="module")
def as_jupyter_does(repository, stand_in, tmp_path_factory):
    """as_jupyter_does(name, directory, **parameters) executes all cells of a notebook in a new
    kernel, which starts in `directory`. Returns {cell id: what it printed}."""
    place = tmp_path_factory.mktemp("kernel")
    (place / "bin").mkdir()
    hf = place / "bin/hf"
    hf.write_text(HF.format(python=sys.executable, hub=stand_in))
    hf.chmod(0o755)
    profile = place / "ipython/profile_default"
    profile.mkdir(parents=True)
    # By default a command that fails does not stop the cell, so the test would not notice.
    (profile / "ipython_kernel_config.py").write_text(
        "c.InteractiveShell.system_raise_on_error = True\n")

    def execute(name, directory, **parameters):
        directory.mkdir(exist_ok=True)
        notebook = read(name)
        assert parameters.keys() <= parameters_of(notebook).keys()
        cell = parameters_cell(notebook)
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        python = Path(sys.executable).parent
        env = os.environ | {"PATH": f"{place}/bin:{python}:{os.environ['PATH']}",
                            "PYTHONPATH": str(directory / "modules"), "PJRT_DEVICE": "CPU",
                            "IPYTHONDIR": str(place / "ipython"), "PIP_NO_INDEX": "1"}
        client = NotebookClient(notebook, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(directory)}})
        client.execute(env=env)
        return {cell.id: "".join(output.get("text", "") for output in cell.outputs)
                for cell in code_cells(notebook)}
    return execute


def common(repository, stand_in, directory):
    return dict(REPOSITORY=str(repository), CODE=f"{directory}/nanoxla", VOCAB_SIZE=300,
                CONFIG=str(stand_in / "tiny.py"), PROMPT="we the")


def files(directory):
    """{path: (mode, size, time of change)} of everything below a directory."""
    return {path: (path.stat().st_mode, path.stat().st_size, path.stat().st_mtime_ns)
            for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def expected(stand_in, tmp_path_factory):
    """The out_dir of the same run without an interruption."""
    out_dir, shards = tmp_path_factory.mktemp("expected"), stand_in / "me/shards"
    train_here(stand_in / "tiny.py", f"--out_dir={out_dir}", f"--data_dir={shards}",
               f"--tokenizer={shards}/tokenizer.model", *SESSION.split())
    return out_dir


def check_results(out_dir, printed, expected):
    """The run ended with the bytes of an uninterrupted one, and all that follows it was made."""
    newest, reference = (list_checkpoints(run)[-1] for run in (out_dir, expected))
    assert newest.name == reference.name == f"step_{TINY['max_steps']:08d}"
    for name in "model.safetensors", "optimizer.safetensors":
        assert (newest / name).read_bytes() == (reference / name).read_bytes(), name
    assert (out_dir / "loss.png").stat().st_size and (out_dir / "hf/tokenizer.json").exists()
    assert printed["sample"].count("we the") == 3 and "300 tokens" in printed["check"]
    assert "hf" in printed["save"]


@pytest.mark.slow
def test_kaggle_in_two_sessions_equals_an_uninterrupted_run(
        as_jupyter_does, repository, stand_in, expected, tmp_path):
    """The first session ends early, by max_hours. In the second, its output is a read-only
    input."""
    attached = tmp_path / "input"
    attached.mkdir()
    parameters = dict(DATASET="me/shards", DATASET_GB=0.001, INPUT=str(attached))

    def session(directory, flags):
        (directory / "scratch").mkdir(parents=True)
        return as_jupyter_does("kaggle.ipynb", directory, **parameters,
                               **common(repository, stand_in, directory), OVERRIDES=flags,
                               OUT_DIR=f"{directory}/working/run", SCRATCH=[f"{directory}/scratch"])

    first, second = tmp_path / "first", tmp_path / "second"
    printed = session(first, f"{SESSION} --max_hours=0.0001")
    assert "stopped after step" in printed["train"]
    assert f"downloading me/shards to {first}/scratch/shards" in printed["data"]

    output = attached / "notebooks/me/nanoxla-124m"  # where Kaggle shows the output of a notebook
    output.parent.mkdir(parents=True)
    (first / "working").rename(output)
    shutil.rmtree(first)
    for path in output.rglob("*"):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
    before = files(attached)
    printed = session(second, SESSION)
    assert "step      1/" not in printed["train"]
    assert files(attached) == before
    check_results(second / "working/run", printed, expected)


@pytest.mark.slow
def test_colab(as_jupyter_does, repository, stand_in, expected, tmp_path):
    modules, drive = tmp_path / "modules/google/colab", tmp_path / "drive"
    modules.mkdir(parents=True)
    (modules / "drive.py").write_text(COLAB.format(drive=drive))
    printed = as_jupyter_does("colab.ipynb", tmp_path, **common(repository, stand_in, tmp_path),
                              DATASET=str(stand_in / "me/shards-alone"), TOKENIZER="me/llama",
                              DRIVE=str(drive), OUT_DIR=f"{drive}/MyDrive/run",
                              CHECKPOINT_EVERY=4, OVERRIDES="--log_every=1")
    check_results(drive / "MyDrive/run", printed, expected)
    assert f"{tmp_path}/nanoxla/data/tokenizer.model" in printed["check"]  # downloaded
    assert (drive / "unmounted").exists()
