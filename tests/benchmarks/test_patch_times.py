"""The benchmark of patch times, in a tiny size: it runs, and its three ways are the same times."""

import json

import torch

from benchmarks import patch_times

TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--side", "8", "--tokens", "4", "--batch", "2"]


def test_it_ends_with_a_line_of_goals(capsys):
    options = patch_times.parse([*TINY, "--levels", "3", "--warmup", "0", "--rounds", "2"])
    results = patch_times.run(options)
    assert {len(result["seconds"]) for result in results.values()} == {2}
    patch_times.report(options, results)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "patch_times"
    (goal,) = last["goals"].values()
    assert goal["goal"] == 1.06
    assert goal["met"] == (last["ratios"]["levels"] <= 1.06)
    assert last["ratios"]["one time per sample"] == 1.0
    shared, levels, each = last["kept_bytes"].values()
    assert 0 < shared < levels < each


def test_its_ways_give_each_patch_the_same_time():
    options = patch_times.parse([*TINY, "--levels", "3"])
    _, ways = patch_times.example_conditions(options, torch.device("cpu"))
    levels, each = ways["levels"], ways["modulation of each patch"]
    assert torch.equal(levels.timesteps.gather(1, levels.levels.places), each.timesteps)
    torch.testing.assert_close(each.timesteps.mean(1), ways["one time per sample"].timesteps)
