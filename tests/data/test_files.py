"""Records from every kind of file, and errors that say which file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpref.data.files import load_records

datasets = pytest.importorskip("datasets", reason="needs `pip install 'fastpref[train]'`")

RECORDS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def write(file: Path, records: list = RECORDS) -> Path:
    data = datasets.Dataset.from_list(records)
    match file.suffix:
        case ".jsonl":
            file.write_text("\n".join(map(json.dumps, records)))
        case ".json":
            file.write_text(json.dumps(records, indent=1))
        case ".parquet":
            data.to_parquet(str(file))
        case ".csv":
            data.to_csv(str(file))
        case "":
            data.save_to_disk(str(file))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "saved", "odd [1] *.jsonl"])
def test_one_source(tmp_path, name) -> None:
    found = load_records(write(tmp_path / name))
    assert found.to_list() == RECORDS
    assert found.cache_files  # memory-mapped, so that what is made of it is kept too
    assert load_records(str(tmp_path / name), "train[80%:]").to_list() == RECORDS[8:]


def test_json_may_have_a_record_a_line_and_blank_lines(tmp_path) -> None:
    (tmp_path / "a.json").write_text("\n" + LINES.replace("\n", "\n\n"))
    assert load_records(tmp_path / "a.json").to_list() == RECORDS


def test_a_changed_file_is_read_anew(tmp_path) -> None:
    load_records(write(tmp_path / "a.jsonl"))
    assert load_records(write(tmp_path / "a.jsonl", RECORDS[:3])).to_list() == RECORDS[:3]


def test_several_sources_follow_each_other(tmp_path) -> None:
    files = [write(tmp_path / "b.jsonl", RECORDS[5:]), write(tmp_path / "a.parquet", RECORDS[:5])]
    assert load_records(files).to_list() == RECORDS[5:] + RECORDS[:5]
    assert load_records(files, "train[4:6]").to_list() == [RECORDS[9], RECORDS[0]]
    write(tmp_path / "c.jsonl", [{"prompt": 3}])
    with pytest.raises(ValueError, match=r"a\.parquet, .*c\.jsonl: got columns of different types"):
        load_records([files[1], tmp_path / "c.jsonl"])


def test_a_folder_of_files(tmp_path) -> None:
    write(tmp_path / "2.jsonl", RECORDS[5:])
    write(tmp_path / "1.json", RECORDS[:5])
    (tmp_path / "README.md").write_text("no data")
    assert load_records(tmp_path).to_list() == RECORDS
    with pytest.raises(ValueError, match=r"split: got 'test', want one of which .* has files: test\.jsonl"):
        load_records(tmp_path, "test")


def test_splits_of_a_folder_of_files(tmp_path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", RECORDS[:4])
    write(tmp_path / "train-00001-of-00002.parquet", RECORDS[4:8])
    write(tmp_path / "test.jsonl", RECORDS[8:])
    write(tmp_path / "trainer.jsonl", RECORDS[:1])
    assert load_records(tmp_path).to_list() == RECORDS[:8]
    assert load_records(tmp_path, "train[:25%]").to_list() == RECORDS[:2]
    assert load_records(tmp_path, "test").to_list() == RECORDS[8:]


def test_splits_of_a_saved_folder(tmp_path) -> None:
    train, test = (datasets.Dataset.from_list(part) for part in (RECORDS[:8], RECORDS[8:]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    assert load_records(tmp_path / "both").to_list() == RECORDS[:8]
    assert load_records(tmp_path / "both", "test[1:]").to_list() == RECORDS[9:]
    with pytest.raises(ValueError, match=r"split: got 'eval', want one of .*both's: train, test"):
        load_records(tmp_path / "both", "eval")
    datasets.DatasetDict({"prefs": test}).save_to_disk(str(tmp_path / "one"))
    assert load_records(tmp_path / "one").to_list() == RECORDS[8:]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", LINES + '{"prompt": \n', r"a\.jsonl, line 11: not JSON: Expecting value at column"),
        ("a.json", '{"a": 1}\n[3]\n', r"a\.json, line 2: got list, want an object"),
        ("a.json", '[{"a": 1},\n {"a"\n', r"a\.json, line 3: not JSON: Expecting ':' delimiter"),
        ("a.json", "[]", r"a\.json: got no records, want at least 1"),
        ("a.jsonl", "", r"a\.jsonl: got no records, want at least 1"),
        ("a.jsonl", "\n\n", r"a\.jsonl: got no records, want at least 1"),
        ("a.parquet", "PAR1 cut off", r"a\.parquet: "),
        ("a.txt", "text", r"a\.txt: got '\.txt', want one of \.jsonl, \.json, \.parquet, \.csv"),
        ("dataset_dict.json", "{", r": "),
    ],
)
def test_damaged_files(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path if name == "dataset_dict.json" else tmp_path / name)


def test_a_saved_folder_that_was_cut_off(tmp_path) -> None:
    folder = write(tmp_path / "saved")
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-300])
    with pytest.raises(ValueError, match="saved: "):
        load_records(folder).to_list()


def test_wrong_arguments(tmp_path) -> None:
    file = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"path: got no files, want at least 1"):
        load_records([])
    with pytest.raises(ValueError, match=r"split: got 'test' with a single file, .*a\.jsonl, want 'train'"):
        load_records(file, "test")
    with pytest.raises(ValueError, match=r"split: got 'train\[90%\]', want a name, or a part"):
        load_records(file, "train[90%]")
    with pytest.raises(ValueError, match=r"split: got 'train\[10:\]', which is no record of 10"):
        load_records(file, "train[10:]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: got no files to read, want \.jsonl, "):
        load_records(tmp_path / "empty")
