"""Options of earlier names: they work for one release, are in no help text, and are named in the log."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

logger = logging.getLogger(__name__)


class NewName(NamedTuple):
    option: str
    value: str = "{}"
    """The value of the new option, by that of the old one."""


RENAMED: Mapping[str, Mapping[str, NewName]] = {
    "store": {"--root": NewName("--store")},
    "history": {"--dir": NewName("--history"), "--megabytes": NewName("--keep", "{}MiB")},
}
"""Old names by command."""


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``vllm-moe-offload``, with the options that had other names as they are called now."""
    old_names = RENAMED.get(arguments[0], {}) if arguments else {}
    return list(_renamed(iter(arguments), old_names))


def _renamed(arguments: Iterator[str], old_names: Mapping[str, NewName]) -> Iterator[str]:
    for argument in arguments:
        if argument == "--":
            yield argument
            yield from arguments
            return
        option, _, value = argument.partition("=")
        new = old_names.get(option)
        if new is None:
            yield argument
            continue
        logger.warning("%s has been renamed: use %s", option, new.option)
        yield new.option
        for given in [value] if value else list(_next(arguments)):
            yield new.value.format(given)


def _next(arguments: Iterator[str]) -> Iterator[str]:
    """The next argument, if there is one."""
    following = next(arguments, None)
    if following is not None:
        yield following
