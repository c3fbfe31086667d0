"""One piece of work at a time on a thread beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Does what it is given, and keeps what goes wrong until somebody waits for it.

    The thread does not keep a program alive that ends without waiting: what it writes has its name only when it is
    complete.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; what was begun before must have been waited for."""
        assert self._thread is None and self._error is None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="background")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            self._error = error

    def wait(self) -> None:
        """Until it is done. Raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
