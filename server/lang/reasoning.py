"""The boundary between a model's thoughts and its answer."""

MARKERS = {"kimi": ("◁think▷", "◁/think▷")}
THINK = ("<think>", "</think>")
THINKS_FIRST = ("deepseek-r1",)  # begins inside its thoughts: the chat template has opened them


def split_reasoning(text: str, model_type: str | None) -> tuple[str, str]:
    """Return (reasoning, content). `model_type`: a reasoning parser's name, as in the server's --reasoning-parser."""
    begin, end = MARKERS.get(model_type or "", THINK)
    before, marker, after = text.partition(end)
    if not marker and not (text.lstrip().startswith(begin) or model_type in THINKS_FIRST):
        return "", text
    return before.strip().removeprefix(begin).strip(), after.lstrip()
