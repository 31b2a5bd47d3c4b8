"""A report of records: Markdown, PNGs, and one HTML page that needs nothing beside it.

python -m benchmarks.report FOLDER [--out DIR]    of every record in FOLDER (default: benchmarks/results)
python -m benchmarks.report --readme              writes the README's measured block anew, from its record
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, plots, record, summary
from benchmarks.record import Record

README = record.ROOT / "README.md"
BEGIN, END = "<!-- measured: begin (python -m benchmarks.report --readme) -->", "<!-- measured: end -->"
PICTURE = "benchmarks/results/head-cpu.png"
SOURCE_KEY, HASH_KEY = "Source", "Comment"  # PNG text chunks: which record, and its hash

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } img { max-width: 100%; margin: 1em 0 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { text-align: right; padding: 3px 9px; border-bottom: 1px solid #e5e7eb; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
tr.ours { color: #1f5fbf; font-weight: 600 } ul { font-size: 14px } p { max-width: 75ch }
"""


def _figures(records: Sequence[Record]) -> Iterator[tuple[str, str, Any]]:
    """(suite or "", file name, figure) of everything that can be drawn."""
    yield "", "summary", plots.summary(records)
    yield "", "roofline", plots.roofline(records)
    for one in records:
        if any(row.get("axis") for row in one["rows"]):
            yield one["suite"], f"{one['suite']}-scaling", plots.scaling(one)
            continue
        for i, cases in enumerate(plots.pages(one)):
            page = f"-{i + 1}" if i else ""
            yield one["suite"], f"{one['suite']}-time{page}", plots.speed(one, cases)
            yield one["suite"], f"{one['suite']}-memory{page}", plots.memory(one, cases)


