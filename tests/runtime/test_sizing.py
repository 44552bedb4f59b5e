from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsss_deploy.card import Architecture, ModelCard, Preprocessing, Sizing
from wsss_deploy.sizing import network_size


def card(stride: int = 16, **sizing) -> ModelCard:
    return ModelCard(
        name="n",
        classes=("a", "b"),
        palette=((0, 0, 0), (1, 1, 1)),
        architecture=Architecture(encoder="e"),
        preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=stride),
        sizing=Sizing(**sizing),
    )


@pytest.mark.parametrize(
    ("size", "sizing", "expected"),
    [
        ((300, 400), {"long_side": 256}, (192, 256)),
        ((400, 300), {"long_side": 256}, (256, 192)),
        ((30, 40), {"long_side": 256}, (192, 256)),
        ((300, 400), {"long_side": 250}, (192, 256)),
        ((1, 1), {"long_side": 256}, (256, 256)),
        ((1, 5000), {"long_side": 256}, (16, 256)),
        ((5000, 1), {"long_side": 256}, (256, 16)),
        ((300, 401), {}, (300, 401)),
        ((1, 1), {}, (1, 1)),
        ((1, 1000), {}, (1, 1000)),
        ((1024, 7), {}, (1024, 7)),
        ((3000, 4000), {}, (768, 1024)),
        ((1, 5000), {}, (16, 1024)),
        ((2000, 2000), {"max_long_side": 1000}, (992, 992)),
        ((500, 300), {"long_side": 416, "tile": 512}, (500, 300)),
        ((512, 512), {"long_side": 416, "max_long_side": 256, "tile": 512}, (512, 512)),
        ((30, 40), {"long_side": 256, "tile": 512}, (30, 40)),
    ],
)
def test_known_sizes(size, sizing, expected):
    assert network_size(*size, card(**sizing)) == expected


@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.sampled_from([1, 14, 16, 32]),
    st.one_of(st.none(), st.integers(32, 2048)),
    st.integers(32, 2048),
)
def test_properties(height, width, stride, long_side, max_long_side):
    result = network_size(height, width, card(stride, long_side=long_side, max_long_side=max_long_side))
    if long_side is None and max(height, width) <= max_long_side:
        assert result == (height, width)
        return
    target = long_side or max_long_side
    for before, after in zip((height, width), result, strict=True):
        assert after % stride == 0
        assert after >= stride
        ideal = before * target / max(height, width)
        assert abs(after - ideal) < stride
        if long_side is None:
            assert after <= max_long_side
        else:
            assert after == stride or abs(after - ideal) <= stride / 2
