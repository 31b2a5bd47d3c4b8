"""Files that are written at the end of a run are refused at its beginning."""

import json

import pytest

from fastpref.commands import cli
from fastpref.common.files import check_writable


def test_which_files_can_be_written(tmp_path):
    check_writable("--json", None)
    check_writable("--json", tmp_path / "new" / "folder" / "file.json")
    assert (tmp_path / "new" / "folder").is_dir() and not (tmp_path / "new" / "folder" / "file.json").exists()
    with pytest.raises(ValueError, match=r"--json: got .*, want a file that can be written: it is a folder"):
        check_writable("--json", tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="its folder cannot be made"):
        check_writable("--json", tmp_path / "file" / "x.json")
    check_writable("--json", tmp_path / "file")


LINES = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 2]}
COMMANDS = {
    "validate": ["validate", "--quick", "--json"],
    "evaluate": ["evaluate", "--model", "nowhere", "--data", "DATA", "--json"],
    "plot": ["evaluate", "--model", "nowhere", "--data", "DATA", "--plot"],
    "pairs": ["pairs", "--scores", "DATA", "--output", "pairs.jsonl", "--json"],
    "score": ["score", "--responses", "DATA", "--reward-model", "nowhere", "--output"],
    "generate": ["generate", "--prompts", "DATA", "--model", "nowhere", "--output"],
    "bench": ["bench", "head", "--quick", "--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_cannot_be_written_was_found_after_the_whole_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(LINES) + "\n")
    bad = data / "folder" / "report.json"
    argv = [str(data) if word == "DATA" else word for word in COMMANDS[command]]
    assert cli.main([*argv, str(bad)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{argv[-1]}: got {bad}, want a file that can be written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]
