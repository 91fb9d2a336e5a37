"""Text that is safe and helpful to show: names from untrusted files, and the name that was probably meant."""

from __future__ import annotations

LONGEST = 80  # characters of a name


def shown(value: object, longest: int = LONGEST) -> str:
    """Text that is safe to print: one line, no control or direction characters, not too long."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
