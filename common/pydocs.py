"""Prose from the docstrings of the standard library and of packages that this project requires.

Most of this text is not prose: examples, tables, formulas, lists of parameters. A small model that
trains on all of it for minutes writes none of it well. So only paragraphs of sentences are kept.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from common.workers import count_cores, worker_pool

# besides the standard library: required packages, and packages that these require
PYDOCS_PACKAGES = ("numpy", "torch", "datasets", "matplotlib", "pandas", "networkx", "sympy")
LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}  # folders

HEADING = re.compile(r"^.*\n *([-=~^*#])\1{2,} *(\n|$)")  # and the line under it
MARKUP = [  # what is written, and what is read; in this order
    (r"\s+", " "),  # a paragraph is one line: the tokens are for words
    (r"[\u2018\u2019]", "'"),
    (r"[\u201c\u201d]", '"'),
    (r":[\w:+-]+:(?=`)", ""),  # the kind of a name: :class:`Linear`
    (r"`([^`<]+) <[^`]*>`", r"`\1`"),  # a link: `text <address>`
    (r"`[~.](?:\w*\.)*(\w+)`", r"`\1`"),  # `~torch.nn.Linear` is shown as Linear
    (r"(`+)([^`]+)\1_{0,2}", r"\2"),  # ``code``, `name` and `link`_
    (r"(?<![\w*])(\*+)(?=\w)([^*]+)\1(?![\w*])", r"\2"),  # *emphasis*
]
MARKUP = [(re.compile(pattern), plain) for pattern, plain in MARKUP]
# From a capital letter to a full stop. Each character must be one of prose: doctests, signatures,
# tables, formulas and directives have others (> = _ | { \ <), or a dot or a colon inside a word.
SENTENCES = re.compile(
    r"""["'(]?[A-Z]
    (?: [A-Za-z0-9 ,;'"()!?%/-]
      | \.(?!\w) | (?<=\d)[.:](?=\d)  # the end of a sentence, 3.14, 12:30
      | (?<=\b[ei])\.(?=[ge]\.)       # e.g. and i.e.
      | (?<![ :]):(?=[ ])             # not "axis : int", nor the "::" before code
    )*
    [.!?]["')]*""",
    re.VERBOSE,
)
LEAST_PROSE = 150  # characters in a docstring: thousands say "Return the name." and no more


def find_pydocs() -> str:
    """Return the versions of Python and the packages: the texts change only with them."""
    versions = [f"{name} {version}" for name, version in find_versions().items()]
    return ", ".join([f"prose of python {sys.version.split()[0]}", *versions])


def find_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in PYDOCS_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def read_pydocs() -> bytes:
    """Return one JSON line for each module: the prose of its docstrings, no paragraph twice.

    Modules are parsed, never imported. Their order is shuffled but fixed (by the sha256 of their
    names), so the first tenth of the tokens, the validation split, is a fair sample.
    """
    import importlib.util
    import sysconfig

    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    roots |= {name: Path(importlib.util.find_spec(name).origin).parent for name in find_versions()}
    modules = {}
    for name, root in roots.items():
        for folder, folders, files in os.walk(root):
            folders[:] = set(folders) - LEFT_OUT  # os.walk does not enter them
            for file in files:
                if file.endswith(".py"):
                    path = Path(folder, file)
                    modules[f"{name}/{path.relative_to(root).as_posix()}"] = path
    names = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    with worker_pool(count_cores()) as pool:
        found = list(pool.map(module_prose, [modules[name] for name in names], chunksize=32))
    seen, lines = set(), []
    for paragraphs in found:
        fresh = list(dict.fromkeys(text for text in paragraphs if text not in seen))
        seen.update(fresh)
        if fresh:
            lines.append(json.dumps({"text": "\n\n".join(fresh)}) + "\n")
    return "".join(lines).encode()


def module_prose(path: Path) -> list[str]:
    """Return the paragraphs of prose in the docstrings of a Python file."""
    return [paragraph for text in docstrings(path) for paragraph in prose(text)]


def prose(text: str) -> list[str]:
    """Return the paragraphs of a docstring that are sentences, each in one line, without markup."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = HEADING.sub("", paragraph.strip("\n")).splitlines()
        # in lists, what explains a word is indented under it
        if len({len(line) - len(line.lstrip()) for line in lines}) != 1:
            continue
        paragraph = "\n".join(lines).strip()
        for pattern, plain in MARKUP:
            paragraph = pattern.sub(plain, paragraph)
        if SENTENCES.fullmatch(paragraph):
            found.append(paragraph)
    return found if sum(map(len, found)) >= LEAST_PROSE else []


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a Python file, breadth first, or the texts of Python's manual."""
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
    if path.parent.name == "pydoc_data":  # what help() shows of the reference manual, in a dict
        strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return [node.value for node in strings if isinstance(node.value, str)]
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, owners)]
