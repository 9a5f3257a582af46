"""Tests of aura_stream, in its chapters and their order.

The treaty: only localhost, only port 0. Three speeds: pure functions as tables; the application in
memory under Trio's autojump clock, where hours take milliseconds; real sockets through `running()`.
Whoever does I/O has a time-out (`WAIT`), generous enough for a busy machine: figures are measured by
hand, here they only must not be absurd. No test sleeps where a clock or a log line will do. A test
that needs a program (Java, Node, curl, nginx, Chromium) skips where it is missing, and fails there
under CI=true. What a client sees is asserted from outside; insides only where nobody outside can tell.
"""

import ast
import asyncio
import bisect
import contextlib
import dataclasses
import errno
import gzip
import io
import itertools
import json
import logging
import os
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
import traceback
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
from aura_stream import DONE, Event, Failure, ScriptClock, Settings, main, parse_scenario, running

HERE = Path(__file__).parent
SOURCE = (HERE / "aura_stream.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
WAIT = 20
BEARER = {"Authorization": "Bearer test-token"}
hypothesis_settings.register_profile("busy", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("busy")

# ═══ The shape ══════════════════════════════════════════════════════════════════════════════════

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, FUNCTIONS)]

def own_nodes(function):
    """All nodes of a function, with the functions inside it, but not what is inside them."""
    rest = list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        yield node
        if not isinstance(node, FUNCTIONS):
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
    """The size of each part that no formatting changes, the front matter with part 1's: tokens without comments,
    docstrings, line ends and indents; a string of more than 80 characters counts a sixth of its length, so that nothing
    hides in strings; the page is one token."""
    unseen = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"}
    later = [number for number, line in enumerate(SOURCE.splitlines(), 1) if re.match("# ═══ Part [2-9]  ", line)]
    parts = [0] * (len(later) + 1)
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        text = token.type == tokenize.STRING
        if tokenize.tok_name[token.type] not in unseen and not (text and token.start[0] in docstrings()):
            size = len(token.string) // 6 if text and 80 < len(token.string) < 4000 else 1
            parts[bisect.bisect(later, token.start[0])] += size
    return parts

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
    quarts = [one for one in project["dependencies"] if one.startswith("quart")]
    assert quarts == ["quart-trio>=0.12,<0.14", "quart-trio>=0.13; python_version >= '3.13'", "quart>=0.22,<0.24"]
    here = [version(name).rpartition(".")[0] for name in ("quart-trio", "quart")]
    assert here in (["0.12", "0.22"], ["0.13", "0.23"]), "0.12 does not import with 0.23, and this is one of the pairs"

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
def cut_behind(part, folder, *start):
    """A server of what stands above the banner of the next part, and of the few lines that start it; and its port."""
    above = SOURCE[: re.search(rf"^# ═══ Part {part + 1}  ", SOURCE, re.M).start()]
    start = "\n    ".join(['if __name__ == "__main__":', "logging.basicConfig(level=logging.INFO)", *start])
    (folder / "server.py").write_text(f"{above}{start}\n", encoding="utf-8")
    command, pipe = [sys.executable, "-W", "error", folder / "server.py"], subprocess.PIPE
    with open(folder / "log", "w") as log, subprocess.Popen(
            command, cwd=folder, stdin=pipe, stdout=pipe, stderr=log, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            yield server, aura_stream.Aura(url, int(url.rsplit(":", 1)[1]), server.terminate)
        finally:
            server.kill()

def signalled(settings, **fields):
    """The line that serves until a signal comes."""
    return f"trio.run(serve_until_signalled, {settings}(port=0, **{fields}))"

def asked_of(aura, method, path, body=None, **headers):
    """Status and body of a plain answer, or all of a stream."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    found = httpx.request(method, aura.url + path, json=body, headers={**BEARER, **named}, timeout=WAIT)
    return found.status_code, found.text

def ids_in(stream):
    return [int(one) for one in re.findall(r"^id: (\d+)$", stream, re.M)]

def test_what_stands_above_part_2_is_a_whole_server(tmp_path):
    """The knife: trigger, streams, resume, viewers, cancel, beats, silence, 404, and the stop."""
    runs, streams = "/aura/cases/1/analysis-runs", "/aura/analysis-runs"
    with cut_behind(1, tmp_path, signalled("ServerSettings", event_delay=0.05)) as (server, aura):
        phase2 = asked_of(aura, "POST", runs, {"runId": "two"})
        assert phase2 == (202, '{"status": "ACCEPTED", "runId": "two", "caseId": "1", "streamUrl": '
                               '"/aura/analysis-runs/two/stream"}')
        phase3 = asked_of(aura, "POST", "/aura/internal/cases/1/analysis-runs", {"runId": "three"})
        assert phase3 == (202, '{"accepted": true, "runId": "three", "streamPath": '
                               '"/aura/cases/1/analysis/stream?runId=three"}')
        asked = get(f"{streams}/two/stream")
        with connect(aura, asked) as leaves, connect(aura, asked) as stays:
            read_until(leaves, b"id: 3\n\n")
            leaves.close()
            whole = read_until(stays, b"0\r\n\r\n")
            assert whole.count(b"\nid: ") == 11 and whole.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        status, stream = asked_of(aura, "GET", "/aura/cases/1/analysis/stream?runId=three")
        assert status == 200 and stream.startswith(": connected\n\nevent: started\n")
        assert ids_in(stream) == list(range(1, 10))
        for seen in range(11):
            _, rest = asked_of(aura, "GET", f"{streams}/two/stream", Last_Event_ID=str(seen))
            assert ids_in(rest) == list(range(seen + 1, 12)) and rest.endswith("data: [DONE]\n\n")
        assert asked_of(aura, "GET", f"{streams}/two/stream", Last_Event_ID="11")[0] == 204
        status, text = asked_of(aura, "GET", f"{streams}/nope/stream")
        assert status == 404 and json.loads(text)["hint"].startswith("no such run on instance 127.0.0.1:")
        assert asked_of(aura, "POST", runs, [1])[0] == 422

        asked_of(aura, "POST", runs, {"runId": "gone"})
        with connect(aura, get(f"{streams}/gone/stream")) as watches:
            read_until(watches, b"id: 1\n\n")
            assert asked_of(aura, "DELETE", f"{runs}/gone") == (202, '{"status": "CANCELLED", "runId": "gone"}')
            assert b'"stage": "cancelled"' in read_until(watches, b"[DONE]")
        assert asked_of(aura, "DELETE", f"{runs}/gone")[0] == 200
        gone = json.loads(asked_of(aura, "GET", f"{runs}/gone")[1])
        assert (gone["status"], gone["viewers"]) == ("cancelled", 0)

        asked_of(aura, "POST", runs, {"runId": "last"})
        with connect(aura, get(f"{streams}/last/stream")) as open_one:
            read_until(open_one, b"id: 1\n\n")
            server.terminate()
            assert b'"stage": "shutdown"' in read_until(open_one, b"[DONE]")
        assert server.wait(WAIT) == 0
        said = (tmp_path / "log").read_text()
        assert "stream closed run_id=two by=client how=disconnect" in said
        assert "stream closed run_id=two by=server how=end" in said and "Traceback" not in said

def test_part_1_alone_beats_when_it_is_quiet_and_fails_when_it_is_silent(tmp_path):
    start = signalled("ServerSettings", event_delay=9, heartbeat=0.2, retry_ms=7, idle_timeout=1.2)
    with cut_behind(1, tmp_path, start) as (_, aura):
        asked_of(aura, "POST", "/aura/cases/1/analysis-runs", {"runId": "silent"})
        status, stream = asked_of(aura, "GET", "/aura/cases/1/analysis/stream?runId=silent")
    assert status == 200 and stream.startswith(": connected\n\nretry: 7\n\nevent: started\n")
    assert stream.count("id: 1\n\n: heartbeat\n\n") >= 1 and stream.endswith("\nid: 2\n\ndata: [DONE]\n\n")
    assert '"stage": "timeout"' in stream and "the analysis said nothing for 1.2 s" in stream

@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """What stands above part 3, as `running()` serves it: on Hypercorn's connections, on a clock that jumps."""
    start = ("CUT_AFTER = 0.02", 'with running(speed="max", event_delay=0.001) as aura:',
             "    print(aura.url, flush=True)", "    input()")
    with cut_behind(2, tmp_path_factory.mktemp("half"), *start) as (_, aura):
        yield aura

def test_above_part_3_a_viewer_that_leaves_does_not_end_the_run(half):
    half.trigger("1", run_id="left", scenario={"name": "s", "run": [*says("a"), {"wait": "go"}, *says("b")]})
    watch(half, "left", b"id: 1\n\n").close()
    assert ending(half, "left") == ("client", "disconnect")
    assert half._ask("GET", "/__aura/runs/left").status == "running"
    half.signal("go", "left")
    assert [name for _, name, _ in parsed(stream(half, "left"))] == ["a", "b"]
    assert ending(half, "left", 2) == ("server", "end")

def test_what_stands_above_part_4_is_a_server_that_serves_in_operation(tmp_path):
    with cut_behind(3, tmp_path, signalled("Settings", event_delay=0)) as (server, aura):
        assert aura.trigger("1", run_id="r") == "r" and stream(aura, "r").endswith(DONE)
        assert ending(aura, "r") == ("server", "end")
        path = f"{aura.url}/aura/analysis-runs/r/stream"
        assert httpx.get(path, headers={"Host": "evil.test"}).status_code == 421
        assert httpx.get(path).status_code == 401
        assert asked_of(aura, "GET", "/health")[0] == 200
        assert "sse_connections" in asked_of(aura, "GET", "/metrics")[1]
        server.terminate()
        assert server.wait(WAIT) == 0 and "Traceback" not in (tmp_path / "log").read_text()

def test_functions_are_short_flat_and_simple():
    branches = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension)
    nests = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.With, ast.AsyncWith)
    lines = SOURCE.splitlines()

    def nesting(node, depth=0):
        deepest = depth
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, FUNCTIONS):
                chained = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
                deepest = max(deepest, nesting(child, depth + (isinstance(child, nests) and not chained)))
        return deepest

    for function in functions():
        mine = set(range(function.lineno, function.end_lineno + 1))
        for one in (node for node in own_nodes(function) if isinstance(node, FUNCTIONS)):
            first = min([one.lineno, *(decorator.lineno for decorator in one.decorator_list)])
            mine -= set(range(first, one.end_lineno + 1))
        size = sum(1 for number in mine if lines[number - 1].strip())
        complexity = 1 + sum(isinstance(node, branches) for node in own_nodes(function))
        assert size <= 40, f"{function.name} has {size} lines"
        assert complexity <= 10, f"{function.name} has complexity {complexity}"
        assert nesting(function) <= 3, f"{function.name} nests {nesting(function)} deep"

@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="later ones cut f-strings into pieces")
def test_the_module_stays_small_enough_to_be_read():
    sizes, most = tokens(), [6700, 24_050, 7000, 7000]
    assert [size for size, bound in zip(sizes, most, strict=True) if size > bound] == []
    assert sum(sizes) <= 42_700 and len(SOURCE.splitlines()) <= 6550

def test_it_is_told_in_prose_too_and_says_one_thing_a_line():
    """How much of the lines is prose, the page and the catalogue left out; and values that are set in pairs."""
    lines = SOURCE.splitlines()
    starts = {title: start for _, title, start in chapters()}
    data = {number for title, start in starts.items() if title in ("The page", "Catalogue") for number in
            range(start, min([one for one in starts.values() if one > start]))}
    told = {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("#")} | docstrings()
    assert len(told - data) / (len(lines) - len(data)) >= 0.134, "twenty are wanted"
    pairs = [node for node in ast.walk(TREE) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
             and isinstance(node.targets[0], ast.Tuple)]
    assert 1000 * len(pairs) / len(lines) <= 1.7

def test_the_tests_stay_short_enough_to_be_read():
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 6100
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []

def test_the_module_has_no_state_and_configures_nothing():
    allowed = (*FUNCTIONS, ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREE.body[1:]:
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        assert isinstance(node, allowed) or guard, ast.unparse(node)
    mutable = [name for name, value in vars(aura_stream).items()
        if isinstance(value, (set, bytearray, aura_stream.Hub, trio.Event))]
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

def heard_in(data):
    """(id, name, data) of the events, as the WHATWG describes it; what the module has is not used."""
    events, last_id, name, lines = [], "", "", []
    *whole, _ = re.split("\r\n|\r|\n", data.decode("utf-8", "replace").removeprefix("\ufeff"))
    for line in whole:
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            events += [(last_id, name or "message", "\n".join(lines))] if lines else []
            name, lines = "", []
        elif key == "data":
            lines.append(value)
        elif key == "event":
            name = value
        elif key == "id" and "\0" not in value:
            last_id = value
    return events

def parsed(data):
    """The events of a stream, [DONE] left out."""
    return [event for event in heard_in(data) if event[2] != "[DONE]"]

class Heard(logging.Handler):
    """Every line logged, and a way to wait for one without sleeping."""

    def __init__(self):
        super().__init__()
        self._lines, self._news = [], threading.Condition()

    def emit(self, record):
        with self._news:
            trace = " +trace" if record.exc_info else ""
            self._lines.append(f"{record.levelname} {record.getMessage()}{trace}")
            self._news.notify_all()

    def wait_for(self, text, within=WAIT):
        """The first line with this text, heard or still to come."""
        with self._news:
            found = self._news.wait_for(lambda: [line for line in self._lines if text in line], within)
        assert found, f"{text!r} was not logged within {within} s, but:\n{self.all()}"
        return found[0]

    def all(self):
        return "\n".join(self._lines)

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

def stream(aura, run_id, **headers):
    """The whole body of a run's stream."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{aura.url}/aura/analysis-runs/{run_id}/stream"
    answer = httpx.get(url, headers={**BEARER, **named}, timeout=WAIT)
    assert answer.status_code == 200, answer.text
    return answer.content

HELLO = b": connected\n\n"

def watch(aura, run_id, until=HELLO, *, version="1.1", **headers):
    """A viewer of this run, as a raw connection that was read so far."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    wire = connect(aura, get(f"/aura/analysis-runs/{run_id}/stream", version=version, headers=named))
    if until:
        read_until(wire, until)
    return wire

def stalled(aura, path, buffer=8192):
    """A client that asks for this and reads nothing, with little room at the kernel's."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    wire.connect(("127.0.0.1", aura.port))
    wire.sendall(get(path))
    return wire

def ending(aura, run_id, count=1):
    """Who closed the last stream of this run first, and how, once it is over."""
    entry = aura.journal(run_id, count=count, within=WAIT)[-1]
    return entry.end.by, entry.end.how

def entry_of(aura, run_id):
    """The journal's entry of the only stream of this run."""
    (entry,) = aura.journal(run_id, count=1, within=WAIT)
    return entry

def says(*names, pause=0.0):
    """A run script that says these events."""
    return [part for name in names for part in ({"event": {"event": name, "data": {"n": name}}}, {"sleep": pause})]

SERVER = [sys.executable, str(HERE / "aura_stream.py"), "--port", "0"]

def ran(*command, within=60, **more):
    """A program that has ended: its output, its errors, its status."""
    return subprocess.run(command, capture_output=True, text=True, timeout=within, **more)

def fenced(kind):
    """The README's only code block of this kind."""
    (code,) = re.findall(rf"^```{kind}\n(.*?)^```", README, re.M | re.S)
    return code

def program(name):
    """The path of a program; skips where it is missing, fails there under CI."""
    found = shutil.which(name)
    if not found and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is missing; .ci/run installs it")
    return found or pytest.skip(f"{name} is not installed")

class Answer:
    """What an ASGI application answered; its pieces, each with the time at which it came; and of a stream that
    somebody views, what the journal says."""

    status_code, entry, calm = 0, None, True

    def __init__(self):
        self.headers, self.pieces = httpx.Headers(), []

    @property
    def data(self):
        return b"".join(piece for _, piece in self.pieces)

    def json(self):
        return json.loads(self.data)

class Client:
    """Asks the application directly. (Quart-Trio's own client holds ten parts of an answer, and a stream has more.)"""

    peer = "127.0.0.1"
    heard = None  # what is called with each piece, if anything
    waits = True  # whether to write takes its time; over a socket it does not while there is room

    def __init__(self, app, hub):
        self.app, self.hub, self.clock = app, hub, hub.clock

    async def open(self, path, *, method="GET", headers=None, data=None, json=None, cut=None):
        answer, body = Answer(), globals()["json"].dumps(json).encode() if json is not None else data or b""
        path, _, query = path.partition("?")
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        named = {"Host": "localhost", **(headers or {})}
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "root_path": "",
            "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(),
            "client": (self.peer, 1), "asgi": {"version": "3.0"},
            "headers": [(name.lower().encode(), value.encode()) for name, value in named.items()],
        }

        async def receive():
            return parts.pop() if parts else await trio.sleep_forever()

        async def send(message):
            if self.waits:
                await trio.lowlevel.checkpoint()
            if message["type"] == "http.response.start":
                answer.status_code, answer.headers = message["status"], httpx.Headers(list(message["headers"]))
                answer.calm = trio.current_effective_deadline() == float("inf")
            elif message["body"]:
                answer.pieces.append((self.clock.now(), message["body"]))
                if self.heard:
                    await self.heard(message["body"])
            if cut is not None and len(answer.data) >= cut:
                leaving.cancel()

        with trio.CancelScope() as leaving:
            await self.app(scope, receive, send)
        return answer

    def __getattr__(self, method):
        return lambda path, **more: self.open(path, method=method.upper(), **more)

@contextlib.asynccontextmanager
async def in_memory(known=None, analysis=None, **fields):
    """The application without a socket: its client, which has its hub and its script time, too."""
    settings = Settings(**fields)
    async with trio.open_nursery() as nursery:
        hub = aura_stream.BoundedHub(settings, nursery)
        yield Client(aura_stream.create_app(settings, hub, known or CATALOGUE, analysis=analysis), hub)
        nursery.cancel_scope.cancel()

@pytest.fixture
async def client():
    async with in_memory() as client:
        yield client

async def triggered(client, case="85116", headers=None, **body):
    """A trigger that was accepted."""
    answer = await client.post(f"/aura/cases/{case}/analysis-runs", headers={**BEARER, **(headers or {})}, json=body)
    assert answer.status_code == 202, answer.data
    return answer

async def run_of(client, *steps, run_id="r", **more):
    """The run of a script, which has begun."""
    await triggered(client, runId=run_id, scenario={"name": "s", "run": list(steps)}, **more)
    await trio.testing.wait_all_tasks_blocked()
    return client.hub.find(run_id)

async def read(client, run_id, script=None, cut=None, **headers):
    """The answer to a viewer of this run; served by this script, if there is one."""
    own = {} if script is None else {"X-Aura-Scenario": json.dumps({"name": "own", "stream": script})}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.get(f"/aura/analysis-runs/{run_id}/stream", headers={**BEARER, **own, **named}, cut=cut)

async def viewed(client, script=None, run_id="r", **headers):
    """The same, and what the journal says of it."""
    answer = await read(client, run_id, script, **headers)
    answer.entry = attributes((await control(client, "GET", f"journal?runId={run_id}&kind=stream"))["entries"][-1])
    assert (answer.entry.bytes, answer.entry.chunks) == (len(answer.data), len(answer.pieces))
    return answer

def attributes(said):
    return json.loads(json.dumps(said), object_hook=lambda one: types.SimpleNamespace(**one))

async def control(client, method, path, expect=200, **body):
    """What the control API says."""
    more = {"json": body} if body or method == "POST" else {}
    answer = await client.open(f"/__aura/{path}", method=method, **more)
    assert answer.status_code == expect, answer.data
    return answer.json()

@contextlib.asynccontextmanager
async def meanwhile(*asked):
    """While these are asked; what they are answered is in the list when it is there, at the end all of it."""
    async def ask(one):
        found.append(await one)

    found = []
    async with trio.open_nursery() as nursery:
        for one in asked:
            nursery.start_soon(ask, one)
        await trio.testing.wait_all_tasks_blocked()
        yield found

async def ended(run):
    while not run.ended:
        await run.log.news()
    return run

def said(run):
    """What is in a run's log: names and data."""
    data, place = b"", run.log.first - 1
    while place < run.log.last:
        piece, place = run.log.read(place)
        data += piece
    return [(name, json.loads(text)) for _, name, text in parsed(data)]

def names_in(run):
    return [name for name, _ in said(run)]

CATALOGUE = aura_stream.catalogue()
PHASE2 = ["started", "step", "step", "evidence", "step", "confidence", "step", "step", *["proposal"] * 2, "completed"]
PHASE3 = ["started", "step", "step", "agent", "step", "agent", "step", "step", "completed"]
FOUR = ["started", "step", "step", "completed"]

@pytest.fixture(scope="module")
def one_server():
    """A server for all who only ask it something."""
    with running(event_delay=0) as aura:
        yield aura

@pytest.fixture(scope="module")
def jumping():
    """A server whose script time jumps: 300 s take milliseconds. (A jump takes 20 of them, so events need none.)"""
    with running(speed="max", event_delay=0.001) as aura:
        yield aura

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

QUIET = {"name": "quiet", "run": [*says("a"), {"sleep": 100}]}
FLOOD = {"name": "flood", "run": [{"repeat": 400, "steps": [{"event": {"data": "x" * 30_000}}]}, {"sleep": 100}]}

def open_quiet_stream(aura, **headers):
    """A viewer of a run that says one thing and then nothing, read up to that."""
    run_id = aura.trigger("1", scenario=QUIET)
    return watch(aura, run_id, b"id: 1\n\n", **headers), run_id

def metrics_of(text):
    """Every sample of Prometheus text, as its own client's parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}

@contextlib.contextmanager
def process(*flags, stdin=None):
    """The server as a process, as a person starts it; and the handle of it."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*SERVER, *flags], stdin=stdin, stdout=pipe, stderr=pipe, text=True) as server:
        try:
            line = server.stdout.readline()
            found = re.fullmatch(r"Aura stream ready on http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line + server.stderr.read()
            port = int(found[1])
            yield server, aura_stream.Aura(f"http://127.0.0.1:{port}", port, server.terminate)
        finally:
            server.kill()

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

def reachable(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False

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
                        (line.partition(b":") for line in head.split(b"\r\n")[1:])}
        self.chunks, whole = dechunked(body) if "transfer-encoding" in self.headers else ([body], True)
        self.body = b"".join(self.chunks)
        self.ended = self.ended or ("none" if not head else "end" if whole else "drop")
        self.events = parsed(self.body)
        self.names = [name for _, name, _ in self.events]

# ═══ Settings ═══════════════════════════════════════════════════════════════════════════════════

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
    ({"allow_host": "a.test,http://b.test"}, {},
     "'--allow-host' takes a list like a.test,b.test, not \"a.test,http://b.test\""),
    ({"allow_host": "c.test:9000"}, {}, "'--allow-host' takes a list like a.test,b.test, not \"c.test:9000\""),
    ({"cors_origin": "*.foo.test"}, {},
     "'--cors-origin' takes a list like localhost:*,https://a.test, not \"*.foo.test\""),
    ({"cors_origin": "https://a.test/"}, {},
     "'--cors-origin' takes a list like localhost:*,https://a.test, not \"https://a.test/\""),
    ({"grace": "-1"}, {}, "'--grace' takes a number >= 0.0, not \"-1\""),
    ({"grace": "nan"}, {}, "'--grace' takes a number >= 0.0, not \"nan\""),
    *(({"speed": one}, {}, f"'--speed' takes a number above 0 or max, not \"{one}\"")
      for one in ("0", "-1", "fast", "nan", "1e-")),
    ({"auth": "maybe"}, {}, "'--auth' takes a text like on|off, not \"maybe\""),
    ({}, {"DEMO_OFF": "perhaps"}, "'DEMO_OFF' takes true or false, not \"perhaps\""),
    ({}, {"LOG_LEVEL": "loud"}, "'LOG_LEVEL' takes DEBUG, INFO, WARNING or ERROR, not \"loud\""),
    ({}, {"SSE_HEARTBEAT_INTERVAL": "often"}, "'SSE_HEARTBEAT_INTERVAL' takes a number, not \"often\""),
])
def test_a_wrong_setting_is_one_sentence_that_names_it(flags, environment, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Settings.read(flags, environment)

@pytest.mark.parametrize(
    "one", [one for one in dataclasses.fields(Settings) if type(one.default) in (int, float)], ids=aura_stream.flag)
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

# ═══ Events ═════════════════════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize(("name", "data", "block"), [
    ("step", {"percent": 10}, b'event: step\ndata: {"percent": 10}\n'),
    ("", "text", b"data: text\n"),
    ("a", "one\ntwo\r\nthree\rfour", b"event: a\ndata: one\ndata: two\ndata: three\ndata: four\n"),
    ("a", "\u2028\x0b\x0c\x1c", "event: a\ndata: \u2028\x0b\x0c\x1c\n".encode()),
    ("a", {"k": "증거"}, 'event: a\ndata: {"k": "증거"}\n'.encode()),
    ("a", {"k": "\ud800"}, b'event: a\ndata: {"k": "\\ud800"}\n'),
    ("a", "", b"event: a\ndata: \n"),
])
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
    assert aura_stream.comment("connected") == b": connected\n\n"
    assert len(aura_stream.comment("connected")) == 13
    assert len(DONE) == 14
    assert aura_stream.comment("a\nb") == b": a\n: b\n\n"

any_text = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(
    ["\r", "\r\n", "\ufeff", "\0", "\x85", "\ud800"])

any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
        | any_text,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(any_text, inside, max_size=3), max_leaves=8,
)

@given(st.lists(any_json.filter(lambda value: not isinstance(value, str)), max_size=5))
def test_what_a_client_parses_is_what_the_analysis_said(values):
    log = aura_stream.BoundedLog(ids=True)
    for value in values:
        log.append(Event("said", value))
    data, last = log.read(0) if values else (b"", 0)
    found = heard_in(data)
    assert [json.loads(text) for _, _, text in found] == values
    assert [int(number) for number, _, _ in found] == list(range(1, last + 1))

@given(any_text)
def test_text_arrives_line_by_line(text):
    heard_text = [data for _, _, data in heard_in(b": connected\n\n" + Event("t", text).numbered(None))]
    lines = re.split("\r\n|\r|\n", text)
    assert heard_text == ["\n".join(lines).encode("utf-8", "backslashreplace").decode()]

# ═══ Script time ════════════════════════════════════════════════════════════════════════════════

async def test_script_time_moves_by_hand_and_wakes_what_is_due(autojump_clock):
    script_time, woken = ScriptClock(), []

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
        assert (woken, trio.current_time()) == ([10], start)
    assert woken == [10, 20, 1000] and trio.current_time() - start == pytest.approx(985)

async def test_what_is_due_comes_in_its_turn_whoever_moves_the_time(mock_clock):
    """And past a million deadlines not each in its turn, but soon."""
    script_time, woken = ScriptClock(), []

    async def every(seconds):
        while True:
            await script_time.sleep(seconds)
            woken.append(round(script_time.now() - began))

    for seconds, far in ((1, 20), (0.001, 25_000)):
        began, clock = script_time.now(), time.monotonic()
        woken.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(every, seconds)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as movers:
                for _ in range(4):
                    movers.start_soon(script_time.advance, far)
            assert script_time.now() - began == pytest.approx(4 * far) and time.monotonic() - clock < 5
            assert seconds < 1 or woken == list(range(1, 81))
            nursery.cancel_scope.cancel()

async def test_script_time_may_be_faster_than_real_and_a_limit_is_a_deadline_in_it(autojump_clock):
    script_time, start = ScriptClock(20.0), trio.current_time()
    await script_time.sleep(300)
    assert trio.current_time() - start == pytest.approx(15)
    with script_time.limit(40) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught and trio.current_time() - start == pytest.approx(17)
    with aura_stream.Clock().limit(-1) as over:  # part 1's: who did not read for longer than a heartbeat's interval
        await trio.sleep(1)
    assert over.cancelled_caught

async def test_script_time_jumps_when_everybody_waits(mock_clock):
    """Trio's own clock stands still here: whatever moves is script time, and no protective deadline."""
    script_time, woken = ScriptClock(float("inf")), []

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
    assert woken == [(10, 10), (300, 300), (86_400, 86_400)] and not protective.cancelled_caught

async def test_a_heartbeat_alone_causes_no_jump_but_fires_when_one_passes(mock_clock):
    script_time, fired = ScriptClock(float("inf")), []

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

# ═══ Scripts ════════════════════════════════════════════════════════════════════════════════════

MISTAKES = {  # of one step: what it may be told, by the place where it stands
    "run": [
        ({"slep": 1}, "unknown step 'slep'; did you mean 'sleep'?"),
        ("zzz", "unknown step 'zzz' (there are 8: crash, event, fail, hang, ordinary, repeat, sleep, wait)"),
        (5, "a step is a verb"), ({}, "a step is a verb"),
        ({"sleep": 1, "fail": "x"}, "one verb in a step, not 'sleep' and 'fail'"),
        ({"relay": "all"}, "'relay' belongs in a stream script"), ("sleep", "takes a number or a list, not null"),
        ({"sleep": -1}, "'sleep' takes a number >= 0.0, not -1"),
        ({"sleep": True}, "'sleep' takes a number or a list, not true"),
        ({"sleep": [1, 2, 3]}, "'sleep' takes a list of length <= 2"), ({"sleep": 1, "pad": 3}, "'sleep' has no 'pad'"),
        ({"event": "x"}, "'event' takes an object"), ({"event": {"event": "x"}}, "'event' needs 'data'"),
        ({"event": {"event": "x\ny", "data": 1}}, "one line without NUL"),
        ({"event": {"event": "x", "data": 1, "dta": 2}}, "has no 'dta'; did you mean 'data'?"),
        ({"fail": {"stage": "rag"}}, "'fail' needs 'error'"),
        ({"fail": {"error": 5}}, "'fail' 'error' takes a text, not 5"),
        ({"repeat": 2, "steps": 5}, "'repeat' 'steps' takes a list"),
        ({"repeat": 1.5}, "'repeat' takes a whole number"),
        ({"repeat": 10**9, "steps": []}, "whole number <= 1000000"), ({"x" * 100_000: 1}, "unknown step 'xxx"),
        ({"fail": 3}, "'fail' takes a text or an object, not 3"),
        ("drop", "'drop' belongs in a trigger or stream script"),
        ({"event": {"id": "1", "data": 1}}, "'event' has no 'id' (there are 3: data, event, retry)"),
        ({"event": {"data": "text"}, "pad": 5}, "'event' 'data' takes an object, not"),
        ({"event": {"data": {}}, "pad": 2**24}, "'pad' takes a whole number <= 8388608"),
        ({"repeat": 3}, "'repeat' needs 'steps'"), ({"wait": 5}, "'wait' takes a text"),
        ({"wait": "g", "within": -1}, "'within' takes a number"),
        ({"ordinary": "phase4"}, "takes a text like phase2|phase3|generation"),
        ({"crash": 5}, "'crash' takes a text"), ({"hang": 5}, "'hang' takes no argument, not 5"),
    ],
    "stream": [
        ({"fail": "x"}, "'fail' belongs in a run script"),
        ({"open": {"status": 99}}, "'open' 'status' takes a whole number >= 200, not 99"),
        ({"open": {"headers": {"a b": "c"}}}, "a name a header can have"),
        ({"open": {"headers": {"a": "b\r\nc: d"}}}, "visible ASCII"),
        ({"open": {"headers": {"Content-Length": "5"}}}, "the server's own"),
        ({"relay": "some"}, "takes a text like all, not \"some\""),
        ({"relay": {"until": 5}}, "'relay' 'until' takes a text"),
        ({"relay": 1, "every": -1}, "'every' takes a number"),
        ({"heartbeat": "sometimes"}, "takes a text like never"), ({"heartbeat": 0}, "takes a number >= 0.001"),
        ({"comment": 5}, "'comment' takes a text, not 5"), ({"raw": None}, "'raw' takes a text or an object"),
        ({"raw": {"hex": "zz"}}, "non-hexadecimal"), ({"raw": {"base64": "!"}}, "Only base64 data is allowed"),
        ({"raw": {"hex": "00", "base64": ""}}, "takes an object of length <= 1"),
        ({"raw": {"utf8": "a"}}, "takes a text like hex|base64"),
        ("ordinary", "'ordinary' belongs in a run script"),
        ({"chunk": 0}, "'chunk' takes a whole number >= 1, not 0"),
        ({"chunk": "utf-8"}, "a text like utf8|line, not \"utf-8\""),
        ({"chunk": 1, "evry": 1}, "has no 'evry'; did you mean 'every'?"),
        ({"buffer": -1}, "'buffer' takes a whole number >= 1, not -1"),
        ({"flush": 1}, "'flush' takes no argument, not 1"),
        ({"frame": {"newline": "\t"}}, "'newline' takes a text like"),
        ({"frame": {"id": 5}}, "'id' takes a text or no argument"),
        ({"frame": {"wrap": "a\nb"}}, "'wrap' takes one line"),
        ({"event": {"id": "a\nb", "data": 1}}, "'id' takes one line without NUL"),
        ({"event": {"data": 1, "retry": "soon"}}, "'retry' takes a whole number"),
        ({"heartbeat": {"event": "x"}}, "'heartbeat' needs 'every'"),
        ({"relay": "all", "shared": "yes"}, "'shared' takes true or false"),
    ],
    "trigger": [
        ({"relay": "all"}, "'relay' belongs in a stream script, this is a trigger script"),
        ({"event": {"data": 1}}, "'event' belongs in a run or stream script"),
        ({"open": {"status": 202, "body": {}, "headrs": {}}}, "did you mean 'headers'?"),
    ],
}
MISTAKES_ELSEWHERE = [
    ("run", {}, "run", "a script is a list of steps"),
    ("run", [{"repeat": 2, "steps": [{"sleep": 1}, {"slep": 1}]}], "run[0].steps[1]", "did you mean 'sleep'?"),
    ("run", [{"repeat": 1001, "steps": [{"repeat": 1000, "steps": []}]}], "run", "more than 1,000,000 turns"),
    ("run", [{"repeat": 600_000, "steps": []}] * 2, "run", "more than 1,000,000 turns"),
    ("stream", ["open", "open"], "stream[1]", "'open' comes once and before all output"),
    ("stream", [{"comment": "a"}, "open"], "stream[1]", "before all output"),
    ("stream", [{"repeat": 2, "steps": ["open"]}], "stream[0].steps[0]", "before all output"),
    ("run", [{"repeat": 1, "steps": [{"sleep": 0}] * 2500}] * 2, "run[1].steps", "more than 5,000 steps"),
    ("stream", [{"relay": "all"}, {"every": 1}], "stream[1]", "unknown step 'every'"),
]

@pytest.mark.parametrize(("place", "script", "at", "hint"), [
    *((place, [step], f"{place}[0]", hint) for place, rows in MISTAKES.items() for step, hint in rows),
    *MISTAKES_ELSEWHERE,
])
def test_a_mistake_names_its_place_and_says_what_helps(place, script, at, hint):
    with pytest.raises(aura_stream.Mistake) as mistake:
        aura_stream.parse_script(script, place)
    assert mistake.value.at == at and hint in mistake.value.hint

SILENT_OR_NOT = sorted({*aura_stream.VERBS["stream"]} - {"open", "repeat", "relay", "hang", "end", "drop", "reset"})

@pytest.mark.parametrize("verb", SILENT_OR_NOT)
async def test_the_head_may_come_behind_a_verb_just_if_that_puts_nothing_out(client, verb, autojump_clock):
    """A new verb stands in the right table."""
    arguments = {"sleep": 1, "event": {"data": 1}, "heartbeat": "never", "chunk": 5, "buffer": 5, "frame": {},
                 "flush": None}
    step = {"wait": "gate", "within": 1} if verb == "wait" else {verb: arguments.get(verb, "a")}
    await run_of(client, *says("a"))
    written = (await viewed(client, [step, "flush"])).data
    try:
        aura_stream.parse_script([step, {"open": {"status": 201}}], "stream")
    except aura_stream.Mistake:
        assert written, "it could stand before the head"
    else:
        assert not written
        assert (await viewed(client, [step, {"open": {"status": 201}}])).status_code == 201

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
])
def test_a_scenario_is_checked_whole(value, hint):
    with pytest.raises(aura_stream.Mistake, match=re.escape(hint)):
        parse_scenario(value)

def test_every_verb_is_a_method_where_it_may_stand():
    delivery = aura_stream.ScriptedDelivery
    players = {"run": aura_stream.Performance, "stream": delivery, "trigger": delivery}
    for place, verbs in aura_stream.VERBS.items():
        for name in verbs:
            assert callable(getattr(players[place], name)), (name, place)

