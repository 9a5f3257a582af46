r"""Aura's analysis stream, served well: structured concurrency, from top to bottom.

**A run writes a log. A delivery plays that log to one viewer, well or badly.**

Start it, ask for an analysis, and watch it from a second terminal:

    python aura_stream.py
    curl -X POST localhost:9000/aura/cases/85116/analysis-runs \
         -H "Authorization: Bearer test-token" -d '{"runId": "test-run-001"}'
    curl -N localhost:9000/aura/analysis-runs/test-run-001/stream \
         -H "Authorization: Bearer test-token"

Words:

    run        one analysis, from its trigger to its last event; the server owns it
    analysis   what a run does: an async function that sends events
    channel    the run's queue of events, between its analysis and its log
    log        what the run said, in order, as bytes; an event's id is its place in it
    viewer     a client that has opened a run's stream
    delivery   one open stream: the log, played to one viewer
    hub        all runs of this server, by their ids
    script     what a run or a delivery does, as data (part 2)
    scenario   scripts for a run, its trigger and its streams, under a name (part 2)
    attempt    which try it is, the first, the second, ..., of one client at one thing (part 2)
    journal    every request, what it got, and who closed first (part 2)
    entry      one request in the journal (part 2)
    door       a method that a later part replaces; each says so

Words of Trio: a *nursery* is a block that starts tasks and does not end before they have; when it
is cancelled, so are they. A *scope* is a block that can be cancelled, by hand or by a deadline. A
*checkpoint* is an `await` where other tasks may run, and where a cancel arrives; between two
checkpoints nothing else runs, for all tasks share one thread.

Part 1 is a whole server: cut the file off at part 2, and it still serves. A chapter uses only names
from above it. Ten minutes? Read part 1.

    Part 1  The server
     1  Events                 an event and its bytes
     2  Runs                   analysis -> channel -> log
     3  Deliveries             log -> one viewer
     4  Analyses               what the ordinary runs say
     5  HTTP                   the routes of a client's life
     6  Serving                the nurseries, and the order in which they end
    Part 2  The double
     7  All settings           every knob, once
     8  Reading events         what a client parses
     9  Script time            a clock that tests can move
    10  Scripts                what runs and streams do, as data
    11  Journal                who asked, what they got, who closed first
    12  Runs of scenarios      gates, limits, forgetting
    13  Held back, and cut anew  what a proxy does to a stream
    14  Scripted deliveries    how a delivery goes wrong, at the exact byte
    15  Catalogue              the built-in scenarios, as data
    16  Choosing               which scenario, which attempt, which script
    17  Control                what the double can do, is to do, and has done
    18  The double             all of it, served; `running()` for tests
    Part 3  In operation
    19  What ASGI cannot say   the fenced corner: sockets, deadlines, other people's bugs
    20  Access                 who may ask for what
    21  Jobs                   generation jobs: runs of their own kind
    22  Metrics and admin      for whoever is on call
    23  The whole double       all of it, on connections that nothing kills
    Part 4  For people
    24  The page               a client with its eyes open: one run, live
    25  The careful client     hears a stream of anybody's, whatever it sends
    26  Diagnosis              asks any stream what is wrong with it, and whose fault that is
    27  Command line

Who is inside whom ends with whom. These are the scopes that end things:

    serve
    └─ connections                   a nursery: one task per socket
       ├─ connection                 its nursery is cancelled when the client leaves
       │  └─ request                 so this ends, ...
       │     └─ delivery             ... and this; the run goes on, for it is not in here
       └─ runs                       a nursery: every run belongs to the server
          ├─ run test-run-001        takes events from the channel, writes the log, wakes viewers
          │  └─ analysis             sends events into the channel; `run.scope` cancels only this
          └─ accept                  takes new connections; ends first

The runs' nursery stands inside the connections': at the stop it ends first, so that each stream
can still say its last words. A viewer that leaves is noticed by its connection's reader, which
cancels what is inside. (Hypercorn's, in parts 1 and 2, tells Quart-Trio, which cancels the nursery
of that one request.)

The journey of one event:

    1  an analysis makes an Event, which encodes it, once
    2  it enters the run's channel, a queue of 256; a full one makes the analysis wait
    3  the run takes all that is there, and never waits for a viewer
    4  each event gets its id, its place in the log
    5  one announcement wakes every viewer of the run
    6  each delivery reads what its viewer has not had, as one piece of bytes
    7  one write puts the piece on the viewer's socket
    8  a viewer that comes late, or comes back, starts at 6: the log is still there

A slow viewer holds up nobody: it waits in its own write (7) and gets bigger pieces.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "trio>=0.31",
#   "quart-trio>=0.12,<0.14",
#   "quart-trio>=0.13; python_version >= '3.13'",
#   "quart>=0.22,<0.24",
#   "hypercorn==0.18.*",
#   "h11==0.16.*",
#   "msgspec>=0.20",
# ]
# ///

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import logging
import math
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from quart import Response, request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection

__version__ = "0.1.0"

logger = logging.getLogger("aura_stream")


# ═══ Part 1  The server ═══════════════════════════════════════════════════════════════════════════
# A whole server: everything above part 2, and the four lines that start it, is a program of its
# own (a test cuts it off and runs it). Later parts replace what is marked as a door.


def setting(default: Any, says: str, *, repr: bool = True, **more: Any) -> Any:
    """One setting: its default, and its sentence for --help and the README."""
    return field(default=default, repr=repr, metadata={"says": says, **more})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What can be set of the server of part 1; times are seconds."""

    make_service: ClassVar[Any] = None  # a door: later parts' settings bring their own service

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(9000, "port to listen on; 0 takes a free one")
    instance: str = setting("", "name of this instance in answers and hints; empty: host:pid")
    event_delay: float = setting(0.15, "seconds between the events of an ordinary run")
    heartbeat: float = setting(30.0, "quiet seconds before a beat; 0: none",
                               env="SSE_HEARTBEAT_INTERVAL")
    retry_ms: int = setting(0, "`retry:` after `: connected`; 0 sends none", env="SSE_RETRY_MS")
    event_ids: bool = setting(True, "send `id:` lines", env="SSE_ENABLE_LAST_EVENT_ID")
    idle_timeout: float = setting(300.0, "seconds a run may say nothing before it fails")
    retrigger_window: float = setting(10.0, "seconds after its end a runId is still the same run")
    retention: float = setting(3600.0, "seconds an ended run stays readable")
    grace: float = setting(5.0, "seconds open streams get at the stop, then they are cut")


class Clock:
    """The time that events, heartbeats and time-outs are measured in. A door: part 2 has one that
    tests can move."""

    now = staticmethod(trio.current_time)
    sleep = staticmethod(trio.sleep)

    def limit(self, seconds: float, *, jump: bool = True) -> trio.CancelScope:
        """What is in it has so long; nothing, if that is over already. (`jump` is part 2's.)"""
        return trio.CancelScope(deadline=trio.current_time() + seconds)


def safe(value: object) -> str:
    """A value from outside, for a log line: nothing that could forge another line, at most 200
    characters."""
    return printable(str(value)[:200])


def printable(text: str) -> str:
    """The text in one line, its control characters as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ═══ 1  Events ════════════════════════════════════════════════════════════════════════════════════
# The wire format, and nothing else. What a client parses is what the analysis said, for any input.

LINE_END = re.compile(r"\r\n|\r|\n")  # all that ends a line in SSE; str.splitlines() knows more
CONNECTED = b": connected\n\n"
HEARTBEAT = b": heartbeat\n\n"
DONE = b"data: [DONE]\n\n"


def to_json(value: object) -> str:
    """One line of JSON; NaN and infinities, which JSON does not have, are a ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def to_bytes(text: str) -> bytes:
    """UTF-8. A lone surrogate becomes its escape, which inside JSON means the same."""
    return text.encode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing an analysis says. Making it encodes it, once, for all viewers.

    `data` is text, sent line by line, or anything JSON can say, sent as one line. Its id comes
    last: a client that takes an id as soon as its line arrives has the event, too.
    """

    name: str
    data: Any
    retry: int | None = None
    block: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if LINE_END.search(self.name) or "\0" in self.name:
            raise ValueError(f"an event's name is one line without NUL, not {self.name!r}")

        text = self.data if isinstance(self.data, str) else to_json(self.data)
        lines = [f"event: {self.name}"] if self.name else []
        lines += [] if self.retry is None else [f"retry: {self.retry}"]
        lines += [f"data: {line}" for line in LINE_END.split(text)]
        object.__setattr__(self, "block", to_bytes("\n".join([*lines, ""])))

    def numbered(self, number: object) -> bytes:
        """Its bytes with this id; with None they have none."""
        return self.block + (b"\n" if number is None else to_bytes(f"id: {number}\n\n"))


# ═══ 2  Runs ══════════════════════════════════════════════════════════════════════════════════════
# An analysis sends events into its run's channel; the run takes them out and writes its log.

CHANNEL = 256  # events that wait: more make bigger batches, not a faster run
MOST_EVENTS = 1000  # looked at for one write
WRITE = 64 * 2**10  # bytes of one write, or one event: a late viewer must not make a giant piece
TERMINAL = ("completed", "failed")


def now_iso() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Log:
    """What a run said: the bytes of each event, as they go out. An event's id counts from 1."""

    def __init__(self, *, ids: bool = True) -> None:
        self.first = 1  # the id of the oldest event still here: in part 1, of the first ever
        self.last = 0  # the id of the newest event
        self.last_name = ""
        self.ended = False
        self.ids = ids
        self.names: list[str] = []  # of the events that are here
        self.size = 0  # bytes that are here
        self._blocks: list[bytes] = []
        self._news = trio.Event()

    def append(self, event: Event) -> None:
        self.last += 1
        self.last_name = event.name[:200]
        block = b"%bid: %d\n\n" % (event.block, self.last) if self.ids else event.block + b"\n"
        self.size += len(block)
        self.names.append(self.last_name)
        self._blocks.append(block)

    def announce(self) -> None:
        """Wake every viewer, once for all that was appended."""
        self._news.set()
        self._news = trio.Event()

    def news(self) -> Awaitable[None]:
        """Await the next announcement. Between reading the log and awaiting this there must be no
        checkpoint: then nothing can be announced in between, and no wake-up can be lost."""
        return self._news.wait()

    def read(self, after: int, *, most: float = math.inf) -> tuple[bytes, int]:
        """The events after id `after` in one piece, no bigger than one write or one event, and the
        id of the last of them: a late viewer of a long log must not make one giant piece."""
        if after >= self.last:
            return b"", after
        start = after + 1 - self.first
        blocks = self._blocks[start : start + int(min(most, MOST_EVENTS))]
        sizes = list(itertools.accumulate(map(len, blocks)))
        count = max(1, bisect.bisect_right(sizes, WRITE))
        return b"".join(blocks[:count]), after + count


class Failure(Exception):
    """An analysis that failed, in the words of its `failed` event."""

    def __init__(
        self, error: str, *, stage: str = "pipeline", code: str = "", retryable: bool = True
    ) -> None:
        super().__init__(error)
        self.error = str(error)
        self.stage = str(stage)
        self.code = str(code) or f"ANALYSIS_{self.stage.upper()}"
        self.retryable = bool(retryable)


@dataclass(frozen=True)
class RunInfo:
    """What an analysis may know of its run: its trigger's ids, phase and body, and the clock."""

    run_id: str
    case_id: str
    tenant_id: str | None
    phase: str
    body: Mapping[str, Any]
    clock: Any  # a Clock, or part 2's
    event_delay: float = 0.0
    test_fail: str | None = None


def failed2(info: RunInfo, failure: Failure) -> dict[str, Any]:
    """Phase2's `failed`: its error is a text."""
    return {
        "error": failure.error, "stage": failure.stage, "code": failure.code,
        "retryable": failure.retryable,
    }


def failed3(info: RunInfo, failure: Failure) -> dict[str, Any]:
    """Phase3's: its error is an object, and it may always be tried again."""
    error = {"message": failure.error, "stage": failure.stage}
    return {"runId": info.run_id, "status": "failed", "error": error, "retryable": True}


FAILED = {"phase2": failed2, "phase3": failed3}

Sending = trio.MemorySendChannel[Any]  # of Events
Analysis = Callable[[Any, Sending], Awaitable[None]]


class Run:
    """One analysis, its channel and its log, and how it went."""

    make_log: ClassVar[Any] = Log  # a door: part 2's logs can forget

    def __init__(self, info: RunInfo, settings: ServerSettings) -> None:
        self.info: Any = info
        self.log = self.make_log(ids=settings.event_ids)
        self.sending, self.receiving = trio.open_memory_channel[Any](CHANNEL)
        self.scope = trio.CancelScope()  # around the analysis, and only around it
        self.listening = trio.CancelScope()  # around the wait for what it says next
        self.patience = settings.idle_timeout
        self.silent_at = info.clock.now() + self.patience  # then it has said nothing for too long
        self.failure: Failure | None = None  # why it ends, if that is not well
        self.returned = False  # the analysis is over; what it has sent may still be in the channel
        self.viewers = 0
        self.started_at = now_iso()
        self.started_clock = trio.current_time()
        self.ended_at: str | None = None
        self.ended_clock = math.inf

    @property
    def status(self) -> str:
        """running, completed, failed or cancelled; at the end, the log's last word decides."""
        if not self.log.ended:
            return "running"
        if self.failure is not None:
            return "cancelled" if self.failure.stage == "cancelled" else "failed"
        return "failed" if self.log.last_name == "failed" else "completed"

    @property
    def decided(self) -> bool:
        """Nothing can change any more how it ends."""
        return self.returned or self.log.last_name in TERMINAL

    def cancel(self, why: Failure) -> None:
        """End the analysis. The log's last word will be `why`, unless it has ended already."""
        if self.failure is None and not self.returned:
            self.failure = why
            self.scope.cancel(reason=why.error)

    async def conduct(self, analysis: Analysis, settle: Callable[[Run], None]) -> None:
        """From the first event to the last: one task speaks, this one writes down."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.perform, analysis, name=f"analysis {safe(self.info.run_id)}")
            await self.transcribe()
            self.conclude()  # no checkpoint before: who sees the last event sees the end
            settle(self)
            self.announce()

    def conclude(self) -> None:
        """The last word, if the analysis had none, and the end of the log."""
        if self.log.last_name in TERMINAL:
            self.failure = None  # it came too late: one terminal event, and it is the last
        elif self.failure is not None:
            self.log.append(Event("failed", self.failed(self.failure)))
        self.ended_at = now_iso()
        self.ended_clock = trio.current_time()
        self.log.ended = True

    async def perform(self, analysis: Analysis) -> None:
        """Run the analysis, whatever it does; then the channel has nothing more to come."""
        with self.sending:
            try:
                with self.scope, self.sending.clone() as its_own:
                    await analysis(self.info, its_own)
            except BaseException as error:  # the one place: no analysis ends the server
                # a deadline of minus infinity: we are being cancelled, with the whole server
                ending = trio.current_effective_deadline() == -math.inf
                if isinstance(error, trio.Cancelled if ending else KeyboardInterrupt):
                    raise
                self.fail(error)
        self.returned = True
        self.listening.cancel(reason="the analysis is over")

    def fail(self, error: BaseException) -> None:
        """The analysis raised. A door: part 2 says more about it."""
        text = type(error).__name__
        with contextlib.suppress(Exception):  # somebody's own exception may not even have a text
            text += f": {error}"
        own = error if isinstance(error, Failure) else Failure(text, retryable=False)
        self.failure = self.failure or own
        logger.error("analysis failed run_id=%s %s", safe(self.info.run_id), safe(text))

    def failed(self, failure: Failure) -> dict[str, Any]:
        """The data of its `failed` event. A door: part 2 knows another phase."""
        return FAILED[self.info.phase](self.info, failure)

    async def transcribe(self) -> None:
        """Write down what comes out of the channel, all that is there at a time, until the analysis
        is over. It never waits for a viewer: a slow one holds up nobody."""
        clock = self.info.clock
        with self.receiving, contextlib.suppress(trio.EndOfChannel):
            while not self.returned:
                before = self.log.last
                with clock.limit(self.until_silent()) as self.listening:
                    self.hear(await self.receiving.receive())
                if self.listening.cancelled_caught and not self.returned:
                    self.give_up()
                self.hear_the_rest()
                if self.log.last > before:
                    self.silent_at = clock.now() + self.patience
                if not self.returned:  # else its end is announced as well, and both at once
                    self.announce()
            self.hear_the_rest()

    def hear_the_rest(self) -> None:
        """All that is in the channel, without waiting: one announcement for the whole batch."""
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self.hear(self.receiving.receive_nowait())

    def announce(self) -> None:
        """Tell the viewers that there is news. A door: later parts keep the log within limits."""
        self.log.announce()

    def until_silent(self) -> float:
        """How long it may still say nothing. A door: at part 2's gates it may be silent."""
        return float(self.silent_at - self.info.clock.now())

    def hear(self, said: Any) -> None:
        """One thing that came out of the channel."""
        match said:
            case Event(block=_):
                self.log.append(said)
            case _:
                self.hear_else(said)

    def hear_else(self, said: Any) -> None:
        """A door: part 2's runs know more than events."""
        text = f"the analysis sent {type(said).__name__}, where an Event belongs"
        self.failure = self.failure or Failure(text, retryable=False)
        self.scope.cancel(reason=text)

    def give_up(self) -> None:
        """It has said nothing for too long. (The lines are those that Aura's guides look for.)"""
        text = "analysis_run_stream: get_event returned None run_id=%s (no event for %ds)"
        logger.warning(text, safe(self.info.run_id), self.patience)
        logger.warning("EventSource connection timeout")
        self.cancel(Failure(f"the analysis said nothing for {self.patience:g} s", stage="timeout"))
        self.silent_at = math.inf


