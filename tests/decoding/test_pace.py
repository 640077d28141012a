"""What is drafted: by times of a clock that the tests move on, over steps that stand in for a device's."""

from __future__ import annotations

import random

import pytest
import torch

from larosa.decoding.lossless import Speculation
from larosa.decoding.pace import Acceptance, Pace, Stopwatch
from larosa.decoding.sampling import Sampler


def pace_of(*seconds, draft):
    """A pace of steps that take so long, by rows."""
    pace = Pace()
    for watch, each in zip(pace._checks, seconds, strict=False):
        for _ in range(4):
            watch.add(each)
    with pace.checking(8):
        pass
    for _ in range(4):
        pace.draft.add(draft)
    return pace


def test_times_are_medians_of_what_was_measured_and_hopes_for_the_rest():
    pace = Pace()
    assert not pace.known
    for watch, times in zip(
        pace._checks, ([9, 1.0, 9, 1.0, 1.0], [9, 1.5, 1.5, 7], [5, 5, 5], [9, 1.3, 1.3, 1.3]), strict=False
    ):
        for seconds in times:  # the first is that of recording
            watch.add(seconds)
    with pace.checking(8):
        pass
    assert pace.known
    assert [pace.seconds(rows) for rows in (1, 2, 3, 4)] == pytest.approx([1.0, 1.22, 1.22, 1.3])
    assert pace.seconds(8) == pytest.approx(1.62)


class LateClock:
    """Each mark is a second behind the last, and passed when `now_is` says so; nobody may wait for one."""

    marks = now_is = 0

    def now(self):
        self.marks += 1
        return self.marks

    def passed(self, mark):
        return mark <= self.now_is

    def wait(self, mark):
        raise AssertionError

    def seconds(self, first, last):
        assert self.passed(last)
        return last - first


def test_nobody_waits_for_a_time():
    clock = LateClock()
    watch = Stopwatch(clock)
    for times in (1, 4, 4, 1, 1):
        watch.put(clock.now(), clock.now(), times)
    clock.now_is = 6
    assert watch.seconds is None
    clock.now_is = 8
    assert watch.seconds == 0.25  # a second for four runs; the first does not count
    clock.now_is = 10
    assert watch.seconds == 0.625


def test_while_the_host_looks_at_a_step_it_goes_on():
    clock = LateClock()
    clock.now_is = 100
    pace = Pace(clock)
    for between in (7, 5, 5, 5):
        with pace.checking(2, idle=True):
            pass
        clock.marks += between
        with pace.checking(1):
            pass
    assert [pace.seconds(rows) for rows in (1, 2)] == [1, 6]
    assert pace.seconds(3) == pytest.approx(1.16 + 6 - 1.08)  # nobody has waited for one of three rows
    with pace.checking(2, idle=True):
        pass
    clock.marks += 50
    pace.pause()
    with pace.checking(1):
        pass
    assert pace.seconds(2) == 6


def test_as_many_are_drafted_as_pay():
    """Against the tokens of every number of drafts over their time."""
    acceptance = Acceptance(0.9)
    steps, draft = (1.0, 1.2, 1.3, 1.35, 1.7, 1.8, 1.9, 2.1), 0.45
    pace = pace_of(*steps, draft=draft)
    speeds = [sum(0.9**i for i in range(count + 1)) / (count * draft + steps[count]) for count in range(len(steps))]
    assert pace.speed(acceptance) == pytest.approx(max(speeds))
    gains = pace.gains(acceptance, 7, max(speeds), draft=draft)
    assert gains.index(max(gains)) + 1 == speeds.index(max(speeds)) == 3
    # At that speed the best number of drafts is worth as much as none and a token: it gains nothing more.
    assert 1 + max(gains) == pytest.approx(max(speeds) * steps[0])
    assert max(pace.gains(acceptance, 7, 1.0, draft=2.0)) < 0
    assert pace.speed(Acceptance(0.3)) == 1.0
    unlikely = pace.gains(acceptance, 6, max(speeds), draft=draft, drafted=1, chance=0.2)
    assert max(unlikely) < 0 < max(pace.gains(acceptance, 6, max(speeds), draft=draft, drafted=1))


def test_what_is_accepted_is_learnt_by_how_probable_it_was():
    acceptance = Acceptance(0.8)
    for _ in range(200):
        acceptance.observe(3, 1, [0.99, 0.5, 0.99])  # the third stands behind a wrong one
    assert acceptance.rate(0.99) > 0.99
    assert acceptance.rate(0.5) < 0.01
    assert acceptance.average == pytest.approx(0.5, abs=0.03)


class Device:
    """A clock of a device that runs what it is given in order, beside a host that only waits when it looks."""

    host = busy_until = 0.0

    def run(self, seconds):
        self.busy_until = self.now() + seconds

    def now(self):
        return max(self.busy_until, self.host)

    def passed(self, mark):
        return mark <= self.host

    def wait(self, mark):
        self.host = max(self.host, mark)

    def seconds(self, first, last):
        assert self.passed(last)
        return last - first


