"""The fenced commands of docs/howto/cluster.md, each block under a comment that says what executes it."""

import re
from pathlib import Path

HOWTO = Path(__file__).parent.parent / "docs" / "howto" / "cluster.md"
BLOCK = re.compile(r"^<!-- (test|not tested): ([^>]+) -->\n```sh\n(.*?)```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Return (test or not tested, by what or what it needs, the commands) of each block."""
    return BLOCK.findall(HOWTO.read_text(encoding="utf-8"))


def commands(kind: str) -> list[str]:
    """Return the lines of the blocks that are executed by one kind of test, in order."""
    tested = [body for mark, what, body in blocks() if (mark, what) == ("test", kind)]
    return [line for body in tested for line in body.splitlines()]