class Hub:
    """All runs of this server: starts, finds and forgets them. Its nursery is the server's."""

    def __init__(self, settings: Any, nursery: trio.Nursery, clock: Any = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()
        self.stopping = False
        self._nursery = nursery
        self._runs: dict[str, Any] = {}
        self._ended: dict[str, Any] = {}  # in the order of their ends

    @property
    def live(self) -> int:
        return len(self._runs) - len(self._ended)

    def begin(self, run: Run, analysis: Analysis) -> None:
        """Start a run; an ended one of the same id is forgotten."""
        run_id = run.info.run_id
        if run_id in self._ended:
            self._forget(run_id)
        self._runs[run_id] = run
        name = f"run {safe(run_id)}"
        self._nursery.start_soon(run.conduct, analysis, self.settle, name=name)

    def settle(self, run: Run) -> None:
        """A run has ended. A door: part 2 counts what is left of it."""
        if self._runs.get(run.info.run_id) is run:
            self._ended[run.info.run_id] = run

    def find(self, run_id: str) -> Any:
        """The run of this id, if it is here."""
        self._sweep()
        return self._runs.get(run_id)

    def stop(self, why: Failure) -> None:
        """Cancel every run that is still going, and start no other."""
        self.stopping = True
        for run in self._runs.values():
            run.cancel(why)

    def _sweep(self) -> None:
        """Forget what was kept long enough: whoever looks must not see it, so looking does it."""
        oldest = trio.current_time() - self.settings.retention
        while self._ended and next(iter(self._ended.values())).ended_clock <= oldest:
            self._forget(next(iter(self._ended)))

    def _forget(self, run_id: str) -> None:
        del self._ended[run_id]
        del self._runs[run_id]
        logger.info("run_store: queue removed run_id=%s", safe(run_id))


# ═══ 3  Deliveries ════════════════════════════════════════════════════════════════════════════════
# A delivery is a coroutine that writes: a head, then bytes, then the end. It lives in its viewer's
# request, and is cancelled with it.

STREAM_HEAD = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-store, no-transform",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}
Send = Callable[[Any], Awaitable[None]]


class Ending(NamedTuple):
    """Who ended a stream, how and why; and at which step of its script, if it plays one."""

    by: str
    how: str
    reason: str
    step: int | None = None


LEFT = Ending("client", "disconnect", "closed the connection")
CUT = Ending("shutdown", "cancelled", "still open when the server had to go")
ENDED = Ending("server", "end", "the run ended")


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one stream. In part 2 a journal's entry stands in its place."""

    stream_name: str = "analysis_run_stream"
    run_id: str | None = None
    case_id: str | None = None
    resumed_after: int = 0
    bytes: int = 0
    events: int = 0
    last_id_sent: int | None = None
    opened: float = field(default_factory=trio.current_time)
    end: Ending | None = None

    def say(self, text: str) -> None:
        """A log line that begins with the route and names the ids this route knows."""
        by_case = self.stream_name == "case_analysis_stream"
        case = f" case_id={safe(self.case_id)}" if by_case else ""
        logger.info("%s: %s run_id=%s%s", self.stream_name, text, safe(self.run_id), case)

    def say_first(self) -> None:
        logger.info("%s: first chunk sent run_id=%s", self.stream_name, safe(self.run_id))

    def sent(self, size: int, place: int) -> None:
        """So many bytes went out; the viewer now has the events up to this id."""
        if not self.bytes:
            self.say_first()
        self.bytes += size
        self.events = place - self.resumed_after
        self.last_id_sent = place if self.events else None

    def finish(self, end: Ending) -> None:
        """Write the ending down, before the act. The first one counts: afterwards everybody seems
        to have hung up."""
        self.end = self.end or end

    def say_who_closed(self) -> None:
        end = self.end or LEFT
        logger.info(
            "%s: stream closed run_id=%s by=%s how=%s reason=%s bytes=%d events=%d"
            " last_event_id=%s duration=%.3fs", self.stream_name, safe(self.run_id), end.by,
            end.how, safe(end.reason), self.bytes, self.events, self.last_id_sent,
            trio.current_time() - self.opened)


class Delivery:
    """One viewer's stream of a run: a hello, the log with a beat when it is quiet, `[DONE]`."""

    def __init__(self, run: Run, record: Record, hub: Hub, headers: Mapping[str, str]) -> None:
        self.run = run
        self.record = record
        self.hub = hub
        self.headers = headers  # beside the usual ones
        self.place = record.resumed_after  # the id of the last event this viewer has had
        self.said: list[bytes] = []  # what has not been written yet
        self.beat_every = hub.settings.heartbeat or math.inf
        self.quiet_since = hub.clock.now()  # since the last bytes
        self.till_beat: Any = None
        self.resting: Any = None  # the scope it waits in; part 2 ends deliveries by it

    async def deliver(self, send: Send) -> None:
        """Play to the end, or until the viewer leaves: then this is cancelled, and the run not."""
        trio.lowlevel.current_task().name = f"delivery {safe(self.record.run_id)}"
        self.send = send
        self.run.viewers += 1
        try:
            await self.play()
            self.record.finish(ENDED)
            await self.write(more=False)
        finally:
            self.run.viewers -= 1
            self.record.finish(CUT if self.hub.stopping else LEFT)
            self.record.say_who_closed()

    async def play(self) -> None:
        """All of it, in plain code."""
        await self.open()
        retry = self.hub.settings.retry_ms
        self.emit(CONNECTED + (b"retry: %d\n\n" % retry if retry else b""))
        await self.beating(self.follow)
        self.emit(DONE)

    async def open(self) -> None:
        head = {**STREAM_HEAD, **self.headers}
        lines = [(name.encode(), value.encode()) for name, value in head.items()]
        await self.send({"type": "http.response.start", "status": 200, "headers": lines})

    def emit(self, data: bytes, last: int | None = None) -> None:
        """Bytes for this viewer, the last event in them with this id. They go out with what
        follows at once, in one write."""
        self.said.append(data)

    async def write(self, *, more: bool = True) -> None:
        """Write what was said."""
        said = self.said
        self.said = []
        await self.put(said, more)
        self.wrote(said)

    async def put(self, said: list[bytes], more: bool) -> None:
        """Hand it to the server. A door: part 3's connections take all of it in one write."""
        body = {"type": "http.response.body", "more_body": True}
        for data in said:
            await self.send({**body, "body": data})
        if not more:
            await self.send({**body, "body": b"", "more_body": False})

    def wrote(self, said: list[bytes]) -> None:
        """This went out. A door: part 2 knows what was in it."""
        self.quiet_since = self.hub.clock.now()
        self.record.sent(sum(map(len, said)), self.place)

    async def follow(self) -> None:
        """What the log has, and what comes, to its end."""
        log = self.run.log
        while True:
            if self.place < log.last:
                await self.pass_on(log)
                if self.place < log.last:
                    await trio.lowlevel.checkpoint()  # a write that fits the socket has none
            elif log.ended:
                return
            elif self.said:  # the hello, where nothing came with it
                await self.write()
            else:
                await log.news()

    async def pass_on(self, log: Any) -> None:
        """The next piece of the log. A door: part 2 has a shorter way."""
        piece, last = log.read(self.place)
        self.emit(piece, last)
        self.place = last
        await self.write()

    async def beating(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Await `wait`, with a heartbeat after every quiet interval: then it is cancelled where it
        waits, and begins anew. One scope for each beat, not for each event."""
        clock = self.hub.clock
        while True:
            since = self.quiet_since
            due = since + self.beat_every - clock.now()
            self.till_beat = clock.limit(due, jump=False)
            with self.till_beat as self.resting:
                return await wait()
            await self.beat(since)

    async def beat(self, since: float) -> None:
        """A heartbeat, if nothing was said since then."""
        if self.quiet_since == since:
            self.emit(HEARTBEAT)
            await self.write()


# ═══ 4  Analyses ══════════════════════════════════════════════════════════════════════════════════
# What the ordinary runs of Aura say. An analysis is an async function: it sends, and it sleeps.


async def send(sending: Sending, event: Event) -> None:
    """Into the channel, at once; only a full one makes the analysis wait. (`sending.send` lets the
    others run after each event: every batch would be of one.)"""
    try:
        sending.send_nowait(event)
    except trio.WouldBlock:
        await sending.send(event)


def speech(info: RunInfo, sending: Sending) -> Callable[..., Awaitable[None]]:
    """How the ordinary analyses speak: an event, and then the pause before the next."""

    async def say(name: str, **data: Any) -> None:
        await send(sending, Event(name, data))
        if name not in TERMINAL:
            await info.clock.sleep(info.event_delay)

    return say


Findings = tuple[list[dict[str, Any]], float]  # the evidence; how unusual the case is, 0 to 1
SOURCES = {"CASE": "case", "DOC_HEADER": "document", "OPEN_ITEMS": "ledger", "LINEAGE": "lineage"}


def assumed(info: RunInfo) -> Findings:
    """What Phase2 finds where its request has brought no evidence."""
    return [
        {"type": kind, "source": source, "caseId": info.case_id}
        for kind, source in SOURCES.items()
    ], 0.5


async def phase2(
    info: RunInfo, sending: Sending, assess: Callable[[Any], Findings] = assumed
) -> None:
    """The Phase2 analysis. `assess` is a door: part 2 looks at the evidence."""
    say = speech(info, sending)
    ids = {"runId": info.run_id, "caseId": info.case_id}
    items, anomaly = assess(info)
    overall = 0.4 * anomaly + 0.3 * 0.7 + 0.3 * 0.85

    await say("started", **ids, at=now_iso())
    await say("step", label="INPUT_NORM", detail="케이스 입력 정규화 중", percent=10)
    await say("step", label="EVIDENCE_GATHER", detail="증거 수집 중", percent=25)
    await say("evidence", type="COLLECTED", items=items)
    await say("step", label="RULE_SCORING", detail="룰 스코어링 실행", percent=45)
    await say("confidence", anomalyScore=round(anomaly, 2), patternMatch=0.7, ruleCompliance=0.85,
              overall=round(overall, 2))
    await say("step", label="LLM_REASONING", detail="설명 생성 중", percent=65)
    await say("step", label="PROPOSALS", detail="권고 조치 생성", percent=85)

    asks = PROPOSALS if overall >= 0.6 else PROPOSALS[1:]
    risk = "HIGH" if overall >= 0.8 else "MEDIUM"
    for kind, why, approval in asks:
        await say("proposal", type=kind, riskLevel=risk, rationale=why, requiresApproval=approval,
                  payload={"caseId": info.case_id})
    severity = risk if overall >= 0.6 else "LOW"
    risk = f"위험도 {overall:.2f} ({severity})"
    summary = f"케이스 {info.case_id} 분석 완료: {risk}, 권고 조치 {len(asks)}건"
    await say("completed", status="completed", **ids, summary=summary[:500], score=overall,
              severity=severity)


PROPOSALS = (  # to block the payment, where the risk is high enough, and always to ask
    ("PAYMENT_BLOCK", "위험 점수에 따른 추가 검토 권고", True),
    ("REQUEST_INFO", "거래처 확인 요청", False),
)


async def phase3(info: RunInfo, sending: Sending) -> None:
    """The Phase3 analysis; a test failure breaks it off where the real one would break."""
    say = speech(info, sending)
    told = {"runId": info.run_id}

    def may_fail(stage: str) -> None:
        if info.test_fail == stage:
            error = f"Simulated {stage.upper()} failure (X-Aura-Test-Fail: {stage})"
            raise Failure(error, stage=stage)

    await say("started", **told, status="started")
    await say("step", label="Normalize evidence", detail="", percent=20)
    may_fail("rag")
    await say("step", label="RAG retrieve", detail="", percent=45)
    await say("agent", agent="PolicyAgent", message="Retrieved policy passages", percent=45)
    await say("step", label="Scoring + reasonText", detail="", percent=70)
    may_fail("llm")
    await say("agent", agent="PolicyAgent", message="Scored the case", percent=70)
    await say("step", label="Propose actions", detail="", percent=80)
    await say("step", label="Callback sending", detail="", percent=95)
    await say("completed", **told, status="completed")


ANALYSES: dict[str, Analysis] = {"phase2": phase2, "phase3": phase3}


# ═══ 5  HTTP ══════════════════════════════════════════════════════════════════════════════════════
# The routes of a client's life. A route decides; what takes time is a run or a delivery.


class Refusal(Exception):
    """A request that is not granted: the status of its answer, the error in a sentence, and what
    else is told; no body where there is nothing to tell."""

    script: Any = ()  # a door: part 2 may answer with more than this says

    def __init__(
        self, status: int, error: str = "", /, headers: Mapping[str, str] | None = None, **told: Any
    ) -> None:
        super().__init__(status, error, told)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": error, **told} if error else told or None


@dataclass(frozen=True)
class TriggerRequest:
    """What a trigger asks for; the runId was given, or has been minted."""

    run_id: str
    case_id: str
    phase: str
    body: Mapping[str, Any]
    given: bool = True


class Streamed(Response):
    """A response that is a delivery, and takes as long as that: Quart would end it after 60 s."""

    def __init__(self, delivery: Any) -> None:
        super().__init__(b"")
        self.delivery = delivery
        self.timeout = None
        self.headers.clear()


async def whole(send: Send, message: Any) -> None:
    """Send it whole: a heartbeat that falls due meanwhile waits for it. So does the stop, as long
    as the viewer reads nothing: part 3's connections have a deadline."""
    with trio.CancelScope(shield=True):
        await send(message)


class QuartRequest(TrioASGIHTTPConnection):
    """One request and its answer, at Quart's own seam: a delivery gets ASGI's `send` and writes by
    itself, when no request context is alive any more."""

    async def _send_response(self, send: Any, response: Any) -> None:
        if isinstance(response, Streamed):
            await response.delivery.deliver(partial(whole, send))
        else:
            await super()._send_response(send, response)


def answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, in the order and the language it was written in."""
    content = b"" if body is None else to_bytes(to_json(body))
    response = Response(content, status, dict(headers or {}), content_type="application/json")
    if status == 204:
        response.headers.remove("content-type")
    return response


def encoded(segment: str) -> str:
    return quote(segment, safe="")


class Service:
    """What a trigger starts, how a viewer is served, and on which kind of connection. Its methods
    are the doors of the later parts."""

    url = ""  # where it is, once it serves
    port = 0

    def __init__(self, settings: Any, analysis: Analysis | None = None) -> None:
        self.settings = settings
        self.analysis = analysis  # one that takes the place of the ordinary ones
        self.instance = settings.instance or f"{settings.host}:{os.getpid()}"
        self.stopping = trio.Event()

    def stop(self) -> None:
        """End, in order: as SIGTERM does."""
        self.stopping.set()

    def handle(self) -> Any:
        """What whoever starts the server gets: its url, its port and its stop."""
        return self

    def open(self, runs: trio.Nursery, clocks: trio.Nursery) -> Any:
        """The application; its runs are in this nursery, and in that one what moves its clock."""
        self.hub: Any = Hub(self.settings, runs)
        return make_app(self)

    async def listen(self) -> list[trio.SocketListener]:
        return await trio.open_tcp_listeners(self.settings.port, host=self.settings.host)

    async def attend(self, app: ASGIWrapper, context: WorkerContext, stream: Any) -> None:
        """One connection, from its accepting to its end: Hypercorn's, as it comes."""
        trio.lowlevel.current_task().name = "connection"
        await TCPServer(app, Config(), context, {}, stream).run()

    def leave(self, *, by: float) -> None:
        """The server stops: streams have until then."""

    async def asked(self, case_id: str, phase: str) -> TriggerRequest:
        """What this trigger asks for: its body is nothing, or a JSON object."""
        try:
            body = json.loads(await request.get_data(cache=False) or b"{}")
            given = body.get("runId")
        except (ValueError, AttributeError) as error:
            detail = {"loc": ["body"], "msg": f"no JSON object: {error}", "type": "value_error"}
            raise Refusal(422, detail=[detail]) from None
        return TriggerRequest(str(given or uuid.uuid4()), case_id, phase, body, bool(given))

    def accepted(self, asked: TriggerRequest) -> Response:
        """The answer to a trigger. A client that asks twice within the window means one run."""
        run = self.hub.find(asked.run_id)
        how = "known"
        if run is None or trio.current_time() - run.ended_clock >= self.settings.retrigger_window:
            if self.hub.stopping:
                raise Refusal(503, "the server is stopping", {"Retry-After": "5"})
            run = Run(self.info(asked), self.settings)
            how = "started"
            self.hub.begin(run, self.analysis or ANALYSES[asked.phase])
        told = ACCEPTED[asked.phase](asked, run.info.case_id)
        return answer(told, 202, {"x-aura-run": how})

    def info(self, asked: TriggerRequest) -> RunInfo:
        failing = (request.headers.get("x-aura-test-fail"), request.args.get("test_fail_query"))
        fail = next((stage for stage in failing if stage in ("rag", "llm")), None)
        return RunInfo(
            asked.run_id, asked.case_id, None, asked.phase, asked.body, self.hub.clock,
            self.settings.event_delay, fail)

    def stream(self, run_id: str | None) -> Response:
        """One viewer's stream of this run, from where it left off."""
        if not run_id:
            raise Refusal(400, "runId is required", runId=None)
        run = self.seen(run_id)
        given = request.args.get("lastEventId") or request.args.get("last-event-id")
        last_event_id = request.headers.get("last-event-id") or given
        case_id = (request.view_args or {}).get("case_id", "")
        record = Record(stream_name=request.endpoint or "", run_id=run_id, case_id=case_id)
        record.resumed_after = resume_point(last_event_id, run.log.last)
        if run.log.ended and 0 < record.resumed_after == run.log.last:
            raise Refusal(204)  # finished and fully seen: this stops a native EventSource
        record.say("start consuming")
        headers = {"x-aura-run-id": encoded(run_id), "x-aura-instance": encoded(self.instance)}
        return Streamed(Delivery(run, record, self.hub, headers))

    def seen(self, run_id: str) -> Any:
        """The run, or the 404 that helps."""
        run = self.hub.find(run_id)
        if run is None:
            raise self.unknown(run_id)
        return run

    def unknown(self, run_id: str) -> Refusal:
        hint = f"no such run on instance {self.instance}, where {self.hub.live} live"
        return Refusal(404, "runId not found or already completed", runId=run_id, hint=hint)


def resume_point(text: str | None, last: int) -> int:
    """The id after which to go on: `N` and `anything_N` count; no id of this log means the
    start."""
    found = re.fullmatch(r"(?:.*_)?([0-9]{1,18})", text or "", re.DOTALL)
    place = int(found[1]) if found else 0
    return place if place <= last else 0


def phase2_accepted(asked: TriggerRequest, case_id: str) -> dict[str, Any]:
    url = f"/aura/analysis-runs/{encoded(asked.run_id)}/stream"
    return {"status": "ACCEPTED", "runId": asked.run_id, "caseId": case_id, "streamUrl": url}


def phase3_accepted(asked: TriggerRequest, case_id: str) -> dict[str, Any]:
    path = f"/aura/cases/{encoded(case_id)}/analysis/stream?runId={encoded(asked.run_id)}"
    return {"accepted": True, "runId": asked.run_id, "streamPath": path}


ACCEPTED = {"phase2": phase2_accepted, "phase3": phase3_accepted}


def state_of(run: Run) -> dict[str, Any]:
    return {
        "runId": run.info.run_id, "caseId": run.info.case_id, "phase": run.info.phase,
        "status": run.status, "events": run.log.last, "viewers": run.viewers,
        "startedAt": run.started_at, "endedAt": run.ended_at,
    }


def make_app(service: Service) -> QuartTrio:
    """The routes of a client's life: trigger, stream, state, cancel."""
    app = QuartTrio("aura_stream", static_folder=None)
    app.url_map.merge_slashes = False  # an empty runId is a 400, not a redirect
    app.asgi_http_class = QuartRequest

    @app.post("/aura/cases/<case_id>/analysis-runs")
    async def phase2_trigger(case_id: str) -> Response:
        return service.accepted(await service.asked(case_id, "phase2"))

    @app.post("/aura/internal/cases/<case_id>/analysis-runs")
    async def phase3_trigger(case_id: str) -> Response:
        return service.accepted(await service.asked(case_id, "phase3"))

    @app.get("/aura/cases/<case_id>/analysis/stream")
    async def case_analysis_stream(case_id: str) -> Response:
        return service.stream(request.args.get("runId"))

    @app.get("/aura/analysis-runs/<run_id>/stream")
    @app.get("/aura/analysis-runs//stream", defaults={"run_id": ""})
    async def analysis_run_stream(run_id: str) -> Response:
        return service.stream(run_id)

    @app.get("/aura/cases/<case_id>/analysis-runs/<run_id>")
    async def run_state(case_id: str, run_id: str) -> Response:
        return answer(state_of(service.seen(run_id)))

    @app.delete("/aura/cases/<case_id>/analysis-runs/<run_id>")
    async def cancel_run(case_id: str, run_id: str) -> Response:
        run = service.seen(run_id)
        run.cancel(Failure("the run was cancelled by a DELETE", stage="cancelled", retryable=False))
        if not run.decided:  # what it says at its cancellation may still be a `completed`
            return answer({"status": "CANCELLED", "runId": run_id}, 202)
        while not run.log.ended:
            await run.log.news()
        return answer({"status": run.status, "runId": run_id})

    @app.errorhandler(Refusal)
    async def refuse(refusal: Refusal) -> Response:
        return answer(refusal.body, refusal.status, refusal.headers)

    return app


# ═══ 6  Serving ═══════════════════════════════════════════════════════════════════════════════════
# The nurseries, and the order in which they end: nobody new; the runs, and so their streams; the
# connections.


async def serve(
    settings: ServerSettings, *, analysis: Analysis | None = None,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop()` of the handle that `task_status` gets, then end in order.

    Cancelled, it ends at once: what is open is cut. A failed start is the OSError it was.
    """
    service = (settings.make_service or Service)(settings, analysis)
    listeners = await service.listen()
    service.port = listeners[0].socket.getsockname()[1]
    service.url = url_of(settings.host, service.port)
    context = WorkerContext(None)

    async with (
        trio.open_nursery() as clocks, cancelled_at_end(clocks),
        trio.open_nursery() as connections, trio.open_nursery() as runs,
    ):
        app = ASGIWrapper(service.open(runs, clocks))
        attend = partial(service.attend, app, context)

        async with trio.open_nursery() as accept:
            take = partial(trio.serve_listeners, attend, listeners, handler_nursery=connections)
            accept.start_soon(take, name="accept")
            task_status.started(service.handle())
            await service.stopping.wait()
            logger.info("stopping: first nobody new, then the runs, then their streams")
            accept.cancel_scope.cancel(reason="the server is stopping")

        service.hub.stop(Failure("the server was stopped", stage="shutdown"))
        await context.terminated.set()  # from here on no connection waits for another request
        connections.cancel_scope.deadline = trio.current_time() + settings.grace
        service.leave(by=connections.cancel_scope.deadline)


@contextlib.asynccontextmanager
async def cancelled_at_end(nursery: trio.Nursery) -> AsyncIterator[None]:
    """Cancel the nursery's tasks at the end: they never end by themselves."""
    yield
    nursery.cancel_scope.cancel(reason="nobody needs them any more")


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_until_signalled(
    settings: ServerSettings, greet: Callable[[Any, trio.Nursery], None] | None = None
) -> None:
    """The first SIGTERM or Ctrl-C ends the server in order, the second one at once. `greet` is a
    door: what else is said and done at the start."""

    async def to_its_end(*, task_status: trio.TaskStatus[Any]) -> None:
        await serve(settings, task_status=task_status)
        nursery.cancel_scope.cancel(reason="the server has stopped")

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(to_its_end, name="serve")
            print(f"Aura stream ready on {server.url}", flush=True)
            if greet is not None:
                greet(server, nursery)
            await anext(signals)
            server.stop()
            second = await anext(signals)  # an orderly stop cancels us here
            os._exit(128 + second)


# ═══ Part 2  The double ═══════════════════════════════════════════════════════════════════════════
# It goes wrong on purpose, at the exact byte, and says who closed first.


import argparse
import base64
import collections
import dataclasses
import difflib
import functools
import gc
import hmac
import http.client
import inspect
import io
import operator
import queue
import random
import shlex
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from email.utils import formatdate
from pathlib import Path
from typing import Annotated, NoReturn, get_args
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit

import h11
import msgspec
import quart.globals
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from werkzeug.exceptions import HTTPException

# ═══ 7  All settings ══════════════════════════════════════════════════════════════════════════════
# Every limit that somebody may want to move has its number here or in part 1, once. README and
# --help are readings of both. What may come from outside, from a flag to a script, is a kind: a
# type that msgspec checks. `checked` is the one door; what is wrong comes out as a sentence.


def number(kind: type, low: float, high: float) -> Any:
    return Annotated[kind, msgspec.Meta(ge=low, le=high)]


def like(pattern: str, says: str = "") -> Any:
    """A text of this form, from its first to its last character. What to call it stands in the
    pattern, as a comment: so it is in msgspec's message, and comes into ours."""
    says = says or f"a text like {pattern}"
    return Annotated[str, msgspec.Meta(pattern=rf"^(?#{says})({pattern})\Z")]


def of_size(size: int, kind: Any) -> Any:
    """A list or an object of so many parts."""
    return Annotated[kind, msgspec.Meta(min_length=size, max_length=size)]


def that(says: str, fits: Callable[[Any], object]) -> Any:
    """What fits, where no pattern can say it; what cannot even be asked does not fit."""

    class Kind(str):  # a text that fits is still a text
        def __init__(self, value: Any) -> None:
            with contextlib.suppress(Exception):
                if fits(value):
                    return
            raise ValueError(f"takes {says}")

    return Kind


def form(needs: str = "", /, *, strict: bool = True, **kinds: Any) -> Any:
    """An object of these fields, of which it needs these; others are wrong, or where that is not
    strict, nobody's business."""
    fields: Any = [
        (name, kind) if name in needs.split() else (name, kind, None)
        for name, kind in kinds.items()
    ]
    return msgspec.defstruct("form", fields, rename="kebab", forbid_unknown_fields=strict)


def list_of(part: str, example: str) -> Any:
    """A text of such parts, with commas between them."""
    return like(rf"(\s*({part})?\s*(,|\Z))*", f"a list like {example}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that have no flag: Python callers may set them. Each shows when it bites."""

    max_live_runs: int = 5000  # runs alive at once; one more is 503
    max_run_events: int = 100_000  # events kept of a run; the oldest go, viewers get `gap`
    max_run_bytes: int = 16 * 2**20  # bytes kept of a run, likewise
    max_ended_runs: int = 1000  # ended runs kept; the first to end is forgotten first
    send_buffer: int = 64 * 2**10  # SO_SNDBUF, what the kernel hides of a stalled viewer
    keep_alive: float = 5.0  # seconds an idle connection is kept
    head_timeout: float = 10.0  # seconds for a request's head, then 408
    max_head: int = 16 * 2**10  # bytes of a request's head, then 431
    body_timeout: float = 30.0  # seconds for a request's body, then 408
    max_body: int = 2**20  # bytes of a request's body, then 413
    linger: float = 2.0  # seconds in which a refused client's rest is read and thrown away
    max_linger: int = 16 * 2**20  # bytes of it; then the client meets a reset
    max_journal: int = 1000  # entries of the journal; the oldest go
    max_bindings: int = 1000  # bound scenarios that wait; one more is 409
    max_gates: int = 1000  # open gates; one more is 409


@dataclass(frozen=True, kw_only=True)
class DoubleSettings(ServerSettings, Limits):
    """Everything that can be set. A flag beats its environment variable, which beats the
    default. Beside its sentence a setting may have a variable that is not AURA_<NAME> (`env`),
    the values it may have (`choices`), or what else it must be (`kind`)."""

    auth: str = setting("on", "`on`: `/aura/**` needs any Bearer token", choices="on|off")
    admin_token: str = setting(
        "", "token for `/__aura` and `/api/admin`; empty: local callers only",
        env="ADMIN_TOKEN", repr=False)
    allow_host: str = setting(
        "", "names beside its own that it answers to: `a.test,b.test`",
        kind=list_of(r"[\w.-]+|\[[\da-fA-F:]+\]", "a.test,b.test"))
    cors_origin: str = setting(
        "localhost:*,127.0.0.1:*",
        "origins whose pages may read it; `:*` is any port, `*` anybody",
        kind=list_of(
            r"\*|([a-z]+://)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+|:\*)?",
            "localhost:*,https://a.test"))
    unknown_run: str = setting("404", "status of an unknown run's stream", choices="404|200")
    demo_off: bool = setting(
        False, "answer triggers with `disabled`, start nothing", env="DEMO_OFF")
    scenario: str = setting("", "the scenario where nobody chooses; empty: the ordinary one")
    scenarios: str = setting("", "a JSON file with scenarios of one's own, a list of them")
    case: str = setting("", "scenarios bound to cases: `85117=drop-resume,85118=failed`")
    no_magic: bool = setting(False, "a `~name` at the end of an id chooses no scenario")
    speed: str = setting(
        "1", "script time: so many times faster, or `max`: it jumps where all wait",
        kind=like(r"max|(?=[\d.]*[1-9])\d*\.?\d+(e[+-]?\d+)?", "a number above 0 or max"))
    max_retries: int = setting(
        10, "times that the page asks again without news", env="SSE_MAX_RETRIES")
    max_sse_connections: int = setting(
        1000, "streams open at once; one more is 503", env="MAX_SSE_CONNECTIONS")
    max_log_bytes: int = setting(
        256 * 2**20, "bytes kept of all runs together, their requests too")
    send_timeout: float = setting(
        5.0, "seconds a viewer may refuse to read; then its stream ends")
    exit_with_stdin: bool = setting(
        False, "stop when standard input closes, as a killed test's does")
    redis_url: str = setting(
        "", "not in this version: runs are kept in memory only", env="REDIS_URL")
    log_level: str = setting(
        "INFO", "DEBUG, INFO, WARNING or ERROR", env="LOG_LEVEL",
        kind=like("(?i:DEBUG|INFO|WARNING|ERROR)", "DEBUG, INFO, WARNING or ERROR"))

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            checked(kind_of(one), getattr(self, one.name), flag(one))
        # a secret's file ends in a line break; and one that is empty is no secret
        object.__setattr__(self, "admin_token", self.admin_token.strip())

    @property
    def rate(self) -> float:
        """Script seconds in a real one; infinite where script time jumps."""
        return math.inf if self.speed == "max" else min(float(self.speed), 1e6)

    @classmethod
    def read(cls, flags: Mapping[str, str], environment: Mapping[str, str]) -> DoubleSettings:
        """What flags and environment ask for; a ValueError is a sentence that names the culprit."""
        found = {}
        for one in flagged(cls):
            source = flag(one)
            text = flags.get(one.name)
            if text is None:
                source = variable(one)
                text = environment.get(source) or None  # set but empty, as in compose: unset
            if text is not None:
                text = YES_NO.get(text.lower(), text) if type(one.default) is bool else text
                found[one.name] = checked(kind_of(one), text, source, strict=False)
        return cls(**found)


# What most settings are: counts and bytes, or seconds.
SETTING = {int: number(int, 0, 10**12), float: number(float, 0, 10**7)}
YES_NO = {"yes": "true", "on": "true", "no": "false", "off": "false"}  # as people say it


def kind_of(one: dataclasses.Field[Any]) -> Any:
    """What this setting must be."""
    if one.name == "port":
        return number(int, 0, 65535)
    if "choices" in one.metadata:
        return like(one.metadata["choices"])
    return one.metadata.get("kind") or SETTING.get(type(one.default), type(one.default))


def parts(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part for part in map(str.strip, text.split(",")) if part]


def flagged(kind: Any) -> list[dataclasses.Field[Any]]:
    """The settings that have a flag and a variable."""
    return [one for one in dataclasses.fields(kind) if one.metadata]


def flag(one: dataclasses.Field[Any]) -> str:
    return "--" + one.name.replace("_", "-")


def variable(one: dataclasses.Field[Any]) -> str:
    return str(one.metadata.get("env") or f"AURA_{one.name.upper()}")


class Wrong(ValueError):
    """A value that is not what it must be: a sentence, and the path of keys that leads to it."""

    def __init__(self, says: str, *path: str) -> None:
        super().__init__(" ".join([*map(repr, path), says]))
        self.says = says
        self.path = path


def shown(value: Any) -> str:
    """A value in a message: as JSON, cut short."""
    return json.dumps(value, default=repr)[:60]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that says that this word is not known here."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word[:64], names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (there are {len(names)}: {', '.join(names[:20]) or 'none'})"


# msgspec's messages, and what they become.
OUR_WORDS = {
    r"`str` matching regex .*?\(\?#(.*?)\).*": r"\1",
    "Expected": "takes",
    ", got .*": "",
    r"\bint\b": "a whole number",
    "float": "a number",
    r"\bstr\b": "a text",
    "object`": "an object`",
    "array": "a list",
    "bool": "true or false",
    "null": "no argument",
    r" \| ": " or ",
    "Object missing required field `(.*)`": r"needs '\1'",
    "`": "",
}


def checked(kind: Any, value: Any, *place: str, strict: bool = True) -> Any:
    """The value as this kind; or what is Wrong with it, in msgspec's words made ours."""
    try:
        return msgspec.convert(value, kind, strict=strict, dec_hook=lambda own, part: own(part))
    except (msgspec.ValidationError, ValueError) as error:  # a ValueError: half a character
        says, _, where = str(error).replace("`key` in ", "").partition(" - at `$")
    path = re.findall(r"[\w-]+", where)
    unknown = re.search("unknown field `(.*)`", says, re.DOTALL)
    if unknown:
        forms = [getattr(one, "__struct_encode_fields__", ()) for one in (kind, *get_args(kind))]
        close = did_you_mean(unknown[1], itertools.chain(*forms))
        raise Wrong(f"has no {unknown[1][:64]!r}{close}", *place, *path)
    for theirs, ours in OUR_WORDS.items():
        says = re.sub(theirs, ours, says)
    if says.startswith("takes"):
        says += f", not {shown(inside(value, *path))}"
    raise Wrong(says, *place, *path)


def inside(value: Any, *path: str) -> Any:
    """What lies at the end of a path of keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ═══ 8  Reading events ════════════════════════════════════════════════════════════════════════════
# The wire format, and nothing else. What a client parses is what the analysis said, for any input.

def comment(text: str) -> bytes:
    """A comment: keeps connections warm, and no client sees it."""
    return to_bytes("".join(f": {line}\n" for line in LINE_END.split(text)) + "\n")


def read_events(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(id, name, data) of every event in these whole lines, as the WHATWG parser would dispatch
    them."""
    last_id = name = ""
    data: list[str] = []
    for line in lines:
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield last_id, name or "message", "\n".join(data)
            name, data = "", []
        elif key == "data":
            data.append(value)
        elif key == "event":
            name = value
        elif key == "id" and "\0" not in value:
            last_id = value


# ═══ 9  Script time ═══════════════════════════════════════════════════════════════════════════════
# Script time is what sleeps, heartbeats and idle time-outs are measured in. Deadlines that protect
# the server are Trio's own, and never move with it: a clock that jumps 300 s for a test must not
# evict every reader on the way.

MOMENT = 0.02  # real seconds that whoever was stirred gets before time jumps
FASTEST = 1000.0  # or less: a jump never takes longer than it would at this speed
STOPS = 1000  # deadlines that an advance stops at, one after the other; then it goes on at once


class ScriptClock:
    """Script time: as fast as the wall clock, so many times faster, or (at `math.inf`) jumping to
    what is due next; and moved ahead by hand whenever somebody wishes."""

    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate
        self.pace = 1.0 if rate == math.inf else rate
        self.ahead = 0.0  # how far it was moved
        self.waiting: set[ScriptDeadline] = set()
        self._wanted = trio.Event()
        self._moving = trio.Lock()
        self._stirred = 0.0

    def now(self) -> float:
        return trio.current_time() * self.pace + self.ahead

    async def sleep(self, seconds: float) -> None:
        with self.limit(seconds):
            await trio.sleep_forever()

    def limit(self, seconds: float, *, jump: bool = True) -> ScriptDeadline:
        """A cancel scope, like `trio.move_on_after`, whose deadline is in script time; worth a
        jump, or not: then it fires when a jump comes past."""
        return ScriptDeadline(self, self.now() + seconds, jump)

    async def advance(self, seconds: float) -> None:
        """Move script time ahead, from one deadline to the next, so that each comes in its turn;
        where that takes too long, the rest at once. One moves it at a time."""
        async with self._moving:
            target = self.now() + seconds
            stops = iter(range(STOPS))
            with trio.move_on_after(5):
                while self.now() < target and next(stops, None) is not None:
                    self._go_to(min(self._next_due(), target))
                    await all_wait()  # whoever is next shall find what this has woken
            self._go_to(target)

    def stir(self) -> None:
        """Somebody has begun to wait, or done waiting: a run that starts, a viewer that comes."""
        self._stirred = time.perf_counter()
        self._wanted.set()

    async def jump(self) -> None:
        """Whenever nobody can go on but by waiting, go to the next deadline; for ever. Who has been
        stirred gets a moment first; bytes that are no request yet do not prolong it."""
        while True:
            await all_wait()
            due = self._next_due(jump=True)
            moment = min(MOMENT, (due - self.now()) / FASTEST)
            if due == math.inf:
                self._wanted = trio.Event()
                await self._wanted.wait()
            elif time.perf_counter() < self._stirred + moment - 0.001:  # the kernel's shortest
                await all_wait(0.001)
            else:
                self._go_to(min(due, self._next_due()))

    def _next_due(self, *, jump: bool = False) -> float:
        """The next deadline, or only of those worth a jump; what is due by now wakes by itself."""
        now = self.now()
        worth = (one for one in self.waiting if one.jump or not jump)
        return min((one.deadline for one in worth if one.deadline > now), default=math.inf)

    def _go_to(self, moment: float) -> None:
        """Whatever is due then wakes now, and what is not yet has less to wait."""
        self.ahead += max(0.0, moment - self.now())
        for limit in self.waiting:
            limit.move(limit.deadline)


async def all_wait(seconds: float = 0.0) -> None:
    """Wait until, for that long, every task does."""
    from trio.testing import wait_all_tasks_blocked  # here, for it imports pytest if there is one

    await wait_all_tasks_blocked(seconds)


class ScriptDeadline:
    """`with` gives the Trio cancel scope; ask it for `cancelled_caught` afterwards."""

    def __init__(self, clock: ScriptClock, deadline: float, jump: bool) -> None:
        self._clock = clock
        self.jump = jump
        self.scope = trio.CancelScope()
        self.move(deadline)

    def move(self, deadline: float) -> None:
        """Have this deadline from now on; on Trio's clock, it is when script time gets there."""
        self.deadline = deadline
        self.scope.deadline = (deadline - self._clock.ahead) / self._clock.pace

    def __enter__(self) -> trio.CancelScope:
        self._clock.waiting.add(self)
        self._clock.stir()
        return self.scope.__enter__()

    def __exit__(self, *error: Any) -> bool:
        self._clock.waiting.discard(self)
        self._clock.stir()
        return self.scope.__exit__(*error)


# ═══ 10  Scripts ══════════════════════════════════════════════════════════════════════════════════
# What a run says and how a stream is served, as data: a list of steps, each one verb and its
# argument. It is checked whole before it runs: a parsed script always plays; it may still misbehave
# on purpose.


@dataclass(eq=False)
class Mistake(ValueError):
    """A script that cannot be played: where, which step, and what to write instead."""

    at: str
    step: object
    hint: str

    def __str__(self) -> str:
        return f"{self.at}: {self.hint}"


UNIX = '{"unix": "{now}"}'  # in data: the seconds of now, as a number
UNIX_TIME = json.loads(UNIX)
TEMPLATE = re.compile(UNIX + r"|\{\{|\{(?:runId|caseId|tenantId|now|n)\}")
MOST_TURNS = 1_000_000  # of all repeats of a script: more is not a test but a typing error
MOST_STEPS = 5000  # of a script as written: checking more would hold up everybody else
DEEPEST = 64  # levels of nesting in JSON from outside: Python's recursion limit would be a 500
MOST_VALUES = 100_000  # in JSON from outside: a megabyte of `[],` holds up everybody for long

# What verbs take.
Line = like(r"[^\r\n\0]*", "one line without NUL")
Visible: Any = like(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", "visible ASCII, or none at all")
HeaderName: Any = like(
    r"(?i:(?!(content-length|transfer-encoding|date)\Z)[!#$%&'*+.^_`|~0-9a-z-]+)",
    "a name a header can have, and not one of the server's own")
Headers: Any = dict[HeaderName, Visible | None]
Count = number(int, 0, 10**9)
Some = number(int, 1, 10**9)
Above0 = number(float, 0.001, 10**9)
Length: Any = number(float, 0, 10**9)
Seconds: Any = Length | of_size(2, list[Length])
Code: Any = like("hex|base64")
Raw: Any = str | of_size(1, dict[Code, str])


# The language: for a new verb a row in here, and a method of its name. Those in the first two
# tables are silent: they put nothing out, so that the head may still come.
_WAITS = {
    "sleep": Seconds,
    "wait": str,
}
_SHAPES = {
    "heartbeat": like("never") | Above0 | form("every", every=Above0, event=Line, data=Any) | None,
    "frame": form(newline=like(r"\n|\r\n|\r"), id=Line | None, id_first=bool, wrap=Line),
    "chunk": like("utf8|line") | Some,
    "buffer": like("all") | Some,
    "flush": None,
}
_EVERYWHERE = {
    **_WAITS,
    "repeat": number(int, 0, MOST_TURNS),
    "hang": None,
}
_ANSWERS = {
    **_EVERYWHERE,
    "open": form(status=number(int, 200, 599), headers=Headers, body=Any),
    "raw": Raw,
    "end": None,
    "drop": None,
    "reset": None,
}
_EVENT = {"data": Any, "event": Line, "retry": Count}
VERBS = {  # of each kind of script, and what they take
    "run": {
        **_EVERYWHERE,
        "event": form("data", **_EVENT),
        "ordinary": like("phase2|phase3|generation") | None,
        "fail": str | form("error", error=str, stage=str, code=str, retryable=bool),
        "crash": str,
    },
    "trigger": _ANSWERS,
    "stream": {
        **_ANSWERS,
        **_SHAPES,
        "event": form("data", **_EVENT, id=Line),
        "comment": str,
        "relay": like("all") | Count | form("until", until=str),
    },
}
MODIFIERS = {
    "event": form(pad=number(int, 0, 2**23)),
    "wait": form(within=Seconds),
    "repeat": form("steps", steps=list),
    "relay": form(every=Seconds, within=Seconds, shared=bool, cut=Length),
    "chunk": form(every=Seconds),
}
NO_MODIFIERS = form()


@dataclass(frozen=True)
class Step:
    """One checked step."""

    verb: str
    argument: Any = None
    modifiers: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @functools.cached_property
    def ready(self) -> Event | bytes | None:
        """What it sends, encoded once: if it has no pad, and is the same each time."""
        says = self.verb in MAKERS and "pad" not in self.modifiers
        same = says and not TEMPLATE.search(to_json(self.argument))
        return MAKERS[self.verb](self.argument) if same else None


Script = tuple[Step, ...]


def parse_script(
    value: Any, place: str, at: str = "", *, left: Iterator[int] | None = None, begun: bool = False
) -> Script:
    """A script as it may be played in this place, or the Mistake in it. `left` counts how many
    steps it may have; `begun`, if something was put out before it."""
    at = at or place
    left = left or iter(range(MOST_STEPS))
    if not isinstance(value, list):
        raise Mistake(at, value, f"a script is a list of steps, not {shown(value)}")
    script = []
    for (index, item), _ in zip(enumerate(value), left, strict=False):
        step = _parse_step(item, place, f"{at}[{index}]", left, begun)
        begun = begun or step.verb not in (*_WAITS, *_SHAPES)
        script.append(step)
    if len(script) < len(value):
        raise Mistake(at, None, f"more than {MOST_STEPS:,} steps are too many; 'repeat' is shorter")
    if _turns(script) > MOST_TURNS:
        raise Mistake(at, None, f"repeats more than {MOST_TURNS:,} turns; nested turns multiply")
    return tuple(script)


def _turns(script: Iterable[Step]) -> int:
    """How many turns all repeats in it have; those of nested ones multiply."""
    loops = [step for step in script if step.verb == "repeat"]
    return sum(step.argument * max(1, _turns(step.steps)) for step in loops)


def _parse_step(item: Any, place: str, at: str, left: Iterator[int], begun: bool) -> Step:
    alone: Any = {} if item in ("open", "frame") else None
    try:
        modifiers = {item: alone} if isinstance(item, str) else item
        name = _verb_of(modifiers, place)
        modifiers = dict(modifiers)
        argument = modifiers.pop(name)
        checked(VERBS[place][name], argument, name)
        checked(MODIFIERS.get(name, NO_MODIFIERS), modifiers, name)
        if "pad" in modifiers:  # it adds a field to it
            checked(dict, argument["data"], name, "data")
        if name == "raw":
            raw_bytes(argument)
        if name == "open" and begun:
            raise Wrong("comes once and before all output", name)
    except ValueError as wrong:
        raise Mistake(at, item, str(wrong)) from None
    steps = parse_script(modifiers.get("steps", []), place, f"{at}.steps", left=left, begun=True)
    return Step(name, argument, modifiers, steps)


def _verb_of(step: Any, place: str) -> str:
    """The one verb in a step, which may stand in this place."""
    if not isinstance(step, dict) or not step:
        raise Wrong(f'a step is a verb or {{"verb": argument}}, not {shown(step)}')
    homes = {
        word: " or ".join(home for home in VERBS if word in VERBS[home]) for word in step
    }
    name, *more = [word for word in step if homes[word]] or [*step][:1]
    if more:
        raise Wrong(f"one verb in a step, not {name!r} and {more[0]!r}")
    if not homes[name]:
        raise Wrong(f"unknown step {name[:64]!r}{did_you_mean(name, VERBS[place])}")
    if name not in VERBS[place]:
        raise Wrong(f"belongs in a {homes[name]} script, this is a {place} script", name)
    return str(name)


def made_event(argument: Any, pad: int | None = None) -> Event:
    """The event of a step. A pad is put in as bytes: to look through megabytes of text would hold
    everybody up."""
    data = argument["data"] if pad is None else {**argument["data"], "pad": ""}
    event = Event(in_one_line(argument.get("event", "")), data, argument.get("retry"))
    if pad:
        before, name, behind = event.block.rpartition(b'"pad": "')
        object.__setattr__(event, "block", b"".join([before, name, b"x" * pad, behind]))
    return event


def raw_bytes(value: Any) -> bytes:
    """The bytes that a `raw` step means; a ValueError, if they do not decode."""
    match value:
        case {"hex": text}:
            return bytes.fromhex(text)
        case {"base64": text}:
            return base64.b64decode(text, validate=True)
    return to_bytes(value)


def in_one_line(text: str, unfit: str = "[\r\n\0]") -> str:
    """What a template has made, fit for a name or an id: a line break in it is percent-encoded."""
    return re.sub(unfit, lambda found: quote(found[0], errors="replace"), text)


def one_line(value: str) -> bytes:
    """A header's value on the wire: a template may have put anything into it."""
    return in_one_line(value, "[^ -~]").encode()


MAKERS: dict[str, Callable[..., Event | bytes]] = {
    "event": made_event, "comment": comment, "raw": raw_bytes,
}


class Gates:
    """What scripts wait at: opened by a signal, for one run or for all, and for good; at most so
    many, then somebody has forgotten to reset."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = set[tuple[str, str | None]]()
        self._news = trio.Event()
        self.one_by_one = trio.Lock()  # for big events: a hundred runs shall not hold one each

    def signal(self, gate: str, run_id: str | None = None) -> bool:
        """Open the gate; False if too many are open already."""
        if len(self.open | {(gate, run_id)}) > self.most:
            return False
        self.open.add((gate, run_id))
        self._news.set()
        self._news = trio.Event()
        return True

    async def wait(self, gate: str, run_id: str | None) -> None:
        while not self.open & {(gate, run_id), (gate, None)}:
            await self._news.wait()


@dataclass(eq=False)
class ScriptPlayer:
    """Plays a script: one step after the other, each by the method that has its verb's name."""

    clock: Any
    gates: Gates
    words: Mapping[str, str]  # what stands in the place of each template
    seed: Any
    _turn = 0  # of the innermost repeat
    _random: random.Random | None = None  # made on first need
    _breath: float = field(default_factory=time.perf_counter)

    async def play(self, script: Script) -> None:
        for step in script:
            if time.perf_counter() - self._breath > 0.001:  # a step is a checkpoint, at most once
                await trio.lowlevel.checkpoint()  # a millisecond: else every batch is one event
                self._breath = time.perf_counter()
            await getattr(self, step.verb)(step)

    async def rest(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Await this; a stream has heartbeats meanwhile, and may begin it anew after one."""
        await wait()

    async def sleep(self, step: Step) -> None:
        with self.clock.limit(self.draw(step.argument)):
            await self.rest(trio.sleep_forever)

    async def wait(self, step: Step) -> None:
        """Wait until somebody signals the gate, or `within` is over."""
        gate = self.fill(step.argument)
        at_the_gate = partial(self.gates.wait, gate, self.words.get("{runId}"))
        with self.clock.limit(self.draw(step.modifiers.get("within", math.inf))):
            await self.rest(at_the_gate)

    async def hang(self, step: Step) -> None:
        """Say nothing more."""
        await trio.sleep_forever()

    async def repeat(self, step: Step) -> None:
        outer = self._turn
        for self._turn in range(1, step.argument + 1 if step.steps else 1):
            await self.play(step.steps)
        self._turn = outer

    def made(self, step: Step) -> Any:
        """What the step sends: made beforehand, or now, its templates filled in."""
        return step.ready or MAKERS[step.verb](self.fill(step.argument), **step.modifiers)

    def draw(self, length: Any) -> float:
        """Seconds; a range is drawn from the scenario's own generator, made on first need."""
        if not isinstance(length, list):
            return float(length)
        self._random = self._random or random.Random(self.seed)
        return self._random.uniform(*length)

    def fill(self, value: Any) -> Any:
        """The value with its templates filled in: in its JSON, for only texts can hold any."""
        return json.loads(TEMPLATE.sub(self._name, to_json(value)))

    def _name(self, found: re.Match[str]) -> str:
        """What stands in the place of a template, as JSON has it in a text."""
        moment = {"{now}": now_iso(), UNIX: str(int(time.time()))}
        known = {"{{": "{", "{n}": str(self._turn), **moment, **self.words}
        return to_json(known[found[0]])[1:-1]


class Attempts(NamedTuple):
    """The script of each attempt: the last one repeats, or they go round."""

    scripts: tuple[Script, ...]
    cycle: bool = False

    def of(self, attempt: int) -> Script:
        last = len(self.scripts)
        return self.scripts[(attempt - 1) % last if self.cycle else min(attempt, last) - 1]

    def repeats(self, attempt: int) -> bool:
        """Whether all its scripts have had their turn, and the last one comes again."""
        return attempt > len(self.scripts) and not self.cycle


def parse_attempts(value: Any, place: str) -> Attempts:
    """A script, a list of them, or a cycle."""
    cycle = isinstance(value, dict) and [*value] == ["cycle"]
    scripts = value["cycle"] if cycle else value
    at = f"{place}.cycle" if cycle else place
    if not (isinstance(scripts, list) and scripts and (cycle or isinstance(scripts[0], list))):
        return Attempts((parse_script(scripts, place, at),))
    left = iter(range(MOST_STEPS))
    parsed = [
        parse_script(one, place, f"{at}[{index}]", left=left)
        for index, one in enumerate(scripts)
    ]
    return Attempts(tuple(parsed), cycle)


def levels(value: Any) -> Iterator[list[Any]]:
    """What is in a JSON value, level by level: recursion is what this is to protect."""
    level = [value]
    while level:
        yield level
        inner = (part.values() if isinstance(part, dict) else part for part in level
                 if isinstance(part, (dict, list)))
        level = [part for parts in inner for part in parts]


def weight(value: Any) -> int:
    """The bytes a JSON value takes here: a list of nothing is two there and 64 in Python."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    inner = sum(map(weight, parts)) if isinstance(parts, list) else 0
    return sys.getsizeof(value) + inner


@dataclass(frozen=True)
class Scenario:
    """A named way for things to go. A script it does not have is the ordinary one."""

    name: str
    run: Script | None = None
    trigger: Attempts | None = None
    stream: Attempts | None = None
    source: Mapping[str, Any] = field(default_factory=dict)  # two are the same if this is

    @property
    def doc(self) -> str:
        return str(self.source.get("doc", ""))

    @property
    def seed(self) -> Any:
        return self.source.get("seed", self.name)

    @functools.cached_property
    def weight(self) -> int:
        """The bytes it takes, about: as JSON, and once more as steps and what they will send."""
        return 2 * weight(self.source)


SCENARIO = form(
    "name", name=like("[a-z0-9-]{1,64}", "1 to 64 of a-z, 0-9 and -"),
    doc=str, seed=int | float | str, run=Any, trigger=Any, stream=Any)
PARSERS: Any = {"run": parse_script, "trigger": parse_attempts, "stream": parse_attempts}


def parse_scenario(value: Any, *, needs: str = "name") -> Scenario:
    """A scenario from JSON, or the Mistake in it."""
    try:
        checked(SCENARIO, value)
        if not value.get(needs):
            raise Wrong(f"in a catalogue needs {needs!r}: the symptom, and what the client sees")
    except Wrong as wrong:
        raise Mistake("scenario", value, f"a scenario {wrong}") from None
    scripts = {place: parse(value[place], place) for place, parse in PARSERS.items()
               if place in value}
    return Scenario(value["name"], source=value, **scripts)


# The ordinary scripts. Small functions fill them from the request; nothing else is special.


FOREIGN = re.compile(  # what asyncio without its loop, and Trio and Python of it, say
    "event loop|yield message|create_future|can't be (used in 'await'|awaited)")
UPSTREAM = (  # where the errors of HTTP clients have what was asked, and what came
    ("url", "request.url"), ("url", "response.url"), ("url", "url"),
    ("status", "response.status_code"), ("status", "code"),
)


def explained(error: BaseException) -> Failure:
    """What an exception says to a person: its class, its message, and of a call to somebody else
    its URL and status. It may be of somebody's own making, and anything in it may raise."""
    error = innermost(error)
    with contextlib.suppress(Exception):
        if isinstance(error, Failure):
            stage, code, again = error.stage, error.code, error.retryable
            return Failure(error.error, stage=stage, code=code, retryable=again)
    text = type(error).__name__
    with contextlib.suppress(Exception):
        text += f": {error}"
    if FOREIGN.search(text):
        text += "; an analysis runs on Trio: `async def`, awaiting Trio or anyio, not asyncio"
    for what, path in UPSTREAM:
        with contextlib.suppress(Exception):
            found = str(operator.attrgetter(path)(error) or text)
            text += f" ({what} {found})" if found not in text else ""
    return Failure(text[:2000], retryable=False)


def innermost(error: BaseException) -> BaseException:
    """The first exception in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(frozen=True)
class ScriptedInfo(RunInfo):
    """Beside what an analysis may know: whose test it is, and what its request weighs."""

    test_id: str | None = None
    weight: int = 0  # bytes, about, that its request takes here
    kept: int = 0  # and of them, when it has ended


def words_of(whose: Any) -> dict[str, str]:
    """What templates may name, of a run's facts or of a request's entry."""
    ids = {"{runId}": whose.run_id, "{caseId}": whose.case_id, "{tenantId}": whose.tenant_id}
    return {name: value or "" for name, value in ids.items()}


HELLO = {"comment": "connected"}
REST = {"relay": "all"}
BYE = {"raw": DONE.decode()}


def ordinary_stream(settings: DoubleSettings, beat: Any = "heartbeat", *first: Any) -> Script:
    """How a stream is served when nobody asked for trouble."""
    retry = [{"raw": f"retry: {settings.retry_ms}\n\n"}] if settings.retry_ms else []
    return parse_script([*first, HELLO, *retry, beat, REST, BYE], "stream")


JOB_FRAME = {"id": "{runId}_{n}"}
JOB_BEAT = {"event": "heartbeat", "data": {
    "type": "heartbeat", "timestamp": "{now}", "server_time": UNIX_TIME, "jobId": "{runId}"}}


def job_stream(settings: DoubleSettings) -> Script:
    """How a generation job is: its ids have its name in front, its heartbeats are events, and it
    has no [DONE], for its front end parses every message."""
    frame = [{"frame": JOB_FRAME}] if settings.event_ids else []
    beat: Any = {"every": max(settings.heartbeat, 0.001), **JOB_BEAT}
    beat = {"heartbeat": beat if settings.heartbeat else "never"}
    return ordinary_stream(settings, beat, *frame)[:-1]


EVIDENCE = {  # what Phase2 finds in its request, and where; documents are quoted, the rest counted
    "DOC_HEADER": "document.header", "DOC_ITEM": "document.items", "OPEN_ITEMS": "openItems",
    "LINEAGE": "lineage", "PARTY_IDS": "partyIds", "POLICIES": "policies",
}
AMOUNTS = ("amount", "totalAmount", "document.header.amount")  # the first number counts


def assessed(info: RunInfo) -> Findings:
    """What Phase2 finds in its request's evidence, at most 30 items; and how unusual it is, by the
    amount in it."""
    evidence = info.body.get("evidence")
    items, anomaly = assumed(info)
    found: list[dict[str, Any]] = []
    for kind, path in EVIDENCE.items():
        part = inside(evidence, *path.split("."))
        rows = part if isinstance(part, list) else [part]
        told = [{"content": row} for row in rows[:30]] if "DOC" in kind else [{"count": len(rows)}]
        found += [{"type": kind, "source": path, **more} for more in told if part]
    values = [inside(evidence, *path.split(".")) for path in AMOUNTS]
    amounts = [value for value in values if type(value) in (int, float)]
    if amounts:
        anomaly = min(0.95, 0.3 + min(max(amounts[0], 0), 1e9) / 1e6 * 0.2)
    return found[:30] or items, anomaly


async def generation(info: Any, sending: Sending) -> None:
    """The ordinary generation job: 2 s a step, where the events of a run are 0.15 s apart."""
    say = speech(dataclasses.replace(info, event_delay=info.event_delay * 2 / 0.15), sending)
    text = (info.body.get("description") or info.run_id)[:2000]
    job = {"jobId": info.run_id}
    for value in (10, 25, 40, 60, 75, 90, 100):
        now = {"value": value, "currentStep": f"step {value}", "estimatedTime": 20 - value // 5}
        await say("progress", type="progress", **job, **now, metadata={})
        if value in (40, 75):
            now = {"isPartial": True, "wordCount": value, "estimatedTokens": 2 * value}
            await say("preview", type="preview", **job, markdown=text, **now)
    result = {"markdown": text, "tokens": 200}
    await say("completed", type="completed", **job, result=result)


def failed_job(info: ScriptedInfo, failure: Failure) -> dict[str, Any]:
    why = {"code": failure.code, "message": failure.error, "retryable": failure.retryable}
    return {"type": "failed", "jobId": info.run_id, "error": why}


class Phase(NamedTuple):
    """What differs between kinds of analysis: the ordinary scenario, its scripts, its last
    word."""

    scenario: str
    analysis: Analysis
    failed: Callable[[Any, Failure], dict[str, Any]]
    stream: Callable[[DoubleSettings], Script] = ordinary_stream


PHASES = {
    "phase2": Phase("ok", partial(phase2, assess=assessed), failed2),
    "phase3": Phase("phase3", phase3, failed3),
    "generation": Phase("generation", generation, failed_job, job_stream),
}


class AtGate(NamedTuple):
    """What a performance sends before it waits at a gate (True), and behind it (False): so the
    idle time-out knows when to stand still."""

    waits: bool


@dataclass(eq=False, kw_only=True)
class Performance(ScriptPlayer):
    """Plays a run script: an analysis made of data."""

    info: ScriptedInfo
    sending: Sending
    own: Analysis | None  # one that takes the place of the ordinary ones

    async def event(self, step: Step) -> None:
        if "pad" in step.modifiers:
            async with self.gates.one_by_one:
                await self.sending.send(self.made(step))
        else:
            try:
                self.sending.send_nowait(self.made(step))  # as `send`, but one coroutine less
            except trio.WouldBlock:
                await self.sending.send(self.made(step))

    async def wait(self, step: Step) -> None:
        await self.sending.send(AtGate(True))
        await super().wait(step)
        await self.sending.send(AtGate(False))

    async def ordinary(self, step: Step) -> None:
        """The analysis of this phase; or the one that was passed in, which takes its place."""
        own = None if step.argument else self.own
        analysis = own or PHASES[step.argument or self.info.phase].analysis
        await analysis(self.info, self.sending)

    async def fail(self, step: Step) -> NoReturn:
        said = self.fill(step.argument)
        raise Failure(said) if isinstance(said, str) else Failure(**said)

    async def crash(self, step: Step) -> NoReturn:
        raise RuntimeError(self.fill(step.argument))


def scripted(scenario: Scenario, gates: Gates, own: Analysis | None = None) -> Analysis:
    """The analysis that plays this scenario's run script."""
    script = (Step("ordinary"),) if scenario.run is None else scenario.run

    async def analysis(info: ScriptedInfo, sending: Sending) -> None:
        at = (info.clock, gates, words_of(info), scenario.seed)
        await Performance(*at, info=info, sending=sending, own=own).play(script)

    return analysis


# ═══ 11  Journal ══════════════════════════════════════════════════════════════════════════════════
# One entry per request, begun when it begins, closed once. The log lines are a reading of it.


def many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def indented(text: str) -> str:
    """The text so that none of its lines can be taken for a line of a log."""
    return "\n  ".join(map(printable, text.splitlines()))


def traced(error: BaseException) -> str:
    """Its traceback for a log, whoever formats that: an exception's text comes from outside."""
    with contextlib.suppress(Exception):  # one of somebody's own may defy being written out
        return "\n  " + indented("".join(traceback.format_exception(error))[:10_000])
    return ""


SHOWN = (  # of a request's headers
    b"accept", b"authorization", b"upgrade", b"user-agent", b"origin", b"cache-control",
    b"x-dwp-source", b"x-dwp-caller-type", b"x-trace-id", b"x-forwarded-for",
)
KNOWN_EVENTS = (
    "started", "step", "evidence", "confidence", "proposal", "completed", "failed", "agent",
    "progress", "preview",
)  # of the contract; what a scenario or an analysis makes up is `other`
BEAT = ": heartbeat"  # stands among the names of events; no event has this one
RECORDED = (
    *SHOWN, b"x-request-id", b"x-tenant-id", b"x-user-id", b"x-agent-id", b"x-test-id",
)


@dataclass(slots=True, kw_only=True)
class Entry(Record):
    """One request: who asked, what was delivered, who closed first."""

    method: str
    path: str
    client: str
    request_id: str
    seq: int = 0
    kind: str = "request"
    test_id: str | None = None
    attempt: int | None = None
    scenario: str | None = None
    seed: Any = None
    http_version: str = "1.1"
    tenant_id: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    headers: Mapping[bytes, str] = field(default_factory=dict)  # an allow-list: no credentials
    last_event_id: str | None = None
    status: int = 0
    chunks: int = 0
    heartbeats: int = 0
    wall: str = field(default_factory=now_iso)
    notes: list[str] = field(default_factory=list)  # what else a reader should know
    pattern: str = "other"  # of the route's path
    trace_id: str | None = None  # of a request to the gateway's face
    tally: collections.Counter[str] = field(default_factory=collections.Counter)  # of all sent
    due: int = 0  # events of the log that this stream should have brought, once it has ended
    counted: collections.Counter[str] = field(default_factory=collections.Counter)  # by metrics
    first_event: float | None = None
    step: int | None = None  # of the script, where it is now
    first_byte: float | None = None
    closed: float | None = None

    def finish(self, end: Ending) -> None:
        self.end = self.end or end._replace(step=self.step)

    def plays(self, scenario: Scenario, attempt: int) -> None:
        """Which scenario answers this request, and which attempt at it this is."""
        self.scenario = scenario.name
        self.seed = scenario.seed
        self.attempt = attempt

    def carried(self, chunks: int, size: int, tally: Mapping[str, int], last: int | None) -> None:
        """So many chunks and bytes went out, and in them events of these names, the last one with
        this id."""
        if self.first_byte is None:
            self.first_byte = trio.current_time()
            if self.streams:
                self.say_first()
        self.chunks += chunks
        self.bytes += size
        self.last_id_sent = self.last_id_sent if last is None else last
        for name, count in tally.items():
            if name == BEAT:
                self.heartbeats += count
                continue
            self.events += count
            self.tally[name if name in KNOWN_EVENTS else "other"] += count
            if self.first_event is None:
                self.first_event = trio.current_time()

    @property
    def streams(self) -> bool:
        """Whether this is a stream for which a script plays; our own refusals are none."""
        return self.kind == "stream" and self.attempt is not None

    @property
    def said(self) -> str:
        """Who closed first, in one sentence."""
        if self.end is None:
            return f"still open after {self.events} events, {self.bytes} bytes"
        act = ACTS.get(self.end[:2], f"{self.end.by}: {self.end.how}")
        scripted = self.scenario is not None and self.end.step is not None
        place = f" (step {self.end.step} of {self.scenario})" if scripted else ""
        count = f"{many(self.events, 'event')}, {self.bytes} bytes"
        why = [self.end.reason] * (self.end.how in ("stalled", "cancelled", "error")) + self.notes
        return "; ".join([f"{act}{place} after {count}", *why])


ACTS = {
    ("server", "end"): "the server ended the answer properly",
    ("server", "drop"): "the server dropped the connection on purpose",
    ("server", "reset"): "the server reset the connection on purpose",
    ("server", "error"): "the server broke off",
    ("client", "disconnect"): "the client closed the connection",
    ("client", "stalled"): "the client stopped reading and was cut off",
    ("shutdown", "cancelled"): "the stopping server cut the connection",
    ("admin", "end"): "an operator ended the stream properly",
    ("admin", "drop"): "an operator dropped the connection",
    ("admin", "reset"): "an operator reset the connection",
}
SHOWN_FIELDS = (  # of an entry
    "seq", "kind", "run_id", "case_id", "test_id", "attempt", "scenario", "seed", "method", "path",
    "client", "http_version", "tenant_id", "user_id", "agent_id", "headers", "last_event_id",
    "resumed_after", "status", "chunks", "bytes", "events", "heartbeats", "last_id_sent", "wall",
)


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


class Journal:
    """What happened to every request: the latest, and a way to wait for the next."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.began = trio.current_time()
        self.tally = collections.Counter[str]()  # all requests count their events' names here
        self.count: Callable[[Entry], object] = id  # what counts requests that are over, if any
        self._entries: dict[int, Entry] = {}
        self._seq = 0
        self._news = trio.Event()

    def open(self, entry: Entry, *, kept: bool = True) -> None:
        """A request has begun; its entry fills while it lasts, and is kept, or only counted."""
        entry.tally = self.tally
        if not kept:
            return
        self._seq += 1
        entry.seq = self._seq
        self._entries[entry.seq] = entry
        if len(self._entries) > self.most:
            del self._entries[next(iter(self._entries))]
            if self._seq == self.most + 1:
                logger.info("the journal is full at %d entries: the oldest go", self.most)

    def close(self, entry: Entry) -> None:
        """The last word on a request: its log lines, its part of the sums, news for who waits."""
        entry.closed = trio.current_time()
        self.count(entry)
        if entry.kind == "stream":
            entry.say_who_closed()
            if (entry.end or LEFT).by == "client":
                logger.warning("SSE connection lost for client %s", entry.client)
        told = (entry.request_id, entry.method, safe(entry.path), entry.status)
        duration = entry.closed - entry.opened
        logger.info("[%s] %s %s - Status: %d - Duration: %.3fs", *told, duration)
        self._news.set()
        self._news = trio.Event()

    def find(self, wanted: Mapping[str, Any], *, since: int = 0) -> list[Entry]:
        """The entries after this one whose fields have these values, oldest first; None is any."""
        return [
            entry for entry in self._entries.values()
            if entry.seq > since
            and all(value in (None, getattr(entry, name)) for name, value in wanted.items())
        ]

    async def wait(
        self, count: int, wanted: Mapping[str, Any], *, since: int, within: float
    ) -> list[Entry]:
        """The first `count` finished ones that match; what there is if they do not come in
        time."""
        def finished() -> list[Entry]:
            found = self.find(wanted, since=since)
            return [entry for entry in found if entry.closed is not None]

        with trio.move_on_after(within):
            while len(finished()) < count:
                await self._news.wait()
        return finished()[:count]

    def forget(self, test_id: str | None = None) -> None:
        """All entries, or those of one test; what is still open is not written down again."""
        for entry in self.find({"test_id": test_id}):
            del self._entries[entry.seq]

    def show(self, entry: Entry) -> dict[str, Any]:
        """The entry as JSON; times are seconds since the server's start."""
        moments = {"open": entry.opened, "firstByte": entry.first_byte, "end": entry.closed}
        told = {camel(name): getattr(entry, name) for name in SHOWN_FIELDS}
        told["headers"] = {name.decode(): entry.headers.get(name) for name in SHOWN}
        told["t"] = {name: at and round(at - self.began, 3) for name, at in moments.items()}
        told["latency"] = round((entry.closed or trio.current_time()) - entry.opened, 3)
        told["end"] = entry.end and entry.end._asdict()
        told["said"] = entry.said
        return told


# ═══ 12  Runs of scenarios ════════════════════════════════════════════════════════════════════════
# The same runs and the same hub, but bounded: a log forgets its oldest events, a hub the runs that
# ended first. And a run can wait at a gate.

EACH = 150  # bytes, about, that Python adds to each event of a log


class Piece(NamedTuple):
    """What a viewer gets in one write: its bytes, as a chunk of HTTP, and what is in them."""

    asked: tuple[int, int]
    chunk: bytes
    size: int
    tally: Mapping[str, int]  # its events, by name
    last: int


class BoundedLog(Log):
    """A log that can forget its oldest events."""

    ready: Piece | None = None  # the one that was made last

    def shared(self, after: int) -> Piece | None:
        """The next piece, made once for all viewers at this place; None if it is too big to be
        kept twice."""
        if self.ready is None or self.ready.asked != (after, self.last):
            data, last = self.read(after)
            if len(data) > WRITE:
                return None
            chunk = b"%x\r\n%b\r\n" % (len(data), data)
            tally = collections.Counter(self.names_of(after, last))
            self.ready = Piece((after, self.last), chunk, len(data), tally, last)
        return self.ready

    @property
    def held(self) -> int:
        """The bytes it holds, Python's own included."""
        return self.size + EACH * len(self._blocks)

    def names_of(self, after: int, last: int) -> list[str]:
        """Of the events after this id, up to that one."""
        return self.names[max(after + 1 - self.first, 0) : last + 1 - self.first]

    def read(self, after: int, *, most: float = math.inf) -> tuple[bytes, int]:
        """As ever; but who has seen `after`, and the next events are gone, is told which. The id
        of that is the last one missing, so that a resume goes on behind them."""
        if after + 1 >= self.first:
            return super().read(after, most=most)
        missing = self.first - 1
        event = Event("gap", {"from": after + 1, "to": missing})
        return event.numbered(missing if self.ids else None), missing

    def trim(self, events: int, size: int) -> bool:
        """Forget the oldest events beyond these limits, and of the newest only what is big; whether
        there were any."""
        here = len(self._blocks)
        most = here - (here > 0 and len(self._blocks[-1]) <= WRITE)
        count = 0
        while count < most and (here - count > events or self.held - EACH * count > size):
            self.size -= len(self._blocks[count])
            count += 1
        if count:
            self.ready = None
            self.first += count
            del self.names[:count]
            del self._blocks[:count]
        return count > 0


class ScriptedRun(Run):
    """A run of a scenario: it can wait at gates, and counts who asks for its stream."""

    make_log = BoundedLog
    place = 0  # of all viewers together, where a scenario wants the old queue
    counted = 0  # bytes of its log and its request in the hub's account

    def __init__(self, info: ScriptedInfo, scenario: Scenario, hub: BoundedHub) -> None:
        super().__init__(info, hub.settings)
        self.scenario = scenario
        self.hub = hub
        self.at_gate = math.inf  # since when it waits there
        self.attempts = dict[str, int]()  # streams opened, by scenario

    @property
    def ended(self) -> bool:
        return bool(self.log.ended)

    def announce(self) -> None:
        self.hub.bound(self)
        super().announce()

    def hear_else(self, said: Any) -> None:
        if not isinstance(said, AtGate):
            super().hear_else(said)
        elif said.waits:
            self.at_gate = self.info.clock.now()
        else:  # who waits at a gate may be silent
            self.silent_at += self.info.clock.now() - self.at_gate
            self.at_gate = math.inf

    def until_silent(self) -> float:
        return super().until_silent() if self.at_gate == math.inf else math.inf

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or explained(error)
        about = (safe(self.info.run_id), safe(self.info.case_id), safe(self.failure.stage))
        logger.error("analysis failed run_id=%s case_id=%s stage=%s%s", *about, traced(error))

    def failed(self, failure: Failure) -> dict[str, Any]:
        return PHASES[self.info.phase].failed(self.info, failure)


def may_see(tenant: str | None, owner: str | None) -> bool:
    """A caller who names no tenant sees every run, a run nobody owns is seen by all."""
    return tenant is None or owner is None or tenant == owner


class BoundedHub(Hub):
    """A hub that keeps logs and runs within limits, and knows who watches."""

    def __init__(self, settings: DoubleSettings, nursery: Any, clock: Any = None) -> None:
        super().__init__(settings, nursery, clock or ScriptClock(settings.rate))
        self.gates = Gates(settings.max_gates)
        self._forgotten: dict[str, str | None] = {}  # the last thousand ids, and their tenants
        self._held = 0  # bytes of all logs, and of what their runs were asked
        self.also: Callable[[], int] = int  # bytes that are held for runs to come
        self.deliveries: dict[Any, None] = {}  # open ones, oldest first
        self.streams = 0  # of them, those that play a script to a viewer
        self.time_taken: Callable[[float], object] = id  # what counts how long runs took, if any

    @property
    def held(self) -> int:
        """The bytes that count against the limit of all."""
        return self._held + self.also()

    @property
    def refusal(self) -> str | None:
        """Why no run can be started just now, if none can."""
        if self.stopping:
            return "the server is stopping"
        if self.held > (most := self.settings.max_log_bytes):
            return f"the live runs hold too much, the limit is {most} bytes"
        most = self.settings.max_live_runs
        return f"too many live runs, the limit is {most}" if self.live >= most else None

    def start(
        self, info: ScriptedInfo, scenario: Scenario, analysis: Analysis | None = None
    ) -> ScriptedRun:
        """Start a run of this scenario."""
        run = ScriptedRun(info, scenario, self)
        self.begin(run, analysis or scripted(scenario, self.gates))
        self._account(run)
        return run

    def settle(self, run: Any) -> None:
        super().settle(run)
        run.info = dataclasses.replace(run.info, body={}, weight=run.info.kept)
        self.time_taken(run.ended_clock - run.started_clock)

    @contextlib.contextmanager
    def playing(self, delivery: Any) -> Iterator[None]:
        """While a delivery plays, an operator can find it, and its run has a viewer."""
        run = delivery.run
        self.deliveries[delivery] = None
        self.streams += delivery.entry.streams
        if run:
            run.viewers += 1
        try:
            yield
        finally:
            del self.deliveries[delivery]
            self.streams -= delivery.entry.streams
            if run:
                run.viewers -= 1
                run.log.ready = run.log.ready if run.viewers else None
                delivery.entry.due = max(0, run.log.last - delivery.entry.resumed_after)

    def find(self, run_id: str, *, tenant: str | None = None) -> Any:
        """The run of this id, if this tenant may see it."""
        run = super().find(run_id)
        return run if run and may_see(tenant, run.info.tenant_id) else None

    def was_here(self, run_id: str, *, tenant: str | None) -> bool:
        return run_id in self._forgotten and may_see(tenant, self._forgotten[run_id])

    def seen_by(self, tenant: str | None) -> list[Any]:
        """All runs this tenant may see, oldest first."""
        self._sweep()
        return [run for run in self._runs.values() if may_see(tenant, run.info.tenant_id)]

    def reset(self, why: Failure, test_id: str | None = None) -> None:
        """Cancel and forget all runs, or those of one test."""
        for run in list(self._runs.values()):
            if test_id in (None, run.info.test_id):
                run.cancel(why)
                self._ended.setdefault(run.info.run_id, run)
                self._forget(run.info.run_id)
                self._forgotten.pop(run.info.run_id)

    def bound(self, run: ScriptedRun) -> None:
        """A run said something, or ended: keep its log, and all logs together, within the
        limits."""
        limits = self.settings
        self._account(run)
        excess = max(0, self.held - limits.max_log_bytes)
        size = min(limits.max_run_bytes, run.log.held - excess)
        whole = run.log.first == 1
        if run.log.trim(limits.max_run_events, size):
            self._account(run)
            if whole:
                limit = "--max-log-bytes" if excess else "max_run_…"
                text = "run_store: log full (%s), the oldest events go run_id=%s"
                logger.warning(text, limit, safe(run.info.run_id))

    def _account(self, run: ScriptedRun) -> None:
        """Count what the run holds; beyond the limits the first that ended is forgotten first."""
        if run is self._runs.get(run.info.run_id):
            now = run.log.held + run.info.weight
            self._held += now - run.counted
            run.counted = now
        limits, ended = self.settings, self._ended
        while ended and (len(ended) > limits.max_ended_runs or self.held > limits.max_log_bytes):
            self._forget(next(iter(ended)))

    def _forget(self, run_id: str) -> None:
        run = self._ended[run_id]
        self._held -= run.counted
        self._forgotten[run_id] = run.info.tenant_id
        if len(self._forgotten) > 1000:
            del self._forgotten[next(iter(self._forgotten))]
        super()._forget(run_id)


# ═══ 13  Held back, and cut anew ══════════════════════════════════════════════════════════════════
# What a proxy does to a stream: it holds bytes back, lets them go in lumps, and cuts them anywhere.

MOST_HELD = 2**20  # bytes that a `buffer` holds back; then it lets go, and the journal says so
CUTS = {
    "line": re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+"),
    # inside every character of more than one byte: after its first
    "utf8": re.compile(rb"[^\xc0-\xff]*[\xc0-\xff]|[^\xc0-\xff]+"),
}


class Outlet:
    """Where output is held back, and cut anew. What may go stays here until it has gone: whoever
    is cancelled meanwhile loses nothing."""

    chunk: Any = None  # how it is cut, and how long after the piece before it the next one goes
    every: Any = None
    hold: float = 0  # bytes that go together; 0 holds nothing back
    due = 0.0  # script time before which the next piece may not go

    def __init__(self) -> None:
        self.free: collections.deque[bytearray] = collections.deque()  # what may go
        self._back = bytearray()
        self._taken = 0
        self._gone = 0
        # where events end, in all that was taken: their names, and the id of the last of them
        self._marks: collections.deque[tuple[int, Iterable[str], int | None]] = collections.deque()

    def take(self, data: bytes, names: Iterable[str], last: int | None) -> bool:
        """Hold this back, or some of it; or let all go, where that would be too much."""
        self._back += data
        self._taken += len(data)
        if names or last:
            self._marks.append((self._taken, names, last))

        size = len(self._back)
        full = self.hold > 0 and size > MOST_HELD
        if self.hold and not full:
            size -= int(size % self.hold)
        self.let_go(size)
        return full

    def let_go(self, size: int | None = None) -> None:
        """So much of it may go now, or all."""
        freed = self._back[:size]
        del self._back[:size]
        if freed:
            self.free.append(freed)

    def next(self, *, whole: bool = False) -> tuple[bytes, list[str], int | None]:
        """The next piece, or all that may go; and what has gone with it: the names of the events
        that end in it, and the id of the last one."""
        if whole:
            self.free = collections.deque([bytearray().join(self.free)])
        first = self.free[0]
        size = len(first) if whole else self._cut(first)
        piece = bytes(first[:size])
        del first[:size]
        if not first:
            self.free.popleft()

        self._gone += size
        names: list[str] = []
        last = None
        while self._marks and self._marks[0][0] <= self._gone:
            _, ended, place = self._marks.popleft()
            names += ended
            last = place or last
        return piece, names, last

    def _cut(self, lump: bytearray) -> int:
        """The bytes of the next piece, of those that go together."""
        if self.chunk in CUTS:
            found = CUTS[self.chunk].match(lump)
            return found.end() if found else len(lump)
        return int(min(len(lump), self.chunk or self.hold or math.inf))


# ═══ 14  Scripted deliveries ══════════════════════════════════════════════════════════════════════
# The delivery of part 1, well or badly: the same way out for every byte, and a method for each verb
# of a stream script. Where a viewer has no script, part 1's own four lines play.

BODILESS = (204, 304)
BLANK = (b"\n\n", b"\r\n\r\n", b"\r\r")  # an event is whole, and so is what ends in this
JSON_HEAD = {"content-type": "application/json"}
TEXT_HEAD = {"content-type": "text/plain; charset=utf-8"}
CUT_AFTER = 0.2  # real seconds after the last bytes; some clients lose what comes with a break
FULL = f"the buffer was full at {MOST_HELD} bytes and let go"


class NoSocket:
    """Below a request in memory there is no connection. Those of a server say more: whom to blame,
    and whether the last bytes have gone out."""

    lost = False
    unsent = False
    cut = None
    feed: Any = None  # what takes a request's body, past Quart-Trio's own tasks

    def stream_begins(self) -> None:
        """What was asked for is a stream."""

    def blame(self) -> Ending:
        """Who ended the request that has not ended itself."""
        return LEFT

    def write_now(self, chunk: bytes) -> bool:
        """Only a connection of part 3 can."""
        return False


class Over(Exception):
    """The delivery ends before its script does."""


class ScriptedDelivery(ScriptPlayer, Delivery):  # type: ignore[misc]  # each has a `play` of its own
    """Plays a stream script to one viewer, against a run's log if there is one."""

    usual_frame: Mapping[str, Any] = {"newline": "\n", "wrap": ""}  # where no step says another
    outlet: Outlet | None = None  # where output is held back, and cut anew
    closed = False  # an operator has ended it
    ending = Ending("server", "end", "the script ended")  # an operator may have another
    farewell = b""  # an operator's last word
    half = False  # the last bytes are half an event
    begun = False  # there has been output
    unsent_head = False  # the connection keeps it, to send it with the first bytes
    said_at = -math.inf  # real time, of the last bytes written
    last_said: int | None = None
    pending = 0  # bytes that are not written yet
    usual: Mapping[str, Any] = {}  # the head and the body, where its script ends without one
    assured: Callable[..., Mapping[str, str]] = dict[str, str]  # headers it has in any case; a door
    _frame: Mapping[str, Any] | None = None  # where it is not the log's own
    _beat: Mapping[str, Any] | None = None

    def __init__(
        self, script: Script | None, entry: Entry, hub: BoundedHub, run: ScriptedRun | None = None,
        connection: Any = None,
    ) -> None:
        words = words_of(run.info if run else entry)
        ScriptPlayer.__init__(self, hub.clock, hub.gates, words, entry.seed)
        Delivery.__init__(self, run, entry, hub, {})  # type: ignore[arg-type]
        self.script = script
        self.entry = entry
        self.connection: Any = connection or NoSocket()
        if hasattr(connection, "put"):
            self.put = connection.put  # type: ignore[method-assign]  # the short way
        self.names: list[str] = []  # of the events in what is not written yet
        if script is not None:
            self.beat_every = math.inf

    async def deliver(self, send: Send, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Play it to its end; `headers` go out beside its own."""
        name = f"delivery {safe(self.entry.run_id)} (id {self.entry.seq})"
        trio.lowlevel.current_task().name = name
        self.send = send
        self.headers = {name.lower(): value for name, value in headers}
        with self.hub.playing(self):  # type: ignore[attr-defined]
            with contextlib.suppress(Over):
                if self.script is None:
                    await Delivery.play(self)
                for at, step in enumerate(self.script or ()):
                    self.entry.step = at
                    await self.play((step,))
            await self.depart()

    async def depart(self) -> None:
        """What is held back goes out; then the end is written down, and said with the last words:
        whoever hangs up on reading these has read the end, too."""
        if self.outlet:
            self.outlet.let_go()
        await self.drain(ending=True)
        self.closed = False  # what is usual goes out, an operator's end or not
        if not self.entry.status:
            await self.open(head=self.usual)
        if self.farewell and self.entry.streams and self.entry.status == 200 and not self.half:
            self.said.append(self.farewell)
        while self.ending.how != "end" and self.connection.cut:
            with contextlib.suppress(Over):  # meanwhile another operator wishes something else
                self.closed = False
                await self.cut(self.ending)
        await self.finish(self.ending._replace(how="end"))
        await self.write(more=False)

    async def open(self, step: Step | None = None, head: Any = None) -> None:
        """The head. What it does not say is as usual for a stream, or for a plain body."""
        head = self.fill(step.argument) if step else head or {}
        status, body = head.get("status", 200), head.get("body")
        plain = TEXT_HEAD if isinstance(body, str) else JSON_HEAD
        streams = self.entry.kind == "stream" and body is None
        own = {name.lower(): value for name, value in head.get("headers", {}).items()}
        usual = {} if status == 204 else STREAM_HEAD if streams else plain
        pairs = {**usual, **self.headers, **own}
        pairs |= self.assured(pairs)
        lines = [(name.encode(), one_line(value)) for name, value in pairs.items() if value]
        self.entry.status = status
        self.unsent_head = True
        self.quiet_since = self.clock.now()
        await self.send({"type": "http.response.start", "status": status, "headers": lines})
        if body is not None:
            self.emit(to_bytes(body if isinstance(body, str) else to_json(body)))

    def emit(self, data: bytes, last: int | None = None, names: Iterable[str] = ()) -> None:
        """Bytes for this viewer, the id of the last event in them, and the names of all these."""
        if self.closed:
            raise Over
        if last and not names:  # part 1 knows no names
            names = self.run.log.names_of(self.place, last)
        if not data or self.entry.status in BODILESS:  # whatever the script says
            return
        self.begun = True
        self.half = not data.endswith(BLANK)
        self.pending += len(data)
        if self.outlet is None:
            self.said.append(data)
            self.names += names
            self.last_said = last or self.last_said
            return
        self.quiet_since = self.clock.now()  # also what is held back was said
        full = self.outlet.take(data, names, last)
        if full and FULL not in self.entry.notes:
            self.entry.notes.append(FULL)

    async def say(self, data: bytes, last: int | None = None, names: Iterable[str] = ()) -> None:
        """As `emit`; and write, when there is enough."""
        self.emit(data, last, names)
        if self.pending >= WRITE:
            await self.write()

    async def write(self, *, more: bool = True) -> None:
        """Write what was said and may go."""
        self.pending = 0
        await self.drain()
        if self.said or self.unsent_head or not more:
            await super().write(more=more)

    async def drain(self, *, ending: bool = False) -> None:
        """The head, where bytes wait for it; then what the outlet lets go, piece by piece, and no
        heartbeat in between. The last words wait, to go out with the end; and what an operator
        ends goes at once."""
        if self.begun and not self.entry.status:
            await self.open()
        outlet = self.outlet
        while outlet and outlet.free:
            if outlet.every is not None and not self.closed:
                with self.clock.limit(outlet.due - self.clock.now()) as self.resting:
                    await trio.sleep_forever()
                outlet.due = self.clock.now() + self.draw(outlet.every)
            piece, names, last = outlet.next(whole=self.closed)
            self.said.append(piece)
            self.names += names
            self.last_said = last or self.last_said
            enough = outlet.every is not None or len(self.said) * len(piece) >= WRITE
            if not ending or (outlet.free and enough):
                await super().write()
                await trio.lowlevel.checkpoint()

    async def pass_on(self, log: Any) -> None:
        """The short way: the same bytes for all viewers at this place, right into the socket."""
        piece = None if self.said or self.outlet or self.closed else log.shared(self.place)
        if piece is None or not self.connection.write_now(piece.chunk):
            await super().pass_on(log)
            return
        self.place = piece.last
        if self.connection.waiting:
            await self.connection.put([])
        self.said_at = trio.current_time()
        self.quiet_since = self.clock.now()
        if not self.connection.unsent:
            self.entry.carried(1, piece.size, piece.tally, piece.last)

    def wrote(self, said: list[bytes]) -> None:
        self.unsent_head = False
        self.said_at = trio.current_time()
        self.quiet_since = self.clock.now()
        if said and not self.connection.unsent:
            size = sum(map(len, said))
            self.entry.carried(len(said), size, collections.Counter(self.names), self.last_said)
        self.names = []
        self.last_said = None

    async def finish(self, ending: Ending) -> None:
        """Write the end down, before the act; unless the viewer made one already."""
        if self.connection.lost:
            await trio.sleep_forever()
        self.entry.finish(ending)

    async def rest(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Await this, with heartbeats; but first, what was said goes out."""
        await self.write()
        if self.closed:
            raise Over
        await self.beating(wait)

    async def beat(self, since: float) -> None:
        """As ever; but none before the head, and as the script has it."""
        if self.closed:
            raise Over
        if self.quiet_since > since:
            return
        if self.entry.status:
            beat = HEARTBEAT
            if self._beat is not None:
                said = self.fill(self._beat)
                beat = Event(in_one_line(said["event"]), said["data"]).numbered(None)
            self.emit(self.dressed(beat), names=[BEAT])
            await self.write()
            if self.connection.lost:
                text = "Failed to send SSE heartbeat run_id=%s"
                logger.warning(text, safe(self.entry.run_id))
        self.quiet_since = self.clock.now()  # also where nothing can be written

    async def relay(self, step: Step) -> None:
        """Deliver the next events of the log, waiting for them, until its end or the step's own."""
        if self.run is None or self.entry.status in BODILESS:
            return
        log = self.run.log
        wanted, modifiers = step.argument, step.modifiers
        left = wanted if isinstance(wanted, int) else math.inf
        until = self.fill(wanted["until"]) if isinstance(wanted, dict) else None
        every = modifiers.get("every")
        cut: Any = modifiers.get("cut")
        cursor: Any = self.run if modifiers.get("shared") else self  # what has the place
        alone = until or every is not None or self.outlet or self._frame
        most = math.inf if cursor is self and not alone else 1  # events in one piece
        within = self.draw(modifiers.get("within", math.inf))
        quiet = self.clock.now() + within  # then it has been silent for so long

        while left or cut is not None:
            if not await self.more(cursor, quiet):
                return
            place = cursor.place
            piece, last = log.read(place, most=min(left or 1, most))
            names = log.names_of(place, last)
            block = self.dressed(piece, last)
            if names and not left:
                self.emit(block[: int(cut if cut >= 1 else cut * len(block))])
                return
            self.emit(block, last, names)
            cursor.place = last
            left = 0 if until in names else left - len(names)
            final = log.ended and last == log.last
            if self.outlet or every is not None or not final:
                await self.write()  # else it goes out with what follows
            quiet = self.clock.now() + within
            if every is not None and (left or cut is not None):
                await self.sleep(Step("sleep", every))
            await trio.lowlevel.checkpoint()  # a write that fits the socket has none

    async def more(self, cursor: Any, quiet: float) -> bool:
        """Wait until the log has more than this cursor has passed; whether it came in time."""
        log = self.run.log

        async def news() -> None:
            while cursor.place >= log.last and not log.ended:
                await log.news()

        if cursor.place >= log.last and not log.ended:
            await self.write()
            with self.clock.limit(quiet - self.clock.now()):
                await self.rest(news)
        return bool(cursor.place < log.last)

    def dressed(self, block: bytes, number: int | None = None) -> bytes:
        """A block as this viewer gets it: mostly as it is, the one that all viewers share."""
        if (frame := self._frame) is None:
            return block
        lines = block.decode().rstrip("\n").split("\n")
        if "id" in frame and (number is not None or frame["id"] is None):
            outer = self._turn
            self._turn = number or 0
            own = [] if frame["id"] is None else [f"id: {in_one_line(self.fill(frame['id']))}"]
            lines = [line for line in lines if not line.startswith("id: ")] + own
            self._turn = outer
        if frame.get("id-first"):
            lines.sort(key=lambda line: not line.startswith("id: "))
        lines = [line if line.startswith(":") else frame["wrap"] + line for line in lines]
        return to_bytes("".join(line + frame["newline"] for line in [*lines, ""]))

    # The other verbs, each under its own name.

    async def comment(self, step: Step) -> None:
        await self.say(self.dressed(self.made(step)))

    async def raw(self, step: Step) -> None:
        await self.say(self.made(step))

    async def event(self, step: Step) -> None:
        """An event of this viewer's own, truth or not."""
        event, text = self.made(step), self.fill(step.argument.get("id"))
        text = None if text is None else in_one_line(text)
        number = int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None
        await self.say(self.dressed(event.numbered(text), number), number, [event.name])

    async def frame(self, step: Step) -> None:
        """How later events, comments and beats are written; at its default, as the log has them."""
        wrap = in_one_line(self.fill(step.argument.get("wrap", "")))
        wanted = {**self.usual_frame, **step.argument, "wrap": wrap}
        self._frame = None if wanted == ScriptedDelivery.usual_frame else wanted

    async def heartbeat(self, step: Step) -> None:
        """From now on a beat after that much quiet."""
        self._beat = None
        every = step.argument
        if isinstance(every, dict):
            self._beat = {"event": "", "data": {}, **every} if len(every) > 1 else None
            every = every["every"]
        usual = every or self.hub.settings.heartbeat
        self.beat_every = math.inf if usual in ("never", 0) else float(usual)

    async def chunk(self, step: Step) -> None:
        self.outlet = self.outlet or Outlet()
        self.outlet.chunk = step.argument
        self.outlet.every = step.modifiers.get("every")

    async def buffer(self, step: Step) -> None:
        self.outlet = self.outlet or Outlet()
        self.outlet.hold = math.inf if step.argument == "all" else step.argument

    async def flush(self, step: Step) -> None:
        if self.outlet is not None:
            self.outlet.let_go()
            await self.write()

    async def hang(self, step: Step) -> None:
        """Silent until the other side leaves, heartbeats included."""
        self.beat_every = math.inf
        await self.rest(trio.sleep_forever)

    async def end(self, step: Step) -> NoReturn:
        raise Over

    async def drop(self, step: Step) -> None:
        await self.cut(Ending("server", step.verb, f"script: {step.verb}"))

    reset = drop  # what differs is the verb

    def close(self, how: str, farewell: bytes = b"") -> None:
        """End this delivery from outside, with a last word to its viewer; or at once, by cutting
        its connection, if there is none."""
        self.closed = True
        self.farewell = farewell
        self.ending = Ending("admin", how, "closed by an operator")
        if how != "end" and not farewell and self.connection.cut:
            self.entry.finish(self.ending)
            self.connection.cut(reset=how == "reset")
        elif self.resting is not None:
            self.resting.cancel(reason="closed by an operator")

    async def cut(self, ending: Ending) -> None:
        """Close the connection without an end, and wait to be cancelled: returning would be an
        end. An operator who has asked for an end gets one."""
        await self.write()
        with trio.move_on_at(self.said_at + CUT_AFTER) as self.resting:
            await trio.sleep_forever()
        if self.closed:
            raise Over
        how = ending.how
        if not self.connection.cut:
            raise RuntimeError(f"{how!r} needs a socket, and this application runs without one")
        if self.entry.http_version == "1.0" and self.entry.status and how == "drop":
            self.entry.notes.append("to an HTTP/1.0 client a lost connection looks like an end")
        if how == "reset" and not sys.platform.startswith("linux"):
            self.entry.notes.append("a reset is sure on Linux only; elsewhere it may be a drop")
        await self.finish(ending)
        self.connection.cut(reset=how == "reset")
        await trio.sleep_forever()


class JobDelivery(ScriptedDelivery):
    """A job's, whose ids have its name in front, in every scenario."""

    usual_frame = {**ScriptedDelivery.usual_frame, **JOB_FRAME}
    _frame = usual_frame


def close_all(deliveries: Iterable[ScriptedDelivery], how: str, latest: int = 0) -> int:
    """What an operator can do to open deliveries, with a `retry:` of each viewer's own, 1 s to so
    many ms, if any; how many they were."""
    chosen = list(deliveries)
    for delivery in chosen:
        farewell = b"retry: %d\n\n" % random.randint(1000, latest) if latest else b""
        delivery.close(how, farewell)
    return len(chosen)


# ═══ 15  Catalogue ════════════════════════════════════════════════════════════════════════════════
# The built-in scenarios, as data: name, the symptom and what a client sees, the scripts for it.


def _say(name: str, **data: Any) -> dict[str, Any]:
    return {"event": {"event": name, "data": data}}


def _answer(status: int, body: Any, headers: Any = ()) -> list[Any]:
    return [{"open": {"status": status, "headers": dict(headers), "body": body}}]


_TWO = [HELLO, {"relay": 2}]
_ALL = [HELLO, "heartbeat", REST]
_USUAL = [*_ALL, BYE]
_IDS = {"status": "completed", "runId": "{runId}", "caseId": "{caseId}"}
_STARTED = _say("started", runId="{runId}", caseId="{caseId}", at="{now}")
_COMPLETED = _say("completed", **_IDS, summary="nothing unusual", score=0.5, severity="LOW")
_BEGIN = [_STARTED, _say("step", label="INPUT_NORM", detail="", percent=10)]
_FOUR = [*_BEGIN, _say("step", label="RULE_SCORING", detail="", percent=45), _COMPLETED]
_FIRST, _SECOND, _THIRD, _LAST = (  # the four, as a stream script writes them: with their ids
    {"event": {"id": str(number), **step["event"]}} for number, step in enumerate(_FOUR, 1)
)
_TICK = _say("step", label="TICK", turn="{n}")
_SLOW_TICK = [{"sleep": 10}, _TICK]
_BUSY = _answer(503, {"error": "temporarily unavailable"}, {"Retry-After": "1"})
_UNKNOWN = {"error": "runId not found or already completed", "runId": "{runId}"}
_LOST = _answer(404, _UNKNOWN)
_LOGIN = "<!doctype html><title>Log in</title><p>Your session has expired."
_HTML = {"Content-Type": "text/html; charset=utf-8"}
_OFF = {"status": "disabled", "message": "Analysis disabled (DEMO_OFF)"}
_KOREAN = "증거를 수집하고 규칙을 적용한 뒤 위험도를 설명합니다. " * 40
_OPAQUE = {"frame": {"id": "opaque:{n}"}}

# A row: what one sees; then its scripts, as far as they are not the ordinary ones.
RUNS: dict[str, Any] = {  # run, stream
    "ok": ["all is well: the ordinary run, the ordinary stream"],
    "phase3": [
        "all is well: the ordinary Phase3 run, whoever triggers it", [{"ordinary": "phase3"}]],
    "generation": [
        "a generation job: ids `{jobId}_{n}`, heartbeats as events, no [DONE]",
        [{"ordinary": "generation"}],
        [{"frame": JOB_FRAME}, HELLO, {"heartbeat": {"every": 30, **JOB_BEAT}}, REST]],
    "failed": [
        "the analysis fails: `failed` says why and is the last event, then [DONE]",
        [*_BEGIN, {"fail": {"error": "the model refused the prompt", "stage": "llm"}}]],
    "crash": [
        "the analysis raises: `failed` names the exception, the server lives",
        [*_BEGIN, {"crash": "row 7 has no amount"}]],
    "slow-first": [
        "only heartbeats for 30 s, then an ordinary run: is the client patient?",
        [{"sleep": 30}, "ordinary"]],
    "silent": [
        "a run that never speaks: heartbeats, then `failed` at the idle time-out", ["hang"]],
    "slow-run": [
        "an event every 10 s for 70 s: an absolute timer of 65 s gives up too early",
        [_STARTED, {"repeat": 7, "steps": _SLOW_TICK}, _COMPLETED]],
    "stepped": [
        "each event waits for its gate, go-1 to go-4: the test decides when it comes",
        [part for n in range(4) for part in ({"wait": f"go-{n + 1}"}, _FOUR[n])]],
    "flood": [
        "20 000 events as fast as they come: does the client keep up?",
        [_STARTED, {"repeat": 20_000, "steps": [_TICK]}, _COMPLETED]],
    "big-event": [
        "one event of 5 MB on one line: does a line buffer overflow?",
        [_STARTED, {**_say("evidence", type="COLLECTED"), "pad": 5_000_000}, _COMPLETED]],
    "korean": [
        "long multi-byte text: characters that straddle every buffer",
        [_STARTED, *[_say("step", label="설명", detail=_KOREAN)] * 5, _COMPLETED]],
    "no-terminal": ["[DONE] comes, but neither completed nor failed did", _FOUR[:3]],
    "progress-regress": [
        "percent goes 45, 25, 85: a progress bar runs backwards",
        [_STARTED, *(_say("step", label="STEP", percent=n) for n in (45, 25, 85)), _COMPLETED]],
    "missing-started": ["the first event is a step: `started` never comes", _FOUR[1:]],
    "unknown-events": [
        "event names that nobody documented, between the known ones",
        [_STARTED, _say("telemetry", cpu=1), _say("x-internal", a=1), _COMPLETED]],
}
STREAMS: dict[str, Any] = {  # stream, run
    # Body
    "empty": ["200 and an empty body, properly ended: the incident", ["open"]],
    "empty-truncated": ["200 and no body, and the connection breaks", ["open", "drop"]],
    "no-response": ["the connection closes before any answer", ["drop"]],
    "first-chunk-then-close": ["`: connected`, 13 bytes, and a proper end", [HELLO]],
    "first-chunk-then-drop": [
        "`: connected`, 13 bytes, then the connection breaks", [HELLO, "drop"]],
    "drop": [
        "three events, then the connection breaks, every time", [HELLO, {"relay": 3}, "drop"]],
    "drop-mid-event": [
        "two events and half the next one, then the connection breaks",
        [HELLO, {"relay": 2, "cut": 0.5}, "drop"]],
    "drop-resume": [
        "two events and a break; a resume gets the rest, nothing lost or twice",
        [[*_TWO, "drop"], _USUAL]],
    "always-drop": ["`: connected` and a break, however often one tries", [HELLO, "drop"]],
    "reset": ["two events, then a TCP reset", [*_TWO, "reset"]],
    "no-done": ["every event and a proper end, but no [DONE]", _ALL],
    "done-only": ["[DONE] and nothing else", [BYE]],
    "unterminated-last-event": [
        "the last event lacks its blank line: no client may see it",
        [HELLO, {"relay": 3}, {"raw": "event: completed\ndata: {}\nid: 4\n"}], _FOUR],
    "after-done": [
        "two empty `data:` blocks after [DONE]", [*_USUAL, {"raw": "data:\n\ndata:\n\n"}]],
    "fallback-completed": [
        "the run hangs, and the old server invents a completed without score",
        [*_TWO, _say("completed", **_IDS), BYE], [*_BEGIN, "hang"]],
    # Time
    "slow-headers": ["8 s pass before the status line", [{"sleep": 8}, *_USUAL]],
    "slow-stream": [
        "an event every 2 s, however fast the run was",
        [HELLO, "heartbeat", {"relay": "all", "every": 2}, BYE]],
    "idle-cut": [
        "two events, a minute without a byte, then a proxy cuts the idle stream",
        [*_TWO, {"heartbeat": "never"}, {"sleep": 60}, "drop"]],
    "no-heartbeat": [
        "100 s without a byte in a healthy run: no heartbeats",
        [HELLO, {"heartbeat": "never"}, REST, BYE], [*_BEGIN, {"sleep": 100}, *_FOUR[2:]]],
    "heartbeat-then-silence": [
        "three heartbeats, then a connection that is open and dead",
        [HELLO, {"heartbeat": 15}, {"sleep": 46}, "hang"]],
    "gateway-timeout": [
        "an event every 10 s, and a gateway cuts at 300 s although all is well",
        [HELLO, "heartbeat", {"relay": 30}, {"sleep": 10}, "drop"],
        [_STARTED, {"repeat": 60, "steps": _SLOW_TICK}, _COMPLETED]],
    # Shape
    "buffered": [
        "a proxy holds everything back: one arrival, at the end", [{"buffer": "all"}, *_USUAL]],
    "buffered-4k": [
        "a proxy passes on 4096 bytes at a time: events come late, in lumps",
        [{"buffer": 4096}, *_USUAL]],
    "dribble": ["every byte comes in a chunk of its own", [{"chunk": 1}, *_USUAL]],
    "split-utf8": [
        "chunks end inside every multi-byte character", [{"chunk": "utf8"}, *_USUAL]],
    "mid-line": ["chunks of 7 bytes end wherever they end", [{"chunk": 7}, *_USUAL]],
    "coalesced": [
        "`: connected` and five events come in one chunk, the rest in another",
        [{"buffer": "all"}, HELLO, {"relay": 5}, "flush", REST, BYE]],
    "crlf": [
        "lines end in CR LF",
        [{"frame": {"newline": "\r\n"}}, *_ALL, {"raw": "data: [DONE]\r\n\r\n"}]],
    "cr-only": [
        "lines end in CR", [{"frame": {"newline": "\r"}}, *_ALL, {"raw": "data: [DONE]\r\r"}]],
    "bom": ["a byte order mark comes first", [{"raw": {"hex": "efbbbf"}}, *_USUAL]],
    "double-wrapped": [
        "a relay wraps every line again: `data:event: …`, `data:data: …`",
        [{"frame": {"wrap": "data:"}}, *_ALL, {"raw": "data:data: [DONE]\n\n"}]],
    "gateway-ids": [
        "a gateway puts ids of its own on every block: `gw-1`, `gw-2`, …",
        [{"frame": {"id": "gw-{n}"}}, *_USUAL]],
    "duplicate-events": [
        "the second event comes twice, with the same id", [*_TWO, _SECOND, REST, BYE], _FOUR],
    "out-of-order": [
        "the third event comes before the second",
        [HELLO, _FIRST, _THIRD, _SECOND, _LAST, BYE], _FOUR],
    "bad-json": [
        "one event's data is JSON cut short",
        [*_TWO, {"event": {"event": "step", "data": '{"label": "RULE_SC'}}, REST, BYE]],
    # Status
    "unauthorized": [
        "the token has expired: 401",
        _answer(401, {"detail": "Token expired"}, {"WWW-Authenticate": "Bearer"})],
    "forbidden": ["somebody else's case: 403", _answer(403, {"detail": "Not your case"})],
    "rate-limited": [
        "too many requests: 429 with Retry-After",
        _answer(429, {"error": "too many requests"}, {"Retry-After": "2"})],
    "unavailable": ["503 with Retry-After, once; then all is well", [_BUSY, _USUAL]],
    "refuse-3-then-ok": ["503 three times, then all is well", [_BUSY, _BUSY, _BUSY, _USUAL]],
    "gone-204": ["204: a native EventSource stops for good", [{"open": {"status": 204}}]],
    "html": ["200 with a login page where a stream should be", _answer(200, _LOGIN, _HTML)],
    "json-instead": ["200 with JSON where a stream should be", _answer(200, {"ok": True})],
    "sse-500": ["500 with an event-stream type and no body", [{"open": {"status": 500}}]],
    "unknown-run": [
        "the old server does not know the run: 200 with an error in JSON",
        _answer(200, _UNKNOWN)],
    "unknown-run-404": ["the run is not known: 404", _LOST],
    "expired-run": ["one whole stream, then the run is forgotten: 404", [_USUAL, _LOST]],
    "other-worker": [
        "every second request lands on a worker that does not know the run: 404",
        {"cycle": [_USUAL, _LOST]}],
    # Resume
    "resume-unknown-id": [
        "ids that no server can resume from: a reconnect replays everything",
        [[_OPAQUE, *_TWO, "drop"], [_OPAQUE, *_USUAL]]],
    "resume-gap": [
        "after a break the server has forgotten an event, and says so with `gap`",
        [[*_TWO, "drop"], [
            HELLO, {"event": {"id": "3", "event": "gap", "data": {"from": 3, "to": 3}}},
            _LAST, BYE]],
        _FOUR],
    "retry-field": [
        "`retry: 1500` comes first: the client's back-off changes",
        [{"raw": "retry: 1500\n\n"}, *_USUAL]],
    "two-subscribers": [
        "the old queue: each event goes to one viewer only, the other misses it",
        [HELLO, "heartbeat", {"relay": "all", "shared": True}, BYE]],
}
TRIGGERS: dict[str, Any] = {  # trigger, run
    "slow-trigger": [
        "the 202 takes 6 s: the back end gives up and asks again, the run goes on",
        [{"sleep": 6}]],
    "trigger-503": ["the trigger is refused with 503, nothing starts", _BUSY],
    "trigger-lost": [
        "the first answer is lost in a reset; the retry meets the same run", [["reset"], []]],
    "trigger-disabled": ["200 `disabled`, nothing starts", _answer(200, _OFF)],
    "duplicate-run": [
        "two pipelines in one run: every event comes twice, with two ids",
        None, [part for step in _FOUR for part in (step, step)]],
}
TABLES = ((RUNS, "run", "stream"), (STREAMS, "stream", "run"), (TRIGGERS, "trigger", "run"))


def documented(value: Any) -> Scenario:
    """A scenario of a catalogue: it has a `doc`."""
    return parse_scenario(value, needs="doc")


def catalogue() -> dict[str, Scenario]:
    """The built-in scenarios, by name."""
    found = {}
    for table, *places in TABLES:
        for name, (doc, *scripts) in table.items():
            own = {place: script for place, script in zip(places, scripts, strict=False) if script}
            found[name] = documented({"name": name, "doc": doc, **own})
    return found


def known_scenarios(settings: DoubleSettings) -> dict[str, Scenario]:
    """The catalogue and, over it, the scenarios of the user's own file; a ValueError says what is
    wrong with that."""
    known = catalogue()
    if not settings.scenarios:
        return known
    where = f"--scenarios {settings.scenarios}"
    try:
        own = json.loads(Path(settings.scenarios).read_text("utf-8"), parse_constant=int)
        for index, value in enumerate(own if isinstance(own, list) else [own]):
            where = f"--scenarios {settings.scenarios}, [{index}]"
            one = documented(value)
            known[one.name] = one
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    return known


# ═══ 16  Choosing ═════════════════════════════════════════════════════════════════════════════════
# What a request gets: which scenario, which attempt at it, which script. The first of these counts:
# what the request itself names; what stands in an id, behind a `~`; what was bound beforehand; the
# default. A service decides, at once, and is done; what takes time is a run or a delivery. Around
# both stands the request, where its entry in the journal begins and ends.

RunId = that(
    "1 to 200 printable characters, no '/'",
    lambda value: type(value) in (str, int, float) and str(value).isprintable()
    and re.fullmatch(r"(?!\.\.?\Z)[^/]{0,200}", str(value)))
Told = dict[str, Any]  # what an answer says, as JSON
Text = str | None

# Fields that we know must be what they are; fields that we do not know are nobody's business.
_loose = partial(form, strict=False)
TRIGGER_BODY = {
    "phase2": _loose(runId=RunId | None, requestedBy=Text, evidence=dict | None,
                     mode=Text, options=dict | None),
    "phase3": _loose(runId=RunId | None, requestedBy=Text, artifacts=dict | None,
                     callbacks=dict | None, options=_loose(
                         ragTopK=number(int, 1, 20) | None,
                         temperature=number(float, 0, 1) | None, promptVersion=Text) | None),
    "generation": _loose(projectId=RunId | None, title=Text, description=Text),
}


def checked_body(raw: Any, kind: Any, where: str = "body") -> Any:
    """A JSON body, or the Wrong in it, a 422 that names the field. No body is an empty one."""
    # It is looked through level by level, before anything that calls itself may meet it: Python's
    # recursion limit would be a 500, and a megabyte of `[],` holds up everybody.
    try:
        body = json.loads(raw.decode().strip() or "{}")
        sizes = [len(level) for level in itertools.islice(levels(body), DEEPEST + 2)]
        to_json(body)  # which knows that NaN is no JSON
    except (RecursionError, ValueError) as error:
        raise Wrong(f"this is not JSON: {error}", where) from None
    if len(sizes) > DEEPEST + 1 or sum(sizes) > MOST_VALUES:
        most = f"{MOST_VALUES:,} values, nested {DEEPEST} levels deep"
        raise Wrong(f"holds more than {most}, too much to look through", where)
    checked(kind, body, where)
    return body


async def told(kind: Any) -> Any:
    """The body of this request."""
    return checked_body(await request.get_data(cache=False), kind)


def relays(script: Script) -> bool:
    """Whether it needs a run's log."""
    return any(step.verb == "relay" or relays(step.steps) for step in script)


def refuses(script: Script | None) -> bool:
    """Whether a trigger script says no: then no run is started."""
    heads = [step.argument for step in script or () if step.verb == "open"]
    return any(head.get("status", 200) != 202 for head in heads)


def counted(counts: dict[Any, int], what: Any, most: int, more: int = 1) -> int:
    """How many of this, with one more. So many are remembered: those that were counted last, for
    a dict knows in which order its keys came."""
    number = counts.pop(what, 0) + more
    counts[what] = number
    if len(counts) > most:
        del counts[next(iter(counts))]
    return number


@dataclass
class Binding:
    """A scenario that waits for the triggers it is meant for: so many more of them, of this case,
    of this test; where one of these is None, of any."""

    scenario: Scenario
    left: float
    case_id: str | None = None
    test_id: str | None = None


UNSEEN = "[^!-~]|%"  # what is percent-encoded in a header, so that it can be read back

# The ordinary streams, as a catalogue writes them: who has seen everything need not see one again.
PLAIN = [phase.stream(DoubleSettings()) for phase in PHASES.values()]


class ScenarioChooser:
    """How a test chooses what happens to it, and which attempt it is at.

    What belongs to a test is kept under its `X-Test-Id`, so that tests can share a server: each
    forgets what is its own, and finds its own first attempt.
    """

    def __init__(self, settings: Any, catalogue: Mapping[str, Scenario]) -> None:
        self.settings = settings
        self.catalogue = catalogue
        self.default = self.from_start("scenario", settings.scenario) if settings.scenario else None
        pairs = [pair.partition("=") for pair in parts(settings.case)]
        self.of_case = {case: self.from_start("case", name) for case, _, name in pairs}
        self.bindings: list[Binding] = []
        self.counts: dict[tuple[str | None, int], int] = {}

    def reset(self, test_id: str | None = None) -> None:
        """Forget what was bound and counted, or what of it is of one test."""
        self.bindings = [one for one in self.bindings if test_id not in (None, one.test_id)]
        self.counts = {
            what: count for what, count in self.counts.items() if test_id not in (None, what[0])
        }

    def from_start(self, flag: str, name: str) -> Scenario:
        """A scenario that was named at the start; a ValueError is a sentence about the flag."""
        if name not in self.catalogue:
            close = did_you_mean(name, self.catalogue)
            raise ValueError(f"--{flag}: there is no scenario {name!r}{close}")
        return self.catalogue[name]

    def ordinary(self, name: str) -> Scenario:
        """What happens where nobody has chosen: what is ordinary in it follows the settings; but
        somebody may have put a scenario of his own in its place."""
        found = self.catalogue[name]
        built_in = [name, *filter(None, RUNS[name])]
        if list(found.source.values()) == built_in:
            return Scenario(name, source=found.source)
        return found

    def named(self, name: str) -> Scenario:
        """The scenario of this name, or the 400 that helps."""
        if name in self.catalogue:
            return self.catalogue[name]
        close = difflib.get_close_matches(name[:64], self.catalogue)
        known = list(self.catalogue)
        raise Refusal(
            400, "unknown scenario", scenario=name[:200], didYouMean=close, known=known)

    def read(self, wanted: Any) -> Scenario:
        """The scenario of this name, or that this is: as JSON, or as a text of it."""
        if isinstance(wanted, str):
            if not wanted.startswith("{"):
                return self.named(wanted)
            wanted = checked_body(to_bytes(wanted), dict, "scenario")
        return parse_scenario(wanted)

    def meant(
        self, run_id: str, case_id: str | None, able: Callable[[Scenario], object] = bool
    ) -> Scenario | None:
        """What was chosen beforehand and is able: in the run's or the case's id, by a binding
        (which this uses up), by default."""
        # An id passes unchanged through a browser, a gateway and a back end that build their own
        # headers and bodies: so a test can choose from the other end of them all.
        for text in (run_id, case_id or ""):
            if "~" in text and not self.settings.no_magic:
                return self.named(text.rpartition("~")[2])

        fits = [
            one for one in self.bindings
            if one.case_id in (None, case_id) and one.test_id in (None, entry().test_id)
            and able(one.scenario)
        ]
        if not fits:
            return self.of_case.get(case_id or "", self.default)
        # the one that leaves least open fits best, and of these the oldest
        best = min(fits, key=lambda one: [one.case_id, one.test_id].count(None))
        best.left -= 1
        self.bindings = [one for one in self.bindings if one.left > 0]
        return best.scenario

    def weight(self) -> int:
        """The bytes that bound scenarios hold; they count against the limit of all logs."""
        return sum(one.scenario.weight for one in self.bindings)

    def count(self, *what: str, more: int = 1) -> int:
        """How many attempts at this there have been, in the test at hand, and with one more. What
        it is at is kept as a number: names may be long."""
        return counted(self.counts, (entry().test_id, hash(what)), 10_000, more)


def below(scope: Any) -> Any:
    """The connection below a request; in memory there is none."""
    return scope.get("state", {}).get("connection") or NoSocket()


class JournaledRequest(QuartRequest):
    """One request and its answer: here the journal's entry begins and ends.

    Only what is on the allow-list gets into an entry, and of a token only that there is one. What
    is asked of the double's own control is not journaled, for it would push out what is.
    """

    def __init__(self, journal: Journal, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        self.journal = journal
        given = scope["aura.headers"] = dict(scope["headers"])
        shown = {name: as_text(given[name])[:200] for name in RECORDED if name in given}
        if b"authorization" in shown:
            shown[b"authorization"] = "present"

        host, port = scope["client"]
        path = "/" + scope["path"].lstrip("/")  # as the routes see it
        self.kept = scope["method"] != "OPTIONS" and not path.startswith("/__aura/")
        tenant = as_text(given.get(b"x-tenant-id", b"")).strip() if self.kept else ""
        self.entry = scope["aura.entry"] = Entry(
            method=scope["method"], path=path, client=f"{host}:{port}",
            request_id=known_as(shown, b"x-request-id"), http_version=scope["http_version"],
            headers=shown, tenant_id=tenant or None, user_id=shown.get(b"x-user-id"),
            agent_id=shown.get(b"x-agent-id"), test_id=shown.get(b"x-test-id"))

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve it, and close its entry in the one `finally` that there is. Who wrote down an end
        before has the last word; then who raised; then whoever the connection blames."""
        trio.lowlevel.current_task().name = "request"
        entry = self.entry
        connection = below(self.scope)
        self.journal.open(entry, kept=self.kept)
        try:
            if connection.feed:  # it feeds the body, and ends this task when the client leaves
                await self.answered(connection, send)
            else:
                await super().__call__(receive, send)
        finally:
            cause = sys.exception()
            if connection.unsent and (entry.end or LEFT).how == "end":
                entry.end = None  # an end that could not be written was none
            if isinstance(cause, Exception):
                entry.finish(Ending("server", "error", explained(cause).error))
            entry.finish(connection.blame())
            self.journal.close(entry)

    async def answered(self, connection: Any, send: ASGISendCallable) -> None:
        """The answer, in this task. The request is let go of before a delivery plays."""
        asked = self._create_request_from_scope(send)
        connection.feed(asked.body)
        response = await self.app.handle_request(asked)
        del asked
        await self._send_response(send, response)

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        """A delivery writes down its own end; here is that of a plain answer, before its bytes."""
        entry = self.entry
        if isinstance(response, Streamed):
            connection = below(self.scope)
            if entry.streams:
                connection.stream_begins()
            send = send if connection.feed else partial(whole, send)
            # nobody needs them any more, and a stream may last for hours
            self.scope["aura.headers"] = self.scope["headers"] = {}  # type: ignore
            await response.delivery.deliver(send, response.headers.items())
        else:
            entry.status = response.status_code
            entry.bytes = 0 if entry.method == "HEAD" else response.content_length or 0
            why = entry.notes[-1] if entry.notes else "answered"
            entry.finish(Ending("server", "end", why))
            await super()._send_response(send, response)


def as_text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def known_as(headers: Mapping[bytes, str], name: bytes) -> str:
    """The id that a caller gave its request in this header, if it can be one; else a new one."""
    given = headers.get(name, "")
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else uuid.uuid4().hex


def entry() -> Entry:
    """The journal's entry of the request at hand."""
    return request.scope["aura.entry"]  # type: ignore[typeddict-item, no-any-return]


def header(name: bytes, default: bytes = b"") -> str:
    """A header of the request at hand. (Werkzeug makes an exception of each that is not there.)"""
    return as_text(request.scope["aura.headers"].get(name, default))  # type: ignore[typeddict-item]


def refusal_of(error: Any) -> Refusal:
    """What may go wrong with a request, as the refusal it is."""
    match error:
        case Wrong():  # in the form FastAPI gives it, which Aura's clients know
            detail = {"loc": list(error.path), "msg": error.says, "type": "value_error"}
            return Refusal(422, detail=[detail])
        case Mistake():
            return Refusal(422, str(error), **vars(error))
        case HTTPException():
            says = f"{error.name}: {error.description}"
            allowed = {name: value for name, value in error.get_headers() if name == "Allow"}
            return Refusal(error.code or 500, says, allowed)
    return error  # type: ignore[no-any-return]


def cause_of(refusal: Refusal) -> str:
    """Its cause, for log and journal."""
    body = refusal.body or {}
    said = body.get("error") or body.get("detail") or body.get("message")
    said = str(said or {204: "finished and fully seen"}.get(refusal.status, "no tenant"))
    return said + (f", the limit is {body['limit']}" if "limit" in body else "")


def query(kind: Any) -> Any:
    """The query of this request, its numbers as numbers, or the 400 in a sentence."""
    try:
        return checked(kind, request.args.to_dict(), strict=False)
    except Wrong as wrong:
        raise Refusal(400, f"the query {wrong}") from None


class ClientService(Service):
    """Which scenario a trigger starts, and which one a viewer gets.

    `doors` is its table of ways in, beside those of part 1: a method and a path, and what answers
    there. Later classes add rows.
    """

    make_request: ClassVar[Any] = JournaledRequest  # a door

    def __init__(self, settings: Any, analysis: Any = None, catalogue: Any = None) -> None:
        super().__init__(settings, analysis)
        self.journal = Journal(settings.max_journal)
        self.chooser = ScenarioChooser(settings, catalogue or known_scenarios(settings))
        self.ordinary = {
            name: Attempts((phase.stream(settings),)) for name, phase in PHASES.items()
        }

    def application(self, hub: BoundedHub) -> QuartTrio:
        """All its doors, over the runs of this hub."""
        self.hub = hub
        self.began = hub.clock.now()
        hub.also = self.chooser.weight
        app = make_app(self)
        limits = self.settings
        app.config.update(MAX_CONTENT_LENGTH=limits.max_body, BODY_TIMEOUT=limits.body_timeout)
        app.asgi_http_class = partial(self.make_request, self.journal)  # type: ignore[assignment]
        app.before_request(self.admit)
        app.after_request(self.sign)
        for error in (Refusal, Wrong, Mistake, HTTPException):
            app.register_error_handler(error, self.refuse)

        for way, method in self.doors.items():
            verb, path = way.split()
            view = partial(self.enter, method)
            app.add_url_rule(path, f"{method.__name__} {way}", view, methods=[verb])
        return app

    async def enter(self, method: Callable[..., Any], **path: Any) -> Response:
        """By one of its doors: a method answers, at once or when it is awaited, with a response or
        with what a 200 tells."""
        said = method(self, **path)
        if inspect.isawaitable(said):
            said = await said
        return said if isinstance(said, Response) else answer(said)

    async def admit(self) -> Response | None:
        """Before every request: which route it takes, and whose run it is about. A door: part 3
        lets in whom it may."""
        this = entry()
        named = request.view_args or {}
        this.case_id = named.get("case_id")
        this.run_id = named.get("run_id", named.get("job_id"))
        if request.url_rule:
            this.pattern = request.url_rule.rule
        if this.case_id:
            this.stream_name = "case_analysis_stream"
        # routes are called by what they are
        kind = (request.endpoint or "").partition(" ")[0].rpartition("_")[2]
        if kind in ("stream", "trigger") and request.method in ("GET", "POST"):
            this.kind = kind
        return None

    async def sign(self, response: Response) -> Response:
        """What every answer carries. A door: part 3 says who may read it."""
        response.headers["X-Request-ID"] = entry().request_id
        return response

    async def refuse(self, error: Any) -> Any:
        """How a refusal leaves, wherever it was made: said in the log and in the journal, and no
        attempt at anything."""
        this = entry()
        refusal = refusal_of(error)
        why = safe(f"refused: {cause_of(refusal)}")
        logger.info("[%s] %d %s", this.request_id, refusal.status, why)
        this.notes.append(why)
        this.attempt = None  # no script of a scenario plays
        return refusal.script or answer(refusal.body, refusal.status, refusal.headers)

    def chosen(self, body: Any = None) -> Scenario | None:
        """What the request itself chooses, if anything. Where anybody may come without a token,
        which is below /api, that is a scenario that is known here."""
        wanted = header(b"x-aura-scenario") or request.args.get("scenario") or body
        if wanted is None:
            return None
        name = isinstance(wanted, str) and not wanted.startswith("{")
        if not name and request.path.startswith("/api/"):
            error = "where no token is needed, a scenario is a name of the catalogue"
            hint = "put yours into --scenarios FILE, or bind it to a job: POST /__aura/next"
            raise Refusal(400, error, hint=hint)
        return self.chooser.read(wanted)

    async def asked(self, case_id: str, phase: str) -> TriggerRequest:
        """What this trigger asks for, its known fields checked; a missing runId is minted."""
        body = await told(TRIGGER_BODY[phase])
        given = body.get("runId") not in (None, "")
        run_id = body["runId"] if given else uuid.uuid4()
        return TriggerRequest(str(run_id), case_id, phase, body, given)

    def trigger(self, order: TriggerRequest) -> tuple[Any, str, Any]:
        """The run a trigger asks for, if it may start; whether it was `started` or `known`; and
        how the scenario answers, if it does."""
        this = entry()
        chooser = self.chooser
        this.run_id = order.run_id
        asked = self.chosen(order.body.get("scenario"))
        run = self.known(order, asked)
        scenario = run.scenario if run else asked or chooser.meant(order.run_id, order.case_id)
        scenario = scenario or chooser.ordinary(PHASES[order.phase].scenario)
        whose = ("run", order.run_id) if order.given else ("case", order.case_id)
        attempt = chooser.count("trigger", scenario.name, *whose, this.tenant_id or "")
        this.plays(scenario, attempt)
        script = scenario.trigger.of(attempt) if scenario.trigger else None
        if run is None and not refuses(script):
            return self.start(order, scenario), "started", script
        return run, "known", script

    def known(self, order: TriggerRequest, asked: Scenario | None) -> Any:
        """The run that this trigger means, if there is one; or why it can neither have that nor
        start another. The order of these refusals is the contract's."""
        this = entry()
        run_id = order.run_id
        run = self.hub.find(run_id)
        if run and not may_see(this.tenant_id, run.info.tenant_id):
            raise self.unknown(run_id)
        if this.kind == "stream":
            self.make_room()
        if self.settings.demo_off:
            off = {"accepted": False, "runId": run_id} if order.phase == "phase3" else {
                "status": "disabled"}
            raise Refusal(200, **off, message="Analysis disabled (DEMO_OFF)")
        if run and trio.current_time() - run.ended_clock >= self.settings.retrigger_window:
            run = None
        if run and asked and asked.source != run.scenario.source:
            error = f"this run goes with scenario {run.scenario.name!r}; take another runId"
            raise Refusal(409, error, runId=run_id)
        if run is None and self.hub.refusal:
            raise Refusal(503, self.hub.refusal, {"Retry-After": "5"})
        return run

    def start(self, order: TriggerRequest, scenario: Scenario) -> Any:
        """Start the run. It weighs what its request does, and its scenario, if that is its own: so
        what is held in memory is what is counted."""
        kept = 0 if scenario in self.chooser.catalogue.values() else scenario.weight
        evidence = 2 * weight(order.body.get("evidence"))  # in the request, and in its event
        info = ScriptedInfo(**{
            **vars(self.info(order)), "tenant_id": entry().tenant_id, "test_id": entry().test_id,
            "weight": weight(order.body) + evidence + kept, "kept": kept,
        })
        return self.hub.start(info, scenario, scripted(scenario, self.hub.gates, self.analysis))

    def accepted(
        self, order: TriggerRequest, status: int = 202, told: Told | None = None
    ) -> Response:
        """The answer to a trigger: what `told` says, or the usual; as the scenario wants it, if it
        wants something."""
        run, how, script = self.trigger(order)
        told = told or ACCEPTED[order.phase](order, run.info.case_id if run else order.case_id)
        if script is None:
            response = answer(told, status, self.echo())
        else:
            played = self.played(script)
            played.delivery.usual = {"status": status, "body": told}
            response = played
        if run:
            response.headers["x-aura-run"] = how
        return response

    def stream(self, run_id: str | None) -> Response:
        """One viewer's stream of this run: which script, from where."""
        this = entry()
        this.run_id = run_id
        if run_id is None:
            raise Wrong("the query needs runId=…", "query", "runId")
        if not run_id:
            raise Refusal(400, "runId is required", runId=None)
        asked = self.chosen() if request.method != "POST" else None
        run = self.hub.find(run_id, tenant=this.tenant_id)
        if request.method != "HEAD" and (run or self.hub.find(run_id) is None):
            self.make_room()  # another tenant's run is unknown, whether there is room or not
        if run is None:
            return self.without_a_run(run_id, asked)

        # where it left off; the query is for those who cannot send a header
        given = request.args.get("lastEventId") or request.args.get("last-event-id")
        this.last_event_id = header(b"last-event-id") or given
        this.resumed_after = resume_point(this.last_event_id, run.log.last)
        this.case_id = this.case_id or run.info.case_id

        # which attempt at which scenario: another than the run's own has a count of its own
        scenario = asked or run.scenario
        before = run.attempts.get(scenario.name, 0)
        attempts = scenario.stream or self.ordinary[run.info.phase]
        script = attempts.of(before + 1)

        # where a script is meant, it plays; where the stream is the ordinary one, a 204 is kinder
        plain = scenario.stream is None or (attempts.repeats(before + 1) and script in PLAIN)
        if plain and run.ended and 0 < this.resumed_after == run.log.last:
            raise Refusal(204)  # finished and fully seen: this stops a native EventSource
        this.plays(scenario, before)
        if request.method == "HEAD":
            return Response(b"", 200, STREAM_HEAD | self.echo())  # opens no delivery
        # a thousand, for inline scenarios have names that anybody can make up
        this.attempt = counted(run.attempts, scenario.name, 1000)
        self.say_begun(this)
        ordinary = scenario.stream is None and run.info.phase != "generation"
        return self.played(None if ordinary else script, run)  # then part 1's own delivery plays

    def say_begun(self, this: Entry) -> None:
        """The lines that Aura's guides tell people to look for."""
        this.say("start consuming")
        if not this.last_event_id:
            return
        text = "SSE connection established (client reconnected) run_id=%s last_event_id=%s"
        logger.info(text, safe(this.run_id), safe(this.last_event_id))
        if not this.resumed_after and this.last_event_id != "0":
            this.notes.append("its Last-Event-ID is no event of this run: from the start")

    def make_room(self) -> None:
        """Refuse a viewer too many. (What is decided here has opened its delivery before anybody
        else is asked: there is no checkpoint in between.) An EventSource, which sends no token,
        ends for good at a 503; so it gets a short stream, and the time at which to come again."""
        limit = self.settings.max_sse_connections
        if self.hub.streams < limit:
            return
        pause = random.randint(1000, 10_000)  # ms: each client its own
        again = {"Retry-After": str(pause // 1000)}
        refusal = Refusal(503, "too many open streams", again, limit=limit)
        text = "%s (--max-sse-connections) run_id=%s"
        logger.warning(text, cause_of(refusal), safe(entry().run_id))
        if "text/event-stream" in header(b"accept") and not header(b"authorization"):
            text = f"retry: {pause}\n\n: {cause_of(refusal)}\n\n"
            refusal.script = Response(text, 200, STREAM_HEAD)
        raise refusal

    def without_a_run(self, run_id: str, asked: Scenario | None) -> Response:
        """A script that needs no log plays for an unknown run too, and only then it is an attempt.
        What could not play is not used up."""
        this = entry()
        chooser = self.chooser
        if request.method == "HEAD":
            raise self.unknown(run_id)
        scenario = asked or chooser.meant(
            run_id, this.case_id, lambda one: one.stream and not relays(one.stream.of(1)))
        if scenario and scenario.stream:
            what = ("stream", scenario.name, run_id, this.tenant_id or "")
            script = scenario.stream.of(chooser.count(*what, more=0) + 1)
            if not relays(script):
                self.make_room()
                this.plays(scenario, chooser.count(*what))
                return self.played(script)
        this.say("runId not found or already completed")
        raise self.unknown(run_id)

    def played(self, script: Script | None, run: Any = None) -> Streamed:
        """The answer that this script is. A job's ids have its name in front."""
        job = run and run.info.phase == "generation" and self.settings.event_ids
        play = JobDelivery if job else ScriptedDelivery
        response = Streamed(play(script, entry(), self.hub, run, below(request.scope)))
        response.headers |= self.echo()
        return response

    def echo(self) -> dict[str, str]:
        """What an answer says of the choice that was made."""
        this = entry()
        return {
            "x-aura-run-id": in_one_line(this.run_id or "", UNSEEN),
            "x-aura-instance": in_one_line(self.instance, UNSEEN),
            "x-aura-scenario": this.scenario or "",
            "x-aura-attempt": str(this.attempt),
        }

    def seen(self, run_id: str) -> Any:
        """The run, or the 404 that helps: also to a run of another tenant, which must not learn
        that it is there."""
        run = self.hub.find(run_id, tenant=entry().tenant_id)
        if run is None:
            raise self.unknown(run_id)
        return run

    def unknown(self, run_id: str) -> Refusal:
        """The 404 that helps: where it was looked for, what is like it, or that it has been
        forgotten. It counts and names only runs that this caller may see."""
        tenant = entry().tenant_id
        live = [run.info.run_id for run in self.hub.seen_by(tenant) if not run.ended]
        short = [one for one in live if len(one) <= 64]  # to compare is slow
        close = difflib.get_close_matches(run_id[:64], short[-200:], n=1)
        hint = f"no such run on instance {self.instance}, where {len(live)} live"
        hint += f"; did you mean {close[0]!r}?" if close else ""
        if self.hub.was_here(run_id, tenant=tenant):
            hint = f"it has ended and was forgotten by instance {self.instance}; trigger it again"
        status = int(self.settings.unknown_run) if entry().kind == "stream" else 404
        return Refusal(status, "runId not found or already completed", runId=run_id, hint=hint)

    async def trigger_stream(self, case_id: str) -> Response:
        """To trigger and watch at once."""
        return self.triggered(await self.asked(case_id, "phase2"))

    def triggered(self, order: TriggerRequest) -> Response:
        """The stream of the run that this starts, or the trigger script's own answer."""
        run, _, script = self.trigger(order)
        if refuses(script):
            return self.played(script)
        return self.stream(run.info.run_id)

    def last_result(self, case_id: str) -> Told:
        """The last result of a case: of its newest run that has completed."""
        visible = self.hub.seen_by(entry().tenant_id)
        done = [run for run in visible if (run.info.case_id, run.status) == (case_id, "completed")]
        if not done:
            hint = "trigger a run of it, and wait until that has completed"
            raise Refusal(404, "no completed analysis of this case", caseId=case_id, hint=hint)
        return result_of(done[-1])

    doors: ClassVar[Any] = {
        "POST /aura/cases/<case_id>/analysis/trigger": trigger_stream,
        "GET /aura/cases/<case_id>/analysis": last_result,
    }


def said_last(log: BoundedLog, name: str, count: int = 1) -> list[Any]:
    """The data of the last events of this name, read back from the bytes that viewers get; only
    objects: text is not a result."""
    first = max(log.first, log.last - 10_000)  # further back is too far to look
    places = [at for at, one in enumerate(log.names_of(first - 1, log.last), first) if one == name]
    found: list[Any] = []
    for place in places[-count:]:
        block, _ = log.read(place - 1, most=1)
        with contextlib.suppress(ValueError):
            found += map(json.loads, re.findall(rb"^data: (\{.*)", block, re.MULTILINE))
    return found


def result_of(run: ScriptedRun) -> Told:
    """The result of a run, read from its log: what was streamed is what was found."""
    last = (said_last(run.log, "completed") or [{}])[0]
    breakdown = (said_last(run.log, "confidence") or [None])[0]
    return {
        "caseId": run.info.case_id, "reasonText": last.get("summary"),
        "proposals": said_last(run.log, "proposal", 100) or None,
        "confidenceBreakdown": breakdown, "ragRefs": [], "similarCases": [],
        "score": last.get("score"), "severity": last.get("severity"),
    }


# ═══ 17  Control ══════════════════════════════════════════════════════════════════════════════════
# `/__aura`: what the double can do, what is to happen, what has happened. Each way in is a row of
# the table at the end of the class, and a method that returns what is told; what is asked has its
# form here. A mistake in a body is a 422 that names the field, one in a query a 400.

Word = that("a text that is not empty", bool)
HOW = form(how=like("end|drop|reset"))
RESET = form(testId=Word)
JOURNAL = form(
    runId=Word, testId=Word, kind=like("stream|trigger|request"), since=number(int, 0, 10**15),
    count=Some, within=number(float, 0, 3600), view=like("calls"))
NEXT = form(
    "scenario", scenario=str | dict, times=Some | None, caseId=RunId | None, testId=Text)
SIGNAL = form("gate", gate=str, runId=RunId | None)
EMIT = form("runId event data", runId=RunId, event=Line, data=Any)
CLOCK = form("advance", advance=number(float, 0, 10**9))


class Control(ClientService):
    """The control of the double, for the one who tests with it: it sees the runs of all tenants."""

    def now(self) -> float:
        """Script seconds since the start."""
        return float(round(self.hub.clock.now() - self.began, 3))

    def control_health(self) -> Told:
        """Always open: who has started it waits for this."""
        rate = self.hub.clock.rate
        mode = {1.0: "real", math.inf: "max"}.get(rate, f"x{rate:g}")
        return {
            "status": "ok", "version": __version__, "pid": os.getpid(), "url": self.url,
            "instance": self.instance, "clock": {"mode": mode, "now": self.now()},
        }

    def list_scenarios(self) -> Told:
        known = self.chooser.catalogue.values()
        return {"scenarios": [{"name": one.name, "doc": one.doc} for one in known]}

    async def check_scenario(self) -> Told:
        """Whether it would play; else the 422 says where the mistake is."""
        parse_scenario(await told(Any))
        return {"ok": True}

    async def bind_next(self) -> Told:
        """The next triggers get this scenario: one, so many, or with null all until a reset."""
        body = await told(NEXT)
        scenario = self.chooser.read(body["scenario"])
        times = body.get("times", 1)
        case_id = checked(RunId | None, body.get("caseId"))  # as a text
        bindings = self.chooser.bindings
        most = self.settings.max_bindings
        limit = self.settings.max_log_bytes
        if len(bindings) >= most or scenario.weight + self.hub.held > limit:
            error = f"at most {most} bindings wait, and the limit is {limit} bytes"
            raise Refusal(409, error + "; POST /__aura/reset forgets them")
        bindings.append(Binding(scenario, times or math.inf, case_id, body.get("testId")))
        return {"scenario": scenario.name, "times": times, "caseId": case_id}

    async def signal_gate(self) -> Told:
        """Open a gate, for one run or for all, for good."""
        body = await told(SIGNAL)
        gates = self.hub.gates
        run_id = checked(RunId | None, body.get("runId"))
        if run_id is not None:
            self.seen(run_id)
        if not gates.signal(body["gate"], run_id):
            error = f"{gates.most} gates are open already; POST /__aura/reset closes them"
            raise Refusal(409, error)
        return {"open": body["gate"], "runId": run_id}

    async def move_clock(self) -> Told:
        """Move script time ahead; whatever is due on the way comes in its turn."""
        await self.hub.clock.advance((await told(CLOCK))["advance"])
        return {"now": self.now()}

    async def emit(self) -> Told:
        """Speak into a live run's channel, as its analysis does; where that has said its last word,
        nobody listens any more."""
        body = await told(EMIT)
        run = self.seen(str(body["runId"]))
        with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            with run.sending.clone() as sending:
                await sending.send(Event(body["event"], body["data"]))
            return {"emitted": body["event"]}
        error = f"this run has ended ({run.status}), nobody listens any more"
        raise Refusal(409, error, runId=body["runId"])

    def list_connections(self) -> Told:
        """What is open now, oldest first."""
        entries = [one.entry for one in self.hub.deliveries]
        shown = [{"id": one.seq, **self.journal.show(one)} for one in entries]
        return {"connections": shown}

    def close_connections(self, number: int | None = None) -> Told:
        """End, drop or reset one of them, or all."""
        how = query(HOW).how or "end"
        chosen = (one for one in self.hub.deliveries if number in (None, one.entry.seq))
        count = close_all(chosen, how)
        if number is not None and not count:
            raise Refusal(404, f"no open connection has the id {number}")
        return {"closed": count, "how": how}

    def show_tasks(self) -> Response:
        """Trio's own tree, as far as it is ours: nurseries, in them tasks, and where each waits."""
        lines = drawn(trio.lowlevel.current_root_task())
        return Response("\n".join([*lines, ""]), content_type="text/plain; charset=utf-8")

    async def read_journal(self) -> Told:
        """What is there; or with `count`, the first so many that are finished, within the time."""
        journal = self.journal
        asked = query(JOURNAL)
        wanted = {"run_id": asked.runId, "test_id": asked.testId, "kind": asked.kind}
        since = asked.since or 0
        count = asked.count or 0
        within = 5 if asked.within is None else asked.within
        found = journal.find(wanted, since=since)
        if count:
            found = await journal.wait(count, wanted, since=since, within=within)
        show = self.as_call if asked.view else journal.show
        entries = [show(one) for one in found]
        if len(found) < count:
            missing = f"{len(found)} of {count} finished entries came within {within:g} s"
            raise Refusal(408, missing, entries=entries)
        return {"entries": entries}

    def as_call(self, entry: Entry) -> Told:
        """The entry as the gateway's call history has it."""
        shown = {**self.journal.show(entry), "statusCode": entry.status}
        names = ("path", "statusCode", "latency", "tenantId", "userId", "agentId", "end")
        return {name: shown[name] for name in names}

    def reset(self) -> Told:
        """Forget everything, or what is of one test."""
        test_id = query(RESET).testId
        why = Failure("the control API forgot the run", stage="cancelled", retryable=False)
        self.hub.reset(why, test_id)
        self.journal.forget(test_id)
        self.chooser.reset(test_id)
        if test_id is None:
            self.hub.gates.open.clear()
        return {"reset": test_id or "all"}

    def shut_down(self) -> Response:
        """Stop, as SIGTERM does."""
        if not self.url:
            raise Refusal(409, "this application runs in memory: end its nursery")
        self.stop()
        return answer({"status": "stopping"}, 202)

    doors = ClientService.doors | {
        "GET /__aura/health": control_health,
        "GET /__aura/scenarios": list_scenarios,
        "GET /__aura/scenarios/<name>": lambda self, name: self.chooser.named(name).source,
        "POST /__aura/check": check_scenario,
        "POST /__aura/next": bind_next,
        "POST /__aura/signal": signal_gate,
        "POST /__aura/emit": emit,
        "POST /__aura/clock": move_clock,
        "GET /__aura/runs":
            lambda self: {"runs": [state_of(run) for run in self.hub.seen_by(None)]},
        "GET /__aura/runs/<run_id>": lambda self, run_id: state_of(self.seen(run_id)),
        "GET /__aura/connections": list_connections,
        "DELETE /__aura/connections": close_connections,
        "DELETE /__aura/connections/<int:number>": close_connections,
        "GET /__aura/tasks": show_tasks,
        "GET /__aura/journal": read_journal,
        "POST /__aura/reset": reset,
        "POST /__aura/shutdown": shut_down,
    }


def drawn(task: Any, depth: int = 0) -> Iterator[str]:
    """A task, and under it the nurseries that it has opened; of others' tasks, what they hold."""
    ours = [frame for frame in frames_of(task) if frame.f_code.co_filename == __file__]
    name = task.name.removeprefix(f"{__name__}.")
    if ours or name.isidentifier():  # others' tasks are called by what they run
        place = ours[-1].f_code.co_qualname if ours else name
        yield "   " * depth + name + (f"  <- {place}" if place != name else "")
        depth += 1
    for nursery in task.child_nurseries:
        if opened := name_of(nursery, ours):
            yield f"{'   ' * depth}nursery {opened}"
            depth += 1  # whatever the task opens behind it is inside it
        for child in sorted(nursery.child_tasks, key=lambda one: one.name):
            yield from drawn(child, depth)


def name_of(nursery: trio.Nursery, frames: Iterable[types.FrameType]) -> str:
    """The variable that holds it; where that says only "nursery", the function that opened it."""
    for frame in frames:
        for name, value in frame.f_locals.items():
            if value is nursery:
                return f"of {frame.f_code.co_name}" if name == "nursery" else name
    return ""


def frames_of(task: Any) -> Iterator[types.FrameType]:
    """The frames of its coroutines, outermost first; each coroutine knows the one it awaits."""
    step = task.coro
    while (frame := getattr(step, "cr_frame", None)) is not None:
        yield frame
        step = step.cr_await


# ═══ 18  The double ═══════════════════════════════════════════════════════════════════════════════
# All of part 2, served; and `running()`, for tests. What this part needs of a connection, beside
# what Hypercorn has, is to break it: so it plays every scenario, and says who closed first. That no
# client can harm it is part 3's concern.


@dataclass(frozen=True)
class Aura:
    """A running server, from outside. Its methods ask over HTTP and block: they are for threads,
    not for the server's own tasks."""

    url: str
    port: int
    stop: Callable[[], None]
    bearer: str = field(default="aura", repr=False)  # the admin token, if there is one

    def trigger(
        self, case: str | int, *, run_id: str | None = None, scenario: Any = None, **body: Any
    ) -> str:
        """Start a run of this case; its id."""
        path = f"/aura/cases/{encoded(str(case))}/analysis-runs"
        reply = self._ask("POST", path, {"runId": run_id, "scenario": scenario, **body})
        if not hasattr(reply, "run_id"):
            raise RuntimeError(f"POST {path} was answered without a runId: {reply}")
        return str(reply.run_id)

    def journal(
        self, run_id: str | None = None, *, kind: str | None = "stream", count: int | None = None,
        within: float = 5,
    ) -> list[Any]:
        """The journal's entries, oldest first; with `count` it waits for so many that are
        finished. Attributes are the JSON names in snake_case."""
        wanted = {"runId": run_id, "kind": kind, "count": count}
        given = {name: value for name, value in wanted.items() if value is not None}
        path = "/__aura/journal?" + urlencode({"within": within, **given})
        return list(self._ask("GET", path, patience=within).entries)

    def next(self, scenario: Any, *, times: int | None = 1, case: str | None = None) -> None:
        """The next triggers get this scenario: so many of them, or with None all until a reset."""
        self._tell("next", scenario=scenario, times=times, caseId=case)

    def signal(self, gate: str, run_id: str | None = None) -> None:
        """Open a gate, for one run or for all."""
        self._tell("signal", gate=gate, runId=run_id)

    def emit(self, run_id: str, event: str, data: Any) -> None:
        """Let a live run say this."""
        self._tell("emit", runId=run_id, event=event, data=data)

    def advance(self, seconds: float) -> None:
        """Move script time ahead."""
        self._tell("clock", advance=seconds)

    def reset(self) -> None:
        """Forget runs, journal, bindings and gates."""
        self._tell("reset")

    def scenarios(self) -> dict[str, str]:
        """The catalogue: each name with what a client sees."""
        return {one.name: one.doc for one in self._ask("GET", "/__aura/scenarios").scenarios}

    def _tell(self, what: str, **body: Any) -> None:
        self._ask("POST", f"/__aura/{what}", body)

    def _ask(self, method: str, path: str, body: Any = None, *, patience: float = 0) -> Any:
        """Ask, and wait. A refusal is a RuntimeError with what was answered."""
        token = os.fsencode(f"Bearer {self.bearer}")
        headers: Any = {"Authorization": token, "Content-Type": "application/json"}
        content = None if body is None else to_bytes(to_json(body))
        wire = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10 + patience)
        with contextlib.closing(wire):
            wire.request(method, path, content, headers)
            reply = wire.getresponse()
            said = reply.read().decode()
        if reply.status not in (200, 202):
            raise RuntimeError(f"{method} {path} was answered {reply.status}: {said[:1000]}")
        return json.loads(said, object_hook=attributes)


def attributes(said: Mapping[str, Any]) -> types.SimpleNamespace:
    """An object of JSON, its names in snake_case."""
    return types.SimpleNamespace(
        **{re.sub("([A-Z])", r"_\1", name).lower(): value for name, value in said.items()})


@dataclass
class StockConnection(NoSocket):
    """Hypercorn's connection, as it comes, and a way to cut it. (Part 3 has one that a client
    cannot harm.)"""

    service: Service
    stream: trio.SocketStream

    def blame(self) -> Ending:
        """Who has not ended by the end of the grace was cut; before that, it left."""
        return CUT if self.service.hub.stopping else LEFT

    def cut(self, *, reset: bool = False) -> None:  # type: ignore[override]
        """Close the socket: Hypercorn's reader finds it gone, and ends the request."""
        cut_off(self.stream.socket, reset=reset)


def cut_off(raw: Any, *, reset: bool) -> None:
    """Close a socket at once: no last chunk, no goodbye."""
    with contextlib.suppress(OSError):
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            raw.shutdown(socket.SHUT_WR)
    raw.close()


class Double(Control):
    """The double, on connections as Hypercorn makes them; its clock may jump."""

    def open(self, runs: trio.Nursery, clocks: trio.Nursery) -> Any:
        hub: Any = BoundedHub(self.settings, runs)
        if hub.clock.rate == math.inf:
            clocks.start_soon(hub.clock.jump, name="clock")
        return self.application(hub)

    async def attend(self, app: ASGIWrapper, context: WorkerContext, stream: Any) -> None:
        trio.lowlevel.current_task().name = "connection"
        state: Any = {"connection": StockConnection(self, stream)}
        await TCPServer(app, Config(), context, state, stream).run()

    def handle(self) -> Aura:
        """For threads: they may stop it as often as they like, from wherever they are."""
        token = trio.lowlevel.current_trio_token()

        def stop_from_any_thread() -> None:
            """Also when it has stopped."""
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self.stop)

        bearer = self.settings.admin_token or "aura"
        return Aura(self.url, self.port, stop_from_any_thread, bearer)


class Settings(DoubleSettings):
    """All that can be set, of a whole double."""

    make_service: ClassVar[Any] = Double  # a door: part 3 has a service of its own


def create_app(
    settings: Any, hub: BoundedHub, catalogue: Any = None, *, analysis: Analysis | None = None
) -> QuartTrio:
    """The application in memory, over the runs of this hub."""
    return Settings.make_service(settings, analysis, catalogue).application(hub)  # type: ignore[no-any-return]


@contextlib.contextmanager
def running(
    settings: Settings | None = None, *, analysis: Analysis | None = None, **fields: Any
) -> Iterator[Aura]:
    """A server in a thread, for tests in any framework: ready when this yields, on a free port.

    A failed start raises here, as the OSError it was; a crash of the server raises at the end.
    """
    # what is not said, or None, is as in `settings`
    settings = settings or Settings()
    port = 0 if settings.port == Settings.port else settings.port  # the usual one may be taken
    given = {name: value for name, value in fields.items() if value is not None}
    if "speed" in given:
        given["speed"] = str(given["speed"]).replace("inf", "max")
    settings = dataclasses.replace(settings, **{"port": port, **given})
    started: Future[Aura] = Future()
    crashes: list[BaseException] = []
    status: Any = types.SimpleNamespace(started=started.set_result)

    def thread() -> None:
        try:
            trio.run(partial(serve, settings, analysis=analysis, task_status=status))
        except BaseException as error:  # noqa: BLE001  # handed over to the thread that waits
            (crashes.append if started.done() else started.set_exception)(innermost(error))

    def stop() -> list[BaseException]:
        """Stop it, if it runs; and how it has crashed."""
        if worker.is_alive() and not started.exception():  # in a forked process it is not
            started.result().stop()
        worker.join(settings.grace + 5)
        if worker.is_alive():
            late = f"no stop within {settings.grace + 5:g} s"
            raise RuntimeError(f"{late}: an analysis does not heed its cancellation")
        return crashes

    worker = threading.Thread(target=thread, name="aura-stream", daemon=True)
    worker.start()
    try:
        yield started.result()
    except BaseException as error:
        for crash in stop():
            error.add_note(f"and the server had crashed: {crash!r}")
        raise
    for crash in stop():
        raise crash


# ═══ Part 3  In operation ═════════════════════════════════════════════════════════════════════════
# What it takes to be asked by everybody, day and night: connections that nothing kills, who may
# ask, jobs, metrics, and what an operator may do. The service of part 2, with more doors.


# ═══ 19  What ASGI cannot say ═════════════════════════════════════════════════════════════════════
# The fenced corner: a connection of our own, on h11. ASGI knows no socket, no send deadline and no
# "close now"; and the stock connections of part 1 have bugs that a server for experiments with
# failure cannot afford: one bad request ends the process, one reader that stops holds up the stop,
# an idle connection is never closed. Each has a test that fails on the stock server.

PIECE = 64 * 2**10  # bytes that have one send deadline
WHOLE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)  # a client has said all it has to say
GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Connection:
    """One socket, its requests one after the other. Its trouble stays its own, its sends have a
    deadline, it can be cut; the task that reads notices when the client leaves, and ends the
    rest."""

    lost = False  # the peer is gone, or we have cut it off
    unsent = False  # it was gone, or stalled, when we had something to write
    half_closed = False  # the client says no more; what it asked for may still be answered
    _streams = False  # what it asked for is a stream
    _last = False  # no request comes after this one
    _closing = False  # we say goodbye
    _leave_by = math.inf  # when the stopping server's grace is over
    _ending: Ending | None = None  # why it ended, where that was not the request's doing
    _method = b""
    _reader: Any = None  # who wants the request's body
    _heard = False  # all of it is there
    _held = False  # an answer whose length is known goes out whole
    _chunked = False
    _bare = False  # an answer without a body, whatever the application says
    _answer_is = ""  # then its head is out, then the whole

    def __init__(self, app: Any, service: Service, stream: trio.SocketStream) -> None:
        self.app = app
        self.service = service
        settings = self.settings = service.settings
        self.stream = stream
        self._wire = self._parser()
        # patience with a client that sends nothing, and with one that reads nothing
        self._patience = trio.move_on_after(settings.keep_alive or settings.head_timeout)
        self._sending = trio.CancelScope()
        self._lock = trio.Lock()
        self.waiting: list[bytes] = []  # what goes out with what comes next

    def _parser(self) -> h11.Connection:
        """One for each request. It only reads: what we write needs no state machine."""
        most = self.settings.max_head
        return h11.Connection(h11.SERVER, max_incomplete_event_size=most)

    async def run(self) -> None:
        raw = self.stream.socket
        try:
            self._names = raw.getpeername(), raw.getsockname()  # if it is still there
            async with trio.open_nursery() as requests:
                self._requests = requests
                await self._read()
                if not self.half_closed:
                    self.give_up()
        except* OSError:
            pass  # the peer is gone, and there is nobody to tell
        except* Exception as errors:  # noqa: BLE001  # else one bad request ends every connection
            logger.warning("connection ended by an error: %s", safe(explained(errors).error))
        finally:
            raw.close()

    # What the client sends

    async def _read(self) -> None:
        """Hand on what the client sends, until it leaves, is too slow, or we have closed."""
        thrown = 0
        data = b"?"
        with self._patience, contextlib.suppress(*GONE):
            while data and thrown <= self.settings.max_linger:
                data = bytes(await self.stream.receive_some(2**16))
                if self._closing:
                    thrown += len(data)
                elif data:
                    await self._take(data)

        wire = self._wire
        if self._closing:
            if thrown and data:
                logger.info("cut a refused client that was still sending, after %d bytes", thrown)
        elif self._patience.cancelled_caught and wire.trailing_data[0]:
            await self._refuse(408)
        elif self._patience.cancelled_caught:
            logger.debug("closed a connection that was idle for %g s", self.settings.keep_alive)
        elif not (data or self._streams) and wire.their_state in WHOLE:
            # perhaps it has left, perhaps it waits for its answer: nobody can tell
            self.half_closed = self._last = True
            self._ending = LEFT
            self._requests.cancel_scope.deadline = trio.current_time() + self.settings.head_timeout

    async def _take(self, data: bytes) -> None:
        """Bytes of the client's. There is no pipelining: what comes behind a request before its
        answer is out is thrown away, and that answer is the last."""
        wire = self._wire
        if wire.their_state in WHOLE and self._answer_is != "whole":
            self._last = True
            return
        if wire.their_state is h11.IDLE and not wire.trailing_data[0]:
            self._patience.deadline = trio.current_time() + self.settings.head_timeout
        wire.receive_data(data)
        await self._go_on()

    async def _go_on(self) -> None:
        """What these bytes say."""
        wire = self._wire
        try:
            while True:
                if wire.they_are_waiting_for_100_continue and not self._answer_is:
                    self.waiting = [b"HTTP/1.1 100 \r\n\r\n"]
                    await self._write()
                match wire.next_event():
                    case h11.Request() as request:
                        await self._begin(request)
                    case h11.Data(data=data):
                        self._hear_body(bytes(data))
                    case h11.EndOfMessage():
                        self._hear_body(b"")
                        self._last = self._last or bool(wire.trailing_data[0])
                        return
                    case _:
                        return
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)

    async def _begin(self, request: h11.Request) -> None:
        """A request has come: a task of its own answers it."""
        self._patience.deadline = math.inf
        headers = list(request.headers)
        size = sum(len(name) + len(text) + 4 for name, text in headers) + len(request.target)
        too_big = size > self.settings.max_head
        if too_big or request.http_version not in (b"1.0", b"1.1"):
            await self._refuse(431 if too_big else 505)
            return
        if any(name == b"upgrade" for name, _ in headers):
            logger.warning("Unsupported upgrade request.")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            self._last = True  # RFC 9112, 6.1: smuggling, perhaps
        # a host in the target counts, whatever `Host` says (RFC 9112, 3.2.2)
        *whole, target = re.split(rb"^https?://([^/?]*)", request.target, flags=re.IGNORECASE)
        if whole:
            headers = [pair for pair in headers if pair[0] != b"host"] + [(b"host", whole[1])]
        path, _, query = target.removeprefix(b"/").partition(b"?")
        self._body = bytearray()
        self._heard = False
        self._reader = None
        self._method = request.method
        client, server = self._names
        self._requests.start_soon(self._answer, {
            "type": "http", "asgi": {"version": "3.0"}, "scheme": "http", "root_path": "",
            "http_version": request.http_version.decode(), "method": request.method.decode(),
            "path": "/" + unquote(path.decode()), "raw_path": b"/" + path, "query_string": query,
            "headers": headers, "client": client[:2] or None, "server": server[:2] or None,
            "state": {"connection": self}, "extensions": {},
        })

    def _hear_body(self, data: bytes) -> None:
        """A part of the body, or with no bytes its end. What is too big ends at its first byte too
        many: who wants it will see that."""
        if not self._heard:
            self._body += data
            self._heard = not data or len(self._body) > self.settings.max_body
            if self._reader:
                self.feed(self._reader)

    def feed(self, reader: Any) -> None:
        """The whole body goes to this reader of Quart's, as soon as it is there; with None to
        nobody: beside a stream it may last as long as that."""
        self._reader = reader
        if reader is None:
            self._heard = True
        elif self._heard:
            reader.set_result(bytes(self._body))
        if self._heard:
            self._body.clear()

    # What we answer

    async def _answer(self, scope: Any) -> None:
        asked_by = self._wire
        try:
            await self.app(scope, trio.sleep_forever, self.send)
        except Exception as error:  # noqa: BLE001  # no application ends its connection's others
            logger.error("the application failed: %s%s", explained(error).error, traced(error))
        if self._wire is not asked_by:
            return  # the client has read the answer, and asked for something else
        if not self._answer_is:
            await self._refuse(500)
        elif self._answer_is == "head":
            self.cut()

    async def send(self, message: Any) -> None:
        """ASGI's `send`. The head goes out with the first of the body, an answer whose length is
        known with its end: so nobody can ask again before the books are closed."""
        if message["type"] == "http.response.start":
            self._open(message["status"], message["headers"])
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        if data or not more:  # a head that is all of its answer waits for the end, too
            await self.put([data] if data else [], more)

    async def put(self, said: Iterable[bytes], more: bool = True) -> None:
        """Parts of a body, each a chunk, in one write."""
        if self.lost or self._closing:
            self.unsent = True
            return
        for data in () if self._bare else said:
            self.waiting += (b"%x\r\n" % len(data), data, b"\r\n") if self._chunked else (data,)
        if not more:
            self.waiting += [b"0\r\n\r\n"] * self._chunked
            self._answer_is = "whole"
        if not (self._held and more):
            await self._write()
        if not more:
            await self._over()

    def _open(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The head of an answer; it goes out with the first of the body."""
        lines = {**dict(headers), b"date": formatdate(usegmt=True).encode()}
        self._bare = self._method == b"HEAD" or status in BODILESS
        self._held = b"content-length" in lines
        modern = self._wire.their_http_version != b"1.0"
        self._chunked = modern and not self._bare and not self._held
        if self._chunked:
            lines[b"transfer-encoding"] = b"chunked"
        if self._wire.their_state is not h11.DONE:  # nobody reads the rest of it
            self._last = True
        if self._last:
            lines[b"connection"] = b"close"
        head = [b"HTTP/1.1 %d " % status, *(b"%b: %b" % pair for pair in lines.items()), b"\r\n"]
        self._answer_is = "head"
        self.waiting = [b"\r\n".join(head)]

    async def _over(self) -> None:
        """The answer is out: on to the next request, or goodbye."""
        if self._last or self._leave_by < math.inf:
            await self._close_gently()
            return
        ahead, _ = self._wire.trailing_data
        self._wire = self._parser()
        self._answer_is = ""
        self._streams = False
        self._patience.deadline = trio.current_time() + self.settings.keep_alive
        if ahead:
            await self._take(ahead)

    async def _refuse(self, status: int) -> None:
        """What is refused below the application has a request id and a line in the log, too."""
        self._ending = self._ending or Ending("server", "error", "the request was malformed")
        if not self._answer_is:
            known_as = uuid.uuid4().hex
            too_long = f"the head is longer than {self.settings.max_head} bytes"
            says = {408: "the head took too long", 431: too_long}
            why = says.get(status, "this is no request of HTTP/1.1")
            logger.info("[%s] %d refused: %s, from %s", known_as, status, why, self._names[0])
            self._last = True
            self._open(status, [(b"content-length", b"0"), (b"x-request-id", known_as.encode())])
            await self._write()
        await self._close_gently()

    def stream_begins(self) -> None:
        """What is short is answered to a client that says no more; from a stream it has left."""
        self._streams = True
        if self.half_closed:
            self.give_up()

    # How bytes get out, and how it ends

    def write_now(self, chunk: bytes) -> bool:
        """This chunk goes out at once, as far as the socket takes it; what it does not take is
        `waiting`, and the caller's concern. False if something is before it."""
        busy = self.waiting or self._lock.locked() or self.lost or self._closing
        if busy or not self._chunked or os.name != "posix":
            return False
        try:
            sent = os.write(self.stream.socket.fileno(), chunk)
        except OSError:  # the usual way says what to do
            return False
        if sent < len(chunk):
            self.waiting = [chunk[sent:]]
        return True

    async def _write(self) -> None:
        """Send directly while the kernel takes it, nearly always; else wait, but not for ever. No
        cancel can leave half a write: nothing in it waits, or it is shielded."""
        parts = self.waiting
        self.waiting = []
        size = sum(map(len, parts))
        sent = 0
        try:
            # a big event is not copied: many may wait for their viewers to read it
            if size < 2 * PIECE and not self._lock.locked() and os.name == "posix":
                sent = os.write(self.stream.socket.fileno(), b"".join(parts))
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = True
            self.give_up()
            return
        if sent < size:
            with trio.CancelScope(shield=True):  # bounded: each piece has its deadline
                await self._write_slowly(parts, sent)

    async def _write_slowly(self, parts: Iterable[bytes], sent: int) -> None:
        """Piece by piece: a slow reader of a big event is not one that has stopped reading."""
        async with self._lock:
            for part in parts:
                for start in range(min(sent, len(part)), len(part), PIECE):
                    await self._write_piece(memoryview(part)[start : start + PIECE])
                sent = max(0, sent - len(part))

    async def _write_piece(self, piece: memoryview) -> None:
        """Write it within the send deadline; or cut off who does not read."""
        if self.lost:
            self.unsent = True
            return
        patience = self.settings.send_timeout
        deadline = min(trio.current_time() + patience, self._leave_by)
        with contextlib.suppress(*GONE):
            with trio.CancelScope(deadline=deadline) as self._sending:
                await self.stream.send_all(piece)
                return
            stalled = Ending("client", "stalled", f"read nothing for {patience:g} s")
            self._ending = stalled if trio.current_time() < self._leave_by else CUT
            self.unsent = True
            self.cut(reset=True)  # frees the kernel's buffers, which nobody will read
        self.unsent |= not self.lost
        self.give_up()

    def give_up(self) -> None:
        """Nobody is there: all that this connection does ends."""
        self.lost = True
        self._requests.cancel_scope.cancel(reason="the client left")

    async def _close_gently(self) -> None:
        """Say that we are done, and wait a little for the client to say so too: closing on one that
        is still sending would be a reset, and it could not read our answer."""
        if self._closing:
            return
        self._closing = True
        linger = self.settings.linger if self._leave_by == math.inf else 0.0
        self._patience.deadline = trio.current_time() + linger
        with contextlib.suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_WR)

    def blame(self) -> Ending:
        """Who ended the request that has not ended itself."""
        return self._ending or (LEFT if self.lost else CUT)

    def cut(self, *, reset: bool = False) -> None:
        """Close the socket at once, no last chunk, no goodbye; and end the connection's tasks."""
        cut_off(self.stream.socket, reset=reset)
        self.give_up()

    def leave(self, *, by: float) -> None:
        """The server stops: who has no request goes now, a send has until then."""
        self._leave_by = by
        self._sending.deadline = min(self._sending.deadline, by)
        unasked = self._wire.their_state in (h11.IDLE, h11.SEND_BODY)
        if unasked or self._closing:
            self._ending = self._ending or CUT
            self.cut()


# ═══ 20  Access ═══════════════════════════════════════════════════════════════════════════════════
# Who may ask for what. In this order: a foreign name is refused, preflights are answered; the
# gateway wants a tenant; control, an operator; everything else a token, or where none is needed, no
# foreign page. What a request asks for, its route looks at.

CONTROL = ("/__aura/", "/api/admin/")
JOBS = ("/api/generation/", "/api/v1/generations")
GATEWAY = re.compile(  # of the other service only the stream is here; the rest of it is unknown
    r"/api(?:/aura|/synapse(?=/analysis-runs/[^/]*/stream\Z)|(?=/synapse/))"
    r"((?:/.*)?)", re.DOTALL)