VOCABULARY = 256
#: What a step takes by its rows, over one of one row: an H200, and two cores of a Xeon.
GPU = (1.0, 1.02, 1.06, 1.19, 1.26, 1.31, 1.42, 1.56)
CPU = (1.0, 1.22, 1.34, 1.42, 1.70, 2.06, 2.25, 2.44)


class Engine:
    """Gives a known text, after steps of known times; as a drafter it is right in some places only."""

    device, max_length = torch.device("cpu"), 10**6

    def __init__(self, clock, step, rows, text, right=1.0, drafter=None):
        self.clock, self.text, self.right, self.drafter = clock, text, right, drafter
        self.seconds = [step * share for share in rows]

    def beside(self, weights):
        return self.drafter

    def step(self, tokens, positions, texts):
        self.clock.run(self.seconds[len(tokens) - 1])
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row, place in zip(logits, positions.tolist(), strict=True):
            right = random.Random(place).random() < self.right
            row[self.text[place + 1] if right else self.text[place + 1] - 1] = 10
        return logits


class WaitingSampler(Sampler):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def accept(self, *args, **options):
        self.clock.wait(self.clock.busy_until)
        return super().accept(*args, **options)


PROMPT = 48


def write(kind, seed):
    """Texts that nothing can be looked up in, or only what is wrong, or that repeat much of themselves."""
    draw = random.Random(seed)
    text = [draw.randrange(3, VOCABULARY) for _ in range(PROMPT)]
    while len(text) < PROMPT + 300:
        if kind == "misleading":
            text += [1, 2, draw.randrange(3, VOCABULARY)]
        elif kind == "repetitive" and draw.random() < 0.6:
            start = draw.randrange(len(text) - 12)
            text += text[start : start + draw.randrange(2, 12)]
        else:
            text.append(draw.randrange(3, VOCABULARY))
    return text


def speeds(kind, step, rows, host, right, draft=0.5, drafted=None):
    """Of texts of 64, 128 and 256 tokens after one to warm up, over dense steps that no host delays.

    Args:
        step: seconds of a dense step.
        host: seconds between what a round gives and the next.
        right: share of a model's drafts that are right; None without one.
        draft: what a step of it takes over a dense one.
    """
    clock, text = Device(), []
    drafter = None if right is None else Engine(clock, draft * step, rows, text, right)
    engine = Engine(clock, step, rows, text, drafter=drafter)
    speculation = Speculation(engine, drafter, in_blocks=True, drafted=drafted, clock=clock)
    sampler, found = WaitingSampler(clock), []
    for seed, count in enumerate((128, 64, 128, 256)):
        text[:] = write(kind, seed)
        clock.wait(clock.busy_until)
        started, drafters, end = clock.host, speculation.drafters(), PROMPT + count
        tokens = text[: PROMPT + 1]
        while len(tokens) < end:
            clock.host += host
            tokens += speculation.advance(tokens, end - len(tokens), sampler, drafters)[0]
        assert tokens == text[: len(tokens)]
        found.append((len(tokens) - PROMPT - 1) * step / (clock.host - started))
    return found[1:]


#: Seconds of a dense step of a small model and of a large one on a GPU, and of a small one on a CPU.
STEPS = [(0.7e-3, GPU), (4e-3, GPU), (11e-3, CPU)]
HOSTS = [0.0, 100e-6, 300e-6]


@pytest.mark.parametrize("kind", ["new", "misleading"])
@pytest.mark.parametrize(("step", "rows"), STEPS, ids=["small", "large", "cpu"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("right", "draft"), [(None, 0.5), (0.0, 0.5), (0.5, 0.5), (0.85, 0.5), (1.0, 1.0)])
@pytest.mark.one_of(4)
def test_no_text_is_slower_by_more_than_three_percent(kind, step, rows, host, right, draft):
    found = speeds(kind, step, rows, host, right, draft)
    if right == 0.85:  # where drafts pay a little, chance makes one text slower and the next one faster
        found = [sum(found) / len(found)]
    assert min(found) > 0.97


@pytest.mark.parametrize(("step", "rows"), STEPS, ids=["small", "large", "cpu"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("right", [0.85, 0.95])
@pytest.mark.one_of(4)
def test_where_drafts_pay_nearly_the_best_number_is_drafted(step, rows, host, right):
    """Beside every number of drafts, the same each time."""
    best = max(sum(speeds("new", step, rows, host, right, drafted=count)) for count in range(1, 6))
    found = sum(speeds("new", step, rows, host, right))
    assert found > 0.93 * best  # chance has a part in how right a drafter seems


@pytest.mark.parametrize(("step", "rows"), STEPS, ids=["small", "large", "cpu"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("right", [None, 0.0])
@pytest.mark.one_of(4)
def test_a_text_that_repeats_itself_is_faster(step, rows, host, right):
    assert min(speeds("repetitive", step, rows, host, right)) > 1.2
