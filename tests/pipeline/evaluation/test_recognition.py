"""Recognition on cases that are worked out by hand: exact shares, ties, chance, and the interval."""

import pytest
import torch

from pipeline.evaluation.recognition import distances, recognition, recognized, share_interval

GENERATOR = torch.Generator().manual_seed(0)


def images(count, side=4):
    return torch.randint(256, (count, 3, side, side), generator=GENERATOR, dtype=torch.uint8)


def test_the_training_images_themselves_are_all_recognized():
    references = images(50)
    result = recognition(references[10:30], references, torch.eye(50, dtype=torch.bool)[10:30])
    assert (result.share, result.chance) == (1.0, pytest.approx(1 / 50))
    assert (result.images, result.references) == (20, 50)


def test_a_slightly_changed_image_is_still_nearest_to_its_own():
    references = images(50).float()
    noisy = references + torch.randn(references.shape, generator=GENERATOR)
    assert recognition(noisy, references, torch.eye(50, dtype=torch.bool)).share == 1.0


def test_images_of_other_captions_are_not_recognized():
    references = images(50)
    assert recognition(references.roll(1, 0), references, torch.eye(50, dtype=torch.bool)).share == 0.0


def test_random_captions_give_chance():
    references = images(40)
    # each image meets each caption once, so the share is that of chance exactly
    every_image, every_caption = torch.arange(40).repeat_interleave(40), torch.arange(40).repeat(40)
    own = torch.eye(40, dtype=torch.bool)[every_caption]
    result = recognition(references[every_image], references, own)
    assert result.share == pytest.approx(result.chance) == pytest.approx(1 / 40)


def test_ties_count_as_the_share_of_the_nearest_that_are_own():
    far = torch.tensor([[1.0, 1.0, 2.0, 1.0], [3.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    own = torch.tensor([[True, False, False, False], [False, True, True, False], [False, False, True, False]])
    assert recognized(far, own).tolist() == pytest.approx([1 / 3, 1.0, 1 / 4])


def test_equal_references_tie_wherever_they_are():
    references = images(30, side=9)
    references[7] = references[29] = references[0]
    close = references[:1].float() + 0.3
    own = torch.zeros(1, 30, dtype=torch.bool)
    own[0, 29] = True
    assert recognition(close, references, own).share == pytest.approx(1 / 3)


def test_a_blank_image_before_blank_references_scores_chance():
    blank = torch.zeros(8, 3, 4, 4)
    assert recognition(blank, blank, torch.eye(8, dtype=torch.bool)).share == pytest.approx(1 / 8)


def test_distances_are_those_between_the_pixels():
    some, references = images(7), images(11)
    squared = (some[2].double() - references[3].double()).square().sum().item()
    assert distances(some, references)[2, 3].item() == pytest.approx(squared**0.5)


def test_an_image_without_a_caption_among_the_references_is_refused():
    with pytest.raises(ValueError, match="no reference of its own"):
        recognized(torch.zeros(2, 3), torch.tensor([[True, False, False], [False, False, False]]))


def test_the_interval_is_wilsons():
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) for 1 of 24, as tables of it have it
    assert share_interval(1 / 24, 24) == pytest.approx((0.0074, 0.2024), abs=1e-3)
    assert share_interval(0.0, 24) == pytest.approx((0.0, 0.1380), abs=1e-3)
    assert share_interval(1.0, 24) == pytest.approx((0.8620, 1.0), abs=1e-3)
