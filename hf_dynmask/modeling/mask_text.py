"""Parses masks from text such as `causal & window(255, 0)`."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from inspect import signature
from typing import NoReturn

from .mask_expressions import MAX_DEPTH, And, Mask, Not, Or
from .mask_leaves import LEAVES, Choice, Custom
from .messages import shown

MAX_CHARACTERS = 2**14  # of a text, which may come from an untrusted checkpoint
_INTEGER = r"(?:0|[1-9](?:_?[0-9])*)"
_NUMBER = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_KINDS = {"name": "[A-Za-z_][A-Za-z0-9_]*", "number": _NUMBER, "sign": "[-&|~(),]", "end": r"\Z", "other": "."}
_TOKEN = re.compile(rf"[ \t\r\n]*(?:{'|'.join(f'(?P<{k}>{v})' for k, v in _KINDS.items())})", re.DOTALL)
_LONGEST_NUMBER = 100  # characters


def parse(text: str) -> Mask:
    """Parses a mask expression.

    Args:
        text (`str`): Leaves of the language joined by `&`, `|`, `~` and parentheses, with Python's precedence. Spaces,
            tabs and line breaks may separate them. There are no comments.

    Returns:
        [`Mask`], with `parse(str(mask)) == mask`.

    Raises:
        ValueError: The text is not an expression of the language, has more than 16,384 characters, or nests more than
            16 masks. The message gives the column (from 1).
    """
    if not isinstance(text, str):
        raise ValueError(f"a mask must be text such as 'causal & window(255, 0)'; got {shown(text)}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text of a mask must have at most {MAX_CHARACTERS} characters; got {len(text)}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Mask:
    return _Reader(text).whole()


class _Reader:
    """A recursive descent parser with one token of look-ahead.

    Python's own parser would drop comments, accept look-alikes of letters and, in some releases, crash on deeply nested
    text.
    """

    def __init__(self, text: str):
        self.text = text
        self.kind: str | None = None
        self.token, self.start, self.end = "", 0, 0
        self.depth = 1
        self._next()

    def whole(self) -> Mask:
        mask = self._or_chain()
        if self.kind != "end":
            self._fail("expected `&`, `|` or the end")
        return mask

    def _or_chain(self) -> Mask:
        return self._chain("|", Or, self._and_chain)

    def _and_chain(self) -> Mask:
        return self._chain("&", And, self._operand)

    def _chain(self, sign: str, make: Callable[..., Mask], read: Callable[[], Mask]) -> Mask:
        start, masks = self.start, [read()]
        while self._accepts(sign):
            masks.append(read())
        return self._made(start, make, *masks) if len(masks) > 1 else masks[0]

    def _operand(self) -> Mask:
        start = self.start
        if self._accepts("~"):
            return self._made(start, Not, self._inside(self._operand))
        if self._accepts("("):
            mask = self._inside(self._or_chain)
            if not self._accepts(")"):
                self._fail("expected `&`, `|` or `)`")
            return mask
        return self._leaf()

    def _leaf(self) -> Mask:
        if self.kind != "name":
            self._fail("expected a mask")
        start, name = self.start, self._next()
        if name not in LEAVES:
            near = get_close_matches(name, LEAVES, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            self._fail(f"unknown mask `{name[:100]}`; {hint}known are {', '.join(sorted(LEAVES))}", start)
        leaf = LEAVES[name]
        values = self._arguments(
            self._or_chain if issubclass(leaf, Choice) else self._custom if leaf is Custom else self._number
        )
        try:
            signature(leaf).bind(*values)
        except TypeError:
            wanted = ", ".join(p.name for p in signature(leaf).parameters.values() if p.kind is not p.KEYWORD_ONLY)
            self._fail(f"`{name}` takes ({wanted}); got {len(values)} arguments", start)
        return self._made(start, leaf, *values)

    def _arguments(self, read: Callable[[], object]) -> list:
        values = []
        if self._accepts("("):
            while not self._accepts(")"):
                values.append(self._inside(read))
                if not self._accepts(",") and self.token != ")":
                    self._fail("expected `,` or `)`")
        return values

    def _custom(self) -> str:
        if self.kind != "name":
            self._fail("expected the name of a registered mask")
        return self._next()

    def _number(self) -> int | float:
        start, is_negative = self.start, self._accepts("-")
        if self.kind != "number":
            self._fail("expected a number")
        token = self._next()
        if len(token) > _LONGEST_NUMBER:
            self._fail(f"a number must have at most {_LONGEST_NUMBER} characters; got {len(token)}", start)
        value = float(token) if re.search("[.eE]", token) else int(token)
        return -value if is_negative else value

    def _inside(self, read: Callable):
        """Reads what is inside parentheses or follows `~`, up to a maximum depth."""
        if self.depth == MAX_DEPTH:
            self._fail(f"parentheses and `~` must be less than {MAX_DEPTH} deep in one another; got more", self.start)
        self.depth += 1
        found = read()
        self.depth -= 1
        return found

    def _made(self, start: int, make: Callable[..., Mask], *values) -> Mask:
        try:
            return make(*values)
        except ValueError as error:
            self._fail(str(error), start)

    def _accepts(self, sign: str) -> bool:
        """Whether the current token is this sign; if so, advances to the next token."""
        if self.token != sign:
            return False
        self._next()
        return True

    def _next(self) -> str:
        """Returns the current token and advances to the next one."""
        read = self.token
        found = _TOKEN.match(self.text, self.end)
        assert found is not None and found.lastgroup is not None  # `other` matches any character
        self.kind, self.token = found.lastgroup, found[found.lastgroup]
        self.start, self.end = found.span(found.lastgroup)
        return read

    def _fail(self, reason: str, start: int | None = None) -> NoReturn:
        """Raises an error about the text at `start`; without it, about the current token, which was not expected."""
        if start is None:
            start = self.start
            reason += f", not {shown(self.token)}" if self.token else ", not the end"
        line, column = self.text.count("\n", 0, start) + 1, start - self.text.rfind("\n", 0, start)
        place = f"line {line}, column {column}" if "\n" in self.text.strip() else f"column {column}"
        raise ValueError(f"mask does not parse at {place}: {reason}; got {shown(self.text)}") from None
