"""The pictures of a report: bars of time and of memory, the roofline, scaling curves, and the summary.

Blue is fastpref, dark grey is eager PyTorch, light grey are the others. Hatched bars are bounds, and no way to compute
it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.limits import Limits
from benchmarks.measure import MIB, quantile
from benchmarks.record import Record, Row

OURS, EAGER, OTHER, ACCENT = "#1f5fbf", "#4b5563", "#aeb4bd", "#d97706"
BOUNDS = ("products", "products_in_place")
NAMES = {
    "fastpref": "fastpref", "eager": "eager PyTorch", "eager_compacted": "eager, scored rows only",
    "eager_compiled": "torch.compile", "trl": "TRL", "trl_compacted": "TRL, scored rows only",
    "liger": "Liger", "liger_cross_entropy": "Liger cross-entropy", "cce": "cut-cross-entropy",
    "torch_linear_cross_entropy": "torch linear_cross_entropy", "torch_cross_entropy": "torch cross_entropy",
    "torch_kl_div": "torch kl_div", "transformers": "transformers (scores all)", "products": "matrix products alone",
    "products_in_place": "matrix products, in place",
}  # fmt: skip
PANELS = 6  # of one picture
TIMES = "\N{MULTIPLICATION SIGN}"


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("fastpref bench: pictures need matplotlib; run `pip install matplotlib`") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130, "savefig.bbox": "tight",
        "hatch.color": "#c3c8cf", "legend.frameon": False,
    })  # fmt: skip
    return plt


def name_of(provider: str) -> str:
    return NAMES.get(provider, provider.replace("fastpref_", "fastpref, plan "))


def colour(provider: str) -> str:
    return OURS if provider == "fastpref" else EAGER if provider == "eager" else OTHER


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def bytes_text(count: float) -> str:
    return f"{count / MIB:,.0f} MiB" if count < 10240 * MIB else f"{count / MIB / 1024:,.1f} GiB"


def _cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def source(found: Record) -> str:
    host = found["machine"]
    where = host["gpu"]["name"] if found["settings"].get("device") == "cuda" else f"{host['cores']}-core {host['cpu']}"
    quick = " · quick: small sizes" if found["settings"].get("quick") else ""
    return f"{where} · {found['date'][:10]} · commit {(found['commit'] or 'unknown')[:8]}{quick}"


def rate_text(flops_per_second: float) -> str:
    giga = flops_per_second / 1e9
    return f"{giga:.3g} GFLOP/s" if giga < 1000 else f"{giga / 1e3:.3g} TFLOP/s"


def _plain_log(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def pages(found: Record) -> list[list[str]]:
    """The record's cases, in groups that fit one picture."""
    cases = list(_cases(found["rows"]))
    return [cases[i : i + PANELS] for i in range(0, len(cases), PANELS)]


class _Look(NamedTuple):
    """What the bars of a picture show."""

    value: Callable[[Row], float | None]
    text: Callable[[Row, Row | None], str]  # (row, eager's row) -> the label of its bar
    mark: Callable[[Any, float, Row], float]  # (axis, y, row): draws on the bar; returns where its label may begin


def _bars(found: Record, look: _Look, title: str, cases: Sequence[str] | None) -> Any:
    """One panel for each case. None where there is nothing to compare."""
    panels = {
        case: [row for row in rows if look.value(row) is not None]
        for case, rows in _cases(found["rows"]).items() if cases is None or case in cases
    }  # fmt: skip
    panels = {case: rows for case, rows in panels.items() if len(rows) > 1}
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = 7.5 * columns, lines * (0.42 * max(map(len, panels.values())) + 0.9) + 0.6
    figure, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=16, fontweight="bold", x=0.01, ha="left")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, case, rows, look)
    figure.text(0.99, -0.01, source(found), ha="right", va="top", fontsize=9, color="#6b7280")
    return figure


