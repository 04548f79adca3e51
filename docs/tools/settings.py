"""Writes docs/settings.md from ``OffloadConfig``: every setting with its flag, its default and its effect.

python docs/tools/settings.py
"""

from pathlib import Path

from pydantic.fields import FieldInfo

from vllm_moe_offload.config import ENVIRONMENT_VARIABLE, OffloadConfig
from vllm_moe_offload.store.files import ROOT_SETTING

PAGE = Path(__file__).parents[1] / "settings.md"
HEADER = f"""# Settings

Written by `docs/tools/settings.py` from `OffloadConfig`, which validates every setting whatever its source.

| source | example |
| --- | --- |
| flags (most explicit) | `vllm serve MODEL --plugin moe-offload --moe-offload-cache 25%` |
| `additional_config` | `LLM(MODEL, additional_config={{"moe_offload": {{"cache": "25%"}}}})` |
| the same on a command line | `vllm serve MODEL --additional-config.moe_offload.cache 25%` |
| environment: no flag, no code | `{ENVIRONMENT_VARIABLE}='{{"cache": "4GiB"}}' vllm serve MODEL` |

`{ENVIRONMENT_VARIABLE}=1` is offloading with the defaults.

The more explicit source wins, and a log line says so. `--plugin moe-offload` alone, or any one of the flags, switches
offloading on; `additional_config={{"moe_offload": False}}` switches it off whatever the environment says. Without any
of these the plugin does nothing. Unknown keys and bad values are refused with the nearest valid name or an example,
before any worker starts.

Sizes: `4GiB` is 4 times 2^30 bytes, `4GB` and `4G` are 4 times 10^9, and a number alone is bytes.

`{ROOT_SETTING}` in the environment names the folder of the stores where `store` does not, for every command too.
"""


def page() -> str:
    sections = [HEADER, *(section(name, field) for name, field in OffloadConfig.model_fields.items())]
    return "\n".join(sections)


def section(name: str, field: FieldInfo) -> str:
    default = {None: "none", False: "off"}.get(field.default, f"`{field.default}`")
    described = field.description or ""
    return f"""## `{name}`

{described[0].upper()}{described[1:]}.

- Flag: `--moe-offload-{name.replace("_", "-")}`
- Default: {default}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