GATEWAY_SAYS = {b"x-dwp-source": "FRONTEND", b"x-dwp-caller-type": "USER"}  # where nobody does
LOCAL = ("localhost", "127.0.0.1", "::1")
LOCAL_PEER = re.compile(r"(127\..*|::1):\d+")
LOCAL_PAGE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
CHALLENGE = {"WWW-Authenticate": "Bearer"}
CORS = {
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Expose-Headers": "Last-Event-ID, X-Request-ID, X-Aura-Run, X-Aura-Run-ID, "
    "X-Aura-Scenario, X-Aura-Attempt, Retry-After",
}
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE, PATCH, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, X-Tenant-ID, X-User-ID, X-Agent-ID, "
    "X-DWP-Source, X-DWP-Caller-Type, X-Aura-Scenario, X-Aura-Test-Fail, X-Test-Id, "
    "X-Trace-ID, X-Request-ID, Content-Type, Accept, Accept-Language, Last-Event-ID, "
    "Cache-Control",
    "Access-Control-Max-Age": "3600",
}


def bearer() -> str:
    """The token that the request at hand brings, if it is a bearer's."""
    scheme, _, token = header(b"authorization").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def identify() -> None:
    """Let everybody in who brings a token, any token, or raise the 401."""
    if header(b"authorization") and not bearer():
        raise Refusal(401, headers=CHALLENGE, detail="Invalid authorization header format")
    if not (bearer() or request.args.get("access_token")):  # a native EventSource sends no headers
        hint = "send 'Authorization: Bearer <any token>'; an EventSource, which cannot,"
        hint += " adds ?access_token=<any token> to the URL"
        missing = "Missing authorization header"
        raise Refusal(401, headers=CHALLENGE, detail=missing, hint=hint)


