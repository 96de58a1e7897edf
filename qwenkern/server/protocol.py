"""uvicorn's HTTP protocol with these changes:

- Requests that are not HTTP get an error in the format of OpenAI's API.
- A client loses its connection if it does not finish its headers, does not read its answer, or goes on sending a body
  after the answer.
- The number of connections is limited.
- Streams of many small parts are written without h11, which takes longer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from . import errors
from .errors import ApiError
from .sse import WRITE

HEADER_SECONDS = 10.0  # until the headers of a request must be complete, from its first byte or the connection on
MAX_HEADER_BYTES = 32 * 1024  # of a request line with its headers; uvicorn's h11_max_incomplete_event_size
STALLED_SECONDS = 60.0  # in which a client must read ROOM bytes of what waits to be sent, or all of it
ROOM = 64 * 1024
REST_SECONDS = 5.0  # in which the rest of the body must come if the request has been answered before its end
# Most bytes of chunk headers of a body, if they exceed the bytes of the chunks: parsing a chunk takes h11 long.
MAX_FRAMING = 64 * 1024
_PIECE = 4096


class Protocol(H11Protocol):
    """One connection."""

    most: int | None = None  # connections of the server; None: no limit
    _body, _framing = 0, 0  # bytes of the body of a request so far, and of its chunk headers
    _headers_due: asyncio.TimerHandle | None = None
    _room_due: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._app, self.app = self.app, self._with_write

    async def _with_write(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = {WRITE: self._write}
        await self._app(scope, receive, send)

    async def _write(self, part: bytes) -> None:
        """Sends a part of the body of an answer that has begun, as ``send`` would: as a chunk to a client of HTTP/1.1,
        and as plain bytes to one of HTTP/1.0."""
        if self.flow.write_paused and not self.cycle.disconnected:
            await self.flow.drain()
        if not self.cycle.disconnected:
            has_chunks = (self.conn.their_http_version or b"") >= b"1.1"  # h11 decides it likewise for the headers
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if has_chunks else part)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.most is not None and len(self.connections) > self.most:
            self._refuse(503, f"the server has {self.most} connections, which is the most: try again later")
            return
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            # In pieces: h11 checks the size of headers only while they are incomplete, and _measure must see the
            # chunks of a body before h11 has parsed thousands of them.
            piece, cycle = data[:_PIECE], self.cycle
            before = len(cycle.body) if cycle else 0
            super().data_received(piece)
            data = data[_PIECE:]
            if self.conn.their_state is h11.SEND_BODY and self.cycle is cycle:
                self._measure(len(piece), len(cycle.body) - before)
            elif self.cycle is not cycle:
                self._body = self._framing = 0
        if self.conn.their_state is not h11.IDLE:  # the headers are complete, or the connection ends
            self._stop_waiting()
        elif self._headers_due is None:
            self._wait_for_headers()

    def on_response_complete(self) -> None:
        """Called after each answer."""
        cycle = self.cycle
        self._watch_room()
        super().on_response_complete()
        if self.cycle is not cycle:  # the client had already sent the next request
            self._body = self._framing = 0
        elif self.conn.their_state is h11.SEND_BODY:  # the server answered before the end of the body
            self.loop.call_later(REST_SECONDS, self._rest_is_late, cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_waiting_for_room()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called when much data waits to be sent: the answer then pauses."""
        super().pause_writing()
        self._watch_room()

    def resume_writing(self) -> None:
        """Called when the client has read most of the waiting data."""
        super().resume_writing()
        self._watch_room()

    def send_400_response(self, msg: str) -> None:
        """Called when h11 has raised an error."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(431, f"the request line and its headers have more than {MAX_HEADER_BYTES} bytes")
        else:
            self._refuse(400, "this is not a request of HTTP/1.1")

    def _measure(self, read: int, found: int) -> None:
        """Ends a request whose body comes in chunks of a few bytes. read: bytes received. found: bytes of the body
        among them."""
        if self.cycle.response_complete and not any(name == b"transfer-encoding" for name, _ in self.headers):
            return  # the rest of a body without chunks is discarded, which takes no time
        self._body, self._framing = self._body + found, self._framing + read - found
        if self._framing > max(MAX_FRAMING, self._body):
            self._refuse(400, "the chunks of the body have a few bytes each; expected larger ones")

    def _wait_for_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _watch_room(self, before: int | None = None) -> None:
        """Ends the connection of a client that does not read: more than 64 KiB, or the end of an answer, waits for it.
        before: the bytes that waited STALLED_SECONDS ago."""
        self._stop_waiting_for_room()
        waiting = self.transport.get_write_buffer_size()
        if not waiting or not (self.flow.write_paused or self.cycle.response_complete):
            return
        if before is not None and before - waiting < min(before, ROOM):
            self.transport.abort()
        else:
            self._room_due = self.loop.call_later(STALLED_SECONDS, self._watch_room, waiting)

    def _stop_waiting_for_room(self) -> None:
        if self._room_due is not None:
            self._room_due.cancel()
            self._room_due = None

    def _headers_are_late(self) -> None:
        self._headers_due = None
        if not self.conn.trailing_data[0]:  # a client that has connected and sent nothing gets no answer
            self.transport.close()
        self._refuse(408, f"the headers of the request did not come within {HEADER_SECONDS:g} s")

    def _rest_is_late(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers with an error, unless an answer has begun, and closes the connection."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(errors.openai_body(ApiError(status, message))).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                *([("retry-after", "5")] if status == 503 else []),
            ]
            answer = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def at_most(connections: int) -> type[Protocol]:
    """The protocol class of a server with at most this many connections."""
    return type("Bounded", (Protocol,), {"most": connections})
