"""The law of sampling as settings: what it refuses, and when it is greedy."""

import pytest

from draft_opd_trl.core.sampling_params import SamplingParams


def test_only_temperature_zero_is_greedy():
    assert SamplingParams().greedy and SamplingParams(0, top_k=3).greedy
    assert not SamplingParams(1.0).greedy and not SamplingParams(0.01).greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "`temperature` is -0.5; it must be 0"),
        ({"top_k": -1}, "`top_k` is -1; it must"),
        ({"top_p": 0.0}, r"`top_p` is 0.0; it must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"`top_p` is 1.5; it must lie in \(0, 1\]"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)
