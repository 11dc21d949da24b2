"""The plan of a demo: what it does fits into its minutes, whatever the machine's speed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.demonstration.plan import (
    DRAWING_FACTOR,
    END_SHARE,
    END_STARTS,
    MAX_IMAGES,
    MIN_IMAGES,
    RESERVE_SECONDS,
    SPEED_STEPS,
    make_plan,
)
from pipeline.stage.config import load_stage

STAGE = load_stage("demo")
BATCH = STAGE.global_batch


def trial_seconds(rate, start):
    return start + SPEED_STEPS * BATCH / rate


@given(
    minutes=st.floats(2, 600),
    rate=st.floats(5, 10_000),
    start=st.floats(0, 30),
    before=st.floats(0, 100),
)
def test_the_phases_fit_into_the_time(minutes, rate, start, before):
    trial = trial_seconds(rate, start)
    plan = make_plan(minutes, before + trial, trial, rate, STAGE)
    assert plan.samples % BATCH == 0
    assert plan.samples >= 2 * BATCH
    assert MIN_IMAGES <= plan.images <= MAX_IMAGES

    training = 2 * start + plan.samples / rate
    assert plan.samples == 2 * BATCH or before + trial + training <= (1 - END_SHARE) * 60 * minutes + 1e-6
    per_image = 2 * STAGE.sample.steps / (3 * rate) * DRAWING_FACTOR
    drawing = END_STARTS * start + plan.images * per_image
    assert plan.images == MIN_IMAGES or drawing <= END_SHARE * 60 * minutes + 1e-6


def test_the_time_left_is_spent_on_training():
    plan = make_plan(8, 100.0, trial_seconds(100, 10), 100.0, STAGE)
    # all but what is spent, two starts, and the end; less than one batch is left over
    seconds = 480 - RESERVE_SECONDS - 100 - 2 * 10 - END_SHARE * 480
    assert 0 <= seconds * 100 - plan.samples < BATCH


def test_more_minutes_give_more_training_and_more_images():
    plans = [make_plan(minutes, 60.0, trial_seconds(40, 5), 40.0, STAGE) for minutes in (4, 8, 16)]
    assert plans[0].samples < plans[1].samples < plans[2].samples
    assert plans[0].images <= plans[1].images <= plans[2].images


def test_sampling_without_guidance_gives_twice_the_images():
    sample = replace(STAGE.sample, guidance=1.0, steps=100)
    trial = trial_seconds(50, 0)
    single = make_plan(32, trial, trial, 50.0, replace(STAGE, sample=sample))
    double = make_plan(32, trial, trial, 50.0, replace(STAGE, sample=replace(sample, guidance=2.0)))
    assert single.images == pytest.approx(2 * double.images, abs=1)


def test_a_time_that_is_over_still_gives_a_run_that_can_stop_half_way():
    plan = make_plan(0.1, 500.0, 60.0, 30.0, STAGE)
    assert (plan.samples, plan.images) == (2 * BATCH, MIN_IMAGES)
