"""Work that is done one step ahead, in a thread of its own."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Results of ``work`` for keys that were announced; the thread ends with the block.

    What ``work`` raises is raised where its result is taken.

    Args:
        work: depends on its arguments, the key, alone.
    """

    def __init__(self, work: Callable[..., T]):
        self.work = work
        self._waiting: dict[tuple[Hashable, ...], Future[T]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def announce(self, *key: Hashable) -> None:
        """Begin with the result for ``key``."""
        self._waiting[key] = self._pool.submit(self.work, *key)

    def take(self, *key: Hashable) -> T:
        """The result for ``key``, announced or not."""
        future = self._waiting.pop(key, None)
        return self.work(*key) if future is None else future.result()

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
