"""Events come out whole and at once, however they come in."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.openai.sse import EventParser

TOKENS = [
    f'data: {{"choices":[{{"text":"{t}"}}]}}\n\n'.encode() for t in ("a", "b é", '\\"usage\\"')
]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"".join([*TOKENS, USAGE, b": comment\n\n", DONE])


@given(st.sets(st.integers(1, len(STREAM) - 1)), st.booleans(), st.booleans())
def test_any_cut_gives_the_same(cuts: set[int], hide: bool, crlf: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if crlf else STREAM
    usage = USAGE.replace(b"\n", b"\r\n") if crlf else USAGE
    events = EventParser(hide_usage=hide)
    edges = [0, *sorted(cuts), len(stream)]
    pieces = [events.feed(stream[a:b])[0] for a, b in pairwise(edges)]
    for piece in pieces:
        assert not piece or piece.endswith((b"\n\n", b"\r\n\r\n"))
    assert b"".join(pieces) == (stream.replace(usage, b"") if hide else stream)
    assert events.rest == b""
    assert (events.count, events.usage) == (3, (5, 3))


def test_whole_events_do_not_wait() -> None:
    events = EventParser(hide_usage=True)
    assert events.feed(TOKENS[0] + b"data: {") == (TOKENS[0], True)
    assert events.feed(TOKENS[1][7:]) == (TOKENS[1], True)
    assert events.feed(USAGE + DONE) == (DONE, False)


def test_errors_get_openais_shape() -> None:
    error = {"message": "no", "type": "BadRequestError", "param": None, "code": 400}
    events = EventParser(False)
    out, tokens = events.feed(f"data: {json.dumps({'error': error})}\n\n".encode())
    assert json.loads(out.removeprefix(b"data: "))["error"]["code"] is None
    assert (tokens, events.error_status) == (False, 400)


@pytest.mark.parametrize("error", ['"no"', '{"code": "x"}', '{"code": 200}', '{"code": true}'])
def test_error_without_a_status_is_a_500(error: str) -> None:
    events = EventParser(False)
    events.feed(f'data: {{"error": {error}}}\n\n'.encode())
    assert events.error is not None and events.error_status == 500


def test_usage_beside_choices_stays() -> None:
    event = (
        b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":5,"completion_tokens":1}}\n\n'
    )
    events = EventParser(hide_usage=True)
    assert events.feed(event) == (event, True)
    assert events.usage == (5, 1)
