import pytest

from triton_embeddings.addresses import Addresses
from triton_embeddings.launch import gateway_environment

ADDRESSES = Addresses("127.0.0.1", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("flags", "hosts", "is_allowed"),
    [
        ({}, "cdn.example", "false"),
        ({"image_hosts": "10.0.0.0/8"}, "10.0.0.0/8", "false"),
        ({"allow_image_urls": "true"}, "cdn.example", "true"),
    ],
)
def test_flags_win_over_the_environment_and_leave_the_rest_of_it(monkeypatch, flags, hosts, is_allowed):
    monkeypatch.setenv("GATEWAY_IMAGE_HOSTS", "cdn.example")
    monkeypatch.setenv("GATEWAY_ALLOW_IMAGE_URLS", "false")
    environment = gateway_environment(ADDRESSES, flags)
    assert environment["GATEWAY_IMAGE_HOSTS"] == hosts
    assert environment["GATEWAY_ALLOW_IMAGE_URLS"] == is_allowed
    assert environment["GATEWAY_SERVER"] == "127.0.0.1:3"


def test_what_nobody_sets_is_not_set(monkeypatch):
    monkeypatch.delenv("GATEWAY_IMAGE_HOSTS", raising=False)
    assert "GATEWAY_IMAGE_HOSTS" not in gateway_environment(ADDRESSES, {})
