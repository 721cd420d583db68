import asyncio
import base64
import contextlib
import gzip
import random
import socket

import orjson
import pytest
from aiohttp import web
from pydantic import ValidationError

from backends.contract import ErrorCode
from gateway.app import create_app
from gateway.errors import BadRequest
from gateway.image_fetcher import look_up
from gateway.images import ImageLoader
from gateway.settings import Settings
from tests.support.fake_inference import FakeInference
from tests.support.image_sites import raw_site, site

FIELD = "input[2].image"
# All bytes, so that both alphabets and every padding come up; only an image stage would look behind the head.
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) + b"\xfb\xff"
BASE64 = base64.b64encode(IMAGE).decode()
LIMIT = 1000


ADVICE = "; send the image as a data URL"


@contextlib.asynccontextmanager
async def loading(lookup=look_up, **settings):
    loader = ImageLoader(
        Settings(**{"image_hosts": "127.0.0.1", "max_image_bytes": LIMIT} | settings), lookup
    )
    try:
        yield loader
    finally:
        await loader.close()


async def refusal(loader, reference):
    """Why a reference is refused."""
    with pytest.raises(BadRequest) as caught:
        await loader.load(reference, FIELD)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "input", ErrorCode.INVALID_IMAGE)
    start, _, reason = error.message.partition(": ")
    assert start == FIELD
    return reason


def image(data=IMAGE, **options):
    async def answer(request):
        return web.Response(body=data, **{"content_type": "image/png"} | options)

    return answer


def redirect(location, status=302):
    async def answer(request):
        return web.Response(status=status, headers={"Location": location})

    return answer


# Base64 and data URLs


@pytest.mark.parametrize(
    "reference",
    [
        BASE64,
        BASE64.rstrip("="),
        BASE64.translate(str.maketrans("+/", "-_")),
        BASE64.translate(str.maketrans("+/", "-_")).rstrip("="),
        f"\n  {base64.encodebytes(IMAGE).decode()}  ",
        "\r\n".join(BASE64[at : at + 5] for at in range(0, len(BASE64), 5)),
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{BASE64}",
        f"data:image/svg+xml;base64,{BASE64}",
        f"data:image;base64,{BASE64}",
        f"data:application/octet-stream;base64,{BASE64.rstrip('=')}",
        "data:image/png;base64," + BASE64.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    ],
)
async def test_images_that_the_request_brings(reference):
    async with loading() as loader:
        assert await loader.load(reference, FIELD) == IMAGE


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"RIFF\n\n\n\nWEBP",
        b"\0\0\0\nftypavif",
    ],
)
@pytest.mark.parametrize("length", [30, 31, 32])
async def test_bare_base64_of_every_format(beginning, length):
    data = beginning.ljust(length, b"\xfe")
    async with loading() as loader:
        assert await loader.load(base64.b64encode(data).decode(), FIELD) == data


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "   ",
        "images/cat.png",
        # These are base64 by their characters.
        "/etc/passwd",
        "images/cat",
        "cats",
        "A photo of two cats on a sofa",
        "file:///etc/passwd",
        "ftp://127.0.0.1/cat.png",
        "s3://bucket/cat.png",
        "http:/127.0.0.1/cat.png",
        "//127.0.0.1/cat.png",
        "javascript:alert(1)",
        "猫",
        base64.b64encode(b"Only words, not an image").decode(),
    ],
)
async def test_what_is_no_reference_to_an_image(reference):
    async with loading() as loader:
        reason = await refusal(loader, reference)
    assert reason.startswith(repr(reference.strip()))
    assert reason.endswith(
        "is none of what is taken: an image is a data URL (data:image/png;base64,...), an http(s) URL, or "
        "the base64 of an image file"
    )


