"""Which noise the images of several prompts start from."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample import plan_images

PROMPTS = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=6)


@given(prompts=PROMPTS, images=st.integers(1, 4), seed=st.integers(0, 100))
def test_prompts_share_their_seeds_unless_told_otherwise(prompts, images, seed):
    shared, own = (plan_images(prompts, images, seed, own_seeds) for own_seeds in (False, True))
    assert [(image.file, image.prompt) for image in shared] == [(image.file, image.prompt) for image in own]
    assert [image.seed for image in shared] == [seed + j for _ in prompts for j in range(images)]
    # One after another, so that no two share their noise.
    assert [image.seed for image in own] == list(range(seed, seed + len(prompts) * images))
