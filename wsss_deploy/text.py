"""Text from files of strangers, which reaches terminals and pages."""

from __future__ import annotations

import re

# Controls (escape sequences begin with one), line ends of Unicode, signs that turn the order of reading around, and
# halves of characters. Joiners are not among them: names of some languages need them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def has_controls(text: str) -> bool:
    """Whether a text holds characters that do something to a terminal or a line instead of being shown."""
    return _CONTROL.search(text) is not None


def visible(text: str, keep: str = "\n\t") -> str:
    """A text whose control characters are written out, as `ascii` does.

    Args:
        text: Any text.
        keep: Characters that stay.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
