"""What a look at this machine finds."""

from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"


class Check(NamedTuple):
    """One finding.

    ``warning`` costs speed or a feature, or was never tried, while offloading as a whole should work; ``problem`` means
    that offloading will not work.
    """

    subject: str
    state: str
    detail: str
    remedy: str = ""
    """What to do about it; empty where all is well or nothing can be done."""

    @property
    def sentence(self) -> str:
        """Detail and remedy."""
        return f"{self.detail}: {self.remedy}" if self.remedy else self.detail