async def test_templates_fill_five_names_and_nothing_else(client, autojump_clock):
    data = {"{runId}": ["{caseId}", "{tenantId}", 5, None, "{n} {{n} {other} }}", "{now}"]}
    steps = {"repeat": 7, "steps": [{"event": {"event": "{runId}", "data": data}}]}
    run = await ended(await run_of(client, steps, case="c", headers={"X-Tenant-ID": "3"}))
    *_, (name, found) = said(run)
    *texts, now = found["r"]
    assert (name, texts) == ("r", ["c", "3", 5, None, "7 {n} {other} }}"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", now)

def test_a_range_is_drawn_from_the_seed():
    def drawn(seed):
        player = aura_stream.ScriptPlayer(ScriptClock(), aura_stream.Gates(1000), {}, seed)
        return [player.draw([1, 2]) for _ in range(3)]

    assert drawn("a") == drawn("a") != drawn("b")
    assert all(1 <= seconds <= 2 for seconds in drawn("a"))

def test_no_legal_request_holds_everybody_up():
    """The longest script, and a name of a megabyte: 100 ms by hand, five times the slack here."""
    began = time.perf_counter()
    aura_stream.parse_script([{"event": {"data": 1}}] * aura_stream.MOST_STEPS, "run")
    with pytest.raises(aura_stream.Mistake) as mistake:
        aura_stream.parse_script([{"x" * 10**6: 1}], "run")
    assert len(mistake.value.hint) < 1000
    assert time.perf_counter() - began < 0.5

def test_a_script_holds_no_pads_before_they_are_due():
    source = {"name": "pads", "stream": [{"event": {"data": {}}, "pad": 65_536}] * 1500}
    tracemalloc.start()
    own = parse_scenario(source)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * own.weight, "58 KB of JSON held 95 MB"

# ═══ Analyses ═══════════════════════════════════════════════════════════════════════════════════

async def analysed(client, phase="phase2", query="", headers=None, **body):
    """What the ordinary analysis of this phase says: names and data."""
    path = f"/aura/{'internal/' if phase == 'phase3' else ''}cases/85116/analysis-runs{query}"
    answer = await client.post(path, headers={**BEARER, **(headers or {})}, json={"runId": "r", **body})
    assert answer.status_code == 202
    return said(await ended(client.hub.find("r")))

async def test_phase2_says_what_the_contract_says(client, autojump_clock):
    events = await analysed(client)
    data = dict(events)
    assert [name for name, _ in events] == PHASE2
    assert [(one["label"], one["percent"]) for name, one in events if name == "step"] == [
        ("INPUT_NORM", 10), ("EVIDENCE_GATHER", 25), ("RULE_SCORING", 45), ("LLM_REASONING", 65), ("PROPOSALS", 85)]
    assert [item["type"] for item in data["evidence"]["items"]] == ["CASE", "DOC_HEADER", "OPEN_ITEMS", "LINEAGE"]
    assert data["confidence"] == {"anomalyScore": 0.5, "patternMatch": 0.7, "ruleCompliance": 0.85, "overall": 0.67}
    assert data["completed"]["score"] == pytest.approx(0.665) and data["completed"]["severity"] == "MEDIUM"

@pytest.mark.parametrize(("evidence", "anomaly", "proposals"), [
    ({"amount": 1_000_000}, 0.5, 2), ({"amount": 10**300}, 0.95, 2), ({"amount": 0}, 0.3, 1),
    ({"amount": "5", "totalAmount": 1_500_000}, 0.6, 2), ({"amount": True}, 0.5, 2), ({"amount": -5}, 0.3, 1),
    ({"document": {"header": {"amount": 2_000_000}}}, 0.7, 2), ({"document": []}, 0.5, 2),
])
async def test_confidence_and_proposals_follow_the_amount(client, evidence, anomaly, proposals, autojump_clock):
    events = await analysed(client, evidence=evidence)
    assert dict(events)["confidence"]["anomalyScore"] == anomaly
    assert [name for name, _ in events].count("proposal") == proposals

async def test_evidence_lists_what_the_request_brought_and_at_most_thirty(client, autojump_clock):
    evidence = {"document": {"header": {"a": "{runId}"}, "items": [1, 2]}, "openItems": [1, 2, 3], "lineage": {"a": 1},
                "partyIds": ["p"], "policies": [1, 2]}
    items = dict(await analysed(client, evidence=evidence))["evidence"]["items"]
    assert " ".join(one["type"] for one in items) == (
        "DOC_HEADER DOC_ITEM DOC_ITEM OPEN_ITEMS LINEAGE PARTY_IDS POLICIES")
    assert [item["count"] for item in items if "count" in item] == [3, 1, 1, 2]
    assert items[0]["content"] == {"a": "{runId}"}, "braces from outside are no template"
    await control(client, "POST", "reset")
    many = dict(await analysed(client, evidence={"document": {"items": [1] * 99}}))
    assert len(many["evidence"]["items"]) == 30

@pytest.mark.parametrize(("headers", "query", "fail", "percents"), [
    ({}, "", None, [20, 45, 45, 70, 70, 80, 95]), ({"X-Aura-Test-Fail": "x"}, "", None, [20, 45, 45, 70, 70, 80, 95]),
    ({"X-Aura-Test-Fail": "rag"}, "", "rag", [20]), ({}, "?test_fail_query=llm", "llm", [20, 45, 45, 70]),
    ({"X-Aura-Test-Fail": "rag"}, "?test_fail_query=llm", "rag", [20]),
])
async def test_phase3_says_what_the_contract_says(client, headers, query, fail, percents, autojump_clock):
    events = await analysed(client, "phase3", query, headers, artifacts={})
    assert [data["percent"] for _, data in events if "percent" in data] == percents
    if fail:
        message = f"Simulated {fail.upper()} failure (X-Aura-Test-Fail: {fail})"
        assert events[-1][1]["error"] == {"message": message, "stage": fail}
    else:
        assert [name for name, _ in events] == PHASE3
        assert events[-1][1] == {"runId": "r", "status": "completed"}

# ═══ Journal ════════════════════════════════════════════════════════════════════════════════════

async def test_the_journal_is_bounded_and_the_oldest_entry_goes(client, heard):
    for _ in range(1005):
        await client.get("/health")
    found = (await control(client, "GET", "journal"))["entries"]
    assert (len(found), found[0]["seq"], found[-1]["seq"]) == (1000, 6, 1005)
    assert len((await control(client, "GET", "journal?since=1000"))["entries"]) == 5
    assert heard.all().count("INFO the journal is full at 1000 entries: the oldest go") == 1
    await control(client, "POST", "reset")
    assert (await control(client, "GET", "journal"))["entries"] == []

async def test_waiting_for_entries_counts_finished_ones_and_takes_the_oldest(client, autojump_clock):
    slow = [{"relay": "all"}, {"sleep": 3}]
    await run_of(client, *says("a"))
    await run_of(client, *says("a"), run_id="other")
    start = client.clock.now()

    async with meanwhile(read(client, "r", slow)):
        await read(client, "other")
        await read(client, "r")
        found = (await control(client, "GET", "journal?runId=r&kind=stream&count=2"))["entries"]
        assert [one["seq"] for one in found] == [3, 5] and client.clock.now() - start == pytest.approx(3, abs=0.2)
    missing = await control(client, "GET", "journal?runId=r&kind=stream&count=9&within=5", 408)
    assert missing["error"].startswith("2 of 9 finished entries came within 5 s")
    assert [one["seq"] for one in missing["entries"]] == [3, 5]
    assert client.clock.now() - start == pytest.approx(8, abs=0.2), "it waits no longer than it was told"

async def test_who_waits_is_asked_about_the_one_entry_that_has_ended(client, autojump_clock):
    """Two hundred waiters do not make each other's work: what they wait for comes to each of them, in time."""
    found = []

    async def waiter(number):
        asked = f"journal?testId=t&count={3 + number % 2}&within=50"
        found.append(len((await control(client, "GET", asked))["entries"]))

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(waiter, number)
        await trio.testing.wait_all_tasks_blocked()
        for test_id in 100 * ["other"] + 4 * ["t"]:
            await client.get("/health", headers={"X-Test-Id": test_id})
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(found) == [3] * 100 + [4] * 100 and time.monotonic() - began < 10

# ═══ Runs ═══════════════════════════════════════════════════════════════════════════════════════

@contextlib.asynccontextmanager
async def analysing(analysis, **fields):
    """The application in memory, and a run of this analysis."""
    async with in_memory(analysis=analysis, **fields) as client:
        await triggered(client, runId="r")
        yield client, client.hub.find("r")

async def test_a_full_channel_makes_the_analysis_wait_and_viewers_get_a_whole_batch_at_once(autojump_clock):
    """The channel is the run's queue, and its room is the size of a batch."""
    room = []

    async def analysis(facts, sending):
        with contextlib.suppress(trio.WouldBlock):
            while True:
                sending.send_nowait(Event("a", {}))
                room.append(1)

    async with analysing(analysis) as (client, run):
        assert len(names_in(await ended(run))) == len(room) in (256, 257)
        await run_of(client, {"wait": "go"}, {"repeat": 1000, "steps": says("a")[:1]}, run_id="long")
        async with meanwhile(read(client, "long")) as found:
            await control(client, "POST", "signal", gate="go")
    assert len(parsed(found[0].data)) == 1000 and len(found[0].pieces) < 20

@pytest.mark.parametrize(("path", "data"), [
    ("/aura/cases/85116/analysis-runs",
     {"error": "no luck", "stage": "pipeline", "code": "ANALYSIS_PIPELINE", "retryable": True}),
    ("/aura/internal/cases/85116/analysis-runs",
     {"runId": "r", "status": "failed", "error": {"message": "no luck", "stage": "pipeline"}, "retryable": True}),
])
async def test_a_failure_is_the_last_event_in_the_shape_of_its_phase(client, path, data, heard, autojump_clock):
    scenario = {"name": "s", "run": [*says("a"), {"fail": "no luck"}]}
    await client.post(path, headers=BEARER, json={"runId": "r", "scenario": scenario})
    run = await ended(client.hub.find("r"))
    assert (run.status, said(run)) == ("failed", [("a", {"n": "a"}), ("failed", data)])
    line = heard.wait_for("analysis failed run_id=r case_id=85116 stage=pipeline")
    assert "\n  Traceback (most recent call last):\n" in line and line.endswith("no luck")

FORGED = "2026-01-01 00:00:00,000 - aura_stream - INFO - forged"
FORGING = f"no\n{FORGED}\r{FORGED}\u2028{FORGED}\x1b[2J\x85{FORGED}"

@pytest.mark.parametrize("step", [{"crash": FORGING}, {"fail": FORGING}, {"fail": {"error": "no", "stage": FORGING}}])
async def test_no_text_of_a_failure_can_forge_a_line_of_the_log_whoever_formats_it(client, step):
    """Embedded, the host's formatter knows nothing of us: each line but the first is indented before it gets there."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("aura_stream").addHandler(handler)
    try:
        await ended(await run_of(client, step, case=quote(FORGING, safe="")))
    finally:
        logging.getLogger("aura_stream").removeHandler(handler)
    lines = written.getvalue().splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("analysis failed run_id=r case_id=no\\n2026-"))
    assert "  Traceback (most recent call last):" in lines[first:] and all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith(FORGED[:10])]

Nameless = type("Nameless", (Exception,), {"__str__": lambda self: 1 / 0})
Lying = type("Lying", (Exception,), {"request": property(lambda self: {}["no request either"])})
Own = type("Own", (BaseException,), {})
HalfMade = type("HalfMade", (Failure,), {"__init__": lambda self, text: None})
Unencoded = type("Unencoded", (Event,), {"__post_init__": lambda self: None})

async def closes_and_raises(facts, sending):
    await sending.aclose()
    raise ValueError("after the close")

async def leaks_a_cancelled(facts, sending):
    with trio.move_on_after(0.05):
        result = await outcome.acapture(trio.sleep, 5)
    result.unwrap()

async def says_no_event_last(facts, sending):
    sending.send_nowait("no event")

async def fails_in_its_own_nursery(facts, sending):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raising(ValueError("child")), facts, sending)
        await trio.sleep_forever()

async def yields(facts, sending):
    yield "an event"

def awaiting(foreign):
    async def analysis(facts, sending):
        await foreign()

    return analysis

def sending_one(thing):
    async def analysis(facts, sending):
        await sending.send(thing)
        await trio.sleep(1000)

    return analysis

def raising(error):
    async def analysis(facts, sending):
        raise error

    return analysis

REQUEST = httpx.Request("GET", "http://llm.local/v1")
UPSTREAM = httpx.HTTPStatusError("bad gateway", request=REQUEST, response=httpx.Response(502, request=REQUEST))
ODD, NO_EVENT = SyntaxError("odd"), "where an Event belongs"
ODD.lineno, ODD.text = 1, object()
ON_TRIO = "an analysis runs on Trio: `async def`, awaiting Trio or anyio, not asyncio"
WORST = [
    (raising(ValueError("row 5")), "ValueError: row 5"), (raising(SystemExit(3)), "SystemExit: 3"),
    (raising(UPSTREAM), "HTTPStatusError: bad gateway (url http://llm.local/v1) (status 502)"),
    (raising(ExceptionGroup("many", [KeyError("x")])), "KeyError: 'x'"), (raising(MemoryError()), "MemoryError: "),
    (fails_in_its_own_nursery, "ValueError: child"), (closes_and_raises, "ValueError: after the close"),
    (sending_one({"a": 1}), f"the analysis sent dict, {NO_EVENT}"),
    (says_no_event_last, f"the analysis sent str, {NO_EVENT}"),
    (sending_one(Unencoded("a", 1)), f"the analysis sent Unencoded, {NO_EVENT}"),
    (sending_one(Event.__new__(Event)), f"the analysis sent Event, {NO_EVENT}"),
    (raising(Nameless()), "Nameless"), (raising(Lying("x")), "Lying: x"), (raising(Own("x")), "Own: x"),
    (leaks_a_cancelled, "Cancelled: "), (raising(HalfMade("x")), "HalfMade: "), (raising(ODD), "SyntaxError: "),
    (raising(GeneratorExit()), "GeneratorExit: "), (raising(Failure({1: object})), "{1: <class 'object'>}"),
    (raising(ValueError("x\n" * 1_000_000)), "ValueError: x"),
    (awaiting(lambda: asyncio.sleep(1)), f"RuntimeError: no running event loop{ON_TRIO}"),
    (awaiting(lambda: asyncio.Queue().get()), f"AttributeError: {ON_TRIO}"),
    (awaiting(lambda: asyncio.sleep(0)), f"TypeError: trio.run received unrecognized yield message{ON_TRIO}"),
    (lambda facts, sending: None, f"TypeError: {ON_TRIO}"), (yields, f"TypeError: {ON_TRIO}"),
    (lambda facts, sending: asyncio.sleep(1), f"RuntimeError: no running event loop{ON_TRIO}"),
]

@pytest.mark.parametrize(("analysis", "text"), WORST)
async def test_the_worst_analysis_ends_only_its_own_run_and_what_happened_is_named(
        analysis, text, heard, autojump_clock):
    async with analysing(analysis) as (client, run):
        await ended(run)
        (*_, (name, data)) = said(run)
        assert (run.status, name) == ("failed", "failed")
        begins, on_trio, _ = text.partition(ON_TRIO)
        assert data["error"].startswith(begins) and data["error"].endswith(on_trio)
        assert (await client.get("/health")).status_code == 200
    assert max(map(len, heard.all().split("ERROR"))) < 50_000

async def test_a_run_goes_on_until_its_analysis_returns_even_if_that_closes_its_channel(autojump_clock):
    async def analysis(facts, sending):
        await sending.send(Event("a", {}))
        await sending.aclose()
        await trio.sleep(50)

    async with analysing(analysis) as (client, run):
        await trio.sleep(49)
        assert run.status == "running"
        run.cancel(Failure("enough", stage="cancelled"))
        assert names_in(await ended(run)) == ["a", "failed"]

async def test_a_cancel_that_is_swallowed_is_still_a_cancel(autojump_clock):
    async def analysis(facts, sending):
        with contextlib.suppress(trio.Cancelled):
            await trio.sleep(100)

    async with analysing(analysis, idle_timeout=50) as (client, cancelled):
        await triggered(client, runId="silent")
        await trio.sleep(1)
        cancelled.cancel(Failure("enough", stage="cancelled"))
        for run, status, stage in ((cancelled, "cancelled", "cancelled"),
                                   (client.hub.find("silent"), "failed", "timeout")):
            assert ((await ended(run)).status, said(run)[-1][1]["stage"]) == (status, stage)

FAIL, SLEEP = {"fail": "late"}, {"sleep": 60}

@pytest.mark.parametrize(("steps", "cancel", "names", "status"), [
    ([*says("completed"), FAIL], False, ["completed"], "completed"),
    ([*says("failed"), FAIL], False, ["failed"], "failed"),
    ([*says("failed"), SLEEP], True, ["failed"], "failed"),
    ([*says("completed"), SLEEP], True, ["completed"], "completed"),
    ([*says("completed", "note"), SLEEP], True, ["completed", "note", "failed"], "cancelled"),
    ([*says("completed", "note")], False, ["completed", "note"], "completed"),
])
async def test_one_terminal_event_is_the_last_and_the_status_agrees(
        client, steps, cancel, names, status, autojump_clock):
    run = await run_of(client, *steps)
    if cancel:
        answer = await client.delete("/aura/cases/1/analysis-runs/r", headers=BEARER)
        expected = (202, "CANCELLED") if status == "cancelled" else (200, status)
        assert (answer.status_code, answer.json()["status"]) == expected
    assert (names_in(await ended(run)), run.status) == (names, status)

async def test_nothing_follows_the_last_word_whoever_goes_on_sending():
    async def chatter(sending):
        with sending, contextlib.suppress(trio.BrokenResourceError):
            while True:
                await sending.send(Event("chatter", {}))

    async def analysis(facts, sending):
        for _ in range(3):
            nursery.start_soon(chatter, sending.clone())
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        raise ValueError("enough")

    async with trio.open_nursery() as nursery, analysing(analysis) as (client, run):
        await ended(run)
        assert names_in(run)[-1] == "failed" and names_in(run).count("failed") == 1

async def test_a_cancelled_run_says_why_to_its_analysis_too_and_loses_nothing_it_had_said(autojump_clock):
    reasons = []

    async def analysis(facts, sending):
        await sending.send(Event("a", {}))
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            reasons.append(cancelled.reason)
            raise

    async with analysing(analysis) as (client, run):
        await trio.testing.wait_all_tasks_blocked()
        run.cancel(Failure("the tea is ready", stage="cancelled", retryable=False))
        expected = {"error": "the tea is ready", "stage": "cancelled", "code": "ANALYSIS_CANCELLED", "retryable": False}
        assert said(await ended(run)) == [("a", {}), ("failed", expected)] and reasons == ["the tea is ready"]
        run.cancel(Failure("again", stage="shutdown"))
        assert run.status == "cancelled"

async def test_a_cancel_that_comes_too_late_changes_nothing_nor_does_a_sending_end_that_somebody_kept(autojump_clock):
    kept = []

    async def analysis(facts, sending):
        kept.append(sending.clone())
        await sending.send(Event("completed", {}))
        client.hub.find("r").cancel(Failure("too late", stage="cancelled"))

    async with analysing(analysis, idle_timeout=5) as (client, run):
        assert (names_in(await ended(run)), run.status) == (["completed"], "completed")
        kept[0].close()

async def test_a_script_that_never_waits_starves_nobody(client):
    endless = {"repeat": 1000, "steps": [{"repeat": 1000, "steps": [{"repeat": 0, "steps": ["hang"]}]}]}
    await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), endless]})
    run = client.hub.find("r")
    while run.log.last == 0:
        await trio.lowlevel.checkpoint()
    run.cancel(Failure("enough", stage="cancelled"))
    assert (await ended(run)).status == "cancelled"

async def test_a_silent_run_fails_truthfully_at_its_idle_timeout(client, autojump_clock, heard):
    start = client.clock.now()
    run = await ended(await run_of(client, *says("a"), {"sleep": 299}, *says("b"), {"sleep": 9999}))
    assert client.clock.now() - start == pytest.approx(599, abs=1)
    assert (names_in(run), said(run)[-1][1]["stage"], run.status) == (["a", "b", "failed"], "timeout", "failed")
    heard.wait_for("WARNING analysis_run_stream: get_event returned None run_id=r (no event for 300s)")
    heard.wait_for("WARNING EventSource connection timeout")

async def test_the_log_keeps_to_its_limits_and_says_what_is_gone(autojump_clock, heard):
    async with in_memory(max_run_events=10) as client:
        await ended(await run_of(client, {"repeat": 25, "steps": says("a", pause=1)}))
        events = parsed((await read(client, "r")).data)
        assert events[0] == ("15", "gap", '{"from": 1, "to": 15}')
        assert [int(number) for number, _, _ in events[1:]] == list(range(16, 26))
        resumed = await read(client, "r", Last_Event_ID="15")
        assert "gap" not in [name for _, name, _ in parsed(resumed.data)]
    assert heard.all().count("run_store: log full") == 1
    async with in_memory(max_run_bytes=50_000) as client:
        run = await run_of(client, {"event": {"event": "big", "data": "x" * 100_000}}, {"wait": "go"}, *says("b"))
        await control(client, "POST", "signal", gate="go")
        await ended(run)
        gap_and_rest = [("1", "gap", '{"from": 1, "to": 1}'), ("2", "b", '{"n": "b"}')]
        assert parsed((await read(client, "r")).data) == gap_and_rest, "the newest, too big, goes too"
        twenty = {"repeat": 20, "steps": [{"event": {"event": "a", "data": "x" * 10_000}}]}
        await ended(await run_of(client, twenty, run_id="bytes"))
        assert [int(id) for id, _, _ in parsed((await read(client, "bytes")).data)] == [16, 17, 18, 19, 20]

async def test_what_is_forgotten_while_a_gap_is_being_said_is_a_gap_too(autojump_clock):
    async with in_memory(max_run_events=3) as client:
        run = await run_of(client, {"repeat": 9, "steps": says("a")[:1]}, {"wait": "go"})

        async def more(piece):
            if b"event: gap" in piece and run.log.last < 20:
                for _ in range(6):
                    await control(client, "POST", "emit", runId="r", event="b", data="later")
                await trio.testing.wait_all_tasks_blocked()
            if b"id: 21\n" in piece:
                await control(client, "POST", "signal", gate="go")

        client.heard = more
        events = parsed((await read(client, "r")).data)
    assert [(int(id), name) for id, name, _ in events] == [
        (6, "gap"), (12, "gap"), (18, "gap"), (19, "b"), (20, "b"), (21, "b")]

async def test_a_piece_is_64_kib_or_one_event(client, autojump_clock):
    sizes = (60_000, 6_000, 200_000, *(20_000,) * 7, 10)
    await ended(await run_of(client, *({"event": {"data": "x" * size}} for size in sizes)))
    pieces = [piece for _, piece in (await read(client, "r")).pieces]
    counts = [len(parsed(piece)) for piece in pieces]
    assert sum(counts) == len(sizes) and max(counts) == 3
    assert all(len(piece) <= 64 * 1024 or count == 1 for piece, count in zip(pieces, counts, strict=True))

async def test_what_is_bound_counts_as_what_logs_do(autojump_clock):
    own = {"name": "own", "run": [{"event": {"event": "e", "data": ["🙂" * 5] * 4_000}}]}
    async with in_memory(max_log_bytes=5_000_000) as client:
        answers = [await client.post("/__aura/next", json={"scenario": own}) for _ in range(12)]
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 409} and statuses == sorted(statuses), "and the 409 comes before the limit"
        assert 3_000_000 < client.hub.held <= 5_000_000 and "limit is 5000000 bytes" in answers[-1].json()["error"]
        await triggered(client, runId="one")
        assert client.hub.held < 5_000_000, "a trigger uses one up"
        await control(client, "POST", "reset")
        assert client.hub.held == 0
    async with in_memory(max_log_bytes=30_000_000) as client:  # one emoji makes a megabyte four
        asked = {"projectId": "p", "description": "a" * 1_000_000 + "🙂"}
        answers = [await client.post(MAKE, json=asked) for _ in range(10)]
        assert [answer.status_code for answer in answers] == [201] * 8 + [503] * 2
        said_of_it = await client.get(f"{MAKE}/{answers[0].json()['jobId']}/events")
        assert len(said_of_it.data) < 10_000, "and is not said over and over again"

async def test_ids_of_any_length_are_remembered_at_no_cost(autojump_clock):
    async with in_memory(max_journal=5) as client:
        async def viewed(number):
            run_id = f"{'x' * 15_000}{number}"
            answers = [await read(client, run_id, X_Aura_Scenario="refuse-3-then-ok") for _ in range(2)]
            return [answer.headers["X-Aura-Attempt"] for answer in answers]

        assert await viewed("warm") == ["1", "2"]
        tracemalloc.start()
        for number in range(100):
            assert await viewed(number) == ["1", "2"], "each has its own count"
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert held < 700_000, "not a hundred ids of 15 KB"

async def test_what_requests_hold_counts_as_what_logs_do(autojump_clock):
    """A megabyte of `[[],[],…]` is twenty of Python: it counts while its run keeps it."""
    heavy = {"evidence": {"items": [[]] * 15_000}}
    own = {"name": "own", "run": [{"event": {"event": "e", "data": [[]] * 2_000}}]}
    async with in_memory(max_log_bytes=4_000_000) as client:
        for number in range(6):
            await triggered(client, runId=f"e{number}", **heavy)
            await ended(client.hub.find(f"e{number}"))
        assert len(client.hub.seen_by(None)) == 6, "of an ended run only the log is left"
        for number in range(6):
            await triggered(client, runId=f"s{number}", scenario=own, **heavy)
            await ended(client.hub.find(f"s{number}"))
        left = [run.info.run_id for run in client.hub.seen_by(None)]
        assert left == [f"s{number}" for number in range(6)][-len(left) :]
        assert 1 < len(left) < 6, "a scenario of its own stays, and counts"
        for number in range(40):
            steps = json.dumps({"name": "own", "run": ["hang"], "stream": ["end"] * 1250})
            await triggered(client, runId=f"h{number}", headers={**BEARER, "X-Aura-Scenario": steps})
            client.hub.find(f"h{number}").cancel(Failure("enough"))
            await ended(client.hub.find(f"h{number}"))
        assert 15 < len(client.hub.seen_by(None)) < 35, "one in a header, too"
        await control(client, "POST", "reset")
        assert client.hub.held == 0
        answers = []
        for number in range(4):
            body = {"runId": f"l{number}", "scenario": "silent", **heavy}
            answers.append(await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json=body))
        assert [answer.status_code for answer in answers] == [202, 202, 503, 503]
        assert answers[-1].json()["error"] == "the live runs hold too much, the limit is 4000000 bytes"
        await client.delete("/aura/cases/1/analysis-runs/l0", headers=BEARER)
        await ended(client.hub.find("l0"))
        await triggered(client, runId="l4")

async def test_all_logs_together_have_a_limit(autojump_clock):
    big = {"repeat": 10, "steps": [{"event": {"data": "x" * 1000}}]}
    async with in_memory(max_log_bytes=32_000) as client:
        for number in range(4):
            await ended(await run_of(client, big, run_id=str(number)))
        gone = [client.hub.find(str(number)) is None for number in range(4)]
        assert gone == sorted(gone, reverse=True) and 0 < sum(gone) < 4, "the oldest first"
        live = await run_of(client, {"repeat": 100, "steps": big["steps"]}, {"sleep": 1}, run_id="live")
        assert client.hub.held <= 32_000 and live.log.first > 1

async def test_the_first_to_end_is_the_first_to_be_forgotten_and_each_after_its_retention(autojump_clock, heard):
    async with in_memory(max_ended_runs=2, retention=3600) as client:
        for run_id in "abc":
            await ended(await run_of(client, *says("a"), run_id=run_id, headers=ONE))
        assert [client.hub.find(run_id) is None for run_id in "abc"] == [True, False, False]
        for who, told in ((ONE, True), (BEARER, True), (TWO, False)):
            hint = (await client.get("/aura/analysis-runs/a/stream", headers=who)).json()["hint"]
            assert ("was forgotten" in hint) == told
        heard.wait_for("run_store: queue removed run_id=a")
        async with meanwhile(read(client, "c", [{"relay": "all"}, {"sleep": 4000}])):
            await trio.sleep(3599)
            assert client.hub.find("c") is not None
            await trio.sleep(2)
            assert (client.hub.find("c"), client.hub.held, client.hub.streams) == (None, 0, 1), "and is still watched"
        assert client.hub.streams == 0

async def test_at_a_gate_the_idle_time_out_stands_still_and_then_goes_on(client, autojump_clock):
    steps = [{"sleep": 200}, {"wait": "go"}, {"sleep": 99}, *says("a"), {"sleep": 200}, {"wait": "go"}, {"sleep": 101}]
    run = await run_of(client, *steps)
    await trio.sleep(10_000)
    assert not run.ended, "300 s are long over, but it waits at a gate"
    await control(client, "POST", "signal", gate="go", runId="r")
    await trio.sleep(100)
    assert names_in(run) == ["a"], "99 of the remaining 100 s"
    start = trio.current_time()
    await ended(run)
    assert trio.current_time() - start == pytest.approx(298, abs=2) and said(run)[-1][1]["stage"] == "timeout"
    start = trio.current_time()
    await ended(await run_of(client, {"wait": "never", "within": 40}, *says("a"), run_id="limit"))
    assert trio.current_time() - start == pytest.approx(40, abs=1), "one with a limit is left without a signal"

async def test_a_reset_forgets_all_runs_and_an_id_is_new_again(client, autojump_clock):
    over = await ended(await run_of(client, *says("a"), run_id="over"))
    live = await run_of(client, *says("a"), {"sleep": 200}, run_id="live", headers={"X-Test-Id": "t"})
    await control(client, "POST", "reset?testId=t")
    assert client.hub.find("live") is None and client.hub.find("over") is over
    again = await run_of(client, *says("b"), {"sleep": 200}, run_id="live")
    assert (await ended(live)).status == "cancelled" and not again.ended and client.hub.find("live") is again
    await control(client, "POST", "reset")
    await ended(again)
    assert (await control(client, "GET", "runs"))["runs"] == []
    assert (client.hub.live, client.hub.held) == (0, 0), "what ended late is not counted back in"

# ═══ Deliveries ═════════════════════════════════════════════════════════════════════════════════

USUAL = [{"comment": "connected"}, "heartbeat", {"relay": "all"}, {"raw": "data: [DONE]\n\n"}]
INTERVAL = b": heartbeat\n\n"

async def test_the_ordinary_stream_is_its_script(client, autojump_clock):
    await ended(await run_of(client, *says("a", "b"), {"sleep": 95}, *says("c")))
    plain, scripted = await viewed(client), await viewed(client, USUAL)
    assert plain.data == scripted.data
    assert re.match(rb': connected\n\nevent: a\ndata: {.*}\nid: 1\n\nevent: b\n', plain.data) and DONE in plain.data
    for seen in (plain, scripted):
        entry = seen.entry
        assert (entry.events, entry.lastIdSent, entry.heartbeats, entry.status) == (3, 3, 0, 200)
        assert (entry.end.by, entry.end.how, entry.end.reason) == ("server", "end", "the script ended")

async def test_a_heartbeat_comes_after_every_quiet_interval_and_only_then(client, autojump_clock):
    await triggered(client, runId="r", scenario={"name": "s", "run": [
        {"sleep": 95}, *says("a"), {"sleep": 29}, *says("b"), {"sleep": 31}, *says("c")]})
    seen = await viewed(client)
    before, first, second, _ = re.split(rb"(?<=\n\n)event: .*\n.*\nid: \d\n\n", seen.data)
    assert (before, first, second, seen.entry.heartbeats) == (HELLO + 3 * INTERVAL, b"", INTERVAL, 4)

@pytest.mark.parametrize(("settings", "first"), [({"heartbeat": 0}, []), ({}, [{"open": {"status": 204}}])])
async def test_where_nothing_can_or_may_beat_nothing_spins(settings, first, autojump_clock):
    async with in_memory(**settings) as client:
        await run_of(client, "hang")
        seen = await viewed(client, [*first, "heartbeat", {"sleep": 200}, {"comment": "over"}])
    assert (seen.data, seen.entry.heartbeats) == (b": over\n\n" if not first else b"", 0)

@pytest.mark.parametrize(("relay", "expected"), [
    ({"relay": "all"}, [1, 2, 3, 4]), ({"relay": 2}, [1, 2]), ({"relay": {"until": "c"}}, [1, 2, 3]),
    ({"relay": 0}, []), ({"relay": 9}, [1, 2, 3, 4]), ({"relay": "all", "every": 1}, [1, 2, 3, 4]),
])
async def test_relay_delivers_the_portion_it_names(client, relay, expected, autojump_clock):
    await run_of(client, *says(*"abcd"))
    assert [int(number) for number, _, _ in parsed((await viewed(client, [relay])).data)] == expected

async def test_relay_paces_and_gives_up_as_told(client, autojump_clock):
    await run_of(client, *says(*"abcd"), {"sleep": 100}, *says("e"))
    start = client.clock.now()
    seen = await viewed(client, [{"relay": "all", "every": 10, "within": 50}, {"comment": "gave up"}])
    assert client.clock.now() - start == pytest.approx(80, abs=1)
    assert [name for _, name, _ in parsed(seen.data)] == list("abcd") and seen.data.endswith(b": gave up\n\n")

@pytest.mark.parametrize(("steps", "status", "data", "headers"), [
    ([{"open": {"status": 503, "headers": {"Retry-After": "7"}, "body": {"a": 1}}}], 503, b'{"a": 1}',
     {"retry-after": "7", "content-type": "application/json", "x-accel-buffering": None}),
    ([{"open": {"headers": {"X-Accel-Buffering": None}}}, {"raw": "data: x\n\n"}], 200, b"data: x\n\n",
     {"x-accel-buffering": None, "content-type": "text/event-stream; charset=utf-8"}),
    ([{"open": {"status": 204, "body": "x"}}, {"comment": "a"}, {"relay": "all"}], 204, b"", {"content-type": None}),
    ([{"open": {"status": 304, "body": "x"}}, {"comment": "a"}, {"relay": "all"}], 304, b"", {}),
    ([{"open": {"headers": {"X-Case": "{caseId}"}}}], 200, b"", {"x-case": "a%0D%0ASet-Cookie: b %ED%95%9C"}),
])
async def test_a_head_is_what_its_script_says_and_no_template_can_forge_a_header(
        client, steps, status, data, headers, autojump_clock):
    await run_of(client, *says("a"), case="a%0D%0ASet-Cookie:%20b%20%ED%95%9C")
    seen = await viewed(client, steps)
    assert (seen.status_code, seen.data, seen.entry.events, seen.entry.lastIdSent) == (status, data, 0, None)
    assert {name: seen.headers.get(name) for name in headers} == headers

async def test_without_ids_nothing_on_the_wire_has_one_and_retry_is_sent_if_asked_for(autojump_clock):
    async with in_memory(event_ids=False, max_run_events=2, retry_ms=1500) as client:
        await run_of(client, *says("a", "b", "c"))
        data = (await viewed(client)).data
    assert b"id:" not in data and data.count(b"event: gap") == 1 and data.startswith(HELLO + b"retry: 1500\n\n")

async def test_cut_at_every_byte_and_resumed_a_stream_loses_and_doubles_nothing(client, autojump_clock):
    """Also to a client that takes an id as soon as its line comes, as eventsource 2 and fetch-event-source do: with the
    id first, a cut anywhere in an event would lose it."""
    await ended(await run_of(client, "ordinary"))
    whole, rests = (await read(client, "r")).data, {}
    assert [int(id) for id, _, _ in parsed(whole)] == list(range(1, 12))
    for offset in range(len(whole) + 1):
        first = parsed(whole[:offset])
        last = first[-1][0] if first else "none"
        if last not in rests:
            rests[last] = parsed((await read(client, "r", Last_Event_ID=last)).data)
        assert first + rests[last] == parsed(whole), offset
        between = whole[:offset].endswith(b"\n") and not whole[:offset].endswith(b"\n\n")
        eager = re.findall(rb"^id: (\d+)\n", whole[:offset], re.M)
        assert len(eager) - len(first) in ((0, 1) if between else (0,)), offset

cuts = st.lists(st.integers(0, 400), max_size=4)

@hypothesis_settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "step", ""]), any_json, st.sampled_from([0, 0, 0.5, 40])), max_size=30),
    st.lists(st.tuples(st.sampled_from([0, 0.3, 7]), cuts), min_size=1, max_size=3),
)
def test_any_viewer_of_any_run_cut_anywhere_sees_the_whole_log(events, viewers):
    def literal(data):
        """The same, with nothing in it that a script would fill in."""
        return json.loads(re.sub(r"\{(?=[{\w])", "{{", json.dumps(data)))

    steps = [part for name, data, pause in events
             for part in ({"event": {"event": name, "data": literal(data)}}, {"sleep": pause})]
    results = []

    async def view(client, delay, cut_points):
        await trio.sleep(delay)
        got = []
        for cut in [*cut_points, None]:
            answer = await read(client, "r", cut=cut, Last_Event_ID=got[-1][0] if got else "")
            got += parsed(answer.data[:cut])
        results.append(got)

    async def everything():
        async with in_memory() as client, trio.open_nursery() as nursery:
            await triggered(client, runId="r", scenario={"name": "t", "run": steps})
            for delay, cut_points in viewers:
                nursery.start_soon(view, client, delay, cut_points)

    trio.run(everything, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(results) == len(viewers)
    for got in results:
        assert [int(number) for number, _, _ in got] == list(range(1, len(events) + 1))
        assert [name for _, name, _ in got] == [name or "message" for name, _, _ in events]

# ═══ Faults ═════════════════════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize(("steps", "expected"), [
    ([{"chunk": 4}, {"raw": "abcdefghij"}, {"raw": "k"}], [b"abcd", b"efgh", b"ij", b"k"]),
    ([{"chunk": "line"}, {"raw": "a\nbc\r\nd\re"}], [b"a\n", b"bc\r\n", b"d\r", b"e"]),
    ([{"chunk": "utf8"}, {"raw": "a한b🙂"}], [b"a\xed", b"\x95\x9cb\xf0", b"\x9f\x99\x82"]),
    ([{"buffer": 4}, {"raw": "ab"}, {"raw": "cdefghij"}, {"raw": "k"}], [b"abcd", b"efgh", b"ijk"]),
    ([{"buffer": "all"}, {"raw": "ab"}, {"raw": "cd"}, "flush", {"raw": "e"}, "flush", {"raw": "f"}],
     [b"abcd", b"e", b"f"]),
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
])
async def test_output_is_cut_and_held_as_the_script_says(client, steps, expected, autojump_clock):
    await run_of(client, "hang")
    seen = await viewed(client, steps)
    assert [data for _, data in seen.pieces] == expected
    assert (seen.entry.end.by, seen.entry.end.how) == ("server", "end")

async def test_chunks_keep_their_distance_and_no_heartbeat_falls_into_an_event(client, autojump_clock):
    """40 s between the bytes and a beat every 30: a stream that is still talking is not quiet."""
    await run_of(client, *says("a", "b"))
    script = [{"heartbeat": 30}, {"chunk": 10, "every": 40}, {"relay": "all"}, {"sleep": 130}, {"raw": "x"}]
    seen = await viewed(client, script)
    body, *beats = seen.data.removesuffix(b"x").split(INTERVAL)
    assert parsed(body) == [("1", "a", '{"n": "a"}'), ("2", "b", '{"n": "b"}')]
    assert beats == [b""] * 2 and seen.entry.heartbeats == 2
    moments = [moment for moment, _ in seen.pieces[:7]]
    assert [later - sooner for sooner, later in itertools.pairwise(moments)] == [pytest.approx(40)] * 6
    assert (seen.entry.events, seen.entry.lastIdSent) == (2, 2)
    talking = {"repeat": 4, "steps": [{"comment": "x"}, {"sleep": 20}]}
    seen = await viewed(client, [{"heartbeat": 30}, {"buffer": "all"}, talking])
    assert seen.entry.heartbeats == 0, "nor is one that is held back"

RACES = [
    ([chunk, {"comment": "c"}, {"heartbeat": 30}, {"relay": "all"}])
    for chunk in ({"chunk": 7}, {"chunk": 7, "every": 0.1}, {"chunk": "utf8"}, {"buffer": 10})
] + [
    [{"heartbeat": 30}, {"relay": "all"}],  # what falls due with the first output, the head
    [{"comment": "c"}, {"heartbeat": 30}, {"chunk": 7}, {"relay": 4}, {"heartbeat": "never"}, {"wait": "never"}],
]

@pytest.mark.parametrize("script", RACES)
async def test_an_event_that_comes_just_as_a_heartbeat_falls_due_is_whole(script, mock_clock):
    """Both in one turn of the loop: the task wakes with news, and its wait is cancelled already. Found by the soak.
    And a head from a task that is being cancelled would be taken for Hypercorn's own, and swallowed."""
    written, whole, said_all = bytearray(), [], trio.Event()

    async def heard(piece):
        written.extend(piece)

    async def analysis(facts, sending):
        for number in range(1, 5):
            await trio.testing.wait_all_tasks_blocked(0.01)
            sending.send_nowait(Event("말", {"n": "가" * number}))
            await trio.lowlevel.checkpoint()
            mock_clock.jump(30)
            await trio.sleep(2)
            whole.append([id for id, name, _ in parsed(bytes(written)) if name == "말"][-1:])
        said_all.set()
        await trio.sleep_forever()

    mock_clock.rate = 100
    async with analysing(analysis) as (client, run):
        client.waits, client.heard = False, heard
        async with meanwhile(viewed(client, script)) as found:
            await said_all.wait()
            await control(client, "DELETE", "connections?how=end")
    (seen,) = found
    events = [event for event in parsed(seen.data) if event[1] != "message"]
    assert [(id, json.loads(data)["n"]) for id, _, data in events] == [(str(n), "가" * n) for n in (1, 2, 3, 4)]
    assert {"buffer": 10} in script or whole == [["1"], ["2"], ["3"], ["4"]], "it does not wait for the next beat"
    assert (seen.entry.events, seen.entry.lastIdSent, seen.calm) == (4, 4, True)

def test_what_is_lost_with_the_buffer_was_not_delivered(jumping):
    """Events are counted when their last byte is out, and a beat too, whatever the relay had taken."""
    jumping.trigger("1", run_id=(run_id := uuid.uuid4().hex), scenario={"name": "s", "run": says("a", "b", "c")})
    for number, (steps, count) in enumerate([
        ([{"buffer": 40}, {"relay": 2}, "drop"], (40, 1, 1, 0)),
        (["open", {"buffer": "all"}, {"heartbeat": 1}, {"sleep": 10.5}, "drop"], (0, 0, None, 0)),
    ], 1):
        own = json.dumps({"name": f"own{number}", "stream": steps})
        with watch(jumping, run_id, None, X_Aura_Scenario=own) as wire:
            read_until(wire, None)
        entry = jumping.journal(run_id, count=number, within=WAIT)[-1]
        assert (entry.bytes, entry.events, entry.last_id_sent, entry.heartbeats) == count
        assert (entry.end.by, entry.end.how) == ("server", "drop")

async def test_a_full_buffer_lets_go_and_the_journal_says_so(client, autojump_clock):
    await run_of(client, "hang")
    seen = await viewed(client, [{"buffer": "all"}, {"repeat": 3, "steps": [{"raw": "x" * 600_000}]}])
    assert [len(data) for _, data in seen.pieces] == [1_200_000, 600_000]
    assert "the buffer was full at 1048576 bytes and let go" in seen.entry.said

@pytest.mark.parametrize(("frame", "expected"), [
    ({}, ": c\n\nevent: a\ndata: x\ndata: y\nid: 1\n\n"),
    ({"newline": "\r\n"}, ": c\r\n\r\nevent: a\r\ndata: x\r\ndata: y\r\nid: 1\r\n\r\n"),
    ({"newline": "\r"}, ": c\r\revent: a\rdata: x\rdata: y\rid: 1\r\r"),
    ({"id": None}, ": c\n\nevent: a\ndata: x\ndata: y\n\n"),
    ({"id": "{runId}_{n}"}, ": c\n\nevent: a\ndata: x\ndata: y\nid: r_1\n\n"),
    ({"id-first": True}, ": c\n\nid: 1\nevent: a\ndata: x\ndata: y\n\n"),
    ({"id-first": True, "id": "x{n}"}, ": c\n\nid: x1\nevent: a\ndata: x\ndata: y\n\n"),
    ({"wrap": "data:"}, ": c\n\ndata:event: a\ndata:data: x\ndata:data: y\ndata:id: 1\n\n"),
    ({"wrap": "{runId}:"}, ": c\n\nr:event: a\nr:data: x\nr:data: y\nr:id: 1\n\n"),
])
async def test_a_frame_is_how_events_and_comments_are_written(client, frame, expected, autojump_clock):
    await run_of(client, {"event": {"event": "a", "data": "x\ny"}})
    seen = await viewed(client, [{"frame": frame}, {"comment": "c"}, {"relay": "all"}])
    back = await viewed(client, [{"frame": frame}, {"frame": {}}, {"comment": "c"}, {"relay": "all"}])
    assert (seen.data.decode(), back.data) == (expected, b": c\n\nevent: a\ndata: x\ndata: y\nid: 1\n\n")

async def test_a_heartbeat_may_be_an_event_and_has_no_id(client, autojump_clock):
    beat = {"heartbeat": {"every": 30, "event": "heartbeat", "data": {"at": "{now}", "jobId": "{runId}"}}}
    await run_of(client, "hang")
    seen = await viewed(client, [{"frame": {"id": "{n}"}}, {"comment": "c"}, beat, {"sleep": 100}])
    beats = [(id, name, json.loads(data)["jobId"]) for id, name, data in parsed(seen.data)]
    assert beats == [("", "heartbeat", "r")] * 3 and seen.entry.heartbeats == 3

async def test_what_a_template_makes_cannot_break_a_line(client, autojump_clock):
    """A caseId is any path segment, line breaks and all."""
    await run_of(client, {"event": {"event": "{caseId}", "data": "{caseId}"}}, case="a%0Aevent:%20forged")
    own = {"event": {"event": "{caseId}", "id": "{caseId}", "data": 1}}
    events = parsed((await viewed(client, [own, {"frame": {"id": "{caseId}"}}, {"relay": "all"}])).data)
    line = "a%0Aevent: forged"
    assert events == [(line, line, "1"), (line, line, "a\nevent: forged")]

async def test_heartbeats_come_in_a_relay_that_opened_the_stream_itself(client, autojump_clock):
    await triggered(client, runId="r", scenario={"name": "s", "run": [*says("a"), {"sleep": 95}, *says("b")]})
    seen = await viewed(client, [{"heartbeat": 30}, {"sleep": 40}, {"relay": {"until": "{runId}"}}])
    assert seen.entry.heartbeats == 1, "none before the head, one in the rest of the 95 s"

@pytest.mark.parametrize("beat", ["never", 0.15])
async def test_a_heartbeat_changes_neither_the_pace_nor_the_patience_of_a_relay(client, beat, autojump_clock):
    slow = [{"heartbeat": beat}, {"comment": "c"}, {"chunk": 10, "every": 0.1}]
    await run_of(client, *says(*"abcd"))
    start = client.clock.now()
    await viewed(client, [*slow, {"relay": "all", "every": 1.0}])
    assert client.clock.now() - start > 4
    late = [{"sleep": 0.3}, *says("a"), {"sleep": 1.2}, *says("b")]
    await triggered(client, runId="late", scenario={"name": "s", "run": late})
    assert (await viewed(client, [*slow, {"relay": "all", "within": 1.0}], "late")).entry.events == 2

async def test_a_hanging_stream_is_silent(client, autojump_clock):
    await run_of(client, "hang")
    script = [{"comment": "c"}, {"heartbeat": 1}, {"sleep": 2.5}, "hang"]
    async with meanwhile(viewed(client, script)) as found:
        await trio.sleep(200)
        (open_one,) = (await control(client, "GET", "connections"))["connections"]
        assert (open_one["end"], open_one["chunks"], open_one["heartbeats"]) == (None, 3, 2)
        await control(client, "DELETE", "connections")
    assert [data for _, data in found[0].pieces][:3] == [b": c\n\n", INTERVAL, INTERVAL]
    assert (found[0].entry.end.by, found[0].entry.end.step) == ("admin", 3)

async def test_an_event_of_the_stream_s_own_is_written_as_it_is(client, autojump_clock):
    await run_of(client, "hang")
    step = {"event": {"event": "gap", "id": "7{n}", "retry": 5, "data": {"a": 1}}, "pad": 3}
    seen = await viewed(client, [{"repeat": 2, "steps": [step]}])
    assert seen.pieces[0][1] == b'event: gap\nretry: 5\ndata: {"a": 1, "pad": "xxx"}\nid: 71\n\n'
    assert (seen.entry.events, seen.entry.lastIdSent) == (2, 72)

@pytest.mark.parametrize(("size", "half"), [
    (0.5, b"event: b\ndata: {"), (3, b"eve"), (0, b""), (10**6, b'event: b\ndata: {"n": "b"}\nid: 2\n\n')])
async def test_a_relay_may_end_in_the_middle_of_the_event_that_comes_next(client, size, half, autojump_clock):
    await triggered(client, runId="r", scenario={"name": "s", "run": says("a", "b", "c", pause=10)})
    began = client.clock.now()
    seen = await viewed(client, [{"relay": 1, "cut": size}, {"comment": "cut"}])
    assert seen.data.split(b"id: 1\n\n")[1] == half + b": cut\n\n"
    assert client.clock.now() - began == pytest.approx(10, abs=0.5), "it waits for it"
    assert (seen.entry.events, seen.entry.lastIdSent) == (1, 1), "and half is none"
    await ended(client.hub.find("r"))
    script = [{"frame": {"newline": "\r\n"}}, {"relay": {"until": "b"}, "cut": 0.1}, {"relay": "all"}]
    events = parsed((await viewed(client, script)).data)
    assert [event[:2] for event in events] == [("1", "a"), ("2", "b"), ("3", "message")], "it comes behind its half"
    assert (await viewed(client, [{"relay": "all", "cut": 0.5}])).data.endswith(
        b"id: 3\n\n"), "behind the last: nothing"

async def test_what_is_to_be_cut_may_be_forgotten_while_it_is_waited_for(autojump_clock):
    async with in_memory(max_run_events=5) as client:
        await run_of(client, *says("a", "a"), {"wait": "g"}, {"repeat": 50, "steps": says("b")[:1]}, "hang")
        async with meanwhile(viewed(client, [{"relay": 2, "cut": 5}, {"comment": "cut"}])) as found:
            await control(client, "POST", "signal", gate="g")
    assert found[0].data.endswith(b"event: cut\n\n")

@pytest.mark.parametrize("pause", [0, 1])
async def test_a_shared_cursor_is_the_old_queue(client, pause, autojump_clock):
    """Each event goes to one viewer only, also where all are there already; with cursors of their own each sees all."""
    names = "abcdefghijklmnopqrstuvwxyz"  # so many, that nobody gets all of them by chance
    await triggered(client, runId="r", scenario={"name": "s", "run": says(*names, pause=pause)})
    if not pause:
        await ended(client.hub.find("r"))
    async with meanwhile(*(read(client, "r", [{"relay": "all", "shared": True}]) for _ in range(2))) as found:
        await ended(client.hub.find("r"))
    taken = [[id for id, _, _ in parsed(one.data)] for one in found]
    assert sorted(map(int, taken[0] + taken[1])) == list(range(1, 27)) and all(taken)

@given(st.lists(st.sampled_from([1, 2, 3, 7, 64, "utf8", "line"]), min_size=1, max_size=3),
       st.sampled_from([None, 5, 100, "all"]))
@hypothesis_settings(max_examples=30)
def test_however_it_is_cut_a_parser_yields_the_same(chunks, hold):
    async def main():
        async with in_memory() as client:
            texts = [{"event": {"event": "t", "data": {"text": f"위험도 {n} 🙂"}}} for n in range(5)]
            run = await ended(await run_of(client, *texts))
            steps = [part for chunk in chunks for part in ({"chunk": chunk}, {"relay": 2})]
            seen = await viewed(client, [*([] if hold is None else [{"buffer": hold}]), *steps, {"relay": "all"}])
            assert [(name, json.loads(data)) for _, name, data in parsed(seen.data)] == said(run)
            assert (seen.entry.events, seen.entry.lastIdSent) == (5, 5)

    trio.run(main)

# ═══ Contract ═══════════════════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize(("text", "last", "place"), [
    (None, 9, 0), ("", 9, 0), ("3", 9, 3), ("r1_3", 9, 3), ("a_b_3", 9, 3), ("9", 9, 9), ("10", 9, 0), ("-1", 9, 0),
    ("abc", 9, 0), ("3x", 9, 0), ("٣", 9, 0), ("9" * 5000, 9, 0), ("1.5", 9, 0), (" 3", 9, 0), ("x\n_2", 9, 2),
    ("1" * 200_000 + "_1", 9, 1), ("_1" * 100_000, 9, 1), ("_" * 200_000, 9, 0), ("_1" * 100_000 + "x", 9, 0),
])
def test_where_a_resume_goes_on_is_read_at_once(text, last, place):
    began = time.monotonic()
    assert aura_stream.resume_point(text, last) == place and time.monotonic() - began < 0.5