def _html_table(lines: Sequence[str]) -> str:
    def cells(line: str, tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in line.strip("|").split("|"))

    rows = [f"<tr>{cells(lines[0], 'th')}</tr>"]
    for line in lines[2:]:
        ours = line.split("|")[2].strip().startswith("fastpref") if line.count("|") > 2 else False
        rows.append(f"<tr{' class=ours' if ours else ''}>{cells(line, 'td')}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _html_of(markdown: str) -> str:
    """HTML of the Markdown that `record.table` writes: tables, lists and paragraphs."""
    blocks = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            blocks.append(_html_table(lines))
        elif lines[0].startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            blocks.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(blocks)


def write(records: Sequence[Record], folder: Path) -> Path:
    """Writes report.md, report.html and the PNGs into `folder`. Returns the page.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Path]] = {}
    for suite, name, figure in _figures(records):
        if figure is not None:
            pictures.setdefault(suite, []).append(plots.save(figure, folder / f"{name}.png"))
    markdown, page = ["# fastpref: benchmark report"], []
    sections = [("", "", "")] + [(r["suite"], r["settings"].get("title", r["suite"]), record.table(r)) for r in records]
    for suite, title, table in sections:
        images = pictures.get(suite, [])
        markdown += [f"## {suite}: {title}"] if suite else []
        markdown += [f"![{path.stem}]({path.name})" for path in images] + ([table] if table else [])
        page.append(f"<h2>{html.escape(suite)}: {html.escape(title)}</h2>" if suite else "")
        page += [f'<img alt="{path.stem}" src="data:image/png;base64,{_base64(path)}">' for path in images]
        page.append(_html_of(table) if table else "")
    (folder / "report.md").write_text("\n\n".join(markdown) + "\n")
    path = folder / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>fastpref benchmarks</title><style>{STYLE}</style>"
    path.write_text(f"{head}<h1>fastpref: benchmark report</h1>" + "\n".join(page) + "\n")
    return path


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def bars(records: Sequence[Record], width: int = 40) -> str:
    """The summary as text, for a terminal."""
    found = plots.speedups(records)
    if not found:
        return ""
    labels = [f"{suite}: {case}" for suite, case, _ in found]
    pad, largest = max(map(len, labels)), max(ratio for *_, ratio in found)
    lines = ["How many times as fast as eager PyTorch:"]
    for label, (*_, ratio) in zip(labels, found, strict=True):
        lines.append(f"  {label:<{pad}}  {'█' * max(1, round(width * ratio / largest))} {ratio:.2f}x")
    return "\n".join(lines)


HEAD_ROWS = {
    "fastpref": "fastpref",
    "products": "its matrix products alone, full size",
    "eager": "eager `log_softmax` + gather, all rows as models do",
    "eager_compacted": "eager on the scored rows only",
    "liger": "Liger {liger}'s fused DPO, compiled (no reference)",
    "trl": "TRL {trl}'s fused head, as it runs on a CPU",
    "trl_compacted": "TRL {trl}'s fused head on the scored rows",
    "torch_linear_cross_entropy": "torch {torch}'s chunked `linear_cross_entropy`, scored rows",
}


def head_table(path: Path) -> str:
    """A record of the head with all who were measured: where it comes from, the table, what was missed."""
    found = record.read(path)
    case = found["settings"]["cases"][0]
    tables = {head: f"{case['name']}, {head} head" for head in ("trainable", "frozen")}
    rows = 2 * case["pairs"] * case["seq_len"]
    lines = [
        f"One DPO step at the head of SmolLM2-135M (d = {case['d']}, V = {case['vocab']:,}, fp32): {case['pairs']} "
        f"pairs of {case['seq_len']} tokens, {case['scored']:,} of {rows:,} rows scored, forward and backward; medians "
        f"of {found['settings']['repeats']} interleaved rounds after a check of every gradient against fp64, peak "
        f"memory beyond the inputs ({plots.source(found)}; `{path.relative_to(record.ROOT)}`):",
        "",
        "| | in the record | trainable head | peak | frozen head | peak |",
        "|---|---|---|---|---|---|",
    ]
    versions = {"liger": found["versions"]["liger-kernel"], "trl": found["versions"]["trl"]}
    versions["torch"] = found["versions"]["torch"].partition("+")[0]
    for provider, text in HEAD_ROWS.items():
        rows = [record.find(found["rows"], label, provider) for label in tables.values()]
        if None in rows:
            continue
        cells = [
            f"{statistics.median(r['seconds']):.2f} s | {r['peak_bytes'] / record.MIB:,.0f} MiB" for r in rows if r
        ]
        lines.append(f"| {text.format(**versions)} | `{provider}` | {' | '.join(cells)} |")
    for target in found["targets"]:
        if target["value"] is not None and not target["met"]:
            lines += ["", f"Target missed: {target['case']}, {target['quantity']} is {target['value']:.2f}, wanted "
                          f"{'at most' if target['at_most'] else 'at least'} {target['limit']}."]  # fmt: skip
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """The README's text with the block between its markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md: got no markers, want a line {BEGIN!r} and a line {END!r}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_readme() -> Path:
    path = summary.newest(summary.HEAD)
    found = record.read(path)
    cases = [f"{found['settings']['cases'][0]['name']}, {head} head" for head in ("trainable", "frozen")]
    figure = plots.speed(found, cases, "A DPO step at the head of SmolLM2-135M, forward + backward, fp32 on a CPU")
    plots.save(figure, record.ROOT / PICTURE, **{SOURCE_KEY: path.name, HASH_KEY: digest(path)})
    README.write_text(with_block(README.read_text(), summary.block(PICTURE)))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=compare.RESULTS, help="with records")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="where the report goes")
    parser.add_argument("--readme", action="store_true", help="write the README's measured block anew")
    args = parser.parse_args(argv)
    try:
        if args.readme:
            print(f"README.md and {PICTURE} now show {write_readme().name}")
            return 0
        records = record.read_folder(args.folder)
        if not records:
            raise ValueError(f"report: got {args.folder}, want a folder with records")
        print(f"written to {write(records, args.out)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
