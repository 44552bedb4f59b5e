"""Results in the order of their images while others are still computed, with a bounded number under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from wsss_deploy.errors import UsageError
from wsss_deploy.images import ImageSource
from wsss_deploy.segmentation import Segmentation


def predict_stream(
    predict: Callable[[Sequence[ImageSource]], list[Segmentation]],
    images: Iterable[ImageSource],
    batch: int,
    ahead: int,
    workers: int,
) -> Iterator[Segmentation]:
    """See `wsss_deploy.Segmenter.predict_stream`.

    Args:
        predict: `Segmenter.predict_batch`.
        images: Any number of them.
        batch: Images a call.
        ahead: Calls under way or waiting to be taken, at most.
        workers: Threads.

    Yields:
        The results in the order of the images.

    Raises:
        UsageError: A number is below 1.
    """
    for name, value in (("batch", batch), ("ahead", ahead), ("workers", workers)):
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    return _stream(predict, iter(images), batch, ahead, workers)


def _stream(
    predict: Callable[[Sequence[ImageSource]], list[Segmentation]],
    source: Iterator[ImageSource],
    batch: int,
    ahead: int,
    workers: int,
) -> Iterator[Segmentation]:
    with ThreadPoolExecutor(workers, thread_name_prefix="wsss-predict") as pool:
        pending: deque[Future[list[Segmentation]]] = deque()
        try:
            while True:
                while len(pending) < ahead and (part := list(islice(source, batch))):
                    pending.append(pool.submit(predict, part))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:  # also when the caller stops early: what has not begun never does
            for future in pending:
                future.cancel()
