"""common/pydocs.py: the docstrings of installed packages as a corpus."""

import ast
import json
import textwrap

from common import pydocs


def test_pydocs_are_docstrings_of_libraries_without_repeats(tmp_path, monkeypatch):
    repeated = '"""One.\n\nTwo.\nThree."""'
    modules = {
        "a.py": f'{repeated}\nraise SystemExit("imported")\ndef f():\n    """Short."""\n',
        "b.py": f'class B:\n    {repeated}\n    async def f():\n     """B\n     x\n\n     y."""',
        "old.py": "print 'for another Python'\n",
        "deep/test/c.py": '"""A\ntest\nis left\nout."""',
        "site-packages/d.py": '"""A\npackage\nis left\nout."""',
    }
    modules |= {f"many/{i}.py": f'"""M{i}\n\n\n."""' for i in range(20)}
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(pydocs, "PYDOCS_PACKAGES", ())
    texts = [json.loads(line)["text"] for line in pydocs.read_pydocs().splitlines()]
    many = [text for text in texts if text.startswith("M")]
    assert sorted(many) == sorted(f"M{i}\n\n\n." for i in range(20))
    assert many != sorted(many)  # shuffled
    one = "One.\n\nTwo.\nThree."
    others = [text for text in texts if text not in many]
    assert sorted(others) in (sorted([one, "B\nx\n\ny."]), sorted([f"{one}\n\nB\nx\n\ny."]))


def test_docstrings_are_found_in_every_statement_and_stay_in_the_order_of_ast_walk(
    tmp_path, monkeypatch
):
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
        "not\\na\\ndoc\\nstring"
        x = lambda: 1
    """
    texts = [f"{i}\n\n\n." for i in range(source.count("{}"))]
    # with single quotes too: the escapes make the lines
    source = textwrap.dedent(source).format(*map(repr, texts))
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(pydocs, "PYDOCS_PACKAGES", ())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    expected = [ast.get_docstring(node) for node in owners]
    assert sorted(expected) == sorted(texts) and expected != texts  # breadth first
    assert json.loads(pydocs.read_pydocs())["text"] == "\n\n".join(expected)


def test_the_revision_names_the_versions_that_change_the_text():
    revision = pydocs.find_pydocs()
    assert all(f"{name} " in revision for name in ("python", *pydocs.PYDOCS_PACKAGES))
