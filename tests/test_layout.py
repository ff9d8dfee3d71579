"""The layout of the repository, and that README and docs/ describe it: files, imports, commands."""
import ast
import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run

import nanoxla
import train

SCRIPTS = ["model", "train", "data", "sample", "convert_to_hf"]
MAY_IMPORT = {  # which scripts a script may import; all of them may import the package
    "model": [], "train": ["model", "data"], "data": [], "sample": ["model"],
    "convert_to_hf": ["model"]}
TOP_LEVEL = {"README.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore", ".ci",
             *(f"{script}.py" for script in SCRIPTS),
             "assets", "config", "docs", "nanoxla", "notebooks", "tests", "tools"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tracked_files():
    """The files that git tracks."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    assert listed.returncode == 0, listed.stderr
    return [Path(name) for name in listed.stdout.splitlines()]


def imports(path):
    """The first parts of the names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_top_level_shows_five_scripts():
    assert {path.parts[0] for path in tracked_files()} == TOP_LEVEL


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_only_the_scripts_it_may(script):
    imported = set(imports(ROOT / f"{script}.py")) & set(SCRIPTS)
    assert imported <= set(MAY_IMPORT[script])


def test_the_package_imports_no_script_and_no_tool():
    tools = [path.stem for path in (ROOT / "tools").glob("*.py")]
    for path in (ROOT / "nanoxla").glob("*.py"):
        assert not set(imports(path)) & {*SCRIPTS, *tools}, path


def test_files_are_short():
    for path in (ROOT / "nanoxla").glob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_readme_and_the_map_of_the_package_list_every_file():
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^(\w+\.py|\w+/)  ", text, re.MULTILINE)
    assert listed == [*(f"{script}.py" for script in SCRIPTS), "nanoxla/", "config/", "notebooks/",
                      "tools/", "docs/", "tests/"]
    listed = re.findall(r"^    (\w+\.py)  ", nanoxla.__doc__, re.MULTILINE)
    modules = [path.name for path in (ROOT / "nanoxla").glob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_files_that_exist(page):
    text = page.read_text()
    files = re.findall(r"\b(?:tools|config|tests|docs|nanoxla|assets)/\w+\.(?:py|md|txt|png)", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for target in [*(ROOT / file for file in files), *(page.parent / link for link in links)]:
        assert target.exists(), target


# --- the commands that the pages show -----------------------------------------------------------


def commands(page):
    """The lines of a page's code blocks that begin with python, .venv/bin/python or make."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split("  #")[0]) if re.match(r"\S*python |make ", line) else []
            if words:
                yield words


@functools.cache
def help_of(*command):
    code, out, err = run(*command, "--help")
    assert code == 0, err
    return out


def check(words):
    """Raises unless the command exists and takes these arguments."""
    program, script, *arguments = [*words, ""][:2] + words[2:]
    if program == "make":
        assert re.search(rf"^{script}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        return
    assert (ROOT / script).is_file(), words
    arguments = [word for word in arguments if word not in ("<", "...") and not word.endswith("]")]
    if script == "train.py" or script in ("tools/compile_for_tpu.py", "tools/host_time.py",
                                         "tools/doctor.py"):
        path, *overrides = arguments or ["CONFIG"]  # doctor.py has a default
        overrides = [word for word in overrides if not word.startswith(("--topology", "--json"))]
        train.load_config(ROOT / path.replace("CONFIG", "config/fwedu_124m.py"), overrides)
        return
    subcommand = arguments[:1] if script == "data.py" else []
    for word in arguments:
        if word.startswith("--"):
            assert re.search(rf"{word.split('=')[0]}\b", help_of(script, *subcommand)), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_take_the_arguments_it_shows(page):
    found = list(commands(page))
    for words in found:
        check(words)
    if page.name == "README.md":
        assert len(found) > 15
