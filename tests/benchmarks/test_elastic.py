"""The benchmark of elastic networks runs, and ends with one line of JSON."""

import json
from itertools import count

import pytest

from benchmarks import elastic
from model.encoders.vae import small_vae
from model.encoders.wavelet import WaveletAutoencoder, WaveletConfig
from model.sub_network import SubNetwork


@pytest.fixture
def folders(tmp_path):
    """A teacher and its student, of other sizes than those of a new one."""
    spaces = {"teacher": small_vae(), "wavelet": WaveletAutoencoder(WaveletConfig(width=16, blocks=1))}
    quality = {"teacher": {"psnr": 25.0}, "wavelet": {"psnr": 24.0, "psnr_own_encoder": 24.5}}
    for name, space in spaces.items():
        space.save_pretrained(tmp_path / name, safe_serialization=True)
        (tmp_path / name / "training.json").write_text(json.dumps(quality[name]))
    return [tmp_path / name for name in spaces]


def test_it_runs(capsys, folders):
    elastic.main(["--tiny", "--trained", *map(str, folders)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    values = json.loads(lines[-1])
    assert set(values["attention"]) == {"256", "1024"}
    assert set(values["excess"]) == {f"depth{depth}_patch{patch}" for depth in (4, 2) for patch in (2, 4)}
    assert values["excess"]["depth4_patch2"] == 0
    assert sum(line.startswith("| depth") for line in lines) == 4
    assert values["goals"]["dB below the small VAE"] == {"value": 1.0, "goal": 1.5, "met": True}
    assert "PSNR: small VAE 25.00 dB, wavelet 24.00 dB, wavelet encoder alone 24.50 dB." in out


def test_the_encoders_that_are_timed_are_those_whose_quality_is_read(folders):
    teacher, student = elastic.find_encoders(folders)
    assert student.module.config.width == 16
    assert teacher.identity != elastic.find_encoders(None)[0].identity
    assert elastic.find_encoders(None)[1].module.config == elastic.STUDENT


def test_shares_are_ratios_to_the_neighbors_on_a_machine_that_slows_down(monkeypatch):
    full, half = SubNetwork(4, 2), SubNetwork(2, 2)
    now, speed, ran = [0.0], count(1), []

    def run(part):
        # each run takes longer than the one before it
        ran.append(part)
        now[0] += next(speed) * (2.0 if part == full else 1.0)

    monkeypatch.setattr(elastic.time, "perf_counter", lambda: now[0])
    times = elastic.measure_shares(run, {full: 1.0, half: 0.5}, 9)
    assert ran[:8] == [full, half, half, full] * 2
    assert times[full].share == 1
    assert times[half].share == pytest.approx(0.5)
