"""What measured times and an acceptance come to."""

from __future__ import annotations

import json

import pytest

from larosa.benchmarks.lossless_shape import Acceptance, best

VERIFY = (4.0, 4.2, 4.3, 4.4, 4.8, 4.9, 5.0, 5.1)


@pytest.mark.parametrize("draft", [0.1, 1.6, 2.2, 9.0])
@pytest.mark.parametrize("shares", [(0.95,), (0.5,), (0.9, 0.8, 0.3), (0.0,), (1.0,)])
def test_the_best_number_of_drafts_is_found(draft, shares):
    """Tokens of a pass by how far drafts are right: one more than are right in front of the first wrong one."""
    at = [shares[min(place, len(shares) - 1)] for place in range(7)]
    speeds = []
    for count in range(8):
        tokens, all_right = 0.0, 1.0
        for right in range(count):
            tokens += (right + 1) * all_right * (1 - at[right])
            all_right *= at[right]
        tokens += (count + 1) * all_right
        speeds.append(tokens / (count * draft + VERIFY[count]))
    found = best(draft, VERIFY, Acceptance(shares, ""))
    assert found.tokens / found.seconds == pytest.approx(max(speeds))
    assert speeds[found.drafted] == pytest.approx(max(speeds))


def test_an_acceptance_by_place_or_of_all_places(tmp_path):
    rows = [{"kind": "code", "acceptance": 0.1}, {"kind": "all", "acceptance": 0.8}]
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"rows": rows}), "utf-8")
    assert Acceptance.read(str(path)) == Acceptance((0.8,), str(path))
    rows[1]["accepted_at"] = [0.9, 0.7]
    path.write_text(json.dumps({"rows": rows}), "utf-8")
    assert Acceptance.read(str(path)).at == (0.9, 0.7)
    assert Acceptance.read("0.5").chances() == [0.5**count for count in range(1, 8)]