async def test_a_long_value_is_shown_shortened():
    async with loading() as loader:
        reason = await refusal(loader, "cat " * 100_000)
    assert reason.startswith(f"'{'cat ' * 14}... is none of what is taken")


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("data:image/png;base64", "the data URL 'data:image/png;base64' has no comma"),
        (f"data:image/png;{'a=b;' * 250}base64,{BASE64}", "has no comma in its first 1000 characters"),
        (f"data:text/html;base64,{BASE64}", "has the media type 'text/html'; image/... belongs there"),
        (f"data:;base64,{BASE64}", "has the media type ''; image/... belongs there"),
        (f"data:imagery/png;base64,{BASE64}", "has the media type 'imagery/png'"),
        ("data:image/png,%89PNG", "is not in base64; write ;base64 before its comma, and the base64"),
        ("data:image/png;base64,", "the image is empty"),
        ("data:image/png;base64,====", "the image is empty"),
        ("data:image/png;base64,iVBO=Rw0", "its base64 goes on behind the padding"),
        ("data:image/png;base64,iVBO!Rw0", "its base64 cannot be read: only base64 data is allowed"),
        ("data:image/png;base64,iVBOé", "its base64 cannot be read: it has the character 'é' in it"),
        ("data:image/png;base64,iVBOR", "its base64 cannot be read: invalid base64-encoded string: number"),
        (f"{BASE64.rstrip('=')}!", "its base64 cannot be read: only base64 data is allowed"),
        (f"{BASE64}{BASE64}", "its base64 goes on behind the padding"),
    ],
)
async def test_broken_data(reference, reason):
    async with loading() as loader:
        assert reason in await refusal(loader, reference)


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
@pytest.mark.parametrize("cut", ["", "="])
async def test_the_limit_counts_decoded_bytes(form, cut):
    data = IMAGE.ljust(LIMIT, b"x")
    async with loading() as loader:
        text = base64.encodebytes(data).decode().rstrip(cut)
        assert await loader.load(form.format(text), FIELD) == data
        text = base64.encodebytes(data + b"x").decode().rstrip(cut)
        reason = await refusal(loader, form.format(text))
    assert reason.startswith("the image has 1001 bytes; at most 1000 are taken (the operator can raise")


async def test_an_image_over_the_limit_is_not_decoded():
    async with loading() as loader:
        # Else the characters that are not base64 would be the reason.
        reason = await refusal(loader, f"data:image/png;base64,{'!' * 4000}")
    assert reason.startswith("the image has 3000 bytes; at most 1000 are taken (the operator can raise")


@pytest.mark.parametrize("size", [2**20, 3 * 2**18 + 1, 3 * 2**20 + 2])
async def test_large_images_leave_the_event_loop_to_others(size):
    data = IMAGE + random.Random(0).randbytes(size)
    async with loading(max_image_bytes=2**23) as loader:
        task = asyncio.create_task(loader.load(base64.encodebytes(data).decode(), FIELD))
        await asyncio.sleep(0)
        assert not task.done()
        assert await task == data
        task = asyncio.create_task(loader.load(BASE64, FIELD))
        await asyncio.sleep(0)
        assert task.done(), "else this shows nothing"


# Fetching


async def test_urls_are_not_fetched_unless_it_is_allowed():
    async with site({"/a.png": image()}) as web_site, loading(image_hosts="") as loader:
        reason = await refusal(loader, f"{web_site.url}/a.png?key=secret")
        assert reason == (
            f"this server does not fetch URLs ('{web_site.url}/a.png'); send the image as a data URL "
            "(data:image/png;base64,...). Its operator can allow it with --allow-image-urls"
        )
        assert web_site.requests == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"content_type": "image/jpeg"},
        {"content_type": "application/octet-stream"},
        {"content_type": "binary/octet-stream"},
        {"headers": {"Content-Encoding": "identity"}},
    ],
)
async def test_an_image_is_fetched(options):
    async with site({"/a b.png": image(**options)}) as web_site, loading() as loader:
        assert await loader.load(f" {web_site.url.upper()}/a b.png?x=1#part\n", FIELD) == IMAGE
        (request,) = web_site.requests
    assert request.path_qs == "/a%20b.png?x=1"
    assert request.headers["User-Agent"] == "triton-embeddings/0.1.0"
    assert request.headers["Accept"] == "image/*"
    assert request.headers["Accept-Encoding"] == "identity"