BAD_BODIES = [
    ("[]", ["body"]), ("5", ["body"]), ('"x"', ["body"]), ("null", ["body"]), ("{", ["body"]), ('{"a": NaN}', ["body"]),
    ("\xff", ["body"]), ("[" * 2000 + "]" * 2000, ["body"]), ('{"a":' * 70 + "1" + "}" * 70, ["body"]),
    ('{"runId": {}}', ["body", "runId"]), ('{"runId": true}', ["body", "runId"]),
    ('{"runId": "a/b"}', ["body", "runId"]),
    ('{"runId": ".."}', ["body", "runId"]), ('{"a": 1e999}', ["body"]), ("\xff\xfe{\x00}\x00", ["body"]),
    ('{"runId": "a\\nb"}', ["body", "runId"]), (json.dumps({"runId": "x" * 201}), ["body", "runId"]),
    ('{"evidence": []}', ["body", "evidence"]), ('{"mode": 5}', ["body", "mode"]),
    ('{"options": "x"}', ["body", "options"]),
    ('{"requestedBy": {}}', ["body", "requestedBy"]), ('{"evidence": {"items": [' + "[]," * 100_000 + "1]}}", ["body"]),
]

@pytest.mark.parametrize(("body", "loc"), BAD_BODIES)
async def test_a_bad_body_is_a_422_that_names_the_field(client, body, loc):
    answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, data=body.encode("latin-1"))
    assert answer.status_code == 422, answer.data
    detail = answer.json()["detail"][0]
    assert detail["loc"] == loc
    assert set(detail) == {"loc", "msg", "type"}
    assert client.hub.live == 0

@pytest.mark.parametrize(("body", "status"), [
    ({"options": {"ragTopK": 20, "temperature": 0.5, "promptVersion": "v"}}, 202), ({"options": {"ragTopK": 21}}, 422),
    ({"options": {"ragTopK": 1.5}}, 422), ({"options": {"temperature": 1.1}}, 422), ({"options": None}, 202),
    ({"options": {"promptVersion": 5}}, 422), ({"options": {"unknown": 1}}, 202), ({"callbacks": 5}, 422),
    ({"callbacks": {"onDone": "http://x"}}, 202), ({"callbacks": None}, 202),
])
async def test_what_phase3_takes_has_its_ranges(client, body, status):
    answer = await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json=body)
    assert answer.status_code == status

@pytest.mark.parametrize(("headers", "query", "detail"), [
    ({}, "", "Missing authorization header"), ({"Authorization": ""}, "", "Missing authorization header"),
    ({"Authorization": "Basic x"}, "", "Invalid authorization header format"),
    ({"Authorization": "Bearer "}, "", "Invalid authorization header format"),
    ({"Authorization": "Bearer"}, "?access_token=x", "Invalid authorization header format"),
    ({}, "?access_token=", "Missing authorization header"),
    ({"Authorization": "bearer x"}, "", None), ({}, "?access_token=x", None),
])
async def test_any_bearer_is_enough_and_none_is_a_401(client, headers, query, detail, heard):
    for path in ("/aura/cases/1/analysis", "/aura/analysis-runs/none/stream"):
        answer = await client.get(path + query, headers=headers)
        assert answer.status_code == (404 if detail is None else 401)
        if detail:
            assert (answer.json()["detail"], answer.headers["WWW-Authenticate"]) == (detail, "Bearer")
    assert "access_token" not in heard.all()
    async with in_memory(auth="off") as without:
        assert (await without.get("/aura/cases/1/analysis")).status_code == 404

async def test_a_token_in_the_query_is_never_told(client, autojump_clock, heard):
    await triggered(client, runId="r")
    for path in ("/aura/analysis-runs/r/stream", "/aura/analysis-runs/none/stream", "/nowhere"):
        answer = await client.get(f"{path}?access_token=hush-hush")
        assert b"hush" not in answer.data and "hush" not in str(answer.headers)
    assert "hush" not in json.dumps(await control(client, "GET", "journal")) and "hush" not in heard.all()

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
]

@pytest.mark.parametrize(("ways", "chosen"), CHOICES)
async def test_the_first_way_to_choose_wins(ways, chosen, autojump_clock):
    async with in_memory(scenario=ways.get("default", ""), no_magic=ways.get("no_magic", False)) as client:
        if "bound" in ways:
            await control(client, "POST", "next", scenario=ways["bound"])
        body = {"runId": ways.get("run_id", "r"), **({"scenario": ways["body"]} if "body" in ways else {})}
        query = f"?scenario={ways['query']}" if "query" in ways else ""
        headers = {**BEARER, **({"X-Aura-Scenario": ways["header"]} if "header" in ways else {})}
        path = f"/aura/cases/{ways.get('case', '1')}/analysis-runs{query}"
        answer = await client.post(path, headers=headers, json=body)
        assert (answer.status_code, answer.headers["X-Aura-Scenario"]) == (202, chosen)
        assert client.hub.find(body["runId"]).scenario.name == chosen
        assert answer.json()["caseId"] == ways.get("case", "1"), "an id keeps its suffix"

async def test_bindings_are_used_up_and_the_closest_fits_best(autojump_clock):
    async with in_memory(case="7=failed,8=crash") as client:
        async def chosen(*cases, test_id=""):
            named = {"X-Test-Id": test_id} if test_id else {}
            return [(await triggered(client, case, named)).headers["X-Aura-Scenario"] for case in cases]

        assert await chosen("7", "7", "8", "9") == ["failed", "failed", "crash", "ok"]
        await control(client, "POST", "next", scenario="drop", times=2)
        await control(client, "POST", "next", scenario="bom", caseId=85117, times=None)
        await control(client, "POST", "next", scenario="crlf", testId="t", times=1)
        assert await chosen("85117", "85117", "85117") == ["bom"] * 3
        assert await chosen("1", "1", test_id="t") == ["crlf", "drop"] and await chosen("1", "1") == ["drop", "ok"]
        await control(client, "POST", "reset")
        assert await chosen("85117", "7") == ["ok", "failed"], "but what was said at the start stays"

async def test_only_so_many_bindings_and_gates_wait():
    assert (Settings().max_journal, Settings().max_bindings, Settings().max_gates) == (1000, 1000, 1000)
    async with in_memory(max_bindings=2, max_gates=2) as client:
        for path, bodies in (("next", [{"scenario": "drop", "caseId": n} for n in range(3)]),
                             ("signal", [{"gate": f"g{n}"} for n in range(3)])):
            *_, last = [await client.post(f"/__aura/{path}", json=body) for body in bodies]
            assert last.status_code == 409 and "POST /__aura/reset" in last.json()["error"]

async def test_an_unknown_scenario_is_a_400_that_helps(client, autojump_clock):
    for path, headers in (("/aura/cases/1/analysis-runs", {"X-Aura-Scenario": "dorp"}),
                          ("/aura/cases/1~dorp/analysis-runs", {}), ("/aura/cases/1/analysis-runs?scenario=dorp", {})):
        answer = await client.post(path, headers={**BEARER, **headers}, json={})
        told = answer.json()
        assert (answer.status_code, told["error"], told["scenario"]) == (400, "unknown scenario", "dorp")
        assert told["didYouMean"][0] == "drop" and told["known"] == list(CATALOGUE)
    assert (await read(client, "nobody~dorp")).status_code == 400 and client.hub.live == 0

async def test_a_scenario_with_a_mistake_is_a_422_with_its_place(client, autojump_clock):
    wrong = {"name": "mine", "stream": [[], [{"comment": "a"}, {"slep": 1}]]}
    expected = {"at": "stream[1][1]", "step": {"slep": 1}, "hint": "unknown step 'slep'; did you mean 'sleep'?"}
    for path, body in (("/aura/cases/1/analysis-runs", {"scenario": wrong}), ("/__aura/check", wrong),
                       ("/__aura/next", {"scenario": wrong})):
        answer = await client.post(path, headers=BEARER, json=body)
        assert answer.status_code == 422 and expected.items() <= answer.json().items()
    assert client.hub.live == 0
    assert await control(client, "POST", "check", name="mine", stream=[["drop"]]) == {"ok": True}

async def test_a_choice_on_a_get_is_for_that_stream_and_counts_for_itself(client, autojump_clock):
    await triggered(client, runId="r", scenario="unavailable")

    async def asked(**headers):
        answer = await read(client, "r", **headers)
        return answer.status_code, answer.headers["X-Aura-Scenario"], answer.headers["X-Aura-Attempt"]

    assert await asked(X_Aura_Scenario="unavailable") == (503, "unavailable", "1"), "the run's own: its next attempt"
    assert await asked(X_Aura_Scenario="gone-204") == (204, "gone-204", "1")
    head = await client.head("/aura/analysis-runs/r/stream", headers=BEARER)
    assert head.headers["X-Aura-Attempt"] == "1", "HEAD counts for nothing"
    assert await asked() == (200, "unavailable", "2")
    assert await asked(X_Aura_Scenario="gone-204") == (204, "gone-204", "2")

async def test_a_run_counts_the_attempts_of_a_thousand_scenarios(client, autojump_clock):
    await triggered(client, runId="r")
    for number in [*range(1005), 1004]:
        own = json.dumps({"name": f"n{number}", "stream": ["end"]})
        attempt = (await read(client, "r", X_Aura_Scenario=own)).headers["X-Aura-Attempt"]
    assert attempt == "2" and len(client.hub.find("r").attempts) == 1000

async def test_a_known_run_keeps_its_scenario_and_another_is_a_conflict(client, autojump_clock):
    mine = {"name": "mine", "run": says("a")}
    await triggered(client, runId="r", scenario=mine)
    assert (await triggered(client, runId="r", scenario=mine)).headers["X-Aura-Run"] == "known"
    again = await triggered(client, runId="r")
    assert (again.headers["X-Aura-Scenario"], again.headers["X-Aura-Attempt"]) == ("mine", "3")
    for other in ("drop", "ok", {**mine, "seed": 5}, {"name": "mine", "run": []}):
        body = {"runId": "r", "scenario": other}
        answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json=body)
        assert answer.status_code == 409 and "'mine'" in answer.json()["error"]
    assert parsed((await read(client, "r")).data) == [("1", "a", '{"n": "a"}')]

async def test_a_script_without_a_log_plays_for_an_unknown_run_too(client, autojump_clock):
    answer = await read(client, "nobody~unauthorized")
    assert (answer.status_code, answer.headers["X-Aura-Run-ID"]) == (401, "nobody~unauthorized")
    answer = await read(client, "nobody~unknown-run")
    assert (answer.status_code, answer.json()["runId"]) == (200, "nobody~unknown-run")
    assert (await read(client, "nobody~drop-resume")).status_code == 404, "there is nothing to relay"
    attempts = [await read(client, "other~unavailable") for _ in range(2)]
    assert [(one.status_code, one.headers.get("X-Aura-Attempt")) for one in attempts] == [(503, "1"), (404, None)]
    await control(client, "POST", "next", scenario="rate-limited")
    assert [(await read(client, "nobody")).status_code for _ in range(2)] == [429, 404], "a binding is used up"
    await control(client, "POST", "next", scenario="drop")
    assert (await read(client, "nobody")).status_code == 404
    assert (await triggered(client)).headers["X-Aura-Scenario"] == "drop", "what could not play was not used up"

async def test_the_server_s_own_refusals_use_up_nothing(autojump_clock):
    async with in_memory(max_live_runs=1) as client:
        gone = [await read(client, "nobody", X_Aura_Scenario="expired-run") for _ in range(2)]
        assert [one.status_code for one in gone] == [404, 404]
        assert "X-Aura-Attempt" not in gone[1].headers, "its first script needs a log, and is still its next"
        await triggered(client, runId="live", scenario="stepped")
        await control(client, "POST", "next", scenario="failed")
        assert (await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={})).status_code == 503
        client.hub.find("live").cancel(Failure("over"))
        await ended(client.hub.find("live"))
        answer = await triggered(client, "1")
        assert (answer.headers["X-Aura-Scenario"], answer.headers["X-Aura-Attempt"]) == ("failed", "1")

async def test_a_scenario_in_a_header_may_speak_korean_and_one_s_own_ok_is_the_default(autojump_clock):
    mine = {"name": "mine", "run": [{"event": {"event": "t", "data": {"text": "한글"}}}]}
    own = {**CATALOGUE, "ok": parse_scenario({"name": "ok", "doc": "mine", "run": says("mine")})}
    async with in_memory(own) as client:
        await triggered(client, "1", {"X-Aura-Scenario": json.dumps(mine, ensure_ascii=False)}, runId="r")
        assert said(await ended(client.hub.find("r"))) == [("t", {"text": "한글"})]
        await triggered(client, runId="ok")
        assert names_in(await ended(client.hub.find("ok"))) == ["mine"]

async def test_trigger_attempts_count_per_run_or_else_per_case_until_their_test_is_reset(client, autojump_clock):
    twice = {"name": "twice", "trigger": [[{"open": {"status": 503, "body": "later"}}], []]}

    async def statuses(case, *run_ids, test_id=""):
        found = []
        for run_id in run_ids:
            body, headers = {"scenario": twice, **({"runId": run_id} if run_id else {})}, {"X-Test-Id": test_id}
            path = f"/aura/cases/{case}/analysis-runs"
            found.append((await client.post(path, headers={**BEARER, **headers}, json=body)).status_code)
        return found

    assert await statuses("1", None, None, None) == [503, 202, 202]
    assert await statuses("1", "a", "b", "a", "b") == [503, 503, 202, 202]
    assert await statuses("2", None) == [503]
    assert client.hub.live == 4, "who was refused started nothing"
    assert await statuses("1", "c", test_id="c") + await statuses("1", "d", test_id="d") == [503, 503]
    await control(client, "POST", "reset?testId=c")
    assert await statuses("1", "c", test_id="c") + await statuses("1", "d", test_id="d") == [503, 202]

@pytest.mark.parametrize(("host", "settings", "status"), [
    ("localhost", {}, 200), ("LOCALHOST:9000", {}, 200), ("127.0.0.1:1", {}, 200), ("[::1]:9000", {}, 200),
    ("evil.test", {}, 421), ("evil.test:9000", {}, 421), ("localhost.evil.test", {}, 421),
    ("127.0.0.1.evil.test", {}, 421), ("", {}, 421), (":9000", {}, 421),
    ("box.lan:9000", {"host": "box.lan"}, 200), ("other.lan", {"host": "box.lan"}, 421),
    ("a.test", {"allow_host": "a.test, B.test"}, 200), ("b.test:80", {"allow_host": "a.test, B.test"}, 200),
    ("c.test", {"allow_host": "a.test, B.test"}, 421), ("evil.test", {"host": "0.0.0.0"}, 200),
    ("evil.test", {"host": "::"}, 200), ("", {"host": "0.0.0.0"}, 200),
])
async def test_a_page_on_a_name_of_its_own_does_not_reach_the_server(host, settings, status):
    async with in_memory(**settings) as client:
        for path in ("/health", "/__aura/health"):
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code == status
        if status == 421:
            told = answer.json()
            assert host.rpartition(":")[0] in told["error"] and "--allow-host" in told["hint"]

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
])
def test_the_host_in_a_request_s_target_counts_whatever_its_header_says(line, host, status, one_server):
    head = [line, *([] if host is None else [f"Host: {host}"]), "Connection: close", "", ""]
    with connect(one_server, "\r\n".join(head).encode()) as wire:
        assert int(read_until(wire, None).split()[1]) == status

TOKEN, FOREIGN = {"Authorization": "Bearer s3cret"}, "pages of another site"
OWN_MACHINE, PROXY = "callers on the server's own machine", "through a proxy"
SECRET_SET = {"admin_token": "s3cret"}

@pytest.mark.parametrize(("settings", "peer", "headers", "status", "sentence"), [
    ({}, "127.0.0.1", {}, 200, ""), ({}, "127.8.9.1", {}, 200, ""), ({}, "::1", {}, 200, ""),
    ({}, "192.168.1.4", {}, 403, OWN_MACHINE), ({}, "::ffff:10.0.0.1", {}, 403, OWN_MACHINE),
    ({}, "127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403, PROXY),
    ({}, "127.0.0.1", {"X-Forwarded-For": ""}, 403, PROXY),
    ({}, "127.0.0.1", {"Forwarded": "for=x"}, 403, PROXY), ({}, "127.0.0.1", {"Via": "1.1 x"}, 403, PROXY),
    ({}, "127.0.0.1", {"Origin": "http://localhost:5173"}, 200, ""),
    ({}, "127.0.0.1", {"Origin": "https://[::1]:5173"}, 200, ""),
    *(({}, "127.0.0.1", {"Origin": origin}, 403, FOREIGN) for origin in (
        "http://evil.test", "http://localhost.evil.test", "null", "", "file://localhost", "http://localhost]")),
    ({"cors_origin": "https://app.test"}, "127.0.0.1", {"Origin": "https://app.test"}, 403, FOREIGN),
    ({"auth": "off"}, "192.168.1.4", {}, 403, OWN_MACHINE),
    ({"admin_token": " s3cret\n"}, "127.0.0.1", TOKEN, 200, ""),
    ({"admin_token": "\udcff"}, "127.0.0.1", TOKEN, 401, "ADMIN_TOKEN"),
    ({"admin_token": "\n"}, "127.0.0.1", {}, 200, ""),
    ({"admin_token": " \t\r\n"}, "192.168.1.4", {"Authorization": "Bearer "}, 403, OWN_MACHINE),
    ({"admin_token": "\n"}, "127.0.0.1", {"Authorization": "Bearer ", "Origin": "http://evil.test"}, 403, FOREIGN),
    ({"admin_token": "\n"}, "127.0.0.1", {"Authorization": "Bearer  ", "Via": "1.1 x"}, 403, PROXY),
    (SECRET_SET, "192.168.1.4", TOKEN | {"Via": "1.1 x", "Origin": "http://evil.test"}, 200, ""),
    (SECRET_SET, "127.0.0.1", {}, 401, "ADMIN_TOKEN"),
    *((SECRET_SET, "127.0.0.1", {"Authorization": given}, 401, "ADMIN_TOKEN") for given in (
        "Bearer ", "Bearer", "Bearer s3cre", "Basic s3cret", "Bearer 토큰")),
    *((SECRET_SET, "127.0.0.1", {"Authorization": given}, 200, "") for given in ("Bearer  s3cret ", "bearer s3cret")),
    ({"admin_token": "토큰"}, "127.0.0.1", {"Authorization": "Bearer 토큰"}, 200, ""),
])
async def test_control_is_for_whoever_may(settings, peer, headers, status, sentence):
    async with in_memory(**settings) as client:
        client.peer = peer
        for method, path in (("GET", "/__aura/journal"), ("POST", "/api/admin/sse/restart"), ("GET", "/__aura/none")):
            answer = await client.open(path, method=method, headers=headers)
            assert answer.status_code == (404 if status == 200 and "none" in path else status)
            if status != 200:
                told = answer.json()
                assert sentence in told.get("error", told.get("detail"))
                assert (answer.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)
        assert (await client.get("/__aura/health", headers=headers)).status_code == 200

def test_a_secret_s_file_with_nothing_in_it_is_no_token(heard):
    settings = Settings.read({"host": "0.0.0.0"}, {"ADMIN_TOKEN": "\n"})
    assert settings.admin_token == "", "control stays local"
    for token in ("\n", " s3cret\n"):
        with running(admin_token=token) as aura:
            aura.reset()
            forged = {"Authorization": "Bearer", "X-Forwarded-For": "10.0.0.9"}
            assert httpx.get(f"{aura.url}/__aura/journal",
                headers=forged).status_code == (401 if token.strip() else 403)

JOB_WAYS = [("GET", "/api/generation/jobs/j/events"), ("POST", "/api/v1/generations"),
            ("GET", "/api/v1/generations/active")]

@pytest.mark.parametrize(("headers", "settings", "comes"), [
    *(({"Origin": origin}, {}, False) for origin in ("http://evil.test", "null", "http://localhost.evil.test")),
    ({"Origin": "http://evil.test", "Sec-Fetch-Site": "none"}, {}, False),
    ({"Sec-Fetch-Site": "cross-site"}, {}, False),  # what an <img> of any page sends
    ({"Origin": "http://localhost:5173"}, {"cors_origin": "https://app.test"}, False),
    ({"Origin": "https://app.test", "Sec-Fetch-Site": "cross-site"}, {"cors_origin": "https://app.test"}, True),
    ({"Origin": "http://localhost:5173", "Sec-Fetch-Site": "same-site"}, {}, True),
    *(({"Sec-Fetch-Site": site}, {}, True) for site in ("same-origin", "same-site", "none")),
    ({"Origin": "http://box.lan:9000", "Host": "box.lan:9000"}, {"host": "box.lan"}, True),  # its own page
    ({"Origin": "http://box.lan:8080", "Host": "box.lan:9000"}, {"host": "box.lan"}, False),
    ({}, {}, True),
])
async def test_no_page_of_another_site_starts_or_watches_a_job(headers, settings, comes, autojump_clock):
    """These routes need no token, and any page can make a browser send such a GET or a plain POST."""
    async with in_memory(**settings) as client:
        for method, path in JOB_WAYS:
            plain = {"Content-Type": "text/plain", **headers}
            answer = await client.open(path, method=method, headers=plain, data=b"{}" if method == "POST" else b"")
            assert answer.status_code == (403 if not comes else 201 if method == "POST" else 200)
            if not comes:
                told = answer.json()
                assert "pages of another site" in told["error"] and "--cors-origin" in told["hint"]
                assert "Access-Control-Allow-Origin" not in answer.headers
        assert bool(client.hub.seen_by(None)) == comes
        assert (await client.get("/health", headers=headers)).status_code == 200, "what starts nothing is for all"

async def test_refusals_come_in_their_order_where_no_token_is_needed(client):
    foreign, asks = {"Origin": "http://evil.test"}, {"Access-Control-Request-Method": "POST"}
    whole, watch = "?scenario=%7B%22name%22:%22x%22%7D", "/api/generation/jobs/j/events"
    for method, path, headers, status in (
        ("GET", watch, {**foreign, "Host": "evil.test"}, 421),
        ("OPTIONS", "/api/v1/generations", {**foreign, **asks}, 204), ("GET", f"{watch}{whole}", foreign, 403),
        ("GET", "/api/v1/generations/nobody", foreign, 403),
         ("GET", f"/api/v1/generations/nobody/events{whole}", {}, 404),
    ):
        assert (await client.open(path, method=method, headers=headers)).status_code == status

async def test_where_no_token_is_needed_a_scenario_is_a_name(client, autojump_clock):
    """In the header, the query or the body; one of one's own is bound beforehand, by whoever may."""
    own = {"name": "own", "run": says("own")}
    text, plain = json.dumps(own), {"Content-Type": "text/plain"}
    watch, make = "/api/generation/jobs/j/events", "/api/v1/generations"
    made = (await client.post(make, json={})).json()["jobId"]
    for answer in (
        await client.get(f"{watch}?scenario={quote(text)}"), await client.get(watch, headers={"X-Aura-Scenario": text}),
        await client.get(f"{make}/{made}/events?scenario={quote(text)}"),
        await client.post(f"{make}?scenario={quote(text)}", data=b"", headers=plain),
        await client.post(make, headers=plain, data=json.dumps({"scenario": own}).encode()),
        await client.post(make, json={"scenario": text}), await client.post(make, json={"scenario": 5}),
        await client.get(f"{watch}?scenario=%7B"),
    ):
        told = answer.json()
        assert answer.status_code == 400 and "a name of the catalogue" in told["error"]
        assert "--scenarios FILE" in told["hint"] and "POST /__aura/next" in told["hint"]
    assert [run.info.run_id for run in client.hub.seen_by(None)] == [made], "nothing was started"
    assert (await client.get(f"{watch}?scenario=dorp")).status_code == 400
    named = await client.get(f"{watch}?scenario=failed")
    assert (named.status_code, named.headers["X-Aura-Scenario"]) == (200, "failed")
    await control(client, "POST", "next", scenario=own, caseId="p")
    bound = (await client.post(make, json={"projectId": "p"})).json()["jobId"]
    assert names_in(await ended(client.hub.find(bound))) == ["own"]
    assert (await triggered(client, scenario=own)).headers["X-Aura-Scenario"] == "own", "with a token, as ever"

APP = {"cors_origin": "https://app.test"}

@pytest.mark.parametrize(("settings", "origin", "readable"), [
    ({}, "http://localhost:5173", True), ({}, "https://localhost", True), ({}, "http://127.0.0.1:3000", True),
    ({}, "http://localhost.evil.test:3000", False), ({}, "http://localhost:3000.evil.test", False),
    ({}, "http://evil.test", False), ({}, "null", False), (APP, "https://app.test", True),
    (APP, "http://app.test", False), (APP, "https://app.test:8443", False), (APP, "http://localhost:3000", False),
    ({"cors_origin": "a.test:8080, https://b.test"}, "http://a.test:8080", True),
    ({"cors_origin": "a.test:8080, https://b.test"}, "https://x.test", False),
    ({"cors_origin": "*"}, "null", True), ({"cors_origin": ""}, "http://localhost:3000", False),
])
async def test_a_page_of_a_known_origin_may_read_every_answer(settings, origin, readable, autojump_clock):
    """Also a 401, which the browser hid for weeks; and what a preflight says needs no token."""
    async with in_memory(**settings) as client:
        await triggered(client, runId="r")
        for path, headers, status in (
            ("/aura/analysis-runs/r/stream", {}, 401), ("/aura/analysis-runs/r/stream", BEARER, 200),
            ("/aura/analysis-runs/none/stream", BEARER, 404), ("/health", {}, 200), ("/nowhere", {}, 404),
        ):
            answer = await client.get(path, headers={"Origin": origin, **headers})
            assert (answer.status_code, answer.headers["Vary"]) == (status, "Origin")
            assert answer.headers.get("Access-Control-Allow-Origin") == (origin if readable else None)
            if readable:
                assert answer.headers["Access-Control-Allow-Credentials"] == "true"
                assert "X-Aura-Attempt" in answer.headers["Access-Control-Expose-Headers"]
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,last-event-id"}
        for path in ("/aura/cases/1/analysis-runs", "/api/aura/cases/1/analysis-runs", "/__aura/reset", "/nowhere"):
            preflight = await client.options(path, headers=asks)
            assert (preflight.status_code, preflight.data) == (204, b"")
            assert preflight.headers.get("Access-Control-Allow-Origin") == (origin if readable else None)
            allowed = set(preflight.headers["Access-Control-Allow-Headers"].split(", "))
            assert {"Authorization", "Last-Event-ID", "X-Tenant-ID", "X-Aura-Scenario"} <= allowed
            assert preflight.headers["Access-Control-Max-Age"] == "3600"
        foreign = await client.options("/aura/cases/1/analysis-runs", headers={**asks, "Host": "evil.test"})
        assert foreign.status_code == 421
        answer = await client.get("/health")
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]

