"""The benchmark of elastic networks runs, and ends with one line of JSON."""

import json

from benchmarks import elastic


def test_it_runs(capsys, tmp_path):
    folders = tmp_path / "teacher", tmp_path / "wavelet"
    for folder, psnr in zip(folders, (25.0, 24.0), strict=True):
        folder.mkdir()
        (folder / "training.json").write_text(json.dumps({"psnr": psnr}))
    elastic.main(["--tiny", "--trained", *map(str, folders)])
    lines = capsys.readouterr().out.splitlines()
    values = json.loads(lines[-1])
    assert set(values["attention"]) == {"256", "1024"}
    assert set(values["excess"]) == {f"depth{depth}_patch{patch}" for depth in (4, 2) for patch in (2, 4)}
    assert sum(line.startswith("| depth") for line in lines) == 4
    assert values["goals"]["dB below the small VAE"] == {"value": 1.0, "goal": 1.5, "met": True}
