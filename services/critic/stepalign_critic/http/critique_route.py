"""``POST /v1/critiques``: one critique.

It answers 200 with either ``critique`` or ``failure``: a model's answer that does not align is an answer.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Body, FastAPI, Request, Response

from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign_critic.http.answering import Answering
from stepalign_critic.http.deadlines import TIMEOUT_PARAMETER, deadline_of
from stepalign_critic.http.examples import CACHE_HEADER, CRITIQUE, REQUEST_EXAMPLE, error_answers
from stepalign_critic.http.hang_up import until_hang_up

Asked = Annotated[CritiqueRequest, Body(examples=[REQUEST_EXAMPLE])]


def add_critique_route(app: FastAPI, answering: Answering) -> None:
    """Add ``POST /v1/critiques``."""

    @app.post(
        "/v1/critiques",
        response_model=CritiqueResponse,
        responses={200: CRITIQUE, **error_answers(400, 401, 408, 413, 415, 422, 429, 500, 502, 503, 504)},
        openapi_extra={"parameters": [TIMEOUT_PARAMETER]},
    )
    async def critiques_endpoint(body: Asked, request: Request) -> Response:
        found = await until_hang_up(request.receive, answering.answer(body, deadline_of(request)))
        text = found.response.model_dump_json() if found.text is None else found.text
        return Response(text, media_type="application/json", headers={CACHE_HEADER: found.source})
