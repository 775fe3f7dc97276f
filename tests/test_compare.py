"""Two tables of a benchmark beside each other: what is slower or gone is told, and by the exit code too."""

from __future__ import annotations

import csv

import pytest

from compare import main

OLD = [("digits", "mlp", "1.0"), ("digits", "mlp", "3.0"), ("digits", "mlp", "1.1"), ("digits", "fno", "2.0")]


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("instance", "head", "tflop_equivalents"))
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("new", "code", "told"),
    [
        (OLD, 0, ["  1.000", "median ratio 1.000"]),
        ([("digits", "mlp", "1.12"), ("digits", "fno", "1.0")], 0, ["  1.018", "  0.500"]),  # the median was 1.1
        ([("digits", "mlp", "1.2"), ("digits", "fno", "2.0")], 1, ["  1.091", "mlp  SLOWER"]),
        ([("digits", "mlp", "1.1")], 1, ["fno  GONE"]),
        ([("digits", "mlp", "1.1"), ("digits", "fno", "")], 1, ["fno  GONE"]),  # it has a note, and no number
        ([*OLD, ("iris", "fno", "9.0")], 0, ["iris  fno  (new)"]),
    ],
)
def test_ratios_and_exit_code(tmp_path, capsys, new, code, told):
    assert main([table(tmp_path / "old.csv", OLD), table(tmp_path / "new.csv", new)]) == code
    printed = capsys.readouterr().out
    assert all(text in printed for text in told)


def test_threshold_and_other_columns(tmp_path, capsys):
    old, new = table(tmp_path / "old.csv", OLD), table(tmp_path / "new.csv", [(a, b, "2.2") for a, b, _ in OLD])
    assert main([old, new, "--threshold", "2.5"]) == 0
    with pytest.raises(SystemExit):
        main([old, new, "--column", "seconds"])
    assert "not both files have the column seconds" in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "old.csv"), str(tmp_path / "new.csv")])
    assert stop.value.code == 2
    assert "there is no file" in capsys.readouterr().err