def _panel(axis: Any, case: str, rows: Sequence[Row], look: _Look) -> None:
    """One bar for each provider, the smallest on top, with its label."""
    rows = sorted(rows, key=lambda row: -(look.value(row) or 0.0))
    eager = next((row for row in rows if row["provider"] == "eager"), None)
    sizes = [look.value(row) or 0.0 for row in rows]
    largest = max(*sizes, 1e-12)
    end = largest
    for y, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        ours, bound = row["provider"] == "fastpref", row["provider"] in BOUNDS
        style = (
            {"color": "white", "edgecolor": "#9aa1ab", "hatch": "///"} if bound else {"color": colour(row["provider"])}
        )
        axis.barh(y, size, height=0.66, **style)
        at = max(size, look.mark(axis, y, row))
        end = max(end, at)
        axis.text(at + 0.02 * largest, y, look.text(row, eager), va="center", fontsize=11,
                  color=OURS if ours else "#1f2937", fontweight="bold" if ours else "normal")  # fmt: skip
    axis.set_yticks(range(len(rows)), [name_of(row["provider"]) for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        if row["provider"] == "fastpref":
            label.set(color=OURS, fontweight="bold")
    axis.set_xlim(0, end + 0.45 * largest)
    axis.set_title(case)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


def speed(found: Record, cases: Sequence[str] | None = None, title: str | None = None) -> Any:
    """The median time of every provider. The line on a bar goes from p20 to p80."""

    def text(row: Row, eager: Row | None) -> str:
        label = seconds_text(statistics.median(row["seconds"]))
        least = record.floor(found, row)
        parts = []
        ratio = None if eager is None or row is eager else record.ratio(eager, row, "seconds")
        if ratio is not None:
            parts.append(f"{ratio[0]:.1f}{TIMES}")
        if least is not None and row["provider"] not in BOUNDS and least > 0.005 * statistics.median(row["seconds"]):
            parts.append(f"{100 * least / statistics.median(row['seconds']):.0f} % of limit")
        return label + (f"  ({', '.join(parts)})" if parts else "")

    def spread(axis: Any, y: float, row: Row) -> float:
        low, high = (quantile(row["seconds"], q) for q in (0.2, 0.8))
        axis.plot([low, high], [y, y], color="#111827", linewidth=1.2, solid_capstyle="butt")
        return high

    title = title or f"{found['settings'].get('title', found['suite'])}: time, and speed against eager"
    return _bars(found, _Look(lambda row: statistics.median(row["seconds"]), text, spread), title, cases)


def memory(found: Record, cases: Sequence[str] | None = None) -> Any:
    """The peak memory of every provider. The tick is what the formula says."""

    def text(row: Row, eager: Row | None) -> str:
        label = bytes_text(row["peak_bytes"])
        if eager is not None and row is not eager and eager["peak_bytes"]:
            label += f"  ({row['peak_bytes'] / eager['peak_bytes']:.2f}{TIMES})"
        return label

    def formula(axis: Any, y: float, row: Row) -> float:
        predicted = row.get("predicted_bytes") or 0
        if predicted:
            axis.plot([predicted] * 2, [y - 0.33, y + 0.33], color=ACCENT, linewidth=2.5)
        return predicted

    title = f"{found['settings'].get('title', found['suite'])}: peak memory beyond the inputs"
    figure = _bars(found, _Look(lambda row: row.get("peak_bytes"), text, formula), title, cases)
    if figure is not None and any(row.get("predicted_bytes") for row in found["rows"]):
        figure.text(0.01, -0.01, "orange: by formula", va="top", fontsize=10, color=ACCENT)
    return figure


def roofline(records: Sequence[Record]) -> Any:
    """FLOP/s over FLOPs a byte, both of the least work of the task, under this machine's own roof."""
    usable = [r for r in records if r.get("limits")]
    points = [(r, row) for r in usable for row in r["rows"]
              if row.get("flops") and row.get("bytes") and row["provider"] in ("fastpref", "eager", "trl")]  # fmt: skip
    if not points:
        return None
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    limits = Limits(**usable[-1]["limits"])
    copy = limits.copy_bytes_per_second
    intensities = [row["flops"] / row["bytes"] for _, row in points]
    low, high = min(intensities) / 3, max(intensities) * 3
    for dtype in dict.fromkeys(row["dtype"] for _, row in points):
        rate = limits.flops_per_second[dtype]
        knee = rate / copy
        low, high = min(low, knee / 3), max(high, knee * 3)
        roof = [(x, min(rate, x * copy) / 1e9) for x in (low, knee, high)]
        axis.plot(*zip(*roof, strict=True), color="#111827", linewidth=1.6)
        axis.text(high, rate / 1e9 * 1.05, f"matrix products, {dtype}: {rate_text(rate)}", ha="right", va="bottom")
    axis.text(low * 1.5, low * 1.25 * copy / 1e9, f"copying memory: {copy / 1e9:.3g} GB/s", va="top")
    for provider, shade in (("fastpref", OURS), ("eager", EAGER), ("trl", ACCENT)):
        at = [(row["flops"] / row["bytes"], row["flops"] / statistics.median(row["seconds"]) / 1e9)
              for _, row in points if row["provider"] == provider]  # fmt: skip
        if at:
            axis.scatter(*zip(*at, strict=True), s=46, color=shade, label=name_of(provider), alpha=0.85, linewidths=0)
    axis.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte, of the least work that the task takes",
             ylabel="GFLOP/s, of the same work")  # fmt: skip
    _plain_log(axis.xaxis)
    _plain_log(axis.yaxis)
    axis.set_ylim(top=max(limits.flops_per_second.values()) / 1e9 * 1.6)
    axis.set_title("Roofline: the head against this machine's own limits")
    axis.legend(loc="lower left")
    figure.text(0.99, -0.01, source(usable[-1]), ha="right", va="top", fontsize=9, color="#6b7280")
    return figure


AXES = {
    "scored": "scored rows (of 2·B·T)", "vocab": "vocabulary V", "d": "hidden size d", "pairs": "pairs B",
    "seq_len": "sequence length T",
}  # fmt: skip


def scaling(found: Record) -> Any:
    """Time above and peak memory below, with one size in each column. Both axes are logarithmic."""
    rows = [row for row in found["rows"] if row.get("axis") and row["provider"] not in BOUNDS]
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    if not axes_names:
        return None
    plt = pyplot()
    with_memory = any(row.get("peak_bytes") for row in rows)
    lines = 2 if with_memory else 1
    figure, axes = plt.subplots(
        lines, len(axes_names), figsize=(3.7 * len(axes_names) + 1.2, 3.1 * lines + 0.7), squeeze=False, sharey="row",
        sharex="col", layout="constrained",
    )  # fmt: skip
    values: list[Callable[[Row], float | None]] = [
        lambda row: statistics.median(row["seconds"]) * 1e3,
        lambda row: row["peak_bytes"] / MIB if row.get("peak_bytes") else None,
    ]
    shades = {"fastpref": OURS, "eager": EAGER, "trl": ACCENT}
    for column, name in enumerate(axes_names):
        for line in range(lines):
            axis = axes[line][column]
            for provider in dict.fromkeys(row["provider"] for row in rows):
                at = sorted((row["x"], y) for row in rows if row["axis"] == name and row["provider"] == provider
                            and (y := values[line](row)))  # fmt: skip
                if not at:
                    continue
                shade = shades.get(provider, OTHER)
                axis.plot(*zip(*at, strict=True), "o-", color=shade, linewidth=2.2, markersize=5)
                if column == len(axes_names) - 1:
                    axis.annotate(name_of(provider), at[-1], xytext=(8, 0), textcoords="offset points", color=shade,
                                  va="center", fontsize=11, fontweight="bold", annotation_clip=False)  # fmt: skip
            axis.set(xscale="log", yscale="log")
            ticks = sorted({row["x"] for row in rows if row["axis"] == name})
            axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 8192 else str(x) for x in ticks])
            axis.minorticks_off()
            _plain_log(axis.yaxis)
            axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            if line == lines - 1:
                axis.set_xlabel(AXES.get(name, name))
    axes[0][0].set_ylabel("time, ms")
    if with_memory:
        axes[1][0].set_ylabel("peak memory, MiB")
    figure.suptitle(
        "How the head's cost grows: forward + backward of DPO", fontsize=16, fontweight="bold", x=0.01, ha="left"
    )
    figure.text(0.99, -0.01, source(found), ha="right", va="top", fontsize=9, color="#6b7280")
    return figure


