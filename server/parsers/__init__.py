"""Parsers of answers: where reasoning ends, and what calls a tool."""

from server.parsers.answer import AnswerParser as AnswerParser
from server.parsers.delta import AnswerDelta as AnswerDelta
from server.parsers.delta import ToolCallDelta as ToolCallDelta
