"""Sizes of memory as people write and read them.

``4GiB`` is 4 times 2^30 bytes; ``4GB`` and ``4G`` are 4 times 10^9, as only units with an ``i`` are powers of two. A
plain number is bytes. Upper and lower case are the same.
"""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

EXAMPLES = "a size like '4GiB', '500MB' or '4096' (bytes)"

_SIZE = re.compile(r"\d*\.?\d+\s*[a-z]*", re.ASCII | re.IGNORECASE)
"""What is left to pydantic, which ignores whatever follows a number that it can read: '25%' would be 25 bytes."""
_byte_size = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Bytes.

    Raises:
        ValueError: it is no size; with examples.
    """
    if _SIZE.fullmatch(text.strip()):
        try:
            return int(_byte_size.validate_python(text.strip()))
        except (ValidationError, OverflowError):
            pass
    raise ValueError(f"{shortened(text)!r} is not {EXAMPLES}")


def size_text(nbytes: float) -> str:
    """For a person, rounded to a tenth of the largest unit that fits: ``4.0 GiB``."""
    return ByteSize(nbytes).human_readable(separator=" ")


def size_setting(nbytes: int) -> str:
    """For a setting that must hold so many bytes, rounded up: ``100MiB``."""
    return f"{-(-nbytes // 2**20)}MiB" if nbytes >= 2**26 else f"{-(-nbytes // 2**10)}KiB"


def shortened(value: object) -> str:
    """``value`` for an error message, whatever its length."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:40]}… ({len(text)} characters)"
