"""The documentation: its Python runs, its tables are of tests that exist, its notebook is the tutorial."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "tools"))

import check
import matrix
import notebook
import run

PAGES = sorted(DOCS.rglob("*.md"))


def test_every_python_block_runs():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, run.__file__], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(run.pages()) >= 25
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == run.pages()


def test_a_block_that_fails_is_named_with_its_line(monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "figures.mplstyle").write_text("")
    (tmp_path / "page.md").write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nprint(x)\nprint(y)\n```\n")
    monkeypatch.setattr(run, "DOCS", tmp_path)
    with pytest.raises(NameError) as found:
        run._execute("page.md")
    assert run._where(found.value, "page.md") == "line 9: NameError: name 'y' is not defined"


def test_figures_have_words_for_who_cannot_see_them():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="a figure without a title"):
        run._drawn(figure)
    plt.close(figure)


@pytest.mark.parametrize("language", ["py", "Python", "python3", "pycon"])
def test_no_block_escapes_by_its_language(language):
    for page in [*PAGES, ROOT / "README.md"]:
        assert f"```{language}\n" not in page.read_text(), page


@pytest.mark.parametrize("test", sorted(matrix.tests()))
def test_cells_of_the_matrix_name_tests_that_exist(test):
    path, name = test.split("::")
    assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_notebook_is_the_tutorial():
    """Its cells are the pages'; `make notebook` writes it, with what they print and draw."""
    book = json.loads(notebook.COMMITTED.read_text())
    wanted = [cell for chapter in notebook.CHAPTERS for cell in notebook.cells(f"tutorial/{chapter}.md")]
    assert [cell["source"] for cell in book["cells"]] == [cell["source"] for cell in wanted]
    assert {page.stem for page in (DOCS / "tutorial").glob("*.md")} == set(notebook.CHAPTERS)
    figures = [o for cell in book["cells"] for o in cell.get("outputs", []) if o["output_type"] == "display_data"]
    assert len(figures) >= 6 and all(o["data"]["image/png"] for o in figures)


def test_no_chapter_takes_a_builtin_name():
    """The notebook runs all chapters in one process: a loop over `round` broke the chapter after it."""
    for chapter in notebook.CHAPTERS:
        for _, source in run.blocks((DOCS / "tutorial" / f"{chapter}.md").read_text()):
            names = {node.id for node in ast.walk(ast.parse(source))
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
            assert not names & set(dir(builtins)), f"{chapter}: {names & set(dir(builtins))}"


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    from fastpref import online, trainers

    for module, names in (("fastpref", fastpref.__all__[1:]), ("fastpref.trainers", trainers.__all__),
                          ("fastpref.online", online.__all__)):  # fmt: skip
        for name in names:
            assert f"::: {module}.{name}\n" in text, f"{module}.{name} is on no page of docs/reference"


def test_every_file_that_a_page_names_is_there():
    named = re.compile(r"`((?:fastpref|kernels|tests|benchmarks|examples|docs)/[\w./-]+)`")
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for path in named.findall(page.read_text()):
            if not any(word in path for word in ("NAME", "METHOD")):
                assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_checker_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here"></h1><a href="b.html#there"></a><a href="#here"></a><a href="c.html"></a><a href="https://x.org"></a>'
        '<script src="https://cdn.example/x.js"></script><link rel="canonical" href="https://x.org">'
    )
    (tmp_path / "b.html").write_text('<h2 id="elsewhere"></h2><img src="a.png">')
    assert check.problems(tmp_path) == [
        "a.html links to b.html#there, which has no such place",
        "a.html links to c.html, which is not there",
        "a.html loads https://cdn.example/x.js",
        "b.html links to a.png, which is not there",
    ]
