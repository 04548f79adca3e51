"""The live page's routes in a FastAPI application. Its data asks for the key that vLLM's API asks for."""

from argparse import Namespace
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from vllm import envs

from ..page import DATA_PATH, HEADERS, PATH, Answer, Series, Site
from . import relied_on

_UNAUTHORIZED = Answer(401, "application/json", b'{"error": "Unauthorized"}')


def add_routes(app: FastAPI, series: Series) -> None:
    """Serve the page, and what ``series`` holds."""
    site = Site(series)
    refused = _refusal(app.state.args)

    def file(name: str = "") -> Response:
        return _response(site.file(name))

    def data(request: Request) -> Response:
        return _response(_UNAUTHORIZED if refused(request) else site.data(request.query_params))

    app.add_api_route(PATH, file, include_in_schema=False)
    app.add_api_route(DATA_PATH, data, include_in_schema=False)
    app.add_api_route(f"{PATH}/{{name}}", file, include_in_schema=False)


def _refusal(args: Namespace) -> Callable[[Request], bool]:
    """Whether a request lacks the key. vLLM's own middleware looks at other addresses only; its check is the same."""
    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not tokens:
        return lambda request: False
    middleware = relied_on.AUTHENTICATION.resolve()(None, tokens=tokens)
    return lambda request: not middleware.verify_token(request.headers)


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, HEADERS | {"Content-Type": answer.content_type})
