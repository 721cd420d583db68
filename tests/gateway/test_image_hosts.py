from ipaddress import ip_address

import pytest

from gateway.image_hosts import ImageHosts, is_public

PUBLIC = ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001:81b::200e"]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.0.3",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "100.100.100.200",
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "100::1",
    "2001:0:5ef5:79fd::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "3fff::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
# IPv6 that leads to a public IPv4 address.
PUBLIC_INSIDE = ["::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "2002:101:101::"]


@pytest.mark.parametrize("address", [*PUBLIC, *PUBLIC_INSIDE])
def test_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_not_public(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    ("listed", "host", "port", "addresses", "is_allowed"),
    [
        # Without a list, public addresses are enough, and all must be public.
        ("", "a.example", 80, ["1.1.1.1", "2606:4700::1111"], True),
        ("", "a.example", 80, ["1.1.1.1", "10.0.0.1"], False),
        ("", "a.example", 80, ["10.0.0.1"], False),
        ("", "a.example", 80, [], False),
        (" , ", "a.example", 8080, ["1.1.1.1"], True),
        # A name, with public addresses only.
        ("a.example", "a.example", 80, ["1.1.1.1"], True),
        ("A.Example.", "a.example.", 80, ["1.1.1.1"], True),
        ("a.example", "b.example", 80, ["1.1.1.1"], False),
        ("a.example", "x.a.example", 80, ["1.1.1.1"], False),
        ("a.example", "a.example", 80, ["127.0.0.1"], False),
        ("a.example", "a.example", 80, ["1.1.1.1", "127.0.0.1"], False),
        ("a.example", "1.1.1.1", 80, ["1.1.1.1"], False),
        # Names below another, but not the other itself, nor what only ends like it.
        ("*.a.example", "x.a.example", 80, ["1.1.1.1"], True),
        ("*.a.example", "x.y.a.example", 80, ["1.1.1.1"], True),
        ("*.a.example", "a.example", 80, ["1.1.1.1"], False),
        ("*.a.example", "xa.example", 80, ["1.1.1.1"], False),
        ("*.a.example", "a.example.evil", 80, ["1.1.1.1"], False),
        # Addresses and networks open what is not public too, under any name.
        ("127.0.0.1", "127.0.0.1", 80, ["127.0.0.1"], True),
        ("127.0.0.1", "127.0.0.1", 80, ["127.0.0.2"], False),
        ("10.0.0.0/8", "store.internal", 80, ["10.1.2.3", "10.3.2.1"], True),
        ("10.0.0.0/8", "store.internal", 80, ["10.1.2.3", "11.3.2.1"], False),
        ("10.0.0.0/8", "store.internal", 80, ["::ffff:10.1.2.3"], True),
        ("10.0.0.0/8", "store.internal", 80, ["64:ff9b::10.1.2.3"], False),
        ("10.0.0.0/8", "a.example", 80, ["1.1.1.1"], False),
        ("fd00::/8", "store.internal", 80, ["fd00::1"], True),
        ("fd00::/8", "store.internal", 80, ["fe80::1"], False),
        ("10.0.0.0/8, fd00::/8", "store.internal", 80, ["10.0.0.1", "fd00::1"], True),
        # One kind of entry does not help the other out.
        ("a.example,10.0.0.0/8", "a.example", 80, ["1.1.1.1", "10.0.0.1"], False),
        ("a.example,10.0.0.0/8", "a.example", 80, ["10.0.0.1"], True),
        ("a.example,10.0.0.0/8", "b.example", 80, ["1.1.1.1"], False),
        # Ports.
        ("a.example:8443", "a.example", 8443, ["1.1.1.1"], True),
        ("a.example:8443", "a.example", 443, ["1.1.1.1"], False),
        ("*.a.example:81", "x.a.example", 81, ["1.1.1.1"], True),
        ("*.a.example:81", "x.a.example", 80, ["1.1.1.1"], False),
        ("127.0.0.1:9000", "127.0.0.1", 9000, ["127.0.0.1"], True),
        ("127.0.0.1:9000", "127.0.0.1", 8000, ["127.0.0.1"], False),
        ("10.0.0.0/8:9000", "store.internal", 8000, ["10.0.0.1"], False),
        ("[fd00::/8]:9000", "store.internal", 9000, ["fd00::1"], True),
        ("[::1]", "::1", 80, ["::1"], True),
        ("::1", "::1", 80, ["::1"], True),
    ],
)
def test_a_host_is_allowed_by_its_name_or_its_addresses(listed, host, port, addresses, is_allowed):
    hosts = ImageHosts.parse(listed)
    assert hosts.allow(host, port, list(map(ip_address, addresses))) == is_allowed
    assert not is_allowed or hosts.can_allow(host, port), "what is allowed is looked up"


@pytest.mark.parametrize(
    ("listed", "host", "port", "can"),
    [
        ("", "a.example", 80, True),
        ("", "1.1.1.1", 80, True),
        ("", "10.0.0.1", 80, False),
        ("", "::1", 80, False),
        ("", "::ffff:7f00:1", 80, False),
        ("10.0.0.0/8", "10.0.0.1", 80, True),
        # A name that no entry can open is not even looked up.
        ("a.example", "b.example", 80, False),
        ("a.example:81", "a.example", 80, False),
        ("10.0.0.0/8", "b.example", 80, True),
        ("10.0.0.0/8:81", "b.example", 80, False),
        # What some resolvers read as 127.0.0.1, whatever is listed.
        ("127.0.0.1", "2130706433", 80, False),
        ("127.0.0.1", "0x7f.1", 80, False),
        ("127.0.0.1", "0x7f000001", 80, False),
        ("127.0.0.1", "127.1", 80, False),
        ("127.0.0.1", "0177.0.0.1", 80, False),
        ("127.0.0.1", "127.0.0.1.", 80, False),
        ("127.0.0.1", "%31%32%37.0.0.1", 80, False),
        ("", "a..b", 80, False),
        ("", "a b", 80, False),
        ("", "v1.x:y", 80, False),
        ("", f"{'a' * 64}.example", 80, False),
    ],
)
def test_hosts_that_are_refused_wherever_they_lead(listed, host, port, can):
    assert ImageHosts.parse(listed).can_allow(host, port) == can


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("a.example, b c", "'b c' is neither a name"),
        ("*", "'*' is neither a name"),
        ("a.*.example", "'a.*.example' is neither a name"),
        ("https://a.example", "'https://a.example' is not a network"),
        ("a.example/images", "'a.example/images' is not a network"),
        ("10.0.0", "'10.0.0' is neither a name"),
        ("10.0.0.300", "'10.0.0.300' is neither a name"),
        ("0x7f.1", "'0x7f.1' is neither a name"),
        ("10.0.0.1/8", "'10.0.0.1/8' is not a network: 10.0.0.1/8 has host bits set"),
        ("10.0.0.0/33", "'10.0.0.0/33' is not a network"),
        ("bücher.example", "'bücher.example' is neither a name"),
        ("a.example:0", "'a.example:0' has the port 0; ports are 1 to 65535"),
        ("a.example:65536", "'a.example:65536' has the port 65536"),
        ("a.example:http", "'a.example:http' is neither a name"),
    ],
)
def test_a_bad_entry_is_named(listed, reason):
    with pytest.raises(ValueError, match=r"is neither a name|is not a network|has the port") as caught:
        ImageHosts.parse(listed)
    assert str(caught.value).startswith(reason)


def test_where_a_url_must_lead_is_told_by_the_list_alone():
    assert ImageHosts.parse("").describe_allowed("a.example", 80) == "a public address"
    hosts = ImageHosts.parse("a.example,10.0.0.0/8")
    assert hosts.describe_allowed("a.example", 80) == "a public address"
    assert hosts.describe_allowed("b.example", 80) == "a host that this server fetches images from"
