"""The last steps of all ranks as a trace, which `mpiattn trace` opens."""

from __future__ import annotations

from collections.abc import Mapping

from ..events import Event, Trace
from .record import Kind
from .state import Doing

OPEN = 0.1  # of the whole time, drawn for what has not ended
POSTS = {Kind.SEND: "send", Kind.RECEIVE: "receive"}


def traces(ranks: Mapping[int, Doing], offsets: Mapping[str, float]) -> list[Trace]:
    """Return the last steps of each rank.

    Between two waits in a pass a rank is taken to compute: that is not recorded. What has not ended is drawn a little
    beyond the last thing that has; how long it has really lasted is in the report.

    Parameters
    ----------
    offsets : dict
        Seconds to add to the time of a host.
    """
    result = [trace(ranks[rank], offsets.get(ranks[rank].host, 0.0)) for rank in sorted(ranks)]
    times = [time for each in result for event in each.events for time in (event.start, event.end) if time == time]
    zero, last = min(times, default=0.0), max(times, default=0.0)
    for event in (event for each in result for event in each.events):
        end = event.end if event.end == event.end else last + OPEN * (last - zero)
        event.start, event.end = event.start - zero, end - zero
    return result


def trace(doing: Doing, offset: float) -> Trace:
    """Return the last steps of a rank."""
    events: list[Event] = []
    posts: dict[int, Event] = {}
    awaited: list[int] = []
    passes: list[str] = []
    computing: float | None = None
    for record in doing.records:
        time, name = record.time + offset, doing.names.get(record.name, "?")
        if record.kind in (Kind.WAIT, Kind.CALL, Kind.END) and passes and computing is not None:
            events.append(Event("compute", passes[-1], -1, 0, computing, time))
            computing = None
        if record.kind in POSTS:
            posts[record.post] = Event(POSTS[record.kind], name, record.peer, record.nbytes, time)
            events.append(posts[record.post])
        elif record.kind == Kind.WAIT:
            if not awaited:
                events.append(Event("wait", "", -1, 0, time))
            awaited += [record.post + bit for bit in range(64) if record.nbytes >> bit & 1]
        elif record.kind == Kind.CALL:
            events.append(Event("agree", name, -1, 0, time))
        elif record.kind == Kind.DONE:
            begun = next((event for event in reversed(events) if event.kind in ("wait", "agree")), None)
            for event in [begun, *(posts.pop(post, None) for post in awaited)]:
                if event is not None:
                    event.end = time
            awaited, computing = [], time
        elif record.kind == Kind.PASS:
            passes.append(name)
            computing = time
        elif record.kind == Kind.END and passes:
            passes.pop()
            computing = time
    return Trace(events)
