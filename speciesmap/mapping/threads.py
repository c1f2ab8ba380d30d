"""Threads between reading and writing: one that works ahead, and several that work abreast."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """Work on the next few items in a thread while the caller uses one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(reader.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()


def abreast(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Work on items in as many threads as torch computes with, and give the results in order.

    Each thread computes alone: small products shared between threads wait for one another longer
    than they take, and their last bit would depend on how many share them.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "work", torch.set_num_threads, (1,)) as workers:
        try:
            for item in items:
                waiting.append(workers.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)
