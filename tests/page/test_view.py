"""What the page is told: the map, samples since the last answer, requests on demand."""

import base64

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.report.reports import a_report
from vllm_moe_offload.page import Series, Site, models_of_reports
from vllm_moe_offload.page.series import SAMPLES_KEPT
from vllm_moe_offload.page.view import USE_LEVELS, MapView, Query, view
from vllm_moe_offload.report import WorkerReport


def seen(*reports: WorkerReport) -> Series:
    """A series that has observed these reports of one worker, one after another."""
    series = Series()
    for report in reports:
        series.observe(models_of_reports([report]))
    return series


shapes = st.tuples(st.integers(1, 8), st.integers(1, 16))


@settings(max_examples=50)
@given(st.data(), shapes)
def test_every_cell_says_whether_its_expert_is_there_and_about_how_often_it_is_used(
    data: st.DataObject, shape: tuple[int, int]
) -> None:
    states = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 2)))
    uses = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(0, 2**20, width=32)))
    experts = a_report().experts
    experts.layers, experts.experts = [str(layer) for layer in range(shape[0])], shape[1]
    experts.resident, experts.uses = states.tobytes(), uses.tobytes()
    shown = MapView.of(experts)
    cells = np.frombuffer(base64.b64decode(shown.cells), np.uint8).reshape(shape)
    assert shown.known
    assert np.array_equal(cells & 3, states)
    approximately = shown.most_uses * ((cells >> 2) / (USE_LEVELS - 1)) ** 2
    assert np.allclose(approximately, uses, atol=shown.most_uses / (USE_LEVELS - 1))


def test_the_host_does_not_know_what_a_device_decides() -> None:
    experts = a_report().experts
    experts.resident = b""
    assert not MapView.of(experts).known


def test_samples_are_sent_once() -> None:
    series = seen(*(a_report(time=float(time)) for time in range(1, 6)))
    (model, samples), *_ = series.models()
    whole = view([(model, samples)], Query(), now=6.0).model
    assert whole is not None and whole.series["time"] == [1, 2, 3, 4, 5]
    rest = view([(model, samples)], Query(since=3.0), now=6.0).model
    assert rest is not None and rest.series["time"] == [4, 5]
    assert {len(column) for column in rest.series.values()} == {2}


def test_a_report_that_has_not_changed_is_no_new_sample_and_old_ones_are_forgotten() -> None:
    series = seen(*(a_report(time=float(time // 2)) for time in range(2, 2 * SAMPLES_KEPT + 60)))
    ((_, samples),) = series.models()
    times = [sample.time for sample in samples]
    assert len(times) == SAMPLES_KEPT and times == sorted(set(times))


def test_a_model_whose_workers_have_gone_is_forgotten() -> None:
    series = seen(a_report(time=1.0))
    series.observe([])
    assert series.models() == []


def test_requests_are_sent_when_they_are_asked_for() -> None:
    models = seen(a_report()).models()
    without, with_them = (view(models, Query(requests=asked), now=3.0).model for asked in (False, True))
    assert without is not None and without.requests is None
    assert with_them is not None and [request.id for request in with_them.requests or []] == ["one"]


def test_the_site_answers_files_data_and_nonsense() -> None:
    site = Site(seen(a_report(time=2.0)))
    page = site.file("")
    assert page.status == 200 and page.content_type.startswith("text/html")
    for name in ("page.js", "page.css", "expert_map.js", "charts.js", "figures.js", "icon.svg"):
        assert site.file(name).status == 200
    for name in ("page.py", "../site.py", "..", "static", "%2e%2e"):
        assert site.file(name).status == 404
    answer = msgspec.json.decode(site.data({"since": "0", "requests": "true", "unknown": "1"}).body)
    assert answer["model"]["totals"]["hits"] == a_report().stats["hits"]
    for parameters in ({"since": "yesterday"}, {"worker": "-1"}, {"requests": "perhaps"}):
        assert site.data(parameters).status == 400


def test_the_data_of_a_large_model_is_small() -> None:
    experts = a_report().experts
    experts.layers, experts.experts = [f"model.layers.{layer}.mlp.experts" for layer in range(60)], 256
    experts.resident, experts.uses = bytes(60 * 256), np.ones(60 * 256, np.float32).tobytes()
    experts.hits = experts.misses = [10**6] * 60
    experts.stall_seconds = [123.456] * 60
    body = Site(seen(a_report(experts=experts))).data({"since": "9e9"}).body
    assert len(body) < 32 << 10
