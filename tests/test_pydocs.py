"""common/pydocs.py: the prose of installed packages as a corpus."""

import ast
import json
import textwrap

import pytest

from common import pydocs

# A docstring needs enough prose. This paragraph is enough, so each test is about the other one.
LONG = "This is a long paragraph of plain sentences, " + "and so on, " * 10 + "and so on."


def as_modules(tmp_path, monkeypatch, modules):
    """Write files, and let them be the only standard library; return the texts of the corpus."""
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(pydocs, "PYDOCS_PACKAGES", ())
    return [json.loads(line)["text"] for line in pydocs.read_pydocs().splitlines()]


def test_pydocs_are_docstrings_of_libraries_without_repeats(tmp_path, monkeypatch):
    modules = {
        "a.py": f'"""{LONG}"""\nraise SystemExit("imported")\ndef f():\n    """Short."""\n',
        "b.py": f'class B:\n    """{LONG}"""\n    async def f():\n     """B.\n\n     {LONG}"""',
        "old.py": "print 'for another Python'\n",
        "deep/test/c.py": f'"""A test is left out.\n\n{LONG}"""',
        "site-packages/d.py": f'"""A package is left out.\n\n{LONG}"""',
    }
    modules |= {f"many/{i}.py": f'"""M{i}, and {LONG.lower()}"""' for i in range(20)}
    texts = as_modules(tmp_path, monkeypatch, modules)
    many = [text for text in texts if text.startswith("M")]
    assert sorted(many) == sorted(f"M{i}, and {LONG.lower()}" for i in range(20))
    assert many != sorted(many)  # shuffled
    others = [text for text in texts if text not in many]
    assert sorted(others) in (["B.", LONG], [f"{LONG}\n\nB."])


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        ("A sentence\nin two lines.", "A sentence in two lines."),
        ("    All of it\n    is indented.", "All of it is indented."),
        (
            'Is it (e.g. 3.14, i.e. "pi")? At 12:30: yes!',
            'Is it (e.g. 3.14, i.e. "pi")? At 12:30: yes!',
        ),
        ("It\u2019s a \u201cquote\u201d.", 'It\'s a "quote".'),
        ("Notes\n-----\nA sentence.", "A sentence."),
        ("A :class:`Linear`, a :py:func:`~torch.nn.relu`.", "A Linear, a relu."),
        ("A `.Figure`, ``code``, `name` and `link`_.", "A Figure, code, name and link."),
        ("Read `the guide <https://a.b/c_d>`__ first.", "Read the guide first."),
        ("This is *slow*, **very** slow.", "This is slow, very slow."),
    ],
)
def test_a_paragraph_of_sentences_becomes_one_plain_line(paragraph, kept):
    assert pydocs.prose(f"{LONG}\n\n{paragraph}\n \n{LONG}") == [LONG, kept, LONG]


@pytest.mark.parametrize(
    "paragraph",
    [
        ">>> print(1)\n1",
        "For example::",
        "The code follows:",
        "A fragment without an end",
        "from a word in the middle.",
        "Notes\n-----",
        "axis : int, optional.",
        "Axis : The one to sum over.",
        "Axis\n    The one to sum over.",
        "Args:\n    x: The input.",
        ":param x: The input.",
        "    x (int): The input.",
        ".. note:: A sentence.",
        "* Item one.",
        "Shuffled by numpy.random.",
        "The sum is x + y.",
        "Set x = 1.",
        "A snake_case name.",
        "See [1]_.",
        "https://docs.python.org.",
        "Call It\\n.",
        "| A | table. |",
        "A <tag>.",
        "A {brace}.",
        "Déjà vu.",
    ],
)
def test_a_paragraph_that_is_not_sentences_is_left_out(paragraph):
    assert pydocs.prose(f"{LONG}\n\n{paragraph}\n\n{LONG}") == [LONG, LONG]


def test_a_docstring_with_little_prose_is_left_out():
    text = "A" + "a" * (pydocs.LEAST_PROSE - 2) + "."
    assert pydocs.prose(text) == [text] and pydocs.prose(text[1:].capitalize()) == []


def test_docstrings_are_found_in_every_statement_and_stay_in_the_order_of_ast_walk(tmp_path):
    source = """
        {}
        try:
            def a(): {}
        except* OSError:
            if a:
                class B:
                    {}
                    def c(): {}
            elif b:
                async def d(): {}
            else:
                def e(): {}
        else:
            match a:
                case 1:
                    def f(): {}
        finally:
            with a, b:
                for c in d:
                    while e:
                        def g(): {}
                else:
                    def h(): {}
        def i(): {}
        "not a docstring"
        x = lambda: 1
    """
    texts = [f"{i}\n\n\n." for i in range(source.count("{}"))]
    # with single quotes too: the escapes make the lines
    source = textwrap.dedent(source).format(*map(repr, texts))
    (tmp_path / "module.py").write_text(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    expected = [ast.get_docstring(node) for node in owners]
    assert sorted(expected) == sorted(texts) and expected != texts  # breadth first
    assert list(filter(None, pydocs.docstrings(tmp_path / "module.py"))) == expected


def test_the_reference_manual_is_read_from_its_table(tmp_path, monkeypatch):
    modules = {"pydoc_data/topics.py": repr({"if": f"The if statement\n***\n\n{LONG}\n", "n": 1})}
    assert as_modules(tmp_path, monkeypatch, modules) == [LONG]


def test_the_revision_names_the_versions_that_change_the_text():
    revision = pydocs.find_pydocs()
    assert all(f"{name} " in revision for name in ("python", *pydocs.PYDOCS_PACKAGES))


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    with_all = pydocs.find_pydocs()
    monkeypatch.setattr(pydocs, "PYDOCS_PACKAGES", (*pydocs.PYDOCS_PACKAGES, "no-such-package"))
    assert pydocs.find_pydocs() == with_all
