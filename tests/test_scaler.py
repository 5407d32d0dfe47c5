"""pytest tests/test_scaler.py; whole runs in float16 are in tests/test_train.py"""

import pytest

from train import LossScaler


def test_loss_scaler_follows_deepspeeds_table():
    scaler = LossScaler(enabled=True)
    seen = []
    for iteration in range(4002):
        scaler.update(overflow=iteration in (1500, 1501, 1502, 3600))
        seen.append((scaler.state["scale"], scaler.state["hysteresis"]))
    assert seen[998] == (4096, 2) and seen[999] == (8192, 2)  # the 1000th good one doubles it
    assert seen[1500:1503] == [(8192, 1), (4096, 1), (2048, 1)]  # one forgiven, then halved
    assert seen[2501] == (2048, 1) and seen[2502] == (4096, 2)  # 1000 after the last overflow
    assert seen[3502] == (8192, 2) and seen[3600] == (8192, 1) and seen[4001] == (8192, 1)


def test_overflow_at_scale_one_stops():
    scaler = LossScaler(enabled=True)
    with pytest.raises(FloatingPointError, match="diverged"):
        for _ in range(20):
            scaler.update(overflow=True)
    assert scaler.scale == 1


def test_a_scale_rests_while_it_is_not_needed():
    """A run begun on a CPU or in bfloat16 goes on in float16 at 4096; the other way round at 1."""
    plain = LossScaler(enabled=False)
    plain.update(overflow=True)
    assert plain.scale == 1
    half = LossScaler(enabled=True)
    half.state = plain.state
    assert half.scale == 4096
