"""Procedural chat problems with worked answers: the text of the pocket world.

A two-million-parameter target has to behave like a real model (fluent, low entropy, mostly right), so every kind of
problem is written such that the next token follows from a short look-up in the text: numbers stay small, the running
state is restated on every line, and what has to be copied is a list of whole words rather than letters. The wording
varies (openers, connectives, ways to restate the state), which keeps the entropy above zero.

Every problem is a dict with ``kind``, ``prompt`` (the user's text), ``answer_text`` (the worked completion) and
``answer`` (what its last line ``Answer: ...`` holds).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence

from wording import COLORS, COLUMNS, DAYS, ITEMS, NAMES, PLACES, added, closing, listing, pick, subtracted


# Shares of the hash space of prompts (in percent, cumulative) that decide to which split a prompt belongs.
SPLITS = {"heldout": (0, 6), "quickstart": (6, 12), "sft": (12, 30), "train": (30, 100)}


def make_sum(rng: random.Random) -> tuple[str, list[str], str]:
    """Column addition; the digits not yet used are restated, so each step reads the last digits of the line above."""
    width = rng.choice((3, 3, 4))
    a, b = (rng.randrange(10 ** (width - 1), 10**width) for _ in range(2))
    prompt = pick(
        rng,
        f"What is {a}+{b}? Work in columns.",
        f"Add {a} and {b} column by column.",
        f"Please compute {a}+{b} and show the carries.",
    )
    lines = [pick(rng, f"We add {a} and {b} from the right.", f"Start with {a} and {b}.", f"Let us add {a} and {b}.")]
    put, left, result = pick(rng, "write", "put"), pick(rng, "Left", "Still to add"), pick(rng, "Result", "So far")
    x, y, carry, done = str(a), str(b), 0, ""
    for column in COLUMNS[:width]:
        terms = f"{x[-1]}+{y[-1]}" + (f"+{carry}" if carry else "")
        total = int(x[-1]) + int(y[-1]) + carry
        carry, digit = divmod(total, 10)
        x, y, done = x[:-1], y[:-1], str(digit) + done
        start = pick(rng, "", "Now the ", "Next, the ")
        line = f"{start}{column.lower() if start else column}: {terms}={total}, {put} {digit}, carry {carry}. "
        lines.append(line + (f"{left}: {x} and {y}, carry {carry}. " if x else "") + f"{result}: {done}.")
    if carry:
        lines.append(pick(rng, "The last carry", "The carry") + f" {carry} goes in front. {result}: {carry}{done}.")
    lines.append(closing(rng, f"{a}+{b}={a + b}."))
    return prompt, lines, str(a + b)


def make_shop(rng: random.Random) -> tuple[str, list[str], str]:
    """Shopping totals: one product and one running sum for each item, then a coupon or the change."""
    name, items = rng.choice(NAMES), rng.sample(ITEMS, 4)
    buys = [(item, rng.randint(2, 5), rng.randint(2, 6)) for item in items]
    while sum(n * price for _, n, price in buys) > 90:
        buys = [(item, rng.randint(2, 5), rng.randint(2, 6)) for item in items]
    bought = listing([f"{n} {item}s at {price} dollars each" for item, n, price in buys])
    total, verb = 0, pick(rng, "buys", "orders", "wants")
    unit = pick(rng, "dollars", "dollars in total")
    lines = [pick(rng, f"Let us add what {name} pays, item by item.", f"We go through what {name} {verb}.")]
    for item, n, price in buys:
        start = pick(rng, "The", "Now the", "Next, the", "Then the")
        cost = n * price
        lines.append(f"{start} {item}s: {n}*{price}={cost}. Total: {added(total, cost)} {unit}.")
        total += cost
    mode = rng.randrange(3)
    if mode == 0:
        asked = pick(rng, "How much is that?", "What is the total?")
    elif mode == 1:
        coupon = rng.randint(2, 9)
        asked = f"A coupon takes off {coupon} dollars. " + pick(rng, "How much is left to pay?", "What is to pay?")
        lines.append(f"The coupon takes off {coupon}: {subtracted(total, coupon)} dollars.")
        total -= coupon
    else:
        asked = f"{name} pays with 100 dollars. " + pick(rng, "How much comes back?", "What is the change?")
        lines.append(f"The change is {subtracted(100, total)} dollars.")
        total = 100 - total
    lines.append(closing(rng, f"the result is {total} dollars."))
    return f"{pick(rng, 'Today', 'Now')} {name} {verb} {bought}. {asked}", lines, str(total)


def make_ages(rng: random.Random) -> tuple[str, list[str], str]:
    """A chain of ages, each given by the one before, and a question about the last person some years on."""
    names = rng.sample(NAMES, rng.choice((5, 6)))
    age = rng.randint(10, 30)
    facts = [f"{pick(rng, 'Today', 'Now')} {names[0]} is {age} years old."]
    lines = [pick(rng, "We find the ages one by one.", "Let us work through the people in order.")]
    lines.append(f"The text says that {names[0]} is {age}.")
    for before, name in itertools.pairwise(names):
        gap = rng.randint(2, 9)
        older = age - gap < 5 or rng.random() < 0.5
        relation = f"{name} is {gap} years {'older' if older else 'younger'} than {before}"
        facts.append(f"And {relation}.")
        worked = added(age, gap) if older else subtracted(age, gap)
        start = pick(rng, "Next, ", "Then ", "Also, ")
        lines.append(f"{start}{relation}, and {before} is {age}, so {name} is {worked}.")
        age += gap if older else -gap
    years = rng.randint(2, 9)
    start = pick(rng, f"In {years} years", f"After {years} years")
    lines.append(f"{start}, {names[-1]} is {added(age, years)}.")
    prompt = " ".join(facts) + " " + pick(rng, "How old is", "What is the age of") + f" {names[-1]} in {years} years?"
    return prompt, lines, str(age + years)


def make_stock(rng: random.Random) -> tuple[str, list[str], str]:
    """Stock keeping: what arrives and what is sold day by day, with the count restated each day."""
    item, count = rng.choice(ITEMS), rng.randint(15, 40)
    prompt = f"{pick(rng, 'A shop has', 'The store has', 'There are')} {count} {item}s."
    lines = [pick(rng, "We follow the stock day by day.", "Let us keep the stock up to date.")]
    now = pick(rng, "Now", "Stock", "In stock")
    lines.append(f"{pick(rng, 'Start', 'At first')}: {count} {item}s.")
    for day in DAYS[: rng.choice((5, 6))]:
        n = rng.randint(2, 12)
        sold = count >= n and (count > 60 or rng.random() < 0.5)
        event = f"{n} {item}s " + (pick(rng, "are sold", "go out") if sold else pick(rng, "arrive", "come in"))
        worked = subtracted(count, n) if sold else added(count, n)
        count += -n if sold else n
        prompt += f" {day}: {event}."
        lines.append(f"{day}: {event}, {pick(rng, 'so', 'which gives')} {worked}. {now}: {count} {item}s.")
    lines.append(closing(rng, f"there are {count} {item}s."))
    return prompt + f" How many {item}s are there at the end?", lines, str(count)


def make_program(rng: random.Random) -> tuple[str, list[str], str]:
    """Run a small program by hand: every line computes a variable from the one before."""
    names = rng.sample("abcdkmnpxyz", rng.choice((7, 8)))
    value = rng.randint(1, 9)
    code = [f"{names[0]} = {value}"]
    start = rng.choice(("Line", "Step"))
    lines = [pick(rng, "We run the program line by line.", "Let us follow the variables.")]
    lines.append(f"{start} 1: {pick(rng, 'At first', 'This sets')} {names[0]}={value}.")
    for number, (before, name) in enumerate(itertools.pairwise(names), 2):
        n = rng.randint(1, 9)
        minus = value >= n and (value > 40 or rng.random() < 0.4)
        worked = subtracted(value, n) if minus else added(value, n)
        statement = f"{name} = {before} {'-' if minus else '+'} {n}"
        code.append(statement)
        lines.append(f"{start} {number}: {statement}, {pick(rng, 'so', 'which gives')} {name}={worked}.")
        value += -n if minus else n
    code.append(f"print({names[-1]})")
    lines.append(closing(rng, f"the program prints {value}."))
    listed = "\n".join(f"{i}: {line}" for i, line in enumerate(code, 1))
    ask = pick(rng, "What does this program print?", "Run this program by hand.", "What is printed here?")
    return f"{ask}\n{listed}", lines, str(value)


def make_sort(rng: random.Random) -> tuple[str, list[str], str]:
    """Selection sort; what is left and what is sorted are written out after each choice."""
    tens = rng.sample(range(1, 10), rng.choice((5, 6)))
    left, done = [10 * t + rng.randrange(10) for t in tens], []
    up = rng.random() < 0.5
    order, extreme = ("ascending", "smallest") if up else ("descending", "largest")
    shown = ", ".join(map(str, left))
    prompt = pick(rng, f"Sort {shown} in {order} order.", f"Put these in {order} order: {shown}.")
    lines = [pick(rng, f"We always take the {extreme} number.", f"Let us pick the {extreme} number each time.")]
    rest, result = pick(rng, "Left", "Remaining"), pick(rng, "Sorted", "Order")
    while left:
        best = min(left) if up else max(left)
        start = pick(rng, "The", "Now the", "Next, the")
        line = f"{rest}: {', '.join(map(str, left))}. {start} {extreme} is {best}. "
        left.remove(best)
        done.append(best)
        lines.append(line + f"{result}: {', '.join(map(str, done))}.")
    lines.append(pick(rng, "Nothing is left.", "All numbers are used."))
    return prompt, lines, ", ".join(map(str, done))


def make_count(rng: random.Random) -> tuple[str, list[str], str]:
    """Count a word in a numbered list; the numbers make each copied word a plain look-up."""
    words = rng.sample(COLORS if rng.random() < 0.5 else ITEMS, 2)
    row = [rng.choice(words) for _ in range(rng.choice((10, 11, 12)))]
    asked, count = words[0], 0
    shown = ", ".join(f"{i} {word}" for i, word in enumerate(row, 1))
    lines = [pick(rng, f"We count {asked}.", f"Let us go through the list for {asked}.")]
    for i, word in enumerate(row, 1):
        count += word == asked
        note = pick(rng, "yes", "a match") if word == asked else pick(rng, "no", "skip", "no match")
        lines.append(f"{i} {word}: {note}, so far {count}.")
    lines.append(closing(rng, f"{asked} is there {count} times."))
    ask = pick(rng, f"How many times is {asked} there?", f"Count {asked}.")
    return f"{ask} {pick(rng, 'Look at this list', 'Here is a list')}: {shown}.", lines, str(count)


def make_notes(rng: random.Random) -> tuple[str, list[str], str]:
    """Where is it? Notes are quoted one by one, and the place of the item is tracked."""
    item, place = rng.choice(ITEMS), ""
    notes, lines = [], []
    said = pick(rng, "says", "reads")
    people = rng.sample(NAMES, rng.choice((6, 7)))
    for i, name in enumerate(people, 1):
        place = rng.choice([p for p in PLACES if p != place])
        note = f"{name} {rng.choice(('brings', 'takes', 'moves'))} the {item} to the {place}"
        notes.append(f"{i}: {note}.")
        after = pick(rng, f"So the {item} is in the {place}.", f"Now the {item} is in the {place}.")
        lines.append(f"Note {i} {said}: {note}. {after}")
    lines.insert(0, pick(rng, "We read the notes in order.", f"Let us follow the {item}."))
    lines.append(closing(rng, f"the {item} is in the {place}."))
    ask = pick(rng, f"Where is the {item} at the end?", f"Find the {item}.")
    return ask + " Notes:\n" + "\n".join(notes), lines, place


def make_quote(rng: random.Random) -> tuple[str, list[str], str]:
    """Repeat numbered lines of words as they stand, no word twice, then give the last word."""
    pool = [*NAMES, *ITEMS, *COLORS, *PLACES]
    rng.shuffle(pool)
    count, width = rng.choice((6, 7)), rng.choice((6, 7))
    rows = [pool[i * width : (i + 1) * width] for i in range(count)]
    shown = "\n".join(f"{i}: {' '.join(row)}" for i, row in enumerate(rows, 1))
    lines = [pick(rng, "Here are the lines again.", "We copy the lines first.")]
    start = pick(rng, "Line", "Copy of line")
    lines += [f"{start} {i}: {' '.join(row)}" for i, row in enumerate(rows, 1)]
    word = rows[-1][-1]
    lines.append(closing(rng, f"the last word is {word}."))
    ask = pick(rng, "Copy all lines. What is the last word?", "Copy the lines. How do they end?")
    return f"{ask}\n{shown}", lines, word


def make_table(rng: random.Random) -> tuple[str, list[str], str]:
    """Read a table row by row and add up the points."""
    names = rng.sample(NAMES, rng.choice((6, 7)))
    rows = [(name, rng.choice(COLORS), rng.randint(2, 16)) for name in names]
    total = 0
    shown = "\n".join(f"| {name} | {color} | {points} |" for name, color, points in rows)
    lines = [pick(rng, "We add the points of all rows.", "Let us go through the rows.")]
    for name, color, points in rows:
        start = pick(rng, "Row", "Next,", "Then")
        note = pick(rng, "Total", "We add it", "So far")
        lines.append(f"{start} {name}: {color}, {points}. {note}: {added(total, points)}.")
        total += points
    lines.append(closing(rng, f"all have {total} points."))
    ask = pick(rng, "How many points are there?", "Add the points.")
    return f"| name | color | points |\n{shown}\n{ask}", lines, str(total)


def make_queue(rng: random.Random) -> tuple[str, list[str], str]:
    """People join a line and leave it at the front; it is written out after every event."""
    line = rng.sample(NAMES, rng.choice((3, 4)))
    prompt = f"{pick(rng, 'In line', 'Waiting')}: {', '.join(line)}."
    lines = [pick(rng, "We keep the line after each event.", "Let us follow who is waiting.")]
    show = pick(rng, "Line", "Waiting")
    lines.append(f"{pick(rng, 'Start', 'At first')}: {', '.join(line)}.")
    for number in range(1, 1 + rng.choice((5, 6, 7))):
        draw = rng.random()
        if len(line) < 3 or (draw < 0.45 and len(line) < 6):
            name = rng.choice([n for n in NAMES if n not in line])
            event = f"{name} joins at the end"
            line = [*line, name]
        else:
            event, line = "the first one leaves", line[1:]
        prompt += f" {number}: {event}."
        lines.append(f"{number}: {event}. {pick(rng, '', 'Now ', 'Then ')}{show}: {', '.join(line)}.")
    first = rng.random() < 0.5
    answer = line[0] if first else line[-1]
    where = "first" if first else "last"
    lines.append(closing(rng, f"{answer} is {where} in line."))
    return f"{prompt} {pick(rng, f'Who is {where}?', f'Which person is {where} at the end?')}", lines, answer


def make_python(rng: random.Random) -> tuple[str, list[str], str]:
    """Write a Python function from a description and run it on one list."""
    numbers, n = [rng.randint(1, 12) for _ in range(rng.choice((4, 5)))], rng.randint(2, 9)
    goal = rng.choice(("sum", "raise", "double"))
    name = f"{goal}_{rng.choice(('numbers', 'values', 'items', 'all'))}"
    rows, row = rng.choice((("values", "value"), ("numbers", "number"), ("items", "item")))
    out = "total" if goal == "sum" else "result"
    does = {"sum": "sums the numbers", "raise": f"adds {n} to each number", "double": "doubles each number"}[goal]
    update = {"sum": f"{out} += {row}", "raise": f"{out}.append({row} + {n})", "double": f"{out}.append({row} * 2)"}
    prompt = pick(rng, "Write a Python function", "Please write a function")
    prompt += f" {name} that {does} in a list. Then run it on {numbers}."
    value = 0 if goal == "sum" else []
    lines = [pick(rng, "Here is the function:", "This function does it:"), "```python", f"def {name}({rows}):"]
    if rng.random() < 0.5:
        lines.append(f'    """{does.capitalize()} in a list."""')
    lines += [
        f"    {out} = {value}",
        f"    for {row} in {rows}:",
        f"        {update[goal]}",
        f"    return {out}",
        "```",
    ]
    lines.append(pick(rng, f"Now we run it on {numbers}.", f"Run on {numbers}:"))
    for v in numbers:
        line, now = f"{row} {v}: ", pick(rng, "is", "becomes")
        if goal == "sum":
            line, value = f"{line}{out} {now} {added(value, v)}.", value + v
        else:
            worked = added(v, n) if goal == "raise" else f"{v}*2={v * 2}"
            value = [*value, v + n if goal == "raise" else v * 2]
            line += f"{worked}, {out} {now} {value}."
        lines.append(line)
    lines.append(closing(rng, f"{name}({numbers}) returns {value}."))
    return prompt, lines, str(value)


MAKERS = {
    "sum": make_sum,
    "shop": make_shop,
    "ages": make_ages,
    "stock": make_stock,
    "program": make_program,
    "sort": make_sort,
    "count": make_count,
    "notes": make_notes,
    "quote": make_quote,
    "table": make_table,
    "queue": make_queue,
    "python": make_python,
}
KINDS = tuple(MAKERS)


def make_problem(rng: random.Random, kind: str | None = None) -> dict[str, str]:
    """Draw one problem; ``kind`` is drawn too if it is not given."""
    kind = kind or rng.choice(KINDS)
    prompt, lines, answer = MAKERS[kind](rng)
    text = "\n".join([*lines, f"Answer: {answer}"])
    return {"kind": kind, "prompt": prompt, "answer_text": text, "answer": answer}


def check_answer(problem: dict, completion_text: str) -> bool:
    """Whether the completion's last line is the right answer line."""
    found = re.findall(r"^Answer: (.*)$", completion_text.strip(), flags=re.MULTILINE)
    return bool(found) and found[-1].strip() == problem["answer"]


def split_of(prompt: str) -> str:
    """The split that owns a prompt: a function of the prompt's text alone, so no prompt is in two splits."""
    share = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return next(split for split, (low, high) in SPLITS.items() if low <= share < high)


def stream(split: str, seed: int = 0, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, str]]:
    """Endless problems of one split, kinds in turn, without a prompt twice."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    rng, seen = random.Random(f"{split}-{seed}"), set()
    while True:
        for kind in kinds:
            problem = make_problem(rng, kind)
            while problem["prompt"] in seen or split_of(problem["prompt"]) != split:
                problem = make_problem(rng, kind)
            seen.add(problem["prompt"])
            yield problem


def problems(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """The first ``count`` problems of :func:`stream`."""
    source = stream(split, seed)
    return [next(source) for _ in range(count)]
