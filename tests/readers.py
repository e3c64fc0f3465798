"""What the package writes for people, read back."""

import ast
import json
import re


def checked(card):
    """Well-formed: no leftovers of the template, whole tables, code that parses."""
    assert not re.search(r"{{|{%|%}|}}|\bNone\b|\n\n\n", card.text), card.text
    for table in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
        assert re.fullmatch(r"\|(-+\|)+", table.splitlines()[1]), table
    assert len(re.findall(r"^\|---", card.text, flags=re.MULTILINE)) == len(
        re.findall(r"(?:^\|.*\n)+", card.text, re.M)
    )
    for code in re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE):
        ast.parse(code)
    assert card.data.library_name == "transformers"
    return card


def data_of(file):
    """What a page of traces holds."""
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)
    return json.loads(script[1])
