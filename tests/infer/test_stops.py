from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from persimmon.infer.stops import StopMatcher, first_stop

ALPHABET = "ab\n"
texts = st.text(ALPHABET, max_size=30)
stop_sets = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def naive_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Read the text character by character until some stop stands at its end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            assert end - len(longest) == text.find(longest)
            return end - len(longest), longest
    return None


def cut(text: str, edges: list[int]) -> list[str]:
    points = [0, *sorted(min(edge, len(text)) for edge in edges), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(points)]


@given(text=texts, stops=stop_sets)
def test_first_stop_equals_the_naive_search(text: str, stops: list[str]) -> None:
    assert first_stop(text, stops) == naive_stop(text, stops)


@given(text=texts, stops=stop_sets, edges=st.lists(st.integers(0, 30), max_size=8))
def test_a_stream_gives_the_text_before_the_stop_however_it_is_cut(
    text: str, stops: list[str], edges: list[int]
) -> None:
    found = naive_stop(text, stops)
    expected = text if found is None else text[: found[0]]
    matcher, given_out = StopMatcher(stops), ""
    for part in cut(text, edges):
        given_out += matcher.add(part)
        # Whatever is out stays right: it is never more than the final text.
        assert expected.startswith(given_out)
    given_out += matcher.finish()
    assert given_out == expected
    assert matcher.matched == (None if found is None else found[1])


@given(text=texts, stops=stop_sets)
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str]) -> None:
    """What is held could still become a stop string."""
    matcher, given_out = StopMatcher(stops), ""
    for end in range(1, len(text) + 1):
        given_out += matcher.add(text[end - 1])
        if matcher.matched is not None:
            return
        held = text[len(given_out) : end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_chat_stop() -> None:
    matcher = StopMatcher(("\n\nhuman:",))
    out = [matcher.add(part) for part in (" Hi.", "\n", "\nhum", "ble", " text\n\nhuman", ": more", "after")]
    assert out == [" Hi.", "", "", "\n\nhumble", " text", "", ""]
    assert matcher.matched == "\n\nhuman:" and matcher.finish() == ""


def test_of_stops_that_end_together_the_longest_wins() -> None:
    assert first_stop("xxabc", ["bc", "abc", "c"]) == (2, "abc")
    assert first_stop("abcd", ["abcd", "b"]) == (1, "b")
