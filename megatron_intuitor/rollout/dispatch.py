"""Spreads requests over engines and sees to it that each is answered exactly once, whoever dies on the way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

from megatron_intuitor.contracts import EngineFailure, GenerateRequest, Rollout
from megatron_intuitor.rollout.vllm_client import Ask

Answer = asyncio.Task[Rollout]


class AskableEngine(Protocol):
    """An engine that answers many requests at a time."""

    name: str

    def session(self) -> AbstractAsyncContextManager[Ask]:
        """Opens the way to the engine for one round."""
        ...


async def dispatch(
    engines: Sequence[AskableEngine],
    requests: Mapping[int, GenerateRequest],
    *,
    max_concurrent: int,
    on_failure: Callable[[str, EngineFailure], None],
    on_progress: Callable[[int], None],
) -> dict[int, Rollout]:
    """Ask ``engines`` for all ``requests``; returns the answers that were had, under the same keys.

    Each engine has up to ``max_concurrent`` requests in flight; the next one goes to the engine with the fewest.
    ``on_failure`` hears once of each engine that fails; its unanswered requests go to the others.  Answers are
    missing only where no engine is left.  ``on_progress`` hears of each answer.
    """
    async with AsyncExitStack() as stack:
        asks = {engine.name: await stack.enter_async_context(engine.session()) for engine in engines}
        round_ = _Round(asks, requests, max_concurrent, on_failure, on_progress)
        return await round_.run()


class _Round:
    """The state of one dispatch: every request is in exactly one of ``waiting``, ``running`` and ``answers``."""

    def __init__(
        self,
        asks: dict[str, Ask],
        requests: Mapping[int, GenerateRequest],
        max_concurrent: int,
        on_failure: Callable[[str, EngineFailure], None],
        on_progress: Callable[[int], None],
    ) -> None:
        self._asks = asks
        self._requests = requests
        self._max_concurrent = max_concurrent
        self._on_failure = on_failure
        self._on_progress = on_progress
        self._waiting = deque(requests)
        self._running: dict[Answer, tuple[str, int]] = {}
        self._load = dict.fromkeys(asks, 0)
        self._finished: asyncio.Queue[Answer] = asyncio.Queue()
        self._answers: dict[int, Rollout] = {}

    async def run(self) -> dict[int, Rollout]:
        """Ask until everything is answered or nobody is left to ask."""
        cancelled: list[Answer] = []
        try:
            self._fill()
            while self._running:
                task = await self._finished.get()
                if task in self._running:
                    cancelled += self._settle(task)
                    self._fill()
        finally:
            cancelled += self._running
            for task in self._running:
                task.cancel()
            await asyncio.gather(*cancelled, return_exceptions=True)
        return self._answers

    def _fill(self) -> None:
        while self._waiting and self._load:
            name = min(self._load, key=self._load.__getitem__)
            if self._load[name] >= self._max_concurrent:
                return
            index = self._waiting.popleft()
            task = asyncio.ensure_future(self._asks[name](self._requests[index]))
            task.add_done_callback(self._finished.put_nowait)
            self._running[task] = (name, index)
            self._load[name] += 1

    def _settle(self, task: Answer) -> list[Answer]:
        """Book one finished task; returns the tasks that were cancelled because their engine failed."""
        name, index = self._running.pop(task)
        try:
            self._answers[index] = task.result()
        except EngineFailure as failure:
            return self._drop_engine(name, index, failure)
        if name in self._load:
            self._load[name] -= 1
        self._on_progress(1)
        return []

    def _drop_engine(self, name: str, index: int, failure: EngineFailure) -> list[Answer]:
        self._waiting.append(index)
        if name not in self._load:  # it has failed before; this task had ended at the same time
            return []
        del self._load[name]
        # Tasks that have ended are in the queue already: they keep their answers.
        lost = [task for task, (engine, _) in self._running.items() if engine == name and not task.done()]
        for task in lost:
            self._waiting.append(self._running.pop(task)[1])
            task.cancel()
        self._on_failure(name, failure)
        return lost
