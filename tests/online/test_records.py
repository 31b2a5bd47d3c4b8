"""Files that grow by whole records: whatever a crash leaves, the finished file is the same."""

from __future__ import annotations

import json

import pytest

from fastpref.online.records import Journal, read_records, sidecar, write_json, write_records

RECORDS = [{"text": "één\u2028 line\r\n"}, {"n": 1, "nested": {"a": [1.5, None]}}, {"half": "\ud800"}, {}]
SETTINGS = {"k": 4, "model": "abc"}


def whole(path) -> bytes:
    journal = Journal(path, len(RECORDS), SETTINGS)
    journal.append(RECORDS)
    return path.read_bytes()


def test_records_come_back(tmp_path) -> None:
    whole(tmp_path / "a.jsonl")
    write_records(tmp_path / "b.jsonl", RECORDS)
    assert read_records(tmp_path / "a.jsonl") == read_records(tmp_path / "b.jsonl") == RECORDS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.meta.json", "b.jsonl"]


def test_half_of_a_surrogate_pair_was_no_report(tmp_path) -> None:
    """A server may answer with one, and a judge's report shows answers."""
    write_json(tmp_path / "report.json", RECORDS)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == RECORDS


def test_a_file_torn_at_any_byte_is_continued_to_the_same(tmp_path, capsys) -> None:
    path = tmp_path / "out.jsonl"
    wanted = whole(path)
    for size in range(len(wanted)):
        for rest in (b"", b"\0\0", b"\0\n"):  # pages that a power cut left unwritten
            path.write_bytes(wanted[:size] + rest)
            journal = Journal(path, len(RECORDS), SETTINGS)
            assert journal.done == wanted[:size].count(b"\n") and not journal.finished
            assert path.read_bytes() == b"".join(wanted.splitlines(keepends=True)[: journal.done])
            journal.append(RECORDS[journal.done :])
            assert path.read_bytes() == wanted and journal.finished
    assert "cut off 3 bytes of an unfinished record" in capsys.readouterr().err


def test_a_damaged_record_before_whole_ones_is_an_error(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    lines = whole(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"n": \n' + lines[2] + lines[3])
    with pytest.raises(ValueError, match="line 2: damaged, and whole records follow it"):
        Journal(path, len(RECORDS), SETTINGS)
    with pytest.raises(ValueError, match=r"line 2: got b'.*', want a JSON object"):
        read_records(path)


def test_other_settings_are_refused_and_named(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    whole(path)
    with pytest.raises(ValueError) as caught:
        Journal(path, 9, {"k": 8, "model": "abc"})
    assert str(caught.value) == (
        f"{path}: got k 8, records 9, want k 4, records 4 as it was begun with; or a new name, or --overwrite"
    )
    assert Journal(path, 9, {"k": 8}, overwrite=True).done == 0
    assert not path.exists() and json.loads(sidecar(path).read_text())["settings"] == {"k": 8}


def test_a_file_of_someone_else_is_left_alone(tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"got a file without mine\.jsonl\.meta\.json"):
        Journal(path, 4, SETTINGS)
    assert path.read_text() == "{}\n"


def test_two_writers_do_not_mix(tmp_path) -> None:
    one, two = (Journal(tmp_path / "out.jsonl", 4, SETTINGS) for _ in range(2))
    one.append(RECORDS[:1])
    with pytest.raises(RuntimeError, match="where this process left 0"):
        two.append(RECORDS[:1])


def test_nan_never_reaches_a_file(tmp_path) -> None:
    journal = Journal(tmp_path / "out.jsonl", 4, SETTINGS)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append([{"x": 1.0}, {"x": float("nan")}])
    assert journal.done == 0 and not (tmp_path / "out.jsonl").exists()


def test_reading_says_what_is_missing(tmp_path, capsys) -> None:
    path = tmp_path / "out.jsonl"
    Journal(path, 4, SETTINGS).append(RECORDS[:3])
    assert len(read_records(path)) == 3
    assert capsys.readouterr().err == f"{path}: unfinished, 3 of 4 records\n"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="got no records, want at least 1"):
        read_records(tmp_path / "empty.jsonl")
