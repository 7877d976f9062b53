"""Test programs with constrained answers, over HTTP, in process and through OpenAI's API."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import server.lang as sgl
from server.lang.backends.openai import OpenAI
from tests.lang_servers import serving_engine, tiny_engine

IP_REGEX = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
CITY_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "population": {"type": "integer", "maximum": 999}},
        "required": ["name", "population"],
        "additionalProperties": False,
    }
)


@sgl.function
def typed(s: Any) -> None:
    s += "Count: " + sgl.gen_int("count", max_tokens=6) + "." + sgl.gen("is_fine", dtype=bool)
    s += " costs " + sgl.gen("price", dtype=float, max_tokens=6) + " " + sgl.gen_string("name", max_tokens=200)


@sgl.function
def city(s: Any) -> None:
    s += "Paris, in JSON: " + sgl.gen("facts", max_tokens=200, json_schema=CITY_SCHEMA)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[sgl.Engine]:
    with tiny_engine(tiny_llama) as engine:
        yield engine


@pytest.fixture(params=["http", "in_process"])
def backend(request: pytest.FixtureRequest, engine: sgl.Engine) -> Iterator[Any]:
    if request.param == "in_process":
        yield engine
        return
    with serving_engine(engine) as url:
        endpoint = sgl.RuntimeEndpoint(url)
        yield endpoint
        endpoint.shutdown()


def test_a_schema_makes_json_of_its_shape(backend: Any) -> None:
    facts = json.loads(city.run(backend=backend)["facts"])
    assert facts.keys() == {"name", "population"} and isinstance(facts["population"], int)


def test_a_dtype_can_be_read_as_such(backend: Any) -> None:
    state = typed.run(backend=backend)
    int(state["count"])
    float(state["price"])
    assert state["is_fine"] in ("True", "False")


def test_a_form_goes_through_openais_api(engine: sgl.Engine) -> None:
    @sgl.function
    def address(s: Any) -> None:
        s += sgl.user("What is the IP address of the Google DNS servers?")
        s += sgl.assistant(sgl.gen("answer", regex=IP_REGEX, temperature=0))
        s += sgl.user("And a city?") + sgl.assistant(sgl.gen("city", json_schema=CITY_SCHEMA, max_tokens=200))

    with serving_engine(engine, served_model_name=["tiny"]) as url:
        api = OpenAI("tiny", base_url=f"{url}/v1", api_key="none")
        state = address.run(backend=api)
        assert re.fullmatch(IP_REGEX, state["answer"])
        assert json.loads(state["city"]).keys() == {"name", "population"}
        completions = OpenAI("tiny", is_chat_model=False, base_url=f"{url}/v1", api_key="none")
        assert city.run(backend=completions)["facts"].startswith("{")
        api.shutdown()
        completions.shutdown()
