"""The layout: commands at the root, shared parts in common/, imports in one direction."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUN, command, flags

from train_gpt2 import GPT, GPTConfig

SITE = """
import atexit, gc, json, os, sys
from pathlib import Path

def note_classes():
    script = Path(sys.argv[0])
    if script.name != os.environ["NOTE_SCRIPT"]:  # torchrun itself, or a helper process
        return
    root, found = str(script.resolve().parent), []
    for each in gc.get_objects():
        if isinstance(each, type) and each.__module__ in sys.modules:
            file = getattr(sys.modules[each.__module__], "__file__", None) or ""
            if str(Path(file).resolve()).startswith(root) and "site-packages" not in file:
                found.append(f"{each.__module__}.{each.__qualname__}")
    out = Path(os.environ["NOTE_CLASSES"], os.environ.get("RANK", "0"))
    out.write_text(json.dumps(found))

atexit.register(note_classes)
"""


def sources(root: Path = ROOT) -> dict[str, str]:
    """The text of every command and module, by its import name."""
    paths = [*root.glob("*.py"), *(root / "common").glob("*.py")]
    names = [path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return {name: path.read_text() for name, path in zip(names, paths, strict=True)}


def own_imports(text: str, known: set[str]) -> list[tuple[str, str, bool]]:
    """(module, function it is in or "", whether it is a plain statement at the top) per import."""
    found = []

    def visit(node: ast.AST, function: str, top: bool) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a thing is from"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        found.extend((name, function, top) for name in names if name in known)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            name = getattr(node, "name", "lambda") if inside else function
            visit(child, name, isinstance(node, ast.Module))

    visit(ast.parse(text), "", False)
    return found


def faults(files: dict[str, str]) -> list[str]:
    """Every place where a rule of the layout is broken."""
    known, wrong, graph = set(files), [], {}
    for name, text in files.items():
        imports = [found for found in own_imports(text, known) if found[0] != "common"]
        graph[name] = {module for module, _, top in imports if top}
        for module, function, top in imports:
            allowed = (name, function, module) == ("hellaswag", "main", "train_gpt2")
            if not top and not allowed:
                wrong.append(f"{name} imports {module} in {function or 'a block'}, not at its top")
            if name.startswith("common") and not module.startswith("common"):
                wrong.append(f"{name} imports the command {module}")
        if not name.startswith("common") and "def main(" not in text:
            wrong.append(f"{name} at the root is no command: it has no main()")

    def follow(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            wrong.append("circle: " + " -> ".join((*path[path.index(name) :], name)))
            return
        for module in sorted(graph[name]):
            follow(module, (*path, name))

    for name in sorted(graph):
        follow(name, ())
    return wrong


def test_imports_run_in_one_direction_and_stand_at_the_top():
    assert faults(sources()) == []


BROKEN = {
    "a module of common imports a command": ("common.files", "import plot\n"),
    "a module of common imports a command's function": (
        "common.files",
        "from train_gpt2 import GPT\n",
    ),
    "a command imports inside a function": (
        "plot",
        "def f():\n    from common.files import locked\n",
    ),
    "an import for type checkers alone": (
        "common.hub",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fineweb import DataConfig\n",
    ),
    "an import by its name in a string": (
        "plot",
        "import importlib\ndef f():\n    importlib.import_module('bench')\n",
    ),
    "two modules of common import each other": (
        "common.tokenizer",
        "from common import shards\n",
    ),
    "a command and training import each other": ("hellaswag", "import train_gpt2\n"),
    "a file at the root that is no command": ("helpers", "def help() -> None:\n    pass\n"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule):
    files = sources()
    name, line = BROKEN[rule]
    files[name] = files.get(name, "") + "\n" + line
    assert faults(files), rule


def test_files_and_functions_keep_to_their_size():
    for name, text in sources().items():
        assert text.count("\n") <= (1000 if name == "train_gpt2" else 450), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 110, f"{name}.{node.name} has {lines} lines"


def test_every_command_and_module_has_a_file_of_tests():
    for name in sources():
        if name != "common.__init__":
            assert (ROOT / "tests" / f"test_{name.removeprefix('common.')}.py").exists(), name


def test_commands_that_need_no_torch_do_not_import_it():
    # it takes seconds, and `python plot.py --help` should not
    code = "import sys, fineweb, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_does_nothing(tmp_path):
    names = sorted(set(sources()) - {"common.__init__"})
    script = (
        f"import {', '.join(names)}, sys, threading, torch\n"
        "assert not torch.cuda.is_initialized() and threading.active_count() == 1\n"
        "assert not {'datasets', 'tiktoken', 'matplotlib.pyplot', 'gradio'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def classes_in_use(tmp_path: Path, script: str, *args: str, ranks: int = 0) -> list[list[str]]:
    """Run the real command; each of its processes notes, as it ends, the classes of our files."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    (tmp_path / "notes").mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}
    env |= {"NOTE_SCRIPT": script, "NOTE_CLASSES": str(tmp_path / "notes")}
    words = command(script, *args, ranks=ranks)
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    notes = [json.loads(path.read_text()) for path in (tmp_path / "notes").iterdir()]
    assert len(notes) == max(1, ranks)
    return notes


def twice(classes: list[str]) -> list[str]:
    """The classes that exist in more than one copy, whatever module name each copy has."""
    names = [name.removeprefix("common.").split(".", 1)[1] for name in classes]
    return sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_uses_one_copy_of_its_classes(data_dir, tmp_path, ranks):
    sizes = dict(max_steps=1, vocab_size=50257, sample_every=1, stats_every=1)  # every path
    settings = flags(**{**RUN, **sizes, "data_dir": data_dir, "out_dir": tmp_path / "log"})
    for classes in classes_in_use(tmp_path, "train_gpt2.py", *settings, ranks=ranks):
        assert {"__main__.GPT", "__main__.TrainConfig", "__main__.Machine"} <= set(classes)
        assert not twice(classes)


def test_hellaswag_uses_one_copy_of_its_classes(small_model, tmp_path):
    example = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "label": 0}
    (tmp_path / "data.jsonl").write_text(json.dumps({**example, "endings": ["d", "e", "f", "g"]}))
    config = {**vars(small_model.config), "vocab_size": 50257}
    state = {"model": dict(GPT(GPTConfig(**config)).named_parameters()), "model_config": config}
    torch.save(state, tmp_path / "ckpt_000001.pt")
    args = flags(model=tmp_path / "ckpt_000001.pt", data=tmp_path / "data.jsonl", device="cpu")
    (classes,) = classes_in_use(tmp_path, "hellaswag.py", *args)
    assert {"__main__.Question", "train_gpt2.GPT"} <= set(classes)
    assert not twice(classes)


def test_uv_finds_the_packages_of_requirements_txt(tmp_path):
    """What uv does first: it asks setuptools, by pyproject.toml, what the project requires."""
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    text = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    found = [line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist")]

    def packages(lines: list[str]) -> list[str]:
        return sorted(line.split(";")[0].strip() for line in lines if line)

    assert packages(found) == packages((ROOT / "requirements.txt").read_text().splitlines())