class GatewayRequest(JournaledRequest):
    """A request, perhaps to the gateway's face: that leads to the same routes."""

    def __init__(self, journal: Journal, app: QuartTrio, scope: Any) -> None:
        asked = "/" + scope["path"].lstrip("/")
        face = GATEWAY.fullmatch(asked)
        if face:
            scope = {**scope, "path": f"/aura{face[1]}"}
        super().__init__(journal, app, scope)
        if face:
            entry = self.entry
            entry.path = asked  # the journal knows it by the name that the caller used
            entry.trace_id = known_as(entry.headers, b"x-trace-id")
            entry.headers = {**GATEWAY_SAYS, **entry.headers, b"x-trace-id": entry.trace_id}


def assured(traces: Mapping[str, str], head: Mapping[str, str]) -> dict[str, str]:
    """The gateway's own headers on every stream, whatever the script has left of them."""
    streams = (head.get("content-type") or "").lower().startswith("text/event-stream")
    return {**(STREAM_HEAD if streams else {}), **traces}


class Access(Double):
    """The double, for those who may."""

    make_request = GatewayRequest

    async def admit(self) -> Response | None:
        """The order of the refusals is the contract's: what can be said without knowing a secret
        comes before what cannot."""
        await super().admit()
        this = entry()
        path = request.path
        self.known_host(header(b"host", b"localhost"))  # in HTTP/1.0 there may be none
        if request.method == "OPTIONS":
            asks = header(b"access-control-request-method")
            return Response(b"", 204, PREFLIGHT) if asks else None
        if this.trace_id and this.tenant_id is None:
            raise Refusal(400)
        if this.trace_id and not re.fullmatch("[0-9]{1,19}", this.tenant_id or ""):
            raise Refusal(400, "X-Tenant-ID must be numeric (e.g. 1) for Aura API.")
        if path.startswith(CONTROL) and path != "/__aura/health":
            self.operate()
        elif path.startswith(JOBS):
            self.refuse_foreign_pages()
        elif self.settings.auth == "on" and path.startswith("/aura/"):
            identify()
        return None

    def known_host(self, authority: str) -> None:
        """The 421 for a name that is not ours: a page on a name of its own, made to lead here, must
        not read a server on this machine."""
        if self.settings.host in ("0.0.0.0", "::"):
            return  # it listens everywhere, and nobody knows under which names
        name = re.sub(r":\d*$", "", authority).strip("[]").lower()
        known = (*LOCAL, self.settings.host, *parts(self.settings.allow_host))
        if name not in [one.strip("[]").lower() for one in known]:
            error = f"this server does not answer to the name {name[:200]!r}"
            raise Refusal(421, error, hint="start it with --allow-host NAME if it should")

    def operate(self) -> None:
        """Let in who may control the server: who knows the token; without one, who is on this
        machine, and neither a proxy nor another site's page."""
        if self.settings.admin_token:
            token = os.fsencode(self.settings.admin_token)
            if not hmac.compare_digest(to_bytes(bearer()), token):
                needs = "this needs 'Authorization: Bearer <the server's ADMIN_TOKEN>'"
                raise Refusal(401, headers=CHALLENGE, detail=needs)
            return
        given = request.scope["aura.headers"].keys()  # type: ignore[typeddict-item]
        page = LOCAL_PAGE.fullmatch(header(b"origin", b"http://localhost"))
        proxied = given & {b"forwarded", b"x-forwarded-for", b"via"}
        if proxied or not page or not LOCAL_PEER.fullmatch(entry().client):
            raise Refusal(
                403, "this is for callers on the server's own machine: neither through a proxy, "
                "nor for pages of another site; with ADMIN_TOKEN set, the token lets anybody in")

    def reads(self, origin: str) -> bool:
        """Whether a page of this origin may read what is said here: `:*` is any port."""
        for one in parts(self.settings.cors_origin):
            scheme = "" if "://" in one else "https?://"
            known = scheme + re.escape(one).replace(r":\*", r"(:\d{1,5})?")
            if origin and (one == "*" or re.fullmatch(known, origin, re.IGNORECASE)):
                return True
        return False

    def refuse_foreign_pages(self) -> None:
        """Where no token is needed, keep out other sites' pages: each can make a browser send a GET
        or a plain POST. This server's own page is at home, under whatever name."""
        origin = header(b"origin")
        foreign = header(b"sec-fetch-site") == "cross-site"
        if origin:
            own = origin.endswith(f"://{header(b'host')}")
            foreign = not (own or self.reads(origin))
        if foreign:
            error = "this needs no token, so it is not for pages of another site"
            raise Refusal(403, error, hint="start it with --cors-origin ORIGIN if it should be")

    async def sign(self, response: Response) -> Response:
        """CORS headers also on a 401: without them the browser hides that it was one."""
        headers = (await super().sign(response)).headers
        this = entry()
        if this.trace_id:  # it came to the gateway's face: so it can be found again
            traces = {"x-trace-id": this.trace_id, "x-gateway-request-id": this.request_id}
            headers |= traces
            if isinstance(response, Streamed):
                response.delivery.assured = partial(assured, traces)
        origin = header(b"origin")
        if origin:
            headers["Vary"] = "Origin"
        if self.reads(origin):
            headers |= {"Access-Control-Allow-Origin": origin, **CORS}
        return response


