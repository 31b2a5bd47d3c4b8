"""The table of what a kernel should take: the largest of three floors, beside a record's time for as many rows."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks import roofline

FOUND = {
    "settings": {"sizes": {"rows": 4096, "vocab": 128256}},
    "rows": [
        {"case": "rows", "provider": "forward, as launched", "seconds": [1e-3, 3e-3, 2e-3]},
        {"case": "bandwidth", "provider": "copy", "seconds": [1.0, 2.0, 2.0], "bytes": 6e12},
    ],
}


def test_a_measured_time_is_of_the_same_kernel_and_vocabulary_and_as_many_rows():
    assert roofline.measured(FOUND, "forward", 128256, 8192) == 4e-3  # the median of 4096 rows, twice
    assert roofline.measured(FOUND, "forward + U", 128256, 8192) is None
    assert roofline.measured(FOUND, "forward", 50257, 8192) is None
    assert roofline.measured(None, "forward", 128256, 8192) is None


def test_bandwidth_is_the_records_or_the_data_sheets():
    assert roofline.copy_bandwidth(FOUND) == 3e12
    assert roofline.copy_bandwidth(None) == 3.35e12


def test_the_largest_floor_is_expected_and_what_is_not_measured_is_a_dash():
    rows = [roofline.Row("forward", 32000, 1, 2e-3, 1e-3, 5e-4, None), roofline.Row("U", 9, 3, 1e-3, 4e-3, 0, 5e-3)]
    assert [r.expected for r in rows] == [2e-3, 4e-3]
    lines = roofline.table(rows).splitlines()
    assert lines[2] == "| forward | 32,000 | 1 | 2.000 | 1.000 | 0.500 | 2.000 | - |"
    assert lines[3] == "| U | 9 | 3 | 1.000 | 4.000 | 0.000 | 4.000 | 5.000 |"
