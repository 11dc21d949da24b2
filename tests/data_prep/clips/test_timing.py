"""The frames of a clip follow from the times of a video's frames."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clips.timing import BAD_TIMES, Timeline
from data_prep.images.images import ImageError

MS = Fraction(1, 1000)
rates = st.sampled_from([8, 10, 12.5, 15, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 120])


@given(
    rates, st.integers(2, 400), st.integers(-5000, 5000), st.sampled_from([8.0, 12.0, 24.0, 30.0]), st.data()
)
@settings(max_examples=200, deadline=None)
def test_a_constant_rate_gives_every_nth_frame(rate, count, origin, wanted, data):
    """Also where the container has rounded the times to milliseconds."""
    times = [origin + round(number * 1000 / rate) for number in range(count)]
    timeline = Timeline.of(data.draw(st.permutations(times)), 0, MS)
    assert timeline.steps == count
    assert timeline.fps == pytest.approx(rate, rel=0.01 + 1 / count if count > 20 else 0.06)
    stride = timeline.stride(wanted)
    assert (
        abs(timeline.fps / stride - wanted)
        <= min(abs(timeline.fps / other - wanted) for other in (stride + 1, max(1, stride - 1)))
        + 0.5 * wanted
    )

    usable = timeline.usable(wanted)
    assert usable == (count - 1) // stride + 1
    frames = data.draw(st.integers(1, usable))
    for start in ("start", "middle", "random"):
        choice = timeline.choose(frames, wanted, start, (3, 4))
        first = choice.indices[0]
        assert choice.indices == tuple(range(first, first + frames * stride, stride))
        assert choice.indices[-1] < count
        assert choice == timeline.choose(frames, wanted, start, (3, 4))
        assert choice.start == pytest.approx(first / timeline.fps)
    assert timeline.choose(frames, wanted, "start", ()).indices[0] == 0
    middle = timeline.choose(frames, wanted, "middle", ()).indices
    assert abs(middle[0] - (count - 1 - middle[-1])) <= 1
    with pytest.raises(ValueError, match="frames of"):
        timeline.choose(usable + 1, wanted, "start", ())


@given(st.lists(st.integers(1, 4), min_size=6, max_size=60), st.sampled_from([33, 40, 42]), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_a_variable_rate_gives_the_frame_shown_at_each_time(holds, interval, stride):
    """Frames are held for 1 to 4 intervals, most of them for one."""
    holds = [1] * len(holds) + holds  # so that the interval is the usual gap
    times = np.concatenate([[0], np.cumsum(holds)])[:-1] * interval
    timeline = Timeline.of(times, holds[-1] * interval, MS)
    assert timeline.interval == interval
    assert timeline.steps == sum(holds)
    wanted = 1000 / interval / stride
    frames = timeline.usable(wanted)
    choice = timeline.choose(frames, wanted, "start", ())
    for number, index in enumerate(choice.indices):
        now = number * choice.stride * interval
        assert times[index] <= now
        assert index == len(times) - 1 or times[index + 1] > now


def test_a_stated_number_of_frames_counts():
    """WebP joins equal neighbors, so more than half of the gaps may be longer than the frame interval."""
    timeline = Timeline.of([0, 84, 168, 252, 378], 84, MS, steps=11)
    assert timeline.choose(11, 24, "start", ()).indices == (0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4)


@pytest.mark.parametrize(
    ("times", "last", "unit"),
    [
        ([0, 40, 80], 10**9, MS),  # a last frame that is shown for eleven days
        ([0, 40, 80, 10**12], 0, MS),
        ([0, 10**7, 2 * 10**7], 0, MS),
        ([0, 1, 2], 0, Fraction(1, 90000)),
        ([-(2**62), 2**62], 0, MS),
    ],
)
def test_absurd_times_are_refused(times, last, unit):
    with pytest.raises(ImageError) as caught:
        Timeline.of(times, last, unit)
    assert caught.value.reason == BAD_TIMES


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), st.integers(0, 2**63 - 1), st.integers(1, 10**6)
)
@settings(max_examples=300, deadline=None)
def test_any_times_give_a_clip_or_a_reason(times, last, unit):
    try:
        timeline = Timeline.of(times, last, Fraction(1, unit))
    except ImageError:
        return
    usable = timeline.usable(24)
    assert 0 <= usable <= 64 * max(1, len(times))
    if usable:
        indices = timeline.choose(usable, 24, "random", (1, 2)).indices
        assert len(indices) == usable
        assert list(indices) == sorted(indices)
        assert 0 <= indices[0] <= indices[-1] < len(set(times))


def test_one_frame_is_no_clip():
    assert Timeline.of([7], 10**12, MS).usable(24) == 1
    assert Timeline.of([], 0, MS).usable(24) == 0
