"""The page's routes in the application that vLLM builds for its server, without an engine behind it."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_moe_offload.integration import page, seams
from vllm_moe_offload.integration.seam import Seam
from vllm_moe_offload.page import PATH

Parse = Callable[..., Any]


@pytest.fixture
def client(parser: argparse.ArgumentParser, engine_args: Parse, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """A client of the server's application, made from a command line."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def make(*words: str) -> TestClient:
        args = parser.parse_args([*words])
        args.additional_config = engine_args(*words).additional_config
        return TestClient(build_app(args, ("generate",), None), raise_server_exceptions=False)

    return make


def test_the_page_is_there_where_it_is_asked_for(client: Parse) -> None:
    server = client("--moe-offload-page")
    answer = server.get(PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert server.get(f"{PATH}/page.js").status_code == 200
    assert server.get(f"{PATH}/data").json()["models"] == []
    assert server.get(f"{PATH}/nothing").status_code == 404


@pytest.mark.parametrize("words", [(), ("--moe-offload-cache", "25%"), ("--plugin", "moe-offload")])
def test_it_is_not_there_where_nobody_asked(words: tuple[str, ...], client: Parse) -> None:
    server = client(*words)
    assert server.get(PATH).status_code == 404
    assert server.get(f"{PATH}/data").status_code == 404


def test_the_environment_may_ask(client: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_OFFLOAD", '{"page": true}')
    assert client().get(PATH).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_it_can_only_be_read(method: str, client: Parse) -> None:
    server = client("--moe-offload-page")
    for path in (PATH, f"{PATH}/data", f"{PATH}/page.js"):
        assert server.request(method, path).status_code == 405


def test_the_data_asks_for_the_key_of_the_api(client: Parse) -> None:
    server = client("--moe-offload-page", "--api-key", "sesame", "open")
    ask = {word: {"Authorization": word} for word in ("Bearer sesame", "Bearer open", "Bearer wrong", "sesame", "")}
    statuses = {word: server.get(f"{PATH}/data", headers=header).status_code for word, header in ask.items()}
    assert statuses == {"Bearer sesame": 200, "Bearer open": 200, "Bearer wrong": 401, "sesame": 401, "": 401}
    assert server.get("/v1/models").status_code == 401
    assert server.get(f"{PATH}/data").json() == server.get("/v1/models").json()
    assert server.get(PATH).status_code == 200, "the page itself says nothing, and has to ask for the key"


def test_the_key_of_the_environment_counts_as_well(client: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    server = client("--moe-offload-page")
    assert server.get(f"{PATH}/data").status_code == 401
    assert server.get(f"{PATH}/data", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_below_a_root_path(client: Parse) -> None:
    server = client("--moe-offload-page", "--root-path", "/models/a", "--api-key", "sesame")
    for prefix in ("", "/models/a"):
        assert server.get(f"{prefix}{PATH}").status_code == 200
        assert server.get(f"{prefix}{PATH}/data").status_code == 401
        assert server.get(f"{prefix}{PATH}/data", headers={"Authorization": "Bearer sesame"}).status_code == 200
    assert 'href="/' not in server.get(PATH).text and 'src="/' not in server.get(PATH).text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "http://localhost:8000/moe-offload"),
        (("--host", "0.0.0.0", "--port", "9"), "http://localhost:9/moe-offload"),
        (("--host", "::1"), "http://[::1]:8000/moe-offload"),
        (("--host", "gpu7", "--root-path", "/a/"), "http://gpu7:8000/a/moe-offload"),
        (("--ssl-keyfile", "k", "--ssl-certfile", "c"), "https://localhost:8000/moe-offload"),
        (("--uds", "/run/vllm.sock"), "/moe-offload at unix:/run/vllm.sock"),
    ],
)
def test_the_log_names_it(words: tuple[str, ...], expected: str, parser: argparse.ArgumentParser) -> None:
    assert page.url(parser.parse_args([*words])) == expected


def test_a_vllm_without_its_seams_is_refused(engine_args: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Seam("vllm.plugins", "load_endpoint_plugins_elsewhere", "add the page", feature=seams.PAGE)
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, moved))
    with pytest.raises(SystemExit):
        engine_args("--moe-offload-page").create_engine_config()


@pytest.mark.parametrize(
    ("path", "status", "logged"),
    [("/moe-offload/data?since=1", 200, False), ("/moe-offload/data", 401, True), ("/v1/models", 200, True)],
)
def test_questions_of_an_open_page_do_not_fill_the_log(path: str, status: int, logged: bool) -> None:
    arguments = ("127.0.0.1:1", "GET", path, "1.1", status)
    record = logging.makeLogRecord({"msg": '%s - "%s %s HTTP/%s" %d', "args": arguments})
    assert page._is_worth_a_line(record) == logged
