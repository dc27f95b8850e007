"""The messages of docs/play.md: reading what clients say, and packing what they are told."""

import json
import math
from collections.abc import Callable
from typing import Any

from decmem.errors import UserError

VERSION = 1
KEYS = (
    "forward", "back", "left", "right", "jump", "sprint",
    "look_left", "look_right", "look_up", "look_down",
)  # fmt: skip
_LARGEST_SEED = 2**63 - 1
_LARGEST_WHOLE = 2**53

Check = Callable[[Any], bool]
Kinds = dict[str, tuple[Check, str]]


def _whole(low: int, high: int = _LARGEST_WHOLE) -> tuple[Check, str]:
    return lambda x: type(x) is int and low <= x <= high, f"a whole number from {low} to {high}"


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e9 and math.isfinite(x)


def _one_of(*names: str) -> tuple[Check, str]:
    return lambda x: type(x) is str and x in names, f"one of {', '.join(names)}"


def _or_null(kind: tuple[Check, str]) -> tuple[Check, str]:
    return lambda x: x is None or kind[0](x), f"{kind[1]}, or null"


def _are_keys(x: Any) -> bool:
    return type(x) is list and len(x) <= len(KEYS) and all(type(k) is str and k in KEYS for k in x)


def _is_look(x: Any) -> bool:
    return type(x) is list and len(x) == 2 and all(map(_is_number, x))


_FLAG: tuple[Check, str] = (lambda x: type(x) is bool, "true or false")
_TOKEN: tuple[Check, str] = (lambda x: type(x) is str and 0 < len(x) <= 64, "a short text")

# Type -> fields that must be there, fields that may be. Ranges that depend on the model are
# checked where the model is known.
_MESSAGES: dict[str, tuple[Kinds, Kinds]] = {
    "hello": ({"version": _whole(0)}, {"session": _or_null(_TOKEN)}),
    "start": (
        {"from": _one_of("seed", "upload")},
        {"seed": _whole(0, _LARGEST_SEED), "upload": _TOKEN},
    ),
    "input": (
        {
            "keys": (_are_keys, f"a list of {', '.join(KEYS)}"),
            "look": (_is_look, "two numbers of degrees"),
            "sequence": _whole(0),
        },
        {},
    ),
    "set": (
        {},
        {
            "global_memory": _FLAG,
            "k": _whole(1),
            "steps": _whole(1),
            "guidance": _or_null((_is_number, "a number")),
            "chunk": _whole(1),
            "layer": _or_null(_whole(0)),
            "lens": _FLAG,
        },
    ),
    "pause": ({}, {}),
    "resume": ({}, {}),
    "rewind": ({"latent": _whole(1)}, {}),
    "fork": ({}, {}),
    "branch": ({"id": _whole(0)}, {}),
    "save": ({"what": _one_of("world", "video")}, {}),
    "seen": ({"chunk": _whole(0)}, {}),
    "bye": ({}, {}),
}


def read_message(text: str | bytes, limit: int) -> dict[str, Any]:
    """A client's message, its type, fields and ranges checked.

    Raises:
        UserError: naming what is wrong, for anything docs/play.md does not know.
    """
    if isinstance(text, bytes):
        raise UserError("message", "binary, expected a JSON text", "Send JSON")
    if len(text.encode("utf-8", "surrogatepass")) > limit:
        raise UserError("message", f"more than {limit} bytes", "Send shorter messages")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("message", "not JSON", "Send one JSON object per message") from error
    if type(message) is not dict or type(message.get("type")) is not str:
        raise UserError("message", "no object with a type", f"Known types: {', '.join(_MESSAGES)}")
    kind = message["type"]
    if kind not in _MESSAGES:
        shown = kind[:40]
        raise UserError("type", f"{shown!r} is unknown", f"Known types: {', '.join(_MESSAGES)}")
    needed, optional = _MESSAGES[kind]
    known = needed | optional
    for name in needed:
        if name not in message:
            raise UserError(name, f"missing in {kind}", f"Give {needed[name][1]}")
    for name, value in message.items():
        if name == "type":
            continue
        if name not in known:
            shown = name[:40]
            fields = ", ".join(known) or "none"
            raise UserError(shown, f"unknown in {kind}", f"Known fields: {fields}")
        check, wanted = known[name]
        if not check(value):
            raise UserError(name, f"{json.dumps(value)[:60]} in {kind}", f"Give {wanted}")
    if kind == "start" and message["from"] not in message:
        raise UserError(message["from"], "missing in start", f"Give the {message['from']}")
    return message


def check_version(version: int) -> None:
    """Raises `UserError` unless this server speaks the client's version."""
    if version != VERSION:
        raise UserError("version", f"{version}, this server speaks {VERSION}", "Reload the page")


def error_message(error: UserError) -> dict[str, Any]:
    """What the client is told of its error."""
    return {
        "type": "error",
        "argument": error.argument,
        "problem": error.problem,
        "cure": error.cure,
    }


def packed(header: dict[str, Any], parts: list[tuple[dict[str, Any], bytes]]) -> bytes:
    """A binary message: length of the header, header, then the parts' bytes one after the other."""
    told = [about | {"bytes": len(body)} for about, body in parts]
    head = json.dumps(header | {"parts": told}, allow_nan=False).encode()
    return b"".join((len(head).to_bytes(4, "little"), head, *(body for _, body in parts)))
