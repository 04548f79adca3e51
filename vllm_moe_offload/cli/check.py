"""What a look at this machine finds."""

from typing import NamedTuple

OK, HINT, WARNING, BROKEN = "ok", "hint", "warning", "broken"


class Check(NamedTuple):
    """One finding.

    ``hint`` costs speed or may surprise, ``warning`` is something that will not work, or was never tried, while
    offloading as a whole should; ``broken`` means that offloading will not work.
    """

    subject: str
    state: str
    detail: str