# ═══ 21  Jobs ═════════════════════════════════════════════════════════════════════════════════════
# Generation jobs: runs of their own kind, whose ids are the jobs'. They need no token, so they ask
# whose page it is that asks, and take no scenario but by its name.

JOB_STATUSES = ("queued", "streaming", "completed", "failed", "canceled")


def job_status(run: ScriptedRun) -> str:
    """A run's status, in the words of the generation service."""
    running = "streaming" if run.log.last else "queued"
    return {"running": running, "cancelled": "canceled"}.get(run.status, run.status)


def job_of(run: ScriptedRun) -> Told:
    """A job's state; how far it is, its own last word on that says."""
    last = (said_last(run.log, "progress") or [{}])[0]
    return {
        "jobId": run.info.run_id, "status": job_status(run), "progress": last.get("value", 0),
        "createdAt": run.started_at,
    }


class Jobs(Access):
    """The double, and its generation jobs."""

    def jobs(self) -> list[ScriptedRun]:
        """All jobs that this caller may see."""
        visible = self.hub.seen_by(entry().tenant_id)
        return [run for run in visible if run.info.phase == "generation"]

    def job(self, job_id: str) -> Any:
        """The job; or a 404 that does not say what else has this id."""
        run = self.hub.find(job_id, tenant=entry().tenant_id)
        if run is None or run.info.phase != "generation":
            hint = "POST /api/v1/generations starts a job, and says where its events are"
            raise Refusal(404, "there is no such job", jobId=job_id, hint=hint)
        return run

    def job_stream(self, job_id: str) -> Response:
        """Whoever watches a job that is not there starts it: the runbook does."""
        if self.hub.find(job_id) or request.method == "HEAD":
            return self.job_events_stream(job_id)
        checked(RunId, job_id, "path", "jobId")
        return self.triggered(TriggerRequest(job_id, job_id, "generation", {}))

    def job_events_stream(self, job_id: str) -> Response:
        """The events of a job that somebody has started."""
        if self.hub.find(job_id) is None and request.method != "HEAD":
            self.make_room()
        self.job(job_id)
        return self.stream(job_id)

    async def job_trigger(self) -> Response:
        """Start a job. Its front end calls `new URL`, and so needs whole ones."""
        body = await told(TRIGGER_BODY["generation"])
        job_id = f"job_{uuid.uuid4().hex[:16]}"
        project = str(body.get("projectId") or job_id)
        url = f"{self.way_here()}/api/v1/generations/{job_id}"
        return self.accepted(TriggerRequest(job_id, project, "generation", body, False), 201, {
            "jobId": job_id, "status": "queued", "sseUrl": f"{url}/events", "cancelUrl": url,
            "projectId": body.get("projectId"),
            "title": body.get("title") or (body.get("description") or "Untitled")[:80],
            "estimatedDuration": 18,  # seconds, at the ordinary pace
        })

    def way_here(self) -> str:
        """Where its caller finds this server; a proxy on this machine may say it, if it says a name
        of ours."""
        scheme = "http"
        host = request.host
        if LOCAL_PEER.fullmatch(entry().client):
            with contextlib.suppress(Refusal):
                forwarded = header(b"x-forwarded-host").partition(",")[0] or host
                self.known_host(forwarded)
                host = forwarded
                scheme = "https" if header(b"x-forwarded-proto").startswith("https") else scheme
        return f"{scheme}://{host}"

    def cancel_job(self, job_id: str) -> Response:
        """Again is harmless."""
        why = "the job was cancelled by a DELETE"
        with contextlib.suppress(Refusal):  # what is not there is as its caller wants it
            self.job(job_id).cancel(Failure(why, stage="cancelled", retryable=False))
        return answer(None, 204)

    def job_statistics(self) -> Told:
        here = self.jobs()
        counts = collections.Counter(map(job_status, here))
        return {
            "job_statistics": {
                "total_jobs": len(here), **{status: counts[status] for status in JOB_STATUSES},
                "active_connections": sum(run.viewers for run in here),
            },
            "service_status": "operational", "timestamp": now_iso(),
        }

    def active_jobs(self) -> Told:
        active = [job_of(run) for run in self.jobs() if not run.ended]
        return {"active_jobs": active, "total_active": len(active)}

    doors = Access.doors | {
        "GET /api/generation/jobs/<job_id>/events": job_stream,
        "POST /api/v1/generations": job_trigger,
        "GET /api/v1/generations/_stats": job_statistics,
        "GET /api/v1/generations/active": active_jobs,
        "GET /api/v1/generations/<job_id>": lambda self, job_id: job_of(self.job(job_id)),
        "DELETE /api/v1/generations/<job_id>": cancel_job,
        "GET /api/v1/generations/<job_id>/events": job_events_stream,
    }