def speedups(records: Sequence[Record]) -> list[tuple[str, str, float]]:
    """(suite, case, how many times as fast as eager) of fastpref, wherever both were measured.

    The scaling suite varies the head's case, and is left to its curves.
    """
    found = []
    for one in records:
        for case in _cases([] if one["suite"].startswith("scale") else one["rows"]):
            rows = [record.find(one["rows"], case, name) for name in ("eager", "fastpref")]
            ratio = record.ratio(rows[0], rows[1], "seconds")
            if ratio is not None:
                found.append((one["suite"].split("-")[0], case, ratio[0]))
    return found


def summary(records: Sequence[Record]) -> Any:
    """One bar a case: how many times as fast as eager PyTorch."""
    found = speedups(records)[::-1]
    if not found:
        return None
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9.5, 0.42 * len(found) + 1.5), layout="constrained")
    sizes = [ratio for _, _, ratio in found]
    axis.barh(range(len(found)), sizes, color=[OURS if r >= 1 else OTHER for r in sizes], height=0.66)
    axis.axvline(1, color="#111827", linewidth=1.2, zorder=0.5)
    for y, ratio in enumerate(sizes):
        label = f"{ratio:.1f}{TIMES}" if ratio >= 0.95 else f"{ratio:.2f}{TIMES}"
        axis.text(ratio + 0.02 * max(sizes), y, label, va="center", fontweight="bold", fontsize=11,
                  color=OURS if ratio >= 1 else "#1f2937",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
    axis.set_yticks(range(len(found)), [f"{suite}: {case}" for suite, case, _ in found], fontsize=10.5)
    axis.set_xlim(0, 1.12 * max(*sizes, 1.2))
    axis.set_title("fastpref: how many times as fast as eager PyTorch", fontsize=15)
    axis.set_xticks([1], ["as fast as eager"])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)
    figure.text(0.99, -0.01, source(records[0]), ha="right", va="top", fontsize=9, color="#6b7280")
    return figure


def save(figure: Any, path: Path, **metadata: str) -> Path:
    """As PNG, with `metadata` in its text chunks."""
    figure.savefig(path, metadata=metadata)
    pyplot().close(figure)
    return path