OPEN_ROUTES = {"/", "/health", "/metrics", "/__aura/health"}  # of the contract; and below the two prefixes

async def all_routes():
    """(method, rule) of every route there is."""
    app = aura_stream.create_app(Settings(), aura_stream.BoundedHub(Settings(), None))
    return sorted({(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods - {"OPTIONS"}})

ROUTES = trio.run(all_routes)
OF_JOBS, OF_CONTROL = ("/api/generation/", "/api/v1/generations"), ("/__aura", "/api/admin")
SECRET = "secret-run-of-tenant-1"
ONE, TWO = {**BEARER, "X-Tenant-ID": "1"}, {**BEARER, "X-Tenant-ID": "2"}

def is_open(rule):
    return rule in OPEN_ROUTES or rule.startswith(OF_JOBS)

def path_of(rule, run_id):
    """A path to try: with ids, and with the query that the route needs."""
    path = rule.replace("<run_id>", run_id).replace("<job_id>", run_id).replace("<case_id>", "secret-case")
    path = path.replace("<int:number>", "1").replace("<name>", "ok")
    return path + (f"?runId={run_id}" if path.endswith("analysis/stream") else "")

@contextlib.asynccontextmanager
async def with_a_secret(**settings):
    """The application in memory, with a run and a job of tenant 1 that live."""
    async with in_memory(**settings) as client:
        waiting = {"name": "w", "run": [*says("secret-event"), {"wait": "for-ever"}]}
        await triggered(client, "secret-case", ONE, runId=SECRET, scenario=waiting)
        await client.get(f"/api/generation/jobs/job-{SECRET}/events", headers={"X-Tenant-ID": "1"}, cut=1)
        await trio.testing.wait_all_tasks_blocked()
        yield client

@pytest.mark.parametrize(("method", "rule"), ROUTES)
async def test_no_route_opens_for_a_stranger(method, rule):
    """Without a token, under a foreign name, from a foreign page, through a proxy: nothing is done, nothing is told."""
    tries, token = [({"Host": "evil.test"}, 421)], []
    if rule.startswith(OF_CONTROL) and not is_open(rule):
        tries += [({"Origin": "http://evil.test"}, 403), ({"Origin": "null"}, 403)]
        tries += [({"Via": "1.1 x"}, 403), ({"X-Forwarded-For": "::1"}, 403)]
        token = [({}, 401), (BEARER, 401)]
    elif rule.startswith(OF_JOBS):
        tries += [({"Origin": "http://evil.test"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403)]
    elif not is_open(rule):
        tries += [({}, 401), ({"Authorization": "Basic x"}, 401), ({"X-Tenant-ID": "1"}, 401)]
    await strangers_are_turned_away(method, rule, tries)
    await strangers_are_turned_away(method, rule, token, admin_token="s3cret")

async def strangers_are_turned_away(method, rule, tries, **settings):
    ways = [("", {})] + ([("/api", {}), ("/api", {"X-Tenant-ID": "1"})] if rule.startswith("/aura/") else [])
    async with with_a_secret(**settings) as client:
        for (headers, status), (prefix, tenant) in itertools.product(tries, ways):
            named = {**tenant, **headers}
            expect = 400 if prefix and "X-Tenant-ID" not in named and status != 421 else status
            answer = await client.open(prefix + path_of(rule, SECRET), method=method, headers=named)
            assert answer.status_code == expect, (prefix, headers)
            assert "secret" not in (str(answer.headers) + str(answer.data)).replace("ADMIN_TOKEN", "")
            state = await client.get(f"/aura/cases/1/analysis-runs/{SECRET}", headers={**BEARER, "X-Tenant-ID": "1"})
            assert state.json()["status"] == "running", "nothing was done"

async def test_another_tenant_cannot_tell_even_with_a_scenario_that_needs_no_run(client, autojump_clock):
    for body in ({"runId": "theirs~empty"}, {}):
        await triggered(client, "85~empty", ONE, **body)
    answers = []
    for run_id in ("theirs~empty", "nobody~empty"):
        for query in ("", "?scenario=empty", "?scenario=first-chunk-then-close"):
            answer = await client.get(f"/aura/analysis-runs/{run_id}/stream{query}", headers=TWO)
            told = [answer.headers[name] for name in ("x-aura-attempt", "x-aura-scenario")]
            answers.append((answer.status_code, answer.data, told))
    assert answers[:3] == answers[3:] and {answer[0] for answer in answers} == {200}
    first = await triggered(client, "85~empty", TWO)
    assert first.headers["X-Aura-Attempt"] == "1", "nor how often others have asked about a case"
    await triggered(client, "1", {"X-Tenant-ID": "x" * 300 + "1"}, runId="long")
    longer = {**BEARER, "X-Tenant-ID": "x" * 300 + "2"}
    assert (await client.get("/aura/cases/1/analysis-runs/long", headers=longer)).status_code == 404
    async with in_memory(max_sse_connections=0) as full:
        await triggered(full, runId="theirs", headers=ONE)
        for query, status in (("", 404), ("?scenario=empty", 503)):
            answer = await full.get(f"/aura/analysis-runs/theirs/stream{query}", headers=TWO)
            assert answer.status_code == status
        assert (await full.get("/api/v1/generations/nobody/events")).status_code == 503

@pytest.mark.parametrize(("method", "rule"), [
    (method, rule) for method, rule in ROUTES
    if not rule.startswith(OF_CONTROL) and ("<run_id>" in rule or "<job_id>" in rule or "analysis/stream" in rule)
])
async def test_another_tenant_cannot_tell_a_run_that_is_there_from_one_that_is_not(method, rule):
    """(The job's stream starts what is not there, so there the two differ, as the contract wants.)"""
    starts = rule.startswith("/api/generation/jobs") and method == "GET"
    for secret in (SECRET, f"job-{SECRET}"):
        async with with_a_secret() as client:
            answers = []
            for run_id in [secret] if starts else [secret, "x" * len(secret)]:
                answer = await client.open(path_of(rule, run_id), method=method, headers=TWO)
                headers = {name: text for name, text in answer.headers.items()
                           if name not in ("x-request-id", "x-aura-run-id")}
                answers.append((answer.status_code, answer.data.decode().replace(run_id, "ID"), headers))
            assert answers[0] == answers[-1]
            gone = 204 if rule.startswith("/api/v1/generations") and method == "DELETE" else 404
            assert answers[0][0] == gone

@pytest.mark.parametrize("secret", [SECRET, f"job-{SECRET}"])
async def test_another_tenant_cannot_trigger_what_is_not_its_own(secret):
    async with with_a_secret() as client:
        for path in ("/aura/cases/1/analysis-runs", "/aura/internal/cases/1/analysis-runs",
                     "/aura/cases/1/analysis/trigger"):
            answer = await client.post(path, headers=TWO, json={"runId": secret})
            told = answer.json()
            assert (answer.status_code, told["error"]) == (404, "runId not found or already completed")
            assert "secret-case" not in json.dumps(told) and "0 live" in told["hint"]
            assert "did you mean" not in told["hint"]
        watched = await client.get(f"/api/generation/jobs/{secret}/events", headers={"X-Tenant-ID": "2"})
        assert (watched.status_code, watched.json()["error"]) == (404, "there is no such job")
        for listed in ("active", "_stats"):
            told = (await client.get(f"/api/v1/generations/{listed}", headers={"X-Tenant-ID": "2"})).json()
            assert told.get("total_active", told.get("job_statistics", {}).get("total_jobs")) == 0
        for who, status in ((ONE, 200), (BEARER, 200), (TWO, 404)):
            answer = await client.get(f"/aura/cases/secret-case/analysis-runs/{SECRET}", headers=who)
            assert answer.status_code == status
            listed = (await client.get("/__aura/runs", headers=who)).json()["runs"]
            assert len(listed) == 2, "control sees every tenant's, whoever it says it is"

async def test_a_run_without_a_tenant_is_everybody_s_and_a_case_s_result_its_tenant_s(client, autojump_clock):
    await triggered(client, runId="nobodys")
    assert (await client.get("/aura/cases/1/analysis-runs/nobodys", headers=TWO)).status_code == 200
    await triggered(client, "7", ONE, runId="mine")
    await ended(client.hub.find("mine"))
    for who, status in ((ONE, 200), (BEARER, 200), (TWO, 404)):
        assert (await client.get("/aura/cases/7/analysis", headers=who)).status_code == status

NOT_NUMERIC = b'{"error": "X-Tenant-ID must be numeric (e.g. 1) for Aura API."}'

@pytest.mark.parametrize(("tenant", "status", "body"), [
    (None, 400, b""), ("", 400, b""), ("  ", 400, b""), ("acme", 400, NOT_NUMERIC), ("1.5", 400, NOT_NUMERIC),
    ("\u0661", 400, NOT_NUMERIC), ("1", 200, None),
])
async def test_the_gateway_wants_a_numeric_tenant(client, tenant, status, body, autojump_clock):
    await triggered(client, runId="r")
    named = {} if tenant is None else {"X-Tenant-ID": tenant}
    for path in ("/api/aura/analysis-runs/r/stream", "/api/aura/cases/1/analysis/stream?runId=r",
                 "/api/synapse/analysis-runs/r/stream"):
        answer = await client.get(path, headers={**BEARER, **named})
        assert answer.status_code == status
        assert body is None or answer.data == body
        assert answer.headers["X-Trace-Id"]
        assert answer.headers["X-Gateway-Request-Id"] == answer.headers["X-Request-ID"]
        unauthorized = await client.get(path, headers=named)
        assert unauthorized.status_code == (401 if status == 200 else 400), "the tenant comes first"
    other = await client.get("/api/synapse/other", headers={**BEARER, **named})
    assert other.status_code == (404 if status == 200 else 400)

async def test_the_gateway_is_the_same_server(client, autojump_clock):
    """The same handlers, bytes and runs; trace ids, defaults, and the four headers of a stream whatever its script."""
    through, direct = "/api/synapse/analysis-runs/r/stream", STREAM_OF_R
    gone = dict.fromkeys(("x-accel-buffering", "cache-control", "x-trace-id", "x-gateway-request-id"))
    bare = {"name": "bare", "stream": [{"open": {"headers": {**gone, "content-type": "Text/Event-Stream"}}}]}
    tenant = {**BEARER, "X-Tenant-ID": " 7 ", "X-Trace-ID": "trace-1", "X-User-ID": "u", "X-Agent-ID": "a"}
    accepted = await client.post("/api/aura/cases/1/analysis-runs", headers=tenant, json={"runId": "r"})
    assert accepted.status_code == 202 and accepted.headers["X-Trace-Id"] == "trace-1"
    seen, plain = await client.get(through, headers=tenant), await client.get(direct, headers=BEARER)
    assert seen.data == plain.data and "X-Trace-Id" not in plain.headers
    odd = await client.get(through, headers={**tenant, "X-Aura-Scenario": json.dumps(bare)})
    assert odd.headers.items() >= aura_stream.STREAM_HEAD.items()
    assert odd.headers["x-trace-id"] == "trace-1" and odd.headers["x-gateway-request-id"]
    forged = await client.get(f"/api{direct}", headers={**tenant, "X-Trace-ID": "a b"})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["X-Trace-Id"])
    for elsewhere in ("/api/auth/login", "/api/auth/policy", "/api/auth/idp", "/api/monitoring/visits"):
        assert (await client.get(elsewhere)).status_code == 404
    assert (await client.get("/api/aura/analysis-runs//stream", headers=tenant)).status_code == 400
    first, second, *_ = (await control(client, "GET", "journal?kind=stream"))["entries"]
    assert (first["path"], first["tenantId"]) == (through, "7")
    names = ("x-dwp-source", "x-dwp-caller-type", "x-trace-id")
    assert [first["headers"][name] for name in names] == ["FRONTEND", "USER", "trace-1"]
    assert second["headers"]["x-dwp-source"] is None
    call = (await control(client, "GET", "journal?view=calls&kind=stream"))["entries"][0]
    assert [call[name] for name in ("path", "statusCode", "tenantId", "userId", "agentId")] == [
        through, 200, "7", "u", "a"]

async def test_a_hint_costs_little_whatever_lives_here(client):
    """The closest runId is looked for among few and short ones: the worst cost everybody a second and a half."""
    chance = random.Random(1)
    ids = ["aaa" + "".join(chance.choices("ab", k=196)) for _ in range(500)]
    for run_id in ("analysis-2026-11-21-0001", *ids, *(f"other-{n}" for n in range(100))):
        await triggered(client, runId=run_id, scenario="silent")
    began = time.perf_counter()
    for run_id in ids[:20]:
        await read(client, run_id[:-1])
    assert (time.perf_counter() - began) / 20 < 0.1, "five times the slack"
    for mistyped in ("analysis-2026-11-21-001", "analysys-2026-11-21-0001"):
        hint = (await read(client, mistyped)).json()["hint"]
        assert "did you mean 'analysis-2026-11-21-0001'?" in hint

STREAM_OF_R = "/aura/analysis-runs/r/stream"

@pytest.mark.parametrize(("path", "headers", "status", "why"), [
    ("/health", {"Host": "evil.test"}, 421, "this server does not answer to the name 'evil.test'"),
    (f"/api{STREAM_OF_R}", BEARER, 400, "no tenant"),
    (f"/api{STREAM_OF_R}", {**BEARER, "X-Tenant-ID": "x"}, 400, "X-Tenant-ID must be numeric"),
    (STREAM_OF_R, {}, 401, "Missing authorization header"),
    ("/__aura/runs", {"Via": "x"}, 403, "this is for callers on the server's own machine"),
    ("/api/generation/jobs/j/events", {"Origin": "http://evil.test"}, 403,
     "this needs no token, so it is not for pages of another site"),
    ("/api/generation/jobs/j/events?scenario=%7B%7D", {}, 400,
     "where no token is needed, a scenario is a name of the catalogue"),
    ("/aura/cases/1/analysis/stream", BEARER, 422, "[{'loc': ['query', 'runId'], 'msg': 'the query needs runId="),
    ("/aura/analysis-runs/none/stream", BEARER, 404, "runId not found or already completed"),
    (STREAM_OF_R, TWO, 404, "runId not found or already completed"),
    (STREAM_OF_R, {**BEARER, "Last-Event-ID": "11"}, 204, "finished and fully seen"),
    (STREAM_OF_R, {**BEARER, "X-Aura-Scenario": "nonsense"}, 400, "unknown scenario"),
    (STREAM_OF_R, {**BEARER, "X-Aura-Scenario": "{"}, 422,
     "[{'loc': ['scenario'], 'msg': 'this is not JSON"),
    ("/nowhere", {}, 404, "Not Found: "),
])
async def test_why_a_request_was_refused_is_in_log_and_journal(
        client, path, headers, status, why, autojump_clock, heard):
    await triggered(client, runId="r", headers=ONE)
    await trio.sleep(10)
    answer = await client.get(path, headers=headers)
    assert answer.status_code == status
    heard.wait_for(f"[{answer.headers['X-Request-ID']}] {status} refused: {why}")
    if not path.startswith("/__aura"):
        entry = (await control(client, "GET", "journal"))["entries"][-1]
        assert f"refused: {why}" in entry["said"]
        assert entry["kind"] == "request" or f"refused: {why}" in entry["end"]["reason"]

# ═══ HTTP ═══════════════════════════════════════════════════════════════════════════════════════

async def test_the_triggers_answer_as_written(autojump_clock):
    async with in_memory(instance="i1") as client:
        answer = await triggered(client, runId="test run+1", unknownField=1)
        assert list(answer.json().items()) == [
            ("status", "ACCEPTED"), ("runId", "test run+1"), ("caseId", "85116"),
            ("streamUrl", "/aura/analysis-runs/test%20run%2B1/stream")]
        names = ("X-Aura-Run", "X-Aura-Run-ID", "X-Aura-Instance", "X-Aura-Scenario", "X-Aura-Attempt")
        assert [answer.headers[name] for name in names] == ["started", "test%20run+1", "i1", "ok", "1"]
        body = {"runId": "r", "artifacts": {}}
        answer = await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json=body)
        path = "/aura/cases/1/analysis/stream?runId=r"
        expected = {"accepted": True, "runId": "r", "streamPath": path}
        assert (answer.status_code, answer.json()) == (202, expected)
        assert len(parsed((await client.get(path, headers=BEARER)).data)) == 9

@pytest.mark.parametrize(("body", "expected"), [
    *((body, "[0-9a-f-]{36}") for body in (b"", b"{}", b'{"runId": null}', b'{"runId": ""}', b"  ")),
    (b'{"runId": 7}', "7"), (b'{"runId": "9f1c-x"}', "9f1c-x"), (b'{"runId": 1.5}', r"1\.5"),
    ('{"runId": "한글"}'.encode(), "한글"),
])
async def test_a_run_id_is_taken_as_it_comes_or_minted(client, body, expected, autojump_clock):
    told = (await client.post("/aura/cases/1/analysis-runs", headers=BEARER, data=body)).json()
    assert re.fullmatch(expected, told["runId"])
    answer = await client.get(told["streamUrl"], headers=BEARER)
    assert answer.status_code == 200 and answer.headers["X-Aura-Run-ID"].isascii()

async def test_the_same_run_id_is_the_same_run_until_its_window_is_over(client, autojump_clock):
    first, again = await triggered(client, runId="r"), await triggered(client, runId="r")
    assert (first.headers["X-Aura-Run"], again.headers["X-Aura-Run"]) == ("started", "known")
    assert first.json() == again.json() and again.headers["X-Aura-Attempt"] == "2"
    run = await ended(client.hub.find("r"))
    for seconds, expected in ((9, "known"), (2, "started")):
        await trio.sleep(seconds)
        assert (await triggered(client, runId="r")).headers["X-Aura-Run"] == expected
    assert client.hub.find("r") is not run and len(parsed((await read(client, "r")).data)) == 11

async def test_an_inline_scenario_runs_and_serves(client, autojump_clock):
    steps = [{"repeat": 3, "steps": [{"event": {"event": "turn", "data": {"n": "{n}", "run": "{runId}"}}}]}]
    mine = {"name": "mine", "run": steps, "stream": [{"comment": "hi"}, {"relay": "all"}]}
    assert (await triggered(client, runId="r", scenario=mine)).headers["X-Aura-Scenario"] == "mine"
    data = (await read(client, "r")).data
    assert data.startswith(b": hi\n\n")
    assert [json.loads(text) for _, _, text in parsed(data)] == [{"n": str(n), "run": "r"} for n in (1, 2, 3)]

async def test_the_stream_has_its_headers_and_its_bytes_and_outlives_quart_s_time_out(client, autojump_clock):
    client.app.config["RESPONSE_TIMEOUT"] = 0.2
    await triggered(client, runId="r")
    for attempt, path in enumerate((STREAM_OF_R, "/aura/cases/any/analysis/stream?runId=r"), 1):
        answer = await client.get(path, headers=BEARER)
        assert list(answer.headers.items())[:4] == [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache, no-store, no-transform"),
            ("connection", "keep-alive"), ("x-accel-buffering", "no")]
        assert answer.headers["X-Aura-Attempt"] == str(attempt)
        assert (answer.data[:13], answer.data[-14:]) == (HELLO, DONE)
        assert [int(number) for number, _, _ in parsed(answer.data)] == list(range(1, 12))

async def test_post_sse_is_trigger_and_stream_in_one(client, autojump_clock):
    async def post(run_id, headers=BEARER, **more):
        path = "/aura/cases/85116/analysis/trigger"
        answer = await client.post(path, headers=headers, json={"runId": run_id, **more})
        return answer.status_code, answer.headers.get("X-Aura-Attempt"), answer.data

    status, attempt, data = await post("r")
    again = await read(client, "r")
    assert (status, attempt, again.headers["X-Aura-Attempt"], data) == (200, "1", "2", again.data)
    assert await post("r") == (200, "3", data), "a known run is watched"
    assert (await post("r", {**BEARER, "Last-Event-ID": "11"}))[::2] == (204, b"")
    assert (await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, data=b"[]")).status_code == 422
    assert [(await post("a", scenario="unavailable"))[:2] for _ in range(2)] == [(503, "1"), (200, "2")]
    status, _, _ = await post("b", scenario="trigger-503")
    assert (status, client.hub.find("b")) == (503, None), "it is refused as the trigger would be"
    entries = (await control(client, "GET", "journal"))["entries"]
    assert [one["kind"] for one in entries] == ["stream"] * 8
    found = metrics_of((await client.get("/metrics")).data.decode())
    assert found[("sse_connections_total",)] == 6, "neither the 204 nor a refused body or trigger is a stream"

@pytest.mark.parametrize(("path", "expected"), [
    ("/aura/cases/1/analysis-runs", {"status": "disabled", "message": "Analysis disabled (DEMO_OFF)"}),
    ("/aura/internal/cases/1/analysis-runs",
     {"accepted": False, "runId": "r", "message": "Analysis disabled (DEMO_OFF)"}),
    ("/aura/cases/1/analysis/trigger", {"status": "disabled", "message": "Analysis disabled (DEMO_OFF)"}),
])
async def test_demo_off_starts_nothing(path, expected):
    async with in_memory(demo_off=True) as client:
        answer = await client.post(path, headers=BEARER, json={"runId": "r"})
        assert (answer.status_code, json.loads(answer.data)) == (200, expected)
        assert client.hub.live == 0

async def test_finished_and_fully_seen_is_a_204(client, autojump_clock):
    await triggered(client, runId="r")
    await read(client, "r")
    for query, headers, first in (
        ("", {"Last-Event-ID": "11"}, None), ("?lastEventId=r_11", {}, None), ("?last-event-id=11", {}, None),
        ("", {"Last-Event-ID": "9"}, "10"), ("?lastEventId=9", {}, "10"), ("", {"Last-Event-ID": "12"}, "1"),
        ("?lastEventId=9", {"Last-Event-ID": "10"}, "11"), ("", {"Last-Event-ID": "x"}, "1"),
    ):
        answer = await client.get(STREAM_OF_R + query, headers={**BEARER, **headers})
        assert answer.status_code == (200 if first else 204)
        assert [id for id, _, _ in parsed(answer.data)][:1] == ([first] if first else [])

@pytest.mark.parametrize(("scenario", "statuses"), [
    ("ok", [200, 204, 204, 204]), ("korean", [200, 204, 204, 204]), ("expired-run", [200, 404, 404, 404]),
    ("other-worker", [200, 404, 200, 404]), ("unavailable", [503, 200, 204, 204]),
    ("refuse-3-then-ok", [503, 503, 503, 200, 204]),
    ("gone-204", [204, 204]), ("no-done", [200, 200, 200]), ("generation", [200, 204, 204]),
    ({"name": "third", "stream": [["open", "end"], [{"open": {"status": 500}}], [{"comment": "third"}]]},
     [200, 500, 200, 200]),
])
async def test_a_script_plays_also_to_whoever_has_seen_everything(client, scenario, statuses, autojump_clock):
    """The 204 stands in place of an ordinary stream only: one that is implied, or that an exhausted list repeats."""
    await triggered(client, runId="r", scenario=scenario)
    await ended(client.hub.find("r"))
    last = {"Last-Event-ID": str(client.hub.find("r").log.last)}
    found = [(await read(client, "r", **(last if number else {}))).status_code for number in range(len(statuses))]
    assert found == statuses

async def test_an_unknown_run_is_a_404_that_helps(autojump_clock, heard):
    async with in_memory(instance="i1", retention=100) as client:
        run = await run_of(client, {"sleep": 250}, run_id="test-run-001")
        answer = await read(client, "test-run-002")
        assert (answer.status_code, answer.json()["error"]) == (404, "runId not found or already completed")
        assert answer.json()["hint"] == "no such run on instance i1, where 1 live; did you mean 'test-run-001'?"
        await ended(run)
        await trio.sleep(101)
        assert "was forgotten by instance i1" in (await read(client, "test-run-001")).json()["hint"]
        empty = await read(client, "")
        assert (empty.status_code, empty.json()) == (400, {"error": "runId is required", "runId": None})
        assert (await client.get("/aura/cases/1/analysis/stream?runId=", headers=BEARER)).status_code == 400
        missing = await client.get("/aura/cases/1/analysis/stream", headers=BEARER)
        assert (missing.status_code, missing.json()["detail"][0]["loc"]) == (422, ["query", "runId"])
    heard.wait_for("INFO analysis_run_stream: runId not found or already completed run_id=test-run-002")
    async with in_memory(unknown_run="200") as old:
        answer = await read(old, "none")
        assert (answer.status_code, answer.json()["error"]) == (200, "runId not found or already completed")

async def test_a_run_has_a_state_can_be_cancelled_and_leaves_a_result(client, autojump_clock):
    state_url, result_url = "/aura/cases/85116/analysis-runs/r", "/aura/cases/85116/analysis"
    await run_of(client, *says("a"), {"sleep": 250})
    state = (await client.get(state_url, headers=BEARER)).json()
    assert set(state) == {"runId", "caseId", "phase", "status", "events", "viewers", "startedAt", "endedAt"}
    assert (state["status"], state["events"], state["phase"], state["endedAt"]) == ("running", 1, "phase2", None)
    assert (await client.get(result_url, headers=BEARER)).status_code == 404
    cancelled = await client.delete(state_url, headers=BEARER)
    assert (cancelled.status_code, cancelled.json()) == (202, {"status": "CANCELLED", "runId": "r"})
    data = (await read(client, "r")).data
    assert json.loads(parsed(data)[-1][2])["stage"] == "cancelled" and data.endswith(DONE)
    again = await client.delete(state_url, headers=BEARER)
    assert (again.status_code, again.json()) == (200, {"status": "cancelled", "runId": "r"})
    await triggered(client, runId="r2")
    streamed = {name: json.loads(text) for _, name, text in parsed((await read(client, "r2")).data)}
    result = (await client.get(result_url, headers=BEARER)).json()
    last = streamed["completed"]
    assert result.pop("proposals")[-1] == streamed["proposal"]
    assert result == {
        "caseId": "85116", "reasonText": last["summary"], "confidenceBreakdown": streamed["confidence"],
        "ragRefs": [], "similarCases": [], "score": last["score"], "severity": "MEDIUM"}
    await client.post("/aura/internal/cases/7/analysis-runs", headers=BEARER, json={"runId": "p3"})
    await read(client, "p3")
    result = (await client.get("/aura/cases/7/analysis", headers=BEARER)).json()
    nothing = ("reasonText", "confidenceBreakdown", "score", "severity", "proposals")
    assert [result[key] for key in nothing] == [None] * 5, "phase3 has none"

@pytest.mark.parametrize("data", ["{not json", "text", "5", [1], None, {"summary": "ok"}])
async def test_a_result_is_read_whatever_the_script_called_completed(client, data, autojump_clock):
    await ended(await run_of(client, {"event": {"event": "completed", "data": data}}))
    answer = await client.get("/aura/cases/85116/analysis", headers=BEARER)
    assert (answer.status_code, answer.json()["reasonText"]) == (200, "ok" if isinstance(data, dict) else None)

async def test_a_cancel_that_races_with_the_end_agrees_with_the_log(client, autojump_clock):
    for turns in range(12):
        run = await run_of(client, {"sleep": 0.1}, {"event": {"event": "completed", "data": {}}}, run_id=str(turns))
        await trio.sleep(0.1)
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        answer = await client.delete(f"/aura/cases/1/analysis-runs/{turns}", headers=BEARER)
        await ended(run)
        assert (run.status == "cancelled") == (names_in(run)[-1] == "failed") and answer.status_code in (200, 202)
        assert names_in(run).count("completed") + (run.status == "cancelled") == 1

