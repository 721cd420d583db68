"""The launch flags of SGLang and RTP-LLM, as this project's own.

People paste the commands that they know. Flags are understood in lower or upper case, with "_" or "-".

*Source:* the launch commands in SGLang's and RTP-LLM's documentation of embedding models.
"""

from __future__ import annotations

from collections.abc import Sequence

_CHECKPOINT = ("--model-path", "--checkpoint-path")
_SAME_AS = {
    "--act-type": "--dtype",
    "--start-port": "--port",
    "--task-type": "--task",
}
# Says what is the case here anyway.
_WITHOUT_EFFECT = ("--is-embedding",)
_DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}


def rewrite(arguments: Sequence[str]) -> list[str]:
    """A command line with foreign flags -> the same with our own."""
    rewritten: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument == "--":
            rewritten.append(argument)
            continue
        written, has_value, value = argument.partition("=")
        flag = written.lower().replace("_", "-")
        flag = _SAME_AS.get(flag, flag)
        if flag in _WITHOUT_EFFECT:
            continue
        if flag in _CHECKPOINT:
            rewritten.extend([value] if has_value else [next(rest, written)])
        elif flag == "--dtype":
            given = value if has_value else next(rest, "")
            rewritten.extend([flag, _DTYPES.get(given.lower(), given)])
        else:
            rewritten.append(f"{flag}={value}" if has_value else flag)
    return rewritten
