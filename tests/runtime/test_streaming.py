"""A stream's results come in order, nothing runs far ahead, and stopping early stops it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from wsss_deploy.errors import ImageError, UsageError
from wsss_deploy.streaming import predict_stream


def frames(count):
    for index in range(count):
        yield np.full((8, 8, 3), (index * 7 % 256, 0, 255 - index * 7 % 256), np.uint8)


@pytest.mark.parametrize("batch", [1, 3])
def test_order_and_results(color_segmenter, batch):
    results = list(color_segmenter.predict_stream(frames(20), batch=batch, workers=3))
    assert len(results) == 20
    for frame, result in zip(frames(20), results, strict=True):
        np.testing.assert_array_equal(result.image, frame)
        np.testing.assert_array_equal(result.mask, frame.argmax(2))


def test_slow_items_keep_their_place():
    def predict(part):
        time.sleep(0.02 if part[0] % 3 == 0 else 0)
        return list(part)

    assert list(predict_stream(predict, range(30), 1, 5, 4)) == list(range(30))


def test_the_source_is_not_read_far_ahead():
    taken, running, most = [], [], []
    lock = threading.Lock()

    def source():
        for index in range(50):
            taken.append(index)
            yield index

    def predict(part):
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.002)
        with lock:
            running.pop()
        return list(part)

    for count, _ in enumerate(predict_stream(predict, source(), 2, 3, 2)):
        assert len(taken) <= count + 1 + 2 * 3
    assert max(most) <= 2


def test_an_endless_source_can_be_left():
    started = []

    def predict(part):
        started.append(part)
        return list(part)

    def endless():
        while True:
            yield 1

    stream = predict_stream(predict, endless(), 1, 4, 1)
    assert next(stream) == 1
    stream.close()
    assert len(started) <= 5


def test_an_error_is_raised_in_its_place(color_segmenter):
    good = np.zeros((4, 4, 3), np.uint8)
    stream = color_segmenter.predict_stream([good, good, np.zeros((4, 4, 9), np.uint8), good])
    assert next(stream).mask.shape == next(stream).mask.shape == (4, 4)
    with pytest.raises(ImageError):
        next(stream)
    with pytest.raises(UsageError, match="ahead is 0"):
        color_segmenter.predict_stream([good], ahead=0)
