"""Grammars of requests, compiled before the requests are submitted."""

import asyncio
from collections.abc import Sequence

from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.state import RequestState
from engine.text.grammar import Grammar, GrammarCompiler, GrammarStats, Matcher

GRAMMAR_TIMEOUT_S = 10.0  # a grammar that takes longer to compile is refused


class Constraints:
    """Gives requests their matchers."""

    def __init__(self, grammars: GrammarCompiler | None, *, may_jump: bool) -> None:
        """grammars: None refuses every constraint. may_jump: forced tokens join answers at once (see `Matcher`)."""
        self._grammars, self._may_jump = grammars, may_jump
        self.warming_up: asyncio.Future[None] | None = None

    @property
    def stats(self) -> GrammarStats:
        return self._grammars.stats if self._grammars else GrammarStats()

    async def prepare(self, states: Sequence[RequestState]) -> None:
        """Set `matcher` of those `states` that need one; see `Engine.prepare`."""
        written: SamplingParams | None = None
        grammar: Grammar | None = None
        for state in states:
            request, params = state.request, state.request.sampling_params
            if written is None or not params.has_constraint_of(written):
                constraint, written = params.constraint, params
                grammar = None if constraint is None else await self._grammar(*constraint)
            if grammar is None and request.max_thinking_tokens is None:
                continue
            may_jump = self._may_jump and not request.return_logprob
            state.matcher = Matcher(grammar, request.reasoning_end_ids, request.max_thinking_tokens, may_jump=may_jump)

    async def _grammar(self, kind: str, text: str) -> Grammar:
        grammars = self._grammars
        if grammars is None:
            raise InvalidRequest(
                f"{kind} is not supported: the server runs with --grammar-backend none or --skip-tokenizer-init", kind
            )
        grammar = grammars.find(kind, text)
        if grammar is not None:
            return grammar
        compiling = asyncio.to_thread(grammars.compile, kind, text)
        try:
            return await asyncio.wait_for(compiling, GRAMMAR_TIMEOUT_S)
        except TimeoutError:
            message = f"{kind} is too complex: compiling it took more than {GRAMMAR_TIMEOUT_S:.0f} s"
            raise InvalidRequest(message, kind) from None

    def warm_up(self) -> None:
        """Build the tables that the first grammar needs, on a thread."""
        if self._grammars is not None:
            self.warming_up = asyncio.get_running_loop().run_in_executor(None, self._grammars.warm_up)
