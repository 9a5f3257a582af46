"""Tests of aura_stream, in its chapters and their order.

The treaty: only localhost, only port 0. Three speeds: pure functions as tables; the application in
memory under Trio's autojump clock, where hours take milliseconds; real sockets through `running()`.
Whoever does I/O has a time-out (`WAIT`), generous enough for a busy machine: figures are measured by
hand, here they only must not be absurd. No test sleeps where a clock or a log line will do. A test
that needs a program (Java, Node, curl, nginx, Chromium) skips where it is missing, and fails there under CI=true.
"""

import ast
import asyncio
import contextlib
import dataclasses
import errno
import gzip
import http.client
import http.server
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import symtable
import sys
import threading
import time
import tokenize
import tomllib
import tracemalloc
import types
import uuid
import venv
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import outcome
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import aura_stream
from aura_stream import (
    DONE,
    VERBS,
    BoundedHub,
    BoundedLog,
    Ending,
    Entry,
    Event,
    Failure,
    Mistake,
    Scenario,
    ScriptedDelivery,
    ScriptedInfo,
    Settings,
    Time,
    comment,
    create_app,
    main,
    parse_scenario,
    parse_script,
    resume_point,
    running,
    safe,
    serve,
)

HERE = Path(__file__).parent
SOURCE = (HERE / "aura_stream.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
WAIT = 20
BEARER = {"Authorization": "Bearer test-token"}
hypothesis_settings.register_profile("busy", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("busy")


# ═══ The shape ══════════════════════════════════════════════════════════════════════════════════


def functions(tree=TREE):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def inner(function):
    """The functions inside a function, but not those inside them."""
    found, rest = [], list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node)
        else:
            rest.extend(ast.iter_child_nodes(node))
    return found


def own_nodes(function):
    """All nodes of a function but those of functions inside it."""
    rest = list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            rest.extend(ast.iter_child_nodes(node))


def chapters():
    """(number, title, first line) of every chapter banner."""
    found = re.finditer(r"^# ═══ (\d+)  (.+?) ═+$", SOURCE, re.M)
    return [(int(one[1]), one[2], SOURCE.count("\n", 0, one.start()) + 1) for one in found]


@cache
def docstrings():
    """The numbers of the lines that docstrings take."""
    docs = set()
    for node in ast.walk(TREE):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs.update(range(body[0].lineno, body[0].end_lineno + 1))
    return docs


def tokens():
    """The size that no formatting changes: tokens without comments, docstrings, line ends and indents; a string of more
    than 80 characters counts a sixth of its length, so that nothing hides in strings, and the page is one token."""
    unseen = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        text = token.type == tokenize.STRING
        if token.type not in unseen and not (text and token.start[0] in docstrings()):
            count += len(token.string) // 6 if text and 80 < len(token.string) < 4000 else 1
    return count


def test_the_top_level_has_four_names():
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    names = listed.stdout.split() or [path.name for path in HERE.iterdir() if path.name != "__pycache__"]
    visible = {name.split("/")[0] for name in names if not name.startswith(".")}
    assert visible == {"aura_stream.py", "test_aura_stream.py", "pyproject.toml", "README.md"}


def test_the_header_for_uv_and_pipx_asks_for_what_pyproject_asks_for():
    """PEP 723: a block of comments below the module's docstring, and above everything that is imported."""
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCE, re.M)
    asked = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(True)))
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert asked == {key: project[key] for key in ("requires-python", "dependencies")}
    docstring, first_import = TREE.body[:2]
    assert docstring.end_lineno < SOURCE[: SOURCE.index(block)].count("\n") < first_import.lineno


def test_quart_trio_and_quart_that_do_not_fit_are_not_chosen_together():
    """0.12 does not import with Quart 0.23; where that can be had (it needs Python 3.13), 0.12 is none of those asked for."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [one for one in project["dependencies"] if one.startswith("quart")]
    assert asked == ["quart-trio>=0.12,<0.14", "quart-trio>=0.13; python_version >= '3.13'", "quart>=0.22,<0.24"]
    here = [version(name).rpartition(".")[0] for name in ("quart-trio", "quart")]
    assert here in (["0.12", "0.22"], ["0.13", "0.23"]), "and this is one of the pairs"


def test_the_front_matter_lists_the_chapters():
    listed = re.findall(r"^ {4,5}(\d+)  ([A-Z].*?)(?:  .*)?$", ast.get_docstring(TREE, clean=False), re.M)
    assert [(int(number), title) for number, title in listed] == [(n, title) for n, title, _ in chapters()]


def test_no_chapter_uses_a_later_one():
    starts = [line for _, _, line in chapters()]
    defined = {}
    for node in TREE.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for target in targets:
            name = getattr(target, "id", None) or getattr(target, "name", None)
            if name:
                defined[name] = node.lineno
    chapter = {name: sum(line >= start for start in starts) for name, line in defined.items()}
    assert len(chapter) > 100
    wrong = []

    def visit(table):
        for symbol in table.get_symbols():
            name = symbol.get_name()
            is_global = symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced())
            if is_global and symbol.is_referenced() and name in chapter and table.get_type() != "module":
                here = sum(table.get_lineno() >= start for start in starts)
                if chapter[name] > here:
                    wrong.append(f"{table.get_name()} (chapter {here}) uses {name} (chapter {chapter[name]})")
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(SOURCE, "aura_stream.py", "exec"))
    assert wrong == []


@contextlib.contextmanager
def cut_behind(part, folder, settings=""):
    """A server of what stands above the banner of the next part, and of the four lines that start it; and its port."""
    above = SOURCE[: re.search(rf"^# ═══ Part {part + 1}  ", SOURCE, re.M).start()]
    start = (
        'if __name__ == "__main__":',
        "    logging.basicConfig(level=logging.INFO)",
        f"    trio.run(serve_until_signalled, ServerSettings(port=0{settings}))",
    )
    (folder / "server.py").write_text(above + "\n".join(start) + "\n", encoding="utf-8")
    command = [sys.executable, "-W", "error", folder / "server.py"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            ready = server.stdout.readline()
            yield server, types.SimpleNamespace(port=int(ready.rsplit(":", 1)[1]), url=ready.split()[-1])
        finally:
            server.kill()


def asked_of(aura, method, path, body=None, **headers):
    """Status and body of a plain answer, or all of a stream."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    found = httpx.request(method, aura.url + path, json=body, headers={**BEARER, **named}, timeout=WAIT)
    return found.status_code, found.text


def ids_in(stream):
    return [int(one) for one in re.findall(r"^id: (\d+)$", stream, re.M)]


def test_what_stands_above_part_2_is_a_whole_server(tmp_path):
    """The knife: trigger, streams, resume, viewers, cancel, beats, silence, 404, and the stop."""
    with cut_behind(1, tmp_path) as (server, aura):
        phase2 = asked_of(aura, "POST", "/aura/cases/85116/analysis-runs", {"runId": "two"})
        assert phase2 == (202, '{"status": "ACCEPTED", "runId": "two", "caseId": "85116", "streamUrl": "/aura/analysis-runs/two/stream"}')
        quick = asked_of(aura, "POST", "/aura/internal/cases/1/analysis-runs", {"runId": "three"})
        assert quick == (202, '{"accepted": true, "runId": "three", "streamPath": "/aura/cases/1/analysis/stream?runId=three"}')
        with connect(aura, get("/aura/analysis-runs/two/stream")) as leaves, connect(aura, get("/aura/analysis-runs/two/stream")) as stays:
            read_until(leaves, b"id: 3\n\n")
            leaves.close()
            whole = read_until(stays, b"0\r\n\r\n")
            assert whole.count(b"\nid: ") == 11 and whole.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        status, stream = asked_of(aura, "GET", "/aura/cases/1/analysis/stream?runId=three")
        assert status == 200 and stream.startswith(": connected\n\nevent: started\n") and ids_in(stream) == list(range(1, 10))
        for seen in range(11):
            _, rest = asked_of(aura, "GET", "/aura/analysis-runs/two/stream", Last_Event_ID=str(seen))
            assert ids_in(rest) == list(range(seen + 1, 12)) and rest.endswith("data: [DONE]\n\n")
        assert asked_of(aura, "GET", "/aura/analysis-runs/two/stream", Last_Event_ID="11")[0] == 204
        status, text = asked_of(aura, "GET", "/aura/analysis-runs/nope/stream")
        assert status == 404 and json.loads(text)["hint"].startswith("no such run on instance 127.0.0.1:")
        assert asked_of(aura, "POST", "/aura/cases/1/analysis-runs", [1])[0] == 422

        asked_of(aura, "POST", "/aura/cases/1/analysis-runs", {"runId": "gone"})
        with connect(aura, get("/aura/analysis-runs/gone/stream")) as watches:
            read_until(watches, b"id: 1\n\n")
            assert asked_of(aura, "DELETE", "/aura/cases/1/analysis-runs/gone") == (202, '{"status": "CANCELLED", "runId": "gone"}')
            assert b'"stage": "cancelled"' in read_until(watches, b"[DONE]")
        assert asked_of(aura, "DELETE", "/aura/cases/1/analysis-runs/gone")[0] == 200
        state = json.loads(asked_of(aura, "GET", "/aura/cases/1/analysis-runs/gone")[1])
        assert (state["status"], state["viewers"]) == ("cancelled", 0)

        asked_of(aura, "POST", "/aura/cases/1/analysis-runs", {"runId": "last"})
        with connect(aura, get("/aura/analysis-runs/last/stream")) as open_one:
            read_until(open_one, b"id: 1\n\n")
            server.terminate()
            assert b'"stage": "shutdown"' in read_until(open_one, b"[DONE]")
        assert server.wait(WAIT) == 0
        said = server.stderr.read()
        assert "stream closed run_id=two by=client how=disconnect" in said and "stream closed run_id=two by=server how=end" in said
        assert "Traceback" not in said


def test_part_1_alone_beats_when_it_is_quiet_and_fails_when_it_is_silent(tmp_path):
    with cut_behind(1, tmp_path, ", event_delay=0.5, heartbeat=0.1, retry_ms=7, idle_timeout=0.3") as (_, aura):
        asked_of(aura, "POST", "/aura/cases/1/analysis-runs", {"runId": "silent"})
        status, stream = asked_of(aura, "GET", "/aura/cases/1/analysis/stream?runId=silent")
    assert status == 200 and stream.startswith(": connected\n\nretry: 7\n\nevent: started\n")
    assert stream.count("id: 1\n\n: heartbeat\n\n") >= 1 and stream.endswith("\nid: 2\n\ndata: [DONE]\n\n")
    assert '"stage": "timeout"' in stream and "the analysis said nothing for 0.3 s" in stream


async def test_what_an_analysis_says_last_counts_too_even_if_it_is_no_event():
    """It has returned by the time that this is heard; and a run that failed is none that completed."""
    async def says_no_event(info, sending):
        sending.send_nowait("no event")

    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(), says_no_event))
        assert (run.status, run.log.last_name) == ("failed", "failed")


async def test_an_analysis_that_raises_while_the_server_is_cancelled_does_not_end_it_otherwise():
    async def raises_in_its_clean_up(info, sending):
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    with trio.move_on_after(WAIT) as late:
        async with trio.open_nursery() as nursery:
            aura = await nursery.start(partial(serve, Settings(port=0), analysis=raises_in_its_clean_up))
            await trio.to_thread.run_sync(aura.trigger, "1")
            nursery.cancel_scope.cancel()
    assert not late.cancelled_caught


async def test_in_part_1_too_a_time_that_is_over_is_no_mistake(autojump_clock):
    """A viewer that did not read for longer than a heartbeat's interval; an idle time-out of nothing."""
    with aura_stream.Clock().limit(-1) as over:
        await trio.sleep(1)
    assert over.cancelled_caught


def test_functions_are_short_flat_and_simple():
    branches = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension)
    lines = SOURCE.splitlines()

    def nesting(node, depth=0):
        deepest = depth
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            chained = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
            loops = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.With, ast.AsyncWith)
            counts = isinstance(child, loops) and not chained
            deepest = max(deepest, nesting(child, depth + counts))
        return deepest

    for function in functions():
        mine = set(range(function.lineno, function.end_lineno + 1))
        for one in inner(function):
            first = min([one.lineno, *(decorator.lineno for decorator in one.decorator_list)])
            mine -= set(range(first, one.end_lineno + 1))
        size = sum(1 for number in mine if lines[number - 1].strip())
        complexity = 1 + sum(isinstance(node, branches) for node in own_nodes(function))
        assert size <= 40, f"{function.name} has {size} lines"
        assert complexity <= 10, f"{function.name} has complexity {complexity}"
        assert nesting(function) <= 3, f"{function.name} nests {nesting(function)} deep"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="later ones cut f-strings into pieces")
def test_the_module_stays_small_enough_to_be_read():
    assert tokens() <= 47_752


def test_the_module_has_no_state_and_configures_nothing():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREE.body[1:]:
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        assert isinstance(node, allowed) or guard, ast.unparse(node)
    mutable = [name for name, value in vars(aura_stream).items() if isinstance(value, (set, bytearray, aura_stream.Hub, trio.Event))]
    assert mutable == []


def test_no_scope_and_no_nursery_spans_a_yield():
    for function in functions():
        for node in own_nodes(function):
            if isinstance(node, (ast.With, ast.AsyncWith)):
                opened = " ".join(ast.unparse(item.context_expr) for item in node.items)
                if re.search(r"CancelScope|move_on|fail_a|nursery|\.limit\(|\bscope\b", opened):
                    yields = [part for part in ast.walk(node) if isinstance(part, (ast.Yield, ast.YieldFrom))]
                    assert yields == [], f"{function.name}: {opened}"


# ═══ Tools ══════════════════════════════════════════════════════════════════════════════════════


class Parser:
    """An SSE parser as the WHATWG describes it, byte by byte; what the module has is not used."""

    def __init__(self):
        self.events, self.last_id, self._line, self._cr = [], "", bytearray(), False
        self._name, self._data, self._begun = "", [], False

    def feed(self, data):
        for byte in data:
            if byte == 10 and self._cr:
                self._cr = False
                continue
            self._cr = byte == 13
            if byte in (10, 13):
                line = self._line.decode("utf-8", "replace")
                self._take(line if self._begun else line.removeprefix("\ufeff"))
                self._begun = True
                self._line.clear()
            else:
                self._line.append(byte)
        return self

    def _take(self, line):
        if not line:
            if self._data:
                self.events.append((self.last_id, self._name or "message", "\n".join(self._data)))
            self._name, self._data = "", []
            return
        key, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if key == "data":
            self._data.append(value)
        elif key == "event":
            self._name = value
        elif key == "id" and "\0" not in value:
            self.last_id = value


def parsed(data):
    """The events of a stream, [DONE] left out."""
    return [event for event in Parser().feed(data).events if event[2] != "[DONE]"]


class Heard(logging.Handler):
    """Every line logged, and a way to wait for one without sleeping."""

    def __init__(self):
        super().__init__()
        self.lines, self._new = [], queue.Queue()

    def emit(self, record):
        self._new.put(f"{record.levelname} {record.getMessage()}" + (" +trace" if record.exc_info else ""))

    def wait_for(self, text, within=WAIT):
        """The first line with this text, heard or still to come."""
        end = time.monotonic() + within
        self.all()
        for line in self.lines:
            if text in line:
                return line
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self.lines.append(self._new.get(timeout=left))
                if text in self.lines[-1]:
                    return self.lines[-1]
        raise AssertionError(f"{text!r} was not logged within {within} s, but:\n" + "\n".join(self.lines))

    def all(self):
        while not self._new.empty():
            self.lines.append(self._new.get())
        return "\n".join(self.lines)


@pytest.fixture(scope="session", autouse=True)
def short_cuts():
    """The pause before a drop or a reset is for clients that lose what comes with it; ours, but for a few, do not."""
    usual, aura_stream.CUT_AFTER = aura_stream.CUT_AFTER, 0.02
    yield usual
    aura_stream.CUT_AFTER = usual


@pytest.fixture
def usual_cuts(short_cuts, monkeypatch):
    monkeypatch.setattr(aura_stream, "CUT_AFTER", short_cuts)


@pytest.fixture
def heard():
    logger, handler = logging.getLogger("aura_stream"), Heard()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


def connect(aura, data=b""):
    """A raw connection, with this sent on it."""
    wire = socket.create_connection(("127.0.0.1", aura.port), WAIT)
    wire.sendall(data)
    return wire


def get(path, *, version="1.1", headers=None):
    """The bytes of a GET."""
    lines = [f"GET {path} HTTP/{version}", "Host: localhost", "Authorization: Bearer t"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def read_until(wire, marker):
    """What comes, up to and with the marker; to the end if there is none."""
    data = b""
    while marker is None or marker not in data:
        piece = wire.recv(65536)
        if not piece:
            assert marker is None, data
            return data
        data += piece
    return data


def body_of(answer):
    """The body of a whole chunked answer; a body that was cut is an IncompleteRead."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    body, at = b"", 0
    while True:
        end = rest.find(b"\r\n", at)
        if end < 0:
            raise http.client.IncompleteRead(body)
        size = int(rest[at:end], 16)
        if size == 0:
            return body
        if len(rest) < end + 2 + size + 2:
            raise http.client.IncompleteRead(body + rest[end + 2 : end + 2 + size])
        body += rest[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


def stream(aura, run_id, headers=None):
    """The whole body of a run's stream."""
    answer = httpx.get(f"{aura.url}/aura/analysis-runs/{run_id}/stream", headers={**BEARER, **(headers or {})}, timeout=WAIT)
    assert answer.status_code == 200, answer.text
    return answer.content


def says(*names, pause=0.0):
    """A run script that says these events."""
    return [part for name in names for part in ({"event": {"event": name, "data": {"n": name}}}, {"sleep": pause})]


def program(name):
    """The path of a program; skips where it is missing, fails there under CI."""
    found = shutil.which(name)
    if not found and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is missing; .ci/run installs it")
    return found or pytest.skip(f"{name} is not installed")


class Answer:
    """What an ASGI application answered."""

    def __init__(self):
        self.status_code, self.headers, self._data = 0, httpx.Headers(), bytearray()

    async def get_data(self):
        return bytes(self._data)

    async def get_json(self):
        return json.loads(self._data)


class Client:
    """Asks the application directly. (Quart-Trio's own client holds ten parts of an answer, and a stream has more.)"""

    peer = "127.0.0.1"

    def __init__(self, app):
        self._app = app

    async def open(self, path, *, method="GET", headers=None, data=None, json=None):
        answer, body = Answer(), globals()["json"].dumps(json).encode() if json is not None else data or b""
        path, _, query = path.partition("?")
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(path), "root_path": "",
            "raw_path": path.encode(), "query_string": query.encode(), "client": (self.peer, 1), "asgi": {"version": "3.0"},
            "headers": [(name.lower().encode(), value.encode()) for name, value in {"Host": "localhost", **(headers or {})}.items()],
        }  # fmt: skip

        async def receive():
            return parts.pop() if parts else await trio.sleep_forever()

        async def send(message):
            await trio.lowlevel.checkpoint()
            if message["type"] == "http.response.start":
                answer.status_code, answer.headers = message["status"], httpx.Headers(list(message["headers"]))
            else:
                answer._data += message["body"]

        await self._app(scope, receive, send)
        return answer

    def __getattr__(self, method):
        return lambda path, **more: self.open(path, method=method.upper(), **more)


@contextlib.asynccontextmanager
async def in_memory(**fields):
    """The application without a socket: its client, its hub, its script time, itself."""
    settings = Settings(**fields)
    async with trio.open_nursery() as nursery:
        hub = BoundedHub(settings, nursery)
        app = create_app(settings, hub, CATALOGUE)
        yield Client(app), hub, hub.clock, app
        nursery.cancel_scope.cancel()


def facts(script_time, run_id="r1", phase="phase2", **more):
    return ScriptedInfo(run_id, "85116", None, phase, more.pop("body", {}), script_time, **more)


async def played(script, *, run=None, settings=None, after=0, cut_at=None, hub=None, seed=None):
    """What a delivery writes, and its entry; cut off after so many bytes if told so."""
    entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", attempt=1, resumed_after=after, seed=seed)
    written, heads = bytearray(), []

    async def send(message):
        await trio.lowlevel.checkpoint_if_cancelled()
        if message["type"] == "http.response.start":
            heads.append(message)
        else:
            written.extend(message["body"])
        if cut_at is not None and len(written) >= cut_at:
            scope.cancel()

    with trio.CancelScope() as scope:
        hub = hub or BoundedHub(settings or Settings(), None, run.info.clock if run else Time())
        delivery = ScriptedDelivery(script, entry, hub, run)
        await delivery.deliver(send)
    return bytes(written[:cut_at]), entry, heads


ORDINARY = aura_stream.ordinary_stream(Settings())
CATALOGUE = aura_stream.catalogue()


# ═══ 1  Settings ════════════════════════════════════════════════════════════════════════════════


def test_a_flag_beats_its_variable_which_beats_the_default():
    assert Settings.read({}, {}).port == 9000
    assert Settings.read({}, {"AURA_PORT": "1"}).port == 1
    assert Settings.read({"port": "2"}, {"AURA_PORT": "1"}).port == 2
    assert Settings.read({}, {"SSE_ENABLE_LAST_EVENT_ID": "false"}).event_ids is False
    assert Settings.read({}, {"DEMO_OFF": "TRUE"}).demo_off is True
    assert Settings.read({}, {"DEMO_OFF": "on", "SSE_RETRY_MS": "", "LOG_LEVEL": "debug"}).log_level == "debug"


@pytest.mark.parametrize(("flags", "environment", "sentence"), [
    ({"port": "x"}, {}, "'--port' takes a whole number, not \"x\""),
    ({"port": "70000"}, {}, "'--port' takes a whole number <= 65535, not \"70000\""),
    ({"allow_host": "a.test,http://b.test"}, {}, "'--allow-host' takes a list like a.test,b.test, not \"a.test,http://b.test\""),
    ({"allow_host": "c.test:9000"}, {}, "'--allow-host' takes a list like a.test,b.test, not \"c.test:9000\""),
    ({"cors_origin": "*.foo.test"}, {}, "'--cors-origin' takes a list like localhost:*,https://a.test, not \"*.foo.test\""),
    ({"cors_origin": "https://a.test/"}, {}, "'--cors-origin' takes a list like localhost:*,https://a.test, not \"https://a.test/\""),
    ({"grace": "-1"}, {}, "'--grace' takes a number >= 0.0, not \"-1\""),
    ({"grace": "nan"}, {}, "'--grace' takes a number >= 0.0, not \"nan\""),
    ({"auth": "maybe"}, {}, "'--auth' takes a text like on|off, not \"maybe\""),
    ({}, {"DEMO_OFF": "perhaps"}, "'DEMO_OFF' takes true or false, not \"perhaps\""),
    ({}, {"LOG_LEVEL": "loud"}, "'LOG_LEVEL' takes DEBUG, INFO, WARNING or ERROR, not \"loud\""),
    ({}, {"SSE_HEARTBEAT_INTERVAL": "often"}, "'SSE_HEARTBEAT_INTERVAL' takes a number, not \"often\""),
])  # fmt: skip
def test_a_wrong_setting_is_one_sentence_that_names_it(flags, environment, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Settings.read(flags, environment)


@pytest.mark.parametrize("one", [one for one in dataclasses.fields(Settings) if type(one.default) in (int, float)], ids=aura_stream.flag)
@pytest.mark.parametrize("value", [0, 1e-9, 0.0009, 0.001, 1, 1e7, 10**12])
def test_whatever_a_setting_may_be_the_ordinary_scripts_are_valid(one, value):
    """Or else the message names the flag, not the place in a script that the user has not written."""
    try:
        settings = Settings(**{one.name: type(one.default)(value)})
    except ValueError as error:
        assert str(error).strip("'").startswith(aura_stream.flag(one))
        return
    for phase in aura_stream.PHASES.values():
        assert phase.stream(settings)


# ═══ 2  Events ══════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize(("name", "data", "block"), [
    ("step", {"percent": 10}, b'event: step\ndata: {"percent": 10}\n'),
    ("", "text", b"data: text\n"),
    ("a", "one\ntwo\r\nthree\rfour", b"event: a\ndata: one\ndata: two\ndata: three\ndata: four\n"),
    ("a", "\u2028\x0b\x0c\x1c", "event: a\ndata: \u2028\x0b\x0c\x1c\n".encode()),
    ("a", {"k": "증거"}, 'event: a\ndata: {"k": "증거"}\n'.encode()),
    ("a", {"k": "\ud800"}, b'event: a\ndata: {"k": "\\ud800"}\n'),
    ("a", "", b"event: a\ndata: \n"),
])  # fmt: skip
def test_an_event_has_exactly_these_bytes(name, data, block):
    """Its id comes last: clients that take an id as soon as its line arrives shall have the event, too."""
    assert Event(name, data).block == block
    assert Event(name, data).numbered(7) == block + b"id: 7\n\n"
    assert Event(name, data).numbered(None) == block + b"\n"


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\r\nid: 9", "a\0"])
def test_a_name_cannot_forge_a_line(name):
    with pytest.raises(ValueError, match="one line without NUL"):
        Event(name, "x")


def test_comments_and_done_have_their_famous_lengths():
    assert comment("connected") == b": connected\n\n"
    assert len(comment("connected")) == 13
    assert len(DONE) == 14
    assert comment("a\nb") == b": a\n: b\n\n"


any_text = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(["\r", "\r\n", "\ufeff", "\0", "\x85", "\ud800"])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(any_text, inside, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.lists(any_json.filter(lambda value: not isinstance(value, str)), max_size=5))
def test_what_a_client_parses_is_what_the_analysis_said(values):
    log = BoundedLog(ids=True)
    for value in values:
        log.append(Event("said", value))
    data, last = log.read(0) if values else (b"", 0)
    found = Parser().feed(data).events
    assert [json.loads(text) for _, _, text in found] == values
    assert [int(number) for number, _, _ in found] == list(range(1, last + 1))


@given(any_text)
def test_text_arrives_line_by_line(text):
    heard_text = [data for _, _, data in Parser().feed(b": connected\n\n" + Event("t", text).numbered(None)).events]
    lines = re.split("\r\n|\r|\n", text)
    assert heard_text == ["\n".join(lines).encode("utf-8", "backslashreplace").decode()]


def test_an_event_without_its_blank_line_is_none():
    assert list(aura_stream.read_events(["id: 1", "data: a", "", "id: 2", "data: {}"])) == [("1", "message", "a")]
    assert list(aura_stream.read_events(["data: a"])) == []


# ═══ 3  Time ════════════════════════════════════════════════════════════════════════════════════


async def test_script_time_moves_by_hand_and_wakes_what_is_due(autojump_clock):
    script_time, woken = Time(), []

    async def sleeper(seconds):
        await script_time.sleep(seconds)
        woken.append(seconds)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for seconds in (10, 20, 1000):
            nursery.start_soon(sleeper, seconds)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(script_time.advance, 15)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == [10]
        assert trio.current_time() == start
    assert woken == [10, 20, 1000]
    assert trio.current_time() - start == pytest.approx(985)


async def test_a_limit_is_a_deadline_in_script_time(autojump_clock):
    script_time = Time()
    with script_time.limit(5) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert script_time.waiting == set()


async def test_what_is_due_comes_in_its_turn_whoever_moves_the_time(mock_clock):
    script_time, woken = Time(), []

    async def every_second():
        for _ in range(100):
            await script_time.sleep(1)
            woken.append(round(script_time.now() - began))

    began = script_time.now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(every_second)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as movers:
            for _ in range(4):
                movers.start_soon(script_time.advance, 20)
        assert woken == list(range(1, 81)) and round(script_time.now() - began) == 80
        nursery.cancel_scope.cancel()


async def test_moving_the_time_far_has_an_end(mock_clock):
    """Past a million deadlines: not each in its turn, but soon."""
    script_time = Time()

    async def restless():
        while True:
            await script_time.sleep(0.001)

    began, clock = script_time.now(), time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(restless)
        await trio.testing.wait_all_tasks_blocked()
        await script_time.advance(100_000)
        assert script_time.now() - began == pytest.approx(100_000) and time.monotonic() - clock < 5
        nursery.cancel_scope.cancel()


async def test_a_deadline_that_passes_meanwhile_is_no_jump_to_the_end_of_time(autojump_clock):
    class Drifting(Time):
        drift = 0.0

        def now(self):
            self.drift += 0.01
            return super().now() + self.drift

    script_time = Drifting(float("inf"))
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script_time.jump)
            for number in range(300):
                await script_time.sleep(0.005 * number)
            nursery.cancel_scope.cancel()
    assert script_time.now() < 10_000


async def test_script_time_may_be_faster_than_real(autojump_clock):
    script_time, start = Time(20.0), trio.current_time()
    await script_time.sleep(300)
    assert trio.current_time() - start == pytest.approx(15)
    with script_time.limit(40) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught and trio.current_time() - start == pytest.approx(17)


async def test_script_time_jumps_when_everybody_waits(mock_clock):
    """Trio's own clock stands still here: whatever moves is script time, and no protective deadline."""
    script_time, woken = Time(float("inf")), []

    async def sleeper(seconds):
        await script_time.sleep(seconds)
        woken.append((seconds, round(script_time.now() - began)))

    began = script_time.now()
    with trio.CancelScope(deadline=trio.current_time() + 5) as protective:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script_time.jump)
            async with trio.open_nursery() as sleepers:
                for seconds in (300, 10, 86_400):
                    sleepers.start_soon(sleeper, seconds)
            nursery.cancel_scope.cancel()
    assert woken == [(10, 10), (300, 300), (86_400, 86_400)]
    assert not protective.cancelled_caught


async def test_a_heartbeat_alone_causes_no_jump_but_fires_when_one_passes(mock_clock):
    script_time, fired = Time(float("inf")), []

    async def beat():
        with script_time.limit(30, jump=False):
            await trio.sleep_forever()
        fired.append(round(script_time.now() - began))

    began = script_time.now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script_time.jump)
        nursery.start_soon(beat)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert fired == [] and script_time.now() == began
        await script_time.sleep(40)
        assert fired == [30] and round(script_time.now() - began) == 40
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("speed", ["0", "-1", "fast", "nan", "", "1e-"])
def test_a_wrong_speed_is_one_sentence(speed):
    with pytest.raises(ValueError, match=f"^'--speed' takes a number above 0 or max, not \"{speed}\"$"):
        Settings(speed=speed)


# ═══ 4  Scripts ═════════════════════════════════════════════════════════════════════════════════


MISTAKES = [
    ("run", {}, "run", "a script is a list of steps"),
    ("run", [{"slep": 1}], "run[0]", "unknown step 'slep'; did you mean 'sleep'?"),
    ("run", ["zzz"], "run[0]", "unknown step 'zzz' (there are 8: crash, event, fail, hang, ordinary, repeat, sleep, wait)"),
    ("run", [5], "run[0]", "a step is a verb"),
    ("run", [{}], "run[0]", "a step is a verb"),
    ("run", [{"sleep": 1, "fail": "x"}], "run[0]", "one verb in a step, not 'sleep' and 'fail'"),
    ("run", [{"relay": "all"}], "run[0]", "'relay' belongs in a stream script"),
    ("stream", [{"fail": "x"}], "stream[0]", "'fail' belongs in a run script"),
    ("run", ["sleep"], "run[0]", "'sleep' takes a number or a list, not null"),
    ("run", [{"sleep": -1}], "run[0]", "'sleep' takes a number >= 0.0, not -1"),
    ("run", [{"sleep": True}], "run[0]", "'sleep' takes a number or a list, not true"),
    ("run", [{"sleep": [1, 2, 3]}], "run[0]", "'sleep' takes a list of length <= 2"),
    ("run", [{"sleep": 1, "pad": 3}], "run[0]", "'sleep' has no 'pad'"),
    ("run", [{"event": "x"}], "run[0]", "'event' takes an object"),
    ("run", [{"event": {"event": "x"}}], "run[0]", "'event' needs 'data'"),
    ("run", [{"event": {"event": "x\ny", "data": 1}}], "run[0]", "one line without NUL"),
    ("run", [{"event": {"event": "x", "data": 1, "dta": 2}}], "run[0]", "has no 'dta'; did you mean 'data'?"),
    ("run", [{"fail": {"stage": "rag"}}], "run[0]", "'fail' needs 'error'"),
    ("run", [{"fail": {"error": 5}}], "run[0]", "'fail' 'error' takes a text, not 5"),
    ("run", [{"repeat": 2, "steps": [{"sleep": 1}, {"slep": 1}]}], "run[0].steps[1]", "did you mean 'sleep'?"),
    ("run", [{"repeat": 2, "steps": 5}], "run[0]", "'repeat' 'steps' takes a list"),
    ("run", [{"repeat": 1.5}], "run[0]", "'repeat' takes a whole number"),
    ("run", [{"repeat": 10**9, "steps": []}], "run[0]", "whole number <= 1000000"),
    ("run", [{"repeat": 1001, "steps": [{"repeat": 1000, "steps": []}]}], "run", "more than 1,000,000 turns"),
    ("run", [{"repeat": 600_000, "steps": []}] * 2, "run", "more than 1,000,000 turns"),
    ("stream", [{"open": {"status": 99}}], "stream[0]", "'open' 'status' takes a whole number >= 200, not 99"),
    ("stream", [{"open": {"headers": {"a b": "c"}}}], "stream[0]", "a name a header can have"),
    ("stream", [{"open": {"headers": {"a": "b\r\nc: d"}}}], "stream[0]", "visible ASCII"),
    ("stream", [{"open": {"headers": {"Content-Length": "5"}}}], "stream[0]", "the server's own"),
    ("stream", ["open", "open"], "stream[1]", "'open' comes once and before all output"),
    ("stream", [{"comment": "a"}, "open"], "stream[1]", "before all output"),
    ("stream", [{"repeat": 2, "steps": ["open"]}], "stream[0].steps[0]", "before all output"),
    ("run", [{"x" * 100_000: 1}], "run[0]", "unknown step 'xxx"),
    ("run", [{"sleep": 0}] * 5001, "run", "more than 5,000 steps"),
    ("run", [{"repeat": 1, "steps": [{"sleep": 0}] * 2500}] * 2, "run[1].steps", "more than 5,000 steps"),
    ("stream", [{"comment": "a", "pad": 1}], "stream[0]", "has no 'pad' (there are 0: none)"),
    ("stream", [{"relay": "some"}], "stream[0]", "takes a text like all, not \"some\""),
    ("stream", [{"relay": {"until": 5}}], "stream[0]", "'relay' 'until' takes a text"),
    ("stream", [{"relay": 1, "every": -1}], "stream[0]", "'every' takes a number"),
    ("stream", [{"heartbeat": "sometimes"}], "stream[0]", "takes a text like never"),
    ("stream", [{"heartbeat": 0}], "stream[0]", "takes a number >= 0.001"),
    ("stream", [{"comment": 5}], "stream[0]", "'comment' takes a text, not 5"),
    ("stream", [{"raw": None}], "stream[0]", "'raw' takes a text or an object"),
    ("stream", [{"raw": {"hex": "zz"}}], "stream[0]", "non-hexadecimal"),
    ("stream", [{"raw": {"base64": "!"}}], "stream[0]", "Only base64 data is allowed"),
    ("stream", [{"raw": {"hex": "00", "base64": ""}}], "stream[0]", "takes an object of length <= 1"),
    ("stream", [{"raw": {"utf8": "a"}}], "stream[0]", "takes a text like hex|base64"),
    ("trigger", [{"relay": "all"}], "trigger[0]", "'relay' belongs in a stream script, this is a trigger script"),
    ("trigger", [{"comment": "a"}], "trigger[0]", "'comment' belongs in a stream script"),
    ("trigger", [{"event": {"data": 1}}], "trigger[0]", "'event' belongs in a run or stream script"),
    ("run", ["drop"], "run[0]", "'drop' belongs in a trigger or stream script"),
    ("stream", [{"crash": "x"}], "stream[0]", "'crash' belongs in a run script"),
    ("stream", ["ordinary"], "stream[0]", "'ordinary' belongs in a run script"),
    ("stream", ["dorp"], "stream[0]", "unknown step 'dorp'; did you mean 'drop'?"),
    ("stream", [{"chunk": 0}], "stream[0]", "'chunk' takes a whole number >= 1, not 0"),
    ("stream", [{"chunk": "utf-8"}], "stream[0]", "a text like utf8|line, not \"utf-8\""),
    ("stream", [{"chunk": 1, "evry": 1}], "stream[0]", "has no 'evry'; did you mean 'every'?"),
    ("stream", [{"buffer": -1}], "stream[0]", "'buffer' takes a whole number >= 1, not -1"),
    ("stream", [{"flush": 1}], "stream[0]", "'flush' takes no argument, not 1"),
    ("stream", [{"drop": "now"}], "stream[0]", "'drop' takes no argument"),
    ("stream", [{"frame": {"newline": "\t"}}], "stream[0]", "'newline' takes a text like"),
    ("stream", [{"frame": {"id": 5}}], "stream[0]", "'id' takes a text or no argument"),
    ("stream", [{"frame": {"ids": None}}], "stream[0]", "did you mean 'id'?"),
    ("stream", [{"frame": {"wrap": "a\nb"}}], "stream[0]", "'wrap' takes one line"),
    ("stream", [{"event": {"id": "a\nb", "data": 1}}], "stream[0]", "'id' takes one line without NUL"),
    ("stream", [{"event": {"data": 1, "retry": "soon"}}], "stream[0]", "'retry' takes a whole number"),
    ("run", [{"event": {"id": "1", "data": 1}}], "run[0]", "'event' has no 'id' (there are 3: data, event, retry)"),
    ("run", [{"event": {"data": "text"}, "pad": 5}], "run[0]", "'event' 'data' takes an object, not"),
    ("run", [{"event": {"data": {}}, "pad": 2**24}], "run[0]", "'pad' takes a whole number <= 8388608"),
    ("run", [{"repeat": 3}], "run[0]", "'repeat' needs 'steps'"),
    ("run", [{"wait": 5}], "run[0]", "'wait' takes a text"),
    ("run", ["wait"], "run[0]", "'wait' takes a text, not null"),
    ("run", [{"wait": "g", "within": -1}], "run[0]", "'within' takes a number"),
    ("run", [{"ordinary": "phase4"}], "run[0]", "takes a text like phase2|phase3|generation"),
    ("run", [{"crash": 5}], "run[0]", "'crash' takes a text"),
    ("run", [{"hang": 5}], "run[0]", "'hang' takes no argument, not 5"),
    ("stream", [{"heartbeat": {"event": "x"}}], "stream[0]", "'heartbeat' needs 'every'"),
    ("stream", [{"relay": "all", "shared": "yes"}], "stream[0]", "'shared' takes true or false"),
    ("run", [{"repeat": 1, "steps": [{"sleep": 1}, {"slep": 1}]}], "run[0].steps[1]", "did you mean 'sleep'?"),
    ("run", [{"repeat": 1000, "steps": [{"repeat": 1001, "steps": []}]}], "run", "nested turns multiply"),
    ("stream", [{"relay": "all"}, {"every": 1}], "stream[1]", "unknown step 'every'"),
    ("stream", [{"open": {"headers": {"Date": "x"}}}], "stream[0]", "the server's own"),
    ("run", [{"fail": {"eror": "x"}}], "run[0]", "did you mean 'error'?"),
    ("run", [{"fail": 3}], "run[0]", "'fail' takes a text or an object, not 3"),
    ("trigger", [{"open": {"status": 202, "body": {}, "headrs": {}}}], "trigger[0]", "did you mean 'headers'?"),
]  # fmt: skip
assert len(MISTAKES) >= 50


@pytest.mark.parametrize(("place", "script", "at", "hint"), MISTAKES)
def test_a_mistake_names_its_place_and_says_what_helps(place, script, at, hint):
    with pytest.raises(Mistake) as mistake:
        parse_script(script, place)
    assert mistake.value.at == at
    assert hint in mistake.value.hint


@pytest.mark.parametrize(("value", "hint"), [
    ("x", "takes an object"), ({}, "needs 'name'"), ({"name": "A"}, "1 to 64 of a-z"),
    ({"name": "a", "steam": []}, "did you mean 'stream'?"), ({"name": "a", "seed": []}, "'seed' takes"),
    ({"name": "a", "doc": 1}, "'doc' takes a text"), ({"name": "a", "run": 1}, "a script is a list"),
    ({"name": "a", "stream": {"cycle": 5}}, "stream.cycle: a script is a list of steps, not 5"),
    ({"name": "a", "stream": {"cycel": []}}, 'stream: a script is a list of steps, not {"cycel": []}'),
    ({"name": "a", "stream": {"cycle": ["drop"]}}, "stream.cycle[0]: a script is a list of steps"),
    ({"name": "a", "stream": [[{"comment": "a"}], ["dorp"]]}, "stream[1][0]: unknown step 'dorp'"),
    ({"name": "a", "trigger": [["reset"], "drop"]}, "trigger[1]: a script is a list of steps"),
    ({"name": "a" * 65}, "1 to 64 of a-z"),
    ({"name": "a", "stream": [["end"] * 3000] * 2}, "stream[1]: more than 5,000 steps"),
])  # fmt: skip
def test_a_scenario_is_checked_whole(value, hint):
    with pytest.raises(Mistake, match=re.escape(hint)):
        parse_scenario(value)


def test_every_verb_is_a_method_where_it_may_stand():
    players = {"run": aura_stream.Performance, "stream": ScriptedDelivery, "trigger": ScriptedDelivery}
    for place, verbs in VERBS.items():
        for name in verbs:
            assert callable(getattr(players[place], name)), (name, place)


@pytest.mark.parametrize("verb", sorted({*VERBS["stream"]} - {"open", "repeat", "relay", "hang", "end", "drop", "reset"}))
async def test_the_head_may_come_behind_a_verb_just_if_that_puts_nothing_out(verb, autojump_clock):
    """A new verb stands in the right table."""
    arguments = {"sleep": 1, "event": {"data": 1}, "heartbeat": "never", "chunk": 5, "buffer": 5, "frame": {}, "flush": None}
    step = {"wait": "gate", "within": 1} if verb == "wait" else {verb: arguments.get(verb, "a")}
    written, _, _ = await played(parse_script([step, "flush"], "stream"))
    try:
        script = parse_script([step, {"open": {"status": 201}}], "stream")
    except Mistake:
        assert written, "it could stand before the head"
    else:
        assert not written and [head["status"] for head in (await played(script))[2]] == [201]


def test_templates_fill_five_names_and_nothing_else():
    player = aura_stream.Player(Time(), aura_stream.Gates(1000), {"{runId}": "r", "{caseId}": "c", "{tenantId}": ""}, "seed")
    player._turn = 7
    assert player.fill("{runId} {caseId} {n} {{n} {other} }}") == "r c 7 {n} {other} }}"
    assert player.fill({"{runId}": ["{tenantId}", 5, None]}) == {"r": ["", 5, None]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", player.fill("{now}"))


@pytest.mark.parametrize("data", [{}, {"a": 1}, {"pad": "not this one", "b": "}"}])
@pytest.mark.parametrize("size", [0, 70_000])
def test_a_padded_event_is_the_event_it_would_be(data, size):
    (step,) = parse_script([{"event": {"event": "big", "data": data}, "pad": size}], "run")
    padded = step.ready or aura_stream.MAKERS["event"](step.argument, **step.modifiers)
    assert json.loads(parsed(padded.numbered(1))[0][2]) == {**data, "pad": "x" * size}


def test_attempts_take_their_turn():
    def played_at(value, turns=5):
        attempts = aura_stream.parse_attempts(value, "stream")
        return [attempts.of(n)[0].argument for n in range(1, turns + 1)]

    a, b, c = ([{"comment": name}] for name in "abc")
    assert played_at(a) == ["a"] * 5
    assert played_at([a, b, c]) == ["a", "b", "c", "c", "c"], "the last repeats"
    assert played_at({"cycle": [a, b]}) == ["a", "b", "a", "b", "a"]


async def test_a_gate_opens_for_one_run_or_for_all_and_for_good(autojump_clock):
    gates, through = aura_stream.Gates(1000), []

    async def at(gate, run_id):
        await gates.wait(gate, run_id)
        through.append((gate, run_id))

    async with trio.open_nursery() as nursery:
        for place in (("go", "1"), ("go", "2"), ("on", "1")):
            nursery.start_soon(at, *place)
        await trio.testing.wait_all_tasks_blocked()
        gates.signal("go", "2")
        await trio.testing.wait_all_tasks_blocked()
        assert through == [("go", "2")]
        gates.signal("go")
        gates.signal("on", "1")
    await at("go", "3")
    assert set(through) == {("go", "1"), ("go", "2"), ("on", "1"), ("go", "3")}
    assert all(gates.signal("g", str(n)) for n in range(gates.most - 3))
    assert not gates.signal("one too many")
    assert gates.signal("go"), "one that is open already is no more"
    gates.open.clear()
    assert gates.signal("one too many")


def test_a_range_is_drawn_from_the_seed():
    def drawn(seed):
        player = aura_stream.Player(Time(), aura_stream.Gates(1000), {}, seed)
        return [player.draw([1, 2]) for _ in range(3)]

    assert drawn("a") == drawn("a") != drawn("b")
    assert all(1 <= seconds <= 2 for seconds in drawn("a"))


async def said_by(analysis, **more):
    """The names and the data of what this analysis says; and, if it fails, its Failure."""
    sending, receiving = trio.open_memory_channel(1000)
    failed = []
    with sending:
        try:
            await analysis(facts(Time(), **more), sending)
        except Failure as failure:
            failed.append(("Failure", {"error": failure.error, "stage": failure.stage}))
    return [(event.name, event.data) async for event in receiving] + failed


async def test_phase2_says_what_the_contract_says(autojump_clock):
    events = await said_by(aura_stream.phase2)
    steps = [data["label"] for name, data in events if name == "step"]
    assert [name for name, _ in events] == (
        ["started", "step", "step", "evidence", "step", "confidence", "step", "step", "proposal", "proposal", "completed"]
    )
    assert steps == ["INPUT_NORM", "EVIDENCE_GATHER", "RULE_SCORING", "LLM_REASONING", "PROPOSALS"]
    assert [item["type"] for item in dict(events)["evidence"]["items"]] == ["CASE", "DOC_HEADER", "OPEN_ITEMS", "LINEAGE"]
    assert dict(events)["confidence"] == {"anomalyScore": 0.5, "patternMatch": 0.7, "ruleCompliance": 0.85, "overall": 0.67}
    assert dict(events)["completed"]["score"] == pytest.approx(0.665)
    assert dict(events)["completed"]["severity"] == "MEDIUM"


@pytest.mark.parametrize(("evidence", "anomaly", "proposals"), [
    ({"amount": 1_000_000}, 0.5, 2), ({"amount": 10**300}, 0.95, 2), ({"amount": 0}, 0.3, 1),
    ({"amount": "5", "totalAmount": 1_500_000}, 0.6, 2), ({"amount": True}, 0.5, 2), ({"amount": -5}, 0.3, 1),
    ({"document": {"header": {"amount": 2_000_000}}}, 0.7, 2), ({"document": []}, 0.5, 2),
])  # fmt: skip
async def test_confidence_and_proposals_follow_the_amount(autojump_clock, evidence, anomaly, proposals):
    events = await said_by(aura_stream.PHASES["phase2"].analysis, body={"evidence": evidence})
    assert dict(events)["confidence"]["anomalyScore"] == anomaly
    assert [name for name, _ in events].count("proposal") == proposals


async def test_evidence_lists_what_the_request_brought_and_at_most_thirty(autojump_clock):
    evidence = {"document": {"header": {"a": "{runId}"}, "items": [1, 2]}, "openItems": [1, 2, 3], "lineage": {"a": 1},
                "partyIds": ["p"], "policies": [1, 2]}  # fmt: skip
    items = dict(await said_by(aura_stream.PHASES["phase2"].analysis, body={"evidence": evidence}))["evidence"]["items"]
    assert [item["type"] for item in items] == (
        ["DOC_HEADER", "DOC_ITEM", "DOC_ITEM", "OPEN_ITEMS", "LINEAGE", "PARTY_IDS", "POLICIES"]
    )
    assert [item["count"] for item in items if "count" in item] == [3, 1, 1, 2]
    assert items[0]["content"] == {"a": "{runId}"}, "braces from outside are no template"
    many = dict(await said_by(aura_stream.PHASES["phase2"].analysis, body={"evidence": {"document": {"items": [1] * 99}}}))
    assert len(many["evidence"]["items"]) == 30


@pytest.mark.parametrize(("fail", "expected"), [
    (None, [20, 45, 45, 70, 70, 80, 95]), ("rag", [20]), ("llm", [20, 45, 45, 70]),
])  # fmt: skip
async def test_phase3_says_what_the_contract_says(autojump_clock, fail, expected):
    events = await said_by(aura_stream.phase3, phase="phase3", test_fail=fail)
    assert [data["percent"] for _, data in events if "percent" in data] == expected
    if fail:
        error = f"Simulated {fail.upper()} failure (X-Aura-Test-Fail: {fail})"
        assert events[-1] == ("Failure", {"error": error, "stage": fail})


# ═══ 5  Journal ═════════════════════════════════════════════════════════════════════════════════


def test_a_value_from_outside_cannot_forge_a_log_line():
    assert safe("a\nINFO forged\u2028\x1b[2J") == "a\\nINFO forged\\u2028\\x1b[2J"
    assert len(safe("x" * 1000)) == 200
    assert safe("한글") == "한글"


def test_no_legal_request_holds_everybody_up():
    """The longest script, and a name of a megabyte: 100 ms by hand, five times the slack here."""
    began = time.perf_counter()
    parse_script([{"event": {"data": 1}}] * aura_stream.MOST_STEPS, "run")
    with pytest.raises(Mistake) as mistake:
        parse_script([{"x" * 10**6: 1}], "run")
    assert len(mistake.value.hint) < 1000
    assert time.perf_counter() - began < 0.5


async def test_the_first_ending_counts():
    entry = Entry(method="GET", path="/", client="c", request_id="i")
    entry.finish(Ending("server", "drop", "on purpose"))
    entry.finish(Ending("client", "disconnect", "seemed to leave"))
    assert entry.end[:3] == ("server", "drop", "on purpose")


def an_entry(journal, run_id="r", *, finished=True, **more):
    entry = Entry(method="GET", path="/", client="c", request_id="i", kind="stream", run_id=run_id, **more)
    journal.open(entry)
    if finished:
        entry.finish(Ending("server", "end", "over"))
        journal.close(entry)
    return entry


async def test_the_journal_is_bounded_and_the_oldest_entry_goes():
    journal = aura_stream.Journal()
    for number in range(1005):
        an_entry(journal, str(number))
    found = journal.find({})
    assert (len(found), found[0].seq, found[-1].seq) == (1000, 6, 1005)
    assert [one.run_id for one in journal.find({"run_id": "77"})] == ["77"]
    assert len(journal.find({}, since=1000)) == 5
    journal.forget()
    assert journal.find({}) == []


async def test_names_that_somebody_makes_up_are_counted_as_one():
    journal = aura_stream.Journal()
    entry = an_entry(journal, finished=False)
    for start in range(0, 10_000, 100):
        entry.carried(1, 1, dict.fromkeys(["step", *(f"made-up-{n}" for n in range(start, start + 100))], 1), None)
        assert len(journal.tally) <= 102
    assert (journal.tally["step"], journal.tally.total(), entry.events) == (100, 10_100, 10_100)


async def test_waiting_for_entries_counts_finished_ones_and_takes_the_oldest(autojump_clock):
    journal = aura_stream.Journal()
    first, open_one = an_entry(journal), an_entry(journal, finished=False)
    an_entry(journal, "other")

    async def later():
        await trio.sleep(3)
        open_one.finish(Ending("client", "disconnect", "left"))
        journal.close(open_one)
        an_entry(journal)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        start = trio.current_time()
        assert await journal.wait(2, {"run_id": "r"}, since=0, within=5) == [first, open_one]
        assert trio.current_time() - start == pytest.approx(3)
        assert await journal.wait(9, {"run_id": "r"}, since=0, within=5) == journal.find({"run_id": "r"})
        assert trio.current_time() - start == pytest.approx(8), "it waits no longer than it was told"


@pytest.mark.parametrize(("end", "said"), [
    (("server", "drop", "by script"), "the server dropped the connection on purpose (step 1 of x) after 2 events, 108 bytes"),
    (("server", "end", "by script"), "the server ended the answer properly (step 1 of x) after 2 events, 108 bytes"),
    (("client", "disconnect", "left"), "the client closed the connection (step 1 of x) after 2 events, 108 bytes"),
    (("client", "stalled", "read nothing for 5 s"),
     "the client stopped reading and was cut off (step 1 of x) after 2 events, 108 bytes; read nothing for 5 s"),
    (("shutdown", "cancelled", "the server had to go"),
     "the stopping server cut the connection (step 1 of x) after 2 events, 108 bytes; the server had to go"),
    (("admin", "reset", "asked"), "an operator reset the connection (step 1 of x) after 2 events, 108 bytes"),
])  # fmt: skip
async def test_an_entry_says_in_one_sentence_who_closed_first(end, said):
    entry = Entry(method="GET", path="/", client="c", request_id="i", scenario="x", step=1, events=2, bytes=108)
    entry.finish(Ending(*end))
    assert entry.said == said
    assert "step" not in Entry(method="GET", path="/", client="c", request_id="i").said


# ═══ 6  Runs ════════════════════════════════════════════════════════════════════════════════════


@contextlib.asynccontextmanager
async def hub_for(**fields):
    async with trio.open_nursery() as nursery:
        yield BoundedHub(Settings(**fields), nursery)
        nursery.cancel_scope.cancel()


def scenario(*steps, **more):
    return parse_scenario({"name": "test", "run": list(steps), **more})


def said(run):
    """What is in a run's log: names and data."""
    data, place = b"", run.log.first - 1
    while place < run.log.last:
        piece, place = run.log.read(place)
        data += piece
    return [(name, json.loads(text)) for _, name, text in parsed(data)]


async def ended(run):
    while not run.ended:
        await run.log.news()
    return run


def played_by(run):
    return aura_stream.scripted(run.scenario, aura_stream.Gates(1000))


async def test_every_event_passes_the_channel(autojump_clock):
    run = aura_stream.ScriptedRun(facts(Time()), scenario(*says("a", "b"), {"fail": "no"}), types.SimpleNamespace(settings=Settings(), bound=lambda run: None))
    await run.perform(played_by(run))
    assert run.log.last == 0, "nobody takes events out of the channel, so the log stands still"
    await run.transcribe()
    assert [name for name, _ in said(run)] == ["a", "b"]


async def test_a_full_channel_makes_the_analysis_wait():
    run = aura_stream.ScriptedRun(facts(Time()), scenario({"repeat": 1000, "steps": says("a")}), types.SimpleNamespace(settings=Settings(), bound=lambda run: None))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.perform, played_by(run))
        await trio.testing.wait_all_tasks_blocked()
        assert run.receiving.statistics().current_buffer_used == aura_stream.CHANNEL
        assert not run.returned
        await run.transcribe()
    assert run.log.last == 1000


async def test_viewers_are_told_once_for_a_whole_batch():
    run = aura_stream.ScriptedRun(facts(Time()), scenario({"repeat": 200, "steps": says("a")[:1]}), types.SimpleNamespace(settings=Settings(), bound=lambda run: None))
    announced = []
    run.log.announce = lambda: announced.append(run.log.last)
    await run.conduct(played_by(run), lambda run: None)
    assert announced[-1] == 200
    assert len(announced) < 20


FAILED2 = {"stage": "pipeline", "code": "ANALYSIS_PIPELINE", "retryable": True}


@pytest.mark.parametrize(("phase", "data"), [
    ("phase2", {"error": "no luck", **FAILED2}),
    ("phase3", {"runId": "r1", "status": "failed", "error": {"message": "no luck", "stage": "pipeline"}, "retryable": True}),
    ("generation", {"type": "failed", "jobId": "r1",
                    "error": {"code": "ANALYSIS_PIPELINE", "message": "no luck", "retryable": True}}),
])  # fmt: skip
async def test_a_failure_is_the_last_event_in_the_shape_of_its_phase(phase, data, heard):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time(), phase=phase), scenario(*says("a"), {"fail": "no luck"})))
        assert said(run) == [("a", {"n": "a"}), ("failed", data)]
        assert run.status == "failed"
    line = heard.wait_for("analysis failed run_id=r1 case_id=85116 stage=pipeline")
    assert "\n  Traceback (most recent call last):\n" in line and line.endswith("no luck")


FORGED = "2026-01-01 00:00:00,000 - aura_stream - INFO - forged"
FORGING = f"no\n{FORGED}\r{FORGED}\u2028{FORGED}\x1b[2J\x85{FORGED}"


@pytest.mark.parametrize("step", [{"crash": FORGING}, {"fail": FORGING}, {"fail": {"error": "no", "stage": FORGING}}])
async def test_no_text_of_a_failure_can_forge_a_line_of_the_log_whoever_formats_it(step):
    """Embedded, the host's formatter knows nothing of us: each line but the first is indented before it gets there."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("aura_stream").addHandler(handler)
    try:
        async with hub_for() as hub:
            await ended(hub.start(facts(Time(), FORGING), scenario(step)))
    finally:
        logging.getLogger("aura_stream").removeHandler(handler)
    first, *rest = written.getvalue().splitlines()
    assert first.startswith("analysis failed run_id=no\\n2026-01-01") and len(rest) > 3
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


async def test_a_failure_that_cannot_be_written_out_or_only_at_length_does_no_harm(heard):
    async def analysis(its_facts, sending):
        error = SyntaxError("odd") if its_facts.run_id == "odd" else ValueError("x\n" * 1_000_000)
        if its_facts.run_id == "odd":
            error.lineno, error.text = 1, object()
        raise error

    async with hub_for() as hub:
        for run_id in ("odd", "long"):
            run = await ended(hub.start(facts(Time(), run_id), scenario(), analysis))
            assert run.status == "failed"
    assert max(map(len, heard.all().split("ERROR"))) < 50_000


async def test_an_analysis_that_crashes_takes_nothing_with_it(autojump_clock):
    request = httpx.Request("GET", "http://llm.local/v1")
    upstream = httpx.HTTPStatusError("bad gateway", request=request, response=httpx.Response(502, request=request))
    crashes = [ValueError("row 5"), upstream, ExceptionGroup("many", [KeyError("x")]), SystemExit(3), MemoryError()]
    expected = ["ValueError: row 5", "HTTPStatusError: bad gateway (url http://llm.local/v1) (status 502)",
                "KeyError: 'x'", "SystemExit: 3", "MemoryError: "]  # fmt: skip

    async def analysis(its_facts, sending):
        await sending.send(Event("started", {}))
        raise crashes[int(its_facts.run_id)]

    async with hub_for() as hub:
        runs = [hub.start(facts(Time(), str(n)), scenario(), analysis) for n in range(len(crashes))]
        for run, text in zip(runs, expected, strict=True):
            await ended(run)
            assert [name for name, _ in said(run)] == ["started", "failed"]
            assert said(run)[-1][1]["error"] == text


class Nameless(Exception):
    def __str__(self):
        raise ValueError("not even this")


class Lying(Exception):
    @property
    def request(self):
        raise KeyError("no request either")


class Own(BaseException):
    pass


async def closes_and_raises(its_facts, sending):
    await sending.aclose()
    raise ValueError("after the close")


async def sends_a_dict(its_facts, sending):
    await sending.send({"a": 1})
    await trio.sleep(1000)


async def leaks_a_cancelled(its_facts, sending):
    with trio.move_on_after(0.05):
        result = await outcome.acapture(trio.sleep, 5)
    result.unwrap()


class HalfMade(Failure):
    def __init__(self, text):
        self.text = text


class Unencoded(Event):
    def __post_init__(self):
        pass


def sending_one(thing):
    async def analysis(its_facts, sending):
        await sending.send(thing)
        await trio.sleep(1000)

    return analysis


def raising(error):
    async def analysis(its_facts, sending):
        raise error

    return analysis


@pytest.mark.parametrize(("analysis", "text"), [
    (closes_and_raises, "ValueError: after the close"), (sends_a_dict, "the analysis sent dict, where an Event belongs"),
    (raising(Nameless()), "Nameless"), (raising(Lying("x")), "Lying: x"), (raising(Own("x")), "Own: x"),
    (leaks_a_cancelled, "Cancelled: "), (raising(HalfMade("x")), "HalfMade: "),
    (sending_one(Unencoded("a", 1)), "the analysis sent Unencoded, where an Event belongs"),
    (sending_one(Event.__new__(Event)), "the analysis sent Event, where an Event belongs"),
    (raising(GeneratorExit()), "GeneratorExit: "), (raising(Failure({1: object})), "{1: <class 'object'>}"),
])  # fmt: skip
async def test_the_worst_analysis_ends_only_its_own_run(analysis, text, autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(), analysis))
        assert (run.status, said(run)[-1][0]) == ("failed", "failed")
        assert said(run)[-1][1]["error"].startswith(text)


async def test_a_run_goes_on_until_its_analysis_returns_even_if_that_closes_its_channel(autojump_clock):
    async def analysis(its_facts, sending):
        await sending.send(Event("a", {}))
        await sending.aclose()
        await trio.sleep(50)

    async with hub_for() as hub:
        run = hub.start(facts(Time()), scenario(), analysis)
        await trio.sleep(49)
        assert run.status == "running"
        run.cancel(Failure("enough", stage="cancelled"))
        await ended(run)
        assert [name for name, _ in said(run)] == ["a", "failed"]


async def test_a_cancel_that_is_swallowed_is_still_a_cancel(autojump_clock):
    async def analysis(its_facts, sending):
        with contextlib.suppress(trio.Cancelled):
            await trio.sleep(100)

    async with hub_for(idle_timeout=50) as hub:
        cancelled, silent = (hub.start(facts(Time(), name), scenario(), analysis) for name in ("1", "2"))
        await trio.sleep(1)
        cancelled.cancel(Failure("enough", stage="cancelled"))
        assert (await ended(cancelled)).status == "cancelled"
        assert said(cancelled)[-1][1]["stage"] == "cancelled"
        assert (await ended(silent)).status == "failed"
        assert said(silent)[-1][1]["stage"] == "timeout"


FAIL, SLEEP = {"fail": "late"}, {"sleep": 60}


@pytest.mark.parametrize(("steps", "cancel", "names", "status"), [
    ([*says("completed"), FAIL], False, ["completed"], "completed"), ([*says("failed"), FAIL], False, ["failed"], "failed"),
    ([*says("failed"), SLEEP], True, ["failed"], "failed"), ([*says("completed"), SLEEP], True, ["completed"], "completed"),
    ([*says("completed", "note"), SLEEP], True, ["completed", "note", "failed"], "cancelled"),
    ([*says("completed", "note")], False, ["completed", "note"], "completed"),
])  # fmt: skip
async def test_one_terminal_event_is_the_last_and_the_status_agrees(steps, cancel, names, status, autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "s", "run": steps})
        await trio.testing.wait_all_tasks_blocked()
        run = hub.find("r")
        if cancel:
            answer = await client.delete("/aura/cases/1/analysis-runs/r", headers=BEARER)
            expected = (202, "CANCELLED") if status == "cancelled" else (200, status)
            assert (answer.status_code, (await answer.get_json())["status"]) == expected
        await ended(run)
        assert ([name for name, _ in said(run)], run.status) == (names, status)


async def test_nothing_follows_the_last_word_whoever_goes_on_sending():
    async def chatter(sending):
        with sending, contextlib.suppress(trio.BrokenResourceError):
            while True:
                await sending.send(Event("chatter", {}))

    async with hub_for() as hub, trio.open_nursery() as nursery:

        async def analysis(its_facts, sending):
            for _ in range(3):
                nursery.start_soon(chatter, sending.clone())
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            raise ValueError("enough")

        run = await ended(hub.start(facts(Time()), scenario(), analysis))
        assert run.log.last_name == "failed"
        assert [name for name, _ in said(run)].count("failed") == 1


async def test_an_ended_run_does_not_keep_its_request(autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time(), body={"evidence": {"amount": 1}}), Scenario("ok")))
        assert run.info.body == {}
        assert run.log.last == 10


async def naps(its_facts, sending):
    await asyncio.sleep(1)


async def naps_briefly(its_facts, sending):
    await asyncio.sleep(0)


async def waits_for_a_queue(its_facts, sending):
    await asyncio.Queue().get()


def is_not_async(its_facts, sending):
    return None


def hands_on_a_nap(its_facts, sending):
    return asyncio.sleep(1)


async def yields(its_facts, sending):
    yield "an event"


@pytest.mark.parametrize(("analysis", "text"), [
    (naps, "RuntimeError: no running event loop"), (naps_briefly, "TypeError: trio.run received unrecognized yield message"),
    (waits_for_a_queue, "AttributeError: "), (is_not_async, "TypeError: "), (hands_on_a_nap, "RuntimeError: no running event loop"),
    (yields, "TypeError: "),
])  # fmt: skip
async def test_an_analysis_that_needs_asyncio_fails_with_a_sentence_that_says_trio(analysis, text, autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(), aura_stream.scripted(scenario("ordinary"), hub.gates, analysis)))
        error = said(run)[-1][1]["error"]
        assert run.status == "failed" and error.startswith(text)
        assert error.endswith("an analysis runs on Trio: `async def`, awaiting Trio or anyio, not asyncio")


async def test_an_analysis_that_fails_in_its_own_nursery_is_still_only_its_run(autojump_clock):
    async def child():
        raise ValueError("child")

    async def analysis(its_facts, sending):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            await trio.sleep_forever()

    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(), analysis))
        assert said(run)[-1][1]["error"] == "ValueError: child"


async def test_a_cancelled_run_says_why_and_loses_nothing_it_had_said(autojump_clock):
    async with hub_for() as hub:
        run = hub.start(facts(Time()), scenario(*says("a", "b"), {"sleep": 1000}))
        await trio.testing.wait_all_tasks_blocked()
        run.cancel(Failure("because", stage="cancelled", retryable=False))
        await ended(run)
        assert [name for name, _ in said(run)] == ["a", "b", "failed"]
        assert said(run)[-1][1] == {"error": "because", "stage": "cancelled", "code": "ANALYSIS_CANCELLED", "retryable": False}
        assert run.status == "cancelled"
        run.cancel(Failure("again", stage="shutdown"))
        assert run.status == "cancelled"


async def test_the_reason_of_a_cancel_reaches_the_analysis(autojump_clock):
    reasons = []

    async def analysis(its_facts, sending):
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            reasons.append(cancelled.reason)
            raise

    async with hub_for() as hub:
        run = hub.start(facts(Time()), scenario(), analysis)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel(Failure("the tea is ready", stage="cancelled"))
        await ended(run)
    assert reasons == ["the tea is ready"]


async def test_a_cancel_that_comes_too_late_changes_nothing(autojump_clock):
    async def analysis(its_facts, sending):
        await sending.send(Event("completed", {}))
        run.cancel(Failure("too late", stage="cancelled"))

    async with hub_for() as hub:
        run = hub.start(facts(Time()), scenario(), analysis)
        await ended(run)
        assert [name for name, _ in said(run)] == ["completed"]
        assert run.status == "completed"


async def test_a_script_that_never_waits_starves_nobody():
    async with hub_for() as hub:
        nothing = {"repeat": 0, "steps": ["hang"]}
        run = hub.start(facts(Time()), scenario(*says("a"), {"repeat": 1000, "steps": [{"repeat": 1000, "steps": [nothing]}]}))
        while run.log.last == 0:
            await trio.lowlevel.checkpoint()
        run.cancel(Failure("enough", stage="cancelled"))
        assert (await ended(run)).status == "cancelled"


async def test_a_silent_run_fails_truthfully_at_its_idle_timeout(autojump_clock, heard):
    async with hub_for(idle_timeout=300) as hub:
        start = trio.current_time()
        run = await ended(hub.start(facts(Time()), scenario(*says("a"), {"sleep": 299}, *says("b"), {"sleep": 9999})))
        assert trio.current_time() - start == pytest.approx(599)
        assert [name for name, _ in said(run)] == ["a", "b", "failed"]
        assert said(run)[-1][1]["stage"] == "timeout"
        assert run.status == "failed"
    heard.wait_for("WARNING analysis_run_stream: get_event returned None run_id=r1 (no event for 300s)")
    heard.wait_for("WARNING EventSource connection timeout")


async def test_a_sending_end_that_somebody_kept_does_not_keep_the_run(autojump_clock):
    kept = []

    async def analysis(its_facts, sending):
        kept.append(sending.clone())
        await sending.send(Event("completed", {}))

    async with hub_for(idle_timeout=5) as hub:
        run = await ended(hub.start(facts(Time()), scenario(), analysis))
        assert (run.status, [name for name, _ in said(run)]) == ("completed", ["completed"])
        kept[0].close()


async def test_the_log_keeps_to_its_limits_and_says_what_is_gone(autojump_clock, heard):
    async with hub_for(max_run_events=10) as hub:
        run = await ended(hub.start(facts(Time()), scenario({"repeat": 25, "steps": says("a")[:1]})))
        assert (run.log.first, run.log.last) == (16, 25)
        data, entry, _ = await played(ORDINARY, run=run)
        events = parsed(data)
        assert events[0] == ("15", "gap", '{"from": 1, "to": 15}')
        assert [int(number) for number, _, _ in events[1:]] == list(range(16, 26))
        resumed, _, _ = await played(ORDINARY, run=run, after=15)
        assert "gap" not in [name for _, name, _ in parsed(resumed)]
    assert heard.all().count("run_store: log full") == 1


async def test_what_is_forgotten_while_a_gap_is_being_said_is_a_gap_too(autojump_clock):
    async with hub_for(max_run_events=3) as hub:
        run = await ended(hub.start(facts(Time()), scenario({"repeat": 9, "steps": says("a")[:1]})))
        written = []

        async def send(message):
            written.append(message.get("body", b""))
            if b"event: gap" in written[-1] and run.log.last < 20:
                for _ in range(6):
                    run.log.append(Event("b", "later"))
                run.log.trim(3, 10**9)

        await ScriptedDelivery(ORDINARY, Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream"), hub, run).deliver(send)
    assert [(int(id), name) for id, name, _ in parsed(b"".join(written))] == [
        (6, "gap"), (12, "gap"), (18, "gap"), (19, "b"), (20, "b"), (21, "b")]  # fmt: skip


def test_a_log_trims_by_bytes_but_spares_its_newest_event():
    log = BoundedLog(ids=True)
    for size in (100, 100, 100):
        log.append(Event("", "x" * size))
    assert not log.trim(events=10, size=log.held)
    assert log.trim(events=10, size=log.held - 1)
    assert (log.first, log.last) == (2, 3)
    assert log.trim(events=10, size=1)
    assert (log.first, log.last) == (3, 3)
    assert log.read(2)[0].startswith(b"data: xxx")


def test_of_a_full_log_a_big_newest_event_goes_too_and_the_gap_says_so():
    log = BoundedLog(ids=True)
    log.append(Event("big", "x" * 100_000))
    assert log.trim(events=10, size=50_000) and (log.held, log.last, log.last_name) == (0, 1, "big")
    assert parsed(log.read(0)[0]) == [("1", "gap", '{"from": 1, "to": 1}')] and log.read(1) == (b"", 1)
    log.append(Event("completed", {}))
    assert parsed(log.read(1)[0]) == [("2", "completed", "{}")]


def test_a_piece_is_64_kib_or_one_event():
    log = BoundedLog(ids=True)
    for size in (60_000, 6_000, 200_000, 10):
        log.append(Event("", "x" * size))
    places = [0]
    while places[-1] < 4:
        places.append(log.read(places[-1])[1])
    assert places == [0, 1, 2, 3, 4]
    assert log.read(4) == (b"", 4)
    assert log.read(0, most=1)[1] == 1


def test_a_big_event_is_one_object_for_the_log_and_all_its_viewers():
    log = BoundedLog(ids=True)
    log.append(Event("big", "x" * 100_000))
    log.append(Event("small", "x"))
    assert log.read(0)[0] is log.read(0)[0]


async def test_viewers_at_one_place_get_the_same_bytes_and_no_piece_outlives_them(autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says("a", "b", "c"))))
        piece = run.log.shared(1)
        assert run.log.shared(1) is piece and (piece.last, piece.tally) == (3, {"b": 1, "c": 1})
        assert piece.chunk == b"%x\r\n%b\r\n" % (piece.size, run.log.read(1)[0]) and run.log.shared(2) is not piece
        await pieces([{"relay": "all"}], run=run, hub=hub)
        assert run.log.ready is None, "the last viewer has left"
        run.log.shared(0)
        run.log.trim(1, 10**6)
        assert run.log.ready is None and run.log.read(2)[1] == 3


async def test_a_write_has_a_limit(autojump_clock, monkeypatch):
    monkeypatch.setattr(aura_stream, "WRITE", 100)
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says("a", "b", "c", "d", "e", "f"))))
        written, _ = await pieces([{"comment": "c"}, {"relay": "all"}], run=run, hub=hub)
        sizes = [len(data) for _, data in written]
        assert max(sizes) <= 100 and len(sizes) < 1 + 6, "several in a piece, no piece beyond the limit"


async def test_what_is_bound_counts_as_what_logs_do(autojump_clock):
    own = {"name": "own", "run": [{"event": {"event": "e", "data": ["🙂" * 5] * 4_000}}]}
    async with in_memory(max_log_bytes=5_000_000) as (client, hub, _, _):
        statuses = [(await client.post("/__aura/next", json={"scenario": own})).status_code for _ in range(12)]
        assert set(statuses) == {200, 409} and statuses == sorted(statuses), "and the 409 comes before the limit is passed"
        assert 3_000_000 < hub.held <= 5_000_000
        full = await client.post("/__aura/next", json={"scenario": own})
        assert "the limit is 5000000 bytes" in (await full.get_json())["error"]
        await triggered(client, runId="one")
        assert hub.held < 5_000_000, "a trigger uses one up"
        await control(client, "POST", "reset")
        assert hub.held == 0


async def test_what_is_held_is_weighed_with_its_emoji(autojump_clock):
    """One emoji makes a megabyte four."""
    async with in_memory(max_log_bytes=30_000_000) as (client, hub, _, _):
        asked = {"projectId": "p", "description": "a" * 1_000_000 + "🙂"}
        statuses = [(await client.post("/api/v1/generations", json=asked)).status_code for _ in range(10)]
        assert statuses == [201] * 8 + [503] * 2
        assert max(run.log.held for run in hub.seen_by(None)) < 10_000, "and is not said over and over again"


def test_a_script_holds_no_pads_before_they_are_due():
    source = {"name": "pads", "stream": [{"event": {"data": {}}, "pad": 65_536}] * 1500}
    tracemalloc.start()
    own = parse_scenario(source)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * own.weight, "58 KB of JSON held 95 MB"


async def test_ids_of_any_length_are_remembered_at_no_cost(autojump_clock):
    async with in_memory(max_journal=5) as (client, _, _, _):

        async def viewed(number):
            path = f"/aura/analysis-runs/{'x' * 15_000}{number}/stream?scenario=refuse-3-then-ok"
            return [(await client.get(path, headers=BEARER)).headers["X-Aura-Attempt"] for _ in range(2)]

        assert await viewed("warm") == ["1", "2"]
        tracemalloc.start()
        for number in range(100):
            assert await viewed(number) == ["1", "2"], "each has its own count"
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert held < 700_000, "not a hundred ids of 15 KB"


async def test_what_requests_hold_counts_as_what_logs_do(autojump_clock):
    """A megabyte of `[[],[],…]` is twenty of Python: it counts while its run keeps it."""
    heavy = {"evidence": {"items": [[]] * 30_000}}
    async with in_memory(max_log_bytes=8_000_000) as (client, hub, _, _):
        for number in range(6):
            await triggered(client, runId=f"e{number}", **heavy)
            await ended(hub.find(f"e{number}"))
        assert len(hub.seen_by(None)) == 6, "of an ended run only the log is left"
        own = {"name": "own", "run": [{"event": {"event": "e", "data": [[]] * 4_000}}]}
        for number in range(6):
            await triggered(client, runId=f"s{number}", scenario=own, **heavy)
            await ended(hub.find(f"s{number}"))
        left = [run.info.run_id for run in hub.seen_by(None)]
        assert left == [f"s{number}" for number in range(6)][-len(left) :] and 1 < len(left) < 6, "a scenario of its own stays, and counts"
        for number in range(40):
            steps = json.dumps({"name": "own", "run": ["hang"], "stream": ["end"] * 2500})
            await triggered(client, runId=f"h{number}", headers={**BEARER, "X-Aura-Scenario": steps})
            hub.find(f"h{number}").cancel(Failure("enough"))
            await ended(hub.find(f"h{number}"))
        assert 15 < len(hub.seen_by(None)) < 35, "one in a header, too"
        await control(client, "POST", "reset")
        assert hub._held == 0
        for number in range(4):
            answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": f"l{number}", "scenario": "silent", **heavy})
            assert answer.status_code == (202 if number < 2 else 503)
        assert (await answer.get_json())["error"] == "the live runs hold too much, the limit is 8000000 bytes"
        await client.delete("/aura/cases/1/analysis-runs/l0", headers=BEARER)
        await ended(hub.find("l0"))
        assert (await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": "l4"})).status_code == 202


async def test_all_logs_together_have_a_limit(autojump_clock):
    big = {"repeat": 10, "steps": [{"event": {"data": "x" * 1000}}]}
    async with hub_for(max_log_bytes=25_000) as hub:
        for number in range(4):
            await ended(hub.start(facts(Time(), str(number)), scenario(big)))
        assert [hub.find(str(number)) is None for number in range(4)] == [True, True, False, False]
        assert hub._held == sum(hub.find(str(number)).log.held for number in (2, 3))
        live = hub.start(facts(Time(), "live"), scenario({"repeat": 100, "steps": big["steps"]}, {"sleep": 1}))
        await trio.testing.wait_all_tasks_blocked()
        assert hub._held <= 25_000
        assert live.log.first > 1


async def test_the_first_to_end_is_the_first_to_be_forgotten(autojump_clock, heard):
    async with hub_for(max_ended_runs=2) as hub:
        for number in range(3):
            await ended(hub.start(facts(Time(), str(number)), scenario()))
        assert hub.find("0") is None
        assert hub.was_here("0", tenant=None)
        assert hub.find("1") is not None
    heard.wait_for("run_store: queue removed run_id=0")


async def test_a_forgotten_run_still_counts_its_viewers(autojump_clock):
    slow = [{"relay": "all", "every": 100}]
    async with hub_for(retention=10) as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says("a", "b", "c"))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: played(parse_script(slow, "stream"), run=run, hub=hub))
            await trio.sleep(50)
            assert hub.find("r1") is None
            assert hub.streams == 1
        assert hub.streams == 0


async def test_an_ended_run_is_kept_for_its_retention(autojump_clock):
    async with hub_for(retention=3600) as hub:
        await ended(hub.start(facts(Time()), scenario()))
        await trio.sleep(3599)
        assert hub.find("r1") is not None
        await trio.sleep(2)
        assert hub.find("r1") is None
        assert hub._held == 0


async def test_at_a_gate_the_idle_time_out_stands_still_and_then_goes_on(autojump_clock):
    steps = [{"sleep": 200}, {"wait": "go"}, {"sleep": 99}, *says("a"), {"sleep": 200}, {"wait": "go"}, {"sleep": 101}]
    async with hub_for(idle_timeout=300) as hub:
        run = hub.start(facts(hub.clock), scenario(*steps))
        await trio.sleep(10_000)
        assert not run.ended, "300 s are long over, but it waits at a gate"
        hub.gates.signal("go", "r1")
        await trio.sleep(100)
        assert [name for name, _ in said(run)] == ["a"], "99 of the remaining 100 s"
        start = trio.current_time()
        await ended(run)
        assert trio.current_time() - start == pytest.approx(298, abs=2)
        assert said(run)[-1][1]["stage"] == "timeout"


async def test_a_gate_with_a_limit_is_left_without_a_signal(autojump_clock):
    async with hub_for() as hub:
        start = trio.current_time()
        await ended(hub.start(facts(hub.clock), scenario({"wait": "never", "within": 40}, *says("a"))))
        assert trio.current_time() - start == pytest.approx(40)


async def test_a_crash_becomes_failed_and_names_what_happened(autojump_clock, heard):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(hub.clock), scenario({"crash": "row 7 of {caseId}"})))
    assert said(run)[-1][1]["error"] == "RuntimeError: row 7 of 85116"
    assert heard.wait_for("analysis failed").endswith("\n  RuntimeError: row 7 of 85116")


async def test_a_reset_forgets_all_runs_and_an_id_is_new_again(autojump_clock):
    async with hub_for() as hub:
        over = await ended(hub.start(facts(hub.clock, "over"), scenario(*says("a"))))
        live = hub.start(facts(hub.clock, "live", test_id="t"), scenario(*says("a"), {"sleep": 1000}))
        await trio.testing.wait_all_tasks_blocked()
        hub.reset(Failure("reset", stage="cancelled"), "t")
        assert hub.find("live") is None and hub.find("over") is over
        again = hub.start(facts(hub.clock, "live"), scenario(*says("b"), {"sleep": 1000}))
        await ended(live)
        assert live.status == "cancelled" and not again.ended and hub.find("live") is again
        hub.reset(Failure("reset", stage="cancelled"))
        assert (hub.find("over"), hub.find("live"), hub.live, hub._held) == (None, None, 0, 0)
        await ended(again)
        assert (hub.live, hub._held, len(hub._ended)) == (0, 0, 0), "what ended late is not counted back in"


async def test_big_events_are_not_on_their_way_all_at_once():
    """Each takes its time to make, and who has taken a millisecond lets the others have their turn."""
    big = {"event": {"event": "big", "data": {"n": "{n}"}}, "pad": 5_000_000}
    run = aura_stream.ScriptedRun(facts(Time()), scenario({"repeat": 12, "steps": [big]}), types.SimpleNamespace(settings=Settings(), bound=lambda run: None))
    batches = [0]

    def look(run):
        batches.append(run.log.last)
        run.log.trim(10, 16 * 2**20)

    run.hub.bound = look
    await run.conduct(played_by(run), lambda run: None)
    assert run.log.last == 12 and run.log.held <= 16 * 2**20
    assert max(later - sooner for sooner, later in zip(batches, batches[1:], strict=False)) <= 2


# ═══ 7  Deliveries ══════════════════════════════════════════════════════════════════════════════


async def test_the_ordinary_stream_is_its_script(autojump_clock):
    async with hub_for() as hub:
        run = hub.start(facts(Time()), Scenario("ok"))
        data, entry, heads = await played(ORDINARY, run=run)
    assert re.match(rb': connected\n\nevent: started\ndata: {"runId": "r1".*}\nid: 1\n\nevent: step\n', data)
    assert data.endswith(b"data: [DONE]\n\n")
    assert (entry.bytes, entry.events, entry.last_id_sent) == (len(data), 11, 11)
    assert entry.end == ("server", "end", "the script ended", 3)
    assert heads[0]["status"] == 200
    assert heads[0]["headers"][:4] == [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache, no-store, no-transform"),
        (b"connection", b"keep-alive"), (b"x-accel-buffering", b"no"),
    ]  # fmt: skip


async def test_a_heartbeat_comes_after_every_quiet_interval_and_only_then(autojump_clock):
    async with hub_for() as hub:
        steps = [{"sleep": 95}, *says("a"), {"sleep": 29}, *says("b"), {"sleep": 31}, *says("c")]
        run = hub.start(facts(Time()), scenario(*steps))
        data, entry, _ = await played(ORDINARY, run=run)
    assert data.split(b"event: a")[0] == b": connected\n\n" + 3 * b": heartbeat\n\n"
    between = data.split(b"id: 2")[1].split(b"id: 3")[0]
    assert data.split(b"id: 1")[1].split(b"id: 2")[0].count(b"heartbeat") == 0
    assert between.count(b": heartbeat") == 1
    assert entry.heartbeats == 4


@pytest.mark.parametrize(("settings", "first"), [(Settings(heartbeat=0), []), (Settings(), [{"open": {"status": 204}}])])
async def test_where_nothing_can_or_may_beat_nothing_spins(settings, first, autojump_clock):
    script = parse_script([*first, "heartbeat", {"sleep": 10_000}, {"comment": "over"}], "stream")
    data, entry, _ = await played(script, settings=settings)
    assert data == (b": over\n\n" if not first else b"")
    assert entry.heartbeats == 0


async def taken(said, more=True):
    """What a connection does with the bytes of a delivery, where a test does not care."""
    await trio.lowlevel.checkpoint()


async def test_a_heartbeat_that_cannot_be_written_is_logged(autojump_clock, heard):
    async with hub_for() as hub:
        run = hub.start(facts(hub.clock), scenario({"sleep": 40}))
        entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1")
        gone = types.SimpleNamespace(lost=True, unsent=True, put=taken)
        delivery = ScriptedDelivery(ORDINARY, entry, hub, run, connection=gone)
        with trio.move_on_after(100):  # who has lost its viewer waits for its request to be cancelled
            await delivery.deliver(lambda message: trio.lowlevel.checkpoint())
    heard.wait_for("WARNING Failed to send SSE heartbeat run_id=r1", within=0)


async def test_script_time_drives_heartbeats_and_idle_timeouts(autojump_clock):
    script_time = Time()
    async with hub_for() as hub:
        run = hub.start(facts(script_time), scenario({"sleep": 10**6}))
        async with trio.open_nursery() as nursery:
            start = trio.current_time()
            nursery.start_soon(played, ORDINARY)
            await trio.testing.wait_all_tasks_blocked()
            await script_time.advance(300)
            await ended(run)
            assert trio.current_time() == start


@pytest.mark.parametrize(("relay", "expected"), [
    ({"relay": "all"}, [1, 2, 3, 4]), ({"relay": 2}, [1, 2]), ({"relay": {"until": "c"}}, [1, 2, 3]),
    ({"relay": 0}, []), ({"relay": 9}, [1, 2, 3, 4]), ({"relay": "all", "every": 1}, [1, 2, 3, 4]),
])  # fmt: skip
async def test_relay_delivers_the_portion_it_names(relay, expected, autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says(*"abcd"))))
        data, _, _ = await played(parse_script([relay], "stream"), run=run)
    assert [int(number) for number, _, _ in parsed(data)] == expected


async def test_relay_paces_and_gives_up_as_told(autojump_clock):
    async with hub_for() as hub:
        run = hub.start(facts(Time()), scenario(*says(*"abcd"), {"sleep": 100}, *says("e")))
        start = trio.current_time()
        script = parse_script([{"relay": "all", "every": 10, "within": 50}, {"comment": "gave up"}], "stream")
        data, _, _ = await played(script, run=run)
        assert trio.current_time() - start == pytest.approx(80)
    assert [name for _, name, _ in parsed(data)] == list("abcd")
    assert data.endswith(b": gave up\n\n")


async def test_a_stream_script_needs_no_log_to_play():
    script = parse_script([{"open": {"status": 503, "headers": {"Retry-After": "7"}, "body": {"a": 1}}}], "stream")
    data, entry, heads = await played(script)
    assert (data, entry.status) == (b'{"a": 1}', 503)
    assert (b"retry-after", b"7") in heads[0]["headers"]
    assert (b"content-type", b"application/json") in heads[0]["headers"]


async def test_a_null_header_removes_a_default():
    script = parse_script([{"open": {"headers": {"X-Accel-Buffering": None}}}, {"raw": "data: x\n\n"}], "stream")
    data, _, heads = await played(script)
    assert data == b"data: x\n\n"
    assert b"x-accel-buffering" not in dict(heads[0]["headers"])


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_counts_none(status, autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says("a"))))
        script = parse_script([{"open": {"status": status, "body": "x"}}, {"comment": "a"}, {"relay": "all"}], "stream")
        data, entry, _ = await played(script, run=run)
    assert (data, entry.bytes, entry.events, entry.last_id_sent) == (b"", 0, 0, None)


async def test_a_template_cannot_forge_a_header():
    script = parse_script([{"open": {"headers": {"X-Case": "{caseId}"}}}], "stream")
    async with hub_for() as hub:
        forged = facts(Time(), body={}).__class__("r1", "a\r\nSet-Cookie: b 한", None, "phase2", {}, Time())
        run = await ended(hub.start(forged, scenario(*says("a"))))
        _, _, heads = await played(script, run=run)
    assert dict(heads[0]["headers"])[b"x-case"] == b"a%0D%0ASet-Cookie: b %ED%95%9C"


async def test_without_ids_nothing_on_the_wire_has_one(autojump_clock):
    async with hub_for(event_ids=False, max_run_events=2) as hub:
        run = await ended(hub.start(facts(Time()), scenario(*says("a", "b", "c"))))
        data, _, _ = await played(ORDINARY, run=run)
    assert b"id:" not in data
    assert data.count(b"event: gap") == 1


async def test_retry_is_sent_if_asked_for():
    data, _, _ = await played(aura_stream.ordinary_stream(Settings(retry_ms=1500)))
    assert data.startswith(b": connected\n\nretry: 1500\n\n")


async def test_cut_at_every_byte_and_resumed_a_stream_loses_and_doubles_nothing(autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), Scenario("ok")))
        whole, _, _ = await played(ORDINARY, run=run)
        assert len(parsed(whole)) == 11
        for offset in range(len(whole) + 1):
            seen = Parser().feed(whole[:offset])
            first = [event for event in seen.events if event[2] != "[DONE]"]
            after = resume_point(first[-1][0] if first else None, run.log.last)
            rest, _, _ = await played(ORDINARY, run=run, after=after)
            assert first + parsed(rest) == parsed(whole), offset


async def test_a_client_that_takes_an_id_as_soon_as_its_line_comes_loses_nothing_but_a_blank_line(autojump_clock):
    """As eventsource 2 and fetch-event-source do: with the id first, a cut anywhere in an event would lose it."""
    async with hub_for() as hub:
        run = await ended(hub.start(facts(Time()), Scenario("ok")))
        whole, _, _ = await played(ORDINARY, run=run)
        for offset in range(len(whole) + 1):
            eager = re.findall(rb"^id: (\d+)\n", whole[:offset], re.M)
            delivered = [id for id, _, _ in parsed(whole[:offset])]
            between = whole[:offset].endswith(b"\n") and not whole[:offset].endswith(b"\n\n")
            assert len(eager) - len(delivered) in ((0, 1) if between else (0,)), offset


cuts = st.lists(st.integers(0, 400), max_size=4)


@hypothesis_settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "step", ""]), any_json, st.sampled_from([0, 0, 0.5, 40])), max_size=30),
    st.lists(st.tuples(st.sampled_from([0, 0.3, 7]), cuts), min_size=1, max_size=3),
)
def test_any_viewer_of_any_run_cut_anywhere_sees_the_whole_log(events, viewers):
    steps = [part for name, data, pause in events
             for part in ({"event": {"event": name, "data": json.loads(re.sub(r"\{(?=[{\w])", "{{", json.dumps(data)))}}, {"sleep": pause})]  # fmt: skip
    results = []

    async def view(run, delay, cut_points):
        await trio.sleep(delay)
        got = []
        for cut in [*cut_points, None]:
            last = got[-1][0] if got else None
            data, _, _ = await played(ORDINARY, run=run, after=resume_point(last, run.log.last), cut_at=cut)
            got += parsed(data)
        results.append(got)

    async def everything():
        async with hub_for() as hub, trio.open_nursery() as nursery:
            run = hub.start(facts(Time()), parse_scenario({"name": "t", "run": steps}))
            for delay, cut_points in viewers:
                nursery.start_soon(view, run, delay, cut_points)

    trio.run(everything, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(results) == len(viewers)
    for got in results:
        assert [int(number) for number, _, _ in got] == list(range(1, len(events) + 1))
        assert [name for _, name, _ in got] == [name or "message" for name, _, _ in events]


# ═══ 8  Faults ══════════════════════════════════════════════════════════════════════════════════


async def pieces(script, *, run=None, hub=None, after=0, fast=True):
    """What a stream script writes, piece by piece, with the script time of each; its entry too."""
    hub, found = hub or BoundedHub(Settings(), None, run.info.clock if run else Time()), []
    entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1", resumed_after=after)
    start = hub.clock.now()

    async def send(message):
        await trio.lowlevel.checkpoint_if_cancelled()
        if message["type"] == "http.response.body" and message["body"]:
            found.append((round(hub.clock.now() - start, 3), message["body"]))

    await ScriptedDelivery(parse_script(script, "stream"), entry, hub, run).deliver(send)
    assert entry.bytes == sum(len(data) for _, data in found) and entry.chunks == len(found)
    return found, entry


@pytest.mark.parametrize(("steps", "expected"), [
    ([{"chunk": 4}, {"raw": "abcdefghij"}, {"raw": "k"}], [b"abcd", b"efgh", b"ij", b"k"]),
    ([{"chunk": "line"}, {"raw": "a\nbc\r\nd\re"}], [b"a\n", b"bc\r\n", b"d\r", b"e"]),
    ([{"chunk": "utf8"}, {"raw": "a한b🙂"}], [b"a\xed", b"\x95\x9cb\xf0", b"\x9f\x99\x82"]),
    ([{"buffer": 4}, {"raw": "ab"}, {"raw": "cdefghij"}, {"raw": "k"}], [b"abcd", b"efgh", b"ijk"]),
    ([{"buffer": "all"}, {"raw": "ab"}, {"raw": "cd"}, "flush", {"raw": "e"}, "flush", {"raw": "f"}], [b"abcd", b"e", b"f"]),
    ([{"buffer": "all"}, {"chunk": 3}, {"raw": "ab"}, {"raw": "cdefg"}], [b"abc", b"def", b"g"]),
    ([{"buffer": 4}, {"chunk": 3}, {"raw": "abcdefgh"}], [b"abc", b"def", b"gh"]),
    ([{"raw": "before"}, {"chunk": 2}, {"raw": "cut"}], [b"before", b"cu", b"t"]),
    ([{"raw": ""}, {"comment": "a"}, {"raw": ""}], [b": a\n\n"]),
    ([{"raw": "a"}, "end", {"raw": "b"}], [b"a"]),
    ([{"repeat": 3, "steps": [{"raw": "{n}"}, {"repeat": 2, "steps": ["end"]}]}], [b"1"]),
    ([{"buffer": "all"}, {"raw": "held"}, "end"], [b"held"]),
    ([{"raw": {"hex": "00ff"}}, {"raw": {"base64": "gA=="}}], [b"\x00\xff", b"\x80"]),
    ([{"buffer": "all"}, {"comment": "c"}, "flush"], [b": c\n\n"]),
    ([{"buffer": "all"}, "flush", {"comment": "c"}], [b": c\n\n"]),
    ([{"buffer": "all"}], []), ([{"buffer": "all"}, "open"], []), (["flush"], []),
])  # fmt: skip
async def test_output_is_cut_and_held_as_the_script_says(steps, expected, autojump_clock):
    found, entry = await pieces(steps)
    assert [data for _, data in found] == expected
    assert entry.end[:2] == ("server", "end")


async def test_chunks_keep_their_distance_and_no_heartbeat_falls_into_an_event(autojump_clock):
    """40 s between the bytes and a beat every 30: a stream that is still talking is not quiet."""
    async with hub_for() as hub:
        run = await ended(hub.start(facts(hub.clock), scenario(*says("a", "b"))))
        script = [{"heartbeat": 30}, {"chunk": 10, "every": 40}, {"relay": "all"}, {"sleep": 130}, {"raw": "x"}]
        found, entry = await pieces(script, run=run, hub=hub)
    data = b"".join(data for _, data in found)
    body, *beats = data.removesuffix(b"x").split(b": heartbeat\n\n")
    assert parsed(body) == [("1", "a", '{"n": "a"}'), ("2", "b", '{"n": "b"}')] and beats == [b""] * (len(beats))
    assert len(beats) == entry.heartbeats == 2
    apart = [later - sooner for (sooner, _), (later, _) in zip(found[:6], found[1:], strict=False)]
    assert apart == [pytest.approx(40)] * len(apart)
    assert (entry.events, entry.last_id_sent) == (2, 2)


@pytest.mark.parametrize("chunk", [{"chunk": 7}, {"chunk": 7, "every": 2}, {"chunk": "utf8"}, {"buffer": 10}])
async def test_an_event_that_comes_just_as_a_heartbeat_falls_due_is_whole(chunk, autojump_clock):
    """Both in one turn of the loop: the task wakes with news, and its wait is cancelled already. Found by the soak."""
    written = bytearray()

    async def send(message):  # as ours: a write that fits the socket has no checkpoint
        written.extend(message.get("body", b""))

    async with hub_for() as hub, trio.open_nursery() as nursery:
        run = hub.start(facts(hub.clock), scenario(*says("a"), {"wait": "end"}))
        script = parse_script([chunk, {"comment": "c"}, {"heartbeat": 30}, {"relay": "all"}], "stream")
        entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1")
        delivery = ScriptedDelivery(script, entry, hub, run)
        nursery.start_soon(delivery.deliver, send)
        await trio.sleep(200)
        for number in (2, 3, 4):
            run.log.append(Event("말", {"n": "가" * number}))
            run.log.announce()
            delivery.resting.cancel()
            await trio.sleep(29)
            assert chunk.get("buffer") or parsed(bytes(written))[-1][0] == str(number), "it does not wait for the next beat"
            await trio.sleep(500)
        hub.gates.signal("end")
    assert [(id, name) for id, name, _ in parsed(bytes(written))] == [("1", "a"), ("2", "말"), ("3", "말"), ("4", "말")]
    assert [json.loads(data)["n"] for _, _, data in parsed(bytes(written))[1:]] == ["가" * n for n in (2, 3, 4)]
    assert (entry.events, entry.last_id_sent) == (4, 4)


async def test_a_portion_that_a_heartbeat_interrupts_is_whole_before_the_next_step(autojump_clock):
    written, done = bytearray(), []

    async def send(message):
        written.extend(message.get("body", b""))

    async with hub_for() as hub, trio.open_nursery() as nursery:
        run = hub.start(facts(hub.clock), scenario({"wait": "end"}))
        steps = [{"comment": "c"}, {"heartbeat": 30}, {"chunk": 7}, {"relay": 1}, {"heartbeat": "never"}, {"wait": "next"}]
        delivery = ScriptedDelivery(parse_script(steps, "stream"), Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1"), hub, run)
        nursery.start_soon(delivery.deliver, send)
        await trio.sleep(100)
        run.log.append(Event("e", "x" * 50))
        run.log.announce()
        delivery.resting.cancel()
        await trio.sleep(1)
        done += parsed(bytes(written))
        hub.gates.signal("next")
        hub.gates.signal("end")
    assert done == [("1", "e", "x" * 50)]


async def test_an_operator_s_end_is_heeded_while_interrupted_pieces_go(autojump_clock):
    ended_at = []

    async def send(message):
        pass

    async with hub_for() as hub, trio.open_nursery() as nursery:
        run = hub.start(facts(hub.clock), scenario({"wait": "end"}))
        steps = [{"comment": "c"}, {"heartbeat": 1000}, {"chunk": 7, "every": 5}, {"relay": "all"}]
        delivery = ScriptedDelivery(parse_script(steps, "stream"), Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1"), hub, run)

        async def view():
            await delivery.deliver(send)
            ended_at.append(trio.current_time() - began)

        nursery.start_soon(view)
        await trio.sleep(100)
        run.log.append(Event("e", "x" * 50))
        run.log.announce()
        delivery.resting.cancel()
        began = trio.current_time()
        await trio.sleep(7)
        delivery.close("end")
        await trio.sleep(100)
        hub.gates.signal("end")
    assert ended_at and ended_at[0] < 10


async def test_an_operator_s_end_is_heeded_behind_an_event_that_is_on_its_way(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), {"wait": "never"}]})
        found, began = [], trio.current_time()

        async def view():
            steps = [{"heartbeat": "never"}, {"chunk": 1, "every": 5}, {"relay": "all"}]
            found.append((await read(client, "r", **{"X-Aura-Scenario": json.dumps({"name": "slow", "stream": steps})}))[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(view)
            await trio.sleep(12)
            await client.post("/api/admin/sse/restart")
        assert trio.current_time() - began < 20 and parsed(found[0]) == [("1", "a", '{"n": "a"}')]


async def test_a_scripted_drop_gives_way_to_an_operator_s_end():
    hub = BoundedHub(Settings(), None, Time())
    delivery = ScriptedDelivery((), Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream"), hub)
    delivery.close("end")
    with pytest.raises(aura_stream.Over):
        await delivery.drop(aura_stream.Step("drop"))
    assert delivery.entry.end is None


async def test_events_are_counted_when_their_last_byte_is_out(autojump_clock):
    """A connection lost with held output has not delivered it, whatever the relay had taken."""
    async with hub_for() as hub:
        run = await ended(hub.start(facts(hub.clock), scenario(*says("a", "b", "c"))))
        cut = types.SimpleNamespace(lost=False, unsent=False, put=taken, cut=lambda reset: scope.cancel())
        entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream", run_id="r1")
        script = parse_script([{"buffer": 40}, {"relay": 2}, "drop"], "stream")
        with trio.CancelScope() as scope:
            await ScriptedDelivery(script, entry, hub, run, connection=cut).deliver(lambda message: trio.lowlevel.checkpoint())
    assert (entry.bytes, entry.events, entry.last_id_sent) == (40, 1, 1)
    assert entry.end[:2] == ("server", "drop")


async def test_a_beat_that_is_lost_with_the_buffer_was_none(autojump_clock):
    cut = types.SimpleNamespace(lost=False, unsent=False, put=taken, cut=lambda reset: scope.cancel())
    entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream")
    script = parse_script(["open", {"buffer": "all"}, {"heartbeat": 1}, {"sleep": 10.5}, "drop"], "stream")
    with trio.CancelScope() as scope:
        await ScriptedDelivery(script, entry, BoundedHub(Settings(), None), connection=cut).deliver(lambda message: trio.lowlevel.checkpoint())
    assert (entry.heartbeats, entry.bytes) == (0, 0)


async def test_a_full_buffer_lets_go_and_the_journal_says_so(autojump_clock):
    steps = [{"buffer": "all"}, {"repeat": 3, "steps": [{"raw": "x" * 600_000}]}]
    found, entry = await pieces(steps)
    assert [len(data) for _, data in found] == [1_200_000, 600_000]
    assert entry.notes == ["the buffer was full at 1048576 bytes and let go"] and entry.notes[0] in entry.said


def test_five_megabytes_in_pieces_of_one_byte_are_made_one_by_one():
    outlet = aura_stream.Outlet()
    outlet.chunk = 1
    began = time.perf_counter()
    outlet.take(b"x" * 5_000_000, ("e",), 1)
    assert outlet.next() == (b"x", [], None) and time.perf_counter() - began < 0.25


@pytest.mark.parametrize(("frame", "expected"), [
    ({}, ": c\n\nevent: a\ndata: x\ndata: y\nid: 1\n\n"),
    ({"newline": "\r\n"}, ": c\r\n\r\nevent: a\r\ndata: x\r\ndata: y\r\nid: 1\r\n\r\n"),
    ({"newline": "\r"}, ": c\r\revent: a\rdata: x\rdata: y\rid: 1\r\r"),
    ({"id": None}, ": c\n\nevent: a\ndata: x\ndata: y\n\n"),
    ({"id": "{runId}_{n}"}, ": c\n\nevent: a\ndata: x\ndata: y\nid: r1_1\n\n"),
    ({"id-first": True}, ": c\n\nid: 1\nevent: a\ndata: x\ndata: y\n\n"),
    ({"id-first": True, "id": "x{n}"}, ": c\n\nid: x1\nevent: a\ndata: x\ndata: y\n\n"),
    ({"wrap": "data:"}, ": c\n\ndata:event: a\ndata:data: x\ndata:data: y\ndata:id: 1\n\n"),
    ({"wrap": "{runId}:"}, ": c\n\nr1:event: a\nr1:data: x\nr1:data: y\nr1:id: 1\n\n"),
])  # fmt: skip
async def test_a_frame_is_how_events_and_comments_are_written(frame, expected, autojump_clock):
    async with hub_for() as hub:
        run = await ended(hub.start(facts(hub.clock), scenario({"event": {"event": "a", "data": "x\ny"}})))
        found, _ = await pieces([{"frame": frame}, {"comment": "c"}, {"relay": "all"}], run=run, hub=hub)
        assert b"".join(data for _, data in found).decode() == expected
        back = [{"frame": frame}, {"frame": {}}, {"comment": "c"}, {"relay": "all"}]
        plain, _ = await pieces(back, run=run, hub=hub)
        assert b"".join(data for _, data in plain) == b": c\n\nevent: a\ndata: x\ndata: y\nid: 1\n\n"


async def test_a_heartbeat_may_be_an_event_and_has_no_id(autojump_clock):
    beat = {"heartbeat": {"every": 30, "event": "heartbeat", "data": {"at": "{now}", "jobId": "{runId}"}}}
    found, entry = await pieces([{"frame": {"id": "{n}"}}, {"comment": "c"}, beat, {"sleep": 100}])
    beats = Parser().feed(b"".join(data for _, data in found)).events
    assert [(id, name, json.loads(data)["jobId"]) for id, name, data in beats] == [("", "heartbeat", "r1")] * 3
    assert entry.heartbeats == 3


async def test_what_a_template_makes_cannot_break_a_line(autojump_clock):
    """A caseId is any path segment, line breaks and all."""
    own = facts(Time()).__class__("r1", "a\nevent: forged", None, "phase2", {}, Time())
    async with hub_for() as hub:
        run = await ended(hub.start(own, scenario({"event": {"event": "{caseId}", "data": "{caseId}"}})))
        steps = [{"event": {"event": "{caseId}", "id": "{caseId}", "data": 1}}, {"frame": {"id": "{caseId}"}}, {"relay": "all"}]
        found, entry = await pieces(steps, run=run, hub=hub)
    events = Parser().feed(b"".join(data for _, data in found)).events
    safe_one = "a%0Aevent: forged"
    assert events == [(safe_one, safe_one, "1"), (safe_one, safe_one, "a\nevent: forged")]


async def test_heartbeats_come_in_a_relay_that_opened_the_stream_itself(autojump_clock):
    async with hub_for() as hub:
        run = hub.start(facts(hub.clock), scenario(*says("a"), {"sleep": 95}, *says("b")))
        found, entry = await pieces([{"heartbeat": 30}, {"sleep": 40}, {"relay": {"until": "{runId}"}}], run=run, hub=hub)
    assert entry.heartbeats == 1, "none before the head, one in the rest of the 95 s"


@pytest.mark.parametrize("beat", ["never", 0.15])
async def test_a_heartbeat_changes_neither_the_pace_nor_the_patience_of_a_relay(beat, autojump_clock):
    async with hub_for() as hub:
        slow = [{"heartbeat": beat}, {"comment": "c"}, {"chunk": 10, "every": 0.1}]
        run = await ended(hub.start(facts(hub.clock), scenario(*says(*"abcd"))))
        start = hub.clock.now()
        await pieces([*slow, {"relay": "all", "every": 1.0}], run=run, hub=hub)
        assert hub.clock.now() - start > 4
        later = hub.start(facts(hub.clock, "r2"), scenario({"sleep": 0.3}, *says("a"), {"sleep": 1.2}, *says("b")))
        found, entry = await pieces([*slow, {"relay": "all", "within": 1.0}], run=later, hub=hub)
        assert entry.events == 2


async def test_a_hanging_stream_is_silent(autojump_clock):
    found = []
    with trio.move_on_after(1000):
        entry = Entry(method="GET", path="/", client="test:1", request_id="id", kind="stream")
        script = parse_script([{"comment": "c"}, {"heartbeat": 1}, {"sleep": 2.5}, "hang"], "stream")

        async def send(message):
            found.append(message)

        await ScriptedDelivery(script, entry, BoundedHub(Settings(), None)).deliver(send)
    assert len(found) == 4, "its head, its comment and two beats"
    assert entry.step == 3 and entry.end is None, "who ends it will say so"


async def test_an_event_of_the_stream_s_own_is_written_as_it_is(autojump_clock):
    step = {"event": {"event": "gap", "id": "7{n}", "retry": 5, "data": {"a": 1}}, "pad": 3}
    found, entry = await pieces([{"repeat": 2, "steps": [step]}])
    assert found[0][1] == b'event: gap\nretry: 5\ndata: {"a": 1, "pad": "xxx"}\nid: 71\n\n'
    assert (entry.events, entry.last_id_sent) == (2, 72)


@pytest.mark.parametrize(("size", "half"), [(0.5, b"event: b\ndata: {"), (3, b"eve"), (0, b""), (10**6, b'event: b\ndata: {"n": "b"}\nid: 2\n\n')])
async def test_a_relay_may_end_in_the_middle_of_the_event_that_comes_next(size, half, autojump_clock):
    async with hub_for() as hub:
        run = hub.start(facts(hub.clock), scenario(*says("a", "b", "c", pause=10)))
        began = hub.clock.now()
        found, entry = await pieces([{"relay": 1, "cut": size}, {"comment": "cut"}], run=run, hub=hub)
        assert b"".join(data for _, data in found).split(b"id: 1\n\n")[1] == half + b": cut\n\n"
        assert (entry.events, entry.last_id_sent, hub.clock.now() - began) == (1, 1, 10), "it waits for it, and half is none"
        await ended(run)
        framed, _ = await pieces([{"frame": {"newline": "\r\n"}}, {"relay": {"until": "b"}, "cut": 0.1}, {"relay": "all"}], run=run, hub=hub)
        events = parsed(b"".join(data for _, data in framed))
        assert [event[:2] for event in events] == [("1", "a"), ("2", "b"), ("3", "message")], "it comes again, behind its own half"
        assert await pieces([{"relay": "all", "cut": 0.5}], run=run, hub=hub), "behind the last one comes nothing"


async def test_what_is_to_be_cut_may_be_forgotten_while_it_is_waited_for(autojump_clock):
    async with hub_for(max_run_events=5) as hub:
        many = {"repeat": 50, "steps": says("b")[:1]}
        run = hub.start(facts(hub.clock), scenario(*says("a", "a"), {"wait": "g"}, many, "hang"))
        found = []

        async def view():
            found.append(await pieces([{"relay": 2, "cut": 5}, {"comment": "cut"}], run=run, hub=hub))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(view)
            await trio.testing.wait_all_tasks_blocked()
            hub.gates.signal("g")
        run.cancel(Failure("enough"))
    assert b"".join(data for _, data in found[0][0]).endswith(b"event: cut\n\n")


async def test_a_shared_cursor_is_the_old_queue(autojump_clock):
    """Each event goes to one viewer only; with a cursor of its own, each would see all."""
    async with hub_for() as hub:
        run = hub.start(facts(hub.clock), scenario(*says(*"abcdef", pause=1)))
        taken = {"one": [], "two": []}

        async def view(who):
            found, entry = await pieces([{"relay": "all", "shared": True}], run=run, hub=hub)
            taken[who] = [id for id, _, _ in parsed(b"".join(data for _, data in found))]
            assert entry.events == len(taken[who])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(view, "one")
            nursery.start_soon(view, "two")
        assert sorted(taken["one"] + taken["two"]) == list("123456")
        run.place = 0
        async with trio.open_nursery() as nursery:  # and with all there already: one at a time, in turns
            nursery.start_soon(view, "one")
            nursery.start_soon(view, "two")
        assert sorted(taken["one"] + taken["two"]) == list("123456")
        assert taken["one"] and taken["two"]


@given(st.lists(st.sampled_from([1, 2, 3, 7, 64, "utf8", "line"]), min_size=1, max_size=3), st.sampled_from([None, 5, 100, "all"]))
@hypothesis_settings(max_examples=30)
def test_however_it_is_cut_a_parser_yields_the_same(chunks, hold):
    async def main():
        async with hub_for() as hub:
            texts = [{"event": {"event": "t", "data": {"text": f"위험도 {n} 🙂"}}} for n in range(5)]
            run = await ended(hub.start(facts(hub.clock), scenario(*texts)))
            held = [] if hold is None else [{"buffer": hold}]
            steps = [part for chunk in chunks for part in ({"chunk": chunk}, {"relay": 2})]
            found, entry = await pieces([*held, *steps, {"relay": "all"}], run=run, hub=hub)
            assert parsed(b"".join(data for _, data in found)) == parsed(run.log.read(0)[0])
            assert (entry.events, entry.last_id_sent) == (5, 5)

    trio.run(main)


# ═══ 9  Contract ════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize(("text", "last", "place"), [
    (None, 9, 0), ("", 9, 0), ("3", 9, 3), ("r1_3", 9, 3), ("a_b_3", 9, 3), ("9", 9, 9), ("10", 9, 0), ("-1", 9, 0),
    ("abc", 9, 0), ("3x", 9, 0), ("٣", 9, 0), ("9" * 5000, 9, 0), ("1.5", 9, 0), (" 3", 9, 0), ("x\n_2", 9, 2),
])  # fmt: skip
def test_where_a_resume_goes_on(text, last, place):
    assert resume_point(text, last) == place


@pytest.mark.parametrize(("text", "place"), [("1" * 200_000 + "_1", 1), ("_1" * 100_000, 1), ("_" * 200_000, 0), ("_1" * 100_000 + "x", 0)])
def test_an_id_of_any_length_is_read_at_once(text, place):
    began = time.monotonic()
    assert resume_point(text, 9) == place and time.monotonic() - began < 0.5


BAD_BODIES = [
    ("[]", ["body"]), ("5", ["body"]), ('"x"', ["body"]), ("null", ["body"]), ("{", ["body"]), ('{"a": NaN}', ["body"]),
    ("\xff", ["body"]), ("[" * 2000 + "]" * 2000, ["body"]), ('{"a":' * 70 + "1" + "}" * 70, ["body"]),
    ('{"runId": {}}', ["body", "runId"]), ('{"runId": true}', ["body", "runId"]), ('{"runId": "a/b"}', ["body", "runId"]),
    ('{"runId": ".."}', ["body", "runId"]), ('{"a": 1e999}', ["body"]), ("\xff\xfe{\x00}\x00", ["body"]),
    ('{"runId": "a\\nb"}', ["body", "runId"]), (json.dumps({"runId": "x" * 201}), ["body", "runId"]),
    ('{"evidence": []}', ["body", "evidence"]), ('{"mode": 5}', ["body", "mode"]), ('{"options": "x"}', ["body", "options"]),
    ('{"requestedBy": {}}', ["body", "requestedBy"]), ('{"evidence": {"items": [' + "[]," * 100_000 + "1]}}", ["body"]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "loc"), BAD_BODIES)
async def test_a_bad_body_is_a_422_that_names_the_field(body, loc):
    async with in_memory() as (client, hub, _, _):
        answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, data=body.encode("latin-1"))
        assert answer.status_code == 422, await answer.get_data()
        detail = (await answer.get_json())["detail"][0]
        assert detail["loc"] == loc
        assert set(detail) == {"loc", "msg", "type"}
        assert hub.live == 0


async def test_phase3_callbacks_are_an_object_if_anything():
    async with in_memory() as (client, _, _, _):
        for callbacks, status in ((5, 422), ({"onDone": "http://x"}, 202), (None, 202)):
            answer = await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json={"callbacks": callbacks})
            assert answer.status_code == status


@pytest.mark.parametrize(("options", "status"), [
    ({"ragTopK": 20, "temperature": 0.5, "promptVersion": "v"}, 202), ({"ragTopK": 21}, 422), ({"ragTopK": 1.5}, 422),
    ({"temperature": 1.1}, 422), ({"promptVersion": 5}, 422), ({"unknown": 1}, 202), (None, 202),
])  # fmt: skip
async def test_phase3_options_have_their_ranges(options, status):
    async with in_memory() as (client, _, _, _):
        answer = await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json={"options": options})
        assert answer.status_code == status


@pytest.mark.parametrize(("headers", "query", "detail"), [
    ({}, "", "Missing authorization header"), ({"Authorization": ""}, "", "Missing authorization header"),
    ({"Authorization": "Basic x"}, "", "Invalid authorization header format"),
    ({"Authorization": "Bearer "}, "", "Invalid authorization header format"),
    ({"Authorization": "Bearer"}, "?access_token=x", "Invalid authorization header format"),
    ({}, "?access_token=", "Missing authorization header"),
    ({"Authorization": "bearer x"}, "", None), ({}, "?access_token=x", None),
])  # fmt: skip
async def test_any_bearer_is_enough_and_none_is_a_401(headers, query, detail, heard):
    async with in_memory() as (client, _, _, _):
        for path in ("/aura/cases/1/analysis", "/aura/analysis-runs/none/stream"):
            answer = await client.get(path + query, headers=headers)
            assert answer.status_code == (404 if detail is None else 401)
            if detail:
                assert (await answer.get_json())["detail"] == detail
                assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "access_token" not in heard.all()


async def test_auth_can_be_switched_off():
    async with in_memory(auth="off") as (client, _, _, _):
        assert (await client.get("/aura/cases/1/analysis")).status_code == 404


CHOICES = [
    # (header, query, body, runId, caseId, binding, default) -> what is chosen
    ({"header": "drop", "query": "reset", "body": "empty", "run_id": "r~failed", "default": "crash"}, "drop"),
    ({"query": "reset", "body": "empty", "run_id": "r~failed", "default": "crash"}, "reset"),
    ({"body": "empty", "run_id": "r~failed", "default": "crash"}, "empty"),
    ({"run_id": "r~failed", "case": "1~bom", "bound": "crlf", "default": "crash"}, "failed"),
    ({"case": "1~bom", "bound": "crlf", "default": "crash"}, "bom"),
    ({"bound": "crlf", "default": "crash"}, "crlf"),
    ({"default": "crash"}, "crash"),
    ({}, "ok"),
    ({"no_magic": True, "run_id": "r~failed", "case": "1~bom"}, "ok"),
    ({"body": {"name": "mine", "stream": ["drop"]}}, "mine"),
    ({"header": '{"name": "mine-too", "run": []}'}, "mine-too"),
]  # fmt: skip


@pytest.mark.parametrize(("ways", "chosen"), CHOICES)
async def test_the_first_way_to_choose_wins(ways, chosen, autojump_clock):
    async with in_memory(scenario=ways.get("default", ""), no_magic=ways.get("no_magic", False)) as (client, hub, _, _):
        if "bound" in ways:
            await client.post("/__aura/next", json={"scenario": ways["bound"]})
        body = {"runId": ways.get("run_id", "r"), **({"scenario": ways["body"]} if "body" in ways else {})}
        query = f"?scenario={ways['query']}" if "query" in ways else ""
        headers = {**BEARER, **({"X-Aura-Scenario": ways["header"]} if "header" in ways else {})}
        answer = await client.post(f"/aura/cases/{ways.get('case', '1')}/analysis-runs{query}", headers=headers, json=body)
        assert (answer.status_code, answer.headers["X-Aura-Scenario"]) == (202, chosen)
        assert hub.find(body["runId"]).scenario.name == chosen
        assert (await answer.get_json())["caseId"] == ways.get("case", "1"), "an id keeps its suffix"


async def test_bindings_are_used_up_and_the_closest_fits_best(autojump_clock):
    async with in_memory(case="7=failed,8=crash") as (client, _, _, _):
        async def bind(**body):
            answer = await client.post("/__aura/next", json=body)
            assert answer.status_code == 200, await answer.get_data()

        async def chosen(case, test_id=None):
            answer, _ = await triggered(client, case, {"X-Test-Id": test_id} if test_id else {})
            return answer.headers["X-Aura-Scenario"]

        assert [await chosen("7"), await chosen("7"), await chosen("8"), await chosen("9")] == ["failed", "failed", "crash", "ok"]
        await bind(scenario="drop", times=2)
        await bind(scenario="bom", caseId=85117, times=None)
        await bind(scenario="crlf", testId="t", times=1)
        assert [await chosen("85117") for _ in range(3)] == ["bom"] * 3
        assert [await chosen("1", "t"), await chosen("1", "t"), await chosen("1"), await chosen("1")] == ["crlf", "drop", "drop", "ok"]
        await client.post("/__aura/reset")
        assert [await chosen("85117"), await chosen("7")] == ["ok", "failed"], "but what was said at the start stays"


async def test_only_a_thousand_bindings_and_gates_wait():
    async with in_memory() as (client, hub, _, _):
        for number in range(1000):
            assert (await client.post("/__aura/next", json={"scenario": "drop", "caseId": number})).status_code == 200
            assert hub.gates.signal(f"g{number}")
        for path, body in (("next", {"scenario": "drop"}), ("signal", {"gate": "one more"})):
            answer = await client.post(f"/__aura/{path}", json=body)
            assert answer.status_code == 409 and "POST /__aura/reset" in (await answer.get_json())["error"]


async def test_an_unknown_scenario_is_a_400_that_helps(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        for path, headers in (("/aura/cases/1/analysis-runs", {"X-Aura-Scenario": "dorp"}), ("/aura/cases/1~dorp/analysis-runs", {}),
                              ("/aura/cases/1/analysis-runs?scenario=dorp", {})):  # fmt: skip
            answer = await client.post(path, headers={**BEARER, **headers}, json={})
            body = await answer.get_json()
            assert answer.status_code == 400
            assert (body["error"], body["scenario"], body["didYouMean"][0]) == ("unknown scenario", "dorp", "drop")
            assert body["known"] == list(CATALOGUE)
        answer = await client.get("/aura/analysis-runs/nobody~dorp/stream", headers=BEARER)
        assert answer.status_code == 400 and hub.live == 0


async def test_a_scenario_with_a_mistake_is_a_422_with_its_place(autojump_clock):
    async with in_memory() as (client, _, _, _):
        wrong = {"name": "mine", "stream": [[], [{"comment": "a"}, {"slep": 1}]]}
        expected = {"at": "stream[1][1]", "step": {"slep": 1}, "hint": "unknown step 'slep'; did you mean 'sleep'?"}
        for path, body in (("/aura/cases/1/analysis-runs", {"scenario": wrong}), ("/__aura/check", wrong), ("/__aura/next", {"scenario": wrong})):
            answer = await client.post(path, headers=BEARER, json=body)
            assert answer.status_code == 422
            assert expected.items() <= (await answer.get_json()).items()
        answer = await client.post("/__aura/check", json={"name": "mine", "stream": [["drop"]]})
        assert (answer.status_code, await answer.get_json()) == (200, {"ok": True})


async def test_a_choice_on_a_get_is_for_that_stream_and_counts_for_itself(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario="unavailable")

        async def asked(**headers):
            answer, _ = await read(client, "r", **{name.replace("_", "-"): value for name, value in headers.items()})
            return answer.status_code, answer.headers["X-Aura-Scenario"], answer.headers["X-Aura-Attempt"]

        assert await asked(X_Aura_Scenario="unavailable") == (503, "unavailable", "1"), "the run's own: its next attempt"
        assert await asked(X_Aura_Scenario="gone-204") == (204, "gone-204", "1")
        head = await client.head("/aura/analysis-runs/r/stream", headers=BEARER)
        assert head.headers["X-Aura-Attempt"] == "1", "HEAD counts for nothing"
        assert await asked() == (200, "unavailable", "2")
        assert await asked(X_Aura_Scenario="gone-204") == (204, "gone-204", "2")
        assert hub.find("r").attempts == {"unavailable": 2, "gone-204": 2}


async def test_a_run_counts_the_attempts_of_a_thousand_scenarios(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r")
        for number in range(1005):
            mine = json.dumps({"name": f"n{number}", "stream": ["end"]})
            assert (await read(client, "r", **{"X-Aura-Scenario": mine}))[0].headers["X-Aura-Attempt"] == "1"
        assert (await read(client, "r", **{"X-Aura-Scenario": mine}))[0].headers["X-Aura-Attempt"] == "2"
        assert len(hub.find("r").attempts) == 1000


async def test_a_known_run_keeps_its_scenario(autojump_clock):
    async with in_memory() as (client, _, _, _):
        mine = {"name": "mine", "stream": ["end"]}
        await triggered(client, runId="r", scenario=mine)
        assert (await triggered(client, runId="r", scenario=mine))[0].headers["X-Aura-Run"] == "known"
        again, _ = await triggered(client, runId="r")
        assert (again.headers["X-Aura-Scenario"], again.headers["X-Aura-Attempt"]) == ("mine", "3")
        for other in ("drop", {**mine, "seed": 5}):
            answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": "r", "scenario": other})
            assert answer.status_code == 409 and "'mine'" in (await answer.get_json())["error"]


async def test_a_script_without_a_log_plays_for_an_unknown_run_too(autojump_clock):
    async with in_memory() as (client, _, _, _):
        answer, body = await read(client, "nobody~unauthorized")
        assert (answer.status_code, answer.headers["X-Aura-Run-ID"]) == (401, "nobody~unauthorized")
        answer, body = await read(client, "nobody~unknown-run")
        assert (answer.status_code, json.loads(body)["runId"]) == (200, "nobody~unknown-run")
        assert (await read(client, "nobody~drop-resume"))[0].status_code == 404, "there is nothing to relay"
        attempts = [(await read(client, "other~unavailable"))[0] for _ in range(2)]
        assert [(one.status_code, one.headers.get("X-Aura-Attempt")) for one in attempts] == [(503, "1"), (404, None)]
        await client.post("/__aura/next", json={"scenario": "rate-limited"})
        assert [(await read(client, "nobody"))[0].status_code for _ in range(2)] == [429, 404], "a binding is used up"
        await client.post("/__aura/next", json={"scenario": "drop"})
        assert (await read(client, "nobody"))[0].status_code == 404
        assert (await triggered(client))[0].headers["X-Aura-Scenario"] == "drop", "what could not play was not used up"


async def test_the_server_s_own_refusals_use_up_nothing(autojump_clock):
    async with in_memory(max_live_runs=1) as (client, hub, _, _):
        gone = [(await read(client, "nobody", **{"X-Aura-Scenario": "expired-run"}))[0] for _ in range(2)]
        assert [one.status_code for one in gone] == [404, 404]
        assert "X-Aura-Attempt" not in gone[1].headers, "its first script needs a log, and is still its next"
        await triggered(client, runId="live", scenario="stepped")
        await client.post("/__aura/next", json={"scenario": "failed"})
        refused = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={})
        assert refused.status_code == 503
        hub.find("live").cancel(Failure("over"))
        await ended(hub.find("live"))
        answer, _ = await triggered(client, "1")
        assert (answer.headers["X-Aura-Scenario"], answer.headers["X-Aura-Attempt"]) == ("failed", "1")


async def test_a_scenario_in_a_header_may_speak_korean(autojump_clock):
    mine = json.dumps({"name": "mine", "run": [{"event": {"event": "t", "data": {"text": "한글"}}}]}, ensure_ascii=False)
    async with in_memory() as (client, hub, _, _):
        await triggered(client, "1", {"X-Aura-Scenario": mine}, runId="r")
        assert said(await ended(hub.find("r"))) == [("t", {"text": "한글"})]


async def test_one_s_own_ok_is_what_happens_where_nobody_chooses(autojump_clock):
    async with trio.open_nursery() as nursery:
        hub = BoundedHub(Settings(), nursery)
        own = {**CATALOGUE, "ok": parse_scenario({"name": "ok", "doc": "mine", "run": says("mine")})}
        client = Client(create_app(Settings(), hub, own))
        await triggered(client, runId="r")
        assert [name for name, _ in said(await ended(hub.find("r")))] == ["mine"]


async def test_trigger_attempts_count_per_run_or_else_per_case(autojump_clock):
    twice = {"name": "twice", "trigger": [[{"open": {"status": 503, "body": "later"}}], []]}
    async with in_memory() as (client, hub, _, _):
        async def statuses(case, *run_ids):
            found = []
            for run_id in run_ids:
                body = {"scenario": twice, **({"runId": run_id} if run_id else {})}
                found.append((await client.post(f"/aura/cases/{case}/analysis-runs", headers=BEARER, json=body)).status_code)
            return found

        assert await statuses("1", None, None, None) == [503, 202, 202]
        assert await statuses("1", "a", "b", "a", "b") == [503, 503, 202, 202]
        assert await statuses("2", None) == [503]
        assert hub.live == 4, "who was refused started nothing"


async def test_a_reset_of_one_test_forgets_its_attempts_and_no_other_s(autojump_clock):
    twice = {"name": "twice", "trigger": [[{"open": {"status": 503, "body": "later"}}], []]}
    async with in_memory() as (client, hub, _, _):
        async def post(test_id):
            headers, body = {**BEARER, "X-Test-Id": test_id}, {"runId": f"r-{test_id}", "scenario": twice}
            return (await client.post("/aura/cases/1/analysis-runs", headers=headers, json=body)).status_code

        assert [await post("a"), await post("b"), await post("a")] == [503, 503, 202]
        await client.post("/__aura/reset?testId=a")
        assert [await post("a"), await post("b")] == [503, 202]


async def test_post_sse_counts_as_an_attempt_and_is_refused_like_a_trigger(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        async def post(run_id, scenario):
            path, body = "/aura/cases/1/analysis/trigger", {"runId": run_id, "scenario": scenario}
            answer = await client.post(path, headers=BEARER, json=body)
            return answer, await answer.get_data()

        answer, data = await post("a", "unavailable")
        assert (answer.status_code, answer.headers["X-Aura-Attempt"]) == (503, "1")
        answer, data = await post("a", "unavailable")
        assert (answer.status_code, answer.headers["X-Aura-Attempt"], data[-14:]) == (200, "2", DONE)
        answer, data = await post("b", "trigger-503")
        assert (answer.status_code, hub.find("b")) == (503, None)
        journal = (await (await client.get("/__aura/journal")).get_json())["entries"]
        assert [one["kind"] for one in journal] == ["stream"] * 3


@pytest.mark.parametrize(("host", "settings", "status"), [
    ("localhost", {}, 200),
    ("LOCALHOST:9000", {}, 200),
    ("127.0.0.1:1", {}, 200),
    ("[::1]:9000", {}, 200),
    ("evil.test", {}, 421),
    ("evil.test:9000", {}, 421),
    ("localhost.evil.test", {}, 421),
    ("127.0.0.1.evil.test", {}, 421),
    ("box.lan:9000", {"host": "box.lan"}, 200),
    ("other.lan", {"host": "box.lan"}, 421),
    ("a.test", {"allow_host": "a.test, B.test"}, 200),
    ("b.test:80", {"allow_host": "a.test, B.test"}, 200),
    ("c.test", {"allow_host": "a.test, B.test"}, 421),
    ("evil.test", {"host": "0.0.0.0"}, 200),
    ("evil.test", {"host": "::"}, 200),
    ("", {}, 421),
    (":9000", {}, 421),
    ("", {"host": "0.0.0.0"}, 200),
])  # fmt: skip
async def test_a_page_on_a_name_of_its_own_does_not_reach_the_server(host, settings, status):
    async with in_memory(**settings) as (client, _, _, _):
        for path in ("/health", "/__aura/health"):
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code == status
        if status == 421:
            assert host.rpartition(":")[0] in (await answer.get_json())["error"] and "--allow-host" in (await answer.get_json())["hint"]


@pytest.mark.parametrize(("line", "host", "status"), [
    ("GET http://evil.test/health HTTP/1.1", "localhost", 421),
    ("GET HTTP://EVIL.TEST:9000/health HTTP/1.1", "localhost", 421),
    ("GET http://localhost@evil.test/health HTTP/1.1", "localhost", 421),
    ("GET http:///health HTTP/1.1", "localhost", 421),
    ("GET http://evil.test/health HTTP/1.0", None, 421),
    ("GET http://localhost:9000/health HTTP/1.1", "localhost", 200),
    ("GET http://127.0.0.1?x HTTP/1.1", "evil.test", 200),
    ("GET /health HTTP/1.1", "", 421),
    ("GET /health HTTP/1.0", "", 421),
    ("GET /health HTTP/1.0", None, 200),  # there is none to check, and no page can make a browser send none
])  # fmt: skip
def test_the_host_in_a_request_s_target_counts_whatever_its_header_says(line, host, status, one_server):
    head = [line, *([] if host is None else [f"Host: {host}"]), "Connection: close", "", ""]
    with connect(one_server, "\r\n".join(head).encode()) as wire:
        assert int(read_until(wire, None).split()[1]) == status


@pytest.fixture(scope="module")
def one_server():
    """A server for all who only ask it something."""
    with running(event_delay=0) as aura:
        yield aura


async def test_control_sees_every_tenant_s_runs_whoever_it_says_it_is(autojump_clock):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r", headers={**BEARER, "X-Tenant-ID": "1"})
        listed = await (await client.get("/__aura/runs", headers={"X-Tenant-ID": "2"})).get_json()
        assert [run["runId"] for run in listed["runs"]] == ["r"]
        assert (await client.get("/__aura/runs/r", headers={"X-Tenant-ID": "2"})).status_code == 200


TOKEN = {"Authorization": "Bearer s3cret"}


@pytest.mark.parametrize(("settings", "peer", "headers", "status", "sentence"), [
    ({}, "127.0.0.1", {}, 200, ""),
    ({}, "127.8.9.1", {}, 200, ""),
    ({}, "::1", {}, 200, ""),
    ({}, "192.168.1.4", {}, 403, "callers on the server's own machine"),
    ({}, "::ffff:10.0.0.1", {}, 403, "callers on the server's own machine"),
    ({}, "127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403, "through a proxy"),
    ({}, "127.0.0.1", {"X-Forwarded-For": ""}, 403, "through a proxy"),
    ({}, "127.0.0.1", {"Forwarded": "for=x"}, 403, "through a proxy"),
    ({}, "127.0.0.1", {"Via": "1.1 x"}, 403, "through a proxy"),
    ({}, "127.0.0.1", {"Origin": "http://localhost:5173"}, 200, ""),
    ({}, "127.0.0.1", {"Origin": "https://[::1]:5173"}, 200, ""),
    ({}, "127.0.0.1", {"Origin": "http://evil.test"}, 403, "pages of another site"),
    ({}, "127.0.0.1", {"Origin": "http://localhost.evil.test"}, 403, "pages of another site"),
    ({}, "127.0.0.1", {"Origin": "null"}, 403, "pages of another site"),
    ({}, "127.0.0.1", {"Origin": ""}, 403, "pages of another site"),
    ({}, "127.0.0.1", {"Origin": "file://localhost"}, 403, "pages of another site"),
    ({}, "127.0.0.1", {"Origin": "http://localhost]"}, 403, "pages of another site"),
    ({"admin_token": " s3cret\n"}, "127.0.0.1", TOKEN, 200, ""),
    ({"admin_token": "\udcff"}, "127.0.0.1", TOKEN, 401, "ADMIN_TOKEN"),
    ({"admin_token": "\n"}, "127.0.0.1", {}, 200, ""),
    ({"admin_token": " \t\r\n"}, "192.168.1.4", {"Authorization": "Bearer "}, 403, "callers on the server's own machine"),
    ({"admin_token": "\n"}, "127.0.0.1", {"Authorization": "Bearer ", "Origin": "http://evil.test"}, 403, "pages of another site"),
    ({"admin_token": "\n"}, "127.0.0.1", {"Authorization": "Bearer  ", "Via": "1.1 x"}, 403, "through a proxy"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Bearer "}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Bearer"}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Bearer  s3cret "}, 200, ""),
    ({"cors_origin": "https://app.test"}, "127.0.0.1", {"Origin": "https://app.test"}, 403, "pages of another site"),
    ({"admin_token": "s3cret"}, "192.168.1.4", TOKEN | {"Via": "1.1 x", "Origin": "http://evil.test"}, 200, ""),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "bearer s3cret"}, 200, ""),
    ({"admin_token": "s3cret"}, "127.0.0.1", {}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Bearer s3cre"}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Basic s3cret"}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "s3cret"}, "127.0.0.1", {"Authorization": "Bearer 토큰"}, 401, "ADMIN_TOKEN"),
    ({"admin_token": "토큰"}, "127.0.0.1", {"Authorization": "Bearer 토큰"}, 200, ""),
    ({"auth": "off"}, "192.168.1.4", {}, 403, "callers on the server's own machine"),
])  # fmt: skip
async def test_control_is_for_whoever_may(settings, peer, headers, status, sentence):
    async with in_memory(**settings) as (client, _, _, _):
        client.peer = peer
        for method, path in (("GET", "/__aura/journal"), ("POST", "/api/admin/sse/restart"), ("GET", "/__aura/none")):
            answer = await client.open(path, method=method, headers=headers)
            assert answer.status_code == (404 if status == 200 and "none" in path else status)
            if status != 200:
                told = await answer.get_json()
                assert sentence in told.get("error", told.get("detail"))
                assert (answer.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)
        assert (await client.get("/__aura/health", headers=headers)).status_code == 200


def test_a_secret_s_file_with_nothing_in_it_is_no_token(tmp_path, heard):
    empty = tmp_path / "secret"
    empty.write_text("\n")
    settings = Settings.read({"host": "0.0.0.0"}, {"ADMIN_TOKEN": empty.read_text()})
    assert settings.admin_token == "", "control stays local"
    aura_stream.warn(settings)
    heard.wait_for("control (/__aura, /api/admin) is for callers on this machine: no ADMIN_TOKEN", within=0)
    for token in ("\n", " s3cret\n"):
        with running(admin_token=token) as aura:
            aura.reset()
            forged = httpx.get(f"{aura.url}/__aura/journal", headers={"Authorization": "Bearer", "X-Forwarded-For": "10.0.0.9"})
            assert forged.status_code == (401 if token.strip() else 403)


JOB_WAYS = [("GET", "/api/generation/jobs/j/events"), ("POST", "/api/v1/generations"), ("GET", "/api/v1/generations/active")]


@pytest.mark.parametrize(("headers", "settings", "comes"), [
    ({"Origin": "http://evil.test"}, {}, False),
    ({"Origin": "null"}, {}, False),
    ({"Origin": "http://localhost.evil.test"}, {}, False),
    ({"Origin": "http://evil.test", "Sec-Fetch-Site": "none"}, {}, False),
    ({"Sec-Fetch-Site": "cross-site"}, {}, False),  # what an <img> of any page sends
    ({"Origin": "http://localhost:5173"}, {"cors_origin": "https://app.test"}, False),
    ({"Origin": "https://app.test", "Sec-Fetch-Site": "cross-site"}, {"cors_origin": "https://app.test"}, True),
    ({"Origin": "http://localhost:5173", "Sec-Fetch-Site": "same-site"}, {}, True),
    ({"Sec-Fetch-Site": "same-origin"}, {}, True),
    ({"Sec-Fetch-Site": "same-site"}, {}, True),
    ({"Sec-Fetch-Site": "none"}, {}, True),
    ({"Origin": "http://box.lan:9000", "Host": "box.lan:9000"}, {"host": "box.lan"}, True),  # its own page, under its name
    ({"Origin": "http://box.lan:8080", "Host": "box.lan:9000"}, {"host": "box.lan"}, False),
    ({}, {}, True),
])  # fmt: skip
async def test_no_page_of_another_site_starts_or_watches_a_job(headers, settings, comes, autojump_clock):
    """These routes need no token, and any page can make a browser send such a GET or a plain POST."""
    async with in_memory(**settings) as (client, hub, _, _):
        for method, path in JOB_WAYS:
            answer = await client.open(path, method=method, headers={"Content-Type": "text/plain", **headers}, data=b"{}" if method == "POST" else b"")
            if comes:
                assert answer.status_code == (201 if method == "POST" else 200)
            else:
                told = await answer.get_json()
                assert answer.status_code == 403
                assert "pages of another site" in told["error"] and "--cors-origin" in told["hint"]
                assert "Access-Control-Allow-Origin" not in answer.headers
        assert bool(hub.seen_by(None)) == comes
        assert (await client.get("/health", headers=headers)).status_code == 200, "what starts nothing is for all"


async def test_refusals_come_in_their_order_where_no_token_is_needed():
    foreign, asks = {"Origin": "http://evil.test"}, {"Access-Control-Request-Method": "POST"}
    whole = "?scenario=%7B%22name%22:%22x%22%7D"
    async with in_memory() as (client, _, _, _):
        assert (await client.get("/api/generation/jobs/j/events", headers={**foreign, "Host": "evil.test"})).status_code == 421
        assert (await client.options("/api/v1/generations", headers={**foreign, **asks})).status_code == 204
        for path in (f"/api/generation/jobs/j/events{whole}", "/api/v1/generations/nobody"):
            assert (await client.get(path, headers=foreign)).status_code == 403
        assert (await client.get(f"/api/v1/generations/nobody/events{whole}")).status_code == 404


async def test_where_no_token_is_needed_a_scenario_is_a_name(autojump_clock):
    """In the header, the query or the body; one of one's own is bound beforehand, by whoever may."""
    own = {"name": "own", "run": says("own")}
    text, plain = json.dumps(own), {"Content-Type": "text/plain"}
    watch, make = "/api/generation/jobs/j/events", "/api/v1/generations"
    async with in_memory() as (client, hub, _, _):
        made = (await (await client.post(make, json={})).get_json())["jobId"]
        for answer in (
            await client.get(f"{watch}?scenario={quote(text)}"), await client.get(watch, headers={"X-Aura-Scenario": text}),
            await client.get(f"{make}/{made}/events?scenario={quote(text)}"), await client.post(f"{make}?scenario={quote(text)}", data=b"", headers=plain),
            await client.post(make, headers=plain, data=json.dumps({"scenario": own}).encode()), await client.post(make, json={"scenario": text}),
            await client.post(make, json={"scenario": 5}), await client.get(f"{watch}?scenario=%7B"),
        ):  # fmt: skip
            told = await answer.get_json()
            assert answer.status_code == 400 and "a name of the catalogue" in told["error"]
            assert "--scenarios FILE" in told["hint"] and "POST /__aura/next" in told["hint"]
        assert [run.info.run_id for run in hub.seen_by(None)] == [made], "nothing was started"
        assert (await client.get(f"{watch}?scenario=dorp")).status_code == 400
        named = await client.get(f"{watch}?scenario=failed")
        assert (named.status_code, named.headers["X-Aura-Scenario"]) == (200, "failed")
        assert (await client.post("/__aura/next", json={"scenario": own, "caseId": "p"})).status_code == 200
        bound = (await (await client.post(make, json={"projectId": "p"})).get_json())["jobId"]
        assert [name for name, _ in said(await ended(hub.find(bound)))] == ["own"]
        assert (await triggered(client, scenario=own))[0].headers["X-Aura-Scenario"] == "own", "with a token, as ever"


@pytest.mark.parametrize(("settings", "origin", "readable"), [
    ({}, "http://localhost:5173", True),
    ({}, "https://localhost", True),
    ({}, "http://127.0.0.1:3000", True),
    ({}, "http://localhost.evil.test:3000", False),
    ({}, "http://localhost:3000.evil.test", False),
    ({}, "http://evil.test", False),
    ({}, "null", False),
    ({"cors_origin": "https://app.test"}, "https://app.test", True),
    ({"cors_origin": "https://app.test"}, "http://app.test", False),
    ({"cors_origin": "https://app.test"}, "https://app.test:8443", False),
    ({"cors_origin": "https://app.test"}, "http://localhost:3000", False),
    ({"cors_origin": "a.test:8080, https://b.test"}, "http://a.test:8080", True),
    ({"cors_origin": "a.test:8080, https://b.test"}, "https://x.test", False),
    ({"cors_origin": "*"}, "null", True),
    ({"cors_origin": ""}, "http://localhost:3000", False),
])  # fmt: skip
async def test_a_page_of_a_known_origin_may_read_every_answer(settings, origin, readable, autojump_clock):
    """Also a 401, which the browser hid for weeks; and what a preflight says needs no token."""
    async with in_memory(**settings) as (client, _, _, _):
        await triggered(client, runId="r")
        for path, headers, status in (
            ("/aura/analysis-runs/r/stream", {}, 401),
            ("/aura/analysis-runs/r/stream", BEARER, 200),
            ("/aura/analysis-runs/none/stream", BEARER, 404),
            ("/health", {}, 200),
            ("/nowhere", {}, 404),
        ):
            answer = await client.get(path, headers={"Origin": origin, **headers})
            assert answer.status_code == status
            assert answer.headers.get("Access-Control-Allow-Origin") == (origin if readable else None)
            assert answer.headers["Vary"] == "Origin"
            if readable:
                assert answer.headers["Access-Control-Allow-Credentials"] == "true"
                assert "X-Aura-Attempt" in answer.headers["Access-Control-Expose-Headers"]
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,last-event-id"}
        for path in ("/aura/cases/1/analysis-runs", "/api/aura/cases/1/analysis-runs", "/__aura/reset", "/nowhere"):
            preflight = await client.options(path, headers=asks)
            assert (preflight.status_code, await preflight.get_data()) == (204, b"")
            assert preflight.headers.get("Access-Control-Allow-Origin") == (origin if readable else None)
            assert {"Authorization", "Last-Event-ID", "X-Tenant-ID", "X-Aura-Scenario"} <= set(preflight.headers["Access-Control-Allow-Headers"].split(", "))
            assert preflight.headers["Access-Control-Max-Age"] == "3600"
        assert (await client.options("/aura/cases/1/analysis-runs", headers={**asks, "Host": "evil.test"})).status_code == 421


async def test_without_an_origin_nothing_speaks_of_origins():
    async with in_memory() as (client, _, _, _):
        answer = await client.get("/health")
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


OPEN_ROUTES = {"/", "/health", "/metrics", "/__aura/health"}  # of the contract; and below the two prefixes


async def all_routes():
    """(method, rule) of every route there is."""
    app = create_app(Settings(), BoundedHub(Settings(), None))
    return sorted({(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods - {"OPTIONS"}})


ROUTES = trio.run(all_routes)


def is_open(rule):
    return rule in OPEN_ROUTES or rule.startswith(("/api/generation/", "/api/v1/generations"))


SECRET = "secret-run-of-tenant-1"


def path_of(rule, run_id):
    """A path to try: with ids, and with the query that the route needs."""
    path = rule.replace("<run_id>", run_id).replace("<job_id>", run_id).replace("<case_id>", "secret-case")
    path = path.replace("<int:number>", "1").replace("<name>", "ok")
    return path + (f"?runId={run_id}" if path.endswith("analysis/stream") else "")


@contextlib.asynccontextmanager
async def with_a_secret(**settings):
    """The application in memory, with a run and a job of tenant 1 that live."""
    async with in_memory(**settings) as (client, hub, _, _):
        client.peer = "127.0.0.1"
        waiting = Scenario("w", parse_script([*says("secret-event"), {"wait": "for-ever"}], "run"))
        for run_id, phase in ((SECRET, "phase2"), (f"job-{SECRET}", "generation")):
            hub.start(ScriptedInfo(run_id, "secret-case", "1", phase, {}, hub.clock), waiting)
        await trio.testing.wait_all_tasks_blocked()
        yield client


@pytest.mark.parametrize(("method", "rule"), ROUTES)
async def test_no_route_opens_for_a_stranger(method, rule):
    """Without a token, under a foreign name, from a foreign page, through a proxy: nothing is done, nothing is told."""
    control = rule.startswith(("/__aura", "/api/admin"))
    tries, token = [({"Host": "evil.test"}, 421)], []
    if control and not is_open(rule):
        tries += [({"Origin": "http://evil.test"}, 403), ({"Origin": "null"}, 403), ({"Via": "1.1 x"}, 403), ({"X-Forwarded-For": "::1"}, 403)]
        token = [({}, 401), (BEARER, 401)]
    elif rule.startswith(("/api/generation/", "/api/v1/generations")):
        tries += [({"Origin": "http://evil.test"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403)]
    elif not is_open(rule):
        tries += [({}, 401), ({"Authorization": "Basic x"}, 401), ({"X-Tenant-ID": "1"}, 401)]
    await strangers_are_turned_away(method, rule, tries)
    await strangers_are_turned_away(method, rule, token, admin_token="s3cret")


async def strangers_are_turned_away(method, rule, tries, **settings):
    control = rule.startswith(("/__aura", "/api/admin"))
    async with with_a_secret(**settings) as client:
        for headers, status in tries:
            for prefix, tenant, expect in (("", {}, status), ("/api", {}, 421 if status == 421 else 400), ("/api", {"X-Tenant-ID": "1"}, status)):
                if prefix and (control or not rule.startswith("/aura/")):
                    continue
                expect = status if "X-Tenant-ID" in headers else expect
                answer = await client.open(prefix + path_of(rule, SECRET), method=method, headers={**tenant, **headers})
                assert answer.status_code == expect, (prefix, headers)
                told = str(answer.headers) + str(await answer.get_data())
                assert "secret" not in told.replace("ADMIN_TOKEN", "")
            state = await client.get(f"/aura/cases/1/analysis-runs/{SECRET}", headers={**BEARER, "X-Tenant-ID": "1"})
            assert (await state.get_json())["status"] == "running", "nothing was done"


async def test_another_tenant_cannot_tell_even_with_a_scenario_that_needs_no_run(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        for case in ("85", "85~empty"):
            await client.post(f"/aura/cases/{case}/analysis-runs", headers={**BEARER, "X-Tenant-ID": "1"}, json={"runId": "theirs~empty"})
            await client.post(f"/aura/cases/{case}/analysis-runs", headers={**BEARER, "X-Tenant-ID": "1"}, json={})
        answers = []
        for run_id in ("theirs~empty", "nobody~empty"):
            for query in ("", "?scenario=empty", "?scenario=first-chunk-then-close"):
                answer = await client.get(f"/aura/analysis-runs/{run_id}/stream{query}", headers={**BEARER, "X-Tenant-ID": "2"})
                answers.append((answer.status_code, await answer.get_data(), answer.headers["x-aura-attempt"], answer.headers["x-aura-scenario"]))
        assert answers[:3] == answers[3:] and {answer[0] for answer in answers} == {200}
        first = await client.post("/aura/cases/85/analysis-runs", headers={**BEARER, "X-Tenant-ID": "2"}, json={})
        assert first.headers["X-Aura-Attempt"] == "1", "nor how often others have asked about a case"
        long = "x" * 300
        await client.post("/aura/cases/1/analysis-runs", headers={**BEARER, "X-Tenant-ID": long + "1"}, json={"runId": "long"})
        assert (await client.get("/aura/cases/1/analysis-runs/long", headers={**BEARER, "X-Tenant-ID": long + "2"})).status_code == 404
    async with in_memory(max_sse_connections=0) as (client, hub, _, _):
        await triggered(client, runId="theirs", headers={**BEARER, "X-Tenant-ID": "1"})
        for query, status in (("", 404), ("?scenario=empty", 503)):
            answer = await client.get(f"/aura/analysis-runs/theirs/stream{query}", headers={**BEARER, "X-Tenant-ID": "2"})
            assert answer.status_code == status
        assert (await client.get("/api/v1/generations/nobody/events")).status_code == 503


@pytest.mark.parametrize(("method", "rule"), [
    (method, rule) for method, rule in ROUTES
    if not rule.startswith(("/__aura", "/api/admin")) and ("<run_id>" in rule or "<job_id>" in rule or "analysis/stream" in rule)
])  # fmt: skip
async def test_another_tenant_cannot_tell_a_run_that_is_there_from_one_that_is_not(method, rule):
    """(The job's stream starts what is not there, so there the two differ, as the contract wants.)"""
    for secret in (SECRET, f"job-{SECRET}"):
        async with with_a_secret() as client:
            answers = []
            for run_id in (secret, "x" * len(secret)):
                if run_id != secret and rule.startswith("/api/generation/jobs") and method == "GET":
                    answers.append(answers[0])
                    continue
                answer = await client.open(path_of(rule, run_id), method=method, headers={**BEARER, "X-Tenant-ID": "2"})
                body = (await answer.get_data()).decode().replace(run_id, "ID")
                headers = {name: text for name, text in answer.headers.items() if name not in ("x-request-id", "x-aura-run-id")}
                answers.append((answer.status_code, body, headers))
            assert answers[0] == answers[1]
            assert answers[0][0] == (204 if rule.startswith("/api/v1/generations") and method == "DELETE" else 404)


@pytest.mark.parametrize("secret", [SECRET, f"job-{SECRET}"])
async def test_another_tenant_cannot_trigger_what_is_not_its_own(secret):
    async with with_a_secret() as client:
        for path in ("/aura/cases/1/analysis-runs", "/aura/internal/cases/1/analysis-runs", "/aura/cases/1/analysis/trigger"):
            answer = await client.post(path, headers={**BEARER, "X-Tenant-ID": "2"}, json={"runId": secret})
            told = await answer.get_json()
            assert (answer.status_code, told["error"]) == (404, "runId not found or already completed")
            assert "secret-case" not in json.dumps(told) and "0 live" in told["hint"]
        watched = await client.get(f"/api/generation/jobs/{secret}/events", headers={"X-Tenant-ID": "2"})
        assert (watched.status_code, (await watched.get_json())["error"]) == (404, "there is no such job")
        for listed in ("active", "_stats"):
            told = await (await client.get(f"/api/v1/generations/{listed}", headers={"X-Tenant-ID": "2"})).get_json()
            assert told.get("total_active", told.get("job_statistics", {}).get("total_jobs")) == 0


@pytest.mark.parametrize(("tenant", "status", "body"), [
    (None, 400, b""),
    ("", 400, b""),
    ("  ", 400, b""),
    ("acme", 400, b'{"error": "X-Tenant-ID must be numeric (e.g. 1) for Aura API."}'),
    ("1.5", 400, b'{"error": "X-Tenant-ID must be numeric (e.g. 1) for Aura API."}'),
    ("\u0661", 400, b'{"error": "X-Tenant-ID must be numeric (e.g. 1) for Aura API."}'),
    ("1", 200, None),
])  # fmt: skip
async def test_the_gateway_wants_a_numeric_tenant(tenant, status, body, autojump_clock):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r")
        named = {} if tenant is None else {"X-Tenant-ID": tenant}
        for path in ("/api/aura/analysis-runs/r/stream", "/api/aura/cases/1/analysis/stream?runId=r", "/api/synapse/analysis-runs/r/stream"):
            answer = await client.get(path, headers={**BEARER, **named})
            assert answer.status_code == status
            assert body is None or await answer.get_data() == body
            assert answer.headers["X-Trace-Id"] and answer.headers["X-Gateway-Request-Id"] == answer.headers["X-Request-ID"]
            unauthorized = await client.get(path, headers=named)
            assert unauthorized.status_code == (401 if status == 200 else 400), "the tenant comes first"
        assert (await client.get("/api/synapse/other", headers={**BEARER, **named})).status_code == (404 if status == 200 else 400)


async def test_the_gateway_is_the_same_server(autojump_clock):
    """The same handlers, bytes and runs; trace ids, defaults, and the four headers of a stream whatever its script."""
    gone = {"x-accel-buffering": None, "cache-control": None, "x-trace-id": None, "x-gateway-request-id": None, "content-type": "Text/Event-Stream"}
    bare = {"name": "bare", "stream": [{"open": {"headers": gone}}, {"relay": "all"}]}
    async with in_memory() as (client, _, _, _):
        tenant = {**BEARER, "X-Tenant-ID": " 7 ", "X-Trace-ID": "trace-1", "X-User-ID": "u", "X-Agent-ID": "a"}
        accepted = await client.post("/api/aura/cases/1/analysis-runs", headers=tenant, json={"runId": "r"})
        assert accepted.status_code == 202 and accepted.headers["X-Trace-Id"] == "trace-1"
        through = await client.get("/api/synapse/analysis-runs/r/stream", headers=tenant)
        direct = await client.get("/aura/analysis-runs/r/stream", headers=BEARER)
        assert await through.get_data() == await direct.get_data()
        assert "X-Trace-Id" not in direct.headers
        odd = await client.get("/api/synapse/analysis-runs/r/stream", headers={**tenant, "X-Aura-Scenario": json.dumps(bare)})
        assert odd.headers.items() >= aura_stream.STREAM_HEAD.items() and odd.headers["x-trace-id"] == "trace-1" and odd.headers["x-gateway-request-id"]
        forged = await client.get("/api/aura/analysis-runs/r/stream", headers={**tenant, "X-Trace-ID": "a b"})
        assert re.fullmatch("[0-9a-f]{32}", forged.headers["X-Trace-Id"])
        for elsewhere in ("/api/auth/login", "/api/auth/policy", "/api/auth/idp", "/api/monitoring/visits"):
            assert (await client.get(elsewhere)).status_code == 404
        assert (await client.get("/api/aura/analysis-runs//stream", headers=tenant)).status_code == 400
        entries = (await control(client, "GET", "journal?kind=stream"))["entries"]
        assert entries[0]["path"] == "/api/synapse/analysis-runs/r/stream"
        assert (entries[0]["tenantId"], entries[0]["headers"]["x-dwp-source"], entries[0]["headers"]["x-dwp-caller-type"]) == ("7", "FRONTEND", "USER")
        assert entries[0]["headers"]["x-trace-id"] == "trace-1" and entries[1]["headers"]["x-dwp-source"] is None
        calls = (await control(client, "GET", "journal?view=calls&kind=stream"))["entries"]
        assert set(calls[0]) == {"path", "statusCode", "latency", "tenantId", "userId", "agentId", "end"}
        assert [calls[0][name] for name in ("path", "statusCode", "tenantId", "userId", "agentId")] == [
            "/api/synapse/analysis-runs/r/stream", 200, "7", "u", "a"]  # fmt: skip


async def test_a_hint_costs_little_whatever_lives_here():
    """The closest runId is looked for among few and short ones: the worst of them cost everybody a second and a half."""
    async with in_memory() as (client, hub, _, _):
        chance = random.Random(1)
        ids = ["aaa" + "".join(chance.choices("ab", k=196)) for _ in range(500)]
        for run_id in ("analysis-2026-11-21-0001", *ids, *(f"other-{n}" for n in range(100))):
            hub.start(ScriptedInfo(run_id, "1", None, "phase2", {}, hub.clock), Scenario("s", parse_script(["hang"], "run")))
        began = time.perf_counter()
        for run_id in ids[:20]:
            await client.get(f"/aura/analysis-runs/{run_id[:-1]}/stream", headers=BEARER)
        assert (time.perf_counter() - began) / 20 < 0.1, "five times the slack"
        for mistyped in ("analysis-2026-11-21-001", "analysys-2026-11-21-0001"):
            answer = await client.get(f"/aura/analysis-runs/{mistyped}/stream", headers=BEARER)
            assert "did you mean 'analysis-2026-11-21-0001'?" in (await answer.get_json())["hint"]


@pytest.mark.parametrize(("path", "headers", "status", "why"), [
    ("/health", {"Host": "evil.test"}, 421, "this server does not answer to the name 'evil.test'"),
    ("/api/aura/analysis-runs/r/stream", BEARER, 400, "no tenant"),
    ("/api/aura/analysis-runs/r/stream", {**BEARER, "X-Tenant-ID": "x"}, 400, "X-Tenant-ID must be numeric"),
    ("/aura/analysis-runs/r/stream", {}, 401, "Missing authorization header"),
    ("/__aura/runs", {"Via": "x"}, 403, "this is for callers on the server's own machine"),
    ("/api/generation/jobs/j/events", {"Origin": "http://evil.test"}, 403, "this needs no token, so it is not for pages of another site"),
    ("/api/generation/jobs/j/events?scenario=%7B%7D", {}, 400, "where no token is needed, a scenario is a name of the catalogue"),
    ("/aura/cases/1/analysis/stream", BEARER, 422, "[{'loc': ['query', 'runId'], 'msg': 'the query needs runId="),
    ("/aura/analysis-runs/none/stream", BEARER, 404, "runId not found or already completed"),
    ("/aura/analysis-runs/r/stream", {**BEARER, "X-Tenant-ID": "2"}, 404, "runId not found or already completed"),
    ("/aura/analysis-runs/r/stream", {**BEARER, "Last-Event-ID": "11"}, 204, "finished and fully seen"),
    ("/aura/analysis-runs/r/stream", {**BEARER, "X-Aura-Scenario": "nonsense"}, 400, "unknown scenario"),
    ("/aura/analysis-runs/r/stream", {**BEARER, "X-Aura-Scenario": "{"}, 422, "[{'loc': ['scenario'], 'msg': 'this is not JSON"),
    ("/nowhere", {}, 404, "Not Found: "),
])  # fmt: skip
async def test_why_a_request_was_refused_is_in_log_and_journal(path, headers, status, why, autojump_clock, heard):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r", headers={**BEARER, "X-Tenant-ID": "1"})
        await trio.sleep(10)
        answer = await client.get(path, headers=headers)
        assert answer.status_code == status
        heard.wait_for(f"[{answer.headers['X-Request-ID']}] {status} refused: {why}")
        if not path.startswith("/__aura"):
            entry = (await control(client, "GET", "journal"))["entries"][-1]
            assert f"refused: {why}" in entry["said"]
            assert entry["kind"] == "request" or f"refused: {why}" in entry["end"]["reason"]


async def test_a_token_in_the_query_is_never_told(autojump_clock, heard):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r")
        for path in ("/aura/analysis-runs/r/stream", "/aura/analysis-runs/none/stream", "/nowhere"):
            answer = await client.get(f"{path}?access_token=hush-hush")
            assert b"hush" not in await answer.get_data() and "hush" not in str(answer.headers)
        assert "hush" not in json.dumps(await control(client, "GET", "journal"))
        assert "hush" not in " ".join(heard.all())


# ═══ 10  HTTP ═══════════════════════════════════════════════════════════════════════════════════


async def triggered(client, case="85116", headers=None, **body):
    answer = await client.post(f"/aura/cases/{case}/analysis-runs", headers={**BEARER, **(headers or {})}, json=body)
    assert answer.status_code == 202, await answer.get_data()
    return answer, await answer.get_json()


async def read(client, run_id, **headers):
    answer = await client.get(f"/aura/analysis-runs/{run_id}/stream", headers={**BEARER, **headers})
    return answer, await answer.get_data()


async def test_the_phase2_trigger_answers_as_written(autojump_clock):
    async with in_memory(instance="i1") as (client, _, _, _):
        answer, body = await triggered(client, runId="test run+1", unknownField=1)
        assert list(body) == ["status", "runId", "caseId", "streamUrl"]
        assert body == {"status": "ACCEPTED", "runId": "test run+1", "caseId": "85116",
                        "streamUrl": "/aura/analysis-runs/test%20run%2B1/stream"}  # fmt: skip
        assert answer.headers["X-Aura-Run"] == "started"
        assert answer.headers["X-Aura-Run-ID"] == "test%20run+1"
        assert answer.headers["X-Aura-Instance"] == "i1"
        assert (answer.headers["X-Aura-Scenario"], answer.headers["X-Aura-Attempt"]) == ("ok", "1")


async def test_the_phase3_trigger_answers_as_written(autojump_clock):
    async with in_memory() as (client, _, _, _):
        answer = await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json={"runId": "r", "artifacts": {}})
        path = "/aura/cases/1/analysis/stream?runId=r"
        assert (answer.status_code, await answer.get_json()) == (202, {"accepted": True, "runId": "r", "streamPath": path})
        streamed = await client.get(path, headers=BEARER)
        events = parsed(await streamed.get_data())
        assert [name for _, name, _ in events] == (
            ["started", "step", "step", "agent", "step", "agent", "step", "step", "completed"]
        )
        assert json.loads(events[-1][2]) == {"runId": "r", "status": "completed"}


@pytest.mark.parametrize(("headers", "query", "stage"), [
    ({"X-Aura-Test-Fail": "rag"}, "", "rag"), ({}, "?test_fail_query=llm", "llm"), ({"X-Aura-Test-Fail": "x"}, "", None),
    ({"X-Aura-Test-Fail": "rag"}, "?test_fail_query=llm", "rag"),
])  # fmt: skip
async def test_a_phase3_test_failure_ends_as_the_real_one_would(headers, query, stage, autojump_clock):
    async with in_memory() as (client, _, _, _):
        url = f"/aura/internal/cases/1/analysis-runs{query}"
        await client.post(url, headers={**BEARER, **headers}, json={"runId": "r"})
        _, data = await read(client, "r")
        last = json.loads(parsed(data)[-1][2])
        if stage is None:
            assert last["status"] == "completed"
        else:
            message = f"Simulated {stage.upper()} failure (X-Aura-Test-Fail: {stage})"
            assert last["error"] == {"message": message, "stage": stage}


@pytest.mark.parametrize(("given", "expected"), [(7, "7"), ("9f1c-x", "9f1c-x"), (1.5, "1.5"), ("한글", "한글")])
async def test_a_run_id_is_taken_as_it_comes(given, expected, autojump_clock):
    async with in_memory() as (client, _, _, _):
        _, body = await triggered(client, runId=given)
        assert body["runId"] == expected
        answer = await client.get(body["streamUrl"], headers=BEARER)
        assert answer.status_code == 200
        assert answer.headers["X-Aura-Run-ID"].isascii()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"runId": null}', b'{"runId": ""}', b"  "])
async def test_a_missing_run_id_is_minted(body, autojump_clock):
    async with in_memory() as (client, _, _, _):
        answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, data=body)
        assert re.fullmatch(r"[0-9a-f-]{36}", (await answer.get_json())["runId"])


async def test_the_same_run_id_is_the_same_run_until_its_window_is_over(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        first, body = await triggered(client, runId="r")
        again, same = await triggered(client, runId="r")
        assert (first.headers["X-Aura-Run"], again.headers["X-Aura-Run"]) == ("started", "known")
        assert body == same
        assert again.headers["X-Aura-Attempt"] == "2"
        run = await ended(hub.find("r"))
        await trio.sleep(9)
        assert (await triggered(client, runId="r"))[0].headers["X-Aura-Run"] == "known"
        await trio.sleep(2)
        assert (await triggered(client, runId="r"))[0].headers["X-Aura-Run"] == "started"
        assert hub.find("r") is not run
        _, data = await read(client, "r")
        assert len(parsed(data)) == 11


async def test_another_scenario_for_a_known_run_is_a_conflict(autojump_clock):
    inline = {"name": "mine", "run": says("a")}
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r", scenario=inline)
        assert (await triggered(client, runId="r", scenario=inline))[0].headers["X-Aura-Run"] == "known"
        for other in ({"name": "mine", "run": []}, "ok"):
            answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": "r", "scenario": other})
            assert answer.status_code == 409
        _, data = await read(client, "r")
        assert parsed(data) == [("1", "a", '{"n": "a"}')]


async def test_an_inline_scenario_runs_and_is_checked(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        steps = [{"repeat": 3, "steps": [{"event": {"event": "turn", "data": {"n": "{n}", "run": "{runId}"}}}]}]
        served = [{"comment": "hi"}, {"relay": "all"}]
        answer, _ = await triggered(client, runId="r", scenario={"name": "mine", "run": steps, "stream": served})
        assert answer.headers["X-Aura-Scenario"] == "mine"
        _, data = await read(client, "r")
        assert data.startswith(b": hi\n\n")
        assert [json.loads(text) for _, _, text in parsed(data)] == [{"n": str(n), "run": "r"} for n in (1, 2, 3)]
        bad = await client.post("/aura/cases/1/analysis-runs", headers=BEARER,
                                json={"scenario": {"name": "mine", "stream": [{"slep": 1}]}})  # fmt: skip
        assert (bad.status_code, (await bad.get_json())["at"]) == (422, "stream[0]")
        unknown = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"scenario": "okk"})
        assert unknown.status_code == 400
        assert (await unknown.get_json())["didYouMean"] == ["ok"]
        assert hub.live == 0


async def test_the_stream_has_its_headers_and_its_bytes(autojump_clock):
    async with in_memory(instance="i1") as (client, _, _, _):
        await triggered(client, runId="r")
        for attempt, path in enumerate(("/aura/analysis-runs/r/stream", "/aura/cases/any/analysis/stream?runId=r"), 1):
            answer = await client.get(path, headers=BEARER)
            data = await answer.get_data()
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["Cache-Control"] == "no-cache, no-store, no-transform"
            assert answer.headers["X-Accel-Buffering"] == "no"
            assert answer.headers["X-Aura-Attempt"] == str(attempt)
            assert (data[:13], data[-14:]) == (b": connected\n\n", DONE)
            assert [int(number) for number, _, _ in parsed(data)] == list(range(1, 12))


async def test_post_sse_answers_with_the_bytes_of_the_stream(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        answer = await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, json={"runId": "r"})
        data = await answer.get_data()
        assert (answer.status_code, answer.headers["X-Aura-Attempt"]) == (200, "1")
        again, same = await read(client, "r")
        assert data == same
        assert again.headers["X-Aura-Attempt"] == "2"
        attached = await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, json={"runId": "r"})
        assert await attached.get_data() == data
        bad = await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, data=b"[]")
        assert bad.status_code == 422


@pytest.mark.parametrize(("path", "expected"), [
    ("/aura/cases/1/analysis-runs", {"status": "disabled", "message": "Analysis disabled (DEMO_OFF)"}),
    ("/aura/internal/cases/1/analysis-runs", {"accepted": False, "runId": "r", "message": "Analysis disabled (DEMO_OFF)"}),
    ("/aura/cases/1/analysis/trigger", {"status": "disabled", "message": "Analysis disabled (DEMO_OFF)"}),
])  # fmt: skip
async def test_demo_off_starts_nothing(path, expected):
    async with in_memory(demo_off=True) as (client, hub, _, _):
        answer = await client.post(path, headers=BEARER, json={"runId": "r"})
        assert (answer.status_code, json.loads(await answer.get_data())) == (200, expected)
        assert hub.live == 0


async def test_finished_and_fully_seen_is_a_204(autojump_clock):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r")
        await read(client, "r")
        for query, headers in (("", {"Last-Event-ID": "11"}), ("?lastEventId=r_11", {}), ("?last-event-id=11", {})):
            answer = await client.get(f"/aura/analysis-runs/r/stream{query}", headers={**BEARER, **headers})
            assert (answer.status_code, await answer.get_data()) == (204, b"")
        for query, headers, first in (
            ("", {"Last-Event-ID": "9"}, 10), ("?lastEventId=9", {}, 10), ("", {"Last-Event-ID": "12"}, 1),
            ("?lastEventId=9", {"Last-Event-ID": "10"}, 11), ("", {"Last-Event-ID": "x"}, 1),
        ):  # fmt: skip
            answer = await client.get(f"/aura/analysis-runs/r/stream{query}", headers={**BEARER, **headers})
            assert parsed(await answer.get_data())[0][0] == str(first)


@pytest.mark.parametrize(("scenario", "statuses"), [
    ("ok", [200, 204, 204, 204]), ("korean", [200, 204, 204, 204]), ("expired-run", [200, 404, 404, 404]),
    ("other-worker", [200, 404, 200, 404]), ("unavailable", [503, 200, 204, 204]), ("refuse-3-then-ok", [503, 503, 503, 200, 204]),
    ("gone-204", [204, 204]), ("no-done", [200, 200, 200]), ("generation", [200, 204, 204]),
    ({"name": "third", "stream": [["open", "end"], [{"open": {"status": 500}}], [{"comment": "third"}]]}, [200, 500, 200, 200]),
])  # fmt: skip
async def test_a_script_plays_also_to_whoever_has_seen_everything(scenario, statuses, autojump_clock):
    """The 204 stands in place of an ordinary stream only: one that is implied, or that an exhausted list repeats."""
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario=scenario)
        await ended(hub.find("r"))
        last = {"Last-Event-ID": str(hub.find("r").log.last)}
        found = [(await read(client, "r", **(last if number else {})))[0].status_code for number in range(len(statuses))]
        assert found == statuses


async def test_an_unknown_run_is_a_404_that_helps(autojump_clock, heard):
    async with in_memory(instance="i1", retention=100) as (client, hub, _, _):
        await triggered(client, runId="test-run-001", scenario={"name": "s", "run": [{"sleep": 250}]})
        answer, _ = await read(client, "test-run-002")
        body = await answer.get_json()
        assert answer.status_code == 404
        assert body["error"] == "runId not found or already completed"
        assert body["hint"] == "no such run on instance i1, where 1 live; did you mean 'test-run-001'?"
        await ended(hub.find("test-run-001"))
        await trio.sleep(101)
        _, data = await read(client, "test-run-001")
        assert "was forgotten by instance i1" in json.loads(data)["hint"]
        empty = await client.get("/aura/analysis-runs//stream", headers=BEARER)
        assert (empty.status_code, await empty.get_json()) == (400, {"error": "runId is required", "runId": None})
        blank = await client.get("/aura/cases/1/analysis/stream?runId=", headers=BEARER)
        assert blank.status_code == 400
        missing = await client.get("/aura/cases/1/analysis/stream", headers=BEARER)
        assert (missing.status_code, (await missing.get_json())["detail"][0]["loc"]) == (422, ["query", "runId"])
    heard.wait_for("INFO analysis_run_stream: runId not found or already completed run_id=test-run-002")


async def test_the_old_servers_200_for_unknown_runs_can_be_had():
    async with in_memory(unknown_run="200") as (client, _, _, _):
        answer, data = await read(client, "none")
        assert (answer.status_code, json.loads(data)["error"]) == (200, "runId not found or already completed")


async def test_another_tenants_run_does_not_exist(autojump_clock):
    mine, other = {"X-Tenant-ID": "1"}, {"X-Tenant-ID": "2"}
    async with in_memory() as (client, _, _, _):
        await triggered(client, headers=mine, runId="test-run-001")
        await triggered(client, runId="nobodys", scenario={"name": "s", "run": [{"sleep": 99}]})
        for method, path in (
            ("GET", "/aura/analysis-runs/test-run-001/stream"), ("HEAD", "/aura/analysis-runs/test-run-001/stream"),
            ("GET", "/aura/cases/85116/analysis/stream?runId=test-run-001"),
            ("GET", "/aura/cases/85116/analysis-runs/test-run-001"), ("DELETE", "/aura/cases/85116/analysis-runs/test-run-001"),
            ("POST", "/aura/cases/85116/analysis-runs"), ("POST", "/aura/cases/85116/analysis/trigger"),
        ):  # fmt: skip
            body = {"json": {"runId": "test-run-001"}} if method == "POST" else {}
            answer = await client.open(path, method=method, headers={**BEARER, **other}, **body)
            assert answer.status_code == 404, (method, path)
            if method != "HEAD":
                said_so = (await answer.get_data()).decode()
                assert "where 1 live" in said_so
                assert "did you mean" not in said_so
        for who in (mine, {}):
            assert (await client.get("/aura/cases/1/analysis-runs/test-run-001", headers={**BEARER, **who})).status_code == 200
        assert (await client.get("/aura/cases/1/analysis-runs/nobodys", headers={**BEARER, **other})).status_code == 200
        await read(client, "test-run-001")
        for who, status in ((mine, 200), ({}, 200), (other, 404)):
            assert (await client.get("/aura/cases/85116/analysis", headers={**BEARER, **who})).status_code == status


async def test_a_run_has_a_state_can_be_cancelled_and_leaves_a_result(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), {"sleep": 250}]})
        state_url = "/aura/cases/85116/analysis-runs/r"
        await trio.testing.wait_all_tasks_blocked()
        state = await (await client.get(state_url, headers=BEARER)).get_json()
        assert (state["status"], state["events"], state["phase"], state["endedAt"]) == ("running", 1, "phase2", None)
        assert (await client.get("/aura/cases/85116/analysis", headers=BEARER)).status_code == 404
        cancelled = await client.delete(state_url, headers=BEARER)
        assert (cancelled.status_code, await cancelled.get_json()) == (202, {"status": "CANCELLED", "runId": "r"})
        _, data = await read(client, "r")
        assert json.loads(parsed(data)[-1][2])["stage"] == "cancelled"
        assert data.endswith(DONE)
        again = await client.delete(state_url, headers=BEARER)
        assert (again.status_code, await again.get_json()) == (200, {"status": "cancelled", "runId": "r"})
        await triggered(client, runId="r2")
        _, data = await read(client, "r2")
        result = await (await client.get("/aura/cases/85116/analysis", headers=BEARER)).get_json()
        streamed = {name: json.loads(text) for _, name, text in parsed(data)}
        assert result["reasonText"] == streamed["completed"]["summary"]
        assert result["confidenceBreakdown"] == streamed["confidence"]
        assert result["proposals"][-1] == streamed["proposal"]
        assert (result["score"], result["severity"]) == (streamed["completed"]["score"], "MEDIUM")
        assert (result["ragRefs"], result["similarCases"], result["caseId"]) == ([], [], "85116")


async def test_a_phase3_result_has_null_where_the_phase_has_none(autojump_clock):
    async with in_memory() as (client, _, _, _):
        await client.post("/aura/internal/cases/7/analysis-runs", headers=BEARER, json={"runId": "p3"})
        await read(client, "p3")
        result = await (await client.get("/aura/cases/7/analysis", headers=BEARER)).get_json()
        nothing = ("reasonText", "confidenceBreakdown", "score", "severity", "proposals")
        assert [result[key] for key in nothing] == [None] * 5


@pytest.mark.parametrize("data", ["{not json", "text", "5", [1], None, {"summary": "ok"}])
async def test_a_result_is_read_whatever_the_script_called_completed(data, autojump_clock):
    async with in_memory() as (client, hub, _, _):
        run = [{"event": {"event": "completed", "data": data}}]
        await triggered(client, runId="r", scenario={"name": "odd", "run": run})
        await ended(hub.find("r"))
        answer = await client.get("/aura/cases/85116/analysis", headers=BEARER)
        assert answer.status_code == 200
        assert (await answer.get_json())["reasonText"] == ("ok" if isinstance(data, dict) else None)


async def test_a_cancel_that_races_with_the_end_agrees_with_the_log(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        for turns in range(12):
            run = [{"sleep": 0.1}, {"event": {"event": "completed", "data": {}}}]
            await triggered(client, runId=str(turns), scenario={"name": "s", "run": run})
            await trio.sleep(0.1)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            answer = await client.delete(f"/aura/cases/1/analysis-runs/{turns}", headers=BEARER)
            gone = await ended(hub.find(str(turns)))
            assert (gone.status == "cancelled") == (gone.log.last_name == "failed")
            assert answer.status_code in (200, 202)
            assert [name for name, _ in said(gone)].count("completed") + (gone.status == "cancelled") == 1


async def test_live_runs_have_a_limit(autojump_clock):
    async with in_memory(max_live_runs=1) as (client, _, _, _):
        await triggered(client, runId="r")
        answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": "r2"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "the limit is 1" in (await answer.get_json())["error"]
        assert (await triggered(client, runId="r"))[0].headers["X-Aura-Run"] == "known"


async def test_health_and_front_answer_json():
    async with in_memory(instance="i1") as (client, _, _, _):
        health = await (await client.get("/health")).get_json()
        assert set(health) == {"status", "instance", "version", "runs", "sse_connections", "uptime"}
        assert (health["status"], health["instance"], health["runs"]) == ("healthy", "i1", 0)
        assert 0 <= health["uptime"] < WAIT
        front = await (await client.get("/")).get_json()
        assert set(front) == {"message", "version", "status"}


async def test_head_and_options_open_no_delivery(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r")
        for path in ("/aura/analysis-runs/r/stream", "/aura/cases/1/analysis/stream?runId=r"):
            head = await client.head(path, headers=BEARER)
            assert (head.status_code, head.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
            options = await client.options(path)
            assert options.status_code == 200
        assert hub.find("r").attempts == {}


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_X", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_every_answer_has_a_request_id(given, kept):
    async with in_memory() as (client, _, _, _):
        for path in ("/health", "/nowhere", "/aura/analysis-runs/none/stream"):
            answer = await client.get(path, headers={**BEARER, "X-Request-ID": given})
            found = answer.headers["X-Request-ID"]
            assert found == given if kept else re.fullmatch("[0-9a-f]{32}", found)


async def test_a_wrong_path_or_method_is_json():
    async with in_memory() as (client, _, _, _):
        assert "error" in await (await client.get("/nowhere")).get_json()
        wrong = await client.put("/health")
        assert (wrong.status_code, "GET" in wrong.headers["Allow"]) == (405, True)
        assert "error" in await wrong.get_json()


async def test_streams_outlive_quarts_response_timeout(autojump_clock):
    async with in_memory() as (client, _, _, app):
        app.config["RESPONSE_TIMEOUT"] = 0.2
        await triggered(client, runId="r")
        _, data = await read(client, "r")
        assert data.endswith(DONE)
        assert len(parsed(data)) == 11


async def test_the_log_tells_the_story_of_a_stream(autojump_clock, heard):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r")
        answer = await client.get("/aura/cases/85116/analysis/stream?runId=r", headers={**BEARER, "Last-Event-ID": "1"})
        await answer.get_data()
    lines = heard.all()
    assert "INFO case_analysis_stream: start consuming run_id=r case_id=85116\n" in lines
    assert "INFO SSE connection established (client reconnected) run_id=r last_event_id=1\n" in lines
    assert "INFO case_analysis_stream: first chunk sent run_id=r\n" in lines
    assert re.search(
        r"INFO case_analysis_stream: stream closed run_id=r by=server how=end reason=the script ended"
        r" bytes=\d+ events=10 last_event_id=11 duration=\d+\.\d{3}s\n", lines
    )  # fmt: skip
    assert re.search(r"INFO \[[0-9a-f]{32}\] GET /aura/cases/85116/analysis/stream - Status: 200 - Duration: \d\.\d{3}s", lines)


# ═══ 11  Operations ══════════════════════════════════════════════════════════════════════════════


async def control(client, method, path, expect=200, **body):
    answer = await client.open(f"/__aura/{path}", method=method, **({"json": body} if body or method == "POST" else {}))
    assert answer.status_code == expect, await answer.get_data()
    return await answer.get_json()


async def test_control_tells_what_there_is(autojump_clock):
    async with in_memory(instance="i1", speed="20") as (client, hub, script_time, _):
        health = await control(client, "GET", "health")
        assert health.items() >= {"status": "ok", "version": aura_stream.__version__, "pid": os.getpid(), "instance": "i1"}.items()
        assert health["clock"] == {"mode": "x20", "now": 0}
        assert (await control(client, "POST", "clock", advance=100))["now"] == 100
        listed = (await control(client, "GET", "scenarios"))["scenarios"]
        assert [one["name"] for one in listed] == list(CATALOGUE) and all(len(one["doc"]) > 10 for one in listed)
        for name in CATALOGUE:
            assert parse_scenario(await control(client, "GET", f"scenarios/{name}")) == CATALOGUE[name]
        assert (await control(client, "GET", "scenarios/dorp", 400))["didYouMean"][0] == "drop"
        await triggered(client, runId="r")
        assert [run["runId"] for run in (await control(client, "GET", "runs"))["runs"]] == ["r"]
        assert (await control(client, "GET", "runs/r"))["status"] == "running"
        await control(client, "GET", "runs/nobody", 404)
        assert (await control(client, "GET", "run", 404))["error"].startswith("Not Found: ")


async def test_emit_speaks_into_a_live_run_and_only_there(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "x", "run": [{"wait": "go"}, *says("b")]})
        await control(client, "POST", "emit", runId="r", event="a", data={"n": "a"})
        await control(client, "POST", "signal", gate="go", runId="r")
        run = await ended(hub.find("r"))
        assert [name for name, _ in said(run)] == ["a", "b"]
        gone = await control(client, "POST", "emit", 409, runId="r", event="a", data=1)
        assert gone["error"] == "this run has ended (completed), nobody listens any more"
        await triggered(client, runId="7", scenario="stepped")
        await control(client, "POST", "emit", runId=7, event="completed", data=1)
        await control(client, "POST", "emit", runId="7", event="b", data=1)
        await control(client, "POST", "emit", 404, runId="nobody", event="a", data=1)
        bad = await control(client, "POST", "emit", 422, runId="r", event="a\nb", data=1)
        assert "one line" in bad["detail"][0]["msg"]


async def test_a_signal_for_a_run_that_is_not_there_opens_nothing(autojump_clock):
    async with in_memory(max_gates=2) as (client, hub, _, _):
        for _ in range(3):
            assert (await control(client, "POST", "signal", 404, gate="go", runId="later"))["runId"] == "later"
        await triggered(client, runId="7", scenario={"name": "x", "run": [{"wait": "go"}, *says("a")]})
        assert await control(client, "POST", "signal", gate="other", runId=None) == {"open": "other", "runId": None}
        assert not hub.find("7").ended
        assert await control(client, "POST", "signal", gate="go", runId=7) == {"open": "go", "runId": "7"}
        await ended(hub.find("7"))
        assert await control(client, "POST", "signal", gate="go", runId="7"), "and a run that has ended is there"


async def test_an_analysis_of_one_s_own_takes_the_place_of_the_ordinary_one(autojump_clock):
    async def analyse(facts, sending):
        await sending.send(Event("mine", {"case": facts.case_id}))

    async with trio.open_nursery() as nursery:
        hub = BoundedHub(Settings(), nursery)
        client = Client(create_app(Settings(), hub, CATALOGUE, analysis=analyse))
        for run_id, name, names in (("a", "ok", ["mine"]), ("b", "slow-first", ["mine"]), ("c", "missing-started", FOUR[1:]),
                                    ("d", "drop", ["mine"])):  # fmt: skip
            await triggered(client, runId=run_id, scenario=name)
            assert [name for name, _ in said(await ended(hub.find(run_id)))] == names
        await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json={"runId": "p3"})
        assert said(await ended(hub.find("p3"))) == [("mine", {"case": "1"})]


async def test_the_journal_can_be_asked_for_what_one_wants(autojump_clock):
    async with in_memory() as (client, _, _, _):
        for run_id, test_id in (("a", "t1"), ("b", "t2")):
            await triggered(client, "1", {"X-Test-Id": test_id, "X-Tenant-ID": "5", "X-User-ID": "u"}, runId=run_id)
            seen_by = {"X-Test-Id": test_id, "Accept": "text/event-stream"}
            await client.get(f"/aura/analysis-runs/{run_id}/stream?access_token=secret", headers=seen_by)
        await client.get("/health")
        await client.options("/aura/analysis-runs/a/stream")

        async def kinds(query):
            entries = (await control(client, "GET", f"journal?{query}"))["entries"]
            return [(one["kind"], one["runId"]) for one in entries]

        assert await kinds("") == [("trigger", "a"), ("stream", "a"), ("trigger", "b"), ("stream", "b"), ("request", None)]
        assert await kinds("runId=a") == await kinds("testId=t1") == [("trigger", "a"), ("stream", "a")]
        assert await kinds("kind=stream&since=2") == await kinds("testId=t2&kind=stream") == [("stream", "b")]
        assert await kinds("kind=stream&count=1") == [("stream", "a")], "the oldest of them"
        whole = await client.get("/__aura/journal")
        assert b"secret" not in await whole.get_data() and b"test-token" not in await whole.get_data()
        one = (await whole.get_json())["entries"][1]
        assert one["headers"]["accept"] == "text/event-stream" and one["headers"]["authorization"] is None
        assert (await whole.get_json())["entries"][0]["headers"]["authorization"] == "present"
        assert (one["caseId"], one["status"], one["events"], one["end"]["by"], one["attempt"], one["seed"]) == ("1", 200, 11, "server", 1, "ok")
        calls = (await control(client, "GET", "journal?view=calls&kind=trigger"))["entries"]
        assert set(calls[0]) == {"path", "statusCode", "latency", "tenantId", "userId", "agentId", "end"}
        assert (calls[0]["path"], calls[0]["statusCode"], calls[0]["tenantId"]) == ("/aura/cases/1/analysis-runs", 202, "5")


KEYS = (
    "method path client seq kind runId caseId testId attempt scenario seed httpVersion tenantId userId agentId headers lastEventId"
    " resumedAfter status chunks bytes events heartbeats lastIdSent wall t latency end said"
)


async def test_an_entry_has_the_keys_of_the_contract(autojump_clock):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="a")
        await read(client, "a", **{"Last-Event-ID": "nonsense"})
        (one,) = (await control(client, "GET", "journal?kind=stream"))["entries"]
        assert set(one) == set(KEYS.split())
        assert set(one["t"]) == {"open", "firstByte", "end"} and set(one["end"]) == {"by", "how", "reason", "step"}
        assert (one["lastEventId"], one["resumedAfter"]) == ("nonsense", 0) and "from the start" in one["said"]


async def test_waiting_in_vain_is_a_408_that_says_what_is_missing():
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="a")
        answer = await control(client, "GET", "journal?runId=a&count=2&within=0.01", 408)
        assert answer["error"].startswith("1 of 2 finished entries came within 0.01 s") and len(answer["entries"]) == 1


@pytest.mark.parametrize(("method", "path", "body", "status", "sentence"), [
    ("GET", "journal?cuont=1", None, 400, "the query has no 'cuont'; did you mean 'count'?"),
    ("GET", "journal?count=many", None, 400, "the query 'count' takes a whole number, not \"many\""),
    ("GET", "journal?count=0", None, 400, "'count' takes a whole number >= 1"),
    ("GET", "journal?within=-1", None, 400, "'within' takes a number >= 0"),
    ("GET", "journal?within=nan", None, 400, "'within' takes a number >= 0"),
    ("GET", "journal?kind=streams", None, 400, "'kind' takes a text like stream|trigger|request"),
    ("DELETE", "connections?how=kill", None, 400, "'how' takes a text like end|drop|reset, not \"kill\""),
    ("DELETE", "connections/99", None, 404, "no open connection has the id 99"),
    ("POST", "reset?testId=", None, 400, "the query 'testId' takes a text that is not empty"),
    ("POST", "check", [], 422, "takes an object"),
    ("POST", "reset?tesId=1", None, 400, "did you mean 'testId'?"),
    ("POST", "next", {}, 422, "needs 'scenario'"),
    ("POST", "next", {"scenario": "drop", "times": 0}, 422, "takes a whole number >= 1"),
    ("POST", "next", {"scenario": "drop", "tiems": 1}, 422, "did you mean 'times'?"),
    ("POST", "next", {"scenario": 5}, 422, "takes a text or an object, not 5"),
    ("POST", "signal", {"gat": "a"}, 422, "did you mean 'gate'?"),
    ("POST", "signal", {"gate": "a", "runId": "nobody"}, 404, "no such run on instance"),
    ("POST", "signal", {"gate": "a", "runId": 7}, 404, "runId not found"),
    ("POST", "clock", {"advance": -1}, 422, "takes a number >= 0"),
    ("POST", "clock", [], 422, "takes an object"),
    ("POST", "check", "text", 422, "takes an object"),
    ("POST", "shutdown", None, 409, "this application runs in memory"),
    ("PUT", "clock", {}, 405, "Method Not Allowed"),
])  # fmt: skip
async def test_control_answers_a_mistake_with_a_sentence(method, path, body, status, sentence):
    async with in_memory() as (client, _, _, _):
        answer = await client.open(f"/__aura/{path}", method=method, **({} if body is None else {"json": body}))
        assert answer.status_code == status
        assert sentence in json.dumps(await answer.get_json()).replace('\\\\\\"', '"').replace('\\"', '"')


async def stats(client):
    return (await (await client.get("/api/v1/generations/_stats")).get_json())["job_statistics"]


async def test_a_job_is_made_watched_listed_and_cancelled(autojump_clock, heard):
    async with in_memory() as (client, hub, _, _):
        made = await client.post("/api/v1/generations", json={"projectId": 12, "description": "연말 보고서 {n}", "tone": "dry"})
        told = await made.get_json()
        assert made.status_code == 201 and set(told) == {
            "jobId", "status", "sseUrl", "cancelUrl", "projectId", "title", "estimatedDuration"}  # fmt: skip
        job_id = told["jobId"]
        assert re.fullmatch("job_[0-9a-f]{16}", job_id)
        assert (told["status"], told["projectId"], told["title"]) == ("queued", 12, "연말 보고서 {n}")
        here, there = f"/api/v1/generations/{job_id}", f"http://localhost/api/v1/generations/{job_id}"
        assert (told["sseUrl"], told["cancelUrl"]) == (f"{there}/events", there)
        state = await (await client.get(here)).get_json()
        assert set(state) == {"jobId", "status", "progress", "createdAt"} and (state["status"], state["progress"]) in [("queued", 0), ("streaming", 10)]
        assert (await (await client.get("/api/v1/generations/active")).get_json())["total_active"] == 1
        await trio.sleep(4.5)
        for _ in range(2):  # the second time a preview has come
            state = await (await client.get(here)).get_json()
            assert (state["status"], state["progress"]) == ("streaming", 40)
            await trio.sleep(2)
        began = trio.current_time()
        data = await (await client.get(f"{here}/events")).get_data()
        assert trio.current_time() - began == pytest.approx(18 - 8.5), "2 s a step"
        assert b"[DONE]" not in data, "its own front end parses every message"
        events = parsed(data)
        assert [id for id, _, _ in events] == [f"{job_id}_{n}" for n in range(1, 11)]
        assert [name for _, name, _ in events] == ["progress"] * 3 + ["preview"] + ["progress"] * 2 + ["preview"] + ["progress"] * 2 + ["completed"]
        progress, preview, done = json.loads(events[0][2]), json.loads(events[3][2]), json.loads(events[-1][2])
        assert set(progress) == {"type", "jobId", "value", "currentStep", "estimatedTime", "metadata"} and progress["value"] == 10
        assert set(preview) == {"type", "jobId", "markdown", "isPartial", "wordCount", "estimatedTokens"} and preview["isPartial"]
        assert "연말 보고서 {n}" in preview["markdown"]
        assert done["jobId"] == job_id and set(done["result"]) == {"markdown", "tokens"}
        assert (await (await client.get(here)).get_json())["status"] == "completed"
        resumed = await client.get(f"{here}/events", headers={"Last-Event-ID": f"{job_id}_8"})
        assert [id for id, _, _ in parsed(await resumed.get_data())] == [f"{job_id}_9", f"{job_id}_10"]
        assert (await client.get(f"{here}/events", headers={"Last-Event-ID": f"{job_id}_10"})).status_code == 204
        other = (await (await client.post("/api/v1/generations", json={})).get_json())["jobId"]
        assert (await client.delete(f"/api/v1/generations/{other}")).status_code == 204
        last = parsed(await (await client.get(f"/api/v1/generations/{other}/events")).get_data())[-1]
        assert last[1] == "failed" and json.loads(last[2]) == {
            "type": "failed", "jobId": other, "error": {"code": "ANALYSIS_CANCELLED", "message": "the job was cancelled by a DELETE", "retryable": False}}  # fmt: skip
        assert (await client.delete(f"/api/v1/generations/{other}")).status_code == 204, "again is harmless"
        heard.wait_for(f"INFO analysis_run_stream: start consuming run_id={job_id}", within=0)
        assert f"case_id={job_id}" not in heard.all()
        assert await stats(client) == {
            "total_jobs": 2, "queued": 0, "streaming": 0, "completed": 1, "failed": 0, "canceled": 1, "active_connections": 0}  # fmt: skip
        for path in ("", "/events"):
            gone = await client.get(f"/api/v1/generations/nobody{path}")
            assert (gone.status_code, (await gone.get_json())["jobId"]) == (404, "nobody")
        gone = await client.delete("/api/v1/generations/nobody")
        assert (gone.status_code, await gone.get_data()) == (204, b""), "as its caller wants it"
        wrong = await client.post("/api/v1/generations", json={"description": 5})
        assert (wrong.status_code, (await wrong.get_json())["detail"][0]["loc"]) == (422, ["body", "description"])


async def test_whoever_watches_an_unknown_job_starts_it(autojump_clock):
    """The runbook streams `test-job-id` without creating it; a run of another kind is not a job."""
    async with in_memory(heartbeat=1) as (client, hub, _, _):
        assert (await client.head("/api/generation/jobs/test-job-id/events")).status_code == 404 and hub.live == 0
        watched = await client.get("/api/generation/jobs/test-job-id/events")
        assert watched.status_code == 200 and watched.headers.items() >= aura_stream.STREAM_HEAD.items()
        data = await watched.get_data()
        assert data.startswith(b": connected\n\n") and DONE not in data and b"\n: heartbeat" not in data
        events = parsed(data)
        beats = [json.loads(text) for _, name, text in events if name == "heartbeat"]
        assert len(beats) >= 9 and set(beats[0]) == {"type", "timestamp", "server_time", "jobId"} and beats[0]["jobId"] == "test-job-id"
        assert type(beats[0]["server_time"]) is int and abs(beats[0]["server_time"] - time.time()) < WAIT
        assert [name for _, name, _ in events].count("progress") == 7
        assert hub.find("test-job-id").info.phase == "generation"
        await triggered(client, runId="r", scenario="stepped")
        for job_id in ("r", "bad\nid", "x" * 201):
            refused = await client.get(f"/api/generation/jobs/{quote(job_id)}/events")
            assert refused.status_code == (404 if job_id == "r" else 422)
        assert (await client.get("/api/v1/generations/r")).status_code == 404
        assert (await client.delete("/api/v1/generations/r")).status_code == 204 and hub.live == 1, "it is no job, and goes on"
        scripted = await client.get("/api/generation/jobs/j~failed/events")
        assert json.loads(parsed(await scripted.get_data())[-1][2])["error"]["message"] == "the model refused the prompt"


async def test_without_ids_a_job_has_none_and_without_beats_no_heartbeat(autojump_clock):
    async with in_memory(event_ids=False, heartbeat=0, retry_ms=7) as (client, _, _, _):
        for job in ("j", "j~expired-run"):
            data = await (await client.get(f"/api/generation/jobs/{job}/events")).get_data()
            assert b"id: " not in data and b"heartbeat" not in data and data.startswith(b": connected\n\n")
            assert (b"retry: 7\n\n" in data) == (job == "j")


@pytest.mark.parametrize(("name", "form"), [
    *((name, "{job}_{n}") for name in (
        "generation", "ok", "failed", "drop", "drop-resume", "reset", "expired-run", "crlf", "cr-only", "dribble", "double-wrapped",
        "resume-gap", "duplicate-events", "out-of-order", "bad-json", "fallback-completed", "retry-field", "two-subscribers")),
    ("gateway-ids", "gw-{n}"), ("resume-unknown-id", "opaque:{n}"),
])  # fmt: skip
def test_a_job_s_ids_have_its_form_in_every_scenario(name, form, jumping):
    """Unless the scenario's own `frame` has another id."""
    job, seen = f"job{time.monotonic_ns()}~{name}", []
    for _ in range(2):  # some say more to whoever comes back
        last = f"Last-Event-ID: {seen[-1]}\r\n" if seen else ""
        head = f"GET /api/generation/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{last}\r\n"
        with connect(jumping, head.encode()) as wire:
            answer = Seen(wire)
        seen += [text.decode() for text in re.findall(rb"(?:^|[\r\n])(?:data:)?id: ([^\r\n]+)[\r\n]", answer.body)]
    numbers = [int(re.search(r"\d+$", text)[0]) for text in seen]
    assert seen == [form.format(job=job, n=n) for n in numbers] and len(seen) >= 2


@pytest.mark.parametrize(("headers", "peer", "settings", "base"), [
    ({"Host": "localhost:9000"}, "127.0.0.1", {}, "http://localhost:9000"),
    ({"Host": "[::1]:9000"}, "::1", {}, "http://[::1]:9000"),
    ({"X-Forwarded-Proto": "https"}, "127.0.0.1", {}, "https://localhost"),  # nginx that passes Host on
    ({"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "app.test, b"}, "127.0.0.1", {"allow_host": "app.test"}, "https://app.test"),
    ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.test:8443"}, "::1", {"allow_host": "app.test"}, "https://app.test:8443"),
    ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.test"}, "127.0.0.1", {}, "http://localhost"),
    ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.test"}, "10.0.0.9", {"allow_host": "app.test"}, "http://localhost"),
    ({"X-Forwarded-Host": "any.test"}, "127.0.0.1", {"host": "0.0.0.0"}, "http://any.test"),
])  # fmt: skip
async def test_a_job_s_urls_are_whole_and_lead_the_way_its_caller_came(headers, peer, settings, base):
    """(Its front end calls `new URL`.) A proxy on this machine may say which way that was, if it names one of ours."""
    async with in_memory(**settings) as (client, _, _, _):
        client.peer = peer
        told = await (await client.post("/api/v1/generations", json={}, headers=headers)).get_json()
        url = f"{base}/api/v1/generations/{told['jobId']}"
        assert (told["sseUrl"], told["cancelUrl"]) == (f"{url}/events", url)


def test_a_job_s_urls_work_as_they_are(one_server):
    told = httpx.post(f"{one_server.url}/api/v1/generations", json={}).json()
    assert told["sseUrl"].startswith(f"{one_server.url}/")
    with httpx.stream("GET", told["sseUrl"]) as answer:
        assert answer.status_code == 200
    assert httpx.delete(told["cancelUrl"]).status_code == 204


async def test_without_an_interval_a_slow_job_beats_never(autojump_clock):
    async with in_memory(event_delay=4.5, heartbeat=0) as (client, _, _, _):
        began = trio.current_time()
        data = await (await client.get("/api/generation/jobs/j/events")).get_data()
        assert trio.current_time() - began == pytest.approx(9 * 60) and b"heartbeat" not in data


async def test_a_job_that_may_not_start_is_refused(autojump_clock):
    async with in_memory(demo_off=True) as (client, hub, _, _):
        for answer in (await client.get("/api/generation/jobs/j/events"), await client.post("/api/v1/generations", json={})):
            assert (answer.status_code, (await answer.get_json())["status"]) == (200, "disabled")
        assert hub.live == 0
    async with in_memory(max_live_runs=0) as (client, hub, _, _):
        for answer in (await client.get("/api/generation/jobs/j/events"), await client.post("/api/v1/generations", json={})):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    async with in_memory() as (client, hub, _, _):
        refused = await client.get("/api/generation/jobs/j~trigger-503/events")
        assert (refused.status_code, hub.live) == (503, 0)


async def test_the_streams_open_at_once_have_a_limit(autojump_clock, heard):
    """A client gets 503 and its own time to come back; an EventSource, which a 503 would end, a stream that says so: it
    asks for an event stream and sends no token, in a browser (`Sec-Fetch-Mode`) or in Node (without)."""
    native, in_node = {"Accept": "text/event-stream", "Sec-Fetch-Mode": "cors"}, {"Accept": "text/event-stream"}
    async with in_memory(max_sse_connections=2) as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), {"wait": "go"}]})
        await triggered(client, runId="theirs", headers={**BEARER, "X-Tenant-ID": "1"})
        answers = []

        async def view(**headers):
            answers.append((await read(client, "r", **headers))[0])

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(view)
            await trio.testing.wait_all_tasks_blocked()
            assert (len(answers), hub.streams) == (8, 2), "asked at once, exactly two are in"
            waits = [int(answer.headers["Retry-After"]) for answer in answers]
            assert {answer.status_code for answer in answers} == {503} and set(waits) <= set(range(1, 11)) and len(set(waits)) > 1
            assert await answers[0].get_json() == {"error": "too many open streams", "limit": 2}
            soft, data = await read(client, "r", **native, Authorization="")
            assert soft.status_code == 401, "first the token"
            softly = [await client.get("/aura/analysis-runs/r/stream?access_token=t", headers=one) for one in 5 * [native, in_node]]
            assert {answer.status_code for answer in softly} == {200}
            assert softly[0].headers["Content-Type"] == "text/event-stream; charset=utf-8"
            texts = [re.fullmatch(rb"retry: (\d+)\n\n: too many open streams, the limit is 2\n\n", await answer.get_data()) for answer in softly]
            assert all(1000 <= int(text[1]) <= 10_000 for text in texts) and len({text[1] for text in texts}) > 1
            assert (await client.get("/api/generation/jobs/j/events", headers=native)).status_code == 200
            for own in ({**native, **BEARER}, {**in_node, **BEARER}, {"Sec-Fetch-Mode": "cors"}):
                asked = await client.get("/aura/analysis-runs/r/stream?access_token=t", headers=own)
                assert asked.status_code == 503, "it can read a status"
            assert (await client.get("/api/generation/jobs/j/events")).status_code == 503
            assert hub.find("j") is None, "and no job was started"
            posted = await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, json={"runId": "p"})
            assert (posted.status_code, hub.find("p")) == (503, None)
            for run_id, headers, status in (
                ("none", {}, 503), ("theirs", {"X-Tenant-ID": "2"}, 404), ("r", {"X-Aura-Scenario": "nonsense"}, 400), ("none", {"Authorization": ""}, 401),
            ):  # fmt: skip
                assert (await read(client, run_id, **headers))[0].status_code == status, "refusals have their order"
            assert (await client.head("/aura/analysis-runs/r/stream", headers=BEARER)).status_code == 200
            heard.wait_for("too many open streams, the limit is 2")
            last = (await control(client, "GET", "journal?kind=stream"))["entries"][-1]
            assert "too many" not in last["said"], "that was the 401"
            noted = [one for one in (await control(client, "GET", "journal?kind=stream"))["entries"] if "too many open streams, the limit is 2" in one["said"]]
            assert len(noted) == 8 + 10 + 4 + 3
            await control(client, "POST", "signal", gate="go")
        assert hub.streams == 0 and (await read(client, "r"))[0].status_code == 200


async def test_an_operator_ends_or_drops_every_stream_and_the_runs_go_on(autojump_clock):
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), {"wait": "go"}]})
        for path, said in (("sse/restart", "closed"), ("sse/broadcast-reconnect", "notified")):
            found = []

            async def view(found=found):
                found.append((await read(client, "r"))[1])

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(view)
                await trio.testing.wait_all_tasks_blocked()
                answer = await client.post(f"/api/admin/{path}")
                assert await answer.get_json() == {said: 5}
            ends = [int(re.fullmatch(rb": connected\n\nevent: a\ndata: .*\nid: 1\n\nretry: (\d+)\n\n", data)[1]) for data in found]
            assert all(1000 <= ms <= 5000 for ms in ends), "in memory there is nothing to drop, and it ends"
            assert ends == [1000] * 5 if "restart" in path else len(set(ends)) > 1
        assert (await (await client.post("/api/admin/connections/reset")).get_json()) == {"dropped": 0}
        assert hub.live == 1
        answers = []

        async def refused_slowly():
            busy = {"name": "busy", "stream": [{"open": {"status": 503, "body": "busy"}}, {"sleep": 1000}]}
            answers.append(await client.get("/aura/analysis-runs/r/stream", headers={**BEARER, "X-Aura-Scenario": json.dumps(busy)}))

        async def triggered_slowly():
            answers.append(await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"scenario": {"name": "t", "trigger": [{"sleep": 1000}]}}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused_slowly)
            nursery.start_soon(triggered_slowly)
            await trio.testing.wait_all_tasks_blocked()
            assert await (await client.post("/api/admin/sse/broadcast-reconnect")).get_json() == {"notified": 1}, "a trigger's answer is no stream"
            await trio.testing.wait_all_tasks_blocked()
            assert (await control(client, "DELETE", "connections"))["closed"] == 1
        assert {answer.status_code: b"retry" in await answer.get_data() for answer in answers} == {503: False, 202: False}
        assert [(await answer.get_json())["status"] for answer in answers if answer.status_code == 202] == ["ACCEPTED"], "in full"
        entries = (await control(client, "GET", "journal?kind=stream"))["entries"]
        assert {(one["end"]["by"], one["end"]["how"], one["end"]["reason"]) for one in entries} == {("admin", "end", "closed by an operator")}


@pytest.mark.parametrize(("steps", "last"), [
    ([{"raw": "id: 1\nevent: step\ndata: {\"half"}], b'data: {"half'),
    ([{"raw": "data: whole\r\n\r\n"}], None),
    ([{"raw": "data: whole\r\r"}], None),
    ([{"chunk": 3}, {"comment": "whole"}], None),
    ([{"chunk": 1}, {"comment": "whole"}], None),
    ([{"raw": {"hex": "efbbbf"}}, {"comment": "whole"}], None),
    ([{"open": {"status": 204}}], b""),
    ([{"buffer": "all"}, {"comment": "whole"}], None),
    ([{"open": {"headers": {"content-type": "application/json"}, "body": {}}}], b"{}"),
    (["open"], b""),
])  # fmt: skip
async def test_a_last_word_does_not_complete_half_an_event(steps, last, autojump_clock):
    """A client would take it for whole, and resume behind it."""
    async with in_memory() as (client, hub, _, _):
        await triggered(client, runId="r", scenario="silent")
        found = []

        async def view():
            asked = json.dumps({"name": "odd", "stream": [*steps, {"sleep": 100}]})
            found.append(await (await client.get("/aura/analysis-runs/r/stream", headers={**BEARER, "X-Aura-Scenario": asked})).get_data())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(view)
            await trio.testing.wait_all_tasks_blocked()
            assert await (await client.post("/api/admin/sse/broadcast-reconnect")).get_json() == {"notified": 1}
        entry = (await control(client, "GET", "journal?kind=stream"))["entries"][-1]
        assert entry["bytes"] == len(found[0])
        assert found[0].endswith(last) if last is not None else re.search(rb"\nretry: \d{4}\n\n$", found[0].replace(b"\r", b"\n"))


async def test_a_post_that_is_answered_by_a_204_is_no_stream(autojump_clock):
    async with in_memory() as (client, _, _, _):
        await triggered(client, runId="r")
        _, data = await read(client, "r")
        answer = await client.post("/aura/cases/85116/analysis/trigger", headers={**BEARER, "Last-Event-ID": "11"}, json={"runId": "r"})
        assert (answer.status_code, await answer.get_data()) == (204, b"")
        found = metrics_of((await (await client.get("/metrics")).get_data()).decode())
        assert found[("sse_connections_total",)] == 1


async def test_what_control_is_asked_is_not_journaled_however_it_is_written():
    async with in_memory() as (client, _, _, _):
        for path in ("/__aura/runs", "//__aura/runs", "///__aura/nothing"):
            await client.get(path)
            assert (await client.get(path, headers={"Via": "x"})).status_code == 403
        assert (await client.get("//aura/cases/1/analysis")).status_code == 401
        assert (await client.get("//api/aura/cases/1/analysis")).status_code == 400
        assert [one["path"] for one in (await control(client, "GET", "journal"))["entries"]] == ["/aura/cases/1/analysis", "/api/aura/cases/1/analysis"]


def metrics_of(text):
    """Every sample of Prometheus text, as its own client's parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}  # fmt: skip


METRICS = {
    "sse_connections_open": "gauge", "sse_connections_total": "counter", "sse_reconnect_count": "gauge", "sse_message_sent_total": "counter",
    "sse_bytes_sent_total": "counter", "sse_heartbeat_sent_total": "counter", "sse_connection_duration_seconds": "histogram",
    "sse_time_to_first_event_seconds": "histogram", "sse_stream_ended_total": "counter", "sse_message_delivery_success_rate": "gauge",
    "http_requests_total": "counter", "aura_runs": "gauge", "aura_run_duration_seconds": "histogram",
}  # fmt: skip


def test_after_a_known_session_every_figure_has_its_exact_value(heard):
    with running(event_delay=0, speed="max") as aura, running() as other:
        whole = aura.trigger("1", run_id="r")
        bytes_sent = len(stream(aura, whole))
        broken = aura.trigger("2", run_id="b", scenario="drop-resume")
        with pytest.raises(httpx.RemoteProtocolError):
            stream(aura, broken)
        bytes_sent += len(stream(aura, broken, {"Last-Event-ID": "2"}))
        waiting = aura.trigger("3", run_id="w", scenario={"name": "w", "run": [*says("made-up", "step"), {"wait": "go"}]})
        with connect(aura, get(f"/aura/analysis-runs/{waiting}/stream")) as left:
            read_until(left, b"id: 2\n\n")
        entries = aura.journal(count=4, within=WAIT)
        bytes_sent += entries[1].bytes + entries[3].bytes
        with connect(aura, get(f"/aura/analysis-runs/{waiting}/stream")) as wire:
            read_until(wire, b"id: 2\n\n")
            live = bytes_sent + aura._ask("GET", "/__aura/connections").connections[0].bytes
            for path, status in (("/aura/analysis-runs/none/stream", 404), (f"/aura/analysis-runs/{whole}/stream", 204)):
                assert httpx.get(aura.url + path, headers={**BEARER, "Last-Event-ID": "11"}).status_code == status
            httpx.get(f"{aura.url}/made/up/{'x' * 50}")
            httpx.request("BREW", f"{aura.url}/health")
            httpx.head(f"{aura.url}/aura/analysis-runs/{whole}/stream", headers=BEARER)
            answer = httpx.get(f"{aura.url}/metrics")
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            found = metrics_of(answer.text)
            again = metrics_of(httpx.get(f"{aura.url}/metrics").text)
            assert [name for name in again if again[name] != found.get(name) and name[0] != "http_requests_total"] == [], "to look changes nothing"
        assert found[("sse_connections_open",)] == 1
        assert found[("sse_connections_total",)] == 5
        assert found[("sse_reconnect_count",)] == 1
        assert found[("sse_bytes_sent_total",)] == live
        assert found[("sse_heartbeat_sent_total",)] == sum(entry.heartbeats for entry in aura.journal())
        sent = {dict(labels)["event"]: value for (name, *labels), value in found.items() if name == "sse_message_sent_total"}
        assert {name: value for name, value in sent.items() if value} == {
            "started": 2, "step": 2 * 5 + 2, "evidence": 2, "confidence": 2, "proposal": 4, "completed": 2, "other": 2}  # fmt: skip
        ended = {tuple(dict(labels)[name] for name in ("by", "how")): value for (name, *labels), value in found.items() if name == "sse_stream_ended_total"}
        assert {way: value for way, value in ended.items() if value} == {("server", "end"): 2, ("server", "drop"): 1, ("client", "disconnect"): 1}
        assert found[("sse_message_delivery_success_rate",)] == pytest.approx((11 + 2 + 9 + 2) / (11 + 11 + 9 + 2))
        assert found[("sse_connection_duration_seconds_count",)] == 4
        assert found[("sse_time_to_first_event_seconds_count",)] == 5 and 0 < found[("sse_time_to_first_event_seconds_sum",)] < WAIT
        assert found[("aura_run_duration_seconds_count",)] == 2
        runs = {dict(labels)["status"]: value for (name, *labels), value in found.items() if name == "aura_runs"}
        assert runs == {"running": 1, "completed": 2, "failed": 0, "cancelled": 0}
        asked = {tuple(dict(labels)[name] for name in ("method", "endpoint", "status")): value for (name, *labels), value in found.items() if name == "http_requests_total"}
        assert asked.items() >= {
            ("POST", "/aura/cases/{caseId}/analysis-runs", "202"): 3, ("GET", "/aura/analysis-runs/{runId}/stream", "200"): 4,
            ("GET", "/aura/analysis-runs/{runId}/stream", "404"): 1, ("GET", "/aura/analysis-runs/{runId}/stream", "204"): 1,
            ("HEAD", "/aura/analysis-runs/{runId}/stream", "200"): 1, ("GET", "other", "404"): 1, ("other", "other", "405"): 1,
        }.items()  # fmt: skip
        aura.journal(waiting, count=2, within=WAIT)
        httpx.get(f"{aura.url}/api/generation/jobs/j/events")
        closed = metrics_of(httpx.get(f"{aura.url}/metrics").text)
        assert closed[("sse_connections_open",)] == 0
        assert closed[("http_requests_total", ("endpoint", "*/events"), ("method", "GET"), ("status", "200"))] == 1
        assert closed[("sse_message_sent_total", ("event", "progress"))] == 7
        quiet = metrics_of(httpx.get(f"{other.url}/metrics").text)
        assert quiet[("sse_connections_total",)] == 0 and quiet[("sse_message_delivery_success_rate",)] == 1, "two servers do not mix"


async def test_the_metrics_have_exactly_the_names_of_the_contract():
    from prometheus_client.parser import text_string_to_metric_families

    async with in_memory() as (client, _, _, _):
        text = (await (await client.get("/metrics")).get_data()).decode()
        kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
        assert {name.removesuffix("_total"): kind for name, kind in METRICS.items()} == kinds
        names = set(re.findall(r"^(\w+?)(?:_bucket|_sum|_count)?[ {]", text, re.M)) - {"sse_reconnect"}
        assert names == METRICS.keys() - {"sse_reconnect_count", "http_requests_total"}, "the first request is not over yet"


async def test_what_was_not_due_does_not_make_up_for_what_was():
    journal = aura_stream.Journal()
    metrics = aura_stream.Metrics(BoundedHub(Settings(), None), journal)
    an_entry(journal, events=50, due=3, attempt=1)
    an_entry(journal, events=1, due=7, attempt=1)
    an_entry(journal, events=9, due=9)  # no script played: a refusal of ours
    found = metrics_of(metrics.text().decode())
    assert (found[("sse_message_delivery_success_rate",)], found[("sse_connections_total",)]) == (0.4, 2)


async def test_without_the_extra_metrics_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with in_memory() as (client, _, _, _):
        answer = await client.get("/metrics")
        assert (answer.status_code, (await answer.get_json())["error"]) == (501, "metrics need an extra: pip install 'aura-stream[metrics]'")


async def test_the_runbook_s_health_answers_what_it_asks_for():
    async with in_memory() as (client, _, _, _):
        for path in ("/health", "/api/generation/health"):
            assert (await (await client.get(path)).get_json())["sse_connections"] == 0


async def test_a_full_journal_says_so_once(heard):
    async with in_memory(max_journal=2, max_bindings=1, max_gates=1) as (client, _, _, _):
        for _ in range(5):
            await client.get("/health")
        assert len((await control(client, "GET", "journal"))["entries"]) == 2
        assert heard.all().count("INFO the journal is full at 2 entries: the oldest go") == 1
        await control(client, "POST", "next", scenario="ok")
        assert "1 bindings" in (await control(client, "POST", "next", 409, scenario="ok"))["error"]
        await control(client, "POST", "signal", gate="a")
        assert "1 gates" in (await control(client, "POST", "signal", 409, gate="b"))["error"]


# ═══ 12  What ASGI cannot say ═══════════════════════════════════════════════════════════════════

QUIET = {"name": "quiet", "run": [*says("a"), {"sleep": 100}]}
FLOOD = {"name": "flood", "run": [{"repeat": 400, "steps": [{"event": {"data": "x" * 30_000}}]}, {"sleep": 100}]}


def open_quiet_stream(aura, **headers):
    """A viewer of a run that says one thing and then nothing, read up to that."""
    run_id = aura.trigger("1", scenario=QUIET)
    wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers=headers))
    read_until(wire, b"id: 1\n\n")
    return wire, run_id


def state(aura, run_id):
    return httpx.get(f"{aura.url}/aura/cases/1/analysis-runs/{run_id}", headers=BEARER, timeout=WAIT).json()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def eventually(condition, within=WAIT):
    """Poll what has no gate: the kernel's and the server's books after a close."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


CHUNKED = b"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = (b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")  # fmt: skip


def test_one_bad_request_ends_only_its_own_connection(heard):  # trap 1
    with running() as aura:
        wire, run_id = open_quiet_stream(aura)
        for data in (UPGRADE + b"\x00", CHUNKED + b"ZZ\r\n") * 10:
            with connect(aura, data) as bad:
                assert bad.recv(65536)[:9] in (b"HTTP/1.1 ", b"")
        httpx.delete(f"{aura.url}/aura/cases/1/analysis-runs/{run_id}", headers=BEARER)
        assert DONE in read_until(wire, b"0\r\n\r\n")
        wire.close()
    assert "Traceback" not in heard.all()


def test_a_write_that_fails_ends_only_its_own_connection():
    """A reset is met by a write, while the connection's reader still waits: what ends that must not end the server."""
    heavy = {"name": "heavy", "stream": [{"repeat": 40, "steps": [{"event": {"data": {}}, "pad": 2_000_000}]}]}
    with running() as aura:
        run_id = aura.trigger("1", scenario=heavy)
        for _ in range(60):
            with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
                wire.recv(100)
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert httpx.get(f"{aura.url}/health", timeout=WAIT).status_code == 200


def test_a_reader_that_stops_reading_is_evicted_at_the_send_deadline(heard):  # traps 2 and 10
    with running(send_timeout=0.3) as aura:
        run_id = aura.trigger("1", scenario=FLOOD)
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            wire.connect(("127.0.0.1", aura.port))
            wire.sendall(get(f"/aura/analysis-runs/{run_id}/stream"))
            line = heard.wait_for("stream closed")
        assert "by=client how=stalled reason=read nothing for 0.3 s" in line
        sent = int(re.search(r"bytes=(\d+)", line)[1])
        assert sent < 2_000_000, "the kernel hides at most its bounded buffers"
        heard.wait_for("WARNING SSE connection lost for client 127.0.0.1:")
        assert state(aura, run_id)["status"] == "running"


def test_stalled_readers_cost_no_more_than_their_buffers():
    """Forty of them, each with twelve megabytes before it: what the server holds for one is one write and what a stream costs."""
    with process("--log-level", "ERROR", "--send-timeout", "60") as (server, aura), contextlib.ExitStack() as wires:
        run_id = aura.trigger("1", scenario=FLOOD)
        eventually(lambda: state(aura, run_id)["events"] == 400)
        status = Path(f"/proc/{server.pid}/status")
        if not status.exists():
            pytest.skip("this machine does not tell a process's memory so")

        def memory():
            return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])

        def nothing_moves():
            seen.append([one.bytes for one in aura._ask("GET", "/__aura/connections").connections])
            return len(seen[-1]) == 40 and seen[-1] == seen[-2]

        before, seen = memory(), [[]]
        for _ in range(40):
            wire = wires.enter_context(socket.socket())
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            wire.connect(("127.0.0.1", aura.port))
            wire.sendall(get(f"/aura/analysis-runs/{run_id}/stream"))
        eventually(nothing_moves)
        assert max(seen[-1]) < 600_000
        assert (memory() - before) / 40 < 256, "KiB for each"


BIG_ONE = {"name": "big", "run": [{"event": {"event": "big", "data": {}}, "pad": 8_000_000}, "hang"]}


def resident(server):
    """Bytes of memory that the process holds."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_what_runs_hold_together_is_the_limit_and_a_viewer_of_a_big_event_adds_nothing():
    """Sixty runs with an event of 8 MB each; then twenty viewers that read a few bytes of one, with a body in their GET."""
    with process("--max-log-bytes", "67108864", "--log-level", "ERROR", "--send-timeout", "60") as (server, aura):
        before = resident(server)
        for number in range(60):
            aura.trigger("1", run_id=f"r{number}", scenario=BIG_ONE)
        eventually(lambda: all(run.events for run in aura._ask("GET", "/__aura/runs").runs))
        assert resident(server) - before < (64 + 32) * 2**20
        aura.reset()
        aura.trigger("1", run_id="seen", scenario=BIG_ONE)
        eventually(lambda: state(aura, "seen")["events"])
        full = resident(server)
        with contextlib.ExitStack() as wires:
            for _ in range(20):
                request = get("/aura/analysis-runs/seen/stream", headers={"Content-Length": "1000000"}) + b"x" * 1_000_000
                read_until(wires.enter_context(connect(aura, request)), b"xxxxx")
            assert resident(server) - full < 30 * 2**20


def test_a_slow_reader_of_a_big_event_is_not_evicted():
    async def analysis(its_facts, sending):
        await sending.send(Event("", "x" * 3_000_000))

    with running(analysis=analysis, send_timeout=0.5) as aura:
        with connect(aura, get(f"/aura/analysis-runs/{aura.trigger('1')}/stream")) as wire:
            got, gate, began = b"", threading.Event(), time.monotonic()
            while b"[DONE]" not in got[-40:]:
                got += wire.recv(100_000)
                gate.wait(0.03)  # slower than the deadline for the whole, faster than for each piece
        assert len(got) > 3_000_000
        assert time.monotonic() - began > 0.5


def test_connection_close_closes_and_an_idle_connection_too():  # trap 3
    with running(keep_alive=0.2) as aura:
        with connect(aura, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as wire:
            assert b"healthy" in read_until(wire, None)
        with connect(aura, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as wire:
            assert b"healthy" in read_until(wire, None)
        with connect(aura) as wire:
            assert read_until(wire, None) == b""


def test_an_idle_connection_that_is_closed_is_in_the_log_for_who_looks_closely(heard):
    logging.getLogger("aura_stream").setLevel(logging.DEBUG)
    with running(keep_alive=0.1) as aura, connect(aura) as wire:
        assert read_until(wire, None) == b""
    heard.wait_for("DEBUG closed a connection that was idle for 0.1 s")


async def test_accepted_sockets_inherit_their_bounds():  # traps 5 and 10
    listeners = await Settings.make_service(Settings(port=0)).listen()
    port = listeners[0].socket.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        accepted = await listeners[0].accept()
        assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 64 * 1024
        assert accepted.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        await accepted.aclose()
    await listeners[0].aclose()


def test_a_client_that_leaves_an_idle_connection_leaves_nothing_behind():  # a trap found in a spike
    with running(keep_alive=60) as aura:
        before = descriptors()
        wires = [connect(aura, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(20)]
        for wire in wires:
            read_until(wire, b"uptime")
            wire.close()
        eventually(lambda: descriptors() <= before, within=3)


@pytest.mark.parametrize("headers", [
    {}, {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA"},
])  # fmt: skip
def test_a_viewer_that_leaves_a_quiet_stream_is_noticed_at_once_and_the_run_goes_on(headers, heard):
    with running() as aura:
        wire, run_id = open_quiet_stream(aura, **headers)
        assert state(aura, run_id)["viewers"] == 1
        wire.close()
        line = heard.wait_for("stream closed", within=2)
        assert "by=client how=disconnect reason=closed the connection" in line
        assert (state(aura, run_id)["status"], state(aura, run_id)["viewers"]) == ("running", 0)
    assert ("WARNING Unsupported upgrade request." in heard.all()) == bool(headers)


@pytest.mark.parametrize("ahead", [b"\r\n", get("/health"), b"x" * 1000])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_viewer_that_sent_bytes_ahead_is_seen_to_leave(ahead, how, heard):
    with running() as aura:
        wire, run_id = open_quiet_stream(aura)
        wire.sendall(ahead)
        assert state(aura, run_id)["viewers"] == 1
        if how == "reset":
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.close()
        assert "by=client how=disconnect" in heard.wait_for("stream closed", within=2)


def test_of_requests_sent_ahead_the_first_is_answered_and_says_that_it_was_the_last():
    with running(event_delay=0) as aura:
        run_id = aura.trigger("1")
        path = f"/aura/analysis-runs/{run_id}/stream"
        stream(aura, run_id)
        for first, marker in ((path, DONE), ("/health", b"healthy")):
            with connect(aura, get(first) + get("/health") + get(path) + get("/nowhere")) as wire:
                answers = read_until(wire, None)
            assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answers)] == [200]
            assert answers.count(marker) == 1 and b"\r\nconnection: close\r\n" in answers.lower()
        assert aura.journal(run_id, count=1, within=WAIT)[0].end.by == "server"


@pytest.mark.parametrize("behind", [
    get("/health") * 900,
    b"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + b" " * 900_000,
], ids=["requests", "a long one"])  # fmt: skip
def test_a_client_far_ahead_can_read_its_one_answer_and_meets_no_reset(behind):
    """What it sends on is read and thrown away until it has the answer."""
    slow = {"name": "s", "run": [*says("a"), {"sleep": 0.2}, *says("b")]}
    with running(event_delay=0) as aura:
        for first, marker in ((f"/aura/analysis-runs/{aura.trigger('1', scenario=slow)}/stream", DONE), ("/health", b"healthy")):
            with connect(aura) as wire:
                sent = []
                sender = threading.Thread(target=lambda: sent.append(wire.sendall(get(first) + behind)))
                sender.start()
                answers = read_until(wire, None)
                sender.join()
            assert sent == [None] and answers.count(b"HTTP/1.1 ") == answers.count(marker) == 1


IMPATIENT = """
import re, socket, sys
wire = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
for _ in range(300):
    wire.sendall(sys.argv[2].encode())
    data = b""
    while (at := data.find(b"\\r\\n\\r\\n")) < 0 or len(data) < at + 4 + int(re.search(rb"(?i)content-length: (\\d+)", data)[1]):
        data += wire.recv(1 << 20) or sys.exit("the connection was closed")
"""


@pytest.mark.long
def test_a_client_that_waits_for_its_answer_may_ask_again_on_the_same_connection_however_fast():
    """Also where the last bytes had to wait for room: then the client has them before the server knows."""
    with running(event_delay=0) as aura:
        for _ in range(300):
            aura.trigger("1")  # so that the list of runs is longer than what the kernel takes at once
        asked = [sys.executable, "-c", IMPATIENT, str(aura.port), get("/__aura/runs").decode()]
        for client in [subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) for _ in range(2)]:
            assert (client.communicate(timeout=WAIT)[1], client.returncode) == ("", 0)


@pytest.mark.parametrize("line", [b"GET /health HTTP/1.0", b"GET /health HTTP/1.1\r\nConnection: close"])
@pytest.mark.parametrize("behind", [b"\r\n", get("/health"), b"nonsense"])
def test_what_comes_behind_a_request_that_closes_is_ignored(line, behind):
    with running() as aura, connect(aura, line + b"\r\nHost: localhost\r\n\r\n" + behind) as wire:
        answer = read_until(wire, None)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_before_the_end_of_a_body_says_that_it_closes():
    with running() as aura:
        with connect(aura, request_of(b"POST /nope HTTP/1.1", b"Content-Length: 9", body=b"{")) as wire:
            assert b"\r\nconnection: close\r\n" in read_until(wire, None).lower()
        with connect(aura, request_of(b"GET /health HTTP/1.1")) as wire:
            assert b"connection: close" not in read_until(wire, b"uptime").lower()


def test_nobody_is_told_a_500_that_nobody_meant(heard):
    waiting = {"name": "waiting", "stream": [{"sleep": 60}, "open"]}
    with running(grace=0.2) as aura:
        ahead = get("/health") + request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 2", body=b"{}")
        for _ in range(50):
            with connect(aura, ahead) as wire:
                wire.shutdown(socket.SHUT_WR)
                assert b" 500 " not in read_until(wire, None)
        run_id = aura.trigger("1", scenario=waiting)
        wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream"))
        eventually(lambda: state(aura, run_id)["viewers"] == 1)
        aura.stop()
        assert read_until(wire, None) == b""
        wire.close()
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")


def test_an_upload_does_not_hold_up_the_stop():
    with running(grace=30) as aura:
        wire = connect(aura, request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 100", body=b"{"))
        with connect(aura, get("/health")) as other:
            read_until(other, b"uptime")
        before = time.monotonic()
    assert time.monotonic() - before < 3
    wire.close()


@pytest.mark.parametrize("kind", ["shield", "thread"])
def test_an_analysis_that_ignores_its_cancel_keeps_no_viewer_beyond_the_grace(kind, heard):
    gate = threading.Event()

    async def analysis(its_facts, sending):
        await sending.send(Event("a", {"n": "a"}))
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(gate.wait)

    with running(analysis=analysis, grace=0.3) as aura:
        run_id = aura.trigger("1")
        wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream"))
        read_until(wire, b"id: 1\n\n")
        aura.stop()
        assert b"[DONE]" not in read_until(wire, None)
        assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")
        wire.close()
        gate.set()


def test_a_kept_sending_end_does_not_hold_up_the_stop():
    kept = []

    async def analysis(its_facts, sending):
        kept.append(sending.clone())

    with running(analysis=analysis) as aura:
        run_id = aura.trigger("1")
        assert stream(aura, run_id).endswith(DONE)
        before = time.monotonic()
    assert time.monotonic() - before < 3


def test_what_is_refused_below_the_application_is_in_the_log(heard):
    with running(max_head=2000, head_timeout=0.2) as aura:
        for data, status, why in (
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 3000, 431, "the head is longer than 2000 bytes"),
            (b"GET / HTT", 408, "the head took too long"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "this is no request of HTTP/1.1"),
            (b"\x00\x01\r\n\r\n", 400, "this is no request of HTTP/1.1"),
        ):
            with connect(aura, data) as wire:
                answer = read_until(wire, None).decode()
                assert answer.startswith(f"HTTP/1.1 {status}")
                known_as = re.search("x-request-id: (\\w+)", answer)[1]
                heard.wait_for(f"[{known_as}] {status} refused: {why}, from ('127.0.0.1', {wire.getsockname()[1]})")


def test_what_is_refused_below_the_application_has_a_request_id():
    with running(head_timeout=0.1) as aura:
        for data in (b"GET / HTTP/1.1\r\nX", b"nonsense\r\n\r\n", request_of(b"GET / HTTP/9.9")):
            with connect(aura, data) as wire:
                assert re.search(rb"x-request-id: [0-9a-f]{32}\r\n", read_until(wire, None))


def test_a_half_closed_connection_counts_as_left(heard):
    with running() as aura:
        wire, _ = open_quiet_stream(aura)
        wire.shutdown(socket.SHUT_WR)
        assert "by=client how=disconnect" in heard.wait_for("stream closed", within=2)
        wire.close()


def half_closed(aura, data):
    """What is answered to a client that sends this and says no more."""
    with connect(aura, data) as wire:
        wire.shutdown(socket.SHUT_WR)
        return read_until(wire, None)


def test_what_is_short_is_answered_to_a_client_that_has_closed_its_half():
    trigger = request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 2", body=b"{}")
    slow = request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 28", body=b'{"scenario": "slow-trigger"}')
    with running(speed=20) as aura:
        for data, status in ((trigger, b"202"), (get("/health"), b"200"), (get("/health", version="1.0"), b"200"),
                             (get("/aura/analysis-runs/none/stream"), b"404"), (get("/health") * 2, b"200")):  # fmt: skip
            for _ in range(100 if data in (trigger, get("/health")) else 5):
                answer = half_closed(aura, data)
                assert answer[9:12] == status and answer.count(b"HTTP/1.") == 1
        assert half_closed(aura, slow)[9:12] == b"202"
        entry = aura.journal(kind="trigger")[-1]
        assert (entry.end.by, entry.end.how) == ("server", "end")


@pytest.mark.parametrize("data", [
    get("/aura/analysis-runs/r1/stream"), get("/aura/cases/1/analysis/stream?runId=r1", version="1.0"),
    b"POST /aura/cases/1/analysis/trigger HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nContent-Length: 15\r\n\r\n{\"runId\": \"r1\"}",
], ids=["GET", "HTTP/1.0", "POST"])  # fmt: skip
def test_a_stream_has_been_left_by_who_closes_its_half_with_the_request(data):
    with running() as aura:
        aura.trigger("1", scenario=QUIET, run_id="r1")
        for _ in range(30):
            assert b"[DONE]" not in half_closed(aura, data)
        entries = aura.journal("r1", count=30, within=WAIT)
        assert {(one.end.by, one.end.how) for one in entries} == {("client", "disconnect")}
        assert state(aura, "r1")["status"] == "running"


def test_who_closes_its_half_before_its_request_is_whole_has_left():
    with running() as aura:
        for data in (get("/health")[:-2], request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 9", body=b"{"), b""):
            assert half_closed(aura, data) == b""
        assert aura.journal(kind="trigger", count=1, within=WAIT)[0].end.by == "client"


@pytest.mark.parametrize("fields", [{"head_timeout": 0.2}, {"grace": 0.2}])
def test_who_has_left_an_answer_that_does_not_come_holds_nothing_for_long(fields):
    never = b'{"scenario": {"name": "n", "trigger": ["hang"]}}'
    with running(**fields) as aura:
        before = descriptors()
        connect(aura, request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: %d" % len(never), body=never)).close()
        if "head_timeout" in fields:
            assert aura.journal(kind="trigger", count=1, within=WAIT)[0].end.by == "client"
            eventually(lambda: descriptors() <= before)
        began = time.monotonic()
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("verb", ["drop", "reset"])
def test_a_script_that_cuts_a_half_closed_connection_ends_it_at_once(verb):
    cut = json.dumps({"scenario": {"name": "c", "trigger": [{"sleep": 0.1}, verb]}}).encode()
    with running() as aura:
        before = descriptors()
        with contextlib.suppress(ConnectionResetError):
            assert half_closed(aura, request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: %d" % len(cut), body=cut)) == b""
        assert aura.journal(kind="trigger", count=1, within=WAIT)[0].end.how == verb
        eventually(lambda: descriptors() <= before, within=3)


def test_a_request_with_two_lengths_is_answered_and_the_connection_closed():
    """RFC 9112, 6.1: somebody on the way may have counted differently, and what follows is perhaps no request."""
    both = request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n")
    with running() as aura, connect(aura, both) as wire:
        answer = read_until(wire, None)
        assert answer.startswith(b"HTTP/1.1 202") and b"\r\nconnection: close\r\n" in answer.lower()


def test_a_script_can_drop_the_connection_and_the_journal_knows_who_did(heard):
    dropping = {"name": "dropping", "run": says("a", "b"), "stream": [{"comment": "connected"}, {"relay": 1}, "drop"]}
    with running() as aura:
        run_id = aura.trigger("1", scenario=dropping)
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            answer = read_until(wire, None)
        with pytest.raises(http.client.IncompleteRead) as cut:
            body_of(answer)
        assert [name for _, name, _ in parsed(cut.value.partial)] == ["a"]
        assert "by=server how=drop" in heard.wait_for("stream closed")
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            stream(aura, run_id)


def test_prior_knowledge_http2_is_refused_and_closed():
    with running() as aura, connect(aura, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9) as wire:
        assert read_until(wire, None).startswith(b"HTTP/1.1 505")


def test_a_head_that_does_not_come_is_a_408_and_a_big_one_a_431():
    with running(head_timeout=0.2) as aura:
        with connect(aura, b"GET /health HTTP/1.1\r\nHo") as wire:
            assert read_until(wire, None).startswith(b"HTTP/1.1 408")
        for filler in (b"x" * 17_000, b"x" * 100_000):
            with connect(aura, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + filler + b"\r\n\r\n") as wire:
                assert read_until(wire, None).startswith(b"HTTP/1.1 431")


def test_a_body_that_does_not_come_is_a_408_and_a_big_one_a_413_that_can_be_read():
    head = b"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nContent-Length: %d\r\n\r\n"
    with running(body_timeout=0.2) as aura:
        with connect(aura, head % 10 + b"{") as wire:
            answer = read_until(wire, None)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b'{"error": "Request Timeout' in answer
        with connect(aura, head % 10_000_000 + b"x" * 10_000_000) as wire:
            answer = read_until(wire, None)
            assert answer.startswith(b"HTTP/1.1 413")
            assert b'{"error": "Request Entity Too Large' in answer


@pytest.mark.parametrize(("settings", "pause"), [({"max_linger": 300_000, "linger": 60}, 0), ({"linger": 0.2, "max_linger": 10**9}, 0.02)])
def test_a_refused_client_that_goes_on_sending_is_cut_at_either_limit(settings, pause, heard):
    head = b"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nContent-Length: 90000000\r\n\r\n"
    with running(max_body=10, **settings) as aura, connect(aura, head) as wire:
        began, gate = time.monotonic(), threading.Event()
        with pytest.raises(OSError, match="reset|pipe"):  # a reset, or the pipe broken by one
            while time.monotonic() - began < WAIT:
                wire.sendall(b"x" * 1000)
                gate.wait(pause)
        line = heard.wait_for("cut a refused client that was still sending, after ")
        assert (time.monotonic() - began < 1.5) and (int(line.split()[-2]) > 300_000) == (not pause)


def request_of(line, *headers, body=b""):
    return b"\r\n".join([line, b"Host: localhost", b"Authorization: Bearer t", *headers, b"", body])


RUNS_URL = b"/aura/cases/1/analysis-runs"
MALFORMED = {
    "bad chunk size": CHUNKED + b"ZZ\r\n",
    "bad chunk end": CHUNKED + b"2\r\n{}XX",
    "negative length": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: -5"),
    "two lengths": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 2", b"Content-Length: 3", body=b"{}"),
    "length and chunks": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    "unknown coding": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Transfer-Encoding: gzip"),
    "stray byte after upgrade": UPGRADE + b"\x00",
    "websocket frame": UPGRADE + b"\x81\x85\x00\x00\x00\x00hello",
    "many headers": request_of(b"GET /health HTTP/1.1", *[b"X-%d: y" % n for n in range(3000)]),
    "one long header": request_of(b"GET /health HTTP/1.1", b"X: " + b"y" * 60_000),
    "endless head": b"GET /health HTTP/1.1\r\nX: " + b"y" * 60_000,
    "long path": request_of(b"GET /" + b"a" * 40_000 + b" HTTP/1.1"),
    "header without colon": request_of(b"GET /health HTTP/1.1", b"nonsense"),
    "folded header": request_of(b"GET /health HTTP/1.1", b"X: a", b"  b"),
    "header with NUL": request_of(b"GET /health HTTP/1.1", b"X: a\x00b"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "strange host": b"GET /health HTTP/1.1\r\nHost: [::%$#\xff\r\n\r\n",
    "bad UTF-8 in the path": request_of(b"GET /aura/analysis-runs/%ff%fe/stream HTTP/1.1"),
    "NUL in the path": request_of(b"GET /aura/analysis-runs/%00/stream HTTP/1.1"),
    "raw bytes in the path": request_of("GET /증거 HTTP/1.1".encode()),
    "bad UTF-8 in the query": request_of(b"GET /aura/cases/1/analysis/stream?runId=%ff HTTP/1.1"),
    "line break in an id": request_of(b"GET /aura/analysis-runs/a%0d%0aX:y/stream HTTP/1.1"),
    "dots in the path": request_of(b"GET /../../etc/passwd HTTP/1.1"),
    "absolute URI": request_of(b"GET http://localhost/health HTTP/1.1"),
    "absolute URI without a path": request_of(b"GET http://localhost HTTP/1.1"),
    "strange URI": request_of(b"GET ftp://[::bad/x HTTP/1.1"),
    "only a query": request_of(b"GET ?x HTTP/1.1"),
    "asterisk": request_of(b"OPTIONS * HTTP/1.1"),
    "connect": request_of(b"CONNECT localhost:80 HTTP/1.1"),
    "unknown method": request_of(b"BREW /health HTTP/1.1"),
    "wrong method": request_of(b"PATCH /health HTTP/1.1"),
    "no version": b"GET /health\r\n\r\n",
    "version 9": request_of(b"GET /health HTTP/9.9"),
    "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "blank lines": b"\r\n\r\n\r\n\r\n",
    "10 MB body": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 10000000", body=b"x" * 10_000_000),
    "body that never comes": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 9", body=b"{"),
    "2000 nested arrays": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 4000", body=b"[" * 2000 + b"]" * 2000),
    "not JSON": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 3", body=b"\xff\x00{"),
    "huge number": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Content-Length: 6001", body=b"[" + b"9" * 6000),
    "body on a stream": request_of(b"GET /aura/analysis-runs/x/stream HTTP/1.1", b"Content-Length: 5", body=b"hello"),
    "expect nonsense": request_of(b"POST %b HTTP/1.1" % RUNS_URL, b"Expect: 999", b"Content-Length: 0"),
    "strange last id": request_of(b"GET /aura/analysis-runs/x/stream HTTP/1.1", b"Last-Event-ID: \xff\xfe"),
    "bare CR": b"GET /health HTTP/1.1\rHost: localhost\r\r",
}  # fmt: skip


@pytest.mark.long
def test_malformed_requests_are_answered_or_closed_and_harm_nobody(heard):
    """300 requests of 45 kinds, while a well-behaved stream runs on."""
    with running(head_timeout=0.2, body_timeout=0.2, keep_alive=0.1) as aura:
        wire, run_id = open_quiet_stream(aura)
        before, answers = descriptors(), {}

        def attack(kinds):
            for kind in kinds:
                with socket.create_connection(("127.0.0.1", aura.port), WAIT) as bad:
                    answer = b""
                    with contextlib.suppress(ConnectionError):
                        bad.sendall(MALFORMED[kind])
                    with contextlib.suppress(ConnectionError):
                        answer = read_until(bad, None)
                answers.setdefault(kind, set()).add(answer[9:12].decode())

        kinds = list(MALFORMED)
        threads = [threading.Thread(target=attack, args=(kinds,)) for _ in range(300 // len(kinds) + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(threads) * len(kinds) >= 300
        legal = {"strange host": "200", "absolute URI": "200", "absolute URI without a path": "200", "asterisk": "404",
                 "only a query": "200", "expect nonsense": "202", "blank lines": "", "folded header": "200"}  # fmt: skip
        for kind, statuses in answers.items():
            for status in statuses:
                assert status == legal.get(kind) or re.fullmatch(r"4\d\d|501|505|", status), (kind, statuses)
        assert answers["10 MB body"] == {"413"}
        eventually(lambda: descriptors() <= before)
        httpx.delete(f"{aura.url}/aura/cases/1/analysis-runs/{run_id}", headers=BEARER)
        assert DONE in read_until(wire, b"0\r\n\r\n")
        wire.close()
    lines = heard.all()
    assert "Traceback" not in lines
    assert "+trace" not in lines
    assert "Status: 500" not in lines


def test_bad_company_delays_nobody_and_does_not_hold_up_the_stop(heard):
    """One reader stalled, one half-closed, one that pipelined, one that says nothing."""
    ticking = {"name": "ticking", "run": [{"repeat": 40, "steps": [{"event": {"data": "{now}"}}, {"sleep": 0.01}]}]}
    with running(send_timeout=1) as aura:
        flood, tick = aura.trigger("1", scenario=FLOOD), aura.trigger("2", scenario=ticking)
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        stalled.connect(("127.0.0.1", aura.port))
        stalled.sendall(get(f"/aura/analysis-runs/{flood}/stream"))
        half, _ = open_quiet_stream(aura)
        half.shutdown(socket.SHUT_WR)
        pipelined, _ = open_quiet_stream(aura)
        pipelined.sendall(get("/health"))
        silent = connect(aura)
        arrivals, seen = [], b""
        with connect(aura, get(f"/aura/analysis-runs/{tick}/stream")) as viewer:
            while b"[DONE]" not in seen:
                seen += viewer.recv(65536)
                arrivals.append(time.monotonic())
        gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
        assert max(gaps) < 0.5, "five times the slack on 100 ms"
        stalled.close()
        heard.wait_for("how=disconnect")
        before = time.monotonic()
    assert time.monotonic() - before < 3
    for wire in (half, pipelined, silent):
        wire.close()


# ═══ 13  Catalogue ══════════════════════════════════════════════════════════════════════════════


class Seen:
    """What a raw client saw of one answer: status, headers, the chunks as they stood on the wire, and
    how it ended: `end` properly, `drop` without the last chunk, `reset`, or `none` at all."""

    def __init__(self, wire, *, until=None):
        data, self.ended = b"", None
        try:
            while not (until and data.count(until[0]) >= until[1]) and (piece := wire.recv(65536)):
                data += piece
        except ConnectionResetError:
            self.ended = "reset"
        head, _, body = data.partition(b"\r\n\r\n")
        self.status = int(head.split()[1]) if head else 0
        self.headers = {name.lower().decode(): text.strip().decode("latin-1") for name, _, text in
                        (line.partition(b":") for line in head.split(b"\r\n")[1:])}  # fmt: skip
        self.chunks, whole = dechunked(body) if "transfer-encoding" in self.headers else ([body], True)
        self.body = b"".join(self.chunks)
        self.ended = self.ended or ("none" if not head else "end" if whole else "drop")
        self.events = parsed(self.body)
        self.names = [name for _, name, _ in self.events]


def dechunked(data):
    """The chunks of a chunked body, and whether the last one came."""
    chunks = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        if (length := int(size, 16)) == 0:
            assert rest == b"\r\n"
            return chunks, True
        assert rest[length : length + 2] in (b"\r\n", b"\r", b""), "chunks end where they say"
        chunks.append(rest[:length])
        data = rest[length + 2 :]
    return chunks, False


class Bench:
    """One scenario on a server: triggers it and looks at its streams, one attempt after the other."""

    def __init__(self, aura, name, case="85116"):
        self.aura, self.name, self.entries = aura, name, []
        self.run_id = aura.trigger(case, scenario=name, run_id=f"{name}-{time.monotonic_ns()}")

    def see(self, *, until=None, **headers):
        """One GET, read to its end, and what the journal says of it."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        path = f"/aura/analysis-runs/{self.run_id}/stream"
        with connect(self.aura, get(path, headers={**named, "Connection": "close"})) as wire:
            seen = Seen(wire, until=until)
        self.entries = self.aura.journal(self.run_id, count=len(self.entries) + 1, within=WAIT)
        seen.entry = self.entries[-1]
        assert seen.entry.scenario == self.name
        assert seen.entry.attempt == len(self.entries)
        assert seen.entry.status == seen.status or seen.ended == "none"
        if not until:
            assert (seen.entry.bytes, seen.entry.chunks) == (len(seen.body), len(list(filter(None, seen.chunks))))
            assert seen.entry.end.by == "server"
            assert seen.entry.end.how == {"none": "drop"}.get(seen.ended, seen.ended)
        return seen


@pytest.fixture(scope="module")
def jumping():
    """A server whose script time jumps: 300 seconds take milliseconds. (A jump takes 20 of them, so events need none.)"""
    with running(speed="max", event_delay=0.001) as aura:
        yield aura


HELLO = b": connected\n\n"
PHASE2 = ["started", "step", "step", "evidence", "step", "confidence", "step", "step", "proposal", "proposal", "completed"]
FOUR = ["started", "step", "step", "completed"]
EFFECTS = {}


def effect(*names):
    """The effect of these scenarios, as a client sees it."""

    def keep(check):
        EFFECTS.update(dict.fromkeys(names, check))
        return check

    return keep


def whole(seen, names):
    """A good stream: hello, these events in order with ids from 1, [DONE], and a proper end."""
    assert (seen.status, seen.ended) == (200, "end")
    assert seen.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert seen.body.startswith(HELLO) and seen.body.endswith(DONE)
    assert [(id, name) for id, name, _ in seen.events] == [(str(n), name) for n, name in enumerate(names, 1)]
    assert seen.entry.events == seen.entry.last_id_sent == len(names)
    return seen


@effect("ok")
def _(bench):
    whole(bench.see(), PHASE2)


@effect("phase3")
def _(bench):
    whole(bench.see(), ["started", "step", "step", "agent", "step", "agent", "step", "step", "completed"])


@effect("generation")
def _(bench):
    seen = bench.see()
    progress, preview = ["progress"], ["preview"]
    assert seen.names == progress * 3 + preview + progress * 2 + preview + progress * 2 + ["completed"]
    assert [id for id, _, _ in seen.events] == [f"{bench.run_id}_{n}" for n in range(1, len(seen.events) + 1)]
    values = [json.loads(data)["value"] for _, name, data in seen.events if name == "progress"]
    assert values == [10, 25, 40, 60, 75, 90, 100]
    assert json.loads(seen.events[0][2])["jobId"] == bench.run_id and b"[DONE]" not in seen.body


@effect("failed", "crash")
def _(bench):
    seen = whole(bench.see(), ["started", "step", "failed"])
    said = json.loads(seen.events[-1][2])
    expected = {"failed": ("the model refused the prompt", "llm"), "crash": ("RuntimeError: row 7 has no amount", "pipeline")}
    assert (said["error"], said["stage"]) == expected[bench.name]
    assert state(bench.aura, bench.run_id)["status"] == "failed"


@effect("slow-first")
def _(bench):
    seen = bench.see()
    assert seen.names == PHASE2
    assert seen.body.startswith(HELLO) and seen.entry.t.end - seen.entry.t.open < WAIT, "30 s took no 30 s"


@effect("silent")
def _(bench):
    seen = bench.see()
    assert seen.body.startswith(HELLO + b": heartbeat\n\n" * 9)
    assert seen.names == ["failed"] and json.loads(seen.events[0][2])["stage"] == "timeout"
    assert seen.entry.heartbeats in (9, 10)


@effect("slow-run")
def _(bench):
    whole(bench.see(), ["started", *["step"] * 7, "completed"])


@effect("stepped")
def _(bench):
    path = f"/aura/analysis-runs/{bench.run_id}/stream"
    with connect(bench.aura, get(path, headers={"Connection": "close"})) as wire:
        data = read_until(wire, HELLO)
        for n, name in enumerate(FOUR, 1):
            assert f"event: {name}\n".encode() not in data.split(b"id: 2\n")[-1], "it waits for its gate"
            bench.aura.signal(f"go-{n}", bench.run_id)
            data += read_until(wire, b"id: %d\n\n" % n)
            assert f"event: {name}\n".encode() in data
        assert DONE in data + read_until(wire, None)
    entry = bench.aura.journal(bench.run_id, count=1, within=WAIT)[0]
    assert (entry.end.by, entry.end.how, entry.events) == ("server", "end", 4)


@effect("flood")
def _(bench):
    seen = bench.see()
    assert seen.names == ["started", *["step"] * 20_000, "completed"]
    assert [int(id) for id, _, _ in seen.events] == list(range(1, 20_003))
    assert seen.entry.chunks < 20_000, "many events in one write"


@effect("big-event")
def _(bench):
    seen = whole(bench.see(), ["started", "evidence", "completed"])
    assert len(json.loads(seen.events[1][2])["pad"]) == 5_000_000


@effect("korean")
def _(bench):
    seen = whole(bench.see(), ["started", *["step"] * 5, "completed"])
    assert json.loads(seen.events[1][2])["detail"].startswith("증거를 수집하고")
    assert len(seen.events[1][2].encode()) > 3000


@effect("no-terminal")
def _(bench):
    whole(bench.see(), FOUR[:3])


@effect("progress-regress")
def _(bench):
    seen = whole(bench.see(), ["started", "step", "step", "step", "completed"])
    assert [json.loads(data)["percent"] for _, name, data in seen.events if name == "step"] == [45, 25, 85]


@effect("missing-started")
def _(bench):
    whole(bench.see(), FOUR[1:])


@effect("unknown-events")
def _(bench):
    whole(bench.see(), ["started", "telemetry", "x-internal", "completed"])


@effect("empty", "empty-truncated", "no-response", "first-chunk-then-close", "first-chunk-then-drop", "always-drop")
def _(bench):
    body, ended, status = {
        "empty": (b"", "end", 200), "empty-truncated": (b"", "drop", 200), "no-response": (b"", "none", 0),
        "first-chunk-then-close": (HELLO, "end", 200), "first-chunk-then-drop": (HELLO, "drop", 200),
        "always-drop": (HELLO, "drop", 200),
    }[bench.name]  # fmt: skip
    for _ in range(3):
        seen = bench.see()
        assert (seen.body, seen.ended, seen.status) == (body, ended, status)
        assert seen.entry.bytes == len(body) and seen.entry.events == 0


@effect("drop")
def _(bench):
    for _ in range(2):
        seen = bench.see()
        assert seen.ended == "drop" and seen.names == PHASE2[:3]
        assert seen.entry.said == (
            f"the server dropped the connection on purpose (step 2 of drop) after 3 events, {len(seen.body)} bytes"
        )


@effect("drop-mid-event")
def _(bench):
    seen = bench.see()
    assert seen.ended == "drop" and seen.names == PHASE2[:2] and re.search(rb'\n\nevent: step\ndata: {"[^\n]*$', seen.body)
    later = bench.see(Last_Event_ID="8")
    assert re.search(rb'\n\nevent: completed\ndata: {"[^\n]*$', later.body), "half the next one, not the third for ever"
    assert bench.see(Last_Event_ID="9").body.endswith(b"\nid: 11\n\n"), "and where there is no next one, none"


@effect("drop-resume")
def _(bench):
    first, second = bench.see(), bench.see(Last_Event_ID="2")
    assert (first.ended, second.ended) == ("drop", "end")
    assert [id for id, _, _ in first.events + second.events] == [str(n) for n in range(1, 12)]
    assert (second.entry.last_event_id, second.entry.resumed_after) == ("2", 2)
    assert (first.entry.end.by, first.entry.end.how, first.entry.end.step) == ("server", "drop", 2)
    assert (second.entry.end.by, second.entry.end.how, second.entry.last_id_sent) == ("server", "end", 11)


@effect("reset")
def _(bench):
    seen = bench.see()
    assert seen.ended == "reset" and seen.entry.events == 2


@effect("no-done")
def _(bench):
    seen = bench.see()
    assert seen.ended == "end" and seen.names == PHASE2 and b"[DONE]" not in seen.body


@effect("done-only")
def _(bench):
    seen = bench.see()
    assert (seen.body, seen.ended) == (DONE, "end")


@effect("unterminated-last-event")
def _(bench):
    seen = bench.see()
    assert seen.names == FOUR[:3] and seen.body.endswith(b"event: completed\ndata: {}\nid: 4\n") and seen.ended == "end"


@effect("after-done")
def _(bench):
    seen = bench.see()
    assert seen.body.endswith(DONE + b"data:\n\ndata:\n\n") and seen.ended == "end"


@effect("fallback-completed")
def _(bench):
    seen = bench.see()
    assert seen.names == ["started", "step", "completed"] and seen.body.endswith(DONE)
    assert json.loads(seen.events[-1][2]) == {"status": "completed", "runId": bench.run_id, "caseId": "85116"}
    assert b"\n\nevent: completed" in seen.body, "it is not of the log and has no id"


@effect("slow-headers", "slow-stream")
def _(bench):
    before = bench.aura._ask("GET", "/__aura/health").clock.now
    whole(bench.see(), PHASE2)
    assert bench.aura._ask("GET", "/__aura/health").clock.now - before >= {"slow-headers": 8, "slow-stream": 20}[bench.name]


@effect("idle-cut")
def _(bench):
    seen = bench.see()
    assert seen.ended == "drop" and seen.names == PHASE2[:2] and seen.entry.heartbeats == 0


@effect("no-heartbeat")
def _(bench):
    seen = whole(bench.see(), FOUR)
    assert seen.entry.heartbeats == 0 and b": heartbeat" not in seen.body


@effect("heartbeat-then-silence")
def _(bench):
    seen = bench.see(until=(b": heartbeat\n\n", 3))
    assert seen.body == HELLO + b": heartbeat\n\n" * 3
    assert (seen.entry.end.by, seen.entry.end.how) == ("client", "disconnect")


@effect("gateway-timeout")
def _(bench):
    seen = bench.see()
    assert seen.ended == "drop" and len(seen.events) == 30
    assert state(bench.aura, bench.run_id)["status"] in ("running", "completed")


@effect("buffered")
def _(bench):
    seen = whole(bench.see(), PHASE2)
    assert len(seen.chunks) == 1


@effect("buffered-4k")
def _(bench):
    seen = bench.see()
    assert {len(chunk) for chunk in seen.chunks[:-1]} <= {4096} and 0 < len(seen.chunks[-1]) <= 4096
    whole(seen, PHASE2)


@effect("dribble")
def _(bench):
    seen = whole(bench.see(), PHASE2)
    assert {len(chunk) for chunk in seen.chunks} == {1}


@effect("split-utf8")
def _(bench):
    seen = whole(bench.see(), PHASE2)
    lead = [n for n, byte in enumerate(seen.body) if byte >= 0xC0]
    ends = {sum(map(len, seen.chunks[: n + 1])) for n in range(len(seen.chunks))}
    assert len(lead) > 50 and ends >= {n + 1 for n in lead}, "a chunk ends inside every character"


@effect("mid-line")
def _(bench):
    seen = whole(bench.see(), PHASE2)
    assert {len(chunk) for chunk in seen.chunks} <= set(range(1, 8)) and seen.chunks[0] == b": conne"


@effect("coalesced")
def _(bench):
    seen = whole(bench.see(), PHASE2)
    assert len(seen.chunks) == 2 and parsed(seen.chunks[0])[-1][:2] == ("5", "step")


@effect("crlf", "cr-only", "bom")
def _(bench):
    seen, plain = bench.see(), Bench(bench.aura, "ok").see()
    newline, first = {"crlf": (b"\r\n", b""), "cr-only": (b"\r", b""), "bom": (b"\n", b"\xef\xbb\xbf")}[bench.name]
    assert seen.body.startswith(first + b": connected" + newline * 2) and seen.body.endswith(b"data: [DONE]" + newline * 2)
    assert len(re.findall(rb"\r\n|\r|\n", seen.body)) == seen.body.count(newline), "no other line ends"
    assert [event[:2] for event in seen.events] == [event[:2] for event in plain.events]


@effect("double-wrapped")
def _(bench):
    seen = bench.see()
    assert seen.body.startswith(HELLO + b'data:event: started\ndata:data: {"runId"')
    assert seen.body.endswith(b"data:data: [DONE]\n\n") and seen.names[:2] == ["message", "message"]


@effect("gateway-ids", "resume-unknown-id")
def _(bench):
    form = {"gateway-ids": "gw-{}", "resume-unknown-id": "opaque:{}"}[bench.name]
    seen = bench.see()
    if bench.name == "resume-unknown-id":
        assert seen.ended == "drop"
        seen = bench.see(Last_Event_ID="opaque:2")
        assert seen.entry.resumed_after == 0 and "Last-Event-ID is no event" in seen.entry.said
    assert [id for id, _, _ in seen.events] == [form.format(n) for n in range(1, 12)]


@effect("duplicate-events", "out-of-order")
def _(bench):
    seen = bench.see()
    order = {"duplicate-events": [1, 2, 2, 3, 4], "out-of-order": [1, 3, 2, 4]}[bench.name]
    assert [(id, name) for id, name, _ in seen.events] == [(str(n), FOUR[n - 1]) for n in order]
    if bench.name == "duplicate-events":
        assert seen.events[1] == seen.events[2], "the same event, to the letter"


@effect("bad-json")
def _(bench):
    seen = bench.see()
    assert seen.events[2] == ("2", "step", '{"label": "RULE_SC') and seen.body.endswith(DONE)


@effect("unauthorized", "forbidden", "rate-limited", "unknown-run", "unknown-run-404", "html", "json-instead", "gone-204",
        "sse-500")  # fmt: skip
def _(bench):
    status, kind, header, text = {
        "unauthorized": (401, "application/json", "www-authenticate", b"expired"),
        "forbidden": (403, "application/json", "x-aura-attempt", b"Not your case"),
        "rate-limited": (429, "application/json", "retry-after", b"too many requests"),
        "unknown-run": (200, "application/json", "x-aura-run-id", b"runId not found or already completed"),
        "unknown-run-404": (404, "application/json", "x-aura-run-id", bench.run_id.encode()),
        "html": (200, "text/html; charset=utf-8", "x-aura-run-id", b"<!doctype html>"),
        "json-instead": (200, "application/json", "x-aura-run-id", b'{"ok": true}'),
        "gone-204": (204, None, "x-aura-run-id", b""),
        "sse-500": (500, "text/event-stream; charset=utf-8", "x-aura-run-id", b""),
    }[bench.name]  # fmt: skip
    for _ in range(2):
        seen = bench.see()
        assert (seen.status, seen.headers.get("content-type"), seen.ended) == (status, kind, "end")
        assert header in seen.headers and text in seen.body and bool(text) == bool(seen.body)


@effect("unavailable", "refuse-3-then-ok")
def _(bench):
    for _ in range({"unavailable": 1, "refuse-3-then-ok": 3}[bench.name]):
        seen = bench.see()
        assert (seen.status, seen.headers["retry-after"]) == (503, "1")
    whole(bench.see(), PHASE2)
    whole(bench.see(), PHASE2)


@effect("expired-run", "other-worker")
def _(bench):
    assert [bench.see().status for _ in range(4)] == {
        "expired-run": [200, 404, 404, 404], "other-worker": [200, 404, 200, 404]
    }[bench.name]  # fmt: skip


@effect("resume-gap")
def _(bench):
    first, second = bench.see(), bench.see(Last_Event_ID="2")
    assert (first.ended, first.names) == ("drop", FOUR[:2])
    assert [event[:2] for event in second.events] == [("3", "gap"), ("4", "completed")]
    assert json.loads(second.events[0][2]) == {"from": 3, "to": 3}


@effect("retry-field")
def _(bench):
    seen = bench.see()
    assert seen.body.startswith(b"retry: 1500\n\n" + HELLO) and seen.names == PHASE2


@effect("two-subscribers")
def _(bench):
    path = f"/aura/analysis-runs/{bench.run_id}/stream"
    asked = get(path, headers={"Connection": "close"})
    with connect(bench.aura, asked) as one, connect(bench.aura, asked) as two:
        both = [Seen(wire).events for wire in (one, two)]
    taken = sorted(int(id) for events in both for id, _, _ in events)
    assert taken == list(range(1, 12)), "each event went to one of them, none to both"


@effect("slow-trigger", "trigger-503", "trigger-lost", "trigger-disabled")
def _(bench):
    """The trigger itself goes wrong, so here it is asked by hand (see `starts` below)."""
    aura, run_id = bench.aura, f"{bench.name}-{time.monotonic_ns()}"
    body = json.dumps({"runId": run_id, "scenario": bench.name}).encode()
    answers = []
    for _ in range(2):
        head = f"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nContent-Length: {len(body)}"
        with connect(aura, head.encode() + b"\r\nConnection: close\r\n\r\n" + body) as wire:
            answers.append(Seen(wire))
    first, second = aura.journal(run_id, kind="trigger", count=2, within=WAIT)
    ends, runs = [(one.status, one.ended) for one in answers], [one.headers.get("x-aura-run") for one in answers]
    assert (first.attempt, second.attempt) == (1, 2)
    if bench.name == "slow-trigger":
        assert ends == [(202, "end")] * 2 and runs == ["started", "known"]
        assert json.loads(answers[0].body)["status"] == "ACCEPTED"
    elif bench.name == "trigger-lost":
        assert ends == [(0, "reset"), (202, "end")] and runs == [None, "known"]
        assert (first.end.how, json.loads(answers[1].body)["runId"]) == ("reset", run_id)
    else:
        status, text = {"trigger-503": (503, b"unavailable"), "trigger-disabled": (200, b"disabled")}[bench.name]
        assert ends == [(status, "end")] * 2 and text in answers[0].body
        with pytest.raises(RuntimeError, match="404"):
            aura._ask("GET", f"/__aura/runs/{run_id}")


@effect("duplicate-run")
def _(bench):
    whole(bench.see(), ["started", "started", "step", "step", "step", "step", "completed", "completed"])


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_scenario_has_its_effect(name, jumping):
    """On a real socket, byte for byte where it is about bytes, and what the journal says of it."""
    check = EFFECTS[name]
    starts = CATALOGUE[name].trigger is None
    check(Bench(jumping, name) if starts else types.SimpleNamespace(aura=jumping, name=name))


# ═══ 14  The page ═══════════════════════════════════════════════════════════════════════════════


class Live:
    """The live page in the browser, and the hands of somebody who uses it."""

    def __init__(self, browser, aura, fragment="waits=0.01"):
        self._browser = browser
        browser.open("about:blank")
        browser.logged()
        browser.open(f"{aura.url}/#{fragment}")
        self.url = aura.url

    def start(self, scenario="", phase="phase2"):
        self.until(f"[...$('scenario').options].some((one) => one.value === '{scenario}')")
        self.run(f"$('scenario').value = '{scenario}'; $('phase').value = '{phase}'; $('start').click();")

    def run(self, script):
        return self._browser.run(script)

    def text(self, id):
        return self.run(f"return $('{id}').innerText")

    def rows(self):
        """[id, name, at, after, data] of each event that is listed, oldest first."""
        listed = self.run("return [...$('events').children].map((one) => one.textContent)")
        return [text.split(" · ", 4) for text in reversed(listed)]

    def until(self, condition):
        wait = "await new Promise((soon) => setTimeout(soon, 10))"
        assert self.run(f"while (!({condition})) {wait}; return true") is True, condition

    def over(self):
        """Wait for the end, and for what the journal says of each attempt."""
        self.until("run?.finished && $('said').children.length")
        self.run("await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        return self.text("state")

    def complaints(self):
        """What went wrong in the browser, but for connections that were to break."""
        foreign = self.run("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert all(name.startswith((f"{self.url}/", "data:")) for name in foreign), foreign
        return [line for line in self._browser.logged() if "ERR_INCOMPLETE_CHUNKED_ENCODING" not in line]


def test_the_page_is_for_browsers_and_runs_nothing_but_itself():
    with running() as aura:
        shown = httpx.get(aura.url, headers={"Accept": "text/html,*/*;q=0.8"})
        assert shown.headers["content-type"] == "text/html; charset=utf-8"
        assert "<title>Aura stream</title>" in shown.text
        assert httpx.get(aura.url, headers={"Accept": "*/*"}).json()["status"] == "operational"
    rules = dict(rule.split(" ", 1) for rule in shown.headers["content-security-policy"].split("; "))
    assert rules.pop("connect-src") == "'self'" and rules.pop("img-src") == "data:"
    for kind in ("script", "style"):
        (nonce,) = re.findall(f'<{kind} nonce="(.*?)">', shown.text)
        assert rules.pop(f"{kind}-src") == f"'nonce-{nonce}'" and len(nonce) == 32
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert not re.search(r"https?:|innerHTML|insertAdjacent|document\.write|eval\(|\bstyle=|\bon\w+=", aura_stream.PAGE)


def test_the_page_is_small_and_can_be_read():
    starts = {title: line for _, title, line in chapters()}
    assert starts["Serving"] - starts["The page"] <= 380
    assert max(map(len, aura_stream.PAGE.splitlines())) <= 100


@pytest.mark.parametrize(("phase", "count"), [("phase2", 11), ("phase3", 9), ("job", 10)])
def test_the_page_shows_a_run_from_its_first_event_to_its_last(browser, phase, count):
    with running(event_delay=0.005 if phase == "job" else 0.02) as aura:
        live = Live(browser, aura)
        live.start("" if phase == "job" else "ok", phase)
        assert live.over() == f"Ended with completed after {count} events."
        rows = live.rows()
        assert len(rows) == count and rows[-1][1] == "completed" and live.run("return $('progress').value") == 100
        assert all(re.fullmatch(r"\d+\.\d\d s \+\d+\.\d\d s", f"{at} {after}") for _, _, at, after, _ in rows)
        arrivals = int(re.search(r"in (\d+) arrival", live.text("facts"))[1])
        bars = live.run("return $('bars').getAttribute('d').split('M').length - 1")
        assert arrivals > count / 2 and bars >= arrivals - 1
        assert live.text("said").startswith("the server ended the answer properly") and live.complaints() == []
        assert "connection" not in live.text("facts") and "attempt 1," in live.text("facts")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_page_needs_no_sideways_scroll(browser, width, scheme):
    with running(event_delay=0) as aura, browser.looks_like(width, scheme):
        live = Live(browser, aura)
        assert live.run(f"return [innerWidth, matchMedia('(prefers-color-scheme: {scheme})').matches]") == [width, True]
        live.start("big-event")
        assert live.over().startswith("Ended with completed")
        live.until("$('tree').textContent.includes('nursery runs')")
        assert live.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_page_comes_back_to_a_stream_that_breaks_and_sees_each_event_once(browser, usual_cuts):
    with running(event_delay=0.01) as aura:
        live = Live(browser, aura)
        live.start("drop-resume")
        assert live.over() == "Ended with completed after 11 events."
        assert [row[0] for row in live.rows()] == [str(n) for n in range(1, 12)]
        first, second = live.text("said").splitlines()
        assert first.startswith("the server dropped the connection on purpose")
        assert second.startswith("the server ended the answer properly")
        assert "attempt 2" in live.text("facts") and live.complaints() == []
        entries = aura.journal(live.run("return run.id"))
        assert [entry.last_event_id for entry in entries] == [None, "2"]


def test_the_page_keeps_its_place_over_an_event_without_an_id(browser, tmp_path, usual_cuts):
    hello, over = {"comment": "connected"}, [{"relay": "all"}, {"raw": "data: [DONE]\n\n"}]
    cut = [{"sleep": 0.1}, "drop"]
    stream = [[hello, {"relay": 2}, *cut], [hello, {"event": {"event": "step", "data": 0}}, *cut], over]
    own = {"name": "forgetful", "doc": "an event without an id after a break", "stream": stream}
    (tmp_path / "own.json").write_text(json.dumps(own))
    with running(event_delay=0, scenarios=str(tmp_path / "own.json")) as aura:
        live = Live(browser, aura)
        live.start("forgetful")
        assert live.over() == "Ended with completed after 12 events."
        assert [entry.last_event_id for entry in aura.journal(live.run("return run.id"))] == [None, "2", "2"]


@pytest.mark.long
def test_nothing_a_stream_says_stops_the_page(browser, tmp_path):
    """`retry: 0`, percents that are no numbers, many comments, Korean ids; events without id, and beats, are no news."""
    hello, rest, pause = {"comment": "connected"}, {"relay": "all"}, {"sleep": 0.1}
    step = [{"event": {"event": "step", "data": {"percent": percent}}} for percent in ("half", {}, 1e308, 40)]
    beat, over = {"raw": "event: heartbeat\ndata: {}\n\n"}, {"event": {"event": "completed", "data": {}}}
    named = {"frame": {"id": "작업_{n}"}}
    own = [
        {"name": "retry-0", "stream": [[hello, {"relay": 2}, {"raw": "retry: 0\n\n"}, pause, "drop"], [hello, rest]]},
        {"name": "percents", "run": [*step, over]}, {"name": "comments", "stream": [{"raw": ":\n" * 200_000}, rest]},
        {"name": "korean-ids", "stream": [[named, hello, {"relay": 2}, pause, "drop"], [named, hello, rest]]},
        {"name": "no-ids", "stream": [{"frame": {"id": None}}, hello, {"relay": 2}, beat, pause, "drop"]},
        {"name": "beats-only", "stream": [hello, beat, pause, "drop"]},
    ]  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps([{"doc": "odd", **one} for one in own]))
    with running(event_delay=0, max_retries=2, scenarios=str(tmp_path / "own.json")) as aura:
        live = Live(browser, aura)
        gives_up = "The connection broke, and all 2 tries are used up."
        for name, said, ids in (
            ("retry-0", "Ended with completed after 11 events.", [None, "2"]),
            ("percents", "Ended with completed after 5 events.", [None]),
            ("comments", "Ended with completed after 11 events.", [None]),
            ("korean-ids", "Ended with completed after 11 events.", [None, "작업_2"]),
            ("no-ids", gives_up, [None] * 3), ("beats-only", gives_up, [None] * 3),
        ):  # fmt: skip
            live.start(name)
            live.until(f"run?.id && run.finished && $('state').innerText.startsWith({json.dumps(said)})")
            entries = aura.journal(live.run("return run.id"), count=len(ids), within=WAIT)
            assert [entry.last_event_id for entry in entries] == ids, name
            if said != gives_up:
                live.until(f"$('events').children.length === {said.split()[4]} && $('progress').value === 100")
        assert live.run("return pauseOf(1e9)") <= 66
        assert live.complaints() == []


def test_on_the_page_buffering_is_seen(browser):
    with running(event_delay=0.08) as aura:
        live = Live(browser, aura)
        live.start("buffered")
        said = "Ended with completed after 11 events. All came at once, at the end: somebody held them back."
        assert live.over() == said and "11 events in 1 arrival " in live.text("facts")
        (bar,) = re.findall(r"M([\d.]+)", live.run("return $('bars').getAttribute('d')"))
        seconds = live.run("return $('line').viewBox.baseVal.width")
        assert 0.95 < float(bar) / seconds < 1 and live.complaints() == []


def test_the_page_runs_out_of_tries_and_offers_to_try_again(browser):
    with running(speed="50", max_retries=3) as aura:
        live = Live(browser, aura)
        live.start("always-drop")
        live.until("run?.finished && $('again').hidden")  # not yet: everybody would come back at once
        assert live.text("state") == "The connection broke, and all 3 tries are used up. Try again in a minute."
        live.until("!$('again').hidden && $('again').innerText === 'Try again'")
        assert len(aura.journal(count=4, within=WAIT)) == 4
        live.run("$('again').click()")
        assert len(aura.journal(count=8, within=WAIT)) == 8
        live.until("run.finished && !$('again').hidden")
        waits = live.run("return BACK_OFF.map((s) => Array.from({ length: 200 }, () => pauseOf(s)))")
        for seconds, drawn in zip((1, 2, 5, 15), waits, strict=True):
            assert 0.9 * seconds <= min(drawn) < max(drawn) <= 1.1 * seconds
        assert live.run("return pauseOf(0.1)") == 0.5


def test_the_page_gives_up_on_silence_and_grades_a_connection_as_the_contract_says(browser):
    with running(heartbeat=0) as aura:
        live = Live(browser, aura)
        live.start("silent")
        live.until("$('facts').innerText.includes('connection ')")
        live.run("run.heard -= 25; await sleep(150)")
        assert live.run("return [SILENCE, run.attempt]") == [45, 1]
        live.run("run.heard -= 20")
        live.until("run.attempt > 1")
        (first, *_) = aura.journal(count=1, within=WAIT)
        assert (first.end.by, first.end.how) == ("client", "disconnect")
        live.run("$('cancel').click()")
        graded = """return given[0].map(([latency, silent, tries]) => {
            Object.assign(run, { latency, tries, heard: now() - silent });
            return quality(); })"""
        cases = {
            "excellent": [[99, 34, 0]],
            "good": [[101, 0, 0], [99, 36, 0], [0, 0, 1], [499, 39, 0]],
            "poor": [[0, 0, 2], [501, 0, 0], [999, 59, 1]],
            "critical": [[1001, 0, 0], [0, 61, 0], [0, 0, 3]],
        }
        for grade, seen in cases.items():
            assert set(live._browser.run(graded, seen)) == {grade}


def test_to_cancel_on_the_page_ends_one_branch_of_the_tree(browser):
    with running() as aura:
        other = aura.trigger("1", scenario="silent")
        live = Live(browser, aura)
        live.start("silent")
        live.until("/delivery page-[^]*analysis page-/.test($('tree').innerText)")
        live.run("$('cancel').click()")
        assert live.over() == "Ended with failed after 1 event; you asked to cancel the run."
        mine = live.run("return run.id")
        live.until(f"!$('tree').innerText.includes('{mine}')")
        assert f"run {other}" in live.text("tree") and live.complaints() == []


def test_to_leave_on_the_page_ends_a_delivery_and_the_run_goes_on(browser):
    with running() as aura:
        live = Live(browser, aura)
        live.start("stepped")
        aura.signal("go-1")
        live.until("$('events').children.length === 1")
        live.run("$('leave').click()")
        live.until("$('state').innerText === 'You left after 1 event; the run is running. Come back for the rest.'")
        live.over()
        assert live.text("said").startswith("the client closed the connection")
        for gate in ("go-2", "go-3", "go-4"):
            aura.signal(gate)
        assert live.text("again") == "Come back"
        live.run("$('again').click()")
        live.until("run.finished && !run.offer")
        assert live.over() == "Ended with completed after 4 events."
        assert [row[0] for row in live.rows()] == ["1", "2", "3", "4"]
        assert live.complaints() == []


def test_what_comes_from_outside_is_only_text_on_the_page(browser, tmp_path):
    bad = "<img src=x onerror=window.hit=1>"
    (tmp_path / "own.json").write_text(json.dumps({
        "name": "hostile", "doc": bad, "run": [{"event": {"event": bad, "data": {"percent": bad, "증거": bad}}}],
        "stream": [{"frame": {"id": bad}}, {"relay": "all"}, {"event": {"event": "completed", "data": bad}}],
    }))  # fmt: skip
    with running(scenarios=str(tmp_path / "own.json")) as aura:
        live = Live(browser, aura)
        live.run(f"$('case').value = '{bad}'")
        live.start("hostile")
        live.run("$('scenario').dispatchEvent(new Event('change'))")
        assert live.text("doc") == bad
        assert live.over() == "Ended with completed after 2 events." and live.rows()[0][:2] == [bad, bad]
        assert live.run("return [window.hit ?? 0, document.images.length, document.scripts.length]") == [0, 0, 1]


def test_the_page_says_what_was_answered_where_it_is_no_stream(browser):
    with running(event_delay=0) as aura:
        live = Live(browser, aura)
        for scenario, said in (
            ("html", "This is no stream but 200, text/html; charset=utf-8: <!doctype html>"),
            ("forbidden", "This is no stream but 403, application/json: {\"detail\": \"Not your case\"}"),
            ("trigger-503", "The trigger was not accepted: 503, {\"error\": \"temporarily unavailable\"}"),
            ("trigger-lost", "Ended with completed after 11 events."), ("failed", "Ended with failed after 3 events."),
            ("unavailable", "Ended with completed after 11 events."),
            ("flood", "Ended with completed after 20002 events."),
        ):  # fmt: skip
            live.start(scenario)
            live.until(f"run.finished && $('state').innerText.startsWith({json.dumps(said)})")
        assert len(live.rows()) == 300 and live.rows()[-1][0] == "20002"


def test_with_an_admin_token_the_page_asks_for_it(browser):
    with running(admin_token="s3cret", event_delay=0) as aura:
        live = Live(browser, aura)
        live.until("!$('lock').hidden")
        assert "ADMIN_TOKEN" in live.text("why")
        live.run("$('token').value = 'wrong'; $('lock').requestSubmit()")
        live.until("$('why').innerText && !$('lock').hidden")
        live.run("$('token').value = 's3cret'; $('lock').requestSubmit()")
        live.until("$('lock').hidden && $('tree').innerText.includes('nursery runs')")
        live.start("ok")
        assert live.over() == "Ended with completed after 11 events." and live.text("why") == ""


# ═══ 15  Serving ════════════════════════════════════════════════════════════════════════════════


def test_running_serves_on_a_free_port_and_leaves_nothing_behind():
    threads, before = threading.active_count(), descriptors()
    with running(event_delay=0) as aura:
        assert aura.url == f"http://127.0.0.1:{aura.port}"
        run_id = aura.trigger("85116", run_id="mine")
        assert run_id == "mine"
        assert len(parsed(stream(aura, run_id))) == 11
    assert threading.active_count() <= threads
    eventually(lambda: descriptors() <= before)
    with pytest.raises(ConnectionRefusedError):
        connect(aura)


def test_two_servers_in_one_process_do_not_meet():
    with running(event_delay=0) as one, running(event_delay=0) as two:
        run_id = one.trigger("1")
        assert one.port != two.port
        assert httpx.get(f"{two.url}/aura/analysis-runs/{run_id}/stream", headers=BEARER).status_code == 404


def test_a_failed_start_raises_in_the_caller_as_the_oserror_it_was():
    with running() as aura, pytest.raises(OSError) as error, running(port=aura.port):
        pass
    assert error.value.errno == errno.EADDRINUSE


def test_a_start_that_is_interrupted_leaves_no_thread_behind(tmp_path):
    """A Ctrl-C while the server still reads its scenarios, here from a pipe that another thread fills."""
    threads, interrupted, slow = threading.active_count(), threading.Event(), tmp_path / "slow.json"
    os.mkfifo(slow)

    def interrupt(number, frame):
        interrupted.set()
        raise KeyboardInterrupt

    def waits_for_the_start():
        frame, names = sys._current_frames()[threading.main_thread().ident], set()
        while frame:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        return "result" in names

    def press():
        with slow.open("w") as pipe:  # it has begun to start
            eventually(waits_for_the_start)
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted.wait(WAIT)
            pipe.write("[]")

    before, pressing = signal.signal(signal.SIGINT, interrupt), threading.Thread(target=press)
    try:
        pressing.start()
        with pytest.raises(KeyboardInterrupt), running(scenarios=str(slow)):
            pytest.fail("it started")
    finally:
        signal.signal(signal.SIGINT, before)
        pressing.join()
    assert threading.active_count() <= threads, threading.enumerate()


FORKING = """
import os, signal, urllib.request, aura_stream
with aura_stream.running() as aura:
    child = os.fork()
    signal.alarm(10)
    if child:
        assert os.waitpid(child, 0)[1] == 0
        assert urllib.request.urlopen(aura.url + "/health").status == 200
print("unwound", flush=True)
"""


def test_a_process_forked_inside_unwinds_and_does_not_stop_its_parent_s_server():
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKING], env=env, capture_output=True, text=True, timeout=WAIT)
    assert (found.stdout, found.returncode) == ("unwound\n" * 2, 0), found.stderr


def test_a_server_may_be_stopped_from_any_thread_and_more_than_once():
    with running() as aura:
        aura.stop()
        eventually(lambda: refused(aura))
        aura.stop()
    aura.stop()


def test_a_refused_trigger_says_what_was_answered():
    with running() as aura, pytest.raises(RuntimeError, match="422"):
        aura.trigger("1", scenario={"name": "BAD"})


async def test_serve_is_a_trio_task_that_starts_and_stops():
    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            aura = await nursery.start(serve, Settings(port=0))
            wire = await trio.open_tcp_stream("127.0.0.1", aura.port)
            await wire.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"healthy" in await wire.receive_some()
            aura.stop()
        await wire.aclose()


async def test_a_cancelled_server_ends_at_once_and_blames_nobody_else(heard):
    async with trio.open_nursery() as nursery:
        aura = await nursery.start(serve, Settings(port=0))
        run_id = await trio.to_thread.run_sync(lambda: aura.trigger("1", scenario=QUIET))
        wire = await trio.open_tcp_stream("127.0.0.1", aura.port)
        await wire.send_all(get(f"/aura/analysis-runs/{run_id}/stream"))
        while b'"a"}' not in await wire.receive_some():
            pass
        nursery.cancel_scope.cancel()
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed", within=1)
    await wire.aclose()


def test_the_stop_ends_runs_then_streams_then_connections(heard):
    with running() as aura:
        wire, _ = open_quiet_stream(aura)
        aura.stop()
        rest = read_until(wire, None)
        assert b'"stage": "shutdown"' in rest
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wire.close()
    assert "by=server how=end" in heard.wait_for("stream closed")
    heard.wait_for("INFO stopping: first nobody new, then the runs, then their streams", within=0)


def test_what_will_not_end_is_cut_when_the_grace_is_over(heard):
    endless = {"name": "endless", "run": says("a"), "stream": [{"relay": 1}, {"sleep": 1000}]}
    with running(grace=0.3) as aura:
        run_id = aura.trigger("1", scenario=endless)
        wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream"))
        read_until(wire, b"id: 1\n\n")
        aura.stop()
        assert b"0\r\n\r\n" not in read_until(wire, None)
        wire.close()
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")


def test_a_stalled_reader_holds_up_the_stop_no_longer_than_the_grace(heard):
    with running(grace=0.3, send_timeout=60) as aura:
        run_id = aura.trigger("1", scenario=FLOOD)
        wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream"))
        heard.wait_for("first chunk sent")
        eventually(lambda: state(aura, run_id)["events"] == 400)
        before = time.monotonic()
    assert time.monotonic() - before < 1.5
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")
    wire.close()


@contextlib.contextmanager
def process(*flags, **environment):
    """The server as a process, as a person starts it; its port."""
    command = [sys.executable, str(HERE / "aura_stream.py"), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, **environment}) as server:  # fmt: skip
        try:
            line = server.stdout.readline()
            found = re.fullmatch(r"Aura stream ready on http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line + server.stderr.read()
            port = int(found[1])
            yield server, aura_stream.Aura(f"http://127.0.0.1:{port}", port, server.terminate)
        finally:
            server.kill()


def delayed_acks():
    """How often the kernel has put an acknowledgement off until its timer, on all sockets there are."""
    names, counts = Path("/proc/net/netstat").read_text().splitlines()[:2]
    return int(dict(zip(names.split(), counts.split(), strict=True))["DelayedACKs"])


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's own counters")
@pytest.mark.parametrize("said", [
    {"repeat": 20_000, "steps": [{"event": {"data": {"text": "x" * 60}}}]}, {"event": {"data": {}}, "pad": 5_000_000},
], ids=["a long log", "a big event"])  # fmt: skip
def test_a_replay_waits_for_no_delayed_acknowledgement(said):
    """A receiver acknowledges at once what is more than one segment; a lone one that fills the sender's buffer,
    loopback's have 65483 bytes, waits for a timer of 40 ms: 17 000 events/s in place of 500 000. The fewest of
    some replays count: the machine has other sockets."""
    counts = []
    with process("--log-level", "ERROR") as (_, aura):
        run_id = aura.trigger("1", scenario={"name": "much", "run": [said]})
        eventually(lambda: state(aura, run_id)["status"] == "completed")
        for _ in range(5):
            before, tail = delayed_acks(), b""
            with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
                while b"[DONE]" not in tail:
                    tail = tail[-9:] + wire.recv(2**18)
                largest = struct.unpack_from("=8x4I", wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))[3]
            counts.append(delayed_acks() - before)
    assert Settings().send_buffer // largest >= 4, f"the client's kernel met segments of {largest} bytes"
    assert min(counts) <= 1, counts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_truthfully_and_the_exit_status_is_0(number):
    with process() as (server, aura):
        wire, _ = open_quiet_stream(aura)
        server.send_signal(number)
        rest = read_until(wire, None)
        assert b'"stage": "shutdown"' in rest
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wire.close()
        assert server.wait(WAIT) == 0
        assert server.stdout.read() == "", "stdout has the readiness line and nothing else"
        assert "Traceback" not in server.stderr.read()


def test_a_second_signal_exits_at_once():
    endless = {"name": "endless", "run": says("a"), "stream": [{"relay": 1}, {"sleep": 1000}]}
    with process("--grace", "1000") as (server, aura):
        run_id = aura.trigger("1", scenario=endless)
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, b"id: 1\n\n")
            server.send_signal(signal.SIGTERM)
            eventually(lambda: refused(aura))
            server.send_signal(signal.SIGTERM)
            assert server.wait(WAIT) == 128 + signal.SIGTERM


def refused(aura):
    try:
        connect(aura).close()
    except ConnectionRefusedError:
        return True
    return False


def left_early(aura, run_id, entry, before):
    """The journal blames the client, at once, and the run went on."""
    assert (entry.end.by, entry.end.how) == ("client", "disconnect")
    assert entry.t.end - before < 0.5, "100 ms by hand, five times the slack here"
    assert state(aura, run_id)["status"] == "running"


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_client_that_leaves_early_closed_first(upgrade):
    """The seed case: it closes after its first 13 bytes; also one that had offered h2c."""
    h2c = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA"}
    with running() as aura:
        run_id = aura.trigger("85116", scenario={"name": "quiet", "run": ["hang"]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers=h2c if upgrade else {})) as wire:
            read_until(wire, HELLO)
            before = aura._ask("GET", "/__aura/connections").connections[0].latency
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
        assert (entry.bytes, entry.chunks, entry.events, entry.status) == (13, 1, 0, 200)
        assert entry.headers.upgrade == ("h2c" if upgrade else None)
        left_early(aura, run_id, entry, entry.t.open + before)


@pytest.mark.parametrize(("scenario", "last"), [("ok", DONE), ("buffered-4k", DONE), ("after-done", b"data:\n\ndata:\n\n"), ("dribble", b"]\r\n1\r\n\n")])
def test_a_clean_end_is_never_blamed_on_the_client(scenario, last):
    """Whoever hangs up on reading the last words has got the end with them: it is one write."""
    with running(event_delay=0) as aura:
        for number in range(25):
            run_id = aura.trigger("1", run_id=f"r{number}", scenario=scenario)
            with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
                assert read_until(wire, last).endswith(b"\r\n0\r\n\r\n")
        ends = {(one.end.by, one.end.how) for one in aura.journal(count=25, within=WAIT)}
    assert ends == {("server", "end")}


@pytest.mark.parametrize("how", ["drop", "reset"])
def test_a_break_comes_a_while_after_the_last_bytes_however_fast_script_time_is(how, usual_cuts):
    """Some clients throw away what arrives together with a break; inline scripts have the pause, too."""
    with running(event_delay=0, speed="max") as aura:
        run_id = aura.trigger("1", scenario={"name": "short", "stream": [{"comment": "a"}, {"relay": 1}, how]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, b"id: 1\n\n\r\n")
            before = time.monotonic()
            with pytest.raises(ConnectionResetError) if how == "reset" else contextlib.nullcontext():
                assert wire.recv(1) == b""
            assert time.monotonic() - before > 0.15
        assert aura.journal(run_id, count=1, within=WAIT)[0].end.how == how
        began = time.monotonic()
        run_id = aura.trigger("1", scenario="no-response")
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            assert wire.recv(1) == b"" and time.monotonic() - began < 0.15, "where nothing was said nothing is waited for"


def test_an_operator_s_restart_drops_with_a_retry_so_that_every_client_comes_back():
    """To fetch-event-source and its likes a proper end is the end, and the run goes on."""
    with running() as aura:
        for query, how in (("", "drop"), ("?how=end", "end"), ("?how=reset", "reset")):
            for path, said in (("restart", "closed"), ("broadcast-reconnect", "notified")):
                wire, run_id = open_quiet_stream(aura, Connection="close")
                assert aura._ask("POST", f"/api/admin/sse/{path}{query}").__dict__ == {said: 1}
                with wire, pytest.raises(ConnectionResetError) if how == "reset" else contextlib.nullcontext():
                    rest = read_until(wire, b"\n\n\r\n")
                    assert re.match(rb"(\r\n)?d\r\nretry: \d{4}\n\n\r\n", rest)
                    assert (rest + read_until(wire, None)).endswith(b"0\r\n\r\n") == (how == "end")
                (entry,) = aura.journal(run_id, count=1, within=WAIT)
                assert (entry.end.by, entry.end.how, state(aura, run_id)["status"]) == ("admin", how, "running")
        with pytest.raises(RuntimeError, match="'how' takes"):
            aura._ask("POST", "/api/admin/sse/restart?how=slowly")


@pytest.mark.parametrize(("stream", "version"), [
    ([{"chunk": 1}, {"raw": "x" * 1200}], "1.1"), ([{"chunk": 1}, {"raw": "x" * 1200}], "1.0"), ([{"chunk": "utf8"}, {"raw": "가" * 400}], "1.1"),
    ([{"chunk": "line"}, {"event": {"data": "a\n" * 400}}], "1.1"), ([{"chunk": 1000}, {"event": {"data": {}}, "pad": 200_000}], "1.1"),
    ([{"chunk": 1}, {"buffer": "all"}, {"comment": "y" * 900}], "1.1"), ([{"chunk": 1}, {"raw": "x" * 30_000}], "1.1"),
])  # fmt: skip
def test_last_words_of_any_form_come_and_are_counted(stream, version):
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "long", "stream": stream})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", version=version, headers={"Connection": "close"})) as wire:
            seen = Seen(wire)
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert seen.ended == "end" and (entry.end.by, entry.end.how, entry.bytes) == ("server", "end", len(seen.body))


@pytest.mark.parametrize("rest", [[], [{"sleep": 1000}]])
@pytest.mark.parametrize("chunk", [[], [{"chunk": 1000}]])
def test_what_a_client_has_read_before_it_leaves_is_counted(rest, chunk):
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "big", "stream": [*chunk, {"event": {"data": {}}, "pad": 300_000}, *rest]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, b'x"}\n\n' if not chunk else b"}\n\n")
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert (entry.events, entry.bytes) == (1, 300_019), entry.said


@pytest.mark.parametrize("second", ["POST /api/admin/sse/broadcast-reconnect", "DELETE /__aura/connections?how=end", "POST /api/admin/connections/reset"])
def test_two_operators_at_once_are_operators(second, heard, usual_cuts):
    with running() as aura:
        wire, run_id = open_quiet_stream(aura)
        aura._ask("POST", "/api/admin/sse/restart")
        aura._ask(*second.split())
        with wire:
            wire.settimeout(2)
            with contextlib.suppress(TimeoutError):
                assert b"retry: 1000\n\n" in read_until(wire, b"0\r\n\r\n" if "end" in second else None)
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert (entry.end.by, entry.end.how) == ("admin", "end" if "end" in second else "drop")
    assert "Error in ASGI" not in heard.all()


def test_a_restart_lets_the_last_words_go_before_its_own():
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "slow", "stream": [{"comment": "connected"}, {"chunk": 400}, {"raw": "x" * 50_000 + "\n\n"}]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers={"Connection": "close"})) as wire:
            aura._ask("POST", "/api/admin/sse/restart")  # perhaps before them, mostly between
            seen = Seen(wire)
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert entry.bytes == len(seen.body) and seen.body.endswith(b"retry: 1000\n\n" if entry.end.by == "admin" else b"x\n\n")


def test_who_leaves_on_a_job_s_last_event_is_not_blamed_for_its_end():
    with running(event_delay=0) as aura:
        for _ in range(30):
            job = httpx.post(f"{aura.url}/api/v1/generations", json={"projectId": "1"}).json()["jobId"]
            with connect(aura, get(f"/api/v1/generations/{job}/events")) as wire:
                read_until(wire, b"event: completed")
        ends = {(one.end.by, one.end.how) for one in aura.journal(count=30, within=WAIT)}
    assert ends == {("server", "end")}


def test_an_http10_client_cannot_tell_a_drop_from_an_end_and_the_journal_says_so():
    with running(event_delay=0) as aura:
        run_id = aura.trigger("1", scenario="drop")
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", version="1.0")) as wire:
            assert b"chunked" not in read_until(wire, None).lower()
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert (entry.http_version, entry.end.by, entry.end.how) == ("1.0", "server", "drop")
    assert "an HTTP/1.0 client" in entry.said


@pytest.mark.parametrize("how", ["end", "drop", "reset"])
def test_an_operator_closes_what_is_open_wherever_it_is(how):
    """In a relay, a sleep, at a gate, hanging, between slow chunks: closed in the way that was asked."""
    waits = ({"relay": "all"}, {"sleep": 1000}, {"wait": "never"}, "hang", {"relay": "all", "every": 1000})
    with running(event_delay=0) as aura:
        run_id = aura.trigger("1", scenario={"name": "quiet", "run": [*says("a", "b"), "hang"]})
        with contextlib.ExitStack() as wires:
            opened = []
            for number, step in enumerate(waits):
                name = json.dumps({"name": f"w{number}", "stream": [{"comment": "connected"}, step]})
                asked = get(f"/aura/analysis-runs/{run_id}/stream", headers={"X-Aura-Scenario": name, "Connection": "close"})
                opened.append(wires.enter_context(connect(aura, asked)))
                read_until(opened[-1], HELLO)
            listed = aura._ask("GET", "/__aura/connections").connections
            assert len(listed) == len(waits) and all(one.end is None for one in listed)
            assert aura._ask("DELETE", f"/__aura/connections/{listed[0].id}?how={how}").closed == 1
            assert aura._ask("DELETE", f"/__aura/connections?how={how}").closed in (len(waits) - 1, len(waits))
            endings = []
            for wire in opened:
                data, ending = b"", "drop"
                try:
                    while piece := wire.recv(65536):
                        data += piece
                    ending = "end" if data.endswith(b"0\r\n\r\n") else "drop"
                except ConnectionResetError:
                    ending = "reset"
                endings.append(ending)
        assert endings == [how] * len(waits)
        entries = aura.journal(run_id, count=len(waits), within=WAIT)
        assert {(one.end.by, one.end.how) for one in entries} == {("admin", how)}
        assert state(aura, run_id)["status"] == "running" and aura._ask("GET", "/health").sse_connections == 0


def test_who_is_stalled_when_an_operator_ends_all_streams_is_named():
    """The end never reached this viewer: it was cut off at the send deadline, and that is what happened."""
    with running(send_timeout=0.5) as aura, socket.socket() as wire:
        run_id = aura.trigger("1", scenario=FLOOD)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        wire.connect(("127.0.0.1", aura.port))
        wire.sendall(get(f"/aura/analysis-runs/{run_id}/stream"))
        seen = [None]

        def stalled():
            seen.append([one.bytes for one in aura._ask("GET", "/__aura/connections").connections])
            return seen[-1] and seen[-1] == seen[-2]

        eventually(stalled)
        assert aura._ask("POST", "/api/admin/sse/restart").closed == 1
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
        assert (entry.end.by, entry.end.how) == ("client", "stalled")


def test_an_operator_s_end_is_heeded_between_slow_pieces():
    slow = {"name": "slow", "stream": [{"chunk": 1, "every": 100}, {"raw": "data: hello\n\n"}]}
    with running() as aura:
        run_id = aura.trigger("1", scenario=slow)
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers={"Connection": "close"})) as wire:
            data = read_until(wire, b"1\r\nd\r\n")
            aura._ask("DELETE", "/__aura/connections?how=end")
            data += read_until(wire, None)
        assert dechunked(data.partition(b"\r\n\r\n")[2]) == ([b"d", b"ata: hello\n\n"], True), "what was held comes first"


@pytest.mark.parametrize("leaves", [False, True])
def test_who_is_far_ahead_and_loses_its_connection_leaves_nothing_behind(leaves):
    lost = {"name": "lost", "stream": ["open", {"heartbeat": 0.3}, {"sleep": 1000 if leaves else 0.2}, "drop"]}
    with running() as aura:
        before, run_id = descriptors(), aura.trigger("1", scenario=lost)
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, b"\r\n\r\n")
            wire.settimeout(0.5)
            with contextlib.suppress(OSError):
                wire.sendall(get("/health") * 4000)
        eventually(lambda: aura._ask("GET", "/__aura/connections").connections == [])
        eventually(lambda: descriptors() <= before)


def test_who_leaves_a_quiet_stream_far_ahead_closed_first():
    """Nothing is written that could fail: its leaving is seen behind all that it has sent."""
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "last", "stream": ["open", {"wait": "go"}, {"raw": "bye"}]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, b"\r\n\r\n")
            wire.sendall(get("/health") * 4000)
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert (entry.end.by, entry.end.how, entry.bytes) == ("client", "disconnect", 0)


def test_under_jumping_time_the_streams_end_by_themselves_at_the_stop():
    with running(speed="max", event_delay=0) as aura:
        run_id = aura.trigger("1", scenario={"name": "slow", "stream": [{"relay": "all", "every": 100}, {"raw": DONE.decode()}]})
        wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream"))
        read_until(wire, b"id: 1\n")
        began = time.monotonic()
    assert time.monotonic() - began < 4, "a grace of 5 s and it did not need it"
    with wire:
        assert dechunked(read_until(wire, None))[1]


def test_an_operator_may_close_everything_while_a_refusal_is_stuck():
    with running(grace=0.3) as aura, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", aura.port))
        wire.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            wire.sendall(get("/aura/analysis-runs/none/stream") * 5000)
        assert aura._ask("DELETE", "/__aura/connections?how=reset").how == "reset"


@pytest.mark.parametrize("end", [[], ["end"], ["drop"]])
def test_who_stops_reading_in_the_last_write_is_named(end):
    big = {"name": "big", "stream": [{"event": {"data": {}}, "pad": 8_000_000}, *end]}
    with running(send_timeout=0.3) as aura, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", aura.port))
        run_id = aura.trigger("1", scenario=big)
        wire.sendall(get(f"/aura/analysis-runs/{run_id}/stream"))
        (entry,) = aura.journal(run_id, count=1, within=WAIT)
    assert (entry.end.by, entry.end.how, entry.events) == ("client", "stalled", 0)


@pytest.mark.parametrize("head", [[{"open": {"status": 204}}], []])
def test_no_script_holds_up_the_others(head):
    """Steps that take long and never wait: to nobody, or to a viewer that has left."""
    heavy = {"name": "heavy", "stream": [*head, *[{"event": {"data": {}}, "pad": 8_000_000}] * 40]}
    with running() as aura:
        run_id = aura.trigger("1", scenario=heavy)
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            wire.recv(100)
        began = time.monotonic()
        assert httpx.get(f"{aura.url}/health", timeout=WAIT).status_code == 200
        assert time.monotonic() - began < 1.5


def test_four_runs_that_say_big_things_hold_nobody_up():
    """100 ms are promised; five times the slack."""
    big = {"name": "big", "run": [{"repeat": 1000, "steps": [{"event": {"event": "big", "data": {"n": "{n}"}}, "pad": 8_000_000}]}]}
    with running() as aura:
        for number in range(4):
            aura.trigger("1", run_id=f"r{number}", scenario=big)
        waits = []
        for _ in range(15):
            began = time.monotonic()
            assert httpx.get(f"{aura.url}/health", timeout=WAIT).json()["runs"] == 4
            waits.append(time.monotonic() - began)
    assert max(waits) < 0.5


def test_a_reset_ends_live_runs_and_their_streams_and_forgets_them():
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "quiet", "run": ["hang"]})
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers={"Connection": "close"})) as wire:
            read_until(wire, HELLO)
            aura.reset()
            rest = read_until(wire, None)
        assert b"event: failed" in rest and DONE in rest
        assert aura.journal() == [] and aura._ask("GET", "/__aura/runs").runs == []


def test_the_task_tree_shows_who_is_inside_whom():
    with running() as aura:
        run_id = aura.trigger("1", scenario="stepped", run_id="r1")
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, HELLO)
            tree = httpx.get(f"{aura.url}/__aura/tasks").text
    depth = {}
    for line in tree.splitlines():
        depth.setdefault(re.sub(r"( \(id \d+\))?  <- .*", "", line.strip()), len(line) - len(line.lstrip()))
    order = ["nursery connections", "connection", "delivery r1"], ["nursery runs", "run r1", "analysis r1"], ["nursery runs", "accept"]
    order += (["nursery clocks", "nursery connections", "nursery runs", "nursery accept"],)
    for names in order:
        depths = [depth[name] for name in names]
        assert depths == sorted(set(depths)), tree
    assert "nursery of conduct\n" in tree and "nursery nursery" not in tree and tree.startswith("serve\n")
    assert re.search(r"delivery r1 \(id \d+\)  <- Delivery.follow\n", tree) and "analysis r1  <- Gates.wait\n" in tree and "run r1  <- Run.transcribe\n" in tree


def test_the_task_tree_of_a_process_has_the_names_of_the_file():
    with process("--log-level", "ERROR") as (_, aura):
        lines = httpx.get(f"{aura.url}/__aura/tasks").text.splitlines()
    assert [line.strip() for line in lines[:3]] == ["serve_until_signalled", "nursery of serve_until_signalled", "serve"]
    assert not any("__main__" in line or "nursery nursery" in line for line in lines)


def test_it_starts_and_stops_quickly():
    """50 ms to start after the import and 100 ms to stop, by hand; five times the slack here."""
    starts, stops = [], []
    for _ in range(5):
        began = time.perf_counter()
        with running() as aura:
            starts.append(time.perf_counter() - began)
            httpx.get(f"{aura.url}/health")
            began = time.perf_counter()
        stops.append(time.perf_counter() - began)
    assert sorted(starts)[2] < 0.25 and sorted(stops)[2] < 0.5


def test_several_servers_do_not_meet():
    with running(scenario="drop", speed=10) as one, running(speed="max") as two, running(Settings(port=0), speed=2.5) as three:
        one.next("bom")
        run_ids = [aura.trigger("1", run_id="same") for aura in (one, two, three)]
        assert run_ids == ["same"] * 3 and len({one.port, two.port, three.port}) == 3
        scenarios = [aura.journal("same", kind="trigger", count=1)[0].scenario for aura in (one, two, three)]
        assert scenarios == ["bom", "ok", "ok"]
        modes = [aura._ask("GET", "/__aura/health").clock.mode for aura in (one, two, three)]
        assert modes == ["x10", "max", "x2.5"]


def test_jumping_time_is_no_slower_than_a_thousand_times_real_time():
    """An ordinary run took 215 ms, and 13 at a speed of 1000."""
    with running(speed="max") as jumping, running(speed=1000) as fast:
        took = {jumping: [], fast: []}
        for _ in range(7):
            for aura in took:
                began = time.monotonic()
                with connect(aura, get(f"/aura/analysis-runs/{aura.trigger('1')}/stream")) as wire:
                    assert read_until(wire, DONE).count(b"event: ") == 11
                took[aura].append(time.monotonic() - began)
    assert sorted(took[jumping])[3] < 3 * sorted(took[fast])[3]


def test_bytes_that_are_no_request_yet_do_not_hold_up_jumping_time():
    """A byte every eight milliseconds made 0.2 s 21."""
    with running(speed="max") as aura, connect(aura, b"GET /") as wire:
        over = threading.Event()

        def trickle():
            while not over.wait(0.008):
                wire.send(b"a")

        trickler = threading.Thread(target=trickle)
        trickler.start()
        began = time.monotonic()
        try:
            assert stream(aura, aura.trigger("1", scenario="slow-run")).count(b"event: step") == 7
        finally:
            over.set()
            trickler.join()
        assert time.monotonic() - began < 1


def test_three_hundred_seconds_take_milliseconds_and_protective_deadlines_do_not_move():
    with running(speed="max", send_timeout=3, keep_alive=3) as aura:
        with connect(aura) as idle:
            began = time.monotonic()
            run_id = aura.trigger("1", scenario="silent")
            names = [name for _, name, _ in parsed(stream(aura, run_id))]
            assert names == ["failed"] and time.monotonic() - began < 2.5
            idle.sendall(get("/health"))
            assert read_until(idle, b"\r\n\r\n").startswith(b"HTTP/1.1 200"), "the idle connection is still there"


def test_the_clock_can_be_moved_by_hand():
    with running() as aura:
        run_id = aura.trigger("1", scenario="slow-first")
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream")) as wire:
            read_until(wire, HELLO)
            aura.advance(29)
            aura.advance(280)
            read_until(wire, b"event: completed")
        slow = aura.trigger("1", scenario="slow-run")
        aura.advance(400)
        assert len(parsed(stream(aura, slow))) == 9, "what is due comes in its turn, and no time-out before it"


def test_the_handle_does_what_the_control_api_does():
    with running(event_delay=0, scenario="stepped") as aura:
        assert aura.scenarios() == {name: one.doc for name, one in CATALOGUE.items()}
        run_id = aura.trigger("85116", requestedBy="HUMAN")
        aura.emit(run_id, "note", {"by": "hand"})
        for gate in ("go-1", "go-2"):
            aura.signal(gate, run_id)
        aura.signal("go-3")
        aura.signal("go-4")
        assert [name for _, name, _ in parsed(stream(aura, run_id))] == ["note", *FOUR]
        aura.next("failed", times=None, case="7")
        assert [aura.trigger("7", scenario=None) and aura.journal(kind="trigger")[-1].scenario for _ in range(2)] == ["failed"] * 2
        (entry,) = aura.journal(run_id, count=1)
        assert (entry.end.by, entry.last_id_sent, entry.t.first_byte >= entry.t.open) == ("server", 5, True)
        with pytest.raises(RuntimeError, match="POST /__aura/next was answered 400: .*unknown scenario"):
            aura.next("dorp")
        with pytest.raises(RuntimeError, match="was answered 408: .*0 of 1 finished entries"):
            aura.journal("nobody", count=1, within=0.01)
        aura.reset()
        assert aura.journal(kind=None) == []


def test_the_handle_says_what_went_wrong():
    with running() as aura:
        assert aura.trigger(85116, run_id="r") == "r", "a back end's ids are numbers"
        with pytest.raises(RuntimeError, match="answered without a runId: .*disabled"):
            aura.trigger("1", scenario="trigger-disabled")
        with pytest.raises(RuntimeError, match="was answered 400: .*unknown scenario.*dorp.*drop"):
            aura.trigger("1", scenario="dorp")
        with pytest.raises(RuntimeError, match="was answered 408: ") as error:
            aura.journal("r", kind=None, count=2, within=0.01)
        assert len(str(error.value)) < 1100


def test_running_takes_a_free_port_unless_told_otherwise():
    with running(Settings(heartbeat=1.0)) as one, running(Settings(heartbeat=1.0)) as two:
        assert 9000 not in (one.port, two.port) and one.port != two.port
    with running(port=one.port) as again:
        assert again.port == one.port


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"scenario": "dorp"}, "--scenario: there is no scenario 'dorp'; did you mean 'drop'?"),
    ({"case": "1=dorp"}, "--case: there is no scenario 'dorp'; did you mean 'drop'?"),
    ({"heartbeat": "x"}, "'--heartbeat' takes a number, not \"x\""), ({"port": "1"}, "'--port' takes a whole number, not \"1\""),
    ({"speed": "fast"}, "'--speed' takes a number above 0 or max, not \"fast\""),
])  # fmt: skip
def test_a_wrong_setting_raises_in_the_caller_as_it_is(fields, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"), running(**fields):
        pass


def test_a_crash_of_the_server_does_not_hide_what_the_test_found():
    async def analyse(facts, sending):
        raise KeyboardInterrupt("now")

    def crashed(body):
        with running(analysis=analyse) as aura:
            with contextlib.suppress(Exception):
                httpx.post(f"{aura.url}/aura/cases/1/analysis-runs", headers=BEARER, json={}, timeout=WAIT)
                stream(aura, "none")
            body()

    def found():
        raise AssertionError("found")

    with pytest.raises(KeyboardInterrupt, match="now"):
        crashed(lambda: None)
    with pytest.raises(KeyboardInterrupt, match="now"):
        try:
            raise ValueError("of somebody else")
        except ValueError:
            crashed(lambda: None)
    with pytest.raises(AssertionError, match="found") as error:
        crashed(found)
    assert "the server had crashed: KeyboardInterrupt('now')" in error.value.__notes__[0]


UNITTEST = """
import asyncio, unittest, aura_stream, trio
class Embedded(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = aura_stream.running(event_delay=0)
        cls.aura = cls.server.__enter__()
        cls.addClassCleanup(cls.server.__exit__, None, None, None)
    def test_unittest(self):
        self.assertEqual(self.aura.journal(self.aura.trigger("1"), kind="trigger", count=1)[0].status, 202)
    def test_asyncio(self):
        async def main():
            return await asyncio.to_thread(self.aura.trigger, "1", run_id="from-asyncio")
        self.assertEqual(asyncio.run(main()), "from-asyncio")
    def test_trio(self):
        async def main():
            with aura_stream.running() as another:
                return await trio.to_thread.run_sync(another.trigger, "1") and another.port
        self.assertNotEqual(trio.run(main), self.aura.port)
    def test_inside_trio(self):
        async def main():
            async with trio.open_nursery() as nursery:
                aura = await nursery.start(aura_stream.serve, aura_stream.Settings(port=0))
                run_id = await trio.to_thread.run_sync(aura.trigger, "1")
                aura.stop()
                return run_id
        self.assertTrue(trio.run(main))
unittest.main()
"""


def test_it_can_be_embedded_in_unittest_asyncio_and_trio():
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    found = subprocess.run([sys.executable, "-c", UNITTEST], env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and "Ran 4 tests" in found.stderr, found.stderr


def test_scenarios_of_one_s_own_join_the_catalogue(tmp_path):
    own = [{"name": "mine", "doc": "the symptom", "stream": ["drop"]}, {"name": "ok", "doc": "not so ok", "run": []}]
    (tmp_path / "own.json").write_text(json.dumps(own))
    with running(scenarios=str(tmp_path / "own.json"), scenario="mine") as aura:
        assert aura.scenarios()["mine"] == "the symptom" and aura.scenarios()["ok"] == "not so ok"
        with pytest.raises(httpx.RemoteProtocolError):
            stream(aura, aura.trigger("1"))
    for text, sentence in (
        ("{", "own.json: Expecting property name"), ('{"name": "a", "run": []}', "in a catalogue needs 'doc'"),
        ('[{"name": "a", "doc": "d", "run": ["slep"]}]', "run[0]: unknown step 'slep'"), ("[" * 100_000, "own.json: "),
    ):  # fmt: skip
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(sentence)), running(scenarios=str(tmp_path / "own.json")):
            pass
    with pytest.raises(ValueError, match="No such file"), running(scenarios=str(tmp_path / "none.json")):
        pass


def test_hostile_scripts_are_bounded():
    """Events of five megabytes without end, also to a viewer that reads nothing: memory stays."""
    import resource

    big = {"event": {"event": "big", "data": {"n": "{n}"}}, "pad": 5_000_000}
    with running(send_timeout=0.5, max_run_bytes=6 * 2**20) as aura:
        run_id = aura.trigger("1", scenario={"name": "big", "run": [{"repeat": 8, "steps": [big]}]})
        viewer = {"name": "v", "stream": [{"buffer": "all"}, {"repeat": 8, "steps": [big]}]}
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", headers={"X-Aura-Scenario": json.dumps(viewer)})):
            (entry,) = aura.journal(run_id, count=1, within=WAIT)
        assert (entry.end.by, entry.end.how) == ("client", "stalled") and "the buffer was full" in entry.said
        eventually(lambda: state(aura, run_id)["status"] == "completed")
        assert stream(aura, run_id).count(b"\nevent: big\n") == 1, "the log kept 6 MiB of them, and says `gap`"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1_500_000, "kilobytes"


# What a random script may be made of: times are short, repeats few, or one example would take all day.
A_TIME = st.one_of(st.integers(0, 400), st.just([1, 90]))
A_NAME = st.sampled_from(["a", "step", "completed", "x{n}"])
AN_EVENT = st.fixed_dictionaries({"event": st.fixed_dictionaries({"event": A_NAME, "data": st.sampled_from(["t\nu", {"k": "위{n}"}, 1])})})
WRONG_STEP = st.sampled_from(["slep", {"sleep": -1}, {"relay": "some"}, {"sleep": 1, "drop": None}, {}, 5, {"open": {"status": 99}}])
EVERYWHERE = [st.builds(lambda t: {"sleep": t}, A_TIME), st.builds(lambda t: {"wait": "g", "within": t}, A_TIME), st.just("hang")]
RUN_STEPS = st.one_of(AN_EVENT, AN_EVENT, *EVERYWHERE, st.just({"fail": "no"}), st.just({"crash": "no"}), st.just("ordinary"))
ANSWER_STEPS = [st.just(step) for step in ("end", "drop", "reset", {"raw": "data: x\n\n"}, {"raw": {"hex": "00ff"}})]
STREAM_STEPS = st.one_of(
    AN_EVENT, *EVERYWHERE[:2], *EVERYWHERE, *ANSWER_STEPS,
    st.sampled_from([{"relay": "all"}, {"relay": 2}, {"relay": {"until": "completed"}}, {"relay": "all", "every": 3},
                     {"relay": "all", "within": 20}, {"relay": 3, "shared": True}]),
    st.sampled_from([{"comment": "c"}, "heartbeat", {"heartbeat": 7}, {"heartbeat": "never"}, {"heartbeat": {"every": 9, "event": "h"}}]),
    st.sampled_from([{"chunk": 1}, {"chunk": "utf8"}, {"chunk": 50, "every": 1}, {"buffer": 64}, {"buffer": "all"}, "flush"]),
    st.sampled_from([{"frame": {"newline": "\r"}}, {"frame": {"id": "x{n}"}}, {"frame": {"wrap": "data:"}}, {"frame": {}}]),
)  # fmt: skip


def a_script(steps):
    looped = st.builds(lambda n, inner: {"repeat": n, "steps": inner}, st.integers(0, 3), st.lists(steps, max_size=3))
    return st.lists(st.one_of(steps, steps, steps, looped), max_size=6)


A_SCENARIO = st.fixed_dictionaries({"name": st.just("random")}, optional={
    "run": a_script(RUN_STEPS),
    "trigger": a_script(st.one_of(*EVERYWHERE[:2], *ANSWER_STEPS, st.just({"open": {"status": 202}}), st.just({"open": {"status": 503}}))),
    "stream": st.one_of(a_script(STREAM_STEPS), st.lists(a_script(STREAM_STEPS), min_size=1, max_size=3),
                        st.builds(lambda one: {"cycle": one}, st.lists(a_script(STREAM_STEPS), min_size=1, max_size=2)),
                        st.builds(lambda one, wrong: [*one, wrong], a_script(STREAM_STEPS), WRONG_STEP)),
})  # fmt: skip


def until_quiet(aura, data):
    """What comes until the other side is done, or has nothing to say; then this side leaves."""
    with connect(aura, data) as wire:
        wire.settimeout(0.15)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while wire.recv(65536):
                pass


def test_any_script_is_refused_with_a_pointer_or_played_to_an_end_the_journal_names(jumping):
    """Script time only jumps: a script of an hour takes a few jumps; afterwards nothing is left."""
    def tasks():
        return len(re.findall(r"connection|delivery|run |analysis", httpx.get(f"{jumping.url}/__aura/tasks").text))

    jumping.reset()
    before, files = tasks(), descriptors()

    @given(A_SCENARIO)
    @hypothesis_settings(max_examples=15, database=None)
    def play(wanted):
        checked = httpx.post(f"{jumping.url}/__aura/check", json=wanted)
        if checked.status_code != 200:
            answer = checked.json()
            assert checked.status_code == 422 and re.match(r"(run|trigger|stream)", answer["at"]) and len(answer["hint"]) > 10
            return
        run_id, began = f"p{time.monotonic_ns()}", jumping._ask("GET", "/__aura/health").clock.now
        body = json.dumps({"runId": run_id, "scenario": wanted}).encode()
        head = f"POST /aura/cases/1/analysis-runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nConnection: close\r\nContent-Length: {len(body)}"
        until_quiet(jumping, head.encode() + b"\r\n\r\n" + body)
        for _ in range(2):
            until_quiet(jumping, get(f"/aura/analysis-runs/{run_id}/stream", headers={"Connection": "close"}))
        ends = [one.end for one in jumping.journal(run_id, kind=None, count=3, within=WAIT)]
        assert all((end.by, end.how) in aura_stream.ACTS for end in ends), ends
        assert {end.by for end in ends} <= {"server", "client"}
        assert jumping._ask("GET", "/__aura/health").clock.now - began < 50_000
        jumping.reset()

    play()
    eventually(lambda: tasks() <= before)
    eventually(lambda: descriptors() <= files)


# ═══ 17  Diagnosis ══════════════════════════════════════════════════════════════════════════════

HEALTHY = "ok phase3 generation slow-first slow-run stepped flood big-event korean retry-field"
DIAGNOSES = dict.fromkeys(HEALTHY.split(), "healthy") | {
    "failed": "failed", "crash": "failed", "silent": "failed", "no-terminal": "no-terminal", "progress-regress": "off-contract",
    "missing-started": "off-contract", "unknown-events": "off-contract", "empty": "empty", "empty-truncated": "cut",
    "no-response": "no-answer", "first-chunk-then-close": "no-events", "first-chunk-then-drop": "cut", "drop": "cut", "drop-mid-event": "cut",
    "drop-resume": "cut", "always-drop": "cut", "reset": "cut", "no-done": "no-done", "done-only": "no-events",
    "unterminated-last-event": "no-done", "after-done": "after-done", "fallback-completed": "invented", "slow-headers": "slow-headers",
    "slow-stream": "slow-stream", "idle-cut": "idle-cut", "no-heartbeat": "no-heartbeat", "heartbeat-then-silence": "dead",
    "gateway-timeout": "time-limit", "buffered": "buffered", "buffered-4k": "buffered", "coalesced": "buffered", "dribble": "shredded",
    "split-utf8": "shredded", "mid-line": "shredded", "crlf": "line-ends", "cr-only": "line-ends", "bom": "bom",
    "double-wrapped": "double-wrapped", "gateway-ids": "doubled", "duplicate-events": "out-of-order", "out-of-order": "out-of-order",
    "bad-json": "bad-json", "unauthorized": "unauthorized", "forbidden": "unauthorized", "rate-limited": "refused",
    "unavailable": "unavailable", "refuse-3-then-ok": "unavailable", "gone-204": "gone", "html": "not-a-stream",
    "json-instead": "not-a-stream", "sse-500": "server-error", "unknown-run": "not-found", "unknown-run-404": "not-found",
    "expired-run": "resume-refused", "other-worker": "resume-refused", "resume-unknown-id": "doubled", "resume-gap": "gap",
    "two-subscribers": "lost", "slow-trigger": "slow-trigger", "trigger-503": "unavailable", "trigger-lost": "no-answer",
    "trigger-disabled": "trigger-refused", "duplicate-run": "duplicate-run",
}  # fmt: skip
TAKE_LONG = """generation slow-first slow-run silent fallback-completed slow-stream slow-headers idle-cut no-heartbeat heartbeat-then-silence
    gateway-timeout"""


def examine_at(speed, names):
    """What the doctor says of these scenarios, many at once, he and the server so much faster than real time."""
    found, some = {}, trio.CapacityLimiter(15)

    async def examine(url, name):
        async with some:
            found[name] = await aura_stream.diagnose(url, case=f"85116~{name}")

    async def everybody(url):
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(examine, url, name)
                await trio.testing.wait_all_tasks_blocked()

    with running(speed=str(speed), event_delay=0.3 if speed == 1 else 0.15) as aura:
        for gate in ("go-1", "go-2", "go-3", "go-4"):
            aura.signal(gate)
        trio.run(everybody, aura.url, clock=trio.testing.MockClock(rate=speed))
    return found


BIG, LONG = ["flood", "big-event"], TAKE_LONG.split()
OTHERS = [name for name in DIAGNOSES if name not in (*BIG, *LONG)]
GROUPS = [(1, OTHERS), (1, BIG), (6, LONG)]  # so many times faster than real time


@pytest.fixture(scope="session", autouse=True)
def doctors(request):
    """They begin with the first test: what they wait for passes while others work. A process for each speed."""
    wanted = any("test_the_doctor_names_what_is_wrong" in one.name for one in request.session.items)
    code = "import json, sys, test_aura_stream as t; print(json.dumps(t.examine_at(int(sys.argv[1]), sys.argv[2:])))"
    commands = [[sys.executable, "-c", code, str(speed), *names] for speed, names in GROUPS if wanted]
    begun = [subprocess.Popen(one, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for one in commands]
    yield begun
    for one in begun:
        one.kill()
        one.communicate()


@pytest.fixture(scope="module")
def diagnosed(doctors):
    """What the doctor says of each scenario of the catalogue."""
    found = {}
    for one in doctors:
        found |= json.loads(one.communicate(timeout=3 * WAIT)[0])
    return found


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_doctor_names_what_is_wrong(name, diagnosed):
    found = diagnosed[name]
    assert found["verdict"] == DIAGNOSES[name], json.dumps(found, indent=1, ensure_ascii=False)
    if found["verdict"] == "healthy":
        assert found["ills"] == [] and found["says"].startswith("nothing is wrong: ")
    else:
        first = found["ills"][0]
        assert found["says"] == f"{first['says']} — {first['fault']} is at fault: {first['change']}"
        assert first["ill"] == found["verdict"] and first["fault"] == FAULTS_OF.get(name, first["fault"])


FAULTS_OF = {  # where the journal of the server knows better than the wire
    "drop": "the server", "reset": "the server", "failed": "the analysis", "unauthorized": "the caller", "buffered": "a proxy on the way",
    "idle-cut": "a proxy on the way", "always-drop": "the server",
}  # fmt: skip


def test_every_ill_is_shown_by_a_scenario_or_a_test_of_its_own():
    own = {"compressed", "refused", "wrong-path", "bad-gateway", "hidden-cut", "not-utf8"}
    assert set(aura_stream.ILLS) == {*DIAGNOSES.values(), *own} - {"healthy"}


def test_a_hundred_healthy_streams_raise_no_alarm():
    """Also with a run of another kind, big ones, late ones; beside each other on a busy machine."""
    names, found = ["ok", "phase3", "korean", "retry-field", "big-event"], []

    async def examine(url, number):
        found.append(await aura_stream.diagnose(url, case=f"{number}~{names[number % 4 if number else 4]}"))

    async def everybody(url):
        for first in range(0, 100, 25):
            async with trio.open_nursery() as nursery:
                for number in range(first, first + 25):
                    nursery.start_soon(examine, url, number)

    with running(event_delay=0.02) as aura:
        trio.run(everybody, aura.url)
    assert len(found) == 100 and [one["says"] for one in found if one["verdict"] != "healthy"] == []


def examined(answers, **more):
    """The diagnosis of a server that gives these bytes, one answer to each request in turn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve_them():
            for answer in answers:
                wire, _ = listener.accept()
                with wire:
                    read_until(wire, b"\r\n\r\n")
                    wire.sendall(answer)

        thread = threading.Thread(target=serve_them, daemon=True)
        thread.start()
        ask = partial(aura_stream.diagnose, f"http://127.0.0.1:{listener.getsockname()[1]}/s", **more)
        found = trio.run(ask, clock=trio.testing.MockClock(rate=100))
        thread.join(WAIT)
    return found


def an_answer(body, *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: text/event-stream", *headers, "", ""]).encode() + body


STARTED_ONLY = b': connected\n\nid: 1\nevent: started\ndata: {"runId": "r"}\n\n'
ENDED_TOO = b'id: 2\nevent: completed\ndata: {"score": 1}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(("answers", "verdict", "said"), [
    ([an_answer(STARTED_ONLY + ENDED_TOO, f"Content-Length: {len(STARTED_ONLY + ENDED_TOO)}"), an_answer(ENDED_TOO)], "healthy", "2 events"),
    ([an_answer(STARTED_ONLY, f"Content-Length: {len(STARTED_ONLY)}"), an_answer(ENDED_TOO)], "no-done", "properly ended after started"),
    ([an_answer(gzip.compress(STARTED_ONLY + ENDED_TOO), "Content-Encoding: gzip")], "compressed", "gzip"),
    ([an_answer(b"", status="404 Not Found")], "wrong-path", "404, text/event-stream, after "),
    ([an_answer(b"", status="502 Bad Gateway")], "bad-gateway", "502, text/event-stream, after "),
    ([an_answer(STARTED_ONLY, "Content-Length: 500"), an_answer(b"id: 3" + ENDED_TOO[5:])], "lost", "whoever comes back after 1 misses 1 event"),
    ([an_answer(b'id: 7\n' + STARTED_ONLY[19:] + b"id: 8" + ENDED_TOO[5:]), an_answer(b"id: 8" + ENDED_TOO[5:])], "healthy", "2 events"),
    ([an_answer(b"id: 1\nevent: step\ndata: {\"percent\": NaN}\n\n" + ENDED_TOO), an_answer(ENDED_TOO)], "bad-json", "NaN"),
    ([an_answer(b"id: 1\nevent: step\ndata: {\"percent\": 1" + b"0" * 400 + b"}\n\n" + STARTED_ONLY[19:]), an_answer(b"")], "no-done", ""),
    ([an_answer(STARTED_ONLY + ENDED_TOO), an_answer(b"", status="204 No Content")], "resume-refused", "whoever comes back after 1: 204"),
    ([an_answer(STARTED_ONLY + ENDED_TOO), b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\nlogin"], "resume-refused", "text/html: login"),
    ([an_answer(STARTED_ONLY + ENDED_TOO), an_answer(ENDED_TOO, "Content-Length: 999")], "resume-refused", "closed without an end"),
    ([an_answer(STARTED_ONLY + b"id: 2\ndata: waiting for [DONE]\n\nid: 3\ndata:\n\nid: 4" + ENDED_TOO[5:]), an_answer(b"id: 3\ndata:\n\nid: 4" + ENDED_TOO[5:])],
     "healthy", "4 events"),
    ([an_answer(STARTED_ONLY + b"id: 2\nevent: note\ndata: [DONE]\n\nid: 3\ndata: one\ndata: [DONE]\ndata: two\n\nid: 4" + ENDED_TOO[5:]), an_answer(
        b"id: 3\ndata: one\ndata: [DONE]\ndata: two\n\nid: 4" + ENDED_TOO[5:])], "off-contract", "nobody documented: note"),
    ([an_answer(STARTED_ONLY + "id: 2\nevent: step\ndata: {\"label\": \"증거\"}\n\n".encode("cp949") + b"id: 3" + ENDED_TOO[5:]), an_answer(
        "id: 2\nevent: step\ndata: {\"label\": \"증거\"}\n\n".encode("cp949") + b"id: 3" + ENDED_TOO[5:])], "not-utf8", "not in UTF-8"),
    ([an_answer(b"\n" * 1_100_000)], "no-events", "it said more than one can hear"),
    ([an_answer(b"id: a\x0b1\nevent: started\ndata: {}\n\n", "Content-Length: 500"), an_answer(ENDED_TOO)], "cut", "1 event"),
    ([an_answer(b"id: started_2\n" + STARTED_ONLY[19:] + b"id: step_1\nevent: step\ndata: {}\n\nid: end_2" + ENDED_TOO[5:]), an_answer(b"id: step_1\nevent: step\ndata: {}\n\nid: end_2" + ENDED_TOO[5:])],
     "healthy", "3 events"),
    ([an_answer(STARTED_ONLY + b"event: step\ndata: {}\n\nevent: step\ndata: {}\n\n" + ENDED_TOO), an_answer(ENDED_TOO)], "lost", "misses 1 event"),
    ([an_answer(STARTED_ONLY + b"id: 2\nevent: heartbeat\ndata: {}\n\nid: 3" + ENDED_TOO[5:]), an_answer(b"id: 2\nevent: heartbeat\ndata: {}\n\nid: 3" + ENDED_TOO[5:])],
     "healthy", "3 events"),
    ([an_answer(b"", status="504 Late")], "bad-gateway", "or wait longer"),
    ([b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream-x\r\n\r\n"], "not-a-stream", "text/event-stream-x"),
    ([an_answer(STARTED_ONLY + ENDED_TOO), b""], "resume-refused", "the connection was closed without an end"),
    ([an_answer(b"", status="999 Denied")], "server-error", "999"), ([an_answer(b"", status="307 Elsewhere")], "refused", "307"),
    ([an_answer(b'id: 1700000000123\n' + STARTED_ONLY[19:] + b"id: 1700000000456" + ENDED_TOO[5:]), an_answer(b"id: 1700000000456" + ENDED_TOO[5:])],
     "healthy", "2 events"),
    ([an_answer(b"id: 1\nevent: step\ndata: " + b"[" * 100_000 + b"\n\n" + ENDED_TOO), an_answer(ENDED_TOO)], "bad-json", "the data of a step is no JSON"),
    ([an_answer(b"", status="418 I'm a teapot")], "refused", "418"),
    ([b"SSH-2.0-OpenSSH_9\r\n"], "no-answer", "it is no HTTP"),
    ([an_answer(STARTED_ONLY + ENDED_TOO[:40], "Content-Length: 500"), an_answer(ENDED_TOO)], "cut", "1 event"),
    ([an_answer(b"event: started\ndata: {}\n\nevent: completed\ndata: {\"score\": 1}\n\ndata: [DONE]\n\n"), an_answer(b"")], "healthy", "2 events"),
])  # fmt: skip
def test_the_doctor_examines_anybody_s_stream(answers, verdict, said):
    found = examined(answers)
    assert (found["verdict"], said in found["says"]) == (verdict, True), found


@pytest.mark.parametrize("where", ["@127.0.0.1:1/x", "http://127.0.0.1:1/x", ".evil.test/x", " ", 5, ["a"], {"a": 1}, None, "/x\ud800"])
def test_a_trigger_leads_the_doctor_to_no_other_host(where):
    """It would get the token. What is a path is asked for here; what is none is said to be none."""
    told = json.dumps({"runId": "r", "streamUrl": where}).encode()
    accepted = b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told)
    found = examined([accepted, an_answer(b"", status="404 Not Found")][: 2 if str(where)[0] == "/" else 1], case="1")
    assert found["verdict"] in ("trigger-refused", "wrong-path"), found


def test_a_lying_journal_and_the_doctor_s_own_leaving_blame_nobody():
    headers = [f"X-Aura-{name}: {value}" for name, value in (("Run-ID", "r"), ("Attempt", "1"), ("Scenario", "ok"))]
    broken = an_answer(STARTED_ONLY, *headers, "Content-Length: 500")
    for entries in ('{"entries": [{"attempt": 1, "scenario": "ok", "end": "x", "said": 1}]}', '{"entries": 5}', "[]", "[" * 100_000, '{"entries": [5]}'):
        journal = b"HTTP/1.1 200 OK\r\n\r\n" + entries.encode()
        found = examined([broken, an_answer(b"id: 2" + ENDED_TOO[5:]), journal])
        assert (found["verdict"], found["ills"][0]["fault"]) == ("cut", "the server or a proxy on the way")
    with running() as aura:
        aura.trigger("1", run_id="r", scenario="heartbeat-then-silence")
        ask = partial(aura_stream.diagnose, f"{aura.url}/aura/analysis-runs/r/stream")
        found = trio.run(ask, clock=trio.testing.MockClock(rate=1000))
    assert (found["verdict"], found["ills"][0]["fault"]) == ("dead", "the server or a proxy on the way")


def test_a_stream_that_stays_open_behind_done_is_not_waited_for():
    with running(event_delay=0) as aura:
        script = [{"comment": "connected"}, {"relay": "all"}, {"raw": "data: [DONE]\n\n"}]
        aura.next({"name": "open", "stream": [[*script, "hang"], script]})
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1"), clock=trio.testing.MockClock(rate=50))
    assert found["verdict"] == "dead"


def test_the_limit_bounds_the_whole_and_loses_nothing_that_was_seen():
    """Somebody accepts and never answers, or answers a head and nothing more; by a clock of its own."""
    for answer, verdict in ((b"", "no-answer"), (an_answer(b""), "dead"), (an_answer(b"", status="500 No")[:-2], "no-answer")):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            wires = []
            thread = threading.Thread(target=lambda: (wires.append(listener.accept()[0]), wires[0].sendall(answer)), daemon=True)
            thread.start()
            ask = partial(aura_stream.diagnose, f"http://127.0.0.1:{listener.getsockname()[1]}/s", limit=5)
            clock = trio.testing.MockClock(rate=50)
            found = trio.run(ask, clock=clock)
            thread.join(WAIT)
            wires[0].close()
        assert found["verdict"] == verdict, found
    with running() as aura:
        aura.trigger("1", run_id="r", scenario={"name": "x", "stream": [[{"comment": "c"}, {"relay": 2}, "drop"], [{"open": {}}, "hang"]]})
        began = time.monotonic()
        found = trio.run(partial(aura_stream.diagnose, f"{aura.url}/aura/analysis-runs/r/stream", limit=0.5))
        assert found["verdict"] == "cut" and time.monotonic() - began < 3


def test_a_server_that_is_slow_once_is_no_proxy_that_buffers():
    """Two seconds late, and then all at once, for the run was over: asked by itself, or met by chance in the first of two runs."""
    usual = [{"comment": "connected"}, {"relay": "all"}, {"raw": "data: [DONE]\n\n"}]
    cold, clock = {"name": "cold", "stream": [[{"sleep": 1.9}, *usual], usual]}, partial(trio.testing.MockClock, rate=10)
    with running(event_delay=0, speed="10") as aura:
        aura.trigger("1", run_id="r", scenario=cold)
        assert trio.run(partial(aura_stream.diagnose, f"{aura.url}/aura/analysis-runs/r/stream"), clock=clock())["verdict"] == "healthy"
        aura.next(cold)
        assert trio.run(partial(aura_stream.diagnose, aura.url, case="1"), clock=clock())["verdict"] == "healthy"
        assert len(aura.journal(kind="trigger")) == 3
        aura.next(cold, times=2)
        assert trio.run(partial(aura_stream.diagnose, aura.url, case="1"), clock=clock())["verdict"] == "buffered", "late twice is late"
        aura.trigger("1", run_id="s", scenario={"name": "once", "stream": [usual, [{"open": {}}, "hang"]]})
        found = trio.run(partial(aura_stream.diagnose, f"{aura.url}/aura/analysis-runs/s/stream", limit=3), clock=clock())
        assert found["verdict"] == "healthy", "its time was over, which is nobody's fault"


def test_what_was_seen_stands_where_no_time_is_left_to_see_it_twice():
    with running(event_delay=0.06) as aura:
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1~buffered", limit=1.1))
        assert (found["verdict"], len(aura.journal(kind="trigger"))) == ("buffered", 1)


@pytest.mark.parametrize("ends", ["\n", "\r", "\r\n"])
async def test_the_doctor_hears_the_same_wherever_a_stream_is_torn(ends):
    body = "\ufeff: connected\n\nid: 1\nevent: started\ndata: {}\n\nretry: 5\ndata: 증거\ndata: 😀\n\nid: 2\n\nevent: step\ndata: {\n\n: x\ndata: [DONE]\n\n: bye\n"
    whole = body.replace("\n", ends).encode()
    for piece in (*range(1, 5), len(whole)):
        seen = aura_stream.Visit("http://h/s", streams=True)
        for start in range(0, len(whole), piece):
            seen.listen(whole[start : start + piece])
        assert [one[2:] for one in seen.heard] == [event[1:] for event in Parser().feed(whole).events]
        assert [one.id for one in seen.heard] == ["1", "", "", ""]
        assert (seen.size, seen.body) == (len(whole), whole)


def test_tens_of_megabytes_of_ordinary_text_are_heard_to_the_end():
    blocks = [b'id: %d\nevent: evidence\ndata: {"text": "%b"}\n\n' % (number, b"word " * 200_000) for number in range(2, 32)]
    end = b"id: 32" + ENDED_TOO[5:]
    found = examined([an_answer(b"".join([STARTED_ONLY, *blocks, end])), an_answer(b"".join([*blocks[-4:], end]))])
    assert found["verdict"] == "healthy" and " s and 32 events" in found["says"], found


@pytest.mark.parametrize(("id", "why"), [(b"x" * 400, "after xxx"), (b"x" * 600, "not tried: no id"), (b"a\x0b1", "not tried: no id")])
def test_an_id_that_no_client_can_give_back_is_none(id, why):
    found = examined([an_answer(b"id: %b\nevent: started\ndata: {}\n\n" % id, "Content-Length: 900"), an_answer(ENDED_TOO)])
    assert found["verdict"] == "cut" and found["answers"]["resume"].startswith(why), found


def test_a_stream_that_goes_on_behind_its_last_event_loses_nothing():
    with running(event_delay=0) as aura:
        aura.trigger("1", run_id="r", scenario={"name": "x", "stream": [{"comment": "c"}, {"relay": "all"}, "hang"]})
        found = trio.run(partial(aura_stream.diagnose, f"{aura.url}/aura/analysis-runs/r/stream", limit=0.5))
    assert found["verdict"] == "healthy" and "it still went on" in found["says"], found


TRIGGERED = b"HTTP/1.1 202 Accepted\r\n\r\n"
OURS = [f"X-Aura-{name}: 1" for name in ("Run-ID", "Attempt", "Scenario")]
CHUNKED = an_answer(b"", "Transfer-Encoding: chunked")
WIDE = "😀".encode() + b"a" * (6 * 2**20 - 10_000)  # in memory, all of it is as wide as its widest


def numbered(block):
    """This block for ever, each time with numbers of its own."""
    for first in itertools.count(0, 1000):
        yield b"".join(block.replace(b"#", b"%d" % number) for number in range(first, first + 1000))


def again(piece):
    return itertools.repeat(piece * (2**18 // len(piece) + 1))


HOSTILE = {  # what each of its answers is, by their number; the arguments of the examination; the verdict, or what it is where time was over first
    "CRs": (lambda n: [an_answer(b""), again(b"\r")], {}, "no-events line-ends"),
    "CRs to who comes back": (lambda n: [an_answer(STARTED_ONLY + ENDED_TOO, *OURS)] if not n else [an_answer(b""), again(b"\r")], {}, "healthy"),
    "retry": (lambda n: [an_answer(b""), again(b"retry: 1\n")], {}, "no-events"),
    "names": (lambda n: [an_answer(b""), numbered(b"event: #%b\ndata: x\n\n" % ("😀" * 100).encode())], {"via": True}, "off-contract"),
    "ESC in an id": (lambda n: [an_answer(b"id: "), b"\x1b" * 59 * 2**20, b"\ndata: x\n\n"], {}, "no-events"),
    "an id of many digits": (lambda n: [an_answer(b"id: " + b"1" * 200_000 + b"_1\ndata: {}\n\ndata: [DONE]\n\n")], {}, "no-terminal"),
    "ids of many digits": (lambda n: [an_answer(b""), again(b"id: " + b"1" * 480 + b"_1\ndata: {}\n\n")], {}, "healthy"),
    "ids, two ways": (lambda n: [an_answer(b""), numbered(b"id: #\ndata: x\n\n")], {"via": True}, "healthy"),
    "a gzip bomb": (lambda n: [an_answer(gzip.compress(b"\r" * 2**24), "Content-Encoding: gzip")], {}, "compressed"),
    "JSON that unfolds": (lambda n: [an_answer(b""), again(b'event: step\ndata: {"a": [' + b'{"":0},' * 700_000 + b"0]}\n\n")], {}, "off-contract"),
    "wide text": (lambda n: [an_answer(b""), again(b"data: " + WIDE + b"\n\n")], {"via": True}, "healthy"),
    "single bytes": (lambda n: [CHUNKED, again(b"1\r\nx\r\n")], {}, "shredded"),
    "blanks in a head": (lambda n: [b"HTTP/1.1 200 OK\r\nx:" + b" " * 60_000 + b"\0\r\n\r\n"], {}, "no-answer"),
    "blanks in a trailer": (lambda n: [CHUNKED, b"0\r\nx:" + b" " * 60_000 + b"\0\r\n\r\n"], {}, "cut"),
    "some at each visit": (lambda n: [an_answer(b"id: %d\ndata: x\n\n" % n), b"".join(itertools.islice(numbered(b"id: %d_#\ndata: x\n\n" % n), 60))],
                           {}, "no-done healthy"),  # by whether the time is over first
    "a journal without end": (lambda n: [an_answer(STARTED_ONLY + ENDED_TOO if not n else ENDED_TOO, *OURS)] if n < 2 else [an_answer(b'{"entries": ['), again(b"[],")],
                              {}, "healthy"),
    "a trigger without end": (lambda n: [TRIGGERED, b"{", again(b'"":0,')], {"case": "1"}, "trigger-refused"),
}  # fmt: skip


EXAMINE_THEM = """
import functools, json, resource, sys, time, trio, aura_stream
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # so that a failure harms nobody else
for line in sys.stdin:
    url, more = json.loads(line)
    began = time.monotonic()
    try:
        found = trio.run(functools.partial(aura_stream.diagnose, url, limit=1, **more))
        verdict = aura_stream.in_lines(found) and found["verdict"]
    except BaseException as error:
        verdict = repr(error)
    took = time.monotonic() - began
    with open("/proc/self/status") as status:
        peak = next(int(one.split()[1]) for one in status if one.startswith("VmHWM:"))
    print(json.dumps([verdict, took, peak / 1024]), flush=True)
"""


@contextlib.contextmanager
def hostile(script):
    """The port of a server that sends whatever it likes, as fast as it can, until nobody listens."""
    def answer(wire, number):
        with wire, contextlib.suppress(OSError):
            read_until(wire, b"\r\n\r\n")
            for part in script(number):
                for piece in [part] if isinstance(part, bytes) else part:
                    wire.sendall(piece)

    def accept():
        with contextlib.suppress(OSError):
            for number in itertools.count():
                threading.Thread(target=answer, args=(listener.accept()[0], number), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_journal_that_never_answers_does_not_outlast_the_limit():
    left, began = threading.Event(), time.monotonic()
    answers = [an_answer(STARTED_ONLY + ENDED_TOO, *OURS), an_answer(ENDED_TOO), iter(left.wait, True)]
    with hostile(lambda number: answers[number : number + 1]) as port:
        assert trio.run(partial(aura_stream.diagnose, f"http://127.0.0.1:{port}/s", limit=1))["verdict"] == "healthy"
        left.set()
    assert time.monotonic() - began < 4


@pytest.mark.long
def test_whatever_a_server_sends_the_doctor_keeps_his_time_and_his_memory():
    """One process examines them all, so its greatest size is that of the worst."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells how big a process was")
    wrong = {}
    doctor = subprocess.Popen([sys.executable, "-c", EXAMINE_THEM], cwd=HERE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError), doctor:  # it was killed, which is wrong enough
        late = threading.Timer(6 * WAIT, doctor.kill)
        late.start()
        for name, (script, more, verdict) in HOSTILE.items():
            with hostile(script) as port:
                url = f"http://127.0.0.1:{port}"
                if "via" in more:
                    more = {"via": f"{url}/via"}
                print(json.dumps([url if "case" in more else f"{url}/s", more]), file=doctor.stdin, flush=True)
                found, took, peak = json.loads(doctor.stdout.readline() or '["it was killed", 0, 0]')
            if found not in verdict.split() or took > 5 * (1 + 2) or peak > 256:
                wrong[name] = f"{found} after {took:.1f} s, {peak:.0f} MB"
        late.cancel()
        doctor.stdin.close()
    assert wrong == {}


def test_a_port_where_nobody_listens_is_no_loss_of_what_the_other_way_said():
    with running(event_delay=0) as aura:
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1", via=f"http://127.0.0.1:{free_port()}"))
        assert (found["verdict"], found["ills"], found["via"]["verdict"]) == ("no-answer", [], "no-answer")
        assert "Connection refused; is it running, with http?" in found["says"] and found["says"].endswith("start it, correct its address, or look for a crash in its log")
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1", via=f"{aura.url}/nowhere"))
    assert found["verdict"] == "wrong-path" and found["says"].endswith("is at fault: correct the URL")


def test_a_stream_that_goes_on_is_healthy_so_far():
    with running() as aura:
        aura.next({"name": "long", "run": [{"event": {"event": "started", "data": {}}}, "hang"]})
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1", limit=0.3))
    assert found["verdict"] == "healthy" and found["says"].startswith("nothing is wrong: it still went on when the time was over after 0.3 s and 1 event")


def test_without_ids_the_doctor_says_that_nobody_can_resume():
    with running(event_ids=False, event_delay=0) as aura:
        found = trio.run(partial(aura_stream.diagnose, aura.url, case="1"))
    assert found["verdict"] == "healthy" and found["answers"]["events"] == "11, no ids: nobody can resume; the last is completed"


def test_where_nobody_can_be_asked_the_doctor_says_why():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/s", f"https://127.0.0.1:{port}/s"):
        with pytest.raises(OSError, match=f"{port}: Connection refused"):
            trio.run(partial(aura_stream.diagnose, url))
    with running() as aura, pytest.raises(OSError, match="cannot reach 127.0.0.1:.*; is it running, with https?"):
        trio.run(partial(aura_stream.diagnose, aura.url.replace("http", "https") + "/s"))


# ═══ 18  Command line ═══════════════════════════════════════════════════════════════════════════


def test_what_goes_wrong_at_the_start_is_one_sentence_and_status_2(capsys):
    with running() as aura:
        assert main(["--port", str(aura.port)]) == 2
    text = capsys.readouterr().err
    why = "[Errno 98] Address already in use; --port 0 takes a free port"
    assert text == f"aura-stream: cannot listen on 127.0.0.1:{aura.port}: {why}\n"
    assert main(["serve", "--port", "x"]) == 2
    assert capsys.readouterr().err == "aura-stream: '--port' takes a whole number, not \"x\"\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
@pytest.mark.parametrize(("lines", "most"), [(100, 5), (2000, 10_000)])
def test_a_log_line_comes_or_is_counted_whatever_kind_of_pipe_it_goes_to(lines, most):
    """One that is non-blocking and small, as some programs make it; and the count comes also where no line follows."""
    code = f"import aura_stream as a; w = a.LogWriter(); w.most = {most}; [w.write('line ' + 'x' * 60) for _ in range({lines})]; w.close()"
    out, into = os.pipe()
    os.set_blocking(into, False)
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stderr=into), open(out) as log:
        os.close(into)
        text = log.read()
    dropped = sum(map(int, re.findall(r"dropped (\d+) log lines", text)))
    assert text.count("line x") + dropped == lines and (dropped > 0) == (lines > most)


def test_help_names_every_flag_and_its_variable(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for one in aura_stream.flagged(Settings):
        assert aura_stream.flag(one) in text
        assert aura_stream.variable(one) in text


def test_no_keep_alive_is_one_request_for_each_connection():
    with running(keep_alive=0) as aura, connect(aura, get("/health")) as wire:
        assert b"healthy" in read_until(wire, None)


def test_the_largest_settings_start_too():
    with running(send_buffer=10**12, send_timeout=1e7, max_bindings=0, case="1=ok", admin_token="토큰\n", event_delay=0) as aura:
        stream(aura, aura.trigger("1"))
        assert len(aura.journal(count=1, within=WAIT)) == 1


def test_control_on_every_address_without_a_token_is_local_aloud(heard):
    for host, token, loud in (("0.0.0.0", "", True), ("::", "", True), ("0.0.0.0", "t", False), ("127.0.0.1", "", False), ("localhost", "", False)):
        before = heard.all().count("is for callers on this machine")
        aura_stream.warn(Settings(host=host, admin_token=token))
        assert heard.all().count("is for callers on this machine") - before == loud


def test_the_handle_brings_the_admin_token():
    with running(admin_token="s3cret", event_delay=0) as aura:
        stream(aura, aura.trigger("1"))
        assert len(aura.journal(count=1, within=WAIT)) == 1
        assert httpx.get(f"{aura.url}/__aura/journal").status_code == 401
        assert "s3cret" not in repr(aura) + repr(Settings(admin_token="s3cret"))


def test_redis_is_declined_aloud():
    with process(REDIS_URL="redis://localhost") as (server, aura):
        server.terminate()
        assert "REDIS_URL is set, but this version keeps runs in memory only" in server.stderr.read()


def test_the_scenarios_are_listed_and_printed_ready_to_change(capsys, tmp_path):
    assert main(["scenarios"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOGUE)
    for name in CATALOGUE:
        assert main(["scenarios", name]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert parse_scenario(printed, needs="doc") == CATALOGUE[name]
    assert main(["scenarios", "dorp"]) == 2
    assert "there is no scenario 'dorp'; did you mean 'drop'?" in capsys.readouterr().err
    (tmp_path / "own.json").write_text('{"name": "mine", "doc": "mine"}')
    assert main(["scenarios", "mine", "--scenarios", str(tmp_path / "own.json")]) == 0


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--scenario", "dorp"], "--scenario: there is no scenario 'dorp'; did you mean 'drop'?"),
    (["--case", "1=dorp"], "--case: there is no scenario 'dorp'; did you mean 'drop'?"),
    (["--case", "85117"], "--case: there is no scenario ''"), (["--speed", "fast"], "'--speed' takes a number above 0 or max"),
    (["drop"], "there is no 'drop' here (there are "), (["serve"], "there is no 'serve' here; did you mean 'serve'?"),
    (["--speeed", "3"], "there is no '--speeed' here; did you mean '--speed'?"),
    (["--scenarios", "/nowhere.json"], "--scenarios /nowhere.json: "),
])  # fmt: skip
def test_a_wrong_start_is_one_sentence_and_status_2(flags, sentence, capsys):
    assert main(["--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aura-stream: ") and sentence in error and error.count("\n") == 1


def test_it_stops_when_its_standard_input_closes():
    command = [sys.executable, str(HERE / "aura_stream.py"), "--port", "0", "--exit-with-stdin", "--no-magic"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout.readline().startswith(b"Aura stream ready on ")
        assert server.poll() is None
        server.stdin.close()
        assert server.wait(WAIT) == 0


def test_it_stops_when_it_is_asked_to():
    with process() as (server, aura):
        assert aura._ask("POST", "/__aura/shutdown").status == "stopping"
        assert server.wait(WAIT) == 0


def test_each_command_has_a_help_that_fits_a_screen(capsys):
    for command, lines in (("diagnose", 30), ("scenarios", 15)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert text.startswith(f"usage: aura-stream {command} ") and len(text.splitlines()) < lines
        assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"aura-stream {command} " in text for command in ("diagnose", "scenarios"))


@pytest.mark.parametrize(("words", "sentence"), [
    (["diagnos", "http://localhost"], "there is no command 'diagnos'; did you mean 'diagnose'?"),
    (["diagnose"], "the following arguments are required: URL; 'aura-stream diagnose --help' says more"),
    (["diagnose", "http://localhost:9000"], "give the URL of a stream, or that of a server and --case ID"),
    (["diagnose", "localhost:9000/x"], "a URL is like http://localhost:9000/…, and 'localhost:9000/x' is not"),
    (["diagnose", "http://h/x", "--cas", "1"], "there is no '--cas' here; did you mean '--case'?"),
    (["diagnose", "http://h/x", "-H", "Nö: 1"], "takes a name a header can have"),
    (["diagnose", "http://h/x", "--limit", "long"], "argument --limit: invalid float value: 'long'"),
    (["diagnose", "http://127.0.0.1:1/x"], "cannot reach 127.0.0.1:1: Connection refused; is it running, with http?"),
    (["diagnose", "ftp://h/x"], "a URL is like http://localhost:9000/…, and 'ftp://h/x' is not"),
    (["diagnose", "http://h/x", "--via", "h"], "a URL is like http://localhost:9000/…, and 'h' is not"),
    (["diagnose", "http://h/x", "-H", "foo"], "takes visible ASCII"),
    (["scenarios", "ok", "--port", "1"], "there is no '--port' here"),
])  # fmt: skip
def test_a_wrong_question_is_one_sentence_and_status_2(words, sentence, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("aura-stream: ") and sentence in error and error.count("\n") == 1


def test_diagnose_tells_a_person_or_a_program_and_its_status_says_it_too(capsys):
    with running(event_delay=0) as aura:
        assert main(["diagnose", aura.url, "--case", "1"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"{aura.url}/aura/analysis-runs/doctor-\w+/stream", said[0])
        assert [line.split("  ")[1].strip() for line in said[1:-1]] == [
            "answer", "headers", "first bytes", "events", "arrival", "heartbeats", "end", "journal", "resume"]
        assert said[-1].startswith("healthy: nothing is wrong: it was properly ended after ") and said[-1].endswith(" s and 11 events")
        assert main(["diagnose", aura.url, "--case", "1~empty", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["verdict"], found["ills"][0]["fault"]) == ("empty", "the server")
        assert main(["diagnose", aura.url, "--case", "1", "-H", "Authorization: Basic x"]) == 1
        said = capsys.readouterr().out
        assert "faulty (unauthorized): 401, application/json, " in said and "the caller is at fault: send a good token" in said


@pytest.mark.long
def test_who_closes_an_output_gets_no_traceback():
    aura_py, port = f"{sys.executable} {HERE / 'aura_stream.py'}", free_port()
    with running(event_delay=0) as aura:
        asked = f"{aura_py} diagnose {aura.url} --case 1"
        for command in (f"{asked} | head -1", f"{asked} > /dev/full", f"{asked} 2>&-", f"{asked} --json >&-"):
            found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=WAIT)
            assert "Traceback" not in found.stderr, command
    with subprocess.Popen(["bash", "-c", f"exec {aura_py} --port {port} >&- 2>/dev/null"]) as server:
        eventually(lambda: reachable(port))
        server.terminate()
        assert server.wait(WAIT) == 0


UNREAD = "import aura_stream; aura_stream.LogWriter.most = 100; aura_stream.main(['--port', '0', '--grace', '2'])"


@pytest.mark.parametrize("reads", [False, True])
def test_who_does_not_read_its_log_does_not_hold_up_the_server(reads):
    """It goes on, ends when asked to, and says how many lines were dropped once somebody reads."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as server:
        try:
            url = server.stdout.readline().decode().split()[-1]
            with httpx.Client(timeout=WAIT) as client:
                for _ in range(500):  # two long lines each, more than a pipe and the queue can hold
                    assert client.get(f"{url}/{'x' * 150}").status_code == 404
                if reads:
                    os.set_blocking(server.stderr.fileno(), False)
                    said = b""
                    while b" log lines, nobody read them\n" not in said:
                        client.get(f"{url}/health")
                        said += server.stderr.read() or b""
                    dropped = int(re.search(rb"\naura-stream: dropped (\d+) log lines", said)[1])
                    assert 100 < dropped < 1000 and said.count(b"dropped") == 1
            server.terminate()
            assert server.wait(WAIT) == 0
        finally:
            server.kill()


def test_the_log_s_last_lines_are_written_before_the_end():
    with process() as (server, aura):
        server.terminate()
        assert "stopping: first nobody new, then the runs, then their streams" in server.communicate()[1]


def test_no_line_of_the_log_is_anybody_else_s():
    """What comes from outside is in it, and cannot be taken for what the server says."""
    with process() as (server, aura):
        stream(aura, aura.trigger("1", scenario={"name": "c", "run": [{"crash": FORGING}]}))
        stream(aura, aura.trigger("2", scenario={"name": "f", "run": [{"fail": {"error": FORGING, "stage": FORGING}}]}))
        server.terminate()
        said = server.communicate()[1]
    lines = said.splitlines()
    assert "forged" in said and all(line.isprintable() for line in lines)
    assert all(re.match(r"  |20\d\d-\d\d-\d\d .* - aura_stream - ", line) for line in lines)
    assert not [line for line in lines if line.startswith("2026-01-01")]
    assert aura_stream.indented(f"a\n{FORGED}\n") == f"a\n  {FORGED}"


def test_at_a_terminal_the_first_steps_are_shown_and_work(tmp_path):
    """In a pseudo-terminal; a pipe gets the readiness line and nothing more."""
    import pty

    terminal, inner_end = pty.openpty()
    command = [sys.executable, str(HERE / "aura_stream.py"), "--port", "0", "--event-delay", "0.01", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=inner_end, stderr=inner_end) as server:
        try:
            os.close(inner_end)
            shown = b""
            while b"Ctrl-C stops it." not in shown:
                shown += os.read(terminal, 4096)
            text = shown.decode().replace("\r\n", "\n")
            url = re.match(r"Aura stream ready on (http://127\.0\.0\.1:\d+)\n", text)[1]
            assert f"aura.base-url={url}\n" in text
            steps = re.findall(r"^  (.*)$", text, re.M)
            assert len(steps) == 3
            endings = [subprocess.run(step, shell=True, capture_output=True, text=True, timeout=WAIT) for step in steps]  # fmt: skip
        finally:
            server.terminate()
            os.close(terminal)
    assert [one.returncode for one in endings[:2]] == [0, 18] and endings[0].stdout.endswith("data: [DONE]\n\n")
    assert endings[2].returncode in (0, 1) and "arrival" in endings[2].stdout
    with process() as (server, _):
        server.terminate()
        assert "base-url" not in server.communicate()[1]


# ═══ The clients ════════════════════════════════════════════════════════════════════════════════
# Real programs, in real time: the first line at once, the lines as they happen, a proper end.

JAVA = """
import java.net.URI; import java.net.http.*; import java.util.concurrent.*;
public class Viewer {
  public static void main(String[] a) throws Exception {
    var builder = HttpClient.newBuilder().connectTimeout(java.time.Duration.ofSeconds(10));
    if (a[0].equals("1.1")) builder.version(HttpClient.Version.HTTP_1_1);
    var client = builder.build();
    if (!a[1].equals("-")) { view(client, a); return; }
    for (String line; (line = IN.readLine()) != null; System.out.println("."))
      view(client, ("1.1 " + line).split(" "));
  }
  static final java.io.BufferedReader IN = new java.io.BufferedReader(new java.io.InputStreamReader(System.in));
  static void view(HttpClient client, String[] a) throws Exception {
    var asked = HttpRequest.newBuilder(URI.create(a[1])).header("Accept", "text/event-stream")
        .header("Authorization", "Bearer test-token");
    var request = (a.length > 3 ? asked.header("Last-Event-ID", a[3]) : asked).build();
    long start = System.nanoTime();
    HttpResponse<java.util.stream.Stream<String>> response;
    try { response = client.send(request, HttpResponse.BodyHandlers.ofLines()); }
    catch (java.io.IOException e) { System.out.println("broken " + e.getMessage()); return; }
    System.out.println("status " + response.statusCode() + " " + response.version());
    int[] lines = {0};
    try {
      response.body().forEach(line -> {
        System.out.println((System.nanoTime() - start) / 1000000 + " " + line);
        if (++lines[0] == Integer.parseInt(a[2])) { System.out.println("leaving"); System.out.flush(); Runtime.getRuntime().halt(0); }
      });
      System.out.println("end");
    } catch (java.io.UncheckedIOException e) { System.out.println("broken " + e.getMessage()); }
  }
}
"""
NODE = """
const [url, id] = process.argv.slice(1), start = performance.now();
const headers = {Accept: "text/event-stream", Authorization: "Bearer test-token", ...(id && {"Last-Event-ID": id})};
try {
  const answer = await fetch(url, {headers});
  console.log("status " + answer.status);
  let rest = "";
  for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + piece).split("\\n");
    rest = lines.pop();
    for (const line of lines) console.log(Math.round(performance.now() - start) + " " + line);
  }
  console.log("end");
} catch (error) { console.log("broken " + error + " cause " + error.cause?.code); }
"""


def timed_lines(output):
    """(milliseconds, line) of what a viewer program printed."""
    return [(int(one[1]), one[2]) for one in re.finditer(r"^(\d+) (.*)$", output, re.M)]


def in_real_time(lines):
    """The first line at once, the events spread over the run as they happened."""
    assert lines[0][1] == ": connected"
    assert lines[0][0] < 5000, "five times the slack on one second for a cold client"
    ids = [moment for moment, line in lines if line.startswith("id:")]
    assert len(ids) == 11
    assert len({moment // 50 for moment in ids}) >= 6, "events 0.1 s apart do not come at once"
    assert [line for _, line in lines if line][-1] == "data: [DONE]"


ONCE_SEEN = {"name": "once-seen", "run": [{"wait": "seen"}, "ordinary"]}


def shown_by(aura, command, **more):
    """What a viewer program prints of a run that begins when the viewer is there, however long it took to start."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more) as viewer:
        eventually(lambda: aura._ask("GET", "/__aura/connections").connections)
        aura.signal("seen")
        return viewer.communicate(timeout=WAIT)[0]


@pytest.fixture(scope="session")
def viewer_class(tmp_path_factory):
    """The JDK viewer, compiled once."""
    folder = tmp_path_factory.mktemp("java")
    (folder / "Viewer.java").write_text(JAVA)
    subprocess.run([program("javac"), "Viewer.java"], cwd=folder, check=True, timeout=120)
    return folder


@pytest.mark.parametrize("version", ["1.1", "default"])
def test_the_jdk_client_reads_the_stream_in_real_time(version, viewer_class):
    with running(event_delay=0.1) as aura:
        url = f"{aura.url}/aura/cases/85116/analysis/stream?runId={aura.trigger('85116', scenario=ONCE_SEEN)}"
        output = shown_by(aura, [program("java"), "-cp", ".", "Viewer", version, url, "0"], cwd=viewer_class)
    assert output.startswith("status 200 HTTP_1_1")
    assert output.endswith("end\n")
    in_real_time(timed_lines(output))


def test_a_default_jdk_client_that_leaves_is_noticed_within_a_second(viewer_class, heard):
    with running() as aura:
        run_id = aura.trigger("1", scenario=QUIET)
        command = [program("java"), "-cp", ".", "Viewer", "default", f"{aura.url}/aura/analysis-runs/{run_id}/stream", "5"]
        subprocess.run(command, cwd=viewer_class, check=True, stdout=subprocess.DEVNULL, timeout=WAIT)
        left = time.monotonic()
        assert "by=client how=disconnect" in heard.wait_for("stream closed")
        assert time.monotonic() - left < 1
        assert "Unsupported upgrade request." in heard.all()
        assert state(aura, run_id)["status"] == "running"


def test_nodes_fetch_reads_the_stream_in_real_time():
    with running(event_delay=0.1) as aura:
        url = f"{aura.url}/aura/cases/85116/analysis/stream?runId={aura.trigger('85116', scenario=ONCE_SEEN)}"
        output = shown_by(aura, [program("node"), "--input-type=module", "-e", NODE, url])
    assert output.startswith("status 200\n")
    assert output.endswith("end\n")
    in_real_time(timed_lines(output))


def test_curl_and_an_http10_client_read_the_stream():
    with running(event_delay=0.02) as aura:
        run_id = aura.trigger("85116")
        url = f"{aura.url}/aura/cases/85116/analysis/stream?runId={run_id}"
        for flag in ("--http1.1", "--http1.0"):
            curl = subprocess.run([program("curl"), "-sN", flag, url, "-H", "Authorization: Bearer t"],
                                  capture_output=True, timeout=WAIT)  # fmt: skip
            assert (curl.returncode, curl.stdout[:13], curl.stdout[-14:]) == (0, b": connected\n\n", DONE)
            assert len(parsed(curl.stdout)) == 11
        with connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", version="1.0")) as wire:
            head, _, body = read_until(wire, None).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body == curl.stdout


def with_httpx(url, last_id, jvm):
    """What each client sees: the lines it got, and how it ended for it."""
    data, ending = b"", "end"
    try:
        with httpx.stream("GET", url, headers={**BEARER, **({"Last-Event-ID": last_id} if last_id else {})}, timeout=WAIT) as one:
            for piece in one.iter_raw():
                data += piece
    except httpx.HTTPError as error:
        ending = f"{type(error).__name__}: {error}"
    return data.decode().split("\n")[:-1], ending


def with_curl(url, last_id, jvm):
    more = ["-H", f"Last-Event-ID: {last_id}"] if last_id else []
    command = [program("curl"), "-sN", url, "-H", "Authorization: Bearer t", *more]
    curl = subprocess.run(command, capture_output=True, timeout=WAIT)
    return curl.stdout.decode().split("\n")[:-1], f"exit {curl.returncode}"


def with_node(url, last_id, jvm):
    command = [program("node"), "--input-type=module", "-e", NODE, url, *filter(None, [last_id])]
    return told(subprocess.run(command, capture_output=True, text=True, timeout=WAIT).stdout)


def with_jdk(url, last_id, jvm):
    jvm.stdin.write(" ".join([url, "0", *filter(None, [last_id])]) + "\n")
    jvm.stdin.flush()
    return told("".join(iter(jvm.stdout.readline, ".\n")))


@pytest.fixture(scope="session")
def jvm(viewer_class):
    """One JVM that views what it is told to: to start one takes longer than to see a stream."""
    command = [program("java"), "-cp", ".", "Viewer", "1.1", "-"]
    with subprocess.Popen(command, cwd=viewer_class, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def told(output):
    return [line for _, line in timed_lines(output)], output.strip().split("\n")[-1]


CLIENTS = {"httpx": with_httpx, "node": with_node, "curl": with_curl, "jdk": with_jdk}
NORMAL = {"httpx": "end", "node": "end", "curl": "exit 0", "jdk": "end"}
DROPPED = {"httpx": "RemoteProtocolError: peer closed connection without sending complete message body (incomplete chunked read)",
           "node": "TypeError: terminated", "curl": "exit 18", "jdk": "closed"}  # fmt: skip
FAULTS = {
    "empty": ([], NORMAL),
    "drop": (PHASE2[:3], DROPPED),
    "reset": (PHASE2[:2], {"httpx": "ReadError", "node": "ECONNRESET", "curl": "exit 56", "jdk": "broken"}),
    "no-response": ([], {"httpx": "RemoteProtocolError: Server disconnected without sending a response.",
                         "node": "fetch failed", "curl": "exit 52", "jdk": "header parser received no bytes"}),
    "first-chunk-then-close": ([], NORMAL),
    "split-utf8": (PHASE2, NORMAL), "dribble": (PHASE2, NORMAL), "mid-line": (PHASE2, NORMAL), "ok": (PHASE2, NORMAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def quick():
    """A server in real time, for clients that lose what they had not read when a connection breaks."""
    with running(event_delay=0.005) as aura:
        yield aura


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_sees_the_faults_as_the_table_says(client, quick, jvm, usual_cuts):
    texts = {}
    for name, (names, endings) in FAULTS.items():
        for chance in (1, 2, 3):  # a JDK that is too busy forgets lines which a break overtakes in it
            run_id = quick.trigger("85116", scenario=name, run_id=f"{client}-{name}-{time.monotonic_ns()}")
            lines, ending = CLIENTS[client](f"{quick.url}/aura/analysis-runs/{run_id}/stream", None, jvm)
            heard = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
            if heard == names or client != "jdk" or chance == 3:
                break
        assert endings[client] in ending, (name, ending)
        assert heard == names, name
        assert lines[:2] == ([": connected", ""] if names or name == "first-chunk-then-close" else [])
        texts[name] = [re.sub(run_id + r"|20\d\d-\d\d-\d\dT[^\"]*", "…", line) for line in lines]
    assert texts["first-chunk-then-close"] == [": connected", ""]
    assert texts["split-utf8"] == texts["dribble"] == texts["mid-line"] == texts["ok"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_dropped_stream_is_resumed_by_every_client(client, usual_cuts, quick, jvm):
    """Nothing lost, nothing twice; and the journal says who closed first, each time."""
    run_id = quick.trigger("85116", scenario="drop-resume", run_id=f"{client}-{time.monotonic_ns()}")
    url = f"{quick.url}/aura/analysis-runs/{run_id}/stream"
    lines, ending = CLIENTS[client](url, None, jvm)
    assert DROPPED[client] in ending
    ids = [line for line in lines if line.startswith("id: ")]
    assert len(ids) == 2 or client == "jdk", "which may have forgotten what it had, and says so by its id"
    seen = ids[-1].removeprefix("id: ") if ids else None
    rest, ending = CLIENTS[client](url, seen, jvm)
    assert ending == NORMAL[client]
    assert ids + [line for line in rest if line.startswith("id: ")] == [f"id: {n}" for n in range(1, 12)]
    first, second = quick.journal(run_id, count=2, within=WAIT)
    assert (first.attempt, first.end.by, first.end.how) == (1, "server", "drop")
    assert (second.attempt, second.end.by, second.end.how) == (2, "server", "end")
    assert (second.last_event_id, second.resumed_after) == (seen, int(seen or 0))


class Proxy:
    """A back end that relays: it sends requests of its own, with only `Accept` and `Authorization`,
    and hands the bytes on."""

    def __init__(self, upstream):
        self.upstream = upstream

    def trigger(self, case):
        """It takes the case from a row of its database, and lets nobody tell it anything else."""
        path, mine = f"/aura/cases/{case}/analysis-runs", {"runId": str(uuid.uuid4())}
        answer = httpx.post(self.upstream + path, headers=BEARER, json=mine, timeout=WAIT)
        assert answer.status_code == 202
        return answer.json()["runId"]

    def relayed(self, case, run_id):
        """The body that a browser behind it gets, and whether it broke."""
        headers, data = {"Accept": "text/event-stream", **BEARER}, b""
        url = f"{self.upstream}/aura/cases/{case}/analysis/stream?runId={run_id}"
        try:
            with httpx.stream("GET", url, headers=headers, timeout=WAIT) as answer:
                for piece in answer.iter_raw():
                    data += piece
        except httpx.RemoteProtocolError:
            return data, "broken"
        return data, "whole"


def test_a_back_end_with_ids_of_text_is_steered_by_the_id_alone(jumping):
    proxy = Proxy(jumping.url)
    run_id = proxy.trigger("85116~drop-resume")
    (first, broken), (second, whole) = (proxy.relayed("85116~drop-resume", run_id) for _ in range(2))
    assert (broken, whole, len(parsed(first)), len(parsed(second))) == ("broken", "whole", 2, 11)
    one, two = jumping.journal(run_id, count=2, within=WAIT)
    assert (one.case_id, one.bytes, one.end.how, two.bytes) == ("85116~drop-resume", len(first), "drop", len(second))


def test_a_back_end_with_numbers_from_a_database_is_steered_by_a_binding(jumping):
    proxy = Proxy(jumping.url)
    jumping.next("drop", case="85117")
    other, bound, again = (proxy.trigger(case) for case in (85116, 85117, 85117))
    assert [proxy.relayed(85117, run_id)[1] for run_id in (other, bound, again)] == ["whole", "broken", "whole"]


def test_httpx_sees_events_as_they_happen():
    with running(event_delay=0.1) as aura:
        url = f"{aura.url}/aura/analysis-runs/{aura.trigger('85116')}/stream"
        with httpx.stream("GET", url, headers=BEARER, timeout=WAIT) as answer:
            start = time.monotonic()
            lines = [(int(1000 * (time.monotonic() - start)), line) for line in answer.iter_lines()]
    in_real_time(lines)


class Browser:
    """Chromium, headless, through ChromeDriver's own protocol: JSON over HTTP."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")  # fmt: skip

    def __init__(self, folder):
        options = {"args": [*self.FLAGS, f"--user-data-dir={folder}"], "binary": program("chromium")}
        self._driver = subprocess.Popen([program("chromedriver"), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = next(found[1] for line in self._driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        self._url = f"http://127.0.0.1:{port}"
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += f"/session/{self._ask('/session', capabilities={'alwaysMatch': wanted})['sessionId']}"
        self._ask("/timeouts", script=1000 * WAIT)

    def _ask(self, path, **body):
        answer = httpx.post(self._url + path, json=body, timeout=2 * WAIT).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self._ask("/url", url=url)

    def run(self, script, *arguments):
        """What an async function with this body returns, in the page."""
        wrapped = "const done = arguments[arguments.length - 1]; (async (...given) => {" + script + "})(...arguments).then(done, (e) => done('error: ' + e))"
        return self._ask("/execute/async", script=wrapped, args=list(arguments))

    @contextlib.contextmanager
    def looks_like(self, width, scheme):
        """A window of this width, for a person who likes it light or dark."""
        chosen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._ask("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=chosen)
        self._ask("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=media)
        yield
        self._ask("/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
        self._ask("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={})

    def logged(self):
        """What the console has said since one last looked."""
        return [line["message"] for line in self._ask("/se/log", type="browser")]

    def close(self):
        httpx.delete(self._url, timeout=WAIT)
        self._driver.terminate()
        self._driver.communicate(timeout=WAIT)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program("chromium")
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture
def page(browser):
    """The browser on an empty page of another local origin."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>another origin</title>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever).start()
        browser.open(f"http://localhost:{server.server_port}/")
        yield browser
        browser.open("about:blank")
        server.shutdown()


WATCH = """
    window.seen = []; window.source = new EventSource(given[0]);
    for (const name of ["started", "step", "completed", "message"])
        source.addEventListener(name, (event) => seen.push([event.lastEventId, name, event.data]));
"""
UNTIL = "while (!(%s)) await new Promise((soon) => setTimeout(soon, 10)); return [seen, source.readyState];"


def test_a_page_of_another_origin_reads_streams_and_refusals(page):
    with running(event_delay=0) as aura:
        run_id = aura.trigger("1")
        url = f"{aura.url}/aura/analysis-runs/{run_id}/stream"
        headers = {**BEARER, "X-Tenant-ID": "1", "X-Trace-ID": "t", "Last-Event-ID": "9", "Accept": "text/event-stream", "Cache-Control": "no-cache"}
        asked = "const answer = await fetch(given[0], {headers: given[1]}); return [answer.status, await answer.text(), [...answer.headers.keys()]];"
        status, text, names = page.run(asked, url, headers)
        assert (status, [id for id, _, _ in parsed(text.encode())]) == (200, ["10", "11"])
        assert {"x-request-id", "x-aura-run-id", "x-aura-attempt"} <= set(names)
        status, text, _ = page.run(asked, url, {})
        assert (status, json.loads(text)["detail"]) == (401, "Missing authorization header")
        assert page.run("return await fetch(given[0]).then((answer) => answer.status)", f"{aura.url}/__aura/journal") == 200, "local pages may control"
        posted = "return (await fetch(given[0], {method: 'POST', headers: given[1], body: '{}'})).status"
        assert page.run(posted, f"{aura.url}/api/aura/cases/1/analysis-runs", {**BEARER, "X-Tenant-ID": "1", "Content-Type": "application/json"}) == 202


def test_a_native_event_source_resumes_by_itself_and_stops_by_itself(page):
    with running(retry_ms=50) as aura:
        job = "job-1~stepped"
        page.run(WATCH, f"{aura.url}/api/generation/jobs/{job}/events")
        aura.signal("go-1")
        page.run(UNTIL % "seen.length == 1")
        assert aura._ask("POST", "/api/admin/connections/reset").dropped == 1
        (dropped,) = aura.journal(job, count=1, within=WAIT)
        assert (dropped.end.by, dropped.end.how, dropped.events) == ("admin", "drop", 1)
        for gate in ("go-2", "go-3", "go-4"):
            aura.signal(gate)
        seen, state = page.run(UNTIL % "source.readyState == EventSource.CLOSED")
        assert [id for id, _, _ in seen] == [f"{job}_{n}" for n in (1, 2, 3, 4)] and seen[-1][1] == "completed"
        entries = aura.journal(job, count=3, within=WAIT)
        assert [(entry.status, entry.resumed_after) for entry in entries] == [(200, 0), (200, 1), (204, 4)]


def test_a_native_event_source_comes_back_after_a_soft_refusal(page):
    soon = next(seed for seed in range(10_000) if random.Random(seed).randint(1000, 10_000) < 1100)
    with running(max_sse_connections=1, event_delay=0) as aura:
        aura.trigger("1", run_id="r", scenario={"name": "quiet", "run": [{"wait": "go"}]})
        with connect(aura, get("/aura/analysis-runs/r/stream")) as wire:
            read_until(wire, HELLO)
            random.seed(soon)
            page.run(WATCH, f"{aura.url}/api/generation/jobs/j~ok/events")
            entry = aura.journal(count=1, kind="stream", within=WAIT)[0]
            assert (entry.status, entry.run_id) == (200, "j~ok") and "too many open streams, the limit is 1" in entry.said
        seen, _ = page.run(UNTIL % "source.readyState == EventSource.CLOSED")
        assert seen[-1][:2] == ["j~ok_10", "completed"]


# ═══ Behind nginx, watched by Prometheus ════════════════════════════════════════════════════════


def block(kind):
    """The README's only code block of this kind."""
    (code,) = re.findall(rf"^```{kind}\n(.*?)^```", README, re.M | re.S)
    return code


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def behind_nginx(aura, folder, port, text=None):
    """Debian's nginx with this block, or the README's; yields its URL."""
    command = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or program("nginx")
    text = text or block("nginx")
    assert text.count("127.0.0.1:9000") == text.count("listen 8080;") == 1
    text = text.replace("127.0.0.1:9000", f"127.0.0.1:{aura.port}").replace("listen 8080;", f"listen 127.0.0.1:{port};")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    events = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; events {{ worker_connections 512; }}"
    (folder / "nginx.conf").write_text(f"{events} http {{ {temporary} access_log off; {text} }}")
    with subprocess.Popen([command, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]) as nginx:
        try:
            eventually(lambda: reachable(port) or nginx.poll() is not None)
            assert nginx.poll() is None, (folder / "error.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.terminate()


def reachable(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_the_readme_s_nginx_passes_streams_on_as_they_happen_and_control_not_at_all(tmp_path, heard):
    with running() as aura, behind_nginx(aura, tmp_path, port := free_port()) as url:
        run_id = aura.trigger("1", scenario="stepped")
        path = f"{url}/aura/analysis-runs/{run_id}/stream"
        with httpx.stream("GET", path, headers={**BEARER, "Accept-Encoding": "gzip"}, timeout=WAIT) as answer:
            lines = answer.iter_lines()
            assert [next(lines), next(lines)] == [": connected", ""]
            for step in (1, 2):
                aura.signal(f"go-{step}", run_id)
                event = list(itertools.takewhile(str, lines))
                assert event[-1] == f"id: {step}", "each event is there before the next one is let go"
            assert "content-encoding" not in answer.headers and "via" not in answer.headers
        assert aura.journal(run_id, count=1, within=WAIT)[0].end.how == "disconnect", "the viewer's leaving passes through"
        for step in (3, 4):
            aura.signal(f"go-{step}", run_id)
        resumed = httpx.get(path, headers={**BEARER, "Last-Event-ID": "2"}, timeout=WAIT)
        assert [id for id, _, _ in parsed(resumed.content)] == ["3", "4"] and resumed.content.endswith(DONE)
        assert aura.journal(run_id, count=2, within=WAIT)[1].resumed_after == 2
        made = httpx.post(f"{url}/api/v1/generations", json={}, headers={"Origin": url}).json()
        assert made["sseUrl"] == f"{url}/api/v1/generations/{made['jobId']}/events", "the way through nginx"
        cut = aura.trigger("1", scenario="drop")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/aura/analysis-runs/{cut}/stream", headers=BEARER, timeout=WAIT)
        for hidden in ("__aura/journal", "__aura", "%5f_aura/runs", "x/../__aura/runs", "api/admin/sse/restart", "__aura/health", "/__aura/tasks", "metrics"):
            with connect(types.SimpleNamespace(port=port), get(f"/{hidden}", version="1.0")) as wire:
                assert b" 404 Not Found" in read_until(wire, None), hidden
        with pytest.raises(AssertionError):
            heard.wait_for("__aura/runs - Status", within=0)
        with contextlib.ExitStack() as open_ones:
            quiet = aura.trigger("1", scenario={"name": "q", "run": [{"wait": "go"}]})
            statuses = []
            for _ in range(33):
                wire = open_ones.enter_context(connect(types.SimpleNamespace(port=port), get(f"/aura/analysis-runs/{quiet}/stream")))
                statuses.append(int(read_until(wire, b"\r\n").split()[1]))
        assert statuses == [200] * 30 + [429] * 3, "one client's share"


def at_once(*asks):
    """What these answer, asked side by side."""
    async def ask(at, one):
        answers[at] = await one()

    async def all_of_them():
        async with trio.open_nursery() as nursery:
            for at, one in enumerate(asks):
                nursery.start_soon(ask, at, one)

    answers = [None] * len(asks)
    trio.run(all_of_them)
    return answers


@pytest.mark.long
def test_the_doctor_finds_the_hop_that_buffers(tmp_path):
    """An nginx as it comes: HTTP/1.0 to the server, buffering on, and deaf to X-Accel-Buffering."""
    plain = "server { listen 8080; location / { proxy_pass http://127.0.0.1:9000; proxy_ignore_headers X-Accel-Buffering; } }"
    (tmp_path / "plain").mkdir()
    (tmp_path / "ours").mkdir()
    with running(event_delay=0.06) as aura:
        with behind_nginx(aura, tmp_path / "plain", free_port(), plain) as hop:
            found, cut, both = at_once(
                partial(aura_stream.diagnose, aura.url, case="1", via=hop), partial(aura_stream.diagnose, hop, case="1~drop"),
                partial(aura_stream.diagnose, aura.url, case="1~no-done", via=hop))
            assert (found["verdict"], found["ills"], found["via"]["verdict"]) == ("buffered", [], "buffered")
            assert f"what stands between {found['url']} and {found['via']['url']} is at fault: switch buffering off" in found["says"]
            assert cut["verdict"] == "hidden-cut" and "speak HTTP/1.1 to the server" in cut["says"]
            assert both["verdict"] == "no-done" and "the server is at fault" in both["says"] and "that way also: silent for" in both["says"]
        zips = plain.replace("location", "gzip on; gzip_types text/event-stream; gzip_proxied any; location")
        (tmp_path / "zips").mkdir()
        with behind_nginx(aura, tmp_path / "zips", free_port(), zips) as hop:
            found = trio.run(partial(aura_stream.diagnose, hop, case="1"))
            assert [ill["ill"] for ill in found["ills"]] == [found["verdict"]] == ["compressed"], "and what it says nobody knows"
        with behind_nginx(aura, tmp_path / "ours", free_port()) as hop:
            found = trio.run(partial(aura_stream.diagnose, aura.url, case="1", via=hop))
            assert (found["verdict"], found["via"]["verdict"]) == ("healthy", "healthy"), found


def rules():
    return re.findall(r"alert: (\w+), expr: ('?)(.*?)\2, (?:for|annotations)", block("yaml"))


def test_the_alert_rules_name_metrics_that_exist():
    assert len(rules()) == 3
    for _, _, expression in rules():
        named = set(re.findall(r"\b(?:sse|http|aura)_\w+", expression))
        assert named and named <= METRICS.keys()
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', expression):
            assert label in ("how", "status") and (label == "status" or set(values.split("|")) <= {how for _, how in aura_stream.ACTS})


def test_promtool_accepts_the_alert_rules(tmp_path):
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed, and need not be")
    (tmp_path / "rules.yml").write_text(block("yaml"))
    found = subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and "3 rules found" in found.stdout, found.stdout + found.stderr


# ═══ The soak ═══════════════════════════════════════════════════════════════════════════════════
# What it finds is its own affair, and takes longer; here: that it knows whose mistake it met, and leaves nothing.

SOAK = HERE / ".ci" / "soak"
has_soak = pytest.mark.skipif(not SOAK.exists(), reason="it comes with the repository only")


@has_soak
def test_the_soak_says_in_a_sentence_that_the_server_does_not_start(tmp_path):
    venv.create(tmp_path)  # a Python without the packages
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([tmp_path / "bin" / "python", SOAK, "--quick"], env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2, "1 is for what the server did wrong"
    assert re.fullmatch(r"soak: the server did not start: ModuleNotFoundError: No module named '\w+'\n", found.stderr), found.stderr


def of_session(number):
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            found += [path] if session == str(number) and state not in "ZX" else []
    return found


@has_soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_soak_leaves_no_process(number):
    command = [sys.executable, SOAK, "--quick", "--only", "trouble"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as soak:
        eventually(lambda: len(of_session(soak.pid)) == 8)  # itself, a server, six readers
        soak.send_signal(number)
        _, says = soak.communicate(timeout=WAIT)
        killed = number == signal.SIGKILL
        assert (soak.returncode, says) == ((-9, "") if killed else (2, "soak: interrupted\n"))
        eventually(lambda: not of_session(soak.pid))


# ═══ The README ═════════════════════════════════════════════════════════════════════════════════


def table(title):
    """The rows of the table under a README heading."""
    section = re.split(r"\n##+ ", README.split(f"### {title}\n", 1)[1], maxsplit=1)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def blocks(kind):
    """The README's code blocks that are marked as runnable."""
    return re.findall(rf"^```{kind} run\n(.*?)^```", README, re.M | re.S)


def test_the_readmes_settings_are_the_settings():
    """One a row: flag, environment variable, default, and the sentence that --help has."""

    def told(one):
        default = one.default
        text = str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else str(default)
        return [f"`{aura_stream.flag(one)}`", f"`{aura_stream.variable(one)}`", text, one.metadata["says"]]

    assert table("Settings") == [told(one) for one in aura_stream.flagged(Settings)]


def test_the_readmes_lesson_is_taken_from_the_file():
    lesson = README.split("\n## Read it")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", lesson, re.S)
    assert snippets and all(snippet in SOURCE for snippet in snippets)


def test_the_readmes_endpoints_are_the_routes():
    async def routes():
        async with trio.open_nursery() as nursery:
            app = create_app(Settings(), BoundedHub(Settings(), nursery))
        found = set()
        for rule in app.url_map.iter_rules():
            path = re.sub(r"<(?:int:)?(\w+)>", lambda one: "{" + re.sub(r"_(\w)", lambda c: c[1].upper(), one[1]) + "}", rule.rule)
            found |= {f"{method} {path}" for method in rule.methods - {"HEAD", "OPTIONS"}}
        return {route for route in found if "//" not in route}

    listed = [re.fullmatch("`([^`]+)`", row[0])[1].split("?")[0] for row in table("Endpoints")]
    assert len(listed) == len(set(listed)) and set(listed) == trio.run(routes)


def looks_like(shown):
    """The pattern of what the README shows: numbers and made-up ids differ, and a line of `…` is any number of lines."""
    differs = {"…\n": r"(?:.*\n)*?", "doctor": r"doctor-\w+"}
    parts = re.split(r"(…\n|doctor-\w+|[\d.:T+-]*\d)", shown)
    return "".join(differs.get(part[:6], r"[\d.:T+-]+") if at % 2 else re.escape(part) for at, part in enumerate(parts))


def test_the_readmes_terminal_session_is_what_one_sees():
    program("curl")
    (session,) = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.M)
    assert len(steps) == 5
    with process("--event-delay", "0.06") as (_, aura):
        for command, shown in steps:
            ours = command.replace(":9000", f":{aura.port}").replace(".venv/bin/aura-stream", f"{sys.executable} {HERE / 'aura_stream.py'}")
            found = subprocess.run(["bash", "-c", ours], capture_output=True, text=True, timeout=60)
            assert {*re.findall(r"\d+ bytes$", shown, re.M)} <= {*re.findall(r"\d+ bytes$", found.stdout, re.M)}, "they are real"
            assert re.fullmatch(looks_like(shown), found.stdout.replace(f":{aura.port}", ":9000")), f"{command}\n{found.stdout}{found.stderr}"


def test_the_readmes_lab_shows_who_steals():
    program("curl")
    (code,) = blocks("sh")
    with process("--event-delay", "0.03") as (_, aura):
        found = subprocess.run(["bash", "-euo", "pipefail", "-c", code.replace(":9000", f":{aura.port}")],
                               capture_output=True, text=True, timeout=60)  # fmt: skip
    assert found.returncode == 0, found.stderr
    seen = {viewer: re.findall(r"\d+", ids) for viewer, ids in re.findall(r"(one|two): ((?:id: \d+ ?)*)", found.stdout)}
    assert sorted([*seen["one"], *seen["two"]], key=int) == [str(n) for n in range(1, 12)] and found.stdout.endswith("\n11\n")


def test_the_readmes_pytest_fixture_runs(tmp_path):
    (code,) = re.findall(r"^```python pytest\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    found = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)},
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (found.returncode, found.stdout.count("1 passed")) == (0, 1), found.stdout


def test_the_readmes_java_class_starts_and_stops_a_server(tmp_path):
    (code,) = blocks("java")
    (tmp_path / "AuraServer.java").write_text(code)
    command = [program("java"), "AuraServer.java", sys.executable, str(HERE / "aura_stream.py"), "--port", "0", "--exit-with-stdin"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    url = re.fullmatch(r"aura\.base-url=(http://127\.0\.0\.1:\d+)\n", found.stdout)[1]
    eventually_closed(url)


def test_the_readmes_node_program_starts_and_stops_a_server(tmp_path):
    (code,) = blocks("js")
    script = tmp_path / "aura"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "aura_stream.py"} "$@"\n')
    script.chmod(0o755)
    found = subprocess.run([program("node"), "--input-type=module", "-e", code], env={**os.environ, "AURA": str(script)},
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (found.stdout, found.returncode) == ("ok\n", 0), found.stderr


def eventually_closed(url):
    """Nobody listens there any more, or soon nobody will."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=WAIT)
            continue
        return
    raise AssertionError(f"{url} is still there")


def test_the_readme_names_the_whole_catalogue_and_every_verb():
    listed = re.findall(r"^\| (?:Runs|Body|Time|Shape|Status|Resume|Trigger) \|[^|]*\| (.*) \|$", README, re.M)
    assert re.findall(r"`([a-z0-9-]+)`", " ".join(listed)) == list(CATALOGUE)
    steps = re.findall(r"^\| (`[a-z` ]+`) \| (?:run|stream|trigger|all)", README, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(steps))) == sorted({**VERBS["run"], **VERBS["stream"]})


def test_the_readmes_scenario_is_right():
    (code,) = re.findall(r"^```json\n(.*?)^```", README, re.M | re.S)
    parse_scenario(json.loads(code), needs="doc")


def test_the_readme_s_promises_have_their_tests():
    promised = re.findall(r"`(test_\w+)`", README)
    assert len(promised) == 9 and all(callable(globals().get(name)) for name in promised)


def test_the_readmes_first_two_commands_are_these():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python aura_stream.py")
    assert commands[1].endswith("pytest")
    assert len(blocks("sh")) == 1


def test_the_readme_is_short_and_so_are_its_lines():
    lines = README.splitlines()
    assert len(lines) <= 320
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S).splitlines()
    assert len(prose) < len(lines) - 80, "code is a good part of it"
    assert [line for line in prose if len(line) > 160 and not line.startswith("|")] == []


def test_the_readme_has_a_heading_for_each_of_its_four_readers():
    without_code = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    assert re.findall(r"^##? (.*)$", without_code, re.M) == [
        "aura_stream", "Run it", "Break it (tests)", "Read it (the lesson)", "Operate it"]  # fmt: skip
    lesson = without_code.split("## Read it (the lesson)\n")[1].split("\n## ")[0]
    changes = lesson.split("### To change it\n")[1]
    assert len(re.findall(r"^\| (?:a new stream verb|a new metric|another heartbeat text) \| .+ \| .+ \|$", changes, re.M)) == 3
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in re.findall(r"^#+ (.*)$", without_code, re.M)}
    assert anchors >= set(re.findall(r"\]\(#([^)]*)\)", README)), "every link leads somewhere"


@has_soak
def test_the_readmes_first_screen_has_the_command_and_the_picture():
    screen = README.split("\n## ")[0]
    assert screen.count("\n") <= 10 and screen.count("```") == 2 and "`uv run aura_stream.py`" in screen
    ((says, path),) = re.findall(r"^!\[(.+)\]\((.+)\)$", README, re.M)
    assert f"![{says}]({path})" in screen and path == ".github/page.png"
    picture = (HERE / path).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) < 150_000
    maker = (HERE / ".ci" / "picture").read_text(encoding="utf-8")
    assert 'HERE / ".github" / "page.png"' in maker, "and this command makes it"