async def test_live_runs_have_a_limit(autojump_clock):
    async with in_memory(max_live_runs=1) as client:
        await triggered(client, runId="r")
        answer = await client.post("/aura/cases/1/analysis-runs", headers=BEARER, json={"runId": "r2"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "the limit is 1" in answer.json()["error"]
        assert (await triggered(client, runId="r")).headers["X-Aura-Run"] == "known"

async def test_health_and_front_answer_json():
    async with in_memory(instance="i1") as client:
        health = (await client.get("/health")).json()
        assert set(health) == {"status", "instance", "version", "runs", "sse_connections", "uptime"}
        assert (health["status"], health["instance"], health["runs"]) == ("healthy", "i1", 0)
        assert 0 <= health["uptime"] < WAIT
        assert (await client.get("/api/generation/health")).json()["sse_connections"] == 0
        front = (await client.get("/", headers={"Accept": "*/*"})).json()
        assert set(front) == {"message", "version", "status"} and front["status"] == "operational"

async def test_head_and_options_open_no_delivery(client, autojump_clock):
    await triggered(client, runId="r")
    for path in (STREAM_OF_R, "/aura/cases/1/analysis/stream?runId=r"):
        head = await client.head(path, headers=BEARER)
        assert (head.status_code, head.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert (await client.options(path)).status_code == 200
    assert (await read(client, "r")).headers["X-Aura-Attempt"] == "1"

@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_X", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_every_answer_has_a_request_id_and_a_wrong_path_or_method_is_json(client, given, kept):
    for path in ("/health", "/nowhere", "/aura/analysis-runs/none/stream"):
        found = (await client.get(path, headers={**BEARER, "X-Request-ID": given})).headers["X-Request-ID"]
        assert found == given if kept else re.fullmatch("[0-9a-f]{32}", found)
    assert "error" in (await client.get("/nowhere")).json()
    wrong = await client.put("/health")
    assert (wrong.status_code, "GET" in wrong.headers["Allow"], "error" in wrong.json()) == (405, True, True)

async def test_the_log_tells_the_story_of_a_stream(client, autojump_clock, heard):
    await triggered(client, runId="r")
    await client.get("/aura/cases/85116/analysis/stream?runId=r", headers={**BEARER, "Last-Event-ID": "1"})
    await client.get("/nowhere%0AINFO%20forged%E2%80%A8" + "x" * 1000)
    lines = heard.all()
    assert "GET /nowhere\\nINFO forged\\u2028xxx" in lines
    assert "x" * 199 not in lines, "it can forge no line, nor fill many"
    assert "INFO case_analysis_stream: start consuming run_id=r case_id=85116\n" in lines
    assert "INFO SSE connection established (client reconnected) run_id=r last_event_id=1\n" in lines
    assert "INFO case_analysis_stream: first chunk sent run_id=r\n" in lines
    assert re.search(
        r"INFO case_analysis_stream: stream closed run_id=r by=server how=end reason=the script ended"
        r" bytes=\d+ events=10 last_event_id=11 duration=\d+\.\d{3}s\n", lines
    )
    assert re.search(
        r"INFO \[[0-9a-f]{32}\] GET /aura/cases/85116/analysis/stream - Status: 200 - Duration: \d\.\d{3}s", lines)

# ═══ Operations ═════════════════════════════════════════════════════════════════════════════════

async def test_control_tells_what_there_is(autojump_clock):
    async with in_memory(instance="i1", speed="20") as client:
        health = await control(client, "GET", "health")
        about = {"status": "ok", "version": aura_stream.__version__, "pid": os.getpid(), "instance": "i1"}
        assert health.items() >= about.items() and health["clock"] == {"mode": "x20", "now": 0}
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

async def test_emit_and_signal_reach_a_run_that_is_there_and_only_that(autojump_clock):
    async with in_memory(max_gates=2) as client:
        for _ in range(3):
            assert (await control(client, "POST", "signal", 404, gate="go", runId="7"))["runId"] == "7"
        run = await run_of(client, {"wait": "go"}, *says("b"), run_id=7)
        run = client.hub.find("7")
        await control(client, "POST", "emit", runId=7, event="a", data={"n": "a"})
        assert await control(client, "POST", "signal", gate="other", runId=None) == {"open": "other", "runId": None}
        assert not run.ended
        assert await control(client, "POST", "signal", gate="go", runId=7) == {"open": "go", "runId": "7"}
        assert names_in(await ended(run)) == ["a", "b"]
        assert await control(client, "POST", "signal", gate="go", runId="7"), "a run that has ended is there"
        gone = await control(client, "POST", "emit", 409, runId="7", event="a", data=1)
        assert gone["error"] == "this run has ended (completed), nobody listens any more"
        await control(client, "POST", "emit", 404, runId="nobody", event="a", data=1)
        bad = await control(client, "POST", "emit", 422, runId="7", event="a\nb", data=1)
        assert "one line" in bad["detail"][0]["msg"]

async def test_an_analysis_of_one_s_own_takes_the_place_of_the_ordinary_one(autojump_clock):
    async def analyse(facts, sending):
        await sending.send(Event("mine", {"case": facts.case_id}))

    async with in_memory(analysis=analyse) as client:
        for run_id, name, names in (("a", "ok", ["mine"]), ("b", "slow-first", ["mine"]), ("d", "drop", ["mine"]),
                                    ("c", "missing-started", FOUR[1:])):
            await triggered(client, runId=run_id, scenario=name)
            assert names_in(await ended(client.hub.find(run_id))) == names
        await client.post("/aura/internal/cases/1/analysis-runs", headers=BEARER, json={"runId": "p3"})
        assert said(await ended(client.hub.find("p3"))) == [("mine", {"case": "1"})]

KEYS = (
    "method path client seq kind runId caseId testId attempt scenario seed httpVersion tenantId userId agentId headers"
    " lastEventId resumedAfter status chunks bytes events heartbeats lastIdSent wall t latency end said"
)

async def test_the_journal_can_be_asked_for_what_one_wants(client, autojump_clock):
    for run_id, test_id in (("a", "t1"), ("b", "t2")):
        named = {"X-Test-Id": test_id, "X-Tenant-ID": "5", "X-User-ID": "u"}
        await triggered(client, "1", named, runId=run_id)
        seen_by = {"X-Test-Id": test_id, "Accept": "text/event-stream", "Last-Event-ID": "nonsense"}
        await client.get(f"/aura/analysis-runs/{run_id}/stream?access_token=secret", headers=seen_by)
    await client.get("/health")
    await client.options("/aura/analysis-runs/a/stream")

    async def kinds(query):
        entries = (await control(client, "GET", f"journal?{query}"))["entries"]
        return [(one["kind"], one["runId"]) for one in entries]

    of_a, of_b = [("trigger", "a"), ("stream", "a")], [("trigger", "b"), ("stream", "b")]
    assert await kinds("") == [*of_a, *of_b, ("request", None)]
    assert await kinds("runId=a") == await kinds("testId=t1") == of_a
    assert await kinds("kind=stream&since=2") == await kinds("testId=t2&kind=stream") == [("stream", "b")]
    assert await kinds("kind=stream&count=1") == [("stream", "a")], "the oldest of them"
    whole = await client.get("/__aura/journal")
    assert b"secret" not in whole.data and b"test-token" not in whole.data
    trigger, one, *_ = whole.json()["entries"]
    assert set(one) == set(KEYS.split())
    assert set(one["t"]) == {"open", "firstByte", "end"} and set(one["end"]) == {"by", "how", "reason", "step"}
    assert (one["lastEventId"], one["resumedAfter"]) == ("nonsense", 0) and "from the start" in one["said"]
    assert one["headers"]["accept"] == "text/event-stream"
    assert [each["headers"]["authorization"] for each in (trigger, one)] == ["present", None]
    assert (one["caseId"], one["status"], one["events"], one["attempt"], one["seed"]) == ("1", 200, 11, 1, "ok")
    (call, *_) = (await control(client, "GET", "journal?view=calls&kind=trigger"))["entries"]
    assert set(call) == {"path", "statusCode", "latency", "tenantId", "userId", "agentId", "end"}
    assert (call["path"], call["statusCode"], call["tenantId"]) == ("/aura/cases/1/analysis-runs", 202, "5")

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
])
async def test_control_answers_a_mistake_with_a_sentence(client, method, path, body, status, sentence):
    answer = await client.open(f"/__aura/{path}", method=method, **({} if body is None else {"json": body}))
    assert answer.status_code == status
    assert sentence in json.dumps(answer.json()).replace('\\\\\\"', '"').replace('\\"', '"')

async def test_what_control_is_asked_is_not_journaled_however_it_is_written(client):
    for path in ("/__aura/runs", "//__aura/runs", "///__aura/nothing"):
        await client.get(path)
        assert (await client.get(path, headers={"Via": "x"})).status_code == 403
    assert (await client.get("//aura/cases/1/analysis")).status_code == 401
    assert (await client.get("//api/aura/cases/1/analysis")).status_code == 400
    paths = [one["path"] for one in (await control(client, "GET", "journal"))["entries"]]
    assert paths == ["/aura/cases/1/analysis", "/api/aura/cases/1/analysis"]

MAKE = "/api/v1/generations"
JOB_NAMES = [*["progress"] * 3, "preview", *["progress"] * 2, "preview", *["progress"] * 2, "completed"]

async def test_a_job_is_made_watched_and_listed(client, autojump_clock, heard):
    asked = {"projectId": 12, "description": "연말 보고서 {n}", "tone": "dry"}
    made = await client.post(MAKE, json=asked)
    told = made.json()
    job_id = told["jobId"]
    here = f"{MAKE}/{job_id}"
    assert made.status_code == 201 and re.fullmatch("job_[0-9a-f]{16}", job_id)
    assert told.pop("estimatedDuration") and told == {
        "jobId": job_id, "status": "queued", "sseUrl": f"http://localhost{here}/events",
        "cancelUrl": f"http://localhost{here}", "projectId": 12, "title": "연말 보고서 {n}"}
    state = (await client.get(here)).json()
    assert set(state) == {"jobId", "status", "progress", "createdAt"}
    assert (state["status"], state["progress"]) in [("queued", 0), ("streaming", 10)]
    assert (await client.get(f"{MAKE}/active")).json()["total_active"] == 1
    await trio.sleep(4.5)
    for _ in range(2):  # the second time a preview has come
        state = (await client.get(here)).json()
        assert (state["status"], state["progress"]) == ("streaming", 40)
        await trio.sleep(2)
    began = trio.current_time()
    data = (await client.get(f"{here}/events")).data
    assert trio.current_time() - began == pytest.approx(18 - 8.5), "2 s a step"
    assert b"[DONE]" not in data, "its own front end parses every message"
    events = parsed(data)
    assert [(id, name) for id, name, _ in events] == [(f"{job_id}_{n}", name) for n, name in enumerate(JOB_NAMES, 1)]
    progress, preview, done = (json.loads(events[at][2]) for at in (0, 3, -1))
    assert set(progress) == {"type", "jobId", "value", "currentStep", "estimatedTime", "metadata"}
    assert set(preview) == {"type", "jobId", "markdown", "isPartial", "wordCount", "estimatedTokens"}
    assert progress["value"] == 10 and preview["isPartial"] and "연말 보고서 {n}" in preview["markdown"]
    assert done["jobId"] == job_id and set(done["result"]) == {"markdown", "tokens"}
    assert (await client.get(here)).json()["status"] == "completed"
    resumed = await client.get(f"{here}/events", headers={"Last-Event-ID": f"{job_id}_8"})
    assert [id for id, _, _ in parsed(resumed.data)] == [f"{job_id}_9", f"{job_id}_10"]
    assert (await client.get(f"{here}/events", headers={"Last-Event-ID": f"{job_id}_10"})).status_code == 204
    heard.wait_for(f"INFO analysis_run_stream: start consuming run_id={job_id}", within=0)
    assert f"case_id={job_id}" not in heard.all()

async def test_a_job_is_cancelled_and_counted(client, autojump_clock):
    await client.get("/api/generation/jobs/whole/events")
    other = (await client.post(MAKE, json={})).json()["jobId"]
    for _ in range(2):  # again is harmless
        assert (await client.delete(f"{MAKE}/{other}")).status_code == 204
    *_, (_, name, data) = parsed((await client.get(f"{MAKE}/{other}/events")).data)
    why = {"code": "ANALYSIS_CANCELLED", "message": "the job was cancelled by a DELETE", "retryable": False}
    assert (name, json.loads(data)) == ("failed", {"type": "failed", "jobId": other, "error": why})
    assert (await client.get(f"{MAKE}/_stats")).json()["job_statistics"] == {
        "total_jobs": 2, "queued": 0, "streaming": 0, "completed": 1, "failed": 0, "canceled": 1,
        "active_connections": 0}
    for path in ("", "/events"):
        gone = await client.get(f"{MAKE}/nobody{path}")
        assert (gone.status_code, gone.json()["jobId"]) == (404, "nobody")
    gone = await client.delete(f"{MAKE}/nobody")
    assert (gone.status_code, gone.data) == (204, b""), "as its caller wants it"
    wrong = await client.post(MAKE, json={"description": 5})
    assert (wrong.status_code, wrong.json()["detail"][0]["loc"]) == (422, ["body", "description"])

async def test_whoever_watches_an_unknown_job_starts_it(autojump_clock):
    """The runbook streams `test-job-id` without creating it; a run of another kind is not a job."""
    async with in_memory(heartbeat=1) as client:
        watch = "/api/generation/jobs/test-job-id/events"
        assert (await client.head(watch)).status_code == 404 and client.hub.live == 0
        watched = await client.get(watch)
        assert watched.status_code == 200 and watched.headers.items() >= aura_stream.STREAM_HEAD.items()
        assert watched.data.startswith(HELLO) and b"\n: heartbeat" not in watched.data
        events = parsed(watched.data)
        beats = [json.loads(text) for _, name, text in events if name == "heartbeat"]
        assert len(beats) >= 9 and set(beats[0]) == {"type", "timestamp", "server_time", "jobId"}
        assert beats[0]["jobId"] == "test-job-id" and type(beats[0]["server_time"]) is int
        assert abs(beats[0]["server_time"] - time.time()) < WAIT
        assert [name for _, name, _ in events].count("progress") == 7
        await triggered(client, runId="r", scenario="stepped")
        for job_id, status in (("r", 404), ("bad\nid", 422), ("x" * 201, 422)):
            refused = await client.get(f"/api/generation/jobs/{quote(job_id)}/events")
            assert refused.status_code == status
        assert (await client.get(f"{MAKE}/r")).status_code == 404
        assert (await client.delete(f"{MAKE}/r")).status_code == 204
        assert client.hub.live == 1, "it is no job, and goes on"
        scripted = await client.get("/api/generation/jobs/j~failed/events")
        assert json.loads(parsed(scripted.data)[-1][2])["error"]["message"] == "the model refused the prompt"

async def test_without_ids_a_job_has_none_and_without_an_interval_it_never_beats(autojump_clock):
    async with in_memory(event_ids=False, heartbeat=0, retry_ms=7, event_delay=4.5) as client:
        for job, seconds in (("j", 9 * 60), ("j~expired-run", 9 * 60)):
            began = trio.current_time()
            data = (await client.get(f"/api/generation/jobs/{job}/events")).data
            assert b"id: " not in data and b"heartbeat" not in data and data.startswith(HELLO)
            assert (b"retry: 7\n\n" in data) == (job == "j")
            assert trio.current_time() - began == pytest.approx(seconds)

@pytest.mark.parametrize(("name", "form"), [
    *((name, "{job}_{n}") for name in (
        "generation", "ok", "failed", "drop", "drop-resume", "reset", "expired-run", "crlf", "cr-only", "dribble",
        "double-wrapped", "resume-gap", "duplicate-events", "out-of-order", "bad-json", "fallback-completed",
        "retry-field", "two-subscribers")),
    ("gateway-ids", "gw-{n}"), ("resume-unknown-id", "opaque:{n}"),
])
def test_a_job_s_ids_have_its_form_in_every_scenario(name, form, jumping):
    """Unless the scenario's own `frame` has another id."""
    job, seen = f"job{time.monotonic_ns()}~{name}", []
    for _ in range(2):  # some say more to whoever comes back
        last = {"Last-Event-ID": seen[-1]} if seen else {}
        asked = get(f"/api/generation/jobs/{job}/events", headers={"Connection": "close", **last})
        with connect(jumping, asked) as wire:
            found = re.findall(rb"(?:^|[\r\n])(?:data:)?id: ([^\r\n]+)[\r\n]", Seen(wire).body)
        seen += [text.decode() for text in found]
    numbers = [int(re.search(r"\d+$", text)[0]) for text in seen]
    assert seen == [form.format(job=job, n=n) for n in numbers] and len(seen) >= 2

SECURE, ALLOWED = {"X-Forwarded-Proto": "https"}, {"allow_host": "app.test"}

@pytest.mark.parametrize(("headers", "peer", "settings", "base"), [
    ({"Host": "localhost:9000"}, "127.0.0.1", {}, "http://localhost:9000"),
    ({"Host": "[::1]:9000"}, "::1", {}, "http://[::1]:9000"),
    (SECURE, "127.0.0.1", {}, "https://localhost"),  # nginx that passes Host on
    ({"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "app.test, b"}, "127.0.0.1", ALLOWED, "https://app.test"),
    (SECURE | {"X-Forwarded-Host": "app.test:8443"}, "::1", ALLOWED, "https://app.test:8443"),
    (SECURE | {"X-Forwarded-Host": "evil.test"}, "127.0.0.1", {}, "http://localhost"),
    (SECURE | {"X-Forwarded-Host": "app.test"}, "10.0.0.9", ALLOWED, "http://localhost"),
    ({"X-Forwarded-Host": "any.test"}, "127.0.0.1", {"host": "0.0.0.0"}, "http://any.test"),
])
async def test_a_job_s_urls_are_whole_and_lead_the_way_its_caller_came(headers, peer, settings, base):
    """(Its front end calls `new URL`.) A proxy on this machine may say which way that was, if it names one of ours."""
    async with in_memory(**settings) as client:
        client.peer = peer
        told = (await client.post(MAKE, json={}, headers=headers)).json()
        url = f"{base}/api/v1/generations/{told['jobId']}"
        assert (told["sseUrl"], told["cancelUrl"]) == (f"{url}/events", url)

@pytest.mark.parametrize(("settings", "status"), [({"demo_off": True}, 200), ({"max_live_runs": 0}, 503)])
async def test_a_job_that_may_not_start_is_refused(settings, status):
    async with in_memory(**settings) as client:
        for answer in (await client.get("/api/generation/jobs/j/events"), await client.post(MAKE, json={})):
            assert (answer.status_code, client.hub.live) == (status, 0)
            assert answer.json().get("status") == "disabled" or answer.headers["Retry-After"] == "5"
    async with in_memory() as client:
        refused = await client.get("/api/generation/jobs/j~trigger-503/events")
        assert (refused.status_code, client.hub.live) == (503, 0)

async def test_the_streams_open_at_once_have_a_limit(autojump_clock, heard):
    """A client gets 503 and its own time to come back; an EventSource, which a 503 would end, a stream that says so: it
    asks for an event stream and sends no token, in a browser (`Sec-Fetch-Mode`) or in Node (without)."""
    in_node, with_token = {"Accept": "text/event-stream"}, f"{STREAM_OF_R}?access_token=t"
    native, full = {**in_node, "Sec-Fetch-Mode": "cors"}, "too many open streams, the limit is 2"
    async with in_memory(max_sse_connections=2) as client:
        await run_of(client, *says("a"), {"wait": "go"})
        await triggered(client, runId="theirs", headers=ONE)
        async with meanwhile(*(read(client, "r") for _ in range(10))) as answers:
            assert (len(answers), client.hub.streams) == (8, 2), "asked at once, exactly two are in"
            waits = {int(answer.headers["Retry-After"]) for answer in answers}
            assert {answer.status_code for answer in answers} == {503} and waits <= set(range(1, 11)) and len(waits) > 1
            assert answers[0].json() == {"error": "too many open streams", "limit": 2}
            assert (await read(client, "r", **native, Authorization="")).status_code == 401, "first the token"
            softly = [await client.get(with_token, headers=one) for one in 5 * [native, in_node]]
            assert {(answer.status_code, answer.headers["Content-Type"]) for answer in softly} == {
                (200, "text/event-stream; charset=utf-8")}
            texts = [re.fullmatch(rb"retry: (\d+)\n\n: %b\n\n" % full.encode(), answer.data)[1] for answer in softly]
            assert all(1000 <= int(text) <= 10_000 for text in texts) and len(set(texts)) > 1
            for path, headers, status in (
                ("/api/generation/jobs/j/events", native, 200), ("/api/generation/jobs/j/events", {}, 503),
                (with_token, {**native, **BEARER}, 503), (with_token, {**in_node, **BEARER}, 503),
                (with_token, {"Sec-Fetch-Mode": "cors"}, 503),  # who can read a status
                ("/aura/analysis-runs/none/stream", BEARER, 503), ("/aura/analysis-runs/theirs/stream", TWO, 404),
                (STREAM_OF_R, {**BEARER, "X-Aura-Scenario": "nonsense"}, 400),
                ("/aura/analysis-runs/none/stream", {}, 401),
            ):
                assert (await client.get(path, headers=headers)).status_code == status, "refusals have their order"
            posted = await client.post("/aura/cases/1/analysis/trigger", headers=BEARER, json={"runId": "p"})
            assert (posted.status_code, client.hub.find("p"), client.hub.find("j")) == (503, None, None)
            assert (await client.head(STREAM_OF_R, headers=BEARER)).status_code == 200
            heard.wait_for(full)
            entries = (await control(client, "GET", "journal?kind=stream"))["entries"]
            assert sum(full in one["said"] for one in entries) == 8 + 10 + 6 + 1
            await control(client, "POST", "signal", gate="go")
        assert client.hub.streams == 0 and (await read(client, "r")).status_code == 200

async def test_an_operator_ends_or_drops_every_stream_and_the_runs_go_on(client, autojump_clock):
    await run_of(client, *says("a"), {"wait": "go"})
    for path, told in (("sse/restart", "closed"), ("sse/broadcast-reconnect", "notified")):
        async with meanwhile(*(read(client, "r") for _ in range(5))) as found:
            assert (await client.post(f"/api/admin/{path}")).json() == {told: 5}
        form = rb": connected\n\nevent: a\ndata: .*\nid: 1\n\nretry: (\d+)\n\n"
        ends = [int(re.fullmatch(form, one.data)[1]) for one in found]
        assert all(1000 <= ms <= 5000 for ms in ends), "in memory there is nothing to drop, and it ends"
        assert ends == [1000] * 5 if "restart" in path else len(set(ends)) > 1
    assert (await client.post("/api/admin/connections/reset")).json() == {"dropped": 0}
    assert client.hub.live == 1
    busy = [{"open": {"status": 503, "body": "busy"}}, {"sleep": 1000}]
    slow = {"name": "t", "trigger": [{"sleep": 1000}]}
    async with meanwhile(read(client, "r", busy)) as refusals, meanwhile(triggered(client, scenario=slow)) as accepted:
        notified = (await client.post("/api/admin/sse/broadcast-reconnect")).json()
        assert notified == {"notified": 1}, "a trigger's answer is no stream"
        await trio.testing.wait_all_tasks_blocked()
        assert (await control(client, "DELETE", "connections"))["closed"] == 1
    assert (refusals[0].status_code, b"retry" in refusals[0].data) == (503, False)
    assert accepted[0].json()["status"] == "ACCEPTED", "in full"
    entries = (await control(client, "GET", "journal?kind=stream"))["entries"]
    ends = {tuple(one["end"][key] for key in ("by", "how", "reason")) for one in entries}
    assert ends == {("admin", "end", "closed by an operator")}

@pytest.mark.parametrize(("steps", "last"), [
    ([{"raw": "id: 1\nevent: step\ndata: {\"half"}], b'data: {"half'), ([{"raw": "data: whole\r\n\r\n"}], None),
    ([{"raw": "data: whole\r\r"}], None), ([{"chunk": 3}, {"comment": "whole"}], None),
    ([{"chunk": 1}, {"comment": "whole"}], None), ([{"raw": {"hex": "efbbbf"}}, {"comment": "whole"}], None),
    ([{"open": {"status": 204}}], b""), ([{"buffer": "all"}, {"comment": "whole"}], None), (["open"], b""),
    ([{"open": {"headers": {"content-type": "application/json"}, "body": {}}}], b"{}"),
])
async def test_a_last_word_does_not_complete_half_an_event(client, steps, last, autojump_clock):
    """A client would take it for whole, and resume behind it."""
    await run_of(client, "hang")
    async with meanwhile(viewed(client, [*steps, {"sleep": 100}])) as found:
        assert (await client.post("/api/admin/sse/broadcast-reconnect")).json() == {"notified": 1}
    data = found[0].data
    assert re.search(rb"\nretry: \d{4}\n\n$", data.replace(b"\r", b"\n")) if last is None else data.endswith(last)

METRICS = {
    "sse_connections_open": "gauge", "sse_connections_total": "counter", "sse_reconnect_count": "gauge",
    "sse_message_sent_total": "counter", "sse_bytes_sent_total": "counter", "sse_heartbeat_sent_total": "counter",
    "sse_connection_duration_seconds": "histogram", "sse_time_to_first_event_seconds": "histogram",
    "sse_stream_ended_total": "counter", "sse_message_delivery_success_rate": "gauge",
    "http_requests_total": "counter", "aura_runs": "gauge", "aura_run_duration_seconds": "histogram",
}

def labelled(found, name, *labels):
    """The values of one metric that are not 0, by these labels."""
    return {tuple(dict(pairs)[label] for label in labels): value
            for (one, *pairs), value in found.items() if one == name and value}

def test_after_a_known_session_every_figure_has_its_exact_value(heard):
    streams = "/aura/analysis-runs/{runId}/stream"
    with running(event_delay=0, speed="max") as aura, running() as other:
        whole = aura.trigger("1", run_id="r")
        bytes_sent = len(stream(aura, whole))
        broken = aura.trigger("2", run_id="b", scenario="drop-resume")
        with pytest.raises(httpx.RemoteProtocolError):
            stream(aura, broken)
        bytes_sent += len(stream(aura, broken, Last_Event_ID="2"))
        script = {"name": "w", "run": [*says("made-up", "step"), {"wait": "go"}]}
        waiting = aura.trigger("3", run_id="w", scenario=script)
        watch(aura, waiting, b"id: 2\n\n").close()
        entries = aura.journal(count=4, within=WAIT)
        bytes_sent += entries[1].bytes + entries[3].bytes
        with watch(aura, waiting, b"id: 2\n\n"):
            live = bytes_sent + aura._ask("GET", "/__aura/connections").connections[0].bytes
            for path, status in (("/aura/analysis-runs/none/stream", 404), ("/aura/analysis-runs/r/stream", 204)):
                answer = httpx.get(aura.url + path, headers={**BEARER, "Last-Event-ID": "11"})
                assert answer.status_code == status
            httpx.get(f"{aura.url}/made/up/{'x' * 50}")
            httpx.request("BREW", f"{aura.url}/health")
            httpx.head(f"{aura.url}/aura/analysis-runs/{whole}/stream", headers=BEARER)
            answer = httpx.get(f"{aura.url}/metrics")
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            found, again = metrics_of(answer.text), metrics_of(httpx.get(f"{aura.url}/metrics").text)
            changed = {name[0] for name in again if again[name] != found.get(name)}
            assert changed == {"http_requests_total"}, "to look changes nothing else"
        assert {name: found[(name,)] for name in (
            "sse_connections_open", "sse_connections_total", "sse_reconnect_count", "sse_bytes_sent_total",
            "sse_heartbeat_sent_total", "sse_connection_duration_seconds_count",
            "sse_time_to_first_event_seconds_count", "aura_run_duration_seconds_count",
        )} == {
            "sse_connections_open": 1, "sse_connections_total": 5, "sse_reconnect_count": 1,
            "sse_bytes_sent_total": live,
            "sse_heartbeat_sent_total": sum(entry.heartbeats for entry in aura.journal()),
            "sse_connection_duration_seconds_count": 4, "sse_time_to_first_event_seconds_count": 5,
            "aura_run_duration_seconds_count": 2,
        }
        assert 0 < found[("sse_time_to_first_event_seconds_sum",)] < WAIT
        assert {name: value for (name,), value in labelled(found, "sse_message_sent_total", "event").items()} == {
            "started": 2, "step": 2 * 5 + 2, "evidence": 2, "confidence": 2, "proposal": 4, "completed": 2, "other": 2}
        assert labelled(found, "sse_stream_ended_total", "by", "how") == {
            ("server", "end"): 2, ("server", "drop"): 1, ("client", "disconnect"): 1}
        assert found[("sse_message_delivery_success_rate",)] == pytest.approx((11 + 2 + 9 + 2) / (11 + 11 + 9 + 2))
        assert labelled(found, "aura_runs", "status") == {("running",): 1, ("completed",): 2}
        assert labelled(found, "http_requests_total", "method", "endpoint", "status").items() >= {
            ("POST", "/aura/cases/{caseId}/analysis-runs", "202"): 3, ("GET", streams, "200"): 4,
            ("GET", streams, "404"): 1, ("GET", streams, "204"): 1, ("HEAD", streams, "200"): 1,
            ("GET", "other", "404"): 1, ("other", "other", "405"): 1,
        }.items()
        aura.journal(waiting, count=2, within=WAIT)
        httpx.get(f"{aura.url}/api/generation/jobs/j/events")
        closed = metrics_of(httpx.get(f"{aura.url}/metrics").text)
        assert closed[("sse_connections_open",)] == 0
        assert closed[("http_requests_total", ("endpoint", "*/events"), ("method", "GET"), ("status", "200"))] == 1
        assert closed[("sse_message_sent_total", ("event", "progress"))] == 7
        quiet = metrics_of(httpx.get(f"{other.url}/metrics").text)
        assert quiet[("sse_connections_total",)] == 0, "two servers do not mix"
        assert quiet[("sse_message_delivery_success_rate",)] == 1

async def test_the_metrics_have_exactly_the_names_of_the_contract(client):
    from prometheus_client.parser import text_string_to_metric_families

    text = (await client.get("/metrics")).data.decode()
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name.removesuffix("_total"): kind for name, kind in METRICS.items()} == kinds
    names = set(re.findall(r"^(\w+?)(?:_bucket|_sum|_count)?[ {]", text, re.M)) - {"sse_reconnect"}
    assert names == METRICS.keys() - {"sse_reconnect_count", "http_requests_total"}, "the first request is not over yet"

async def test_what_was_not_due_or_is_called_anything_counts_for_little(client, autojump_clock):
    """More than was due does not make up for less; names that somebody makes up are counted as one."""
    made_up = [{"event": {"event": f"made-up-{n}", "data": 1}} for n in range(300)]
    await ended(await run_of(client, *says(*"abcdefg", pause=1), run_id="few"))
    await read(client, "few", [{"relay": 3}, {"repeat": 50, "steps": made_up}])
    await read(client, "few", [{"relay": 2}])
    text = (await client.get("/metrics")).data.decode()
    assert metrics_of(text)[("sse_message_delivery_success_rate",)] == pytest.approx((7 + 2) / 14)
    assert "made-up" not in text and metrics_of(text)[("sse_message_sent_total", ("event", "other"))] == 15_005

async def test_without_the_extra_metrics_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with in_memory() as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 501
        assert answer.json()["error"] == "metrics need an extra: pip install 'aura-stream[metrics]'"

# ═══ What ASGI cannot say ═══════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize(("second", "status"), [
    (b"GET /health HT", 408), (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/2.0\r\n\r\n", 505)])
def test_also_a_later_request_of_a_connection_is_refused_with_its_status(second, status):
    with running(head_timeout=0.2) as aura, connect(aura, get("/health")) as wire:
        read_until(wire, b"uptime")
        wire.sendall(second)
        assert read_until(wire, None).split(b"HTTP/1.1 ")[1].startswith(b"%d " % status)

def request_of(line, *headers, body=b""):
    return b"\r\n".join([line, b"Host: localhost", b"Authorization: Bearer t", *headers, b"", body])

RUNS_URL = b"/aura/cases/1/analysis-runs"
POST = b"POST %b HTTP/1.1" % RUNS_URL
CHUNKED = request_of(POST, b"Transfer-Encoding: chunked")
UPGRADE = request_of(b"GET /ws HTTP/1.1", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
                     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
H2C = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c",
       "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA"}

def posted(body):
    """The bytes of a trigger."""
    return request_of(POST, b"Content-Length: %d" % len(body), body=body)

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
            with watch(aura, run_id, b"\r\n") as wire:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert httpx.get(f"{aura.url}/health", timeout=WAIT).status_code == 200

def test_a_reader_that_stops_reading_is_evicted_at_the_send_deadline(heard):  # traps 2 and 10
    with running(send_timeout=0.3) as aura:
        run_id = aura.trigger("1", scenario=FLOOD)
        with stalled(aura, f"/aura/analysis-runs/{run_id}/stream"):
            line = heard.wait_for("stream closed")
        assert "by=client how=stalled reason=read nothing for 0.3 s" in line
        assert int(re.search(r"bytes=(\d+)", line)[1]) < 2_000_000, "the kernel hides at most its bounded buffers"
        heard.wait_for("WARNING SSE connection lost for client 127.0.0.1:")
        assert state(aura, run_id)["status"] == "running"
        beats = {"heartbeat": {"every": 0.001, "event": "h", "data": "x" * 100_000}}
        run_id = aura.trigger("1", scenario={"name": "beats", "stream": ["open", beats, {"sleep": 100}]})
        with stalled(aura, f"/aura/analysis-runs/{run_id}/stream"):
            heard.wait_for(f"WARNING Failed to send SSE heartbeat run_id={run_id}")
        assert ending(aura, run_id) == ("client", "stalled")

@pytest.mark.parametrize("end", [[], ["end"], ["drop"]])
def test_who_stops_reading_in_the_last_write_is_named(end):
    big = {"name": "big", "stream": [{"event": {"data": {}}, "pad": 8_000_000}, *end]}
    with running(send_timeout=0.3) as aura:
        run_id = aura.trigger("1", scenario=big)
        with stalled(aura, f"/aura/analysis-runs/{run_id}/stream", 4096):
            entry = entry_of(aura, run_id)
    assert (entry.end.by, entry.end.how, entry.events) == ("client", "stalled", 0)
    assert entry.said.startswith("the client stopped reading and was cut off")
    assert entry.said.endswith(f"{entry.bytes} bytes; read nothing for 0.3 s")

def resident(server):
    """Bytes of memory that the process holds."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1])

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")

def still(aura, count=1):
    """A question: whether so many open streams have stopped moving."""
    seen = [None]

    def stands():
        seen.append([one.bytes for one in aura._ask("GET", "/__aura/connections").connections])
        return len(seen[-1]) == count and seen[-1] == seen[-2]

    return stands

@on_linux
def test_stalled_readers_cost_no_more_than_their_buffers():
    """Forty, each with twelve megabytes before it: for one the server holds one write and what a stream costs."""
    with process("--log-level", "ERROR", "--send-timeout", "60") as (server, aura), contextlib.ExitStack() as wires:
        run_id = aura.trigger("1", scenario=FLOOD)
        eventually(lambda: state(aura, run_id)["events"] == 400)
        before = resident(server)
        for _ in range(40):
            wires.enter_context(stalled(aura, f"/aura/analysis-runs/{run_id}/stream"))
        eventually(still(aura, 40))
        assert max(one.bytes for one in aura._ask("GET", "/__aura/connections").connections) < 600_000
        assert (resident(server) - before) / 40 < 256 * 1024

BIG_ONE = {"name": "big", "run": [{"event": {"event": "big", "data": {}}, "pad": 8_000_000}, "hang"]}

@on_linux
def test_what_runs_hold_together_is_the_limit_and_a_viewer_of_a_big_event_adds_nothing():
    """Sixty runs with an event of 8 MB each; then twenty viewers that read a bit of one, with a body in their GET."""
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
                asked = get("/aura/analysis-runs/seen/stream", headers={"Content-Length": "1000000"}) + b"x" * 1_000_000
                read_until(wires.enter_context(connect(aura, asked)), b"xxxxx")
            assert resident(server) - full < 30 * 2**20

def test_a_slow_reader_of_a_big_event_is_not_evicted():
    big = {"name": "big", "run": [{"event": {"event": "big", "data": {}}, "pad": 3_000_000}]}
    with running(send_timeout=0.3) as aura:
        with watch(aura, aura.trigger("1", scenario=big)) as wire:
            got, gate, began = b"", threading.Event(), time.monotonic()
            while b"[DONE]" not in got[-40:]:
                got += wire.recv(200_000)
                gate.wait(0.03)  # slower than the deadline for the whole, faster than for each piece
        assert len(got) > 2_900_000 and time.monotonic() - began > 0.3

def test_connection_close_closes_and_an_idle_connection_too(heard):  # trap 3
    logging.getLogger("aura_stream").setLevel(logging.DEBUG)
    with running(keep_alive=0.1) as aura:
        for data in (get("/health", headers={"Connection": "close"}), get("/health"), b""):
            with connect(aura, data) as wire:
                assert (b"healthy" in read_until(wire, None)) == bool(data)
    heard.wait_for("DEBUG closed a connection that was idle for 0.1 s")
    with running(keep_alive=0) as aura, connect(aura, get("/health")) as wire:
        assert b"healthy" in read_until(wire, None), "one request for each connection"

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
        wires = [connect(aura, get("/health")) for _ in range(20)]
        for wire in wires:
            read_until(wire, b"uptime")
            wire.close()
        eventually(lambda: descriptors() <= before, within=3)

@pytest.mark.parametrize(("headers", "ahead", "how"), [
    ({}, b"", "close"), (H2C, b"", "close"), ({}, b"", "half"), ({}, b"", "reset"),
    *(({}, ahead, how) for ahead in (b"\r\n", get("/health"), b"x" * 1000) for how in ("close", "reset")),
])
def test_a_viewer_that_leaves_a_quiet_stream_is_noticed_at_once_and_the_run_goes_on(headers, ahead, how, heard):
    """The seed case: it closes after its first 13 bytes; also one that had offered h2c, or sent bytes ahead."""
    with running() as aura:
        run_id = aura.trigger("1", scenario="silent")
        wire = watch(aura, run_id, **headers)
        wire.sendall(ahead)
        assert state(aura, run_id)["viewers"] == 1
        before = aura._ask("GET", "/__aura/connections").connections[0].latency
        if how == "reset":
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.shutdown(socket.SHUT_WR) if how == "half" else wire.close()
        entry = entry_of(aura, run_id)
        wire.close()
        assert (entry.end.by, entry.end.how) == ("client", "disconnect")
        assert entry.said.startswith("the client closed the connection")
        assert entry.t.end - entry.t.open - before < 0.5, "100 ms by hand, five times the slack here"
        assert (entry.bytes, entry.chunks, entry.events, entry.status) == (13, 1, 0, 200)
        assert entry.headers.upgrade == headers.get("Upgrade")
        assert (state(aura, run_id)["status"], state(aura, run_id)["viewers"]) == ("running", 0)
    assert ("WARNING Unsupported upgrade request." in heard.all()) == bool(headers)
    assert "by=client how=disconnect reason=closed the connection" in heard.all()

def test_of_requests_sent_ahead_the_first_is_answered_and_says_that_it_was_the_last():
    with running(event_delay=0) as aura:
        run_id = aura.trigger("1")
        path = f"/aura/analysis-runs/{run_id}/stream"
        for first, marker in ((path, DONE), ("/health", b"healthy")):
            with connect(aura, get(first) + get("/health") + get(path) + get("/nowhere")) as wire:
                answers = read_until(wire, None)
            assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answers)] == [200]
            assert answers.count(marker) == 1 and b"\r\nconnection: close\r\n" in answers.lower()
        assert ending(aura, run_id) == ("server", "end")

@pytest.mark.parametrize("behind", [get("/health") * 900, posted(b" " * 900_000)], ids=["requests", "a long one"])
def test_a_client_far_ahead_can_read_its_one_answer_and_meets_no_reset(behind):
    """What it sends on is read and thrown away until it has the answer."""
    slow = {"name": "s", "run": [*says("a"), {"sleep": 0.2}, *says("b")]}
    with running(event_delay=0) as aura:
        path = f"/aura/analysis-runs/{aura.trigger('1', scenario=slow)}/stream"
        for first, marker in ((path, DONE), ("/health", b"healthy")):
            with connect(aura) as wire:
                sender = threading.Thread(target=wire.sendall, args=[get(first) + behind])
                sender.start()
                answers = read_until(wire, None)
                sender.join()
            assert answers.count(b"HTTP/1.1 ") == answers.count(marker) == 1

IMPATIENT = """
import re, socket, sys
wire = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
for _ in range(300):
    wire.sendall(sys.argv[2].encode())
    data = b""
    while (at := data.find(b"\\r\\n\\r\\n")) < 0:
        data += wire.recv(1 << 20) or sys.exit("the connection was closed")
    whole = at + 4 + int(re.search(rb"(?i)content-length: (\\d+)", data)[1])
    while len(data) < whole:
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

def test_nobody_is_told_a_500_that_nobody_meant(heard):
    with running(grace=0.2) as aura:
        for _ in range(50):
            with connect(aura, get("/health") + posted(b"{}")) as wire:
                wire.shutdown(socket.SHUT_WR)
                assert b" 500 " not in read_until(wire, None)
        run_id = aura.trigger("1", scenario={"name": "waiting", "stream": [{"sleep": 60}, "open"]})
        with watch(aura, run_id, None) as wire:
            eventually(lambda: state(aura, run_id)["viewers"] == 1)
            aura.stop()
            assert read_until(wire, None) == b""
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")

@pytest.mark.parametrize(("data", "status", "why"), [
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 3000, 431, "the head is longer than 2000 bytes"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 431, "the head is longer than"),
    (b"GET / HTT", 408, "the head took too long"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9, 505, "this is no request of HTTP/1.1"),
    (b"\x00\x01\r\n\r\n", 400, "this is no request of HTTP/1.1"),
    (request_of(b"GET / HTTP/9.9"), 505, "this is no request of HTTP/1.1"),
    (request_of(POST, b"Content-Length: 10", body=b"{"), 408, "Request Timeout"),
    (request_of(POST, b"Content-Length: 10000000", body=b"x" * 10_000_000), 413, "Request Entity Too Large"),
    (request_of(b"POST /nope HTTP/1.1", b"Content-Length: 9", body=b"{"), 404, "Not Found: "),
    # RFC 9112, 6.1: somebody on the way may have counted differently, and what follows is perhaps no request
    (request_of(POST, b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"), 202, ""),
])
def test_what_is_no_good_request_is_answered_closed_and_in_the_log(data, status, why, heard):
    with running(max_head=2000, head_timeout=0.2, body_timeout=0.2) as aura, connect(aura, data) as wire:
        answer = read_until(wire, None).decode()
        assert answer.startswith(f"HTTP/1.1 {status}") and "\r\nconnection: close\r\n" in answer.lower()
        known_as = re.search("(?i)x-request-id: ([0-9a-f]{32})\r\n", answer)[1]
        if why:
            told = heard.wait_for(f"[{known_as}] {status} refused: {why}")
            assert why.startswith(("R", "N")) or told.endswith(f", from ('127.0.0.1', {wire.getsockname()[1]})")

@pytest.mark.parametrize(("settings", "pause"), [
    ({"max_linger": 300_000, "linger": 60}, 0), ({"linger": 0.2, "max_linger": 10**9}, 0.02)])
def test_a_refused_client_that_goes_on_sending_is_cut_at_either_limit(settings, pause, heard):
    asked = request_of(POST, b"Content-Length: 90000000")
    with running(max_body=10, **settings) as aura, connect(aura, asked) as wire:
        began, gate = time.monotonic(), threading.Event()
        with pytest.raises(OSError, match="reset|pipe"):  # a reset, or the pipe broken by one
            while time.monotonic() - began < WAIT:
                wire.sendall(b"x" * 1000)
                gate.wait(pause)
        line = heard.wait_for("cut a refused client that was still sending, after ")
        assert (time.monotonic() - began < 1.5) and (int(line.split()[-2]) > 300_000) == (not pause)

@pytest.mark.parametrize("way", ["upload", "kept end", "analysis"])
def test_nothing_that_clients_or_analyses_hold_on_to_holds_up_the_stop(way, heard):
    """A body that does not come, a sending end that was kept, an analysis that does not heed its cancellation."""
    kept, gate = [], threading.Event()

    async def analysis(facts, sending):
        kept.append(sending.clone())
        await sending.send(Event("a", {"n": "a"}))
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(gate.wait if way == "analysis" else int)

    with running(analysis=analysis, grace=0.3 if way == "analysis" else 30) as aura, contextlib.ExitStack() as wires:
        if way == "upload":
            wires.enter_context(connect(aura, request_of(POST, b"Content-Length: 100", body=b"{")))
        wire = wires.enter_context(watch(aura, aura.trigger("1"), None))
        data = read_until(wire, b"id: 1\n\n")
        began = time.monotonic()
        aura.stop()
        assert (b"[DONE]" in data + read_until(wire, None)) == (way != "analysis")
        gate.set()
    assert time.monotonic() - began < 3
    assert f"by={'shutdown how=cancelled' if way == 'analysis' else 'server how=end'}" in heard.wait_for(
        "stream closed")

def half_closed(aura, data):
    """What is answered to a client that sends this and says no more."""
    with connect(aura, data) as wire:
        wire.shutdown(socket.SHUT_WR)
        return read_until(wire, None)

def test_what_is_short_is_answered_to_a_client_that_has_closed_its_half():
    trigger, slow = posted(b"{}"), posted(b'{"scenario": "slow-trigger"}')
    with running(speed=20) as aura:
        for data, status in ((trigger, b"202"), (get("/health"), b"200"), (get("/health", version="1.0"), b"200"),
                             (get("/aura/analysis-runs/none/stream"), b"404"), (get("/health") * 2, b"200")):
            for _ in range(30 if data in (trigger, get("/health")) else 5):
                answer = half_closed(aura, data)
                assert answer[9:12] == status and answer.count(b"HTTP/1.") == 1
        assert half_closed(aura, slow)[9:12] == b"202"
        entry = aura.journal(kind="trigger")[-1]
        assert (entry.end.by, entry.end.how) == ("server", "end")

@pytest.mark.parametrize(("data", "kind", "times"), [
    (get("/aura/analysis-runs/r/stream"), "stream", 20),
    (get("/aura/cases/1/analysis/stream?runId=r", version="1.0"), "stream", 20),
    (posted(b'{"runId": "r"}').replace(b"analysis-runs", b"analysis/trigger"), "stream", 20),
    (get("/health")[:-2], None, 1), (b"", None, 1),
    (request_of(POST, b"Content-Length: 9", body=b"{"), "trigger", 1),
])
def test_who_closes_its_half_has_left_its_stream_or_an_unfinished_request(data, kind, times):
    with running() as aura:
        aura.trigger("1", scenario=QUIET, run_id="r")
        for _ in range(times):
            answer = half_closed(aura, data)
            assert answer == b"" if times == 1 else b"[DONE]" not in answer
        if kind:
            entries = aura.journal(kind=kind, count=times + (kind == "trigger"), within=WAIT)[-times:]
            assert {(one.end.by, one.end.how) for one in entries} == {("client", "disconnect")}
        assert state(aura, "r")["status"] == "running"

@pytest.mark.parametrize("fields", [{"head_timeout": 0.2}, {"grace": 0.2}])
def test_who_has_left_an_answer_that_does_not_come_holds_nothing_for_long(fields):
    with running(**fields) as aura:
        before = descriptors()
        connect(aura, posted(b'{"scenario": {"name": "n", "trigger": ["hang"]}}')).close()
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
            assert half_closed(aura, posted(cut)) == b""
        assert aura.journal(kind="trigger", count=1, within=WAIT)[0].end.how == verb
        eventually(lambda: descriptors() <= before, within=3)

MALFORMED = {
    "bad chunk size": CHUNKED + b"ZZ\r\n", "bad chunk end": CHUNKED + b"2\r\n{}XX",
    "negative length": request_of(POST, b"Content-Length: -5"),
    "two lengths": request_of(POST, b"Content-Length: 2", b"Content-Length: 3", body=b"{}"),
    "length and chunks": request_of(POST, b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    "unknown coding": request_of(POST, b"Transfer-Encoding: gzip"), "stray byte after upgrade": UPGRADE + b"\x00",
    "websocket frame": UPGRADE + b"\x81\x85\x00\x00\x00\x00hello",
    "many headers": request_of(b"GET /health HTTP/1.1", *[b"X-%d: y" % n for n in range(3000)]),
    "one long header": request_of(b"GET /health HTTP/1.1", b"X: " + b"y" * 60_000),
    "endless head": b"GET /health HTTP/1.1\r\nX: " + b"y" * 60_000,
    "long path": request_of(b"GET /" + b"a" * 40_000 + b" HTTP/1.1"),
    "header without colon": request_of(b"GET /health HTTP/1.1", b"nonsense"),
    "folded header": request_of(b"GET /health HTTP/1.1", b"X: a", b"  b"),
    "header with NUL": request_of(b"GET /health HTTP/1.1", b"X: a\x00b"), "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "strange host": b"GET /health HTTP/1.1\r\nHost: [::%$#\xff\r\n\r\n",
    "bad UTF-8 in the path": request_of(b"GET /aura/analysis-runs/%ff%fe/stream HTTP/1.1"),
    "NUL in the path": request_of(b"GET /aura/analysis-runs/%00/stream HTTP/1.1"),
    "raw bytes in the path": request_of("GET /증거 HTTP/1.1".encode()),
    "bad UTF-8 in the query": request_of(b"GET /aura/cases/1/analysis/stream?runId=%ff HTTP/1.1"),
    "line break in an id": request_of(b"GET /aura/analysis-runs/a%0d%0aX:y/stream HTTP/1.1"),
    "dots in the path": request_of(b"GET /../../etc/passwd HTTP/1.1"),
    "absolute URI": request_of(b"GET http://localhost/health HTTP/1.1"),
    "absolute URI without a path": request_of(b"GET http://localhost HTTP/1.1"),
    "strange URI": request_of(b"GET ftp://[::bad/x HTTP/1.1"), "only a query": request_of(b"GET ?x HTTP/1.1"),
    "asterisk": request_of(b"OPTIONS * HTTP/1.1"), "connect": request_of(b"CONNECT localhost:80 HTTP/1.1"),
    "unknown method": request_of(b"BREW /health HTTP/1.1"), "wrong method": request_of(b"PATCH /health HTTP/1.1"),
    "no version": b"GET /health\r\n\r\n", "version 9": request_of(b"GET /health HTTP/9.9"),
    "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "blank lines": b"\r\n\r\n\r\n\r\n",
    "10 MB body": request_of(POST, b"Content-Length: 10000000", body=b"x" * 10_000_000),
    "body that never comes": request_of(POST, b"Content-Length: 9", body=b"{"),
    "2000 nested arrays": posted(b"[" * 2000 + b"]" * 2000), "not JSON": posted(b"\xff\x00{"),
    "huge number": posted(b"[" + b"9" * 6000),
    "body on a stream": request_of(b"GET /aura/analysis-runs/x/stream HTTP/1.1", b"Content-Length: 5", body=b"hello"),
    "expect nonsense": request_of(POST, b"Expect: 999", b"Content-Length: 0"),
    "strange last id": request_of(b"GET /aura/analysis-runs/x/stream HTTP/1.1", b"Last-Event-ID: \xff\xfe"),
    "bare CR": b"GET /health HTTP/1.1\rHost: localhost\r\r",
}
LEGAL = {"strange host": "200", "absolute URI": "200", "absolute URI without a path": "200", "asterisk": "404",
         "only a query": "200", "expect nonsense": "202", "blank lines": "", "folded header": "200"}

@pytest.mark.long
def test_malformed_requests_are_answered_or_closed_and_harm_nobody(heard):
    """300 requests of 45 kinds, while a well-behaved stream runs on."""
    with running(head_timeout=0.2, body_timeout=0.2, keep_alive=0.1) as aura:
        wire, run_id = open_quiet_stream(aura)
        before, answers = descriptors(), {}

        def attack():
            for kind, data in MALFORMED.items():
                with connect(aura) as bad:
                    answer = b""
                    with contextlib.suppress(ConnectionError):
                        bad.sendall(data)
                    with contextlib.suppress(ConnectionError):
                        answer = read_until(bad, None)
                answers.setdefault(kind, set()).add(answer[9:12].decode())

        threads = [threading.Thread(target=attack) for _ in range(300 // len(MALFORMED) + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for kind, statuses in answers.items():
            for status in statuses:
                assert status == LEGAL.get(kind) or re.fullmatch(r"4\d\d|501|505|", status), (kind, statuses)
        assert answers["10 MB body"] == {"413"} and len(answers) == len(MALFORMED)
        eventually(lambda: descriptors() <= before)
        httpx.delete(f"{aura.url}/aura/cases/1/analysis-runs/{run_id}", headers=BEARER)
        assert DONE in read_until(wire, b"0\r\n\r\n")
        wire.close()
    lines = heard.all()
    assert "Traceback" not in lines and "+trace" not in lines and "Status: 500" not in lines

def test_bad_company_delays_nobody_and_does_not_hold_up_the_stop(heard):
    """One reader stalled, one half-closed, one that pipelined, one that says nothing."""
    ticking = {"name": "ticking", "run": [{"repeat": 40, "steps": [{"event": {"data": "{now}"}}, {"sleep": 0.01}]}]}
    with running(send_timeout=1) as aura:
        flood, tick = aura.trigger("1", scenario=FLOOD), aura.trigger("2", scenario=ticking)
        stuck = stalled(aura, f"/aura/analysis-runs/{flood}/stream")
        half, _ = open_quiet_stream(aura)
        half.shutdown(socket.SHUT_WR)
        pipelined, _ = open_quiet_stream(aura)
        pipelined.sendall(get("/health"))
        silent = connect(aura)
        arrivals, seen = [], b""
        with watch(aura, tick, None) as viewer:
            while b"[DONE]" not in seen:
                seen += viewer.recv(65536)
                arrivals.append(time.monotonic())
        gaps = [after - before for before, after in itertools.pairwise(arrivals)]
        assert max(gaps) < 0.5, "five times the slack on 100 ms"
        stuck.close()
        heard.wait_for("how=disconnect")
        before = time.monotonic()
    assert time.monotonic() - before < 3
    for wire in (half, pipelined, silent):
        wire.close()

# ═══ Catalogue ══════════════════════════════════════════════════════════════════════════════════

class Bench:
    """One scenario on a server: triggers it and looks at its streams, one attempt after the other."""

    def __init__(self, aura, name):
        self.aura, self.name, self.seen = aura, name, 0
        self.run_id = f"{name}-{time.monotonic_ns()}"
        if CATALOGUE[name].trigger is None:
            aura.trigger("85116", scenario=name, run_id=self.run_id)

    def see(self, *, until=None, **headers):
        """One GET, read to its end, and what the journal says of it."""
        with watch(self.aura, self.run_id, None, Connection="close", **headers) as wire:
            seen = Seen(wire, until=until)
        self.seen += 1
        entry = seen.entry = self.aura.journal(self.run_id, count=self.seen, within=WAIT)[-1]
        assert (entry.scenario, entry.attempt) == (self.name, self.seen)
        assert entry.status == seen.status or seen.ended == "none"
        if not until:
            assert (entry.bytes, entry.chunks) == (len(seen.body), len(list(filter(None, seen.chunks))))
            assert (entry.end.by, entry.end.how) == ("server", {"none": "drop"}.get(seen.ended, seen.ended))
        return seen

def data_of(seen, name):
    """The data of the events of this name."""
    return [json.loads(data) for _, one, data in seen.events if one == name]

def whole(seen, names):
    """A good stream: hello, these events in order with ids from 1, [DONE], and a proper end."""
    assert (seen.status, seen.ended) == (200, "end")
    assert seen.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert seen.body.startswith(HELLO) and seen.body.endswith(DONE)
    assert [(id, name) for id, name, _ in seen.events] == [(str(n), name) for n, name in enumerate(names, 1)]
    assert seen.entry.events == seen.entry.last_id_sent == len(names)
    return seen

def shorter_than(most):
    return lambda seen: {len(chunk) for chunk in seen.chunks} <= set(range(1, most + 1))

def split_inside_every_character(seen):
    lead = [n for n, byte in enumerate(seen.body) if byte >= 0xC0]
    ends = {sum(map(len, seen.chunks[: n + 1])) for n in range(len(seen.chunks))}
    return len(lead) > 50 and ends >= {n + 1 for n in lead}

# Good streams: the names of their events, and what else holds
GOOD = {
    "ok": (PHASE2, None), "no-terminal": (FOUR[:3], None), "missing-started": (FOUR[1:], None),
    "phase3": (PHASE3, None),
    "unknown-events": (["started", "telemetry", "x-internal", "completed"], None),
    "duplicate-run": (["started", "started", "step", "step", "step", "step", "completed", "completed"], None),
    "slow-run": (["started", *["step"] * 7, "completed"], None),
    "slow-first": (PHASE2, lambda seen: seen.entry.t.end - seen.entry.t.open < WAIT),  # 30 s took no 30 s
    "failed": (["started", "step", "failed"], lambda seen: [(one["error"], one["stage"]) for one in data_of(
        seen, "failed")] == [("the model refused the prompt", "llm")]),
    "crash": (["started", "step", "failed"], lambda seen: [(one["error"], one["stage"]) for one in data_of(
        seen, "failed")] == [("RuntimeError: row 7 has no amount", "pipeline")]),
    "flood": (["started", *["step"] * 20_000, "completed"], lambda seen: seen.entry.chunks < 20_000),
    "big-event": (["started", "evidence", "completed"],
                  lambda seen: len(data_of(seen, "evidence")[0]["pad"]) == 5_000_000),
    "korean": (["started", *["step"] * 5, "completed"], lambda seen: len(seen.events[1][2].encode()) > 3000
               and data_of(seen, "step")[0]["detail"].startswith("증거를 수집하고")),
    "progress-regress": (["started", "step", "step", "step", "completed"],
                         lambda seen: [one["percent"] for one in data_of(seen, "step")] == [45, 25, 85]),
    "no-heartbeat": (FOUR, lambda seen: seen.entry.heartbeats == 0 and INTERVAL not in seen.body),
    "buffered": (PHASE2, lambda seen: len(seen.chunks) == 1),
    "buffered-4k": (PHASE2, lambda seen: shorter_than(4096)(seen)
                    and {len(chunk) for chunk in seen.chunks[:-1]} <= {4096}),
    "dribble": (PHASE2, shorter_than(1)), "split-utf8": (PHASE2, split_inside_every_character),
    "mid-line": (PHASE2, lambda seen: shorter_than(7)(seen) and seen.chunks[0] == b": conne"),
    "coalesced": (PHASE2, lambda seen: len(seen.chunks) == 2 and parsed(seen.chunks[0])[-1][:2] == ("5", "step")),
}
# Faulty ones, each time: how it ends, the names of its events, and what else holds
FAULTY = {
    "empty": ("end", [], lambda seen: seen.body == b""), "empty-truncated": ("drop", [], lambda seen: seen.body == b""),
    "no-response": ("none", [], lambda seen: seen.status == 0),
    "first-chunk-then-close": ("end", [], lambda seen: seen.body == HELLO),
    "first-chunk-then-drop": ("drop", [], lambda seen: seen.body == HELLO),
    "always-drop": ("drop", [], lambda seen: seen.body == HELLO),
    "drop": ("drop", PHASE2[:3], lambda seen: seen.entry.said == "the server dropped the connection on purpose "
             f"(step 2 of drop) after 3 events, {len(seen.body)} bytes"),
    "reset": ("reset", PHASE2[:2], lambda seen: seen.entry.events == 2),
    "no-done": ("end", PHASE2, lambda seen: b"[DONE]" not in seen.body),
    "done-only": ("end", [], lambda seen: seen.body == DONE),
    "unterminated-last-event": ("end", FOUR[:3],
                                lambda seen: seen.body.endswith(b"event: completed\ndata: {}\nid: 4\n")),
    "after-done": ("end", None, lambda seen: seen.body.endswith(DONE + b"data:\n\ndata:\n\n")),
    "fallback-completed": ("end", FOUR[:2] + FOUR[3:], lambda seen: seen.body.endswith(DONE)
                           and set(data_of(seen, "completed")[0]) == {"status", "runId", "caseId"}
                           and b"\n\nevent: completed" in seen.body),  # it is not of the log and has no id
    "silent": ("end", ["failed"], lambda seen: data_of(seen, "failed")[0]["stage"] == "timeout"
               and (seen.entry.attempt > 1 or seen.body.startswith(HELLO + INTERVAL * 9))),
    "idle-cut": ("drop", PHASE2[:2], lambda seen: seen.entry.heartbeats == 0),
    "gateway-timeout": ("drop", None, lambda seen: len(seen.events) == 30),
    "double-wrapped": ("end", None, lambda seen: seen.names[:2] == ["message", "message"]
                       and seen.body.startswith(HELLO + b'data:event: started\ndata:data: {"runId"')
                       and seen.body.endswith(b"data:data: [DONE]\n\n")),
    "gateway-ids": ("end", PHASE2, lambda seen: [id for id, _, _ in seen.events] == [
        f"gw-{n}" for n in range(1, 12)]),
    "duplicate-events": ("end", None, lambda seen: [event[:2] for event in seen.events] == [
        (str(n), FOUR[n - 1]) for n in (1, 2, 2, 3, 4)] and seen.events[1] == seen.events[2]),
    "out-of-order": ("end", None, lambda seen: [event[:2] for event in seen.events] == [
        (str(n), FOUR[n - 1]) for n in (1, 3, 2, 4)]),
    "bad-json": ("end", None, lambda seen: seen.events[2] == ("2", "step", '{"label": "RULE_SC')
                 and seen.body.endswith(DONE)),
    "retry-field": ("end", PHASE2, lambda seen: seen.body.startswith(b"retry: 1500\n\n" + HELLO)),
    "generation": ("end", JOB_NAMES, lambda seen: b"[DONE]" not in seen.body and seen.events[0][0].endswith("_1")
                   and [one["value"] for one in data_of(seen, "progress")] == [10, 25, 40, 60, 75, 90, 100]),
}
# Answers that are no streams, each time: status, content type, a header that is there, what its body has
PLAIN = {
    "unauthorized": (401, "application/json", "www-authenticate", b"expired"),
    "forbidden": (403, "application/json", "x-aura-attempt", b"Not your case"),
    "rate-limited": (429, "application/json", "retry-after", b"too many requests"),
    "unknown-run": (200, "application/json", "x-aura-run-id", b"runId not found or already completed"),
    "unknown-run-404": (404, "application/json", "x-aura-run-id", b"unknown-run-404-"),
    "html": (200, "text/html; charset=utf-8", "x-aura-run-id", b"<!doctype html>"),
    "json-instead": (200, "application/json", "x-aura-run-id", b'{"ok": true}'),
    "gone-204": (204, None, "x-aura-run-id", b""),
    "sse-500": (500, "text/event-stream; charset=utf-8", "x-aura-run-id", b""),
}
STATUSES = {  # of one GET after the other; the last 200 is a good stream
    "unavailable": [503, 200, 200], "refuse-3-then-ok": [503, 503, 503, 200, 200],
    "expired-run": [200, 404, 404, 404], "other-worker": [200, 404, 200, 404],
}
EFFECTS = {}

def effect(*names):
    """The effect of these scenarios, as a client sees it, where a row of the tables does not say it."""

    def keep(check):
        EFFECTS.update(dict.fromkeys(names, check))
        return check

    return keep

@effect(*GOOD)
def _(bench):
    names, more = GOOD[bench.name]
    seen = whole(bench.see(), names)
    assert more is None or more(seen)

@effect(*FAULTY)
def _(bench):
    ended, names, more = FAULTY[bench.name]
    for _ in range(1 if bench.name == "generation" else 2):
        seen = bench.see()
        assert seen.ended == ended and seen.status in (200, 0) and more(seen)
        assert names is None or seen.names == names

@effect(*PLAIN)
def _(bench):
    status, kind, header, text = PLAIN[bench.name]
    for _ in range(2):
        seen = bench.see()
        assert (seen.status, seen.headers.get("content-type"), seen.ended) == (status, kind, "end")
        assert header in seen.headers and text in seen.body and bool(text) == bool(seen.body)

@effect(*STATUSES)
def _(bench):
    for status in STATUSES[bench.name]:
        seen = bench.see()
        assert seen.status == status and (status != 503 or seen.headers["retry-after"] == "1")
        assert status != 200 or whole(seen, PHASE2)

@effect("stepped")
def _(bench):
    with watch(bench.aura, bench.run_id, None, Connection="close") as wire:
        data = read_until(wire, HELLO)
        for n, name in enumerate(FOUR, 1):
            assert f"event: {name}\n".encode() not in data.split(b"id: 2\n")[-1], "it waits for its gate"
            bench.aura.signal(f"go-{n}", bench.run_id)
            data += read_until(wire, b"id: %d\n\n" % n)
            assert f"event: {name}\n".encode() in data
        assert DONE in data + read_until(wire, None)
    assert ending(bench.aura, bench.run_id) == ("server", "end")

@effect("drop-mid-event")
def _(bench):
    seen = bench.see()
    assert seen.ended == "drop" and seen.names == PHASE2[:2]
    assert re.search(rb'\n\nevent: step\ndata: {"[^\n]*$', seen.body)
    later = bench.see(Last_Event_ID="8")
    assert re.search(rb'\n\nevent: completed\ndata: {"[^\n]*$', later.body), "half the next one, not the third for ever"
    assert bench.see(Last_Event_ID="9").body.endswith(b"\nid: 11\n\n"), "and where there is no next one, none"

@effect("drop-resume")
def _(bench):
    first, second = bench.see(), bench.see(Last_Event_ID="2")
    assert (first.ended, second.ended) == ("drop", "end")
    assert [id for id, _, _ in first.events + second.events] == [str(n) for n in range(1, 12)]
    assert (second.entry.last_event_id, second.entry.resumed_after, first.entry.end.step) == ("2", 2, 2)
    assert second.entry.last_id_sent == 11

@effect("slow-headers", "slow-stream")
def _(bench):
    before = bench.aura._ask("GET", "/__aura/health").clock.now
    whole(bench.see(), PHASE2)
    took = bench.aura._ask("GET", "/__aura/health").clock.now - before
    assert took >= {"slow-headers": 8, "slow-stream": 20}[bench.name]

@effect("heartbeat-then-silence")
def _(bench):
    seen = bench.see(until=(INTERVAL, 3))
    assert seen.body == HELLO + INTERVAL * 3
    assert (seen.entry.end.by, seen.entry.end.how) == ("client", "disconnect")

@effect("crlf", "cr-only", "bom")
def _(bench):
    seen, plain = bench.see(), Bench(bench.aura, "ok").see()
    newline, first = {"crlf": (b"\r\n", b""), "cr-only": (b"\r", b""), "bom": (b"\n", b"\xef\xbb\xbf")}[bench.name]
    assert seen.body.startswith(first + b": connected" + newline * 2)
    assert seen.body.endswith(b"data: [DONE]" + newline * 2)
    assert len(re.findall(rb"\r\n|\r|\n", seen.body)) == seen.body.count(newline), "no other line ends"
    assert [event[:2] for event in seen.events] == [event[:2] for event in plain.events]

@effect("resume-unknown-id")
def _(bench):
    assert bench.see().ended == "drop"
    seen = bench.see(Last_Event_ID="opaque:2")
    assert seen.entry.resumed_after == 0 and "Last-Event-ID is no event" in seen.entry.said
    assert [id for id, _, _ in seen.events] == [f"opaque:{n}" for n in range(1, 12)]

@effect("resume-gap")
def _(bench):
    first, second = bench.see(), bench.see(Last_Event_ID="2")
    assert (first.ended, first.names) == ("drop", FOUR[:2])
    assert [event[:2] for event in second.events] == [("3", "gap"), ("4", "completed")]
    assert data_of(second, "gap") == [{"from": 3, "to": 3}]

@effect("two-subscribers")
def _(bench):
    asked = partial(watch, bench.aura, bench.run_id, None, Connection="close")
    with asked() as one, asked() as two:
        both = [Seen(wire).events for wire in (one, two)]
    taken = sorted(int(id) for events in both for id, _, _ in events)
    assert taken == list(range(1, 12)), "each event went to one of them, none to both"

@effect("slow-trigger", "trigger-503", "trigger-lost", "trigger-disabled")
def _(bench):
    """The trigger itself goes wrong, so here it is asked by hand."""
    body, answers = json.dumps({"runId": bench.run_id, "scenario": bench.name}).encode(), []
    for _ in range(2):
        asked = posted(body).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        with connect(bench.aura, asked) as wire:
            answers.append(Seen(wire))
    first, second = bench.aura.journal(bench.run_id, kind="trigger", count=2, within=WAIT)
    assert (first.attempt, second.attempt) == (1, 2)
    ends, runs, text = {
        "slow-trigger": ([(202, "end"), (202, "end")], ["started", "known"], b"ACCEPTED"),
        "trigger-lost": ([(0, "reset"), (202, "end")], [None, "known"], b""),
        "trigger-503": ([(503, "end"), (503, "end")], [None, None], b"unavailable"),
        "trigger-disabled": ([(200, "end"), (200, "end")], [None, None], b"disabled"),
    }[bench.name]
    assert [(one.status, one.ended) for one in answers] == ends and text in answers[0].body
    assert [one.headers.get("x-aura-run") for one in answers] == runs
    starts = contextlib.nullcontext() if "known" in runs else pytest.raises(RuntimeError, match="404")
    with starts:
        bench.aura._ask("GET", f"/__aura/runs/{bench.run_id}")

@pytest.mark.parametrize("name", CATALOGUE)
def test_every_scenario_has_its_effect(name, jumping):
    """On a real socket, byte for byte where it is about bytes, and what the journal says of it."""
    EFFECTS[name](Bench(jumping, name))

@pytest.mark.parametrize("name", CATALOGUE)
def test_above_part_3_every_scenario_has_its_effect_too(name, half):
    """On connections as Hypercorn makes them."""
    EFFECTS[name](Bench(half, name))

# ═══ The page ═══════════════════════════════════════════════════════════════════════════════════

class Live:
    """The live page in the browser, and the hands of somebody who uses it."""

    def __init__(self, browser, aura):
        self._browser = browser
        browser.open("about:blank")
        browser.logged()
        browser.open(f"{aura.url}/#waits=0.01")
        self.url = aura.url

    def start(self, scenario="", phase="phase2"):
        self.until(f"[...$('scenario').options].some((one) => one.value === '{scenario}')")
        self.run(f"$('scenario').value = '{scenario}'; $('phase').value = '{phase}'; $('start').click();")

    def run(self, script, *arguments):
        return self._browser.run(script, *arguments)

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

def of_ones_own(folder, *scenarios):
    """A file of these scenarios."""
    (folder / "own.json").write_text(json.dumps([{"doc": "odd", **one} for one in scenarios]))
    return str(folder / "own.json")

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
    with running(event_delay=0.005 if phase == "job" else 0.04) as aura:
        live = Live(browser, aura)
        live.start("" if phase == "job" else "ok", phase)
        assert live.over() == f"Ended with completed after {count} events."
        rows, facts = live.rows(), live.text("facts")
        assert len(rows) == count and rows[-1][1] == "completed" and live.run("return $('progress').value") == 100
        assert all(re.fullmatch(r"\d+\.\d\d s \+\d+\.\d\d s", f"{at} {after}") for _, _, at, after, _ in rows)
        arrivals = int(re.search(r"in (\d+) arrival", facts)[1])
        bars = live.run("return $('bars').getAttribute('d').split('M').length - 1")
        assert arrivals > count / 2 and bars >= arrivals - 1
        assert live.text("said").startswith("the server ended the answer properly") and live.complaints() == []
        assert "connection" not in facts and "attempt 1," in facts

@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (420, "dark"), (1280, "dark")])
def test_the_page_needs_no_sideways_scroll(browser, width, scheme):
    with running(event_delay=0) as aura, browser.looks_like(width, scheme):
        live = Live(browser, aura)
        looks = f"return [innerWidth, matchMedia('(prefers-color-scheme: {scheme})').matches]"
        assert live.run(looks) == [width, True]
        live.start("big-event")
        assert live.over().startswith("Ended with completed")
        live.until("$('tree').textContent.includes('nursery runs')")
        assert live.run("return document.documentElement.scrollWidth <= innerWidth")

def test_the_page_comes_back_to_a_stream_that_breaks_and_sees_each_event_once(browser, tmp_path, usual_cuts):
    """Also over an event without an id, and whatever somebody called his scenario."""
    forgetful = {"name": "forgetful", "stream": [
        [{"comment": "connected"}, {"relay": 2}, {"sleep": 0.1}, "drop"],
        [{"comment": "connected"}, {"event": {"event": "step", "data": 0}}, {"sleep": 0.1}, "drop"],
        [{"relay": "all"}, {"raw": "data: [DONE]\n\n"}]]}
    with running(event_delay=0.01, scenarios=of_ones_own(tmp_path, forgetful)) as aura:
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
        live.start("forgetful")
        live.until("run?.finished && $('state').innerText === 'Ended with completed after 12 events.'")
        assert [one.last_event_id for one in aura.journal(live.run("return run.id"))] == [None, "2", "2"]

@pytest.mark.long
def test_nothing_a_stream_says_stops_the_page(browser, tmp_path):
    """`retry: 0`, percents that are no numbers, many comments, Korean ids; no ids, and beats, are no news."""
    hello, rest, pause = {"comment": "connected"}, {"relay": "all"}, {"sleep": 0.1}
    step = [{"event": {"event": "step", "data": {"percent": percent}}} for percent in ("half", {}, 1e308, 40)]
    beat, over = {"raw": "event: heartbeat\ndata: {}\n\n"}, {"event": {"event": "completed", "data": {}}}
    named = {"frame": {"id": "작업_{n}"}}
    own = of_ones_own(
        tmp_path,
        {"name": "retry-0", "stream": [[hello, {"relay": 2}, {"raw": "retry: 0\n\n"}, pause, "drop"], [hello, rest]]},
        {"name": "percents", "run": [*step, over]}, {"name": "comments", "stream": [{"raw": ":\n" * 200_000}, rest]},
        {"name": "korean-ids", "stream": [[named, hello, {"relay": 2}, pause, "drop"], [named, hello, rest]]},
        {"name": "no-ids", "stream": [{"frame": {"id": None}}, hello, {"relay": 2}, beat, pause, "drop"]},
        {"name": "beats-only", "stream": [hello, beat, pause, "drop"]})
    with running(event_delay=0, max_retries=2, scenarios=own) as aura:
        live = Live(browser, aura)
        gives_up = "The connection broke, and all 2 tries are used up."
        for name, said, ids in (
            ("retry-0", "Ended with completed after 11 events.", [None, "2"]),
            ("percents", "Ended with completed after 5 events.", [None]),
            ("comments", "Ended with completed after 11 events.", [None]),
            ("korean-ids", "Ended with completed after 11 events.", [None, "작업_2"]),
            ("no-ids", gives_up, [None] * 3), ("beats-only", gives_up, [None] * 3),
        ):
            live.start(name)
            live.until(f"run?.id && run.finished && $('state').innerText.startsWith({json.dumps(said)})")
            entries = aura.journal(live.run("return run.id"), count=len(ids), within=WAIT)
            assert [entry.last_event_id for entry in entries] == ids, name
            if said != gives_up:
                live.until(f"$('events').children.length === {said.split()[4]} && $('progress').value === 100")
        assert live.run("return pauseOf(1e9)") <= 66 and live.complaints() == []

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
            assert set(live.run(graded, seen)) == {grade}

def test_to_cancel_on_the_page_ends_one_branch_of_the_tree(browser):
    with running() as aura:
        other = aura.trigger("1", scenario="silent")
        live = Live(browser, aura)
        live.start("silent")
        live.until("/delivery page-[^]*analysis page-/.test($('tree').innerText)")
        live.run("$('cancel').click()")
        assert live.over() == "Ended with failed after 1 event; you asked to cancel the run."
        live.until(f"!$('tree').innerText.includes('{live.run('return run.id')}')")
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
    own = of_ones_own(tmp_path, {
        "name": "hostile", "doc": bad, "run": [{"event": {"event": bad, "data": {"percent": bad, "증거": bad}}}],
        "stream": [{"frame": {"id": bad}}, {"relay": "all"}, {"event": {"event": "completed", "data": bad}}]})
    with running(scenarios=own) as aura:
        live = Live(browser, aura)
        live.run(f"$('case').value = '{bad}'")
        live.start("hostile")
        live.run("$('scenario').dispatchEvent(new Event('change'))")
        assert live.text("doc") == bad
        assert live.over() == "Ended with completed after 2 events." and live.rows()[0][:2] == [bad, bad]
        counted = "return [window.hit ?? 0, document.images.length, document.scripts.length]"
        assert live.run(counted) == [0, 0, 1]

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
        ):
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

# ═══ Serving ════════════════════════════════════════════════════════════════════════════════════

def test_running_serves_on_a_free_port_and_leaves_nothing_behind():
    threads, before = threading.active_count(), descriptors()
    with running(event_delay=0) as aura:
        assert aura.url == f"http://127.0.0.1:{aura.port}" and aura.port != 9000
        assert aura.trigger("85116", run_id="mine") == "mine" and len(parsed(stream(aura, "mine"))) == 11
        with pytest.raises(OSError) as error, running(port=aura.port):
            pass
        assert error.value.errno == errno.EADDRINUSE
    assert threading.active_count() <= threads
    eventually(lambda: descriptors() <= before)
    assert not reachable(aura.port)
    with running(port=aura.port) as again:
        assert again.port == aura.port
        again.stop()
        eventually(lambda: not reachable(again.port))
        again.stop()
    again.stop()  # from any thread, and more than once

def test_a_start_that_is_interrupted_leaves_no_thread_behind(tmp_path):
    """A Ctrl-C while the server still reads its scenarios, here from a pipe that another thread fills."""
    threads, slow = threading.active_count(), tmp_path / "slow.json"
    os.mkfifo(slow)

    def waits_for_the_start():
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        return "result" in {frame.name for frame in stack}

    def press():
        with slow.open("w") as pipe:  # it has begun to start
            eventually(waits_for_the_start)
            os.kill(os.getpid(), signal.SIGINT)
            pipe.write("[]")

    pressing = threading.Thread(target=press)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs this may ignore it
    try:
        pressing.start()
        with pytest.raises(KeyboardInterrupt), running(scenarios=str(slow)):
            time.sleep(WAIT)
        pressing.join()
    finally:
        signal.signal(signal.SIGINT, usual)
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

def a_program(code):
    """A Python program that can import the module."""
    return ran(sys.executable, "-W", "ignore", "-c", code, env={**os.environ, "PYTHONPATH": str(HERE)})

def test_a_process_forked_inside_unwinds_and_does_not_stop_its_parent_s_server():
    found = a_program(FORKING)
    assert (found.stdout, found.returncode) == ("unwound\n" * 2, 0), found.stderr

@pytest.mark.parametrize("way", ["stop", "cancel", "raises"])
async def test_serve_is_a_trio_task_that_stops_or_is_cancelled_and_blames_nobody_else(way, heard):
    """Also where an analysis raises as it is cancelled."""
    async def analysis(facts, sending):
        await sending.send(Event("a", {}))
        try:
            await trio.sleep_forever()
        finally:
            if way == "raises":
                raise ValueError("in the clean-up")

    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            aura = await nursery.start(partial(aura_stream.serve, Settings(port=0), analysis=analysis))
            run_id = await trio.to_thread.run_sync(aura.trigger, "1")
            wire = await trio.open_tcp_stream("127.0.0.1", aura.port)
            await wire.send_all(get(f"/aura/analysis-runs/{run_id}/stream"))
            data = b""
            while b"id: 1\n\n" not in data:
                data += await wire.receive_some()
            aura.stop() if way == "stop" else nursery.cancel_scope.cancel()
        await wire.aclose()
    ending = "server how=end" if way == "stop" else "shutdown how=cancelled"
    assert f"by={ending}" in heard.wait_for("stream closed", within=1)

ENDLESS = {"name": "endless", "run": says("a"), "stream": [{"relay": 1}, {"sleep": 1000}]}

def test_the_stop_ends_runs_then_streams_then_connections_and_cuts_what_will_not_end(heard):
    with running(grace=0.3) as aura:
        quiet, _ = open_quiet_stream(aura)
        endless = watch(aura, aura.trigger("1", run_id="endless", scenario=ENDLESS), b"id: 1\n\n")
        aura.stop()
        rest = read_until(quiet, None)
        assert b'"stage": "shutdown"' in rest and rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"0\r\n\r\n" not in read_until(endless, None)
        quiet.close()
        endless.close()
    assert "by=server how=end" in heard.wait_for("stream closed")
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed run_id=endless")
    heard.wait_for("INFO stopping: first nobody new, then the runs, then their streams", within=0)

def test_a_stalled_reader_holds_up_the_stop_no_longer_than_the_grace(heard):
    with running(grace=0.3, send_timeout=60) as aura:
        run_id = aura.trigger("1", scenario=FLOOD)
        wire = stalled(aura, f"/aura/analysis-runs/{run_id}/stream")
        eventually(still(aura))
        before = time.monotonic()
    assert time.monotonic() - before < 1.5
    assert "by=shutdown how=cancelled" in heard.wait_for("stream closed")
    wire.close()

MUCH = {
    "a long log": {"repeat": 20_000, "steps": [{"event": {"data": {"text": "x" * 60}}}]},
    "a big event": {"event": {"data": {}}, "pad": 5_000_000},
}

@pytest.mark.parametrize("said", MUCH)
def test_a_replay_waits_for_no_delayed_acknowledgement(said):
    """A receiver acknowledges at once what is more than one segment; a lone one that fills the sender's buffer,
    loopback's have 65483 bytes, waits for a timer of 40 ms: 17 000 events/s in place of 500 000. The best of some."""
    took = []
    with process("--log-level", "ERROR") as (_, aura):
        run_id = aura.trigger("1", scenario={"name": "much", "run": [MUCH[said]]})
        eventually(lambda: state(aura, run_id)["status"] == "completed")
        for _ in range(5):
            began, tail = time.monotonic(), b""
            with watch(aura, run_id, None) as wire:
                while b"[DONE]" not in tail:
                    tail = tail[-9:] + wire.recv(2**18)
                largest = struct.unpack_from("=8x4I", wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))[3]
            took.append(time.monotonic() - began)
    assert Settings().send_buffer // largest >= 4, f"the client's kernel met segments of {largest} bytes"
    assert min(took) < 0.5, "five times the slack; it was 1.2 s"

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_truthfully_and_the_exit_status_is_0(number):
    with process() as (server, aura):
        wire, _ = open_quiet_stream(aura)
        server.send_signal(number)
        rest = read_until(wire, None)
        assert b'"stage": "shutdown"' in rest and rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wire.close()
        out, log = server.communicate(timeout=WAIT)
        assert (server.returncode, out) == (0, ""), "stdout has the readiness line and nothing else"
        assert "stopping: first nobody new, then the runs, then their streams" in log and "Traceback" not in log

def test_a_second_signal_exits_at_once():
    with process("--grace", "1000") as (server, aura):
        wire = watch(aura, aura.trigger("1", scenario=ENDLESS), b"id: 1\n\n")
        server.send_signal(signal.SIGTERM)
        eventually(lambda: not reachable(aura.port))
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT) == 128 + signal.SIGTERM
        wire.close()

@pytest.mark.parametrize(("scenario", "last", "times"), [
    ("ok", DONE, 25), ("buffered-4k", DONE, 25), ("after-done", b"data:\n\ndata:\n\n", 25),
    ("dribble", b"]\r\n1\r\n\n", 5), ("generation", b"event: completed", 25),
])
def test_a_clean_end_is_never_blamed_on_the_client(scenario, last, times):
    """Whoever hangs up on reading the last words has got the end with them: it is one write."""
    with running(event_delay=0) as aura:
        for number in range(times):
            run_id = aura.trigger("1", run_id=f"r{number}", scenario=scenario)
            with watch(aura, run_id, None) as wire:
                assert read_until(wire, last).endswith(b"\r\n0\r\n\r\n")
        ends = {(one.end.by, one.end.how) for one in aura.journal(count=times, within=WAIT)}
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
            assert wire.recv(1) == b""
            assert time.monotonic() - began < 0.15, "where nothing was said nothing is waited for"

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
    ([{"chunk": 1}, {"raw": "x" * 1200}], "1.1"), ([{"chunk": 1}, {"raw": "x" * 1200}], "1.0"),
    ([{"chunk": "utf8"}, {"raw": "가" * 400}], "1.1"), ([{"chunk": "line"}, {"event": {"data": "a\n" * 400}}], "1.1"),
    ([{"chunk": 1000}, {"event": {"data": {}}, "pad": 200_000}], "1.1"),
    ([{"chunk": 1}, {"buffer": "all"}, {"comment": "y" * 900}], "1.1"),
    ([{"comment": "connected"}, {"chunk": 400}, {"raw": "x" * 50_000}], "restarted"),
])
def test_last_words_of_any_form_come_and_are_counted(stream, version, one_server):
    """Also before those of a restart, which come perhaps before them, and mostly between."""
    run_id = one_server.trigger("1", scenario={"name": "long", "stream": stream})
    with watch(one_server, run_id, None, version=version.replace("restarted", "1.1"), Connection="close") as wire:
        if version == "restarted":
            one_server._ask("POST", "/api/admin/sse/restart")
        seen = Seen(wire)
    entry = entry_of(one_server, run_id)
    assert entry.bytes == len(seen.body)
    if entry.end.by == "admin":
        assert version == "restarted" and seen.body.endswith(b"retry: 1000\n\n")
    else:
        assert (seen.ended, entry.end.by, entry.end.how) == ("end", "server", "end")

@pytest.mark.parametrize("rest", [[], [{"sleep": 1000}]])
@pytest.mark.parametrize("chunk", [[], [{"chunk": 1000}]])
def test_what_a_client_has_read_before_it_leaves_is_counted(rest, chunk, one_server):
    big = {"name": "big", "stream": [*chunk, {"event": {"data": {}}, "pad": 300_000}, *rest]}
    run_id = one_server.trigger("1", scenario=big)
    with watch(one_server, run_id, None) as wire:
        read_until(wire, b'x"}\n\n' if not chunk else b"}\n\n")
    entry = entry_of(one_server, run_id)
    assert (entry.events, entry.bytes) == (1, 300_019), entry.said

@pytest.mark.parametrize("second", [
    "POST /api/admin/sse/broadcast-reconnect", "DELETE /__aura/connections?how=end",
    "POST /api/admin/connections/reset"])
def test_two_operators_at_once_are_operators(second, heard, usual_cuts):
    with running() as aura:
        wire, run_id = open_quiet_stream(aura)
        aura._ask("POST", "/api/admin/sse/restart")
        aura._ask(*second.split())
        with wire:
            wire.settimeout(2)
            with contextlib.suppress(TimeoutError):
                assert b"retry: 1000\n\n" in read_until(wire, b"0\r\n\r\n" if "end" in second else None)
        assert ending(aura, run_id) == ("admin", "end" if "end" in second else "drop")
    assert "Error in ASGI" not in heard.all()

def test_a_scripted_drop_gives_way_to_an_operator_s_end(usual_cuts):
    with running() as aura:
        run_id = aura.trigger("1", scenario={"name": "d", "stream": [{"comment": "connected"}, "drop"]})
        with watch(aura, run_id, Connection="close") as wire:
            aura._ask("DELETE", "/__aura/connections?how=end")
            assert read_until(wire, None).endswith(b"0\r\n\r\n")
        assert ending(aura, run_id) == ("admin", "end")

@pytest.mark.parametrize("how", ["end", "drop", "reset"])
def test_an_operator_closes_what_is_open_wherever_it_is(how):
    """In a relay, a sleep, at a gate, hanging, between slow chunks: closed in the way that was asked."""
    waits = ({"relay": "all"}, {"sleep": 1000}, {"wait": "never"}, "hang", {"relay": "all", "every": 1000})
    with running(event_delay=0) as aura, contextlib.ExitStack() as wires:
        run_id, opened = aura.trigger("1", scenario={"name": "quiet", "run": [*says("a", "b"), "hang"]}), []
        for number, step in enumerate(waits):
            own = json.dumps({"name": f"w{number}", "stream": [{"comment": "connected"}, step]})
            opened.append(wires.enter_context(watch(aura, run_id, X_Aura_Scenario=own, Connection="close")))
        listed = aura._ask("GET", "/__aura/connections").connections
        assert len(listed) == len(waits) and all(one.end is None for one in listed)
        assert aura._ask("DELETE", f"/__aura/connections/{listed[0].id}?how={how}").closed == 1
        assert aura._ask("DELETE", f"/__aura/connections?how={how}").closed in (len(waits) - 1, len(waits))
        for wire in opened:
            data, found = b"", how
            try:
                data = read_until(wire, None)
                found = "end" if data.endswith(b"0\r\n\r\n") else "drop"
            except ConnectionResetError:
                found = "reset"
            assert found == how
        entries = aura.journal(run_id, count=len(waits), within=WAIT)
        assert {(one.end.by, one.end.how) for one in entries} == {("admin", how)}
        said_so = {"end": "ended the stream", "drop": "dropped the connection", "reset": "reset the connection"}[how]
        assert all(one.said.startswith(f"an operator {said_so}") for one in entries)
        assert state(aura, run_id)["status"] == "running" and aura._ask("GET", "/health").sse_connections == 0

def test_who_is_stalled_when_an_operator_ends_all_streams_is_named():
    """The end never reached this viewer: it was cut off at the send deadline, and that is what happened."""
    with running(send_timeout=0.5) as aura:
        run_id = aura.trigger("1", scenario=FLOOD)
        with stalled(aura, f"/aura/analysis-runs/{run_id}/stream"):
            eventually(still(aura))
            assert aura._ask("POST", "/api/admin/sse/restart").closed == 1
            assert ending(aura, run_id) == ("client", "stalled")

def test_an_operator_s_end_is_heeded_between_slow_pieces():
    slow = {"name": "slow", "stream": [{"chunk": 1, "every": 100}, {"raw": "data: hello\n\n"}]}
    with running() as aura, watch(aura, aura.trigger("1", scenario=slow), None, Connection="close") as wire:
        data = read_until(wire, b"1\r\nd\r\n")
        aura._ask("DELETE", "/__aura/connections?how=end")
        data += read_until(wire, None)
    assert dechunked(data.partition(b"\r\n\r\n")[2]) == ([b"d", b"ata: hello\n\n"], True), "what was held comes first"

@pytest.mark.parametrize(("steps", "end"), [
    (["open", {"heartbeat": 0.3}, {"sleep": 1000}], None), (["open", {"heartbeat": 0.3}, {"sleep": 0.2}, "drop"], None),
    (["open", {"wait": "go"}, {"raw": "bye"}], ("client", "disconnect", 0)),
])
def test_who_is_far_ahead_and_leaves_or_loses_its_connection_leaves_nothing_behind(steps, end):
    """And where nothing is written that could fail, its leaving is seen behind all that it has sent."""
    with running() as aura:
        before, run_id = descriptors(), aura.trigger("1", scenario={"name": "lost", "stream": steps})
        with watch(aura, run_id, b"\r\n\r\n") as wire:
            wire.settimeout(0.5 if end is None else WAIT)
            with contextlib.suppress(OSError):
                wire.sendall(get("/health") * 4000)
        entry = entry_of(aura, run_id)
        assert end in (None, (entry.end.by, entry.end.how, entry.bytes))
        eventually(lambda: descriptors() <= before)

def test_under_jumping_time_the_streams_end_by_themselves_at_the_stop():
    slow = {"name": "slow", "stream": [{"relay": "all", "every": 100}, {"raw": DONE.decode()}]}
    with running(speed="max", event_delay=0) as aura:
        wire = watch(aura, aura.trigger("1", scenario=slow), b"id: 1\n")
        began = time.monotonic()
    assert time.monotonic() - began < 4, "a grace of 5 s and it did not need it"
    with wire:
        assert dechunked(read_until(wire, None))[1]

def test_an_operator_may_close_everything_while_a_refusal_is_stuck():
    with running(grace=0.3) as aura, stalled(aura, "/aura/analysis-runs/none/stream", 4096) as wire:
        wire.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            wire.sendall(get("/aura/analysis-runs/none/stream") * 5000)
        assert aura._ask("DELETE", "/__aura/connections?how=reset").how == "reset"

@pytest.mark.parametrize("stream", [
    [{"open": {"status": 204}}, *[{"event": {"data": {}}, "pad": 8_000_000}] * 40],
    [{"event": {"data": {}}, "pad": 8_000_000}] * 40, [{"chunk": 1}, {"event": {"data": {}}, "pad": 5_000_000}],
])
def test_no_script_holds_up_the_others(stream):
    """Steps that take long and never wait: to nobody, to a viewer that has left, in five million pieces."""
    with running() as aura:
        with watch(aura, aura.trigger("1", scenario={"name": "heavy", "stream": stream}), b"\r\n"):
            pass
        began = time.monotonic()
        assert httpx.get(f"{aura.url}/health", timeout=WAIT).status_code == 200
        assert time.monotonic() - began < 1.5

def test_four_runs_that_say_big_things_hold_nobody_up():
    """100 ms are promised; five times the slack."""
    step = {"event": {"event": "big", "data": {"n": "{n}"}}, "pad": 8_000_000}
    with running() as aura:
        for number in range(4):
            run = [{"repeat": 1000, "steps": [step]}]
            aura.trigger("1", run_id=f"r{number}", scenario={"name": "big", "run": run})
        waits = []
        for _ in range(10):
            began = time.monotonic()
            assert httpx.get(f"{aura.url}/health", timeout=WAIT).json()["runs"] == 4
            waits.append(time.monotonic() - began)
    assert max(waits) < 0.5

def test_the_task_tree_shows_who_is_inside_whom():
    with running() as aura, watch(aura, aura.trigger("1", scenario="stepped", run_id="r1")):
        tree = httpx.get(f"{aura.url}/__aura/tasks").text
    depth = {}
    for line in tree.splitlines():
        depth.setdefault(re.sub(r"( \(id \d+\))?  <- .*", "", line.strip()), len(line) - len(line.lstrip()))
    for names in (
        ["nursery connections", "connection", "delivery r1"], ["nursery runs", "run r1", "analysis r1"],
        ["nursery runs", "accept"], ["nursery clocks", "nursery connections", "nursery runs", "nursery accept"],
    ):
        depths = [depth[name] for name in names]
        assert depths == sorted(set(depths)), tree
    assert "nursery of conduct\n" in tree and "nursery nursery" not in tree and tree.startswith("serve\n")
    assert re.search(r"delivery r1 \(id \d+\)  <- Delivery.follow\n", tree)
    assert "analysis r1  <- Gates.wait\n" in tree and "run r1  <- Run.transcribe\n" in tree

def test_the_task_tree_of_a_process_has_the_names_of_the_file():
    with process("--log-level", "ERROR") as (_, aura):
        lines = httpx.get(f"{aura.url}/__aura/tasks").text.splitlines()
    first = [line.strip() for line in lines[:3]]
    assert first == ["serve_until_signalled", "nursery of serve_until_signalled", "serve"]
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
    with (running(scenario="drop", speed=10) as one, running(speed="max") as two,
          running(Settings(port=0), speed=2.5) as three):
        one.next("bom")
        run_ids = [aura.trigger("1", run_id="same") for aura in (one, two, three)]
        assert run_ids == ["same"] * 3 and len({one.port, two.port, three.port}) == 3
        scenarios = [aura.journal("same", kind="trigger", count=1)[0].scenario for aura in (one, two, three)]
        modes = [aura._ask("GET", "/__aura/health").clock.mode for aura in (one, two, three)]
        assert (scenarios, modes) == (["bom", "ok", "ok"], ["x10", "max", "x2.5"])
        own = one.trigger("1")
        assert httpx.get(f"{two.url}/aura/analysis-runs/{own}/stream", headers=BEARER).status_code == 404

def test_three_hundred_seconds_take_milliseconds_and_nothing_real_moves_or_holds_them_up():
    """Neither an idle connection's deadline; nor a byte of what is no request yet, every 8 ms, which made 0.2 s 21."""
    with running(speed="max", send_timeout=3, keep_alive=3) as aura, connect(aura) as idle, connect(aura) as wire:
        over = threading.Event()

        def trickle():
            wire.send(b"GET /")
            while not over.wait(0.008):
                wire.send(b"a")

        trickler = threading.Thread(target=trickle)
        trickler.start()
        began = time.monotonic()
        try:
            names = [name for _, name, _ in parsed(stream(aura, aura.trigger("1", scenario="silent")))]
            assert stream(aura, aura.trigger("1", scenario="slow-run")).count(b"event: step") == 7
        finally:
            over.set()
            trickler.join()
        assert names == ["failed"] and time.monotonic() - began < 2.5
        idle.sendall(get("/health"))
        assert read_until(idle, b"\r\n\r\n").startswith(b"HTTP/1.1 200"), "the idle connection is still there"

def test_the_clock_can_be_moved_by_hand():
    with running() as aura:
        with watch(aura, aura.trigger("1", scenario="slow-first")) as wire:
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
        assert [aura.trigger("7", scenario=None) and aura.journal(kind="trigger")[-1].scenario
            for _ in range(2)] == ["failed"] * 2
        (entry,) = aura.journal(run_id, count=1)
        assert (entry.end.by, entry.last_id_sent, entry.t.first_byte >= entry.t.open) == ("server", 5, True)
        with pytest.raises(RuntimeError, match="POST /__aura/next was answered 400: .*unknown scenario"):
            aura.next("dorp")
        with pytest.raises(RuntimeError, match="was answered 408: .*0 of 1 finished entries"):
            aura.journal("nobody", count=1, within=0.01)
        aura.reset()
        assert aura.journal(kind=None) == []

def test_the_handle_says_what_went_wrong(one_server):
    aura = one_server
    assert aura.trigger(85116, run_id="r") == "r", "a back end's ids are numbers"
    with pytest.raises(RuntimeError, match="answered without a runId: .*disabled"):
        aura.trigger("1", scenario="trigger-disabled")
    with pytest.raises(RuntimeError, match="422"):
        aura.trigger("1", scenario={"name": "BAD"})
    with pytest.raises(RuntimeError, match="was answered 400: .*unknown scenario.*dorp.*drop"):
        aura.trigger("1", scenario="dorp")
    for fields, sentence in (({"heartbeat": "x"}, "'--heartbeat' takes a number, not \"x\""),
                             ({"scenario": "dorp"}, f"--scenario: {NO_DORP}")):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"), running(**fields):
            pass
    with pytest.raises(RuntimeError, match="was answered 408: ") as error:
        aura.journal("r", kind=None, count=2, within=0.01)
    assert len(str(error.value)) < 1100

def test_a_crash_of_the_server_does_not_hide_what_the_test_found():
    async def analyse(facts, sending):
        raise KeyboardInterrupt("now")

    def crashed(*found):
        with running(analysis=analyse) as aura:
            with contextlib.suppress(Exception):
                aura.trigger("1", run_id="r")
                stream(aura, "r")
            for one in found:
                raise one

    with pytest.raises(KeyboardInterrupt, match="now"):
        crashed()
    with pytest.raises(AssertionError, match="found") as error:
        crashed(AssertionError("found"))
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
unittest.main()
"""

def test_it_can_be_embedded_in_unittest_asyncio_and_trio():
    found = a_program(UNITTEST)
    assert found.returncode == 0 and "Ran 3 tests" in found.stderr, found.stderr

def test_scenarios_of_one_s_own_join_the_catalogue(tmp_path):
    path = of_ones_own(tmp_path, {"name": "mine", "doc": "the symptom", "stream": ["drop"]},
                       {"name": "ok", "doc": "not so ok", "run": []})
    with running(scenarios=path, scenario="mine") as aura:
        assert (aura.scenarios()["mine"], aura.scenarios()["ok"]) == ("the symptom", "not so ok")
        with pytest.raises(httpx.RemoteProtocolError):
            stream(aura, aura.trigger("1"))
    for text, sentence in (
        ("{", "own.json: Expecting property name"), ('{"name": "a", "run": []}', "in a catalogue needs 'doc'"),
        ('[{"name": "a", "doc": "d", "run": ["slep"]}]', "run[0]: unknown step 'slep'"), ("[" * 100_000, "own.json: "),
    ):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(sentence)), running(scenarios=path):
            pass
    with pytest.raises(ValueError, match="No such file"), running(scenarios=str(tmp_path / "none.json")):
        pass

def test_hostile_scripts_are_bounded():
    """Events of five megabytes without end, also to a viewer that reads nothing: memory stays."""
    import resource

    big = {"event": {"event": "big", "data": {"n": "{n}"}}, "pad": 5_000_000}
    with running(send_timeout=0.5, max_run_bytes=6 * 2**20) as aura:
        run_id = aura.trigger("1", scenario={"name": "big", "run": [{"repeat": 8, "steps": [big]}]})
        viewer = json.dumps({"name": "v", "stream": [{"buffer": "all"}, {"repeat": 8, "steps": [big]}]})
        with watch(aura, run_id, None, X_Aura_Scenario=viewer):
            assert ending(aura, run_id) == ("client", "stalled")
        assert "the buffer was full" in entry_of(aura, run_id).said
        eventually(lambda: state(aura, run_id)["status"] == "completed")
        assert stream(aura, run_id).count(b"\nevent: big\n") == 1, "the log kept 6 MiB of them, and says `gap`"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1_500_000, "kilobytes"

# What a random script may be made of: times are short, repeats few, or one example would take all day.
A_TIME = st.one_of(st.integers(0, 400), st.just([1, 90]))
A_NAME = st.sampled_from(["a", "step", "completed", "x{n}"])
SOME_DATA = st.sampled_from(["t\nu", {"k": "위{n}"}, 1])
AN_EVENT = st.fixed_dictionaries({"event": st.fixed_dictionaries({"event": A_NAME, "data": SOME_DATA})})
WRONG_STEP = st.sampled_from(
    ["slep", {"sleep": -1}, {"relay": "some"}, {"sleep": 1, "drop": None}, {}, 5, {"open": {"status": 99}}])
PAUSES = [st.builds(lambda t: {"sleep": t}, A_TIME), st.builds(lambda t: {"wait": "g", "within": t}, A_TIME)]
RUN_STEPS = st.one_of(AN_EVENT, AN_EVENT, *PAUSES,
    st.sampled_from(["hang", {"fail": "no"}, {"crash": "no"}, "ordinary"]))
ANSWERS = st.sampled_from(["end", "drop", "reset", {"raw": "data: x\n\n"}, {"raw": {"hex": "00ff"}}])
TRIGGER_STEPS = st.one_of(*PAUSES, ANSWERS, st.sampled_from([{"open": {"status": 202}}, {"open": {"status": 503}}]))
STREAM_STEPS = st.one_of(
    AN_EVENT, *PAUSES, st.just("hang"), ANSWERS,
    st.sampled_from([{"relay": "all"}, {"relay": 2}, {"relay": {"until": "completed"}}, {"relay": "all", "every": 3},
                     {"relay": "all", "within": 20}, {"relay": 3, "shared": True}]),
    st.sampled_from([{"comment": "c"}, "heartbeat", {"heartbeat": 7}, {"heartbeat": "never"}, "flush",
                     {"heartbeat": {"every": 9, "event": "h"}}]),
    st.sampled_from([{"chunk": 1}, {"chunk": "utf8"}, {"chunk": 50, "every": 1}, {"buffer": 64}, {"buffer": "all"}]),
    st.sampled_from([{"frame": {"newline": "\r"}}, {"frame": {"id": "x{n}"}}, {"frame": {"wrap": "data:"}}]),
)

def a_script(steps):
    looped = st.builds(lambda n, inner: {"repeat": n, "steps": inner}, st.integers(0, 3), st.lists(steps, max_size=3))
    return st.lists(st.one_of(steps, steps, steps, looped), max_size=6)

A_STREAM = a_script(STREAM_STEPS)
A_SCENARIO = st.fixed_dictionaries({"name": st.just("random")}, optional={
    "run": a_script(RUN_STEPS), "trigger": a_script(TRIGGER_STEPS),
    "stream": st.one_of(A_STREAM, st.lists(A_STREAM, min_size=1, max_size=3),
                        st.builds(lambda one: {"cycle": one}, st.lists(A_STREAM, min_size=1, max_size=2)),
                        st.builds(lambda one, wrong: [*one, wrong], A_STREAM, WRONG_STEP)),
})

def until_quiet(wire):
    """Read until the other side is done, or has nothing to say; then this side leaves."""
    with wire:
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
            assert checked.status_code == 422 and len(answer["hint"]) > 10
            assert re.match(r"(run|trigger|stream)", answer["at"])
            return
        run_id, began = f"p{time.monotonic_ns()}", jumping._ask("GET", "/__aura/health").clock.now
        until_quiet(connect(jumping, posted(json.dumps({"runId": run_id, "scenario": wanted}).encode())))
        for _ in range(2):
            until_quiet(watch(jumping, run_id, None, Connection="close"))
        ends = [one.end for one in jumping.journal(run_id, kind=None, count=3, within=WAIT)]
        assert all((end.by, end.how) in aura_stream.ACTS for end in ends), ends
        assert {end.by for end in ends} <= {"server", "client"}
        assert jumping._ask("GET", "/__aura/health").clock.now - began < 50_000
        jumping.reset()

    play()
    eventually(lambda: tasks() <= before)
    eventually(lambda: descriptors() <= files)

# ═══ Diagnosis ══════════════════════════════════════════════════════════════════════════════════

NAMED_ALIKE = (
    "no-terminal empty after-done slow-headers slow-stream idle-cut no-heartbeat bom double-wrapped bad-json "
    "slow-trigger duplicate-run")
DIAGNOSES = {name: name for name in NAMED_ALIKE.split()} | {name: verdict for verdict, names in {
    "healthy": "ok phase3 generation slow-first slow-run stepped flood big-event korean retry-field",
    "failed": "failed crash silent", "off-contract": "progress-regress missing-started unknown-events",
    "cut": "empty-truncated first-chunk-then-drop drop drop-mid-event drop-resume always-drop reset",
    "no-answer": "no-response trigger-lost", "no-events": "first-chunk-then-close done-only",
    "no-done": "no-done unterminated-last-event", "invented": "fallback-completed",
    "dead": "heartbeat-then-silence", "time-limit": "gateway-timeout",
    "buffered": "buffered buffered-4k coalesced", "shredded": "dribble split-utf8 mid-line",
    "line-ends": "crlf cr-only", "doubled": "gateway-ids resume-unknown-id",
    "out-of-order": "duplicate-events out-of-order", "unauthorized": "unauthorized forbidden",
    "refused": "rate-limited", "unavailable": "unavailable refuse-3-then-ok trigger-503", "gone": "gone-204",
    "not-a-stream": "html json-instead", "server-error": "sse-500",
    "not-found": "unknown-run unknown-run-404", "resume-refused": "expired-run other-worker",
    "gap": "resume-gap", "lost": "two-subscribers", "trigger-refused": "trigger-disabled",
}.items() for name in names.split()}
TAKE_LONG = ("generation slow-first slow-run silent fallback-completed slow-stream slow-headers idle-cut no-heartbeat"
             " heartbeat-then-silence gateway-timeout")

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
    "drop": "the server", "reset": "the server", "failed": "the analysis", "unauthorized": "the caller",
     "buffered": "a proxy on the way",
    "idle-cut": "a proxy on the way", "always-drop": "the server",
}

def test_every_ill_is_shown_by_a_scenario_or_a_test_of_its_own():
    own = {"compressed", "refused", "wrong-path", "bad-gateway", "hidden-cut", "not-utf8"}
    assert set(aura_stream.ILLS) == {*DIAGNOSES.values(), *own} - {"healthy"}

def diagnosed_by(url, rate=None, **more):
    """What the doctor says; by a clock so much faster than real time, if need be."""
    clock = rate and trio.testing.MockClock(rate=rate)
    return trio.run(partial(aura_stream.diagnose, url, **more), clock=clock)

def test_a_hundred_healthy_streams_raise_no_alarm():
    """Also with a run of another kind, big ones, late ones; beside each other on a busy machine."""
    names, found = ["ok", "phase3", "korean", "retry-field", "big-event"], []

    async def everybody(url):
        for first in range(0, 100, 25):
            cases = [f"{number}~{names[number % 4 if number else 4]}" for number in range(first, first + 25)]
            async with meanwhile(*(aura_stream.diagnose(url, case=case) for case in cases)) as some:
                pass
            found.extend(some)

    with running(event_delay=0.02) as aura:
        trio.run(everybody, aura.url)
    assert len(found) == 100 and [one["says"] for one in found if one["verdict"] != "healthy"] == []

def examined(answers, rate=100, **more):
    """The diagnosis of a server that gives these bytes, one answer to each request in turn."""
    with hostile(lambda number: answers[number : number + 1]) as port:
        return diagnosed_by(f"http://127.0.0.1:{port}/s", rate, **more)

def an_answer(body, *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: text/event-stream", *headers, "", ""]).encode() + body

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

STARTED_ONLY = b': connected\n\nid: 1\nevent: started\ndata: {"runId": "r"}\n\n'
FIRST = STARTED_ONLY[19:]  # without its id
ENDED_TOO = b'id: 2\nevent: completed\ndata: {"score": 1}\n\ndata: [DONE]\n\n'
GOODBYE = ENDED_TOO[5:]  # without its id
KOREAN = b"id: 2\nevent: step\ndata: " + '{"label": "증거"}\n\n'.encode("cp949")
BEFORE_FOUR = b"id: 3\ndata: one\ndata: [DONE]\ndata: two\n\nid: 4"

def in_turn(*bodies):
    return [an_answer(body) for body in bodies]

def broken_off(body, *then, size=500):
    return [an_answer(body, f"Content-Length: {size}"), *in_turn(*then)]

def status(text):
    return [an_answer(b"", status=text)]

WHOLE = [an_answer(STARTED_ONLY + ENDED_TOO)]

@pytest.mark.parametrize(("answers", "verdict", "said"), [
    (broken_off(STARTED_ONLY + ENDED_TOO, ENDED_TOO, size=len(STARTED_ONLY + ENDED_TOO)), "healthy", "2 events"),
    (broken_off(STARTED_ONLY, ENDED_TOO, size=len(STARTED_ONLY)), "no-done", "properly ended after started"),
    ([an_answer(gzip.compress(STARTED_ONLY + ENDED_TOO), "Content-Encoding: gzip")], "compressed", "gzip"),
    (status("404 Not Found"), "wrong-path", "404, text/event-stream, after "),
    (status("502 Bad Gateway"), "bad-gateway", "502, text/event-stream, after "),
    (status("504 Late"), "bad-gateway", "or wait longer"), (status("999 Denied"), "server-error", "999"),
    (status("307 Elsewhere"), "refused", "307"), (status("418 I'm a teapot"), "refused", "418"),
    (broken_off(STARTED_ONLY, b"id: 3" + GOODBYE), "lost", "whoever comes back after 1 misses 1 event"),
    (in_turn(b"id: 7\n" + FIRST + b"id: 8" + GOODBYE, b"id: 8" + GOODBYE), "healthy", "2 events"),
    (in_turn(b"id: 1\nevent: step\ndata: {\"percent\": NaN}\n\n" + ENDED_TOO, ENDED_TOO), "bad-json", "NaN"),
    (in_turn(b"id: 1\nevent: step\ndata: {\"percent\": 1" + b"0" * 400 + b"}\n\n" + FIRST, b""), "no-done", ""),
    ([*WHOLE, *status("204 No Content")], "resume-refused", "whoever comes back after 1: 204"),
    ([*WHOLE, b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\nlogin"], "resume-refused", "text/html: login"),
    ([*WHOLE, an_answer(ENDED_TOO, "Content-Length: 999")], "resume-refused", "closed without an end"),
    ([*WHOLE, b""], "resume-refused", "the connection was closed without an end"),
    (in_turn(STARTED_ONLY + b"id: 2\ndata: waiting for [DONE]\n\nid: 3\ndata:\n\nid: 4" + GOODBYE,
             b"id: 3\ndata:\n\nid: 4" + GOODBYE), "healthy", "4 events"),
    (in_turn(STARTED_ONLY + b"id: 2\nevent: note\ndata: [DONE]\n\n" + BEFORE_FOUR + GOODBYE, BEFORE_FOUR + GOODBYE),
     "off-contract", "nobody documented: note"),
    (in_turn(STARTED_ONLY + KOREAN + b"id: 3" + GOODBYE, KOREAN + b"id: 3" + GOODBYE), "not-utf8", "not in UTF-8"),
    (in_turn(b"\n" * 1_100_000), "no-events", "it said more than one can hear"),
    (broken_off(b"id: a\x0b1\nevent: started\ndata: {}\n\n", ENDED_TOO), "cut", "1 event"),
    (in_turn(b"id: started_2\n" + FIRST + b"id: step_1\nevent: step\ndata: {}\n\nid: end_2" + GOODBYE,
             b"id: step_1\nevent: step\ndata: {}\n\nid: end_2" + GOODBYE), "healthy", "3 events"),
    (in_turn(STARTED_ONLY + b"event: step\ndata: {}\n\n" * 2 + ENDED_TOO, ENDED_TOO), "lost", "misses 1 event"),
    (in_turn(STARTED_ONLY + b"id: 2\nevent: heartbeat\ndata: {}\n\nid: 3" + GOODBYE,
             b"id: 2\nevent: heartbeat\ndata: {}\n\nid: 3" + GOODBYE), "healthy", "3 events"),
    ([b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream-x\r\n\r\n"], "not-a-stream", "text/event-stream-x"),
    (in_turn(b"id: 1700000000123\n" + FIRST + b"id: 1700000000456" + GOODBYE, b"id: 1700000000456" + GOODBYE),
     "healthy", "2 events"),
    (in_turn(b"id: 1\nevent: step\ndata: " + b"[" * 100_000 + b"\n\n" + ENDED_TOO, ENDED_TOO),
     "bad-json", "the data of a step is no JSON"),
    ([b"SSH-2.0-OpenSSH_9\r\n"], "no-answer", "it is no HTTP"),
    (broken_off(STARTED_ONLY + ENDED_TOO[:40], ENDED_TOO), "cut", "1 event"),
    (in_turn(b"event: started\ndata: {}\n\nevent" + GOODBYE.removeprefix(b"\nevent"), b""), "healthy", "2 events"),
])
def test_the_doctor_examines_anybody_s_stream(answers, verdict, said):
    found = examined(answers)
    assert (found["verdict"], said in found["says"]) == (verdict, True), found

@pytest.mark.parametrize(("id", "why"), [
    (b"x" * 400, "after xxx"), (b"x" * 600, "not tried: no id"), (b"a\x0b1", "not tried: no id")])
def test_an_id_that_no_client_can_give_back_is_none(id, why):
    found = examined(broken_off(b"id: %b\nevent: started\ndata: {}\n\n" % id, ENDED_TOO, size=900))
    assert found["verdict"] == "cut" and found["answers"]["resume"].startswith(why), found

@pytest.mark.parametrize("where", [
    "@127.0.0.1:1/x", "http://127.0.0.1:1/x", ".evil.test/x", " ", 5, ["a"], {"a": 1}, None, "/x\ud800"])
def test_a_trigger_leads_the_doctor_to_no_other_host(where):
    """It would get the token. What is a path is asked for here; what is none is said to be none."""
    told = json.dumps({"runId": "r", "streamUrl": where}).encode()
    accepted = b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told)
    found = examined([accepted, *status("404 Not Found")], case="1")
    assert found["verdict"] in ("trigger-refused", "wrong-path"), found

def test_a_lying_journal_and_the_doctor_s_own_leaving_blame_nobody():
    headers = [f"X-Aura-{name}: {value}" for name, value in (("Run-ID", "r"), ("Attempt", "1"), ("Scenario", "ok"))]
    broken = an_answer(STARTED_ONLY, *headers, "Content-Length: 500")
    for entries in (
        '{"entries": [{"attempt": 1, "scenario": "ok", "end": "x", "said": 1}]}', '{"entries": 5}', "[]", "[" * 100_000,
        '{"entries": [5]}',
    ):
        found = examined([broken, an_answer(b"id: 2" + GOODBYE), b"HTTP/1.1 200 OK\r\n\r\n" + entries.encode()])
        assert (found["verdict"], found["ills"][0]["fault"]) == ("cut", "the server or a proxy on the way")
    with running() as aura:
        aura.trigger("1", run_id="r", scenario="heartbeat-then-silence")
        found = diagnosed_by(f"{aura.url}/aura/analysis-runs/r/stream", 1000)
    assert (found["verdict"], found["ills"][0]["fault"]) == ("dead", "the server or a proxy on the way")

HELLO_STEP, DONE_STEP = USUAL[0], USUAL[-1]

@pytest.mark.parametrize(("scenario", "rate", "limit", "verdict", "says"), [
    ({"stream": [[HELLO_STEP, {"relay": "all"}, DONE_STEP, "hang"], USUAL]}, 50, 60, "dead", ""),
    ({"stream": [{"comment": "c"}, {"relay": "all"}, "hang"]}, None, 0.5, "healthy", "it still went on"),
    ({"run": [*says("started"), "hang"]}, None, 0.3, "healthy",
     "nothing is wrong: it still went on when the time was over after 0.3 s and 1 event"),
    ({"stream": [[{"comment": "c"}, {"relay": 2}, "drop"], [{"open": {}}, "hang"]]}, None, 0.5, "cut", ""),
    ({"stream": [[HELLO_STEP, {"relay": "all"}, DONE_STEP], [{"open": {}}, "hang"]]}, 10, 3, "healthy", ""),
])
def test_a_stream_that_stays_open_is_dead_or_goes_on_and_loses_nothing_that_was_seen(
        scenario, rate, limit, verdict, says):
    with running(event_delay=0) as aura:
        aura.trigger("1", run_id="r", scenario={"name": "x", **scenario})
        began = time.monotonic()
        found = diagnosed_by(f"{aura.url}/aura/analysis-runs/r/stream", rate, limit=limit)
        assert found["verdict"] == verdict and says in found["says"] and time.monotonic() - began < 3

def test_the_limit_bounds_the_whole():
    """Somebody accepts and never answers, or answers a head and nothing more; or it is a journal that never answers."""
    left = threading.Event()
    for answer, verdict in ((b"", "no-answer"), (an_answer(b""), "dead"), (status("500 No")[0][:-2], "no-answer")):
        with hostile(lambda number, answer=answer: [answer, iter(left.wait, True)]) as port:
            assert diagnosed_by(f"http://127.0.0.1:{port}/s", 50, limit=5)["verdict"] == verdict
    answers = [an_answer(STARTED_ONLY + ENDED_TOO, *OURS), an_answer(ENDED_TOO), iter(left.wait, True)]
    began = time.monotonic()
    with hostile(lambda number: answers[number : number + 1]) as port:
        assert diagnosed_by(f"http://127.0.0.1:{port}/s", limit=1)["verdict"] == "healthy"
    left.set()
    assert time.monotonic() - began < 4

def test_a_server_that_is_slow_once_is_no_proxy_that_buffers():
    """Two seconds late, and then all at once, for the run was over: asked by itself, or met by chance in the first of
    two runs; and what was seen stands where no time is left to see it twice."""
    cold = {"name": "cold", "stream": [[{"sleep": 1.9}, *USUAL], USUAL]}
    with running(event_delay=0, speed="10") as aura:
        aura.trigger("1", run_id="r", scenario=cold)
        assert diagnosed_by(f"{aura.url}/aura/analysis-runs/r/stream", 10)["verdict"] == "healthy"
        aura.next(cold)
        assert diagnosed_by(aura.url, 10, case="1")["verdict"] == "healthy"
        assert len(aura.journal(kind="trigger")) == 3
        aura.next(cold, times=2)
        assert diagnosed_by(aura.url, 10, case="1")["verdict"] == "buffered", "late twice is late"
    with running(event_delay=0.06) as aura:
        found = diagnosed_by(aura.url, case="1~buffered", limit=1.1)
        assert (found["verdict"], len(aura.journal(kind="trigger"))) == ("buffered", 1)

@pytest.mark.parametrize("ends", ["\n", "\r", "\r\n"])
async def test_the_doctor_hears_the_same_wherever_a_stream_is_torn(ends):
    body = ("\ufeff: connected\n\nid: 1\nevent: started\ndata: {}\n\nretry: 5\ndata: 증거\ndata: 😀\n\nid: 2\n\n"
            "event: step\ndata: {\n\n: x\ndata: [DONE]\n\n: bye\n")
    whole = body.replace("\n", ends).encode()
    for piece in (*range(1, 5), len(whole)):
        seen = aura_stream.Visit("http://h/s", streams=True)
        for start in range(0, len(whole), piece):
            seen.listen(whole[start : start + piece])
        assert [one[2:] for one in seen.heard] == [event[1:] for event in heard_in(whole)]
        assert [one.id for one in seen.heard] == ["1", "", "", ""]
        assert (seen.size, seen.body) == (len(whole), whole)

def test_tens_of_megabytes_of_ordinary_text_are_heard_to_the_end():
    blocks = [b'id: %d\nevent: evidence\ndata: {"text": "%b"}\n\n' % (number, b"word " * 200_000)
              for number in range(2, 32)]
    end = b"id: 32" + GOODBYE
    found = examined(in_turn(b"".join([STARTED_ONLY, *blocks, end]), b"".join([*blocks[-4:], end])))
    assert found["verdict"] == "healthy" and " s and 32 events" in found["says"], found

TRIGGERED = b"HTTP/1.1 202 Accepted\r\n\r\n"
OURS = [f"X-Aura-{name}: 1" for name in ("Run-ID", "Attempt", "Scenario")]
IN_CHUNKS = an_answer(b"", "Transfer-Encoding: chunked")
WIDE = "😀".encode() + b"a" * (6 * 2**20 - 10_000)  # in memory, all of it is as wide as its widest

def numbered(block):
    """This block for ever, each time with numbers of its own."""
    for first in itertools.count(0, 1000):
        yield b"".join(block.replace(b"#", b"%d" % number) for number in range(first, first + 1000))

def again(piece):
    return itertools.repeat(piece * (2**18 // len(piece) + 1))

# What each of its answers is, by their number; how it is examined; the verdict, or what it is where time was over first
HOSTILE = {
    "CRs": (lambda n: [an_answer(b""), again(b"\r")], {}, "no-events line-ends"),
    "CRs to who comes back": (
        lambda n: [an_answer(b""), again(b"\r")] if n else [an_answer(STARTED_ONLY + ENDED_TOO, *OURS)], {}, "healthy"),
    "retry": (lambda n: [an_answer(b""), again(b"retry: 1\n")], {}, "no-events"),
    "names": (lambda n: [an_answer(b""), numbered(b"event: #%b\ndata: x\n\n" % ("😀" * 100).encode())],
              {"via": True}, "off-contract"),
    "ESC in an id": (lambda n: [an_answer(b"id: "), b"\x1b" * 59 * 2**20, b"\ndata: x\n\n"], {}, "no-events"),
    "an id of many digits": (
        lambda n: [an_answer(b"id: " + b"1" * 200_000 + b"_1\ndata: {}\n\ndata: [DONE]\n\n")], {}, "no-terminal"),
    "ids of many digits": (
        lambda n: [an_answer(b""), again(b"id: " + b"1" * 480 + b"_1\ndata: {}\n\n")], {}, "healthy"),
    "ids, two ways": (lambda n: [an_answer(b""), numbered(b"id: #\ndata: x\n\n")], {"via": True}, "healthy"),
    "a gzip bomb": (
        lambda n: [an_answer(gzip.compress(b"\r" * 2**24), "Content-Encoding: gzip")], {}, "compressed"),
    "JSON that unfolds": (
        lambda n: [an_answer(b""), again(b'event: step\ndata: {"a": [' + b'{"":0},' * 700_000 + b"0]}\n\n")],
        {}, "off-contract"),
    "wide text": (lambda n: [an_answer(b""), again(b"data: " + WIDE + b"\n\n")], {"via": True}, "healthy"),
    "single bytes": (lambda n: [IN_CHUNKS, again(b"1\r\nx\r\n")], {}, "shredded"),
    "blanks in a head": (lambda n: [b"HTTP/1.1 200 OK\r\nx:" + b" " * 60_000 + b"\0\r\n\r\n"], {}, "no-answer"),
    "blanks in a trailer": (lambda n: [IN_CHUNKS, b"0\r\nx:" + b" " * 60_000 + b"\0\r\n\r\n"], {}, "cut"),
    "some at each visit": (
        lambda n: [an_answer(b"id: %d\ndata: x\n\n" % n),
                   b"".join(itertools.islice(numbered(b"id: %d_#\ndata: x\n\n" % n), 60))], {}, "no-done healthy"),
    "a journal without end": (
        lambda n: [an_answer(STARTED_ONLY + ENDED_TOO if not n else ENDED_TOO, *OURS)] if n < 2 else [
            an_answer(b'{"entries": ['), again(b"[],")], {}, "healthy"),
    "a trigger without end": (lambda n: [TRIGGERED, b"{", again(b'"":0,')], {"case": "1"}, "trigger-refused"),
}

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

@on_linux
@pytest.mark.long
def test_whatever_a_server_sends_the_doctor_keeps_his_time_and_his_memory():
    """One process examines them all, so its greatest size is that of the worst."""
    wrong, command = {}, [sys.executable, "-c", EXAMINE_THEM]
    doctor = subprocess.Popen(command, cwd=HERE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError), doctor:  # it was killed, which is wrong enough
        late = threading.Timer(6 * WAIT, doctor.kill)
        late.start()
        for name, (script, more, verdict) in HOSTILE.items():
            with hostile(script) as port:
                url = f"http://127.0.0.1:{port}"
                asked = [url if "case" in more else f"{url}/s", {"via": f"{url}/via"} if "via" in more else more]
                print(json.dumps(asked), file=doctor.stdin, flush=True)
                found, took, peak = json.loads(doctor.stdout.readline() or '["it was killed", 0, 0]')
            if found not in verdict.split() or took > 5 * (1 + 2) or peak > 256:
                wrong[name] = f"{found} after {took:.1f} s, {peak:.0f} MB"
        late.cancel()
        doctor.stdin.close()
    assert wrong == {}

def test_a_port_where_nobody_listens_is_no_loss_of_what_the_other_way_said():
    with running(event_delay=0) as aura:
        found = diagnosed_by(aura.url, case="1", via=f"http://127.0.0.1:{free_port()}")
        assert (found["verdict"], found["ills"], found["via"]["verdict"]) == ("no-answer", [], "no-answer")
        assert "Connection refused; is it running, with http?" in found["says"]
        assert found["says"].endswith("start it, correct its address, or look for a crash in its log")
        found = diagnosed_by(aura.url, case="1", via=f"{aura.url}/nowhere")
        assert found["verdict"] == "wrong-path"
        assert found["says"].endswith("is at fault: correct the URL")
        with pytest.raises(OSError, match="cannot reach 127.0.0.1:.*; is it running, with https?"):
            diagnosed_by(aura.url.replace("http", "https") + "/s")
    for scheme in ("http", "https"):
        with pytest.raises(OSError, match=f"{aura.port}: Connection refused"):
            diagnosed_by(f"{scheme}://127.0.0.1:{aura.port}/s")

def test_without_ids_the_doctor_says_that_nobody_can_resume():
    with running(event_ids=False, event_delay=0) as aura:
        found = diagnosed_by(aura.url, case="1")
    assert found["verdict"] == "healthy"
    assert found["answers"]["events"] == "11, no ids: nobody can resume; the last is completed"

# ═══ Command line ═══════════════════════════════════════════════════════════════════════════════

NO_DORP = "there is no scenario 'dorp'; did you mean 'drop'?"
NO_URL = "a URL is like http://localhost:9000/…, and {!r} is not"

@pytest.mark.parametrize(("words", "sentence"), [
    ("--port x", "'--port' takes a whole number, not \"x\""), ("--scenario dorp", f"--scenario: {NO_DORP}"),
    ("--case 1=dorp", f"--case: {NO_DORP}"), ("--case 85117", "--case: there is no scenario ''"),
    ("--speed fast", "'--speed' takes a number above 0 or max"),
    ("--port 0 drop", "there is no 'drop' here (there are "),
    ("--port 0 serve", "there is no 'serve' here; did you mean 'serve'?"),
    ("--speeed 3", "there is no '--speeed' here; did you mean '--speed'?"),
    ("--scenarios /nowhere.json", "--scenarios /nowhere.json: "), ("scenarios dorp", NO_DORP),
    ("scenarios ok --port 1", "there is no '--port' here"),
    ("diagnos http://localhost", "there is no command 'diagnos'; did you mean 'diagnose'?"),
    ("diagnose", "the following arguments are required: URL; 'aura-stream diagnose --help' says more"),
    ("diagnose http://localhost:9000", "give the URL of a stream, or that of a server and --case ID"),
    ("diagnose localhost:9000/x", NO_URL.format("localhost:9000/x")),
    ("diagnose ftp://h/x", NO_URL.format("ftp://h/x")), ("diagnose http://h/x --via h", NO_URL.format("h")),
    ("diagnose http://h/x --cas 1", "there is no '--cas' here; did you mean '--case'?"),
    ("diagnose http://h/x -H Nö:1", "takes a name a header can have"),
    ("diagnose http://h/x --limit long", "argument --limit: invalid float value: 'long'"),
    ("diagnose http://127.0.0.1:1/x",
     "cannot reach 127.0.0.1:1: Connection refused; is it running, with http?"),
    ("diagnose http://h/x -H foo", "takes visible ASCII"),
])
def test_what_is_asked_wrongly_is_one_sentence_and_status_2(words, sentence, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("aura-stream: ") and sentence in error and error.count("\n") == 1

def test_a_port_that_is_taken_is_one_sentence_and_status_2(capsys, one_server):
    assert main(["--port", str(one_server.port)]) == 2
    why = "[Errno 98] Address already in use; --port 0 takes a free port"
    assert capsys.readouterr().err == f"aura-stream: cannot listen on 127.0.0.1:{one_server.port}: {why}\n"

@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
@pytest.mark.parametrize(("lines", "most"), [(100, 5), (2000, 10_000)])
def test_a_log_line_comes_or_is_counted_whatever_kind_of_pipe_it_goes_to(lines, most):
    """One that is non-blocking and small, as some programs make it; and the count comes also where no line follows."""
    code = (f"import aura_stream as a; w = a.LogWriter(); w.most = {most};"
            f" [w.write('line ' + 'x' * 60) for _ in range({lines})]; w.close()")
    out, into = os.pipe()
    os.set_blocking(into, False)
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stderr=into), open(out) as log:
        os.close(into)
        text = log.read()
    dropped = sum(map(int, re.findall(r"dropped (\d+) log lines", text)))
    assert text.count("line x") + dropped == lines and (dropped > 0) == (lines > most)

def test_help_fits_a_screen_and_names_every_flag_its_variable_and_every_command(capsys):
    texts = {}
    for words in ([], ["diagnose"], ["scenarios"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        texts[" ".join(words)] = text = capsys.readouterr().out
        assert text.startswith(" ".join(["usage: aura-stream", *words]))
        assert not words or max(map(len, text.splitlines())) <= 100
    assert len(texts["diagnose"].splitlines()) < 30 and len(texts["scenarios"].splitlines()) < 15
    for one in aura_stream.flagged(Settings):
        assert aura_stream.flag(one) in texts[""] and aura_stream.variable(one) in texts[""]
    assert all(f"aura-stream {command} " in texts[""] for command in ("diagnose", "scenarios"))

@pytest.mark.parametrize(("fields", "line"), [
    *(({"host": host}, "control (/__aura, /api/admin) is for callers on this machine: no ADMIN_TOKEN")
      for host in ("0.0.0.0", "::")),
    ({"redis_url": "redis://localhost"}, "REDIS_URL is set, but this version keeps runs in memory only"),
    *((fields, "") for fields in ({"host": "0.0.0.0", "admin_token": "t"}, {}, {"host": "localhost"})),
])
def test_what_somebody_should_know_who_starts_it_like_this_is_said(fields, line, heard):
    aura_stream.warn(Settings(**fields))
    assert heard.all() == (line and f"WARNING {line}")

def test_the_largest_settings_start_too_and_the_handle_brings_the_admin_token():
    most = {"send_buffer": 10**12, "send_timeout": 1e7, "max_bindings": 0, "case": "1=ok"}
    with running(**most, admin_token="토큰\n", event_delay=0) as aura:
        stream(aura, aura.trigger("1"))
        assert len(aura.journal(count=1, within=WAIT)) == 1
        assert httpx.get(f"{aura.url}/__aura/journal").status_code == 401
        assert "토큰" not in repr(aura) + repr(Settings(admin_token="토큰"))

def test_the_scenarios_are_listed_and_printed_ready_to_change(capsys, tmp_path):
    assert main(["scenarios"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CATALOGUE)
    for name in ("ok", "drop-resume", "stepped", "html"):
        assert main(["scenarios", name]) == 0
        assert parse_scenario(json.loads(capsys.readouterr().out), needs="doc") == CATALOGUE[name]
    assert main(["scenarios", "mine", "--scenarios", of_ones_own(tmp_path, {"name": "mine"})]) == 0

def test_it_stops_when_its_standard_input_closes_or_when_it_is_asked_to():
    with process("--exit-with-stdin", "--no-magic", stdin=subprocess.PIPE) as (server, _):
        assert server.poll() is None
        server.stdin.close()
        assert server.wait(WAIT) == 0
    with process() as (server, aura):
        assert aura._ask("POST", "/__aura/shutdown").status == "stopping"
        assert server.wait(WAIT) == 0

def test_diagnose_tells_a_person_or_a_program_and_its_status_says_it_too(capsys, one_server):
    url = one_server.url
    assert main(["diagnose", url, "--case", "1"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{url}/aura/analysis-runs/doctor-\w+/stream", first)
    assert [line.split("  ")[1].strip() for line in lines] == [
        "answer", "headers", "first bytes", "events", "arrival", "heartbeats", "end", "journal", "resume"]
    assert re.fullmatch(r"healthy: nothing is wrong: it was properly ended after .* s and 11 events", last)
    assert main(["diagnose", url, "--case", "1~empty", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["ills"][0]["fault"]) == ("empty", "the server")
    assert main(["diagnose", url, "--case", "1", "-H", "Authorization: Basic x"]) == 1
    told = capsys.readouterr().out
    assert "faulty (unauthorized): 401, application/json, " in told
    assert "the caller is at fault: send a good token" in told

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
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", UNREAD], stdout=pipe, stderr=pipe, env=env) as server:
        try:
            url = server.stdout.readline().decode().split()[-1]
            with httpx.Client(timeout=WAIT) as client:
                for _ in range(500):  # two long lines each, more than a pipe and the queue can hold
                    assert client.get(f"{url}/{'x' * 150}").status_code == 404
                if reads:
                    os.set_blocking(server.stderr.fileno(), False)
                    said, dropped = b"", 0
                    while dropped <= 100:
                        client.get(f"{url}/health")
                        said += server.stderr.read() or b""
                        told = re.findall(rb"\naura-stream: dropped (\d+) log lines, nobody read them\n", said)
                        dropped = sum(map(int, told))
                    assert dropped < 1000
            server.terminate()
            assert server.wait(WAIT) == 0
        finally:
            server.kill()

def test_at_a_terminal_the_first_steps_are_shown_and_work(tmp_path):
    """In a pseudo-terminal; a pipe gets the readiness line and nothing more."""
    import pty

    terminal, inner_end = pty.openpty()
    command = [*SERVER, "--event-delay", "0.01", "--log-level", "ERROR"]
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
            endings = [subprocess.run(step, shell=True, capture_output=True, text=True, timeout=WAIT) for step in steps]
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
        if (++lines[0] == Integer.parseInt(a[2])) Runtime.getRuntime().halt(0);
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

@pytest.mark.parametrize("client", ["jdk 1.1", "jdk default", "node"])
def test_a_real_client_reads_the_stream_in_real_time(client, viewer_class):
    with running(event_delay=0.1) as aura:
        run_id = aura.trigger("85116", scenario=ONCE_SEEN)
        url = f"{aura.url}/aura/cases/85116/analysis/stream?runId={run_id}"
        if client == "node":
            output = shown_by(aura, [program("node"), "--input-type=module", "-e", NODE, url])
        else:
            command = [program("java"), "-cp", ".", "Viewer", client.split()[1], url, "0"]
            output = shown_by(aura, command, cwd=viewer_class)
    assert output.startswith("status 200\n" if client == "node" else "status 200 HTTP_1_1") and output.endswith("end\n")
    in_real_time(timed_lines(output))

def test_a_default_jdk_client_that_leaves_is_noticed_within_a_second(viewer_class, heard):
    with running() as aura:
        run_id = aura.trigger("1", scenario=QUIET)
        url = f"{aura.url}/aura/analysis-runs/{run_id}/stream"
        assert ran(program("java"), "-cp", ".", "Viewer", "default", url, "5", cwd=viewer_class).returncode == 0
        left = time.monotonic()
        assert "by=client how=disconnect" in heard.wait_for("stream closed")
        assert time.monotonic() - left < 1 and "Unsupported upgrade request." in heard.all()
        assert state(aura, run_id)["status"] == "running"

def test_curl_and_an_http10_client_read_the_stream():
    with running(event_delay=0) as aura:
        run_id = aura.trigger("85116")
        url = f"{aura.url}/aura/cases/85116/analysis/stream?runId={run_id}"
        for flag in ("--http1.1", "--http1.0"):
            curl = ran(program("curl"), "-sN", flag, url, "-H", "Authorization: Bearer t")
            data = curl.stdout.encode()
            assert (curl.returncode, data[:13], data[-14:], len(parsed(data))) == (0, HELLO, DONE, 11)
        with watch(aura, run_id, None, version="1.0") as wire:
            head, _, body = read_until(wire, None).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower() and body == data
        run_id = aura.trigger("1", scenario="drop")
        with watch(aura, run_id, None, version="1.0") as wire:
            assert b"chunked" not in read_until(wire, None).lower()
        entry = entry_of(aura, run_id)
    assert (entry.http_version, entry.end.by, entry.end.how) == ("1.0", "server", "drop")
    assert "an HTTP/1.0 client" in entry.said, "it cannot tell a drop from an end, and the journal says so"

def through_httpx(url, **headers):
    """The body that is there at the end, and which end it was."""
    data, ending = b"", "end"
    try:
        with httpx.stream("GET", url, headers={**BEARER, **headers}, timeout=WAIT) as answer:
            for piece in answer.iter_raw():
                data += piece
    except httpx.HTTPError as error:
        ending = f"{type(error).__name__}: {error}"
    return data, ending

def with_httpx(url, last_id, jvm):
    """What each client sees: the lines it got, and how it ended for it."""
    data, ending = through_httpx(url, **({"Last-Event-ID": last_id} if last_id else {}))
    return data.decode().split("\n")[:-1], ending

def with_curl(url, last_id, jvm):
    more = ["-H", f"Last-Event-ID: {last_id}"] if last_id else []
    curl = ran(program("curl"), "-sN", url, "-H", "Authorization: Bearer t", *more)
    return curl.stdout.split("\n")[:-1], f"exit {curl.returncode}"

def with_node(url, last_id, jvm):
    return told(ran(program("node"), "--input-type=module", "-e", NODE, url, *filter(None, [last_id])).stdout)

def with_jdk(url, last_id, jvm):
    jvm.stdin.write(" ".join([url, "0", *filter(None, [last_id])]) + "\n")
    jvm.stdin.flush()
    return told("".join(iter(jvm.stdout.readline, ".\n")))

@pytest.fixture(scope="session")
def jvm(viewer_class):
    """One JVM that views what it is told to: to start one takes longer than to see a stream."""
    command, pipe = [program("java"), "-cp", ".", "Viewer", "1.1", "-"], subprocess.PIPE
    with subprocess.Popen(command, cwd=viewer_class, stdin=pipe, stdout=pipe, text=True) as process:
        yield process

def told(output):
    return [line for _, line in timed_lines(output)], output.strip().split("\n")[-1]

CLIENTS = {"httpx": with_httpx, "node": with_node, "curl": with_curl, "jdk": with_jdk}
NORMAL = {"httpx": "end", "node": "end", "curl": "exit 0", "jdk": "end"}
DROPPED = {"httpx": "complete message body (incomplete chunked read)", "node": "TypeError: terminated",
           "curl": "exit 18", "jdk": "closed"}
FAULTS = {
    "empty": ([], NORMAL),
    "drop": (PHASE2[:3], DROPPED),
    "reset": (PHASE2[:2], {"httpx": "ReadError", "node": "ECONNRESET", "curl": "exit 56", "jdk": "broken"}),
    "no-response": ([], {"httpx": "RemoteProtocolError: Server disconnected without sending a response.",
                         "node": "fetch failed", "curl": "exit 52", "jdk": "header parser received no bytes"}),
    "first-chunk-then-close": ([], NORMAL),
    "split-utf8": (PHASE2, NORMAL), "dribble": (PHASE2, NORMAL), "mid-line": (PHASE2, NORMAL), "ok": (PHASE2, NORMAL),
}

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

def test_a_back_end_is_steered_by_an_id_of_text_or_by_a_binding_for_a_number(jumping):
    """It sends requests of its own, with only `Accept` and `Authorization`; it takes the case from a row of its
    database, and lets nobody tell it anything else."""
    def trigger(case):
        path, mine = f"/aura/cases/{case}/analysis-runs", {"runId": str(uuid.uuid4())}
        return httpx.post(jumping.url + path, headers=BEARER, json=mine, timeout=WAIT).json()["runId"]

    def relayed(case, run_id):
        url = f"{jumping.url}/aura/cases/{case}/analysis/stream?runId={run_id}"
        data, ending = through_httpx(url, Accept="text/event-stream")
        return len(data), len(parsed(data)), ending == "end"

    run_id = trigger("85116~drop-resume")
    (first, *broken), (second, *whole) = (relayed("85116~drop-resume", run_id) for _ in range(2))
    assert (broken, whole) == ([2, False], [11, True])
    one, two = jumping.journal(run_id, count=2, within=WAIT)
    assert (one.case_id, one.bytes, one.end.how, two.bytes) == ("85116~drop-resume", first, "drop", second)
    jumping.next("drop", case="85117")
    runs = [trigger(case) for case in (85116, 85117, 85117)]
    assert [relayed(85117, run_id)[2] for run_id in runs] == [True, False, True]

class Browser:
    """Chromium, headless, through ChromeDriver's own protocol: JSON over HTTP."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")

    def __init__(self, folder):
        options = {"args": [*self.FLAGS, f"--user-data-dir={folder}"], "binary": program("chromium")}
        command, silent = [program("chromedriver"), "--port=0"], subprocess.DEVNULL
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=silent, text=True)
        ready = (re.search(r"successfully on port (\d+)", line) for line in self._driver.stdout)
        port = next(filter(None, ready))[1]
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
        wrapped = ("const done = arguments[arguments.length - 1]; (async (...given) => {" + script
                   + "})(...arguments).then(done, (e) => done('error: ' + e))")
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
    """The browser on a page of another local origin."""
    with running() as other:
        browser.open(f"http://localhost:{other.port}/health")
        yield browser
        browser.open("about:blank")

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
        headers = {**BEARER, "X-Tenant-ID": "1", "X-Trace-ID": "t", "Last-Event-ID": "9",
                   "Accept": "text/event-stream", "Cache-Control": "no-cache"}
        asked = ("const answer = await fetch(given[0], {headers: given[1]});"
                 " return [answer.status, await answer.text(), [...answer.headers.keys()]];")
        status, text, names = page.run(asked, url, headers)
        assert (status, [id for id, _, _ in parsed(text.encode())]) == (200, ["10", "11"])
        assert {"x-request-id", "x-aura-run-id", "x-aura-attempt"} <= set(names)
        status, text, _ = page.run(asked, url, {})
        assert (status, json.loads(text)["detail"]) == (401, "Missing authorization header")
        assert page.run(asked, f"{aura.url}/__aura/journal", {})[0] == 200, "local pages may control"
        posted = "return (await fetch(given[0], {method: 'POST', headers: given[1], body: '{}'})).status"
        gateway = {**BEARER, "X-Tenant-ID": "1", "Content-Type": "application/json"}
        assert page.run(posted, f"{aura.url}/api/aura/cases/1/analysis-runs", gateway) == 202

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
        with watch(aura, "r"):
            random.seed(soon)
            page.run(WATCH, f"{aura.url}/api/generation/jobs/j~ok/events")
            entry = aura.journal(count=1, kind="stream", within=WAIT)[0]
            assert (entry.status, entry.run_id) == (200, "j~ok")
            assert "too many open streams, the limit is 1" in entry.said
        seen, _ = page.run(UNTIL % "source.readyState == EventSource.CLOSED")
        assert seen[-1][:2] == ["j~ok_10", "completed"]

