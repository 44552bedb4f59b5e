"""What the benchmark of label errors takes for the end of a stroke."""

from __future__ import annotations

import numpy as np

from benchmarks.label_errors import Count, near_ends


def stroke():
    labels = np.full((40, 80), 255, np.uint8)
    labels[19:22, 10:70] = 1
    return labels


def test_ends_are_where_the_pen_was_put_down_and_lifted():
    found = near_ends(stroke(), 8)
    columns = np.flatnonzero(found[20])
    assert set(range(10, 16)) | set(range(64, 70)) <= set(columns)
    assert not any(20 <= column < 60 for column in columns)
    assert not found[stroke() == 255].any()


def test_a_dot_is_all_end_and_the_inside_of_a_patch_none():
    labels = np.full((60, 60), 255, np.uint8)
    labels[5:8, 5:8] = 2
    labels[15:55, 15:55] = 0
    found = near_ends(labels, 8)
    assert found[5:8, 5:8].all()
    assert not found[30:40, 30:40].any()


def test_errors_are_counted_where_they_are():
    mask = np.ones((40, 80), np.uint8)
    mask[:, :12] = 0  # the stroke's first two columns lie outside the object
    mask[:, 40] = 255
    count = Count(2)
    count.add(stroke(), mask, 8)
    found = count.summary(("background", "object"))
    assert found["labels"] == 3 * 59
    assert found["right elsewhere"] == 1
    assert found["right"] == 1 - 6 / (3 * 59)
    assert found["right near ends"] < 0.9
