"""SGLang's /generate_from_file: a file in a form is the prompt."""

from aiohttp import BodyPartReader, web

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.state import RequestState
from server.apis.answer import respond
from server.apis.generate import GenerateAnswer
from server.apis.meta_info import MetaInfo
from server.http.bodies import BODY, BODY_BUDGET, BodyTooLarge, HeldBody
from server.http.forms import form_of, name_of
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.reading.prompts import encode_prompt

CHUNK_BYTES = 1 << 18
MAX_NEW_TOKENS = 512  # SGLang's: the form has no field for it


class FilePromptApi:
    def __init__(self, engine: Engine, live: LiveRequests) -> None:
        self.engine, self.live = engine, live

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/generate_from_file", self.generate)]

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        """Answer the text of the form's `file`, greedily, as /generate answers one that is not streamed."""
        text = await self._receive(http_request)
        if text.lstrip()[:2] == "[[":
            raise InvalidRequest("input_embeds are not supported: the file must hold the prompt's text", "file")
        input_ids = await encode_prompt(self.engine, text, "file")
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
        rid = new_rid()
        [request] = make_requests([rid], input_ids, params, Options(may_shorten=True))
        meta_info = MetaInfo(self.engine.tokenizer)
        answer = GenerateAnswer(0, RequestState(request), meta_info, has_index=False, is_disjoint=False)
        return await respond(http_request, self.live, rid, [answer], body=lambda bodies: bodies[0])

    async def _receive(self, http_request: web.Request) -> str:
        """Return the text of the form's file."""
        content: bytes | None = None
        held = http_request[BODY] = HeldBody(http_request.app[BODY_BUDGET])
        with form_of(http_request) as form:
            async for part in form:
                name = name_of(part)
                if name != "file" or content is not None:
                    raise InvalidRequest(f"the form must have one file and nothing else, got also {name!r}", name)
                content = await self._read(part, held, http_request.client_max_size)
        if content is None:
            raise InvalidRequest("the form has no file", "file")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the file is not UTF-8 at byte {error.start}", "file") from None

    @staticmethod
    async def _read(part: BodyPartReader, held: HeldBody, limit: int) -> bytes:
        pieces, num_bytes = [], 0
        while piece := await part.read_chunk(CHUNK_BYTES):
            num_bytes += len(piece)
            if num_bytes > limit:
                raise BodyTooLarge(f"the file is longer than {limit} bytes, the limit set by --max-body-bytes")
            held.add(piece)
            pieces.append(piece)
        return b"".join(pieces)
