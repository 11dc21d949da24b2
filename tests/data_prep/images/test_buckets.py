import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import BucketConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.buckets import TOO_CROPPED, TOO_SMALL, assign, make_buckets
from model.common.errors import UserError

configs = st.builds(
    lambda step, times, aspect: BucketConfig(resolution=step * times, step=step, max_aspect=aspect),
    st.sampled_from([8, 16, 32, 64]),
    st.integers(1, 32),
    st.floats(1, 4),
)
sides = st.integers(1, 5000)


@given(configs)
def test_buckets_have_equal_area_and_come_in_mirrored_pairs(config):
    buckets = make_buckets(config)
    assert Bucket(config.resolution, config.resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket.height % config.step == bucket.width % config.step == 0
        short, long = sorted((bucket.height, bucket.width))
        assert long / short <= config.max_aspect
        assert abs(short * long - config.resolution**2) <= short * config.step / 2
        assert Bucket(bucket.width, bucket.height) in buckets


@given(configs, sides, sides, st.floats(0.5, 4), st.floats(0, 1))
def test_the_nearest_aspect_is_chosen_and_limits_are_kept(config, height, width, max_upscale, max_crop):
    buckets = make_buckets(config)
    assigned = assign(buckets, height, width, max_upscale, max_crop)
    distances = {bucket: abs(math.log(bucket.height / bucket.width * width / height)) for bucket in buckets}
    nearest = min(distances, key=lambda b: (distances[b], b.height, b.width))
    scale = max(nearest.height / height, nearest.width / width)
    lost = 1 - nearest.height * nearest.width / (height * width * scale**2)
    if isinstance(assigned, Bucket):
        assert distances[assigned] == pytest.approx(min(distances.values()), abs=1e-9)
        assert scale <= max_upscale * (1 + 1e-9)
        assert lost <= max_crop + 1e-9
    else:
        assert assigned == TOO_SMALL or lost > max_crop - 1e-9
        assert assigned == TOO_CROPPED or scale > max_upscale * (1 - 1e-9)


@given(configs, sides, sides)
def test_turning_the_image_turns_the_bucket(config, height, width):
    buckets = make_buckets(config)
    bucket, turned = assign(buckets, height, width, math.inf), assign(buckets, width, height, math.inf)
    assert isinstance(bucket, Bucket)
    assert isinstance(turned, Bucket)
    assert sorted((bucket.height, bucket.width)) == sorted((turned.height, turned.width))


@pytest.mark.parametrize(
    "config", [BucketConfig(resolution=100, step=32), BucketConfig(max_aspect=0.5), BucketConfig(step=0)]
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(UserError, match=r"buckets\."):
        make_buckets(config)
