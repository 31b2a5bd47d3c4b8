"""What MkDocs does besides rendering Markdown: formulas, what the blocks gave, and the generated pages."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "tools"))  # MkDocs takes it away again when this file is loaded

import generated  # noqa: E402
import notebook  # noqa: E402
import run  # noqa: E402

_outputs: dict[str, list[run.Output]] = {}

# how arithmatex hands formulas over
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Runs every page's blocks; pages made of the code, and the notebook, join those that are written."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    _outputs.update(run.outputs())
    for path, text in generated.pages().items():
        files.append(File.generated(config, path, content=text))
    for path, picture in generated.pictures().items():
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    files.append(File.generated(config, notebook.PATH, content=notebook.text(_outputs)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Below each block what it printed and drew."""
    results = iter(_outputs.get(page.file.src_uri, []))
    return run.BLOCK.sub(lambda block: block[0] + _shown(next(results)), markdown) if _outputs else markdown


def _shown(output: run.Output) -> str:
    shown = ""
    if output["text"].strip():
        shown += f"\n\n```{{.text .output}}\n{output['text'].rstrip()}\n```\n"
    for figure in output["figures"]:
        svg = re.sub(r"^.*?(?=<svg)", "", figure["svg"], flags=re.DOTALL)
        title = html.escape(figure["title"], quote=True)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
        shown += f'\n\n<div class="figure">{" ".join(svg.split())}</div>\n'
    return shown


def on_page_content(content: str, **_: Any) -> str:
    content = DISPLAY.sub(lambda found: _formula(found[1], "block"), content)
    return INLINE.sub(lambda found: _formula(found[1], "inline"), content)


def _formula(latex: str, display: str) -> str:
    spaced = re.sub(r"\\log\b", r"\\,\\log\\,", html.unescape(latex))
    return convert(spaced, display=display)
