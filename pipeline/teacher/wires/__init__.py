"""The formats that teachers are asked in, by the name under which the response store knows them."""

from collections.abc import Mapping

from pipeline.teacher.wire import Wire
from pipeline.teacher.wires.anthropic import ANTHROPIC
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

WIRES: Mapping[str, Wire] = {wire.name: wire for wire in (OPENAI_CHAT, ANTHROPIC, GEMINI)}