async def test_an_answer_without_a_type_is_an_image():
    async def answer(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

    async with raw_site(answer) as (url, _), loading() as loader:
        assert await loader.load(url, FIELD) == b"abc"


async def test_a_host_is_looked_up_by_the_system():
    addresses = await look_up("localhost")
    assert "127.0.0.1" in addresses
    async with site({"/": image()}) as web_site, loading(image_hosts="127.0.0.1,::1") as loader:
        assert await loader.load(f"http://localhost:{web_site.port}/", FIELD) == IMAGE
    async with loading(image_hosts="localhost") as loader:
        reason = await refusal(loader, f"http://localhost:{web_site.port}/")
    assert reason == f"http://localhost:{web_site.port}/ does not lead to a public address" + ADVICE


async def test_no_cookies_are_kept_and_no_proxy_is_asked(monkeypatch):
    async def first(request):
        return web.Response(status=302, headers={"Location": "/b", "Set-Cookie": "a=b; Path=/"})

    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with site({"/a": first, "/b": image()}) as web_site, loading() as loader:
        assert await loader.load(f"{web_site.url}/a", FIELD) == IMAGE
        assert [request.headers.get("Cookie") for request in web_site.requests] == [None, None]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{}/",
        "http://localhost:{}/",
        "http://localhost.:{}/",
        "http://2130706433:{}/",
        "http://017700000001:{}/",
        "http://0x7f.1:{}/",
        "http://0x7f000001:{}/",
        "http://127.1:{}/",
        "http://127.0.0.1.:{}/",
        "http://１２７.０.０.１:{}/",
        "http://①②⑦.0.0.1:{}/",
        "http://127。0。0。1:{}/",
        "http://%31%32%37.0.0.1:{}/",
        "http://0.0.0.0:{}/",
        "http://[::1]:{}/",
        "http://[::]:{}/",
        "http://[::ffff:127.0.0.1]:{}/",
        "http://[::ffff:7f00:1]:{}/",
        "http://[64:ff9b::127.0.0.1]:{}/",
        "http://[::1%25lo]:{}/",
        "http://a..b:{}/",
    ],
)
async def test_this_machine_is_not_asked(url):
    async with site({"/": image()}) as web_site, loading(image_hosts="", allow_image_urls=True) as loader:
        reason = await refusal(loader, url.format(web_site.port))
        assert reason.endswith(" does not lead to a public address" + ADVICE)
        assert web_site.requests == []


async def test_only_listed_hosts_are_asked():
    async with site({"/": image()}) as web_site, loading(image_hosts="cdn.example,10.0.0.0/8") as loader:
        reason = await refusal(loader, f"{web_site.url}/")
        assert (
            reason == f"{web_site.url}/ does not lead to a host that this server fetches images from" + ADVICE
        )
        assert web_site.requests == []


async def test_a_name_that_nothing_can_open_is_not_looked_up():
    asked = []

    async def lookup(host):
        asked.append(host)
        return ["127.0.0.1"]

    async with loading(lookup, image_hosts="cdn.example") as loader:
        reason = await refusal(loader, "http://key-of-a-client.evil.example/")
        assert reason.endswith("does not lead to a host that this server fetches images from" + ADVICE)
        assert asked == []
        assert "a public address" in await refusal(loader, "http://cdn.example/")
        assert asked == ["cdn.example"]


async def test_nobody_learns_which_names_a_private_network_has():
    async def lookup(host):
        if host == "there.internal":
            return ["10.0.0.1"]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with loading(lookup, image_hosts="", allow_image_urls=True) as loader:
        there = await refusal(loader, "http://there.internal/")
        nowhere = await refusal(loader, "http://nowhere.internal/")
    assert there == "http://there.internal/ does not lead to a public address" + ADVICE
    assert nowhere == there.replace("there", "nowhere")


class Rebinding:
    """A name that leads elsewhere each time that it is looked up."""

    def __init__(self, *answers):
        self.answers = answers
        self.n_asked = 0

    async def __call__(self, host):
        assert host == "images.example"
        self.n_asked += 1
        return self.answers[self.n_asked - 1]


async def test_the_connection_goes_to_the_address_that_was_checked():
    lookup = Rebinding(["127.0.0.1"], ["127.0.0.2"])
    async with (
        site({"/": image()}) as listed,
        site({"/": image(b"secret")}, "127.0.0.2", listed.port) as inside,
        loading(lookup) as loader,
    ):
        assert await loader.load(f"http://images.example:{listed.port}/", FIELD) == IMAGE
        assert lookup.n_asked == 1
        assert inside.requests == []


async def test_a_name_that_leads_elsewhere_on_the_second_look_is_refused():
    async def first(request):
        return web.Response(status=302, headers={"Location": "/secret", "Connection": "close"})

    lookup = Rebinding(["127.0.0.1"], ["127.0.0.2"])
    async with (
        site({"/": first, "/secret": image(b"listed")}) as listed,
        site({"/secret": image(b"secret")}, "127.0.0.2", listed.port) as inside,
        loading(lookup) as loader,
    ):
        url = f"http://images.example:{listed.port}/"
        reason = await refusal(loader, url)
        assert reason == (
            f"what {url} redirects to does not lead to a host that this server fetches images from" + ADVICE
        )
        assert lookup.n_asked == 2
        assert (len(listed.requests), inside.requests) == (1, [])


