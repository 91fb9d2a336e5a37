"""Text for messages: names from untrusted files made safe to print, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

LONGEST = 80  # characters of a name


def shown(value: object, longest: int = LONGEST) -> str:
    """Return text that is safe to print: one line, without control or direction characters, cut to a length."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def did_you_mean(word: str, choices: Iterable[str], *, quote: str = "'", n: int = 1) -> str:
    """Return `did you mean 'x'?` for the choices closest to a word, or an empty text if none is close.

    Choices that differ only by case or white space come first. A number is close only to a number of the same value:
    1e1 is 10, not 1.

    Args:
        word: What was given.
        choices: What exists.
        quote: Put around each suggestion.
        n: Suggestions at most.
    """
    names = [str(c) for c in choices]
    number = _number(word)
    if number is not None:
        names = [c for c in names if _number(c) in (None, number)]
    same = [c for c in names if _folded(c) == _folded(word) or (number is not None and _number(c) == number)]
    near = list(dict.fromkeys([*same, *difflib.get_close_matches(word, names, n=n, cutoff=0.5)]))[:n]
    return f"did you mean {' or '.join(f'{quote}{shown(c)}{quote}' for c in near)}?" if near else ""


def _folded(word: str) -> str:
    return " ".join(word.split()).casefold()


def _number(word: str) -> float | None:
    """Return the value of a text that is a finite number, else None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def choices_hint(word: str, choices: Iterable[str], noun: str = "columns") -> str:
    """Return `did you mean 'x'? columns: x, y`: the closest choice if one is close, and all choices.

    Args:
        word: What was given.
        choices: What exists.
        noun: What the choices are.
    """
    names = [str(c) for c in choices]
    meant = did_you_mean(word, names)
    return f"{meant}{' ' if meant else ''}{noun}: {', '.join(names) or 'none'}"


def plain_line(text: object) -> str:
    """Return one line without markup, which an untrusted name could contain."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain.replace("<", "&lt;").replace("`", "'")
