"""Real English text of every length: the Python manual that comes with every interpreter."""

import random
import re
from functools import cache
from pydoc_data.topics import topics


@cache
def paragraphs() -> list[str]:
    """Every paragraph of prose, in a fixed order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if len(block) > 40 and re.search(r"[a-z]{3} [a-z]{2}", block)]


@cache
def sentences(count: int) -> tuple[str, ...]:
    """`count` texts from single words to 1200 characters, the same ones every time."""
    everything = [s for p in paragraphs() for s in re.split(r"(?<=\.)\s+", p)]
    picked = random.Random(7).sample(everything, count * 3 // 4)
    longer = [p for p in paragraphs() if 300 < len(p) < 900]
    picked += random.Random(8).sample(longer, count - len(picked) - 1)
    return (*picked, "word")