@pytest.mark.parametrize(
    ("addresses", "allowed"),
    [
        (["127.0.0.1", "127.0.0.2"], {}),
        (["93.184.216.34", "127.0.0.1"], {"image_hosts": "", "allow_image_urls": True}),
        (["::ffff:127.0.0.1"], {"image_hosts": "", "allow_image_urls": True}),
        ([], {}),
    ],
)
async def test_one_bad_address_of_a_host_is_enough_to_refuse_it(addresses, allowed):
    async with site({"/": image()}) as web_site, loading(Rebinding(addresses), **allowed) as loader:
        assert "does not lead to" in await refusal(loader, f"http://images.example:{web_site.port}/")
        assert web_site.requests == []


async def test_a_listed_port_is_the_only_one():
    async with site({"/": image()}) as web_site, loading(image_hosts=f"127.0.0.1:{web_site.port}") as loader:
        assert await loader.load(f"{web_site.url}/", FIELD) == IMAGE
        async with site({"/": image()}) as other:
            assert "does not lead to" in await refusal(loader, f"{other.url}/")
            assert other.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status):
    answers = {"/a/b": redirect("../c?x=1", status), "/c": redirect("/d", status), "/d": image()}
    async with site(answers) as web_site, loading(max_image_redirects=2) as loader:
        assert await loader.load(f"{web_site.url}/a/b", FIELD) == IMAGE
        assert [request.path_qs for request in web_site.requests] == ["/a/b", "/c?x=1", "/d"]


@pytest.mark.parametrize("n_allowed", [0, 3])
async def test_redirects_in_a_circle_end(n_allowed):
    async with (
        site({"/a": redirect("/b"), "/b": redirect("/a")}) as web_site,
        loading(max_image_redirects=n_allowed) as loader,
    ):
        reason = await refusal(loader, f"{web_site.url}/a")
        assert reason == f"{web_site.url}/a redirects more than {n_allowed} times"
        assert len(web_site.requests) == n_allowed + 1


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2:{}/", "does not lead to a host that this server fetches images from" + ADVICE),
        ("//127.0.0.2:{}/", "does not lead to a host that this server fetches images from" + ADVICE),
        ("http://2130706434:{}/", "does not lead to a host that this server fetches images from" + ADVICE),
        ("http://[::1]:{}/", "does not lead to a host that this server fetches images from" + ADVICE),
        ("http://user:word@127.0.0.1:{}/", "has a user's name or password in it, which is not sent on"),
        ("file:///etc/passwd", "is no http or https URL"),
        ("ftp://127.0.0.1:{}/", "is no http or https URL"),
        ("data:image/png;base64,iVBORw0K", "is no http or https URL"),
    ],
)
async def test_a_redirect_is_checked_like_a_new_url(location, reason):
    async with (
        site({}) as listed,
        site({"/": image(b"secret")}, "127.0.0.2", listed.port) as inside,
        loading() as loader,
    ):
        listed.answers["/a"] = redirect(location.format(listed.port))
        told = await refusal(loader, f"{listed.url}/a?key=secret")
        assert told == f"what {listed.url}/a redirects to {reason}"
        assert (len(listed.requests), inside.requests) == (1, [])