# ═══ Behind nginx, watched by Prometheus ════════════════════════════════════════════════════════

@contextlib.contextmanager
def behind_nginx(aura, folder, text=None):
    """Debian's nginx with this block, or the README's; yields its port and its URL."""
    command = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or program("nginx")
    text, port, errors = text or fenced("nginx"), free_port(), folder / "error.log"
    assert text.count("127.0.0.1:9000") == text.count("listen 8080;") == 1
    text = text.replace("127.0.0.1:9000", f"127.0.0.1:{aura.port}").replace("listen 8080;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    events = (f"daemon off; pid {folder}/pid; error_log {errors}; worker_processes 1;"
              " events { worker_connections 512; }")
    (folder / "nginx.conf").write_text(f"{events} http {{ {temporary} access_log off; {text} }}")
    with subprocess.Popen([command, "-p", folder, "-c", folder / "nginx.conf", "-e", errors]) as nginx:
        try:
            eventually(lambda: reachable(port) or nginx.poll() is not None)
            assert nginx.poll() is None, errors.read_text()
            yield types.SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}")
        finally:
            nginx.terminate()

def test_the_readme_s_nginx_passes_streams_on_as_they_happen_and_control_not_at_all(tmp_path, heard):
    with running() as aura, behind_nginx(aura, tmp_path) as nginx:
        run_id = aura.trigger("1", scenario="stepped")
        path = f"{nginx.url}/aura/analysis-runs/{run_id}/stream"
        with httpx.stream("GET", path, headers={**BEARER, "Accept-Encoding": "gzip"}, timeout=WAIT) as answer:
            lines = answer.iter_lines()
            assert [next(lines), next(lines)] == [": connected", ""]
            for step in (1, 2):
                aura.signal(f"go-{step}", run_id)
                event = list(itertools.takewhile(str, lines))
                assert event[-1] == f"id: {step}", "each event is there before the next one is let go"
            assert "content-encoding" not in answer.headers and "via" not in answer.headers
        assert ending(aura, run_id) == ("client", "disconnect"), "the viewer's leaving passes through"
        for step in (3, 4):
            aura.signal(f"go-{step}", run_id)
        resumed = stream(nginx, run_id, Last_Event_ID="2")
        assert [id for id, _, _ in parsed(resumed)] == ["3", "4"] and resumed.endswith(DONE)
        assert aura.journal(run_id, count=2, within=WAIT)[1].resumed_after == 2
        made = httpx.post(f"{nginx.url}{MAKE}", json={}, headers={"Origin": nginx.url}).json()
        assert made["sseUrl"] == f"{nginx.url}{MAKE}/{made['jobId']}/events", "the way through nginx"
        with pytest.raises(httpx.RemoteProtocolError):
            stream(nginx, aura.trigger("1", scenario="drop"))
        for hidden in ("__aura/journal", "__aura", "%5f_aura/runs", "x/../__aura/runs", "api/admin/sse/restart",
                       "__aura/health", "/__aura/tasks", "metrics"):
            with connect(nginx, get(f"/{hidden}", version="1.0")) as wire:
                assert b" 404 Not Found" in read_until(wire, None), hidden
        assert "__aura/runs - Status" not in heard.all()
        quiet, statuses = aura.trigger("1", scenario="silent"), []
        with contextlib.ExitStack() as open_ones:
            for _ in range(33):
                wire = open_ones.enter_context(watch(nginx, quiet, None))
                statuses.append(int(read_until(wire, b"\r\n").split()[1]))
        assert statuses == [200] * 30 + [429] * 3, "one client's share"

