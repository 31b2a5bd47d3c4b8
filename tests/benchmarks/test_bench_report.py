"""The command of the benchmarks, its reports and comparisons, and the README's figures."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import cli, compare, measure, record, report, suite, summary

ROOT = Path(__file__).resolve().parents[2]
MIB = measure.MIB


def made_records() -> list[record.Record]:
    """Two records by hand, a case and a scaling case, with figures that can be worked out."""
    base = {
        "schema": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "a" * 40, "dirty": False, "gate": [], "targets": [],
        "absent": {}, "machine": record.machine(), "versions": {"torch": "2"},
        "settings": {"device": "cpu", "repeats": 3, "title": "The head", "cases": []},
        "limits": {"copy_bytes_per_second": 1e10, "flops_per_second": {"float32": 1e12}},
    }  # fmt: skip
    work = {"flops": 5 * 10**11, "bytes": 10**9, "dtype": "float32"}
    rows = [
        {"case": "one", "provider": name, "seconds": [s] * 3, "peak_bytes": int(s * 100 * MIB), **work}
        for name, s in (("fastpref", 1.0), ("eager", 3.0), ("products", 0.8))
    ]
    curves = [
        {"case": f"{axis} {x}", "provider": name, "seconds": [s * x] * 3, "peak_bytes": x * MIB, **work,
         "axis": axis, "x": x}
        for axis in ("d", "vocab") for x in (64, 128) for name, s in (("fastpref", 0.01), ("eager", 0.04))
    ]  # fmt: skip
    return [base | {"suite": "head-cpu", "rows": rows}, base | {"suite": "scale-cpu", "rows": curves}]


def test_share_of_the_limit_is_the_larger_floor():
    one = made_records()[0]
    assert record.floor(one, one["rows"][0]) == 0.5  # 5e11 FLOPs at 1e12 a second; its bytes take 0.1 s
    assert record.floor(one, one["rows"][0] | {"flops": 0}) == 0.1
    table = record.table(one)
    assert "| % of limit |" in table.splitlines()[0]
    (ours,) = (line for line in table.splitlines() if "| fastpref |" in line)
    assert ours.split(" | ")[5:8] == ["50", "1.25 (1.25)", "3.00 (3.00)"]


def test_report_is_one_page_with_its_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    page = report.write(made_records(), tmp_path).read_text()
    names = {"summary", "roofline", "head-cpu-time", "head-cpu-memory", "scale-cpu-scaling"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert page.count("data:image/png;base64,") == len(names)
    assert "http" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "<td>fastpref</td>" in page
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"({name}.png)" in markdown for name in names)
    assert "head: one  " in report.bars(made_records()) and "3.00x" in report.bars(made_records())


def test_comparison_of_two_records(tmp_path, capsys):
    before, _ = made_records()
    after = before | {"commit": "b" * 40, "rows": [row | {"seconds": [0.5] * 3} for row in before["rows"][:2]]}
    paths = [str(record.write(r, tmp_path / f"{i}.json")) for i, r in enumerate((before, after))]
    assert cli.main(["compare", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| one | fastpref | 1000 | 500 | 2.00x as fast | 100 | 100 |" in lines
    assert "| one | eager | 3000 | 500 | 6.00x as fast | 300 | 300 |" in lines
    assert "fastpref, geometric mean: B is 2.00x as fast." in lines and not any("NOT THE SAME" in x for x in lines)
    other = after | {"machine": after["machine"] | {"cpu": "another"}}
    assert "NOT THE SAME MACHINE" in compare.table(before, other)
    assert compare.find("aaaa", tmp_path)[0]["commit"] == "a" * 40
    assert cli.main(["compare", paths[0], "0000000"]) == 2
    assert "got '0000000', want a record file or a commit" in capsys.readouterr().err


def test_a_folder_may_hold_other_json(tmp_path):
    """`fastpref validate --json` writes rows too, and benchmarks/gpu.sh puts it beside the records."""
    record.write(made_records()[0], tmp_path)
    (tmp_path / "validate.json").write_text('{"rows": [], "failed": 0}')
    assert [one["suite"] for one in record.read_folder(tmp_path)] == ["head-cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "suite: got nonsense, want of head, logits"),
        (["compare", "x"], "compare: got 1 arguments, want two records"),
        (["head", "--providers", "fastpref,lager"], "--providers: got lager, want of cce, eager"),
        (["head", "--only", "nothing"], "--only: got 'nothing', want part of a case's name"),
        (["head", "kl", "--json", "x.json"], "--json: got the file x.json for 2 suites, want a folder"),
    ],
)
def test_command_names_what_it_cannot_take(arguments, message, capsys):
    assert cli.main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_bench_is_a_command_of_fastpref(capsys):
    from fastpref.commands.cli import main

    assert main(["bench", "--list", "--device", "cpu", "--quick"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{listed}" for name in suite.NAMES) and "smollm2 quick, frozen head" in listed


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_one_entry_point(tool, capsys):
    """`python -m benchmarks TOOL` is `python -m benchmarks.TOOL`."""
    with pytest.raises(SystemExit) as found:
        cli.main([tool, "--help"])
    assert found.value.code == 0 and f"benchmarks.{tool}" in capsys.readouterr().out


def test_bench_without_a_checkout_says_where_to_get_one(monkeypatch, tmp_path):
    from fastpref.commands import bench

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="part of the repository, not of the installed package"):
        bench.run(None)


def test_readme_shows_its_record():
    text = report.README.read_text()
    block = summary.block(report.PICTURE)
    assert report.with_block(text, block) == text, "run `python -m benchmarks.report --readme`"
    picture = (ROOT / report.PICTURE).read_bytes()
    assert report.digest(summary.newest(summary.HEAD)).encode() in picture, (
        "drawn from another record: run `python -m benchmarks.report --readme`"
    )


@pytest.mark.parametrize("kind", summary.KINDS)
def test_readme_block_drifts_with_each_of_its_records(kind, monkeypatch, tmp_path):
    before, paths = summary.block(report.PICTURE), {known: summary.newest(known) for known in summary.KINDS}
    found = record.read(paths[kind])
    for row in found["rows"]:
        row["seconds"] = [2 * s for s in row["seconds"]]
    paths[kind] = tmp_path / paths[kind].name
    paths[kind].write_text(json.dumps(found))
    monkeypatch.setattr(summary, "newest", lambda kind, folder=None: paths[kind])
    assert summary.block(report.PICTURE) != before


def test_readme_figures_by_hand():
    """The first row: medians (s) and peaks (MiB) of two providers in the record."""
    found = record.read(summary.newest(summary.HEAD))
    rows = {r["provider"]: r for r in found["rows"] if r["case"] == "smollm2-fp32, trainable head"}
    ours, eager = (statistics.median(rows[name]["seconds"]) for name in ("fastpref", "eager"))
    cells = [f"{ours:.2f} s, {rows['fastpref']['peak_bytes'] / 2**20:,.0f} MiB"]
    cells += [f"{eager:.2f} s, {rows['eager']['peak_bytes'] / 2**20:,.0f} MiB", f"{eager / ours:.2f}"]
    assert f"| eager PyTorch | {' | '.join(cells)} |" in report.README.read_text()


def test_a_readme_without_markers_is_left_alone():
    with pytest.raises(ValueError, match=r"README.md: got no markers"):
        report.with_block("# fastpref", "")
