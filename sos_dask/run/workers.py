"""The workers of a Dask cluster, which come and go, and tasks on them.

Nothing here waits without a limit and a word. Dask gives tasks to whoever connects, and waits for
ever where a worker is frozen, lacks the package or the files, or has gone with a result. So every
task is given to one worker that was examined, one or two ahead, and goes to another one where that
is lost or falls silent. No setting of the scheduler matters to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias, TypeVar

from sos_dask.errors import ClusterError, SosError
from sos_dask.run.machine import give_back_memory

R = TypeVar("R")
Info: TypeAlias = Mapping[str, Any]
"""What the scheduler knows of a worker."""
Done: TypeAlias = Generator[tuple[int, R], None, None]
"""Numbers and results of tasks, as they are finished."""
TIMEOUT_S = 30.0
_EVERY_S = 0.5  # between two looks at the workers
_ANSWER_S = 5.0
_AGAIN_S = 5.0  # until a worker that is not fit is examined again
_SILENCE_S = 2.0  # of waiting without a word
_WORD_S = 300.0  # between two words
_LOSSES = 5  # of workers, with one and the same task
_PATIENCE_S = 20.0
_MEMORY = "Most often it ran out of memory: give workers more, or lower rows_per_partition."
logger = logging.getLogger(__name__)
# What a worker, which may lack this package, says of itself; ``settings`` are names of Dask's, and
# ``environment`` of variables.
_EXAM = """
import importlib.metadata, os, sys
import dask

def version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except Exception:
            pass

try:
    from sos_dask import __version__ as own
except Exception:
    own = None
