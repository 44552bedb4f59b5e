"""A stream's results come in order, nothing runs far ahead, and stopping early stops it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

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
        time.sleep(0.02 if int(part[0]) % 3 == 0 else 0)
        return list(part)

    names = [str(index) for index in range(30)]
    assert list(predict_stream(predict, names, 1, 5, 4)) == names


def test_the_source_is_not_read_far_ahead():
    taken, running, most = [], [], []
    lock = threading.Lock()

    def source():
        for index in range(50):
            taken.append(index)
            yield str(index)

    def predict(part):
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.002)
        with lock:
            running.pop()
        return list(part)

    for count, _ in enumerate(predict_stream(predict, source(), 2, 3, 2)):
        assert len(taken) <= count + 2 + 2 * 3
    assert max(most) <= 2


def test_an_endless_source_can_be_left():
    started = []

    def predict(part):
        started.append(part)
        return list(part)

    def endless():
        while True:
            yield "frame"

    stream = predict_stream(predict, endless(), 1, 4, 1)
    assert next(stream) == "frame"
    stream.close()
    assert len(started) <= 6


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["array", "tensor", "bytes", "PIL"])
def test_a_source_may_reuse_its_buffer(color_segmenter, tmp_path, batch, kind):
    expected = list(frames(9))
    Image.fromarray(expected[0]).save(
        tmp_path / "all.tiff", save_all=True, append_images=map(Image.fromarray, expected[1:])
    )

    def reused():
        buffer = np.zeros((8, 8, 3), np.uint8)
        with Image.open(tmp_path / "all.tiff") as animation:
            for index, frame in enumerate(expected):
                buffer[...] = frame
                if kind == "tensor":
                    yield pytest.importorskip("torch").from_numpy(buffer.transpose(2, 0, 1))
                elif kind == "bytes":
                    Image.fromarray(frame).save(tmp_path / "frame.ppm")
                    yield bytearray((tmp_path / "frame.ppm").read_bytes())
                elif kind == "PIL":
                    animation.seek(index)
                    yield animation
                else:
                    yield buffer

    results = list(color_segmenter.predict_stream(reused(), batch=batch, workers=1))
    np.testing.assert_array_equal([result.image for result in results], expected)


def test_a_result_is_given_before_the_next_image_is_asked_for(color_segmenter):
    given = []

    def answering():
        for index, frame in enumerate(frames(5)):
            assert len(given) == index, "the source waits for the answer to its last image"
            yield frame

    for result in color_segmenter.predict_stream(answering(), ahead=0):
        given.append(result)
    assert len(given) == 5


def test_a_slow_source_does_not_hold_results_back():
    asked = []

    def slow():
        for index in range(6):
            asked.append(index)
            time.sleep(0.05)
            yield str(index)

    for index, _ in enumerate(predict_stream(list, slow(), 1, 4, 2)):
        assert len(asked) <= index + 2


def take(results, done):
    for result in results:
        done.append(result)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_error_of_the_source_comes_after_the_results_before_it(color_segmenter, batch):
    def failing():
        yield from frames(3)
        raise RuntimeError("camera unplugged")

    done = []
    with pytest.raises(RuntimeError, match="camera unplugged"):
        take(color_segmenter.predict_stream(failing(), batch=batch), done)
    assert len(done) == 3


@pytest.mark.parametrize("batch", [1, 4, 9])
@pytest.mark.parametrize("bad", ["absent.png", np.zeros((4, 4, 9), np.uint8)])
def test_an_error_is_raised_in_its_place(color_segmenter, batch, bad):
    good = np.zeros((4, 4, 3), np.uint8)
    done = []
    with pytest.raises(ImageError, match=r"^image 7 of the stream: .*(no such|found no image layout)"):
        take(color_segmenter.predict_stream([good] * 6 + [bad] + [good] * 5, batch=batch), done)
    assert len(done) == 6


def test_numbers_that_are_too_small(color_segmenter):
    for wrong, least in (({"ahead": -1}, 0), ({"batch": 0}, 1), ({"workers": 0}, 1)):
        with pytest.raises(UsageError, match=f"expected at least {least}"):
            color_segmenter.predict_stream([], **wrong)


@pytest.mark.parametrize("method", ["predict_stream", "predict_batch", "predict_masks"])
def test_one_image_is_not_taken_for_many(color_segmenter, tmp_path, method):
    image = np.zeros((4, 5, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    torch = pytest.importorskip("torch")
    call = getattr(color_segmenter, method)
    with (tmp_path / "a.png").open("rb") as file:
        for one in (
            *(image, image[..., 0], torch.from_numpy(image), Image.fromarray(image), file),
            *("photo.jpg", tmp_path / "a.png", (tmp_path / "a.png").read_bytes()),
        ):
            with pytest.raises(UsageError, match=f"{method} takes several images, found one .*use predict"):
                call(one)
    column = np.array([str(tmp_path / "a.png")] * 2, object)
    for several in (np.stack([image] * 2), [image] * 2, column):
        assert len(list(call(several))) == 2