@pytest.mark.long
def test_the_doctor_finds_the_hop_that_buffers(tmp_path):
    """An nginx as it comes: HTTP/1.0 to the server, buffering on, and deaf to X-Accel-Buffering."""
    plain = ("server { listen 8080; location / { proxy_pass http://127.0.0.1:9000;"
             " proxy_ignore_headers X-Accel-Buffering; } }")
    zips = plain.replace("location", "gzip on; gzip_types text/event-stream; gzip_proxied any; location")
    with running(event_delay=0.06) as aura:
        with behind_nginx(aura, tmp_path, plain) as hop:
            found = diagnosed_by(aura.url, case="1", via=hop.url)
            assert (found["verdict"], found["ills"], found["via"]["verdict"]) == ("buffered", [], "buffered")
            between = f"what stands between {found['url']} and {found['via']['url']} is at fault"
            assert f"{between}: switch buffering off" in found["says"]
            cut = diagnosed_by(hop.url, case="1~drop")
            assert cut["verdict"] == "hidden-cut" and "speak HTTP/1.1 to the server" in cut["says"]
            both = diagnosed_by(aura.url, case="1~no-done", via=hop.url)
            assert both["verdict"] == "no-done" and "the server is at fault" in both["says"]
            assert "that way also: silent for" in both["says"]
        with behind_nginx(aura, tmp_path, zips) as hop:
            ills = [ill["ill"] for ill in diagnosed_by(hop.url, case="1")["ills"]]
            assert ills == ["compressed"], "and what it says nobody knows"
        with behind_nginx(aura, tmp_path) as hop:
            found = diagnosed_by(aura.url, case="1", via=hop.url)
            assert (found["verdict"], found["via"]["verdict"]) == ("healthy", "healthy"), found