versions = {"sos_dask": own, "Python": "%d.%d" % sys.version_info[:2]}
versions |= {"xgboost": version("xgboost", "xgboost-cpu"), "pyarrow": version("pyarrow")}
found = versions, {name: dask.config.get(name, None) for name in settings}
found[1].update((name, os.environ.get(name)) for name in environment)
"""
_ASKED = "exec(code, space) or space['found']"


class Lost(Exception):
    """The workers that had a task are gone."""


@dataclass
class _Seen:
    """A worker as it was seen: when it last said something new, and whether it can be used."""

    at: float
    said: float = 0.0
    running_at: float = 0.0
    given_up: bool = False
    cause: str | None = None  # why it cannot be used; None: not known yet
    exam: futures.Future[str] | None = None
    next_exam: float = 0.0


@dataclass(eq=False)
class Workers:
    """The workers that a client of Dask reaches.

    ``timeout``: seconds without any worker that are too many; of silence of one, or of the
    scheduler, at most 30 are. ``own``: this process has started them beside it, so they have its
    package and files. ``settings`` of Dask and variables of the ``environment`` are what workers
    should have.
    """

    client: Any
    timeout: float = TIMEOUT_S
    own: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    _probe: Callable[[], None] | None = None
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _known: dict[str, Info] = field(default_factory=dict)
    _fit: dict[str, Info] = field(default_factory=dict)
    _looked_at: float = float("-inf")
    _waits_since: float | None = None
    _next_word: float = 0.0
    _warned: bool = False
    _is_short: bool = False  # fewer workers than wanted have come
    _of: ClassVar[weakref.WeakKeyDictionary[Any, Workers]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, client: Any, **given: Any) -> Workers:
        """Give the workers of a client, always the same; with arguments those of a new one."""
        if given or client not in cls._of:
            cls._of[client] = cls(weakref.proxy(client), **given)
        return cls._of[client]

    @property
    def silence_s(self) -> float:
        """Seconds of silence after which a worker or the scheduler is given up."""
        return min(self.timeout, TIMEOUT_S)

    # -- who is there ----------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Address of the scheduler."""
        return str(getattr(self.client.scheduler, "address", None) or "the scheduler")

    def known(self) -> dict[str, Info]:
        """Workers that the scheduler knows, by address; frozen ones are still among them."""
        try:
            # Client.scheduler_info sometimes has none: it is also filled by a clock, without them.
            identity = self.client.scheduler.identity
            answer = self.client.sync(identity, n_workers=-1, callback_timeout=self.silence_s)
        except (AttributeError, RuntimeError, OSError, asyncio.CancelledError) as error:
            limit = isinstance(error, TimeoutError) and f"does not answer for {self.silence_s:g} s"
            what = f"the scheduler {self.place} {limit or f'is gone ({error!r})'}"
            raise ClusterError(what, "Run the same command again: it goes on.") from error
        return dict(answer["workers"])

    def there(self) -> dict[str, Info]:
        """Workers that are neither lost nor given up, whether tasks can be given to them or not."""
        self.look()
        return {x: one for x, one in self._known.items() if not self._seen[x].given_up}

    def look(self) -> dict[str, Info]:
        """Fit workers by address, looked at again after half a second.

        Raises `ClusterError`: the scheduler is gone, or there has been none for the time limit.
        """
        now = time.monotonic()
        if now < self._looked_at + _EVERY_S:
            return self._fit
        if now > self._looked_at + max(self.timeout / 2, 5 * _EVERY_S):
            self._waits_since = None  # nobody waited meanwhile
        self._known = self.known()
        self._seen = {x: self._seen.get(x) or _Seen(now) for x in self._known}
        self._fit = {x: one for x, one in self._known.items() if self._is_fit(x, one, now)}
        self._looked_at = time.monotonic()
        if self._fit:
            if self._waits_since is not None and self._next_word > self._waits_since + _SILENCE_S:
                logger.warning("%d workers are connected", len(self._fit))
            self._waits_since = None
        else:
            self._wait(now)
        return self._fit

    def _wait(self, now: float) -> None:
        """Say that there is no worker, or raise that there has been none for too long."""
        if self._waits_since is None:
            self._waits_since, self._next_word = now, now + _SILENCE_S
        causes = [f"{self.name_of(x)} {one.cause}" for x, one in self._seen.items() if one.cause]
        if now > self._waits_since + self.timeout:
            silent = f"{len(self._known)} do not answer" if self._known else "none has connected"
            found, self._waits_since = "; ".join(causes[:3]) or silent, None
            raise ClusterError(
                f"no worker of {self.place} can be used, after {self.timeout:g} s: {found}",
                "Look at the workers' logs and the queue, or raise timeout in [cluster].",
            )
        if now >= self._next_word:
            text = "waiting for workers of %s, at most %g s"
            logger.warning(text, self.place, self.timeout)
            self._next_word = now + _WORD_S

    def wait_for(self, wanted: int, patience_s: float = _PATIENCE_S) -> dict[str, Info]:
        """Wait for so many fit workers; after some time fewer will do, in the order of their names.

        Raises `ClusterError`: see `look`.
        """
        end = time.monotonic() + patience_s
        said_at = time.monotonic() + _SILENCE_S
        while len(found := self.look()) < wanted and (not found or time.monotonic() < end):
            if found and time.monotonic() > said_at:
                said_at, there = float("inf"), (len(found), wanted, self.place, patience_s)
                logger.warning(
                    "%d of %d workers of %s are connected: waiting, at most %g s", *there
                )
            time.sleep(_EVERY_S / 2)
        return dict(sorted(found.items(), key=lambda item: (str(item[1]["name"]), item[0])))

    def require(self, probe: Callable[[], None] | None, minimum: int = 1) -> None:
        """Wait for fit workers: from now on, those on which a probe raises nothing.

        The probe is importable by its name; late workers have to pass it, too.
        """
        if not self.own and probe is not None:
            self._probe, self._looked_at = probe, float("-inf")
            self._seen = {x: _Seen(one.at, one.said) for x, one in self._seen.items()}
        # Once: a queue that gives fewer would else cost the limit in every stage.
        patience = _PATIENCE_S if self._is_short else self.timeout
        found = self.wait_for(minimum, patience)
        if len(found) < minimum and not self._is_short:
            logger.warning("%d of %d workers are connected: work goes on", len(found), minimum)
        self._is_short = len(found) < minimum

    def name_of(self, address: str) -> str:
        """Name and address of a worker."""
        name = self._known.get(address, {}).get("name", address)
        return f"worker {address}" if name == address else f"worker {name} at {address}"

    def _is_fit(self, address: str, info: Info, now: float) -> bool:
        """Check whether tasks can be given to a worker, by what it said and how it was examined."""
        seen = self._seen[address]
        if info["last_seen"] != seen.said:
            seen.said, seen.at, seen.given_up = info["last_seen"], now, False
        if info["status"] == "running":
            seen.running_at = now
        if not seen.given_up and now > seen.at + self.silence_s:
            self._give_up(address, f"has been silent for {self.silence_s:g} s")
        elif not seen.given_up and seen.running_at and now > seen.running_at + self.silence_s:
            self._give_up(address, f"has been {info['status']} for {self.silence_s:g} s")
        if seen.given_up or info["status"] != "running":
            return False
        return self.own or self._passes(address, seen, now)

    def _give_up(self, address: str, why: str) -> None:
        """Leave a worker to its nanny, which starts it anew; its tasks go to others."""
        seen = self._seen[address]
        seen.given_up, seen.cause, seen.exam = True, why, None
        logger.warning("%s %s and is given up", self.name_of(address), why)
        # Client.restart_workers refuses those without a nanny, which the scheduler drops.
        how = {"timeout": 20, "on_error": "return", "wait_for_workers": False}
        again = self.client.scheduler.restart_workers
        self._begin(again(workers=[address], stimulus_id="silent", **how))

    # -- examinations ----------------------------------------------------------------------------

    def _passes(self, address: str, seen: _Seen, now: float) -> bool:
        """Whether a worker has passed its examination, which is begun where it is due."""
        if seen.exam is not None and seen.exam.done():
            before, seen.cause = seen.cause, _result_of(seen.exam)
            if seen.cause and seen.cause != before:
                logger.warning("%s %s: it gets no tasks", self.name_of(address), seen.cause)
            seen.exam, seen.next_exam = None, now + _AGAIN_S
        if seen.exam is None and seen.cause != "" and now >= seen.next_exam:
            seen.exam = self._begin(self._examine(address))
        return seen.cause == ""

    async def _examine(self, address: str) -> str:
        """Why a worker cannot be used; empty where it can."""
        found = await self._answer(address, eval, *_question(self.settings, self.environment))
        if isinstance(found, BaseException):
            return f"cannot be asked: {found!r}"
        versions, settings = found
        if cause := _unlike(versions):
            return cause
        self._warn_of_settings(settings)
        if self._probe is not None:
            answer = await self._answer(address, self._probe)
            if isinstance(answer, SosError):
                return answer.message
            if isinstance(answer, BaseException):
                return f"cannot be examined: {answer!r}"
        return ""

    def _warn_of_settings(self, found: Mapping[str, Any]) -> None:
        """Warn, once, where settings of a worker are not those that it should have."""
        wrong = [
            f"{name} is {found[name]!r}, not {wanted!r}"
            for name, wanted in {**self.settings, **self.environment}.items()
            if found[name] != wanted
        ]
        if wrong and not self._warned:
            self._warned = True
            text = "workers of %s should have the settings of deploy/dask.yaml: %s"
            logger.warning(text, self.place, "; ".join(wrong))

    def check_scheduler(self) -> None:
        """Raise `ClusterError` where the scheduler lacks the package, or has another version."""
        try:
            asked = self.client._run_on_scheduler(eval, *_question())
            versions, _ = self._begin(asked).result(self.silence_s)
        except Exception as error:
            what = f"the scheduler {self.place} cannot be asked for its versions: {error!r}"
            raise ClusterError(what, "Look at its log.") from error
        if cause := _unlike(versions):
            hint = "Start it in the same environment as this command."
            raise ClusterError(f"the scheduler {self.place} {cause}", hint)

    async def _answer(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a worker answers beside its tasks; an exception where it raised one."""
        asked = self.client._run(function, *arguments, workers=[address], on_error="return")
        try:
            return (await asyncio.wait_for(asked, self.silence_s)).get(address)
        except Exception as error:
            return error

    def ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Answers of the workers, beside their tasks; only of those that answer soon."""
        asked = {x: self._begin(self._answer(x, function, *arguments)) for x in self.known()}
        done, late = futures.wait(asked.values(), _ANSWER_S)
        for one in late:
            one.cancel()
        answers = {x: one.result() for x, one in asked.items() if one in done}
        return {x: one for x, one in answers.items() if not isinstance(one, BaseException)}

    def _begin(self, coroutine: Any) -> futures.Future[Any]:
        """Run a coroutine in the thread of the client."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.client.loop.asyncio_loop)

    # -- tasks -----------------------------------------------------------------------------------

    def run(
        self, function: Callable[[Any], R], tasks: Sequence[Any], step: str, hint: str = _MEMORY
    ) -> Done[R]:
        """Run a function for every task; give their numbers and results as they are finished.

        Raises `ClusterError`: no worker, no scheduler, or one task lost its worker again and again.
        """
        pending, losses = deque(range(len(tasks))), Counter[int]()
        running: dict[int, tuple[Any, str]] = {}
        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        in_row = 0  # times that workers were lost, since the last result

        def lose(address: str) -> None:
            lost = [number for number, (_, of) in running.items() if of == address]
            for place, number in enumerate(lost):
                release([running.pop(number)[0]])
                if place:  # it has only waited there
                    pending.appendleft(number)
                    continue
                pending.append(number)
                losses[number] += 1
                if losses[number] >= _LOSSES or in_row >= 2 * _LOSSES:
                    what = f"{step}: a task killed its worker again and again, at last {address}"
                    raise ClusterError(what, hint)

        try:
            while pending or running:
                fit, there = self.look(), self.there()
                gone = {of for _, of in running.values()} - there.keys()
                in_row += bool(gone)  # many may go at once
                for address in gone:
                    lose(address)
                for address in _rooms(fit, Counter(x for _, x in running.values()), len(pending)):
                    number = pending.popleft()
                    packed = pack(function, tasks[number])
                    future = self.submit(address, _run_task, packed, step)
                    running[number] = future, address
                    future.add_done_callback(lambda one, x=number: ended.put((x, one)))
                with contextlib.suppress(queue.Empty):
                    number, future = ended.get(timeout=_EVERY_S)
                    address = running.get(number, (None, ""))[1]
                    if running.get(number, (None, ""))[0] is not future:
                        continue  # was given up before
                    try:
                        result = self.fetch(future, [address])
                    except Lost:
                        in_row += 1
                        lose(address)
                        continue
                    del running[number]
                    in_row = 0
                    release([future])
                    yield number, result
        finally:
            with contextlib.suppress(Exception):
                release([future for future, _ in running.values()])

    def submit(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Give a call to one worker; its future."""
        try:
            return self.client.submit(function, *arguments, workers=[address], pure=False)
        except (RuntimeError, OSError, asyncio.CancelledError) as error:
            what = f"the scheduler {self.place} is gone ({error!r})"
            raise ClusterError(what, "Run the same command again: it goes on.") from error

    def fetch(self, wanted: Any, addresses: Collection[str]) -> Any:
        """Wait for futures of some workers, and give their results, in the same structure.

        Errors of tasks are raised as they were. Raises `Lost` where one of these workers is gone.
        """
        from distributed import CancelledError, KilledWorker

        gathering = self._begin(self.client.gather(wanted, asynchronous=True))
        try:
            while True:
                done, _ = futures.wait([gathering], _EVERY_S)
                if done:
                    return gathering.result()
                if not self.there().keys() >= set(addresses):
                    raise Lost
        except (CancelledError, KilledWorker, futures.CancelledError) as error:
            self._looked_at = float("-inf")
            self.look()  # raises where the scheduler is gone
            raise Lost from error
        finally:
            gathering.cancel()

    def release(self, given: Iterable[Any]) -> None:
        """Let go of futures whose keys are used again: then the scheduler makes new tasks."""
        release(given)
        # The thread of the client does it; a key that is wanted before that keeps its old task.
        self._begin(asyncio.sleep(0)).result(self.silence_s)


def _rooms(fit: Mapping[str, Info], load: Mapping[str, int], n_tasks: int) -> list[str]:
    """Workers for the next tasks, the emptiest first.

    Where there are many tasks, a worker has one ahead; the last ones wait for one that is free.
    """
    places: list[tuple[int, str]] = []
    spare = 1 if n_tasks > len(fit) else 0
    for address, info in fit.items():
        places += [(n, address) for n in range(load.get(address, 0), info["nthreads"] + spare)]
    return [address for _, address in sorted(places)[:n_tasks]]


def _result_of(exam: futures.Future[str]) -> str:
    try:
        return exam.result()
    except (Exception, futures.CancelledError) as error:
        return f"cannot be asked: {error!r}"


def _question(settings: Iterable[str] = (), environment: Iterable[str] = ()) -> tuple[Any, ...]:
    """Arguments of `eval`, which any Python knows by its name."""
    space = {"settings": list(settings), "environment": list(environment)}
    return _ASKED, {"code": _EXAM, "space": space}


@lru_cache(maxsize=1)
def _own_versions() -> Mapping[str, str]:
    versions: Mapping[str, str] = eval(*_question())[0]
    return versions


def _unlike(versions: Mapping[str, str]) -> str:
    """What another process lacks, or has another version of; empty where it is like this one."""
    for name, version in _own_versions().items():
        if (theirs := versions[name]) != version:
            has = f"has {name} {theirs}" if theirs else f"has no package '{name}'"
            return f"{has}, and this process has {name} {version}"
    return ""


def release(given: Iterable[Any]) -> None:
    """Let go of futures; what no one else wants is stopped and forgotten."""
    # No Client.cancel: where a cancelled task has dependents, the scheduler of distributed 2026.7
    # drops the connection to the client.
    for future in given:
        future.release()


def pack(function: Callable[..., Any], *arguments: Any) -> bytes:
    """Make bytes of a call: the scheduler unpickles every task, where nothing may be raised."""
    from distributed.protocol.pickle import dumps

    content: bytes = dumps((function, arguments))
    return content


# --- in the workers ----------------------------------------------------------------------------


def call(packed: bytes, *more: Any) -> Any:
    """Do what was packed, with further arguments."""
    from distributed.protocol.pickle import loads

    function, arguments = loads(packed)
    return function(*arguments, *more)


def _run_task(packed: bytes, step: str) -> Any:
    _give_back(step)
    return call(packed)


@lru_cache(maxsize=1)
def _give_back(step: str) -> None:
    """Give back what the stage before has left: over stages it would add to the peak of each."""
    give_back_memory()
