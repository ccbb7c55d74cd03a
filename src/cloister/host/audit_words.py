"""Which words of an event the index of the log knows. Decodes no more of a line than these."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

WORDS = ("kind", "run", "agent", "user", "severity", "decision", "host", "path", "rule")
"""By their place here in the index: append, never reorder, and raise `VERSION` when one means something else."""
SEVERITY = WORDS.index("severity")
_HASH = re.compile(rb'"hash":"([0-9a-f]{64})"\}\Z')
_MOST_NS = 2**63 - 1


class _Process(msgspec.Struct, gc=False):
    path: str = ""


class _File(msgspec.Struct, gc=False):
    path: str = ""
    target: str = ""


class _Endpoint(msgspec.Struct, gc=False):
    hostname: str = ""
    ip: str = ""
    path: str = ""


class _Line(msgspec.Struct):
    """What of an event is indexed (`audit/event.py` tells what it means)."""

    time: int
    kind: str
    run: str = ""
    agent: str = ""
    user: str = ""
    severity_id: int = 1
    disposition: str = ""
    rule: str = ""
    process: _Process | None = None
    file: _File | None = None
    endpoint: _Endpoint | None = None


class Words(NamedTuple):
    """The words of a chunk's lines: for each of `WORDS`, positions by value."""

    values: tuple[dict[str, list[int]], ...]
    since: int
    until: int


def hash_of(line: bytes) -> str:
    """Return the hash that a line ends with, or nothing."""
    found = _HASH.search(line.rstrip(b"\n"))
    return found[1].decode() if found else ""


def words_of(lines: list[bytes], severities: Mapping[str, int]) -> Words:
    """Return the words of lines; one that is no event has none, and is found by no question."""
    values: tuple[defaultdict[str, list[int]], ...] = tuple(defaultdict(list) for _ in WORDS)
    kinds, runs, agents, users, _, decisions, hosts, paths, rules = values
    severe: defaultdict[int, list[int]] = defaultdict(list)
    decode = msgspec.json.Decoder(_Line).decode
    since, until = _MOST_NS, 0
    for place, text in enumerate(lines):
        try:
            line = decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        since, until = min(since, line.time), max(until, line.time)
        kinds[line.kind].append(place)
        runs[line.run].append(place)
        agents[line.agent].append(place)
        users[line.user].append(place)
        severe[max(line.severity_id, severities.get(line.kind, 1))].append(place)
        decisions[line.disposition].append(place)
        if line.rule:
            rules[line.rule].append(place)
        if line.process and line.process.path:
            paths[line.process.path].append(place)
        if line.file:
            _file(paths, line.file, place)
        if line.endpoint:
            _endpoint(hosts, paths, line.endpoint, place)
    values[SEVERITY].update((str(number), places) for number, places in severe.items())
    return Words(values, min(since, until), until)


def _file(paths: defaultdict[str, list[int]], file: _File, place: int) -> None:
    for name in (file.path, file.target):
        if name and not (paths[name] and paths[name][-1] == place):
            paths[name].append(place)


def _endpoint(
    hosts: defaultdict[str, list[int]], paths: defaultdict[str, list[int]], endpoint: _Endpoint, place: int
) -> None:
    if endpoint.hostname:
        hosts[endpoint.hostname.lower()].append(place)
    if endpoint.ip and endpoint.ip != endpoint.hostname:
        hosts[endpoint.ip].append(place)
    if endpoint.path and not (paths[endpoint.path] and paths[endpoint.path][-1] == place):
        paths[endpoint.path].append(place)
