"""The numbers of inference servers, as their own metrics ports tell them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence

import aiohttp

logger = logging.getLogger(__name__)

# A server answers in milliseconds. Prometheus gives up on a scrape after ten seconds.
_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\S+)")


async def fetch_all(servers: Sequence[str]) -> bytes:
    """Of all servers that answer, each sample with its server's host:port as a label."""
    if not servers:
        return b""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        texts = await asyncio.gather(*(_fetch(session, server) for server in servers))
    return merge(dict(zip(servers, texts, strict=True))).encode()


async def _fetch(session: aiohttp.ClientSession, server: str) -> str:
    """Empty where the server does not answer: the gateway's own numbers are no worse for it."""
    try:
        async with session.get(f"http://{server}/metrics") as answer:
            answer.raise_for_status()
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        logger.debug("the metrics of %s: %s", server, error)
        return ""


def merge(texts: dict[str, str]) -> str:
    """Texts in Prometheus' format, by server, as one in which every name is described once."""
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for server, text in texts.items():
        family = ""
        seen: set[str] = set()
        for line in text.splitlines():
            if comment := _COMMENT.match(line):
                family = comment[1]
                if family not in comments or family in seen:
                    comments.setdefault(family, []).append(line)
                    seen.add(family)
            elif sample := _SAMPLE.match(line):
                name, labels, value = sample.groups()
                own = f'server="{server}"' + (f",{labels}" if labels else "")
                # Samples of a histogram and of a summary have longer names than their family.
                key = family if family and name.startswith(family) else name
                samples.setdefault(key, []).append(f"{name}{{{own}}} {value}")
    lines = [line for family, rows in samples.items() for line in (*comments.get(family, ()), *rows)]
    return "".join(f"{line}\n" for line in lines)
