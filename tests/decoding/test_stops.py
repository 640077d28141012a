from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from larosa.decoding.stops import StopStrings

LETTERS = st.text("ab", max_size=12)


@given(pieces=st.lists(LETTERS, max_size=6), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_up_to_the_first_of_them(pieces, strings):
    stops, shown, come = StopStrings(strings), "", ""
    for piece in pieces:
        come += piece
        shown += stops.put(piece)
        # No more is held back than may be the beginning of one.
        if not stops.stopped:
            held = come[len(shown) :]
            assert not held or any(string.startswith(held) and string != held for string in strings)
        else:
            break
    whole = "".join(pieces)
    complete = [(whole.find(string) + len(string), whole.find(string)) for string in strings if string in whole]
    assert stops.stopped == bool(complete)
    assert shown + stops.end() == (whole[: min(complete)[1]] if complete else whole)


def test_the_first_to_be_complete_counts():
    for pieces in (["abbb"], ["a", "b", "b", "b"]):
        stops = StopStrings(["bb", "abbb"])
        assert "".join(map(stops.put, pieces[:3])) == "a"
        assert stops.stopped
