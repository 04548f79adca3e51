"""OffloadConfig: what each source accepts, what wins, and what users read when it is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_moe_offload.cache import POLICY_NAMES
from vllm_moe_offload.config import CacheBudget, OffloadConfig, merge_settings, resolve
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.store import StoreRoot, default_root

BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS = BINARY | DECIMAL

spaces = st.sampled_from(["", " ", "  "])
cases = st.sampled_from([str, str.lower, str.upper])
budgets = st.one_of(
    st.just("auto"),
    st.integers(1, 100).map("{}%".format),
    st.tuples(st.integers(1, 999), st.sampled_from(sorted(UNITS))).map(lambda pair: f"{pair[0]}{pair[1]}"),
)
settings = st.fixed_dictionaries(
    {}, optional={"cache": budgets, "policy": st.sampled_from(POLICY_NAMES), "store": st.sampled_from(["/a", "/b"])}
)


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), spaces, cases)
def test_a_size_is_its_number_of_bytes(number: int, unit: str, space: str, case: Any) -> None:
    assert CacheBudget.parse(f"{space}{number}{space}{case(unit)}") == CacheBudget(size=number * UNITS[unit])


@given(st.integers(0, 999), st.integers(0, 9), st.sampled_from(sorted(BINARY)))
def test_a_size_may_have_a_fraction(whole: int, tenth: int, unit: str) -> None:
    assume(whole or tenth)
    size = CacheBudget.parse(f"{whole}.{tenth}{unit}").size
    assert size == pytest.approx((10 * whole + tenth) * BINARY[unit] / 10, abs=1)


@given(st.integers(1, 1000), spaces)
def test_a_share_is_above_nothing_and_at_most_everything(tenths: int, space: str) -> None:
    budget = CacheBudget.parse(f"{tenths / 10}{space}%")
    assert budget.share == pytest.approx(tenths / 1000) and budget.size is None


@given(cases)
def test_auto_is_neither_share_nor_size(case: Any) -> None:
    assert CacheBudget.parse(case("auto")) == CacheBudget()


@given(st.one_of(st.text(), st.integers(101, 9999).map("{}%".format), st.integers().map(str)))
def test_whatever_else_is_refused_with_an_example(text: str) -> None:
    try:
        CacheBudget.parse(text)
    except ValueError as error:
        assert "100%" in str(error) or "'25%'" in str(error)
    else:
        assert re.fullmatch(r"auto|[\d.]+ *(%|[kmgtpe]?i?b?|[kmgtpe]?bit)", text.strip().lower(), re.ASCII)


@pytest.mark.parametrize(("text", "reason"), [("0%", "above 0%"), ("101%", "at most 100%"), ("0GiB", "no room at all")])
def test_budgets_out_of_range_say_what_the_range_is(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: cache = '{text}': .*{reason}"):
        OffloadConfig.from_mapping({"cache": text}, "here")


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000 + "B", "2000000TiB", "9" * 400 + "%", "9" * 400])
def test_a_number_of_any_length_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"more than any machine has|at most 100%|is not a share") as error:
        OffloadConfig.from_mapping({"cache": text}, "here")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["store", "history", "trace"])
def test_paths_start_at_the_home_folder_where_they_say_so(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/the/user")
    config = OffloadConfig.from_mapping({key: "~/a/b.trace"}, "here")
    assert str(getattr(config, key)) == "/home/of/the/user/a/b.trace"
    with pytest.raises(ConfigError, match=rf"here: {key} = '~nobody.here/a.trace': .*there is no user 'nobody.here'"):
        OffloadConfig.from_mapping({key: "~nobody.here/a.trace"}, "here")


@pytest.mark.parametrize("key", ["store", "history", "trace"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: {key} = '{value}': '' "):
        OffloadConfig.from_mapping({key: value}, "here")


def test_the_store_root_of_the_environment_may_start_at_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/the/user")
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_STORE_ROOT", "~/stores")
    assert StoreRoot().path == default_root() == Path("/home/of/the/user/stores")
    assert StoreRoot(Path("~/others")).path == Path("/home/of/the/user/others")


@pytest.mark.parametrize("value", [0.25, 25, None, True, {"share": 0.25}])
def test_a_budget_that_is_not_text_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ConfigError, match="is not a share like '25%', a size like '4GiB', or 'auto'"):
        OffloadConfig.from_mapping({"cache": value}, "here")


def test_a_page_is_wanted_or_not() -> None:
    assert OffloadConfig.from_mapping({"page": True}, "here").page
    with pytest.raises(ConfigError, match="here: page = 'perhaps': Input should be a valid boolean"):
        OffloadConfig.from_mapping({"page": "perhaps"}, "here")


@pytest.mark.parametrize(
    ("key", "hint"),
    [("cahce", "did you mean 'cache'"), ("polcy", "did you mean 'policy'"), ("stores", "did you mean 'store'")],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: unknown key '{key}'; {hint}"):
        OffloadConfig.from_mapping({key: "1"}, "here")


def test_an_unknown_key_like_no_other_is_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError, match=f"valid keys: {', '.join(OffloadConfig.model_fields)}"):
        OffloadConfig.from_mapping({"xyzzy": "1"}, "here")


def test_an_unknown_policy_is_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError) as error:
        OffloadConfig.from_mapping({"policy": "random"}, "here")
    assert all(repr(name) in str(error.value) for name in POLICY_NAMES)


@given(settings)
def test_every_door_gives_the_same_configuration(given_settings: dict[str, str]) -> None:
    expected = (OffloadConfig.from_mapping(given_settings, "here"), [])
    assert resolve({"moe_offload": given_settings}, {}) == expected
    assert resolve({}, {"VLLM_MOE_OFFLOAD": json.dumps(given_settings)}) == expected


@given(settings)
def test_what_was_resolved_resolves_to_itself(given_settings: dict[str, str]) -> None:
    """The resolved settings travel to the workers, which resolve them again."""
    config, _ = resolve({"moe_offload": given_settings}, {})
    assert config is not None
    assert resolve({"moe_offload": config.model_dump(mode="json", exclude_none=True)}, {}) == (config, [])


@given(settings, settings)
def test_the_more_explicit_door_wins_and_says_so(explicit: dict[str, str], ambient: dict[str, str]) -> None:
    config, sentences = resolve({"moe_offload": explicit}, {"VLLM_MOE_OFFLOAD": json.dumps(ambient)})
    assert config == OffloadConfig.from_mapping(ambient | explicit, "here")
    disagreed = sorted(key for key in explicit.keys() & ambient.keys() if explicit[key] != ambient[key])
    assert [sentence.split()[0] for sentence in sentences] == disagreed
    assert all(sentence.endswith("additional_config wins") for sentence in sentences)


@given(settings, settings)
def test_merging_never_loses_a_setting(explicit: dict[str, str], implicit: dict[str, str]) -> None:
    merged, _ = merge_settings(explicit, implicit, "a", "b")
    assert merged.keys() == explicit.keys() | implicit.keys()
    assert {key: merged[key] for key in explicit} == explicit


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, {"moe_offload": None}, {"moe_offload": False}])
@pytest.mark.parametrize("environment", [{}, {"VLLM_MOE_OFFLOAD": ""}, {"VLLM_MOE_OFFLOAD": "0"}])
def test_nothing_given_means_off(additional_config: object, environment: dict[str, str]) -> None:
    assert resolve(additional_config, environment) == (None, [])


@pytest.mark.parametrize(
    ("additional_config", "environment"),
    [
        ({"moe_offload": True}, {}),
        ({"moe_offload": {}}, {}),
        ({}, {"VLLM_MOE_OFFLOAD": "1"}),
        ({}, {"VLLM_MOE_OFFLOAD": "{}"}),
    ],
)
def test_switched_on_without_settings_means_the_defaults(
    additional_config: object, environment: dict[str, str]
) -> None:
    assert resolve(additional_config, environment) == (OffloadConfig(), [])


def test_off_in_additional_config_beats_the_environment_and_says_so() -> None:
    config, sentences = resolve({"moe_offload": False}, {"VLLM_MOE_OFFLOAD": '{"cache": "25%"}'})
    assert config is None
    assert len(sentences) == 1 and "switches offloading off" in sentences[0]


@pytest.mark.parametrize("text", ["25%", "[]", "yes", "{cache: 25%}", '"25%"'])
def test_an_environment_variable_that_is_no_object_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r'VLLM_MOE_OFFLOAD=.*is not a JSON object; write for example .*{"cache": "25%"}'
    ):
        resolve({}, {"VLLM_MOE_OFFLOAD": text})


@pytest.mark.parametrize("value", ["25%", 1, ["cache"]])
def test_an_additional_config_that_is_no_dict_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ConfigError, match=r"additional_config\['moe_offload'\] = .* is not a dict .*'cache': '25%'"):
        resolve({"moe_offload": value}, {})


@pytest.mark.parametrize(
    ("additional_config", "environment", "source"),
    [
        ({"moe_offload": {"cahce": "1%"}}, {}, r"additional_config\['moe_offload'\]"),
        ({"moe_offload": {"cache": "1%"}}, {"VLLM_MOE_OFFLOAD": '{"cache": "x"}'}, "VLLM_MOE_OFFLOAD"),
    ],
)
def test_errors_name_the_door_even_if_another_would_win(
    additional_config: object, environment: dict[str, str], source: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{source}: "):
        resolve(additional_config, environment)


def test_a_store_is_a_path() -> None:
    assert OffloadConfig.from_mapping({"store": "/a/b"}, "here").store == Path("/a/b")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("predictor", "oracle", "'history', .*'gate', 'coactivation', 'frequency' or 'none'"),
        ("history", " ", "neither a folder nor 'off'"),
        ("trace", "trace.npz", "must end in .trace"),
        ("embedding", "mine", "neither 'model' nor like 'package.module:function'"),
        ("embedding", "mine.py:", "neither 'model' nor like 'package.module:function'"),
    ],
)
def test_what_prediction_cannot_use_is_refused_with_the_reason(key: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"here: {key} = '{value}': .*{reason}"):
        OffloadConfig.from_mapping({key: value}, "here")


@pytest.mark.parametrize("chosen", [{}, {"predictor": "none"}, {"predictor": "history"}])
def test_whether_somebody_asked_for_a_predictor_survives_the_way_to_the_workers(chosen: dict[str, str]) -> None:
    config, _ = resolve({"moe_offload": {"cache": "25%"} | chosen}, {})
    assert config is not None
    settings = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    assert OffloadConfig.from_mapping(settings, "here").predictor_is_explicit == bool(chosen)
