"""Latents into messages and out again."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from d4_datasets.errors import UserError
from d4_datasets.latents import CODECS, pack, unpack

FINITE = st.floats(-6e4, 6e4, width=32)
ARRAYS = nps.arrays(np.float32, nps.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FINITE)
TANH = nps.arrays(np.float32, (8, 16), elements=st.floats(-1, 1, width=32))


def message(latents: np.ndarray, codec: str, /, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**pack(latents, codec), **changes})


@given(ARRAYS)
def test_float16_is_what_half_precision_keeps(latents) -> None:
    np.testing.assert_array_equal(unpack(message(latents, "float16")), latents.astype(np.float16))


@given(ARRAYS)
def test_uint8_is_right_to_half_a_step_of_the_frames_own_range(latents) -> None:
    msg = message(latents, "uint8")
    step = (float(latents.max()) - float(latents.min())) / 255
    slack = np.spacing(np.abs(latents).max())  # float32 itself
    assert np.abs(unpack(msg).astype(np.float64) - latents).max() <= step / 2 + slack
    again = message(unpack(msg), "uint8")
    assert np.abs(again.data.astype(int) - msg.data).max() <= 1


@given(TANH)
def test_tanh_latents_lose_less_than_a_250th(latents) -> None:
    assert np.abs(unpack(message(latents, "float16")) - latents).max() <= 2**-12
    assert np.abs(unpack(message(latents, "uint8")) - latents).max() <= 1 / 255 + 1e-6


def test_bytes_per_frame() -> None:
    latents = np.zeros((8, 16))
    assert [len(pack(latents, codec)["data"]) for codec in CODECS] == [256, 128]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4])
def test_what_cannot_be_written_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="beyond half precision"):
        pack(np.full((2, 2), bad), "float16")
    with pytest.raises(ValueError, match="codec 'jpeg' is none of float16, uint8"):
        pack(np.zeros((2, 2)), "jpeg")


DAMAGE = [
    ("float16", {"data": np.zeros(7, np.uint8)}, "are 8 bytes, the message has 7"),
    ("float16", {"tokens": 0}, "are 0 bytes"),
    ("uint8", {"channels": 65535}, "are 131070 bytes"),
    ("float16", {"codec": "zip"}, "codec 'zip' are not supported"),
    ("float16", {"data": np.full(8, 0x7E, np.uint8)}, "NaN or infinity"),
    ("uint8", {"low": np.nan}, "between nan and"),
    ("uint8", {"low": 2.0, "high": 1.0}, "between 2 and 1"),
    ("uint8", {"high": np.inf}, "and inf"),
]


@pytest.mark.parametrize(("codec", "changes", "said"), DAMAGE, ids=[said for *_, said in DAMAGE])
def test_a_damaged_message_is_one_sentence(codec, changes, said) -> None:
    with pytest.raises(UserError, match=said):
        unpack(message(np.ones((2, 2)), codec, **changes))


@given(
    st.binary(max_size=40),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from([*CODECS, "x"]),
    FINITE,
    FINITE,
)
def test_no_message_gives_anything_but_latents_or_a_sentence(
    data, tokens, channels, codec, low, high
) -> None:
    msg = SimpleNamespace(data=data, tokens=tokens, channels=channels, codec=codec, low=low, high=high)
    try:
        out = unpack(msg)
    except UserError:
        return
    assert out.shape == (tokens, channels)
    assert np.isfinite(out).all()
