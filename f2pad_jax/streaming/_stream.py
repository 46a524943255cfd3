"""A stream of images through workers, in order and in bounded memory: threads and queues, no JAX."""

import abc
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from f2pad_jax.errors import F2padError

PATIENCE_S = 0.05
"""Seconds that a worker with work left waits for another image."""
DONE = -1
"""Number that a worker sends at its end, in place of an image's number."""


class _End(NamedTuple):
    """Failure of the source of images, in place of a result."""

    error: BaseException


class Worker(abc.ABC):
    """Solver of images in a thread of its own; its results are pairs of an image's number and the image's result."""

    @property
    @abc.abstractmethod
    def load(self) -> int:
        """Amount of work left."""

    @abc.abstractmethod
    def take(self, number: int, image: Any) -> list[tuple[int, Any]]:
        """Takes an image in; returns the results that are done."""

    @abc.abstractmethod
    def turn(self) -> list[tuple[int, Any]]:
        """Works for a while; returns the results that are done."""


def stream(
    source: Iterable[Any],
    workers: Sequence[Callable[[], Worker]],
    *,
    read: Callable[[Any], Any],
    most_ahead: int,
    one_at_a_time: bool,
) -> Generator[Any, None, None]:
    """Yields the result of every item of ``source``, in its order, each as soon as it and all before it are done.

    Args:
        source: items, pulled a few ahead by a thread of its own. The thread may wait for an item, as for a camera's image.
        workers: factories of workers, each called in the thread that serves it.
        read: function that makes an image of an item, called in threads of its own.
        most_ahead: largest number of images taken in before the first of them is handed out.
        one_at_a_time: whether a worker takes another image only when it has no work left.

    Yields:
        The result of each item; an F2padError if ``read`` or a worker refused the image. The others go on.

    Raises:
        BaseException: ``source`` failed, raised after all results before; or a worker failed, raised at once.
    """
    may_take, may_pull = threading.Semaphore(most_ahead), threading.Semaphore(2 * len(workers) - 1)
    images: queue.SimpleQueue[tuple[int, Future] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stopped = threading.Event()

    def pull() -> None:
        """Queues images, a few ahead of the workers."""
        number = 0
        try:
            for item in source:
                images.put((number, readers.submit(read, item)))
                number += 1
                may_pull.acquire()
                if stopped.is_set():
                    break
        except BaseException as error:  # raised after the results before it
            results.put((number, _End(error)))
        images.put(None)

    def next_image(wait: bool) -> tuple[int, Future] | None:
        """Returns the next image, or None at the end of the source; raises ``queue.Empty`` if none came in time."""
        found = images.get(timeout=None if wait else PATIENCE_S)
        if found is None or stopped.is_set():
            images.put(None)  # for the other workers
            return None
        may_pull.release()
        return found

    def fill(worker: Worker) -> bool:
        """Gives a worker the images it has room for; returns whether more may come."""
        while not (one_at_a_time and worker.load) and may_take.acquire(blocking=not worker.load):
            try:
                found = next_image(wait=not worker.load)
            except queue.Empty:
                may_take.release()
                return True
            if found is None:
                may_take.release()
                return False
            number, image = found
            try:
                deliver(worker.take(number, image.result()))
            except F2padError as error:
                results.put((number, error))
        return True

    def deliver(done: list[tuple[int, Any]]) -> None:
        for result in done:
            results.put(result)

    def serve(make: Callable[[], Worker]) -> None:
        try:
            worker, more = make(), True
            while not stopped.is_set():
                more = more and fill(worker)
                if not worker.load:
                    break
                deliver(worker.turn())
            results.put((DONE, None))
        except BaseException as error:  # raised in the caller's thread
            results.put((DONE, error))

    with ThreadPoolExecutor(2 * len(workers), "f2pad") as readers, ThreadPoolExecutor(len(workers), "f2pad") as pool:
        threading.Thread(target=pull, daemon=True).start()  # not waited for: a camera may never give another image
        for make in workers:
            pool.submit(serve, make)
        waiting, serving, number = {}, len(workers), 0
        try:
            while serving or waiting:
                while number in waiting:
                    result = waiting.pop(number)
                    if isinstance(result, _End):
                        raise result.error
                    yield result
                    number += 1
                    may_take.release()
                if not serving:
                    break
                which, result = results.get()
                if which != DONE:
                    waiting[which] = result
                elif result is None:
                    serving -= 1
                else:
                    raise result
        finally:
            stopped.set()
            may_pull.release()
            images.put(None)
            for _ in workers:
                may_take.release()
