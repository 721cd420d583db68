import pytest

from backends.errors import OptionError
from backends.options import ServingOptions


def test_parameters_hold_only_what_differs_and_come_back_the_same():
    assert ServingOptions().to_parameters() == {}
    options = ServingOptions(
        dtype="bfloat16",
        max_length=99,
        trust_remote_code=True,
        served_model_name="a/b",
        fuse_heads=True,
    )
    parameters = options.to_parameters()
    assert parameters == {
        "dtype": "bfloat16",
        "max_length": "99",
        "trust_remote_code": "true",
        "served_model_name": "a/b",
        "fuse_heads": "true",
    }
    assert ServingOptions.from_parameters({**parameters, "checkpoint": "x"}) == options


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4'; it takes one of auto, float32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"truncation": "middle"}, "truncation is 'middle'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_bad_values_name_themselves(bad, message):
    with pytest.raises(OptionError, match=message):
        ServingOptions(**bad)


def test_bad_parameters_name_themselves():
    with pytest.raises(OptionError, match="max_length is 'many'"):
        ServingOptions.from_parameters({"max_length": "many"})
    with pytest.raises(OptionError, match="trust_remote_code is 'yes'"):
        ServingOptions.from_parameters({"trust_remote_code": "yes"})
