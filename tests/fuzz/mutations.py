"""Strategies for damage to bytes and to trees of mappings, lists and plain values: few changes, and each simple."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    0.5,
    1e300,
    float("nan"),
]
"""Where types and counts end."""
TEXTS = [
    "",
    " ",
    ".",
    "..",
    "../../x",
    "~",
    "null",
    "nan",
    "0",
    "a\nb",
    "\x1b[2J",
    "\u2028",
    "é",
    "😀",
    "x" * 300,
]
"""Names, paths and texts that are read as something else somewhere."""

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
)
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
"""Any value that JSON can hold."""


@st.composite
def changed_bytes(draw: st.DrawFn, base: bytes, most: int = 4) -> bytes:
    """`base` with a few bytes set, inserted, removed, repeated or cut off."""
    content = bytearray(base)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, most]))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64]))
        way = draw(st.sampled_from(["flip", "set", "flip", "insert", "remove", "repeat", "cut"]))
        if way == "set":
            content[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        elif way == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=length))
        elif way == "remove":
            del content[place : place + length]
        elif way == "repeat":
            content[place:place] = content[max(0, place - length) : place]
        elif way == "cut":
            del content[place:]
        elif place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


@st.composite
def changed_tree(draw: st.DrawFn, base: Any, most: int = 2) -> Any:
    """`base` with a few of its values replaced, removed, or added to, at any depth."""
    tree = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        holder, key, value = None, None, tree
        while isinstance(value, dict | list) and value and (holder is None or draw(st.integers(0, 3))):
            holder = value
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            value = holder[key]
        if holder is None:
            return draw(trees)
        way = draw(st.sampled_from(["replace", "shift", "remove", "add"]))
        if way == "remove":
            del holder[key]
        elif way == "shift" and type(value) is int:
            holder[key] = value + draw(st.sampled_from([-64, -8, -4, -1, 1, 4, 8, 64]))
        elif way == "add" and isinstance(value, dict):
            value[draw(st.text(max_size=4))] = draw(trees)
        elif way == "add" and isinstance(value, list):
            value.append(draw(trees))
        else:
            holder[key] = draw(trees)
    return tree


def as_json(tree: Any) -> bytes:
    """As other programs write it, halves of characters and all."""
    return json.dumps(tree).encode()
