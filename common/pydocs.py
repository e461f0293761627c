"""Docstrings of the standard library and of packages that this project requires, as a corpus."""

import hashlib
import json
import os
import sys
from pathlib import Path

from common.workers import count_cores, worker_pool

PYDOCS_PACKAGES = ("numpy", "torch", "datasets")  # besides the standard library


def find_pydocs() -> str:
    """Return the versions of Python and the packages: the texts change only with them."""
    from importlib.metadata import version

    versions = [f"{name} {version(name)}" for name in PYDOCS_PACKAGES]
    return ", ".join([f"python {sys.version.split()[0]}", *versions])


def read_pydocs() -> bytes:
    """Return one JSON line for each module: its docstrings of more than three lines, no repeats.

    Modules are parsed, never imported. Their order is shuffled but fixed (by the sha256 of their
    names), so the first tenth of the tokens, the validation split, is a fair sample.
    """
    import importlib.util
    import sysconfig

    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in PYDOCS_PACKAGES]
    left_out = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
    modules = {}
    for root in roots:
        name = root.name if root is not roots[0] else "python"
        for folder, folders, files in os.walk(root):
            folders[:] = set(folders) - left_out  # os.walk does not enter them
            for file in files:
                if file.endswith(".py"):
                    path = Path(folder, file)
                    modules[f"{name}/{path.relative_to(root).as_posix()}"] = path
    names = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    with worker_pool(count_cores()) as pool:
        found = list(pool.map(docstrings, [modules[name] for name in names], chunksize=32))
    seen, lines = set(), []
    for texts in found:
        fresh = list(dict.fromkeys(text for text in texts if text not in seen))
        seen.update(fresh)
        if fresh:
            lines.append(json.dumps({"text": "\n\n".join(fresh)}) + "\n")
    return "".join(lines).encode()


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of more than three lines in a Python file, breadth first."""
    import ast
    import gc
    import warnings

    gc.disable()  # a syntax tree has no cycles: the search for them took a quarter of the time
    warnings.simplefilter("ignore")  # invalid escapes in old modules
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files for other versions of Python
        return []
    nodes = [tree]
    for node in nodes:  # in the order of ast.walk, without expressions, which are most of the nodes
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, part, ())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, owners)]
    return [text for text in texts if text and text.count("\n") >= 3]
