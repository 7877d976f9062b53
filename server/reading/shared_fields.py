"""Fields that the bodies of many routes have, each declared once."""

from typing import Annotated, Any

from msgspec import Meta

from engine.declared import Int, Object

MAX_OBJECTS = 1 << 14  # of a list: messages, tools
Text = Annotated[str, Meta(extra={"rule": "a string"})]  # an error names its place in a list
Texts = str | Annotated[list[str], Meta(min_length=1)]
TokenIds = list[int | list[int]]  # of a prompt, or of several
Prompts = Annotated[
    str | list[Text | int | list[int]],
    Meta(extra={"rule": "a string, a list of token ids, or a non-empty list of these"}),
]
Hint = Annotated[Any, Meta(description="has no effect here: the answer's X-Left-Out names it")]


def described_as(name: str) -> dict[str, Any]:
    """Return the schema of objects that are kept as the client wrote them, and read as a class of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


class PrefixFields(Object):
    priority: Annotated[Int, Meta(description="larger runs first")] = 0
    extra_key: Annotated[str, Meta(description="cached prefixes are shared within one key only")] = ""
    cache_salt: Annotated[str, Meta(description="as extra_key")] = ""

    @property
    def cache_namespace(self) -> str:
        """The namespace: requests share cached prefixes only within one `extra_key` and one `cache_salt`."""
        return self.extra_key + self.cache_salt


class RequestFields(PrefixFields):
    rid: Annotated[str, Meta(description="name of the request, for /abort_request")] = ""