# ═══ 22  Metrics and admin ════════════════════════════════════════════════════════════════════════
# For whoever comes by, and for whoever is on call. The figures are prometheus-client's own, in a
# registry of this application: what happens once is counted when its request is over; what grows
# while a stream lasts, when somebody looks, or at its end.

BOUNDS = (0.01, 0.1, 1, 10, 60, 600, 3600)  # seconds, from a moment to an hour
RUN_STATUSES = ("running", "completed", "failed", "cancelled")
# What a browser may do with the page: run its own script and style, and ask this server. Nothing
# from elsewhere, and in nobody's frame.
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "connect-src 'self'; img-src data:; script-src 'nonce-{0}'; style-src 'nonce-{0}'"
)


class Metrics:
    """What Prometheus reads of this application, and of no other in the process. What can be known
    beforehand begins at 0: a counter that appears has no rate."""

    def __init__(self, hub: BoundedHub, journal: Journal) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # an extra

        self.hub = hub
        self.journal = journal
        self.registry = CollectorRegistry()
        self.due = self.written = 0  # events of streams that are over
        spread = partial(Histogram, buckets=BOUNDS)
        self.of: Any = {
            name: kind(name, says, labels, registry=self.registry)
            for kind, name, says, *labels in (
                (Counter, "sse_connections_total", "streams opened"),
                (Gauge, "sse_reconnect_count", "streams opened with a Last-Event-ID"),
                (Counter, "sse_bytes_sent_total", "bytes of streams sent"),
                (Counter, "sse_heartbeat_sent_total", "heartbeats sent"),
                (Gauge, "sse_connections_open", "streams open now"),
                (Gauge, "sse_message_delivery_success_rate", "events written of events due"),
                (Counter, "sse_message_sent_total", "events sent", "event"),
                (Counter, "sse_stream_ended_total", "who ended streams, and how", "by", "how"),
                (Counter, "http_requests_total", "requests answered",
                 "method", "endpoint", "status"),
                (Gauge, "aura_runs", "runs that are here", "status"),
                (spread, "sse_time_to_first_event_seconds", "it took so long"),
                (spread, "sse_connection_duration_seconds", "streams were open so long"),
                (spread, "aura_run_duration_seconds", "runs took so long"),
            )
        }
        for name in (*KNOWN_EVENTS, "other"):
            self.of["sse_message_sent_total"].labels(name)
        for end in ACTS:
            self.of["sse_stream_ended_total"].labels(*end)
        hub.time_taken = self.of["aura_run_duration_seconds"].observe
        journal.count = self.over

    def look(self, entry: Entry) -> None:
        """Count what has come of a stream since the last look."""
        now = collections.Counter(
            sse_connections_total=1, sse_reconnect_count=entry.last_event_id is not None,
            sse_bytes_sent_total=entry.bytes, sse_heartbeat_sent_total=entry.heartbeats)
        for name, more in (now - entry.counted).items():
            self.of[name].inc(more)
        entry.counted = now
        if entry.first_event:
            self.of["sse_time_to_first_event_seconds"].observe(entry.first_event - entry.opened)
            entry.first_event = 0.0  # counted

    def over(self, entry: Entry) -> None:
        """A request is over. Its labels are few, whatever is asked: a route's pattern, not a path;
        a method that HTTP knows."""
        method = entry.method if entry.method in http.HTTPMethod.__members__ else "other"
        asked = (method, shown_path(entry.pattern), entry.status)
        self.of["http_requests_total"].labels(*asked).inc()
        if entry.streams and entry.closed is not None:
            self.look(entry)
            self.of["sse_stream_ended_total"].labels(*(entry.end or LEFT)[:2]).inc()
            self.of["sse_connection_duration_seconds"].observe(entry.closed - entry.opened)
            # what was written beyond what was due does not make up for what was not
            self.due += entry.due
            self.written += min(entry.events, entry.due)

    def text(self) -> bytes:
        """All of it, without the library's notes on when each was made."""
        from prometheus_client import generate_latest

        for delivery in self.hub.deliveries:
            if delivery.entry.streams:
                self.look(delivery.entry)
        tally = self.journal.tally
        for name in list(tally):
            self.of["sse_message_sent_total"].labels(name).inc(tally.pop(name))
        there = collections.Counter(run.status for run in self.hub.seen_by(None))
        for status in RUN_STATUSES:
            self.of["aura_runs"].labels(status).set(there[status])
        self.of["sse_connections_open"].set(self.hub.streams)
        rate = self.written / self.due if self.due else 1
        self.of["sse_message_delivery_success_rate"].set(rate)
        lines = generate_latest(self.registry).splitlines(keepends=True)
        return b"".join(line for line in lines if b"_created" not in line)


