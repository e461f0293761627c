"""common/pydocs.py: the docstrings of installed packages as a corpus."""

import json

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


def test_the_revision_names_the_versions_that_change_the_text():
    revision = pydocs.find_pydocs()
    assert all(f"{name} " in revision for name in ("python", *pydocs.PYDOCS_PACKAGES))
