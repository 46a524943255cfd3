"""Stream of images that arrive one at a time, from any thread, as in a server."""

import collections
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from f2pad_jax.errors import F2padError
from f2pad_jax.method.algorithm import Refined

Job = tuple[Any, "Future[Refined]"]
"""Image and its result to be."""


class Live:
    """Queue of images in front of one call of ``refine_many``, which a thread of its own serves.

    Images fill the lanes in the order in which they arrive. If the call fails, the images inside it get the error. A new
    call goes on with the queue.
    """

    def __init__(self, refine: Callable[..., Iterator[Refined]]):
        self._refine = refine
        self._waiting: collections.deque[Job | None] = collections.deque()
        """Images in the order in which they arrived; None at the end, once the queue is closed."""
        self._taken: collections.deque[Future[Refined]] = collections.deque()
        """Results that the present call owes, in their order."""
        self._changed = threading.Condition()
        """Lock of both queues. It tells the threads that wait for an image of a new image, and of the end of their call."""
        self._thread = threading.Thread(target=self._serve, name="f2pad-live", daemon=True)
        self._thread.start()

    def submit(self, image: Any) -> "Future[Refined]":
        """Queues an image, and returns its result to be; the result is an F2padError for an image that can't be used."""
        result: Future[Refined] = Future()
        self._append((image, result))
        return result

    def close(self) -> None:
        """Refines the images of the queue, and ends."""
        self._append(None)
        self._thread.join()

    def _append(self, job: Job | None) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def _serve(self) -> None:
        while not self._refine_until_failure():
            pass

    def _refine_until_failure(self) -> bool:
        """Refines until the stream is closed, or until the call fails; returns whether the stream is closed."""
        taken = self._taken = collections.deque()
        try:
            for result in self._refine(self._images(taken), on_error=lambda _, error: taken.popleft().set_exception(error)):
                taken.popleft().set_result(result)
            return True
        except Exception as error:
            logging.getLogger(__name__).exception("refining failed, and starts again")
            with self._changed:
                self._taken = collections.deque()
                self._changed.notify_all()
                if not taken:  # the call took no image: without an answer to the next one it would fail for ever
                    self._changed.wait_for(lambda: self._waiting)
                    job = self._waiting.popleft()
                    if job is None:
                        return True
                    taken.append(job[1])
            for result in taken:
                result.set_exception(error)
            return False

    def _images(self, taken: "collections.deque[Future[Refined]]") -> Iterator[Any]:
        """Yields the images of the queue, and notes in ``taken`` which results are owed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or taken is not self._taken)
                if taken is not self._taken:  # this call has failed; the images are for the next call
                    return
                job = self._waiting[0]
                if job is None:  # it stays for the next call, if this one fails before its end
                    return
                self._waiting.popleft()
                image, result = job
                if not result.set_running_or_notify_cancel():
                    continue
                taken.append(result)
            yield image


def reason(error: BaseException) -> str:
    """Returns an error in one line."""
    return str(error) if isinstance(error, F2padError) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
