"""Results in the order of their images while others are still computed, with a bounded number under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from wsss_deploy.errors import ImageError, UsageError
from wsss_deploy.images import ImageSource, load_image
from wsss_deploy.segmentation import Segmentation

_Predict = Callable[[Sequence[ImageSource]], list[Segmentation]]


def predict_stream(
    predict: _Predict, images: Iterable[ImageSource], batch: int, ahead: int, workers: int
) -> Iterator[Segmentation]:
    """See `wsss_deploy.Segmenter.predict_stream`.

    Args:
        predict: `Segmenter.predict_batch`.
        images: Any number of them.
        batch: Images a call.
        ahead: Calls under way or waiting to be taken, at most, beside the one whose results are next.
        workers: Threads.

    Yields:
        The results in the order of the images.

    Raises:
        UsageError: A number is too small.
    """
    for name, value, least in (("batch", batch, 1), ("ahead", ahead, 0), ("workers", workers, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
    return _stream(predict, iter(images), batch, ahead, workers)


def _stream(
    predict: _Predict, source: Iterator[ImageSource], batch: int, ahead: int, workers: int
) -> Iterator[Segmentation]:
    with ThreadPoolExecutor(workers, thread_name_prefix="wsss-predict") as pool:
        pending: deque[Future[_Results]] = deque()
        count, ended = 0, False
        failure: Exception | None = None
        try:
            while pending or not ended:
                full = ended or len(pending) > ahead
                # The last one is kept while the source is asked, so that a slow taker does not leave the workers idle.
                if full or (len(pending) > 1 and pending[0].done()):
                    results, error = pending.popleft().result()
                    yield from results
                    if error is not None:
                        raise error
                    continue
                part, failure = _read(source, batch, count)
                ended = len(part) < batch
                if part:
                    pending.append(pool.submit(_predict, predict, part, count))
                    count += len(part)
            if failure is not None:
                raise failure
        finally:  # also when the caller stops early: what has not begun never does
            for future in pending:
                future.cancel()


class _Results(NamedTuple):
    """Those of a batch up to its first image that cannot be used, and that one's error."""

    done: list[Segmentation]
    error: ImageError | None


def _read(source: Iterator[ImageSource], most: int, before: int) -> tuple[list[ImageSource], Exception | None]:
    """The next images, and what stopped the source before there were as many."""
    part: list[ImageSource] = []
    try:
        for image in islice(source, most):
            try:
                part.append(_kept(image))
            except ImageError as error:
                raise _placed(error, before + len(part)) from error
    except Exception as error:  # the source may raise anything; it is raised again after the results before it
        return part, error
    return part, None


def _kept(image: ImageSource) -> ImageSource:
    """The image as it is now: a source may put its next frame into the same buffer, or close the file."""
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    return image if isinstance(image, str | os.PathLike | bytes) else load_image(image)


def _predict(predict: _Predict, part: Sequence[ImageSource], before: int) -> _Results:
    try:
        return _Results(predict(part), None)
    except ImageError as error:
        if len(part) == 1:
            return _Results([], _placed(error, before))
    done: list[Segmentation] = []  # one by one: the images before the bad one have results
    for index, image in enumerate(part):
        try:
            done += predict([image])
        except ImageError as error:
            return _Results(done, _placed(error, before + index))
    return _Results(done, None)


def _placed(error: ImageError, index: int) -> ImageError:
    return ImageError(f"image {index + 1} of the stream: {error}")