async def test_a_redirect_to_nowhere():
    async def without_location(request):
        return web.Response(status=302)

    answers = {"/a": redirect("http://[::1"), "/c": redirect("http://]%[@"), "/b": without_location}
    async with site(answers) as web_site, loading() as loader:
        for path in ("/a", "/c"):
            reason = await refusal(loader, f"{web_site.url}{path}")
            assert reason == f"{web_site.url}{path} redirects to what is not a valid URL"
        reason = await refusal(loader, f"{web_site.url}/b")
        assert reason == f"{web_site.url}/b answered with the status 302"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:word@127.0.0.1:9/a", "http://127.0.0.1:9/a has a user's name or password in it"),
        ("http://user@127.0.0.1:9/a", "http://127.0.0.1:9/a has a user's name or password in it"),
        ("http://127.0.0.1:0/", "http://127.0.0.1:0/ is no http or https URL"),
        ("http://127.0.0.1:99999/", "'http://127.0.0.1:99999/' is not a valid URL"),
        ("http://", "'http://' is not a valid URL"),
        ("http:///a", "'http:///a' is not a valid URL"),
        ("http://[::1/", "'http://[::1/' is not a valid URL"),
        ("http://127.0.0.1\\@evil.example/", "is not a valid URL"),
        ("http://]%[@", "'http://]%[@' is not a valid URL"),
        ("http://127.0.0.1/a\nb", "the URL 'http://127.0.0.1/a\\nb' has control characters in it"),
        (f"http://127.0.0.1/{'a' * 10_000}", "a URL of 10017 characters is too long; at most 8192 are taken"),
    ],
)
async def test_urls_that_are_not_asked_for(url, reason):
    async with loading() as loader:
        assert reason in await refusal(loader, url)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (image(b"no", status=404), "answered with the status 404"),
        (image(b"", status=204), "answered with the status 204"),
        (image(status=206), "answered with the status 206"),
        (image(b"<html>", content_type="text/html"), "sends 'text/html', which is no image"),
        (image(b"{}", content_type="application/json"), "sends 'application/json', which is no image"),
        (image(b""), "is empty"),
        (image(IMAGE * 4), "is larger than 1000 bytes (GATEWAY_MAX_IMAGE_BYTES)"),
        (
            image(gzip.compress(bytes(2**20)), headers={"Content-Encoding": "gzip"}),
            "sends its answer compressed ('gzip'), which is not read",
        ),
    ],
)
async def test_answers_that_are_refused(answer, reason):
    async with site({"/a": answer}) as web_site, loading(max_image_bytes=1000) as loader:
        assert await refusal(loader, f"{web_site.url}/a?key=secret") == f"{web_site.url}/a {reason}"


async def test_a_long_url_is_shown_shortened():
    async with site({f"/{'a' * 200}": image(status=404)}) as web_site, loading() as loader:
        reason = await refusal(loader, f"{web_site.url}/{'a' * 200}")
    shown = f"{web_site.url}/{'a' * 200}"[:97]
    assert reason == f"{shown}... answered with the status 404"


async def test_an_image_of_just_the_limit_is_fetched():
    async with site({"/": image(bytes(LIMIT))}) as web_site, loading() as loader:
        assert await loader.load(f"{web_site.url}/", FIELD) == bytes(LIMIT)


async def test_an_endless_answer_is_cut():
    n_sent = 0

    async def answer(writer):
        nonlocal n_sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
            await writer.drain()
            n_sent += 2**16

    async with raw_site(answer) as (url, closed), loading() as loader:
        assert await refusal(loader, url) == f"{url} is larger than 1000 bytes (GATEWAY_MAX_IMAGE_BYTES)"
        await closed.wait()
    # What fits in the buffers on the way, and no more.
    assert n_sent < 2**25


async def test_an_announced_length_over_the_limit_is_refused_before_anything_is_read():
    async def answer(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1001\r\n\r\n")

    async with raw_site(answer) as (url, closed), loading() as loader:
        assert await refusal(loader, url) == f"{url} is larger than 1000 bytes (GATEWAY_MAX_IMAGE_BYTES)"
        await closed.wait()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"Content-Length: 500", "broke off its answer"),
        (b"Transfer-Encoding: chunked", "broke off its answer"),
        (b"Content-Length: many", "did not answer in HTTP"),
        # Less than what follows.
        (b"Content-Length: 3", "did not answer in HTTP"),
    ],
)
async def test_lengths_that_are_not_so(head, reason):
    async def answer(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n" + head + b"\r\n\r\n4\r\nabcd\r\n")
        writer.write_eof()

    async with raw_site(answer) as (url, _), loading() as loader:
        assert await refusal(loader, url) == f"{url} {reason}"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [(b"", "closed the connection without an answer"), (b"SSH-2.0-x\r\n\r\n", "did not answer in HTTP")],
)
async def test_what_is_no_web_server(sent, reason):
    async def answer(writer):
        writer.write(sent)
        writer.write_eof()

    async with raw_site(answer) as (url, _), loading() as loader:
        assert await refusal(loader, url) == f"{url} {reason}"


async def test_a_server_that_is_not_there():
    async with site({}) as web_site:
        pass
    async with loading() as loader:
        assert await refusal(loader, f"{web_site.url}/a") == f"{web_site.url}/a cannot be reached"


