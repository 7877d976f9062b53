"""Write the tables of `server/MIGRATION.md` anew from the parser's: `python -m tests.migration`."""

import re
from collections.abc import Sequence
from pathlib import Path

from server.foreign_flags import ForeignFlag, by_meaning
from server.foreign_tables import ROUTER_FLAGS, SGLANG_FLAGS, SHARED_FLAGS, VLLM_FLAGS

PAGE = Path(__file__).parent.parent / "server" / "MIGRATION.md"
TABLES: tuple[tuple[str, Sequence[ForeignFlag]], ...] = (
    ("vLLM's server", VLLM_FLAGS),
    ("SGLang's server", SGLANG_FLAGS),
    ("Values of flags that are ours, too", SHARED_FLAGS),
    ("SGLang's router", ROUTER_FLAGS),
)


def table(flags: Sequence[ForeignFlag]) -> str:
    """Return a table of flags: first what has a meaning here, then what needs none, then what is refused."""
    lines = ["| flag | here |", "|---|---|"]
    for meaning, names in by_meaning(sorted(flags, key=rank)).items():
        meaning = re.sub(r"(?<![`\w-])(--[a-z][a-z0-9-]*(?:=\S+)?)", r"`\1`", meaning)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {meaning} |".replace("{", "\\{"))
    return "\n".join(lines)


def rank(flag: ForeignFlag) -> int:
    return 0 if flag.words and not flag.is_refused else 2 if flag.is_refused else 1


def main() -> None:
    text = PAGE.read_text()
    for title, flags in TABLES:
        head, _, rest = text.partition(f"## {title}\n")
        _, mark, after = rest.partition("\n## ")
        text = f"{head}## {title}\n\n{table(flags)}\n{mark}{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