@functools.cache
def shown_path(pattern: str) -> str:
    """A route's path as the contract writes it; a job's events as the runbook's queries do."""
    path = re.sub(r"<(?:int:)?(\w+)>", lambda found: f"{{{camel(found[1])}}}", pattern)
    return re.sub(r".*}/events", "*/events", path)


class Admin(Jobs):
    """The double, for whoever is on call."""

    metrics: Metrics | None = None
    page = ""  # for browsers; a door: part 4 has one

    def application(self, hub: Any) -> QuartTrio:
        """As ever, and counted, if the library is there."""
        with contextlib.suppress(ImportError):
            self.metrics = Metrics(hub, self.journal)
        return super().application(hub)

    def front(self) -> Response:
        """The page, to who can show one."""
        if self.page and "text/html" in header(b"accept").lower():
            nonce = uuid.uuid4().hex
            page = self.page.replace("{tries}", str(self.settings.max_retries))
            page = page.replace("{nonce}", nonce)
            guard = {"Vary": "Accept", "Content-Security-Policy": POLICY.format(nonce)}
            return Response(page, headers=guard, content_type="text/html; charset=utf-8")
        return answer({
            "message": "Aura analysis stream", "version": __version__, "status": "operational",
        })

    def health(self) -> Told:
        return {
            "status": "healthy", "version": __version__, "instance": self.instance,
            "runs": self.hub.live, "sse_connections": self.hub.streams,
            "uptime": round(trio.current_time() - self.journal.began, 3),
        }

    def close_streams(self, latest: int = 0) -> int:
        """Close every stream that plays a script; the runs go on. They drop: some clients take a
        proper end for the end."""
        streams = (one for one in self.hub.deliveries if one.entry.streams)
        return close_all(streams, query(HOW).how or "drop", latest)

    def show_metrics(self) -> Response:
        """What Prometheus scrapes."""
        if self.metrics is None:
            raise Refusal(501, "metrics need an extra: pip install 'aura-stream[metrics]'")
        plain = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(), content_type=plain)

    doors = Jobs.doors | {
        "GET /": front,
        "GET /health": health,
        "GET /api/generation/health": health,
        "POST /api/admin/sse/restart": lambda self: {"closed": self.close_streams(1000)},
        "POST /api/admin/sse/broadcast-reconnect":
            lambda self: {"notified": self.close_streams(5000)},
        "POST /api/admin/connections/reset": lambda self: {"dropped": self.close_streams()},
        "GET /metrics": show_metrics,
    }


# ═══ 23  The whole double ═════════════════════════════════════════════════════════════════════════
# All of it, on connections that nothing kills: each keeps its own trouble, and at the stop each is
# told until when it may speak.

SEGMENT = 16 * 2**10  # bytes: two are acknowledged at once; one that fills the buffer, after 40 ms


def warn(settings: DoubleSettings) -> None:
    """What somebody who starts it like this should know."""
    if settings.redis_url:
        logger.warning("REDIS_URL is set, but this version keeps runs in memory only")
    if settings.host not in LOCAL and not settings.admin_token:
        logger.warning(
            "control (/__aura, /api/admin) is for callers on this machine: no ADMIN_TOKEN")


STREAM_PATH = re.compile(r"/aura/(?:analysis-runs/([^/]+)|cases/([^/]+)/analysis)/stream")
BY_RUN = ("analysis_run_stream", "/aura/analysis-runs/<run_id>/stream")
BY_CASE = ("case_analysis_stream", "/aura/cases/<case_id>/analysis/stream")
# of Quart 0.22, and of 0.23
AT_HAND: Any = getattr(quart.globals, "_cv_request", quart.globals._cv_app)


class ShortRequest(GatewayRequest):
    """A request; and where it opens a stream, by a shorter way. It meets the same methods, but not
    Quart's context, matching, signals and hooks: these cost as much as all the rest. (It leans on
    Quart's own variable for the request at hand.)"""

    async def answered(self, connection: Any, send: ASGISendCallable) -> None:
        scope = self.scope
        found = STREAM_PATH.fullmatch(scope["path"])
        if found is None or scope["method"] != "GET":
            await super().answered(connection, send)
            return

        run_id, case_id = found.groups()
        endpoint, rule = BY_RUN if run_id else BY_CASE
        query = dict(reversed(parse_qsl(as_text(scope["query_string"]), keep_blank_values=True)))
        asked = types.SimpleNamespace(
            scope=scope, method="GET", path=scope["path"], args=query,
            view_args={"run_id": run_id} if run_id else {"case_id": case_id},
            endpoint=endpoint, url_rule=types.SimpleNamespace(rule=rule))
        connection.feed(None)
        hand = AT_HAND.set(types.SimpleNamespace(request=asked))
        response = await connection.service.shortly(run_id or query.get("runId"))
        AT_HAND.reset(hand)
        del asked
        await self._send_response(send, response)


class InOperation(Admin):
    """The whole double."""

    make_request = ShortRequest

    async def shortly(self, run_id: str | None) -> Response:
        """The stream of this run, or why not: what Quart does with a route, in three lines."""
        try:
            response = await self.admit() or self.stream(run_id)
        except (Refusal, Wrong, Mistake) as error:
            response = await self.refuse(error)
        return await self.sign(response)

    async def listen(self) -> list[trio.SocketListener]:
        """The listening sockets; the sockets they accept inherit the options."""
        self.connections: set[Connection] = set()
        limits = self.settings
        warn(limits)
        listeners = await trio.open_tcp_listeners(limits.port, host=limits.host, backlog=4096)
        for raw in (listener.socket for listener in listeners):
            size = min(limits.send_buffer // 2, 2**30)  # the kernel doubles it
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # the kernel's own eviction, a second line
                patience = int(min(2000 * limits.send_timeout, 2**31 - 1))
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        return listeners

    async def attend(self, app: ASGIWrapper, context: WorkerContext, stream: Any) -> None:
        trio.lowlevel.current_task().name = "connection"
        connection = Connection(app.app, self, stream)
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)

    def leave(self, *, by: float) -> None:
        for connection in list(self.connections):
            connection.leave(by=by)


# The door of part 2: from here on this is what serves.
Settings.make_service = InOperation


# ═══ Part 4  For people ═══════════════════════════════════════════════════════════════════════════
# A page to look at, a doctor for anybody's stream, a command line.


# ═══ 24  The page ═════════════════════════════════════════════════════════════════════════════════
# The live page: what a careful client does, where it can be seen. No build, no request to anybody
# else; what comes from outside is only ever text.

PAGE = r"""<!doctype html>
<html lang="en" data-tries="{tries}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Aura stream</title>
<style nonce="{nonce}">
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; word-break: keep-all; }
  body { margin: auto; max-width: 78rem; padding: 1rem; overflow-wrap: anywhere; }
  h1, h2 { font-size: 1.25rem; margin: 0; }
  p { margin: .25rem 0 .75rem; max-width: 72ch; }
  main { display: grid; gap: 1.5rem; }
  main { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
  form:not([hidden]) { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: baseline; }
  form p { flex-basis: 100%; margin: 0 0 .75rem; }
  input, select, button { font: inherit; padding: .3rem .6rem; max-width: 100%; }
  progress, svg { display: block; width: 100%; }
  svg { height: 3rem; border-block: 1px solid GrayText; }
  path { stroke: LinkText; stroke-width: 2px; vector-effect: non-scaling-stroke; }
  ul, ol { padding: 0 0 0 2ch; margin: 0; overflow: auto; max-height: 24rem; }
  pre { overflow: auto; margin: 0 0 1.5rem; font-size: .85rem; }
</style>

<h1>Aura stream</h1>
<p>A stream is one answer that stays open: the server writes an event whenever it has one. A
<b>run</b> writes a log; a <b>delivery</b> plays that log to one viewer, well or badly. Press Start,
then choose a scenario and see it go wrong.</p>

<form id="ask">
  <label>Scenario <select id="scenario"><option value="">ordinary</option></select></label>
  <label>Phase <select id="phase"><option>phase2<option>phase3<option>job</select></label>
  <label>Case <input id="case" value="85116" size="10" maxlength="200" required></label>
  <button id="start">Start</button>
  <button type="button" id="cancel" disabled>Cancel the run</button>
  <button type="button" id="leave" disabled>Leave</button>
  <button type="button" id="again" hidden></button>
  <p id="doc">the ordinary run and the ordinary stream, or what --scenario says</p>
</form>
<form id="lock" hidden>
  <label>ADMIN_TOKEN of this server <input id="token" type="password" autocomplete="off"></label>
  <button>Use it</button>
</form>
<p id="why" role="alert"></p>

<main>
  <section aria-label="The stream">
    <h2>The stream</h2>
    <p role="status"><b id="state">Nothing runs yet.</b></p>
    <progress id="progress" max="100" value="0" aria-label="percent of the analysis"></progress>
    <p id="facts"></p>
    <svg id="line" preserveAspectRatio="none" aria-hidden="true"><path id="bars"/></svg>
    <p>A bar is an event, where it came in time. The last 300 are listed.</p>
    <ul id="events" tabindex="0" aria-label="events"></ul>
  </section>
  <section aria-label="The server">
    <h2>Who is inside whom</h2>
    <p>The server's tasks. Leave: one delivery ends, the run goes on. Cancel: the run's branch
    ends, and its deliveries finish by themselves.</p>
    <pre id="tree" tabindex="0" role="region" aria-label="tasks"></pre>
    <h2>Who closed first, as the journal says</h2>
    <ol id="said"></ol>
  </section>
</main>

<script nonce="{nonce}">
const $ = (id) => document.getElementById(id);
const TRIES = Number(document.documentElement.dataset.tries);  // SSE_MAX_RETRIES
const BACK_OFF = [1, 2, 5, 15];
const SILENCE = 45;  // seconds, as the contract has it
const SHORTER = location.hash === "#waits=0.01" ? 0.01 : 1;  // for tests
const KEPT = 300;  // rows, and characters of a row
const MOST = 20000;  // ids and bars: no stream fills the memory
const BEARER = { Authorization: "Bearer page" };
const path = encodeURIComponent;
const now = () => performance.now() / 1000;
const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const inHeader = (text) => String.fromCharCode(...new TextEncoder().encode(text));  // UTF-8
const pauseOf = (usual) => Math.max(0.5, Math.min(usual, 60) * (0.9 + 0.2 * Math.random()));

// What this viewer knows of the run it watches.
let run = null;
let frame = 0;
let busy = now();

function newRun() {
  run?.stop.abort();
  $("events").replaceChildren();
  $("said").replaceChildren();
  run = {
    id: "", at: {}, lastId: "", seen: new Set(), bars: new Set(), over: "", cancelled: false,
    attempt: 0, tries: 0, retry: null, count: 0, arrivals: 0, percent: 0,
    began: now(), heard: now(), latency: Infinity, previous: 0,
    stop: new AbortController(), quiet: new AbortController(), finished: false, offer: "",
  };
  return run;
}

function addresses(phase, caseId, id) {
  const jobs = "/api/v1/generations";
  if (phase === "job") return { start: jobs, run: `${jobs}/${id}`, stream: `${jobs}/${id}/events` };
  const runs = `/aura/cases/${caseId}/analysis-runs`;
  const stream = `/aura/cases/${caseId}/analysis/stream?runId=${id}`;
  const start = phase === "phase3" ? runs.replace("/aura", "/aura/internal") : runs;
  return { start, run: `${runs}/${id}`, stream };
}

// Reads a stream as the HTML standard says: lines, and a blank one completes an event.
function parser(id) {
  let begun = "";
  let event = { name: "message", data: [] };
  return function* read(text) {
    const lines = (begun + text).split(/\r\n|\n|\r(?!$)/);
    begun = lines.pop();
    for (const line of lines) {
      const [, key, value] = /^([^:]*):? ?([^]*)$/.exec(line);
      if (key === "data") event.data.push(value);
      if (key === "event") event.name = value || "message";
      if (key === "id" && !value.includes("\0")) id = value;
      if (key === "retry" && /^\d+$/.test(value)) yield { retry: value / 1000 };
      if (line !== "") continue;
      if (event.data.length) yield { id, name: event.name, data: event.data.join("\n") };
      event = { name: "message", data: [] };
    }
  };
}

// Asks for the stream once. Returns nothing when all is over, else why, and whether to ask again.
async function attempt(mine) {
  const headers = { Accept: "text/event-stream", ...BEARER };
  if (mine.lastId && mine.lastId.length < 4000) headers["Last-Event-ID"] = inHeader(mine.lastId);
  const asked = now();
  const quiet = new AbortController();
  const signal = AbortSignal.any([mine.stop.signal, quiet.signal]);
  Object.assign(mine, { attempt: mine.attempt + 1, latency: Infinity, heard: asked, quiet });
  let why = "No answer came";
  say("Waiting for the answer …");
  try {
    const answer = await fetch(mine.at.stream, { headers, signal, cache: "no-store" });
    const type = answer.headers.get("content-type") ?? "without a type";
    if (answer.status === 204) return null;
    if (answer.status !== 200 || !type.startsWith("text/event-stream")) {
      const text = (await answer.text()).slice(0, KEPT);
      const after = Number(answer.headers.get("retry-after")) || null;
      why = `This is no stream but ${answer.status}, ${type}: ${text}`;
      return { why, after, again: answer.status === 429 || answer.status >= 500 };
    }
    why = "The connection broke";
    say(`Connected, attempt ${mine.attempt}.`);
    const read = parser(mine.lastId);
    const body = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece; !(piece = await body.read()).done;) {
      mine.heard = now();
      mine.latency = Math.min(mine.latency, 1000 * (mine.heard - asked));
      arrived(mine, read(piece.value));
    }
    why = "The answer ended properly, but without a last event";
  } catch {
    if (quiet.signal.aborted) why = `Nothing came for ${SILENCE} s`;
  }
  return mine.over ? null : { why, again: true };
}

function arrived(mine, parts) {
  const at = now() - mine.began;
  for (const part of parts) {
    if (part.retry !== undefined) mine.retry = part.retry;
    else if (part.name === "message" && part.data === "[DONE]") mine.over ||= "[DONE]";
    else if (part.name !== "heartbeat") happened(mine, part, at);
  }
  frame ||= requestAnimationFrame(draw);
}

function happened(mine, { id, name, data }, at) {
  const own = id && id !== mine.lastId;
  const known = own && mine.seen.has(id);
  if (own && !known) mine.tries = 0;  // it is news
  if (own && mine.seen.size < MOST) mine.seen.add(id);
  if (mine.bars.size < MOST) mine.bars.add(`M${at.toFixed(2)} 0V10`);
  if (["completed", "failed"].includes(name)) mine.over = name;
  try {
    const { percent, value } = JSON.parse(data);
    mine.percent = [percent, value, mine.percent].find(Number.isFinite);
  } catch { /* it is only text */ }

  const since = at - mine.previous;
  if (since) mine.arrivals += 1;
  Object.assign(mine, { lastId: id, previous: at, count: mine.count + 1 });
  const row = document.createElement("li");
  const title = name + (known ? " (again)" : "");
  const words = [id, title, `${at.toFixed(2)} s`, `+${since.toFixed(2)} s`];
  row.textContent = [...words, data].join(" · ").slice(0, KEPT);
  $("events").prepend(row);
  if (mine.count > KEPT) $("events").lastChild.remove();
}

// Asks for the stream again, each time later, until it is over or the tries are.
async function watch(mine) {
  const leaves = () => mine.stop.signal.aborted && !mine.over;
  while (mine === run && !leaves()) {
    const problem = await attempt(mine);
    if (mine !== run || leaves()) break;
    if (!problem) return finish(mine, ending(mine), "");
    const { why, after, again } = problem;
    if (!again) return finish(mine, why, "Try again");
    const all = `${why}, and all ${TRIES} tries are used up. Try again in a minute.`;
    if (mine.tries >= TRIES) return finish(mine, all, "Try again", 60);
    const pause = pauseOf(after ?? mine.retry ?? BACK_OFF[Math.min(mine.tries, 3)]);
    mine.tries += 1;
    say(`${why}. Try ${mine.tries} of ${TRIES} in ${pause.toFixed(1)} s.`);
    await sleep(pause, mine.stop.signal);
  }
  if (mine === run) await left(mine);
}

function sleep(seconds, signal) {
  return new Promise((wake) => {
    setTimeout(wake, 1000 * seconds * SHORTER);
    signal?.addEventListener("abort", wake);
  });
}

function ending(mine) {
  const held = mine.count > 2 && mine.arrivals === 1 && mine.previous > 0.5;
  const ended = `Ended with ${mine.over || "204, all seen,"} after ${many(mine.count, "event")}`;
  if (mine.cancelled) return `${ended}; you asked to cancel the run.`;
  return ended + (held ? ". All came at once, at the end: somebody held them back." : ".");
}

async function left(mine) {
  const count = `You left after ${many(mine.count, "event")}`;
  await finish(mine, count, "Come back");
  $("again").focus();
  const { told, text } = await ask(mine.at.run, { headers: BEARER });
  if (run.offer) say(`${count}; the run is ${told.status ?? text}. Come back for the rest.`);
}

async function finish(mine, text, offer, pause = 0) {
  mine.finished = true;
  say(text);
  tell(mine);
  if (pause) await sleep(pause);  // else all clients of a broken server would be back at once
  mine.offer = offer;
  draw();
}

function comeBack() {
  Object.assign(run, { stop: new AbortController(), finished: false, offer: "", tries: 0 });
  draw();
  $("leave").focus();
  watch(run);
}

// What the server answers to anything but a stream; the status is 0 where no answer comes.
async function ask(url, options) {
  const answer = { status: 0, text: "no answer came", told: {} };
  try {
    const reply = await fetch(url, options);
    answer.text = await reply.text();
    answer.status = reply.status;
    answer.told = JSON.parse(answer.text) ?? {};
  } catch { /* it is no JSON, or nothing came */ }
  return answer;
}

// Starts a run as the back end does: asks once more, with the same id, if no answer comes.
async function start(event) {
  event.preventDefault();
  const [phase, caseId, scenario] = ["phase", "case", "scenario"].map((id) => $(id).value);
  const mine = newRun();
  const runId = `page-${Math.random().toString(36).slice(2, 12)}`;
  const body = JSON.stringify({ runId, projectId: caseId, scenario: scenario || undefined });
  const headers = { "Content-Type": "application/json", ...BEARER };
  const asked = [addresses(phase, path(caseId)).start, { method: "POST", headers, body }];
  say("Asking for a run …");
  let answer = await ask(...asked);
  if (!answer.status) answer = await ask(...asked);
  if (mine !== run) return;
  mine.id = (answer.status < 300 && (answer.told.runId ?? answer.told.jobId)) || "";
  mine.at = addresses(phase, path(caseId), path(mine.id));
  if (mine.id) return watch(mine);
  mine.finished = true;
  say(`The trigger was not accepted: ${answer.status}, ${answer.text.slice(0, KEPT)}`);
}

async function cancel() {
  run.cancelled = true;
  busy = now();
  $("start").focus();
  const { status, text } = await ask(run.at.run, { method: "DELETE", headers: BEARER });
  if (status !== 202 && status !== 204) say(`The run was not cancelled: ${text}`);
}

function say(text) {
  $("state").textContent = text;
  draw();
}

function draw() {
  frame = 0;
  const span = Math.max(0.1, run.finished ? run.previous : now() - run.began);
  $("line").setAttribute("viewBox", `${-0.01 * span} 0 ${1.02 * span} 10`);
  $("bars").setAttribute("d", [...run.bars].join(""));
  const told = [run.id || "no run yet", `attempt ${run.attempt}`, `tries ${run.tries} of ${TRIES}`];
  if (run.latency < Infinity) told.push(`first byte after ${Math.ceil(run.latency)} ms`);
  if (run.latency < Infinity && !run.finished) told.push(`connection ${quality()}`);
  told.push(`${many(run.count, "event")} in ${many(run.arrivals, "arrival")}`);
  $("facts").textContent = `${told.join(", ")} and ${span.toFixed(2)} s`;
  $("progress").value = run.over === "completed" ? 100 : run.percent;
  $("cancel").disabled = !run.id || run.over !== "";
  $("leave").disabled = !run.id || run.finished;
  $("again").hidden = !run.offer;
  $("again").textContent = run.offer;
}

// Contract: latency, seconds since the last byte, what was missed since the last event.
const QUALITY = [["excellent", 100, 35, 0], ["good", 500, 40, 1], ["poor", 1000, 60, 2]];
function quality() {
  const silent = now() - run.heard;
  const missed = run.tries + Math.floor(silent / 35);
  const fits = ([, slow, long, most]) => run.latency < slow && silent < long && missed <= most;
  return (QUALITY.find(fits) ?? ["critical"])[0];
}

// The server's own view: its scenarios, its tasks, its journal. With ADMIN_TOKEN set it asks.
async function control(where) {
  const token = inHeader($("token").value);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const { status, text, told } = await ask(`/__aura/${where}`, { headers });
  $("lock").hidden = status !== 401;
  $("why").textContent = [200, 408].includes(status) ? "" : text;  // 408: not all is over yet
  return { text, told };
}

async function scenarios() {
  const { told } = await control("scenarios");
  for (const { name, doc } of told.scenarios ?? [])
    $("scenario").appendChild(new Option(name)).title = doc.replaceAll("`", "");
  look();
}

async function tell(mine) {
  const asked = `journal?kind=stream&runId=${path(mine.id)}&count=${mine.attempt}&within=3`;
  const { told } = await control(asked);
  if (mine !== run) return;
  $("said").replaceChildren();
  for (const { said } of told.entries ?? [])
    $("said").appendChild(document.createElement("li")).textContent = said;
}

// Looks at the tasks each second while something happens here, and five seconds longer.
async function look() {
  if (run && !run.finished) busy = now();
  if (run && now() - run.heard > SILENCE) run.quiet.abort();
  if (document.hidden || !$("lock").hidden || now() - busy > 5) return;
  if (run) draw();
  $("tree").textContent = (await control("tasks")).text;
}

const ORDINARY = $("doc").textContent;
$("scenario").addEventListener("change", () => {
  $("doc").textContent = $("scenario").selectedOptions[0].title || ORDINARY;
});
$("ask").addEventListener("submit", start);
$("cancel").addEventListener("click", cancel);
$("leave").addEventListener("click", () => run.stop.abort());
$("again").addEventListener("click", comeBack);
$("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  scenarios();
});
setInterval(look, 1000);
scenarios();
</script>
"""

InOperation.page = PAGE


# ═══ 25  The careful client ═══════════════════════════════════════════════════════════════════════
# The one reader of other servers' streams. It knows HTTP and the wire format, and nothing of runs.
# Who answers may mean to harm: what is kept of it is small, counted and bounded, and so is the
# time that it gets.

QUIET = 120.0  # seconds without a byte; then a stream is dead: real clients give up after 45
MOST_HEARD = 32 * 2**20  # bytes of one answer; what ends in a blank line costs more: see `read`
LARGEST = 6 * 2**20  # bytes of one event; in memory they may be a dozen times as many
MOST_KEPT = 2**18  # bytes of a body; of one that is no stream, more is not even heard
USABLE_ID = "[!-~]{1,500}"  # nobody comes back with what no header can hold
EVENT_END = re.compile(rb"(?>\r\n|\r|\n){2}")  # `(?>` keeps CR and LF together

ENDINGS = {
    "end": "it was properly ended",
    "cut": "the connection was closed without an end",
    "reset": "the connection was reset",
    "quiet": "it is open, but nothing more came",
    "limit": "it still went on when the time was over",
    "full": "it said more than one can hear",
}


class Heard(NamedTuple):
    """An event, and when it had come."""

    at: float
    id: str  # empty where none stood in it, or none that anybody can come back with
    name: str
    data: str