async def test_https_where_it_is_not_spoken():
    async with site({"/": image()}) as web_site, loading() as loader:
        url = f"https://127.0.0.1:{web_site.port}/"
        assert await refusal(loader, url) == f"{url} does not answer to a secure connection"


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\nabc"])
async def test_a_slow_server(head):
    async def answer(writer):
        writer.write(head)

    async with raw_site(answer) as (url, closed), loading(image_timeout_s=0.2) as loader:
        assert await refusal(loader, url) == f"{url} did not give the image within 0.2 s"
        await closed.wait()


async def test_the_time_is_that_of_all_redirects_together():
    async with (
        site({"/": redirect("/")}) as web_site,
        loading(image_timeout_s=0.3, max_image_redirects=10**9) as loader,
    ):
        reason = await refusal(loader, f"{web_site.url}/")
        assert reason == f"{web_site.url}/ did not give the image within 0.3 s"
        assert len(web_site.requests) > 1


async def test_a_slow_name_server():
    async def lookup(host):
        await asyncio.Event().wait()

    async with loading(lookup, image_timeout_s=0.2) as loader:
        reason = await refusal(loader, "http://images.example/a?b")
    assert reason == "http://images.example/a did not give the image within 0.2 s"


async def test_thirty_two_images_are_fetched_at_once():
    n_running, most = 0, 0
    is_full = asyncio.Event()

    async def answer(request):
        nonlocal n_running, most
        n_running += 1
        most = max(most, n_running)
        if n_running == 32:
            is_full.set()
        await is_full.wait()
        # Others that are on their way arrive before this one leaves.
        for _ in range(100):
            await asyncio.sleep(0)
        n_running -= 1
        return web.Response(body=IMAGE, content_type="image/png")

    async with site({"/": answer}) as web_site, loading() as loader:
        found = await asyncio.gather(*(loader.load(f"{web_site.url}/", FIELD) for _ in range(60)))
    assert found == [IMAGE] * 60
    assert most == 32


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Encoding: \xff\r\n",
            "its answer compressed",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: ht\x10p://[::1\r\n", ""),
        (b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\r\n", ""),
        (b"\xff\xfe\x00", "did not answer in HTTP"),
    ],
)
async def test_whatever_a_host_says_is_a_refusal_that_can_be_written(head, told):
    async def answer(writer):
        writer.write(head + b"Content-Length: 4\r\n\r\nabcd")
        await writer.drain()
        writer.close()

    async with raw_site(answer) as (url, _), loading() as loader:
        reason = await refusal(loader, url)
    orjson.dumps(reason)
    assert told in reason


@pytest.mark.parametrize("size", [2**20 - 3, 2**20 - 2, 2**20 - 1, 2**20, 2**20 + 1])
async def test_percent_encoding_across_the_slices(size):
    """A percent sign and its digits may stand on both sides of where a long text is cut."""
    data = IMAGE + b"\xfb\xff" * (size // 2)
    text = base64.b64encode(data).decode().replace("+", "%2B").replace("/", "%2f")
    async with loading(max_image_bytes=2**23) as loader:
        assert await loader.load(f"data:image/png;base64,{text}", FIELD) == data


# Settings and the application


@pytest.mark.parametrize(
    ("settings", "is_allowed"),
    [
        ({}, False),
        ({"image_hosts": " , "}, False),
        ({"image_hosts": "cdn.example"}, True),
        ({"allow_image_urls": True}, True),
    ],
)
def test_a_list_of_hosts_allows_fetching(settings, is_allowed):
    assert Settings(**settings).fetches_images == is_allowed


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GATEWAY_ALLOW_IMAGE_URLS", "true")
    monkeypatch.setenv("GATEWAY_MAX_IMAGE_BYTES", "7")
    settings = Settings()
    assert settings.fetches_images
    assert (settings.max_image_bytes, settings.image_timeout_s, settings.max_image_redirects) == (7, 10, 3)
    monkeypatch.setenv("GATEWAY_IMAGE_HOSTS", "cdn.example,10.0.0.1/8")
    with pytest.raises(ValidationError, match=r"'10\.0\.0\.1/8' is not a network"):
        Settings()


async def test_the_application_has_a_loader_and_closes_its_connections():
    async def answer(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

    app = create_app(Settings(image_hosts="127.0.0.1"), FakeInference())
    async with raw_site(answer) as (url, closed):
        async with app.router.lifespan_context(app):
            assert await app.state.services.images.load(url, FIELD) == b"abc"
            assert not closed.is_set(), "it is kept for the next image"
        await closed.wait()
