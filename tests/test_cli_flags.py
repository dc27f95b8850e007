"""The flags are a promise: scripts are written against them.

After a wanted change, bring the record up to date with
`python tests/test_cli_flags.py > tests/cli_flags.txt` and tell of it in CHANGELOG.md.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

RECORD = Path(__file__).parent / "cli_flags.txt"


def flags(command: Any, words: str) -> Iterator[str]:
    """One line for every flag of a command: its words, the flag, the default."""
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from flags(field.type, words)
            continue
        default = field.default
        if default is dataclasses.MISSING:
            made = field.default_factory
            default = "(required)" if made is dataclasses.MISSING else made()
        said = [
            m.name for m in getattr(hints[field.name], "__metadata__", ()) if hasattr(m, "name")
        ]
        yield f"{words} --{(said or [field.name])[0].replace('_', '-')} {default}"


def all_flags() -> list[str]:
    from decmem.cli import COMMANDS

    return [line for words, command in sorted(COMMANDS.items()) for line in flags(command, words)]


def test_flags_are_those_on_record() -> None:
    recorded, found = RECORD.read_text().splitlines(), all_flags()
    gone, new = sorted(set(recorded) - set(found)), sorted(set(found) - set(recorded))
    assert found == recorded, (
        f"the flags changed; gone: {gone}, new: {new}. If that is meant, run "
        "`python tests/test_cli_flags.py > tests/cli_flags.txt` and tell of it in CHANGELOG.md; "
        "a knob for researchers is a field of a configuration, not a flag"
    )


if __name__ == "__main__":
    print("\n".join(all_flags()))
