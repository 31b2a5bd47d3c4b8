"""The tutorial as one notebook, with what its cells gave when the pages were run.

python docs/tools/notebook.py    writes examples/tutorial.ipynb
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import run

PATH = "tutorial/tutorial.ipynb"
COMMITTED = run.ROOT / "examples" / "tutorial.ipynb"
CHAPTERS = ("index", "reward-model", "kl", "dpo", "family", "online", "process-rewards")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")


def cells(page: str) -> list[dict[str, Any]]:
    """A page's text and code in order, without outputs. Links to other pages keep their words."""
    text, found, end = (run.DOCS / page).read_text(), [], 0
    for block in run.BLOCK.finditer(text):
        found += [("markdown", text[end : block.start()]), ("code", block[1])]
        end = block.end()
    found.append(("markdown", text[end:]))
    return [
        {"cell_type": kind, "id": f"{Path(page).stem}-{i}", "metadata": {}, "source": _source(kind, source)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for i, (kind, source) in enumerate(found)
        if source.strip()
    ]


def _source(kind: str, text: str) -> list[str]:
    text = LINK.sub(r"\1", text) if kind == "markdown" else text
    return text.strip().splitlines(keepends=True)


def text(outputs: dict[str, list[run.Output]]) -> str:
    found: list[dict[str, Any]] = []
    count = 0
    for chapter in CHAPTERS:
        page = f"tutorial/{chapter}.md"
        results = iter(outputs.get(page, []))
        for cell in cells(page):
            if cell["cell_type"] == "code":
                count += 1
                cell |= {"execution_count": count, "outputs": _outputs(next(results))}
            found.append(cell)
    book = {"cells": found, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def _outputs(output: run.Output) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if output["text"]:
        found.append({"output_type": "stream", "name": "stdout", "text": output["text"].splitlines(keepends=True)})
    for figure in output["figures"]:
        data = {"image/png": figure["png"], "text/plain": [figure["title"]]}
        found.append({"output_type": "display_data", "metadata": {}, "data": data})
    return found


if __name__ == "__main__":
    sys.path[:0] = [str(run.ROOT), str(run.ROOT / "kernels")]
    COMMITTED.write_text(text(run.outputs([f"tutorial/{chapter}.md" for chapter in CHAPTERS])))
