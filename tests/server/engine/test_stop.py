import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.stop import StopMatcher, TextOutput
from server.text import TextCodec


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    return [*shown, matcher.flush()], matcher.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["STOP"], ["one S", "TO", "P two"], ["one ", "", "", ""], True),
        (["STOP"], ["one S", "TA", "P"], ["one ", "STA", "P", ""], False),
        (["STOP"], ["one ST"], ["one ", "ST"], False),
        (["aab"], ["aa", "aab"], ["", "aa", ""], True),
        (["ab", "abc"], ["xab", "c"], ["x", "", ""], True),
        (["cd", "bc"], ["abcd"], ["a", ""], True),
        (["\n\n"], ["x\n", "y\n", "\n"], ["x", "\ny", "", ""], True),
    ],
)
def test_matches_across_pieces(stops: list[str], pieces: list[str], shown: list[str], stopped: bool) -> None:
    assert run(stops, pieces) == (shown, stopped)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_character_by_character_equals_searching_the_whole_text(text: str, stops: list[str]) -> None:
    shown, stopped = run(stops, list(text))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    first_end = min(ends)[0] if ends else None
    expected = text if first_end is None else text[: min(start for end, start in ends if end == first_end)]
    assert "".join(shown) == expected


def test_the_token_that_completes_a_stop_string_is_the_last(codec: TextCodec) -> None:
    ids = codec.encode("Grüße 🌍 STOP x")
    output = TextOutput(codec, ["🌍 STO"])
    shown, used = "", list[int]()
    while not output.stopped:
        used.append(ids[len(used)])
        shown += output.push(used[-1]).text
    assert (shown, codec.decode(used)) == ("Grüße ", "Grüße 🌍 STO")
    assert output.push(ids[len(used)]).text == output.flush() == ""


def test_flush_gives_what_was_held(codec: TextCodec) -> None:
    output = TextOutput(codec, ["STOP"])
    deltas = [output.push(token_id) for token_id in codec.encode("a ST")]
    assert "".join(delta.text for delta in deltas) == "a "
    assert "".join(delta.decoded for delta in deltas) == "a ST"
    assert output.flush() == "ST"