def rules():
    return re.findall(r"alert: (\w+), expr: ('?)(.*?)\2, (?:for|annotations)", fenced("yaml"))

def test_the_alert_rules_name_metrics_that_exist():
    assert len(rules()) == 3
    for _, _, expression in rules():
        named = set(re.findall(r"\b(?:sse|http|aura)_\w+", expression))
        assert named and named <= METRICS.keys()
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', expression):
            known = {"how": {how for _, how in aura_stream.ACTS}, "status": {values}}[label]
            assert set(values.split("|")) <= known

def test_promtool_accepts_the_alert_rules(tmp_path):
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed, and need not be")
    (tmp_path / "rules.yml").write_text(fenced("yaml"))
    found = ran(promtool, "check", "rules", tmp_path / "rules.yml")
    assert found.returncode == 0 and "3 rules found" in found.stdout, found.stdout + found.stderr

# ═══ The soak ═══════════════════════════════════════════════════════════════════════════════════
# What it finds is its own affair, and takes longer; here: that it knows whose mistake it met, and leaves nothing.

SOAK = HERE / ".ci" / "soak"
has_soak = pytest.mark.skipif(not SOAK.exists(), reason="it comes with the repository only")

@has_soak
def test_the_soak_says_in_a_sentence_that_the_server_does_not_start(tmp_path):
    venv.create(tmp_path)  # a Python without the packages
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    found = ran(tmp_path / "bin" / "python", SOAK, "--quick", env=env)
    assert found.returncode == 2, "1 is for what the server did wrong"
    why = r"soak: the server did not start: ModuleNotFoundError: No module named '\w+'\n"
    assert re.fullmatch(why, found.stderr), found.stderr

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
    command, pipe = [sys.executable, SOAK, "--quick", "--only", "trouble"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as soak:
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

def test_the_readmes_settings_are_the_settings():
    """One a row: flag, environment variable, default, and the sentence that --help has."""

    def told(one):
        form = {bool: lambda value: str(value).lower(), float: "{:g}".format}.get(type(one.default), str)
        names = [f"`{name}`" for name in (aura_stream.flag(one), aura_stream.variable(one))]
        return [*names, form(one.default), one.metadata["says"]]

    assert table("Settings") == [told(one) for one in aura_stream.flagged(Settings)]

def test_the_readmes_lesson_is_taken_from_the_file():
    lesson = README.split("\n## Read it")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", lesson, re.S)
    assert snippets and all(snippet in SOURCE for snippet in snippets)

def test_the_readmes_endpoints_are_the_routes():
    def camel(name):
        return "{" + re.sub(r"_(\w)", lambda letter: letter[1].upper(), name[1]) + "}"

    found = {f"{method} " + re.sub(r"<(?:int:)?(\w+)>", camel, rule) for method, rule in ROUTES}
    listed = [re.fullmatch("`([^`]+)`", row[0])[1].split("?")[0] for row in table("Endpoints")]
    assert len(listed) == len(set(listed))
    assert set(listed) == {one for one in found if "//" not in one and not one.startswith("HEAD ")}

def test_the_readmes_terminal_session_is_what_one_sees():
    """But for numbers and made-up ids; a line of `…` is any number of lines."""
    program("curl")
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", fenced("console"), re.M)
    assert len(steps) == 5
    differs = {"…\n": r"(?:.*\n)*?", "doctor": r"doctor-\w+"}
    with process("--event-delay", "0.06") as (_, aura):
        for command, shown in steps:
            ours = command.replace(":9000", f":{aura.port}").replace(".venv/bin/aura-stream", " ".join(SERVER[:2]))
            found = ran("bash", "-c", ours)
            sizes = [{*re.findall(r"\d+ bytes$", text, re.M)} for text in (shown, found.stdout)]
            assert sizes[0] <= sizes[1], "they are real"
            parts = re.split(r"(…\n|doctor-\w+|[\d.:T+-]*\d)", shown)
            form = "".join(differs.get(part[:6], r"[\d.:T+-]+") if at % 2 else re.escape(part)
                           for at, part in enumerate(parts))
            assert re.fullmatch(form, found.stdout.replace(f":{aura.port}", ":9000")), found

def test_the_readmes_lab_shows_who_steals():
    program("curl")
    with process("--event-delay", "0.03") as (_, aura):
        code = fenced("sh run").replace(":9000", f":{aura.port}")
        found = ran("bash", "-euo", "pipefail", "-c", code)
    assert found.returncode == 0, found.stderr
    one, two = re.findall(r"(?:one|two): ((?:id: \d+ ?)*)", found.stdout)
    assert sorted(map(int, re.findall(r"\d+", one + two))) == list(range(1, 12)) and found.stdout.endswith("\n11\n")

def test_the_readmes_pytest_fixture_runs(tmp_path):
    (tmp_path / "test_it.py").write_text(fenced("python pytest"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    found = ran(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (found.returncode, found.stdout.count("1 passed")) == (0, 1), found.stdout

def test_the_readmes_java_class_starts_and_stops_a_server(tmp_path):
    (tmp_path / "AuraServer.java").write_text(fenced("java run"))
    found = ran(program("java"), "AuraServer.java", *SERVER, "--exit-with-stdin", cwd=tmp_path)
    port = int(re.fullmatch(r"aura\.base-url=http://127\.0\.0\.1:(\d+)\n", found.stdout)[1])
    eventually(lambda: not reachable(port))

def test_the_readmes_node_program_starts_and_stops_a_server(tmp_path):
    script = tmp_path / "aura"
    script.write_text(f'#!/bin/sh\nexec {" ".join(SERVER[:2])} "$@"\n')
    script.chmod(0o755)
    command = [program("node"), "--input-type=module", "-e", fenced("js run")]
    found = ran(*command, env={**os.environ, "AURA": str(script)})
    assert (found.stdout, found.returncode) == ("ok\n", 0), found.stderr

def test_the_readme_names_the_whole_catalogue_and_every_verb():
    listed = re.findall(r"^\| (?:Runs|Body|Time|Shape|Status|Resume|Trigger) \|[^|]*\| (.*) \|$", README, re.M)
    assert re.findall(r"`([a-z0-9-]+)`", " ".join(listed)) == list(CATALOGUE)
    steps = re.findall(r"^\| (`[a-z` ]+`) \| (?:run|stream|trigger|all)", README, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(steps))) == sorted(
        {**aura_stream.VERBS["run"], **aura_stream.VERBS["stream"]})

def test_the_readme_s_scenario_is_right_and_its_promises_have_their_tests():
    assert parse_scenario(json.loads(fenced("json")), needs="doc")
    promised = re.findall(r"`(test_\w+)`", README)
    assert len(promised) == 9 and all(callable(globals().get(name)) for name in promised)

def test_the_readme_is_short_and_begins_with_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [command.split()[-1] for command in commands] == ["aura_stream.py", "pytest"] and fenced("sh run")
    lines = README.splitlines()
    assert len(lines) <= 320
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S).splitlines()
    assert len(prose) < len(lines) - 80, "code is a good part of it"
    assert [line for line in prose if len(line) > 160 and not line.startswith("|")] == []

def test_the_readme_has_a_heading_for_each_of_its_four_readers():
    without_code = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    assert re.findall(r"^##? (.*)$", without_code, re.M) == [
        "aura_stream", "Run it", "Break it (tests)", "Read it (the lesson)", "Operate it"]
    lesson = without_code.split("## Read it (the lesson)\n")[1].split("\n## ")[0]
    changes = lesson.split("### To change it\n")[1]
    wanted = r"^\| (?:a new stream verb|a new metric|another heartbeat text) \| .+ \| .+ \|$"
    assert len(re.findall(wanted, changes, re.M)) == 3
    headings = re.findall(r"^#+ (.*)$", without_code, re.M)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}
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
