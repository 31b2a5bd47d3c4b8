"""Runs the Python blocks of the documentation: a process a page, block after block, sharing their names.

    python docs/tools/run.py                    every page; exit status 1 if a block fails
    python docs/tools/run.py tutorial/dpo.md    these, printing what they print

What a page's blocks print and draw goes to build/docs/runs/ under a fingerprint of the page and of all sources, from
where the site and the notebook take it: the same page is not run twice on the same code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUNS = ROOT / "build" / "docs" / "runs"
SOURCES = ("fastpref", "kernels", "benchmarks/long_context.py", "benchmarks/results/training",
           "benchmarks/results/rlhf", "docs/tools/run.py", "docs/tools/figures.mplstyle",
           "constraints.txt")  # fmt: skip
SUFFIXES = (".py", ".json", ".jsonl")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

Output = dict[str, Any]  # text, figures: [{"title", "svg", "png" (base64)}]


def pages() -> list[str]:
    """Every page with a Python block, as a path below docs/."""
    found = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    return [page for page in found if BLOCK.search((DOCS / page).read_text())]


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line in the page, source) of each."""
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1]


def fingerprint() -> str:
    """Of all that a page's results depend on, but for the page."""
    digest = hashlib.sha256(sys.version.encode())
    for source in SOURCES:
        path = ROOT / source
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def outputs(wanted: Sequence[str] | None = None) -> dict[str, list[Output]]:
    """Page -> what each of its blocks gave.

    Raises:
        SystemExit: names the page, the line and the error of every block that failed.
    """
    known = fingerprint()
    results: dict[str, list[Output]] = {}
    failures = []
    for page in pages() if wanted is None else wanted:
        record = _record(page, known)
        if not record.is_file():
            _in_a_process_of_its_own(page, record)
        found = json.loads(record.read_text())
        if isinstance(found, str):
            record.unlink()
            failures.append(f"docs/{page}:\n{found}")
        else:
            results[page] = found
    if failures:
        raise SystemExit("\n\n".join(failures))
    return results


def _record(page: str, known: str) -> Path:
    text = (DOCS / page).read_text()
    return RUNS / f"{hashlib.sha256((known + page + text).encode()).hexdigest()[:24]}.json"


def _in_a_process_of_its_own(page: str, record: Path) -> None:
    """Forked from one that has imported what most pages import, and has computed nothing."""
    import_once()
    record.parent.mkdir(parents=True, exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(page, record))
    child.start()
    child.join()
    if not record.is_file():
        record.write_text(json.dumps(f"the process ended with status {child.exitcode}"))


def import_once() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import torch
    import transformers

    import fastpref.trainers

    torch.set_num_threads(1)
    transformers.PrinterCallback.on_log = lambda *args, **kwargs: None  # pages draw their logs
    _ = matplotlib.pyplot, fastpref.trainers


def _run(page: str, record: Path) -> None:
    sys.stderr.flush()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.environ["XDG_CACHE_HOME"] = folder
            with open("stderr", "w") as stderr:
                os.dup2(stderr.fileno(), 2)
                found: Any = _execute(page)
    except BaseException as error:
        found = _where(error, page)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(record)


def _execute(page: str) -> list[Output]:
    import matplotlib.pyplot as plt
    import torch

    plt.style.use(DOCS / "tools" / "figures.mplstyle")
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for line, source in blocks((DOCS / page).read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + source, f"docs/{page}", "exec"), scope)
        found.append({"text": printed.getvalue(), "figures": [_drawn(plt.figure(n)) for n in plt.get_fignums()]})
        plt.close("all")
    return found


def _drawn(figure: Any) -> dict[str, str]:
    """The same bytes every time, on a transparent ground."""
    import base64

    import matplotlib

    title = figure.get_suptitle() or " and ".join(filter(None, (axes.get_title() for axes in figure.axes)))
    if not title:
        raise ValueError("a figure without a title, which is what a reader who cannot see it gets")
    matplotlib.rcParams["svg.hashsalt"] = "fastpref"
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=80, facecolor="white")
    return {"title": title, "svg": svg.getvalue(), "png": base64.b64encode(png.getvalue()).decode()}


def _where(error: BaseException, page: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == f"docs/{page}"]
    line = f"line {frames[-1].lineno}: " if frames else ""
    return f"{line}{type(error).__name__}: {error}"


def main(wanted: Sequence[str]) -> None:
    found = outputs(wanted or None)
    for page, results in found.items():
        print(f"{page}: {len(results)} blocks, {sum(len(r['figures']) for r in results)} figures")
        if wanted:
            print("\n".join(r["text"] for r in results if r["text"]))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main(sys.argv[1:])
