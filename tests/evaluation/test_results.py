"""Results files: what a kill leaves is resumed, and other settings are refused."""

import json

import pytest

from draft_opd_trl.decoding.acceptance import AcceptanceReport
from draft_opd_trl.evaluation.results import ResultsFile


def _report(tokens):
    return AcceptanceReport(3, [list(range(tokens))], [[0] * (tokens - 1)], [True], 0.5, 0.1, 0.3)


def test_texts_come_back_as_they_were(tmp_path):
    file = tmp_path / "new" / "texts.jsonl"
    results = ResultsFile(file, {"temperature": 0.0, "stops": (1, 2)})
    results.append(4, _report(3))
    results.append(0, _report(5))
    again = ResultsFile(file, {"temperature": 0.0, "stops": (1, 2)})
    assert again.done == results.done == {4: _report(3), 0: _report(5)}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"temperature": 0.0, "stops": [1, 2]}
    assert lines[1]["prompt"] == 4 and lines[1]["completion"] == [0, 1, 2] and lines[1]["accepted"] == [0, 0]


@pytest.mark.parametrize("left", [1, 30])
def test_half_a_line_is_dropped(tmp_path, left):
    file = tmp_path / "texts.jsonl"
    results = ResultsFile(file, {"seed": 0})
    results.append(0, _report(3))
    whole = file.read_text()
    results.append(1, _report(4))
    file.write_text(file.read_text()[: len(whole) + left])
    again = ResultsFile(file, {"seed": 0})
    assert list(again.done) == [0] and file.read_text() == whole
    again.append(1, _report(4))
    assert ResultsFile(file, {"seed": 0}).done == {0: _report(3), 1: _report(4)}


def test_other_settings_are_refused_by_name(tmp_path):
    file = tmp_path / "texts.jsonl"
    ResultsFile(file, {"temperature": 0.0, "seed": 0}).append(0, _report(3))
    before = file.read_text()
    with pytest.raises(ValueError, match=r"other settings: temperature was 0\.0 and is 1\.0\. Choose another output"):
        ResultsFile(file, {"temperature": 1.0, "seed": 0})
    assert file.read_text() == before


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = ResultsFile(None, {})
    results.append(0, _report(3))
    assert list(results.done) == [0] and list(tmp_path.iterdir()) == []