@dataclass
class Visit(trio.abc.ReceiveChannel[Heard]):
    """One request, and what the wire shows of its answer, as a channel of its events. Times are
    seconds since it was sent.

        async with Visit(url, {"authorization": "Bearer t"}, until=soon) as seen:
            async for event in seen:
                print(event.at, event.name, event.data)
        print(seen.status, seen.ending)

    It connects and asks when the first event is waited for; only a URL that is none is a
    ValueError at once. What goes wrong on the way raises nothing: it is the `ending`, a key of
    ENDINGS or a sentence. An answer that is no stream has no events, and its `body`. Leaving the
    block closes the connection, whatever it was doing.
    """

    url: str
    sends: Mapping[str, str] = field(default_factory=dict)  # headers
    post: bytes = b""  # a body makes it a POST
    until: float = math.inf  # by Trio's clock
    patience: float = QUIET  # seconds without a byte

    sent: float = 0.0  # by Trio's clock; 0 if nobody could be reached
    status: int = 0
    kind: str = "no type"  # its content type
    streams: bool = False
    head_at: float = 0.0
    first_at: float = 0.0  # of the body's bytes
    last_at: float = 0.0
    longest: float = 0.0  # silence between the head and that
    ended_at: float = 0.0
    ending: str = ""
    size: int = 0
    chunks: int = 0
    torn: int = 0  # chunks that ended within a line
    left: int = MOST_HEARD  # of what may be heard

    def __post_init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()  # how it begins
        self.rest = bytearray()  # of an event that has not ended
        self.heard: list[Heard] = []
        # of a head of 16 KiB of blanks h11 thinks for half a second, of 32 KiB for two
        self.wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**14)
        self.stream: trio.abc.Stream | None = None
        self.where = urlsplit(self.url)
        if not re.match(r"https?://[\w\[]", self.url):
            raise ValueError(f"a URL is like http://localhost:9000/…, and {self.url!r} is not")

    @property
    def how(self) -> str:
        return ENDINGS.get(self.ending, self.ending)

    @property
    def now(self) -> float:
        return trio.current_time() - self.sent

    @property
    def silence(self) -> float:
        """Seconds without a byte before the end."""
        return self.ended_at - self.last_at

    async def aclose(self) -> None:
        if self.stream:
            await trio.aclose_forcefully(self.stream)

    async def receive(self) -> Heard:
        while not self.heard and not self.ending:
            patient = trio.current_time() + self.patience
            with trio.move_on_at(min(self.until, patient)) as waiting:
                await self.go_on()
            self.ended_at = self.now
            if waiting.cancelled_caught:
                self.ending = "limit" if self.until < patient else "quiet"
        if not self.heard:
            raise trio.EndOfChannel
        return self.heard.pop(0)

    async def go_on(self) -> None:
        """Hear what comes next; but first, ask."""
        if not self.stream:
            return await self.ask()
        try:
            data = await self.stream.receive_some(2**12)
        except trio.BrokenResourceError:
            self.ending = "reset"
        else:
            self.take(bytes(data))

    async def ask(self) -> None:
        where = self.where
        host = where.hostname or ""
        try:
            with trio.fail_after(10):
                if where.scheme == "http":
                    self.stream = await trio.open_tcp_stream(host, where.port or 80)
                else:
                    self.stream = await trio.open_ssl_over_tcp_stream(
                        host, where.port or 443, https_compatible=True)
                await self.stream.send_all(self.request())
                self.sent = trio.current_time()
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            cause = str(innermost(error.__cause__ or error))
            why = re.sub(r".*[]:] ", "", cause) or "no answer within 10 s"
            self.ending = f"cannot reach {where.netloc}: {why}; is it running, with {where.scheme}?"

    def request(self) -> bytes:
        target = f"{self.where.path or '/'}?{self.where.query}".removesuffix("?")
        target = quote(target, safe="/?&=%:~+,;@!$'()*-._", errors="replace")
        named = {"host": self.where.netloc, "accept": "text/event-stream", **self.sends}
        if self.post:
            named["content-length"] = str(len(self.post))
        method = "POST" if self.post else "GET"
        asks = h11.Request(method=method, target=target, headers=list(named.items()))
        return (self.wire.send(asks) or b"") + self.post

    def take(self, data: bytes) -> None:
        """What the answer says in these bytes; none are its end."""
        self.left -= len(data)
        try:
            self.wire.receive_data(data)
            while not self.ending:
                match self.wire.next_event():
                    case h11.Response() as head:
                        self.begin(head)
                    case h11.Data(data=piece, chunk_end=whole):
                        self.listen(bytes(piece))
                        self.chunks += whole
                        self.torn += whole and piece[-1] not in b"\r\n"
                    case h11.EndOfMessage():
                        self.ending = "end"
                    case h11.NEED_DATA | h11.PAUSED:
                        break
        except h11.RemoteProtocolError as error:
            cut = self.status or not (data or self.wire.trailing_data[0])
            self.ending = "cut" if cut else f"it is no HTTP: {error}"
        if self.left < 0 or len(self.rest) > LARGEST:
            self.ending = self.ending or "full"

    def begin(self, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode(): text.decode("latin-1") for name, text in head.headers}
        kind = self.headers.get("content-type", self.kind)
        self.kind = kind.partition(";")[0].strip().lower()
        readable = "content-encoding" not in self.headers
        self.streams = self.status == 200 and self.kind == "text/event-stream" and readable
        self.head_at = self.last_at = self.now
        if not self.streams:
            self.left = MOST_KEPT

    def listen(self, piece: bytes) -> None:
        """These bytes of the body, and the events that end in them."""
        self.longest = max(self.longest, self.now - self.last_at)
        self.last_at = self.now
        self.first_at = self.first_at or self.last_at
        self.size += len(piece)
        self.body += piece[: MOST_KEPT - len(self.body)]
        if not self.streams:
            return

        begin = max(0, len(self.rest) - 3)  # a blank line may be torn
        self.rest += piece
        while found := EVENT_END.search(self.rest, begin):
            self.read(self.rest[: found.end()])
            del self.rest[: found.end()]
            begin = 0

    def read(self, block: bytearray) -> None:
        """The event in these lines, if they are one. A byte order mark may stand before it."""
        self.left -= 64
        lines = io.TextIOWrapper(io.BytesIO(block), "utf-8-sig", "replace")  # one by one
        for id, name, data in read_events(line.rstrip("\n") for line in lines):
            usable = re.fullmatch(USABLE_ID, id)
            self.heard.append(Heard(self.last_at, id if usable else "", name, data))
            self.left -= 600 + 4 * len(id + name)


# ═══ 26  Diagnosis ════════════════════════════════════════════════════════════════════════════════
# The debugging guide as a program. A careful client asks, and comes back once; then questions are
# put to what it heard, and each yields its line and its ills. Nothing here knows the server but by
# its contract: the stream may be anybody's, behind whatever proxy.

BEARABLE = 45.0  # seconds of silence that the contract's clients bear
LATE = 2.0  # seconds to the head, which goes out at once
HELD = 0.4  # seconds that the first bytes came late, with events among them: they were held back
TICK = 0.05  # seconds: what comes within them came together
BACK = 30.0  # seconds spent on coming back


def fields_of(text: str | bytearray) -> Any:
    """The object that it is, as a browser reads JSON; an empty one if it is another thing, or too
    big to be looked at; None if it is no JSON: NaN is none, nor is what is nested too deep."""
    try:
        found = json.loads(text, parse_constant=int) if len(text) < MOST_KEPT else {}
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else {}


@dataclass
class Examined(Visit):
    """A visit whose events are judged as they come; of what they said, little is kept."""

    events: list[Heard] = field(default_factory=list)  # no beats, no [DONE], and without their data
    notes: dict[str, str] = field(default_factory=dict)  # ills that show in one event
    done: bool = False
    terminal: bool = False
    percent: float = -math.inf  # the last one

    # beside the stream: what had led to it, who came back to it, and what its server says of it
    trigger: Examined | None = None
    later: list[Examined] = field(default_factory=list)
    journal: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """A client would not come back: it has seen the end."""
        return self.done or self.terminal

    @property
    def half(self) -> int:
        """How many events a client has that comes back: of a whole stream, not the last five."""
        count = len(self.events)
        return max(count // 2, count - 5) if self.over else count

    @property
    def numbers(self) -> list[int]:
        """The ids that may be places in a log."""
        return [int(one.id) for one in self.events if one.id.isdigit()]

    @property
    def lumps(self) -> int:
        """In how many pieces the events came, as far as one can tell."""
        return len({one.at // TICK for one in self.events})

    @property
    def text(self) -> str:
        """How the body begins."""
        return self.body[:200].decode("utf-8", "replace")

    def hear(self, one: Heard) -> None:
        if self.done:
            self.notes["after-done"] = "more came behind [DONE]"
        elif one[1:] == ("", "message", "[DONE]"):
            self.done = True
            self.patience = 10
        elif one.id or (one.data and one.name != "heartbeat"):
            for ill, says in self.judged(one):
                self.notes.setdefault(ill, says)
            self.events.append(one._replace(data=""))

    def judged(self, one: Heard) -> Iterator[tuple[str, str]]:
        """What is wrong with an event by itself, or behind those before it."""
        fields = fields_of(one.data) if one.name in KNOWN_EVENTS else {}
        told = fields or {}
        if fields is None:
            yield "bad-json", f"the data of a {one.name} is no JSON: {one.data[:60]!r}"
        if one.data.startswith(("id:", "event:", "data:")):
            yield "double-wrapped", "every line is wrapped once more, as data"
        if one.name in ("gap", "failed"):
            yield one.name, f"it says {one.name}: {one.data[:500]}"
        if one.name == "completed" and told.keys() & {"caseId", "score", "summary"} == {"caseId"}:
            yield "invented", "the completed has neither score nor summary: somebody made it up"
        if one.name in TERMINAL:
            self.terminal = True
            self.done = "jobId" in told  # a job says no [DONE]
        percent = told.get("percent", told.get("value"))
        if isinstance(percent, int | float):
            if percent < self.percent:
                yield "off-contract", f"progress went back to {percent}"
            self.percent = percent


# The questions, in the order of the guide: each yields (question, answer), then (ill, how it
# shows). What is empty does not show.

Said = Iterator[tuple[str, Any]]


def about_answer(main: Examined) -> Said:
    line = f"{main.status}, {main.kind}, after {main.head_at:.2f} s"
    yield "answer", line
    yield "no-answer", not main.status and f"no answer: {main.how}"
    took = main.trigger.head_at if main.trigger else 0
    yield "slow-trigger", took > 5 and f"the trigger took {took:.1f} s; BE waits for 5"
    code = STATUSES.get(main.status, "refused" if main.status < 500 else "server-error")
    if main.post and main.status < 300:
        code = "trigger-refused"
    elif main.status == 200 and main.kind == "text/event-stream":
        code = "compressed"
    elif "runId not found" in main.text:
        code = "not-found"
    says = main.headers.get("content-encoding", main.text)
    yield code, main.status and not main.streams and f"{line}: {says}"


def about_beginning(main: Examined) -> Said:
    text = main.body.decode("utf-8", "replace")
    yield "headers", main.headers
    yield "first bytes", f"{text[:60]!r} after {main.first_at:.2f} s"
    took = min(one.head_at for one in (main, *main.later))  # once may be chance
    yield "slow-headers", took > LATE and f"the head of the answer took {took:.1f} s"
    yield "line-ends", b"\r" in main.body and "lines end in CR"
    broken = "\ufffd" in text[:-1]  # the last one may be torn here
    yield "not-utf8", broken and "it is not in UTF-8, or somebody has read it as if it were not"
    yield "bom", text.startswith("\ufeff") and "it begins with a byte order mark"
    small = main.size < 24 * main.chunks
    yield "shredded", small and main.torn > 20 and f"{main.torn} small chunks end within a line"


def about_events(main: Examined) -> Said:
    for one in (main, *main.later):
        yield from one.notes.items()
    if not main.events:
        says = f"200, then {main.size} bytes without an event, and {main.how}"
        yield "no-events" if main.size else "empty", main.ending in ("end", "full") and says
        return

    names = [one.name for one in main.events]
    ids = [one.id for one in main.events if one.id]
    span = f"ids {ids[0]} to {ids[-1]}" if ids else "no ids: nobody can resume"
    yield "events", f"{len(names)}, {span}; the last is {names[-1]}"
    yield "off-contract", names[0] in KNOWN_EVENTS[1:6] and f"the first event is {names[0]}"
    strange = ", ".join(sorted({*names} - {*KNOWN_EVENTS, "gap", "message", "heartbeat"})[:5])
    yield "off-contract", strange and f"events that nobody documented: {strange}"
    starts = names.count("started")
    yield "duplicate-run", starts > 1 and f"{starts} times started, in one run"
    wrong = main.numbers != sorted({*main.numbers})
    yield "out-of-order", wrong and f"the ids come in the order {main.numbers[:20]}"


def about_arrival(main: Examined) -> Said:
    yield "arrival", f"in {many(main.lumps, 'lump')} over {main.last_at - main.head_at:.2f} s"
    yield "buffered", held_back(main)
    silence = max(main.longest, main.silence)
    yield "heartbeats", f"{main.body.count(HEARTBEAT)}, the longest silence {silence:.1f} s"
    yield "no-heartbeat", silence > BEARABLE and f"{silence:.1f} s passed without a byte"


def held_back(main: Examined) -> Any:
    """The first bytes came late, and events with them; but other answers, before and after, did
    not. Without a trigger it may have been over, and the server slow: only a late body tells."""
    usual = main.trigger.first_at if main.trigger else main.head_at
    late = main.first_at - max([usual, *(one.first_at for one in main.later)]) > HELD
    count = len(main.events)
    says = f"silent for {main.first_at:.2f} s, then {count} events in {many(main.lumps, 'lump')}"
    return late and 2 * main.lumps < count and says


def about_end(main: Examined) -> Said:
    how = f"{main.how} after {main.ended_at:.1f} s and {many(len(main.events), 'event')}"
    yield "end", how
    yield "journal", main.journal.get("said")
    mute = main.ending == "limit" and not main.size and main.silence > LATE
    yield "dead", (mute or main.ending == "quiet") and how
    if main.ending in ("cut", "reset"):
        whole_minutes = main.ended_at > 25 and main.ended_at % 30 < 2  # or half ones: a setting
        code = "time-limit" if whole_minutes else "cut"
        yield "idle-cut" if main.silence > 20 else code, how
    elif main.ending == "end" and main.events:
        cut = main.journal.get("how") in ("drop", "reset")
        yield "hidden-cut", cut and f"{main.journal['said']}; what came here was properly ended"
        last = f"it was properly ended after {main.events[-1].name}"
        half = ", and half an event" if main.rest.strip() else ""
        yield "no-done", not main.done and f"{last}{half}, without [DONE]"
        yield "no-terminal", not main.terminal and f"{last} and [DONE]"


def about_resume(main: Examined) -> Said:
    for back in main.later:
        after = back.sends.get("last-event-id")
        who = f"whoever comes back after {after}"
        had = {one.id for one in main.events[: main.half]}
        again = sum(one.id in had for one in back.events if one.id)
        numbers = {*main.numbers, *back.numbers}
        holes = max(numbers, default=0) - len(numbers)
        places = 1 in numbers and 0 < holes < len(numbers)  # else these are other kinds of ids
        lost = holes if places else 0
        if after and back.ending not in ("limit", "full"):
            lost = max(lost, len(main.events) - main.half - len(back.events))
        line = f"after {after} came {len(back.events)}, {again} of them again; {lost} are missing"
        yield "resume", line if after else "not tried: no id to come back with"
        yield "doubled", again and f"{who} gets {many(again, 'event')} again"
        yield "lost", lost and f"{who} misses {many(lost, 'event')}"
        refused = main.over and (not back.streams or back.ending in ("cut", "reset"))
        says = f"{who}: {back.status}, {back.kind}: {back.text}; {back.how}"
        yield "resume-refused", refused and says
        took = back.last_at - back.first_at
        slow = main.over and took > 1 and back.size < 2**16
        yield "slow-stream", slow and f"a run that has ended takes {took:.1f} s for its last events"


QUESTIONS = (
    about_answer, about_beginning, about_events, about_arrival, about_end, about_resume,
)
STATUSES = {  # others below 500 are "refused", and above it "server-error"
    200: "not-a-stream", 204: "gone", 401: "unauthorized", 403: "unauthorized",
    404: "wrong-path", 502: "bad-gateway", 503: "unavailable", 504: "bad-gateway",
}
ILLS = {  # and what to change; what explains more stands before what explains less
    "no-answer": "start it, correct its address, or look for a crash in its log",
    "unauthorized": "send a good token: -H 'Authorization: Bearer …', and its tenant",
    "not-found": "send all requests of a run to the instance that runs it",
    "wrong-path": "correct the URL",
    "refused": "its answer says what it wants; after a 429, ask less often",
    "bad-gateway": "start what it passes on to, correct its address, or wait longer",
    "trigger-refused": "its answer says why there is no stream: DEMO_OFF?",
    "unavailable": "ask again after Retry-After: it is full or not up",
    "server-error": "look in its log for this request",
    "gone": "send 204 to who has seen everything; an EventSource stops at it",
    "not-a-stream": "find out who answers: a login page? a wrong path?",
    "compressed": "compress no text/event-stream",
    "empty": "look for what cancels it before its first byte: a middleware's scope",
    "no-events": "look for what ends it early, or reads the run's queue as well",
    "double-wrapped": "write lines as they came: not lines as data",
    "out-of-order": "write each event once, in the order of their ids",
    "duplicate-run": "start one run per runId, whoever asks twice",
    "invented": "say `failed` and why, where the analysis did not end",
    "bad-json": "write data as one whole line of JSON",
    "after-done": "end the answer behind [DONE]",
    "gap": "keep more events of a run",
    "resume-refused": "keep what has ended, and send all requests to that instance",
    "lost": "keep a log per run: viewers of one queue steal from each other",
    "doubled": "use ids that the server can resume from; nobody may replace them",
    "idle-cut": "beat more often than its idle time-out",
    "time-limit": "raise its limit on a request's time; clients should resume",
    "cut": "look at that moment in the log of each hop",
    "dead": "send `: connected` and heartbeats, and end the answer behind [DONE]",
    "hidden-cut": "let it speak HTTP/1.1 to the server: in 1.0 a cut is an end",
    "no-done": "write `data: [DONE]` last, and a blank line behind every event",
    "no-terminal": "end every run with completed or failed",
    "slow-headers": "send status and `: connected` before any work",
    "buffered": "switch buffering off (nginx: proxy_buffering off, gzip off)",
    "no-heartbeat": "send `: heartbeat` after 30 quiet seconds",
    "slow-stream": "write at once what is in the log",
    "line-ends": "end lines in LF: hand-written clients split there",
    "not-utf8": "encode everything in UTF-8",
    "bom": "write no byte order mark",
    "shredded": "write whole events: some clients decode piece by piece",
    "failed": "its last event says why; the stream did its work",
    "off-contract": "begin with `started`, let progress grow, and name events as documented",
    "slow-trigger": "answer 202 first, analyse afterwards",
}
FAULTS = {  # whose fault; all others are the server's
    "the caller": "unauthorized wrong-path refused",
    "the analysis": "no-terminal failed off-contract",
    "the relaying back end": "double-wrapped",
    "a proxy on the way": "bad-gateway compressed idle-cut time-limit hidden-cut buffered",
    "the server or a proxy on the way":
        "no-answer not-a-stream doubled cut dead line-ends shredded",
}


def report(main: Examined) -> dict[str, Any]:
    """The answers; the ills, that which explains most first; and the verdict."""
    asked = QUESTIONS if main.streams else QUESTIONS[:1]
    said = {name: str(says) for question in asked for name, says in question(main) if says}
    ills = [
        {"ill": ill, "says": said.pop(ill), "fault": fault(main, ill), "change": change}
        for ill, change in ILLS.items() if ill in said
    ]
    verdict = ills[0]["ill"] if ills else "healthy"
    says = f"nothing is wrong: {said.get('end')}"
    if ills:
        says = "{says} — {fault} is at fault: {change}".format(**ills[0])
    return {"url": main.url, "verdict": verdict, "says": says, "ills": ills, "answers": said}


def fault(main: Examined, ill: str) -> str:
    """Whose it is; of an end, the server's journal knows more than the wire."""
    if main.journal and ill in ("cut", "dead"):
        return f"the {main.journal.get('by')}".replace("the client", "a proxy on the way")
    return next((who for who, ills in FAULTS.items() if ill in ills.split()), "the server")


def compared(direct: dict[str, Any], via: dict[str, Any]) -> dict[str, Any]:
    """The verdict on two ways to one stream: which hop loses what."""
    known = [ill["ill"] for ill in direct["ills"]]
    added = [ill for ill in via["ills"] if ill["ill"] not in known]
    both = {**direct, "via": via}
    if not added:
        return both
    ill = added[0]
    if known:
        return {**both, "says": f"{direct['says']} (that way also: {ill['says']})"}
    hop = f"what stands between {direct['url']} and {via['url']}"
    says = f"{ill['says']} — {hop} is at fault: {ill['change']}"
    return {**both, "verdict": ill["ill"], "says": says}


@dataclass
class Doctor:
    """Asks as a careful client does, with these headers, and until then by Trio's clock."""

    headers: Mapping[str, str]
    until: float

    async def visit(
        self, url: str, limit: float, sends: Mapping[str, str], post: bytes = b""
    ) -> Examined:
        """Ask, and hear the answer to its end, or for so many seconds."""
        until = min(self.until, trio.current_time() + limit)
        async with Examined(url, {**sends, **self.headers}, post, until) as seen:
            async for one in seen:
                seen.hear(one)
        return seen

    async def trigger(self, url: str, case_id: str) -> Examined:
        """Ask for a run as the back end does."""
        url = f"{url.rstrip('/')}/aura/cases/{encoded(case_id)}/analysis-runs"
        post = to_bytes(to_json({"runId": f"doctor-{uuid.uuid4().hex[:12]}"}))
        seen = await self.visit(url, 10, {"content-type": "application/json"}, post)
        seen.streams = False  # not this
        return seen

    async def examine(self, url: str, trigger: Examined | None) -> Examined:
        """Ask for the stream, come back to it, and ask the server what it saw. What the trigger
        calls the stream counts as a path of this server: another host would get our token."""
        if trigger:
            told = fields_of(trigger.body) or {}
            path = str(told.get("streamUrl") or told.get("streamPath"))
            if not path.startswith("/"):
                return trigger
            url = url.rstrip("/") + path

        # as browsers ask, to see if somebody compresses it; and with a name, for the journal
        sends = {"accept-encoding": "gzip", "x-test-id": uuid.uuid4().hex}
        main = await self.visit(url, math.inf, sends)
        main.trigger = trigger
        if main.streams and main.ending not in ("limit", "full"):
            known = [one.id for one in main.events[: main.half] if one.id]
            after = {"last-event-id": known[-1]} if known else {}
            main.later.append(await self.visit(url, BACK, sends | after))
            if "x-aura-attempt" in main.headers and main.ending != "quiet":  # then we had left
                await self.ask_journal(main)
        return main

    async def ask_journal(self, main: Examined) -> None:
        """What the server itself says of this visit, after which we came back once."""
        path = f"/__aura/journal?kind=stream&testId={encoded(main.sends['x-test-id'])}"
        seen = await self.visit(urljoin(main.url, path), 5, {})
        told = fields_of(seen.body)
        with contextlib.suppress(LookupError, TypeError):
            entry = told["entries"][-2]
            main.journal = {**entry["end"], "said": entry["said"]}


async def diagnose(
    url: str, *, case: str | None = None, via: str | None = None,
    headers: Mapping[str, str] | None = None, limit: float = 600.0,
) -> dict[str, Any]:
    """Ask the stream at `url`, or at this server the stream of a new run of `case`; and the same
    one via another URL. What was seen, and a verdict; an OSError if nobody could be asked."""
    began = trio.current_time()
    until = began + limit
    doctor = Doctor({"authorization": "Bearer test-token", **(headers or {})}, until)
    seen: dict[str, Examined] = {}

    async def examine(one: str) -> None:
        seen[one] = await doctor.examine(one, trigger)

    for _ in range(2 if case else 1):  # bytes that are late once may be chance: then another run
        trigger = await doctor.trigger(url, case) if case else None
        async with trio.open_nursery() as nursery:
            for one in filter(None, (url, via)):
                nursery.start_soon(examine, one)
        if not any(map(held_back, seen.values())) or 2 * trio.current_time() - began > until:
            break  # or there is no time for another
    asked = trigger or seen[url]
    if not asked.sent:
        raise OSError(asked.how)
    return compared(report(seen[url]), report(seen[via])) if via else report(seen[url])


# ═══ 27  Command line ═════════════════════════════════════════════════════════════════════════════
# A flag for each setting, a sentence for each mistake, exit status 2 for what could not begin. The
# docstring of a command is what its --help says.

FIRST_STEPS = (
    "for Spring: aura.base-url={url}\n"
    "try it, in a second terminal or in a browser at {url}/ :\n"
    '  curl -N -X POST "{url}/aura/cases/1/analysis/trigger?access_token=t"\n'
    '  curl -N -X POST "{url}/aura/cases/1~drop/analysis/trigger?access_token=t"\n'
    "  {me} diagnose {url} --case 1~buffered\n"
    "The first shows a stream, the second breaks it, the third diagnoses one.\n"
    "Ctrl-C stops it."
)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence, and an unknown word gets a suggestion."""

    def __init__(self, command: Callable[[list[str]], int]) -> None:
        name = f"aura-stream {command.__name__.partition('_')[0]}"
        super().__init__(
            name, f"{name} …", inspect.getdoc(command), allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; '{self.prog} --help' says more")

    def read(self, words: list[str]) -> dict[str, Any]:
        """What these words say, by the names of the flags."""
        found, unknown = self.parse_known_args(words)
        for word in unknown:
            close = did_you_mean(word, [*self._option_string_actions, *COMMANDS])
            self.error(f"there is no {word!r} here{close}")
        return vars(found)


def serve_command(words: list[str]) -> int:
    """A local server that speaks Aura's analysis-stream contract, and can misbehave.

    Serve, on http://127.0.0.1:9000, until Ctrl-C:     aura-stream [serve] [FLAG VALUE] …
    Say what is wrong with a stream, anybody's:        aura-stream diagnose URL …
    List what can go wrong, or print one scenario:     aura-stream scenarios [NAME]

    A flag beats its environment variable, and that the default: both are in brackets.
    """
    parser = Parser(serve_command)
    parser.add_argument("--version", action="version", version=f"aura-stream {__version__}")
    for one in flagged(Settings):
        yes: Any = {"nargs": "?", "const": "true"} if isinstance(one.default, bool) else {}
        parser.add_argument(
            flag(one), metavar=one.metadata.get("choices") or str(one.type),
            help=f"{one.metadata['says']} ({one.default!r}; {variable(one)})", **yes)
    settings = Settings.read(parser.read(words), os.environ)

    shape = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
    with contextlib.closing(LogWriter()) as lines:
        logging.basicConfig(stream=lines, level=settings.log_level.upper(), format=shape)
        prepare_process()
        try:
            trio.run(serve_until_signalled, settings, partial(greet, settings))
        except* OSError as group:
            where = f"{settings.host}:{settings.port}"
            why = f"{innermost(group)}; --port 0 takes a free port"
            raise ValueError(f"cannot listen on {where}: {why}") from None
    return 0


class LogWriter:
    """Standard error for log lines. A thread of its own writes them, so that who does not read
    them holds up nobody; those that find no room are dropped, and then their number is said.

    The standard library's QueueListener would be stuck in Python's own buffer when the process
    ends, which is a crash; and it wakes for each line, which holds up the other threads.
    """

    most = 10_000  # lines that wait for a reader who pauses: a few megabytes

    def __init__(self) -> None:
        self._dropped = 0
        self._lines = queue.SimpleQueue[str]()
        self._thread = threading.Thread(target=self._put_out, daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        if self._lines.qsize() >= (1 if self._dropped else self.most):
            self._dropped += 1
        else:
            self._say_dropped()
            self._lines.put(indented(text) + "\n")

    def _say_dropped(self) -> None:
        if self._dropped:
            self._lines.put(f"aura-stream: dropped {self._dropped} log lines, nobody read them\n")
            self._dropped = 0

    def _put_out(self) -> None:
        for text in iter(self._lines.get, ""):
            time.sleep(0.05)  # many lines in one go
            while self._lines.qsize() > 1 and len(text) < 2**16:  # the last may be the end's ""
                text += self._lines.get()
            data = to_bytes(text) if sys.stderr else b""  # without one, 2 may be anything
            while data:
                try:
                    data = data[os.write(2, data) :]
                except BlockingIOError:  # somebody has made it non-blocking
                    time.sleep(0.05)
                except OSError:
                    break

    def close(self) -> None:
        """What is left goes out, if somebody reads it."""
        self._say_dropped()
        self._lines.put("")
        self._thread.join(1)


def prepare_process() -> None:
    """What a server does to its own process, and `running()`, a guest, must not."""
    gc.freeze()  # what was imported stays: to look through it again cost a third of the connects
    gc.set_threshold(50_000, 50, 50)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def greet(settings: DoubleSettings, aura: Aura, nursery: trio.Nursery) -> None:
    """Show a person the first steps, and heed standard input, if that is wished."""
    if os.isatty(1) and os.isatty(2):
        me = shlex.join([sys.executable, os.path.abspath(sys.argv[0])])
        print(FIRST_STEPS.format(url=aura.url, me=me), file=sys.stderr)
    if settings.exit_with_stdin:
        nursery.start_soon(stop_with_stdin, aura)


async def stop_with_stdin(aura: Aura) -> None:
    """So that a test run that was killed leaves no server behind."""
    with contextlib.suppress(OSError):
        while await trio.to_thread.run_sync(os.read, 0, 4096, abandon_on_cancel=True):
            pass
    aura.stop()


def scenarios_command(words: list[str]) -> int:
    """List all that can go wrong, or print one scenario as JSON, to change it.

    A changed one goes into a file: aura-stream --scenarios FILE --scenario NAME
    """
    parser = Parser(scenarios_command)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    parser.add_argument("--scenarios", metavar="FILE", help="a file with scenarios of your own")
    flags = parser.read(words)
    known = known_scenarios(Settings.read(flags, os.environ))
    name = flags["name"]
    if name is None:
        show("\n".join(f"{one.name:25} {one.doc}" for one in known.values()))
    elif name in known:
        show(json.dumps(known[name].source, indent=2, ensure_ascii=False))
    else:
        raise ValueError(f"there is no scenario {name!r}{did_you_mean(name, known)}")
    return 0


def diagnose_command(words: list[str]) -> int:
    """Ask a stream as a careful client would, and say what is wrong with it, whose fault that is,
    and what to change. It may be anybody's: this server's, Aura's, one behind a proxy.

    aura-stream diagnose http://localhost:9000 --case 85116
    aura-stream diagnose "http://localhost:9000/aura/analysis-runs/r1/stream"
    aura-stream diagnose http://localhost:9000 --case 85116 --via http://localhost:8080/api

    exit status: 0 the stream is healthy, 1 it is not, 2 nobody could be asked
    """
    parser = Parser(diagnose_command)
    add = parser.add_argument
    add("url", metavar="URL", help="a stream's; or with --case, the server's")
    add("--case", metavar="ID", help="trigger an analysis of this case, and ask for its stream")
    add("--via", metavar="URL", help="ask the same stream this way too: which hop loses what?")
    add("--limit", metavar="S", type=float, default=600.0, help="listen so long at most (600)")
    add("-H", metavar="'NAME: VALUE'", dest="headers", action="append", default=[],
        help="send this header; without one: 'Authorization: Bearer test-token'")
    add("--json", action="store_true", help="print all that was found as JSON")
    flags = parser.read(words)
    as_json = flags.pop("json")
    pairs = (given.partition(":") for given in flags["headers"])
    flags["headers"] = {name.lower(): text.strip() for name, _, text in pairs}
    checked(Headers, flags["headers"])
    if not flags["case"] and urlsplit(flags["url"]).path in ("", "/"):
        raise ValueError("give the URL of a stream, or that of a server and --case ID")

    report = trio.run(partial(diagnose, **flags))
    show(json.dumps(report, indent=2) if as_json else in_lines(report))
    return 0 if report["verdict"] == "healthy" else 1


def in_lines(report: Mapping[str, Any]) -> str:
    """A diagnosis as a person reads it: the answers, then one sentence."""
    lines = []
    for one in filter(None, (report, report.get("via"))):
        lines += [one["url"], *(f"  {name:12} {text}" for name, text in one["answers"].items())]
        lines += [f"  {'ill':12} {ill['ill']}: {ill['says']}" for ill in one["ills"]]
    verdict = report["verdict"]
    if verdict != "healthy":
        verdict = f"faulty ({verdict})"
    lines.append(f"{verdict}: {report['says']}")
    return "\n".join(printable(line)[:1000] for line in lines)


def show(text: str) -> None:
    """On standard output."""
    with contextlib.suppress(AttributeError):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    print(text)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve_command, "diagnose": diagnose_command, "scenarios": scenarios_command,
}


def main(arguments: list[str] | None = None) -> int:
    """The exit status. What goes wrong at the start is one sentence, and 2."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0].startswith("-"):
        words = ["serve", *words]
    command, *rest = words
    status = 2
    try:
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r}{did_you_mean(command, COMMANDS)}")
        status = COMMANDS[command](rest)
    except* (ValueError, OSError) as group:
        print(f"aura-stream: {printable(str(innermost(group)))}", file=sys.stderr)
    except* KeyboardInterrupt:
        status = 130
    return status


if __name__ == "__main__":
    sys.exit(main())
