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
    """A chain of ages, each given by the one before, and a question about one person some years on."""
    names = rng.sample(NAMES, rng.choice((4, 5)))
    ages = {names[0]: rng.randint(10, 30)}
    facts = [f"{pick(rng, 'Today', 'Now')} {names[0]} is {ages[names[0]]} years old."]
    lines = [pick(rng, "We find the ages one by one.", "Let us work through the people in order.")]
    lines.append(f"The text says that {names[0]} is {ages[names[0]]}.")
    for before, name in itertools.pairwise(names):
        age, gap = ages[before], rng.randint(2, 9)
        older = age - gap < 5 or rng.random() < 0.5
        ages[name] = age + gap if older else age - gap
        relation = f"{name} is {gap} years {'older' if older else 'younger'} than {before}"
        facts.append(f"And {relation}.")
        worked = added(age, gap) if older else subtracted(age, gap)
        start = pick(rng, "Next, ", "Then ", "Also, ")
        lines.append(f"{start}{relation}, and {before} is {age}, so {name} is {worked}.")
    asked, years = rng.choice(names[1:]), rng.randint(2, 9)
    known = ", ".join(f"{name} {ages[name]}" for name in names)
    lines.append(pick(rng, "All ages", "The ages") + f": {known}.")
    lines.append(pick(rng, f"In {years} years", f"After {years} years") + f", {asked} is {added(ages[asked], years)}.")
    prompt = " ".join(facts) + " " + pick(rng, "How old is", "What is the age of") + f" {asked} in {years} years?"
    return prompt, lines, str(ages[asked] + years)


def make_stock(rng: random.Random) -> tuple[str, list[str], str]:
    """Stock keeping: the events of a week change one of three counts, and all three are restated each day."""
    items = rng.sample(ITEMS, 3)
    stock = {item: rng.randint(5, 30) for item in items}

    def state() -> str:
        return ", ".join(f"{n} {item}s" for item, n in stock.items())

    prompt = pick(rng, "A shop has", "The store has", "There are") + " " + listing(state().split(", ")) + "."
    lines = [pick(rng, "We follow the stock day by day.", "Let us keep the stock up to date.")]
    now = pick(rng, "Now", "Stock", "In stock")
    lines.append(f"{pick(rng, 'Start', 'At first')}: {state()}.")
    for day in DAYS[: rng.choice((4, 5))]:
        item, n = rng.choice(items), rng.randint(2, 9)
        sold = stock[item] >= n and (stock[item] > 40 or rng.random() < 0.5)
        event = f"{n} {item}s " + (pick(rng, "are sold", "go out") if sold else pick(rng, "arrive", "come in"))
        worked = subtracted(stock[item], n) if sold else added(stock[item], n)
        stock[item] += -n if sold else n
        prompt += f" {day}: {event}."
        lines.append(f"{day}: {event}, {pick(rng, 'so', 'which gives')} {worked}. {now}: {state()}.")
    asked = rng.choice(items)
    lines.append(closing(rng, f"there are {stock[asked]} {asked}s."))
    return prompt + f" How many {asked}s are there at the end?", lines, str(stock[asked])


def make_program(rng: random.Random) -> tuple[str, list[str], str]:
    """Run a small program by hand; every line restates all the variables."""
    a, b, c = rng.sample("abcdkmnpxyz", 3)
    values = {name: rng.randint(1, 9) for name in (a, b, c)}
    code = [f"{name} = {value}" for name, value in values.items()]
    show, start = pick(rng, "Now", "State"), rng.choice(("Line", "Step"))

    def state() -> str:
        return ", ".join(f"{name}={value}" for name, value in values.items())

    lines = [pick(rng, "We run the program line by line.", "Let us follow the variables.")]
    lines.append(pick(rng, "The first three lines set", "At first") + f" {state()}.")
    for number in range(4, 4 + rng.choice((4, 5))):
        name, left = rng.choice((a, b, c)), rng.choice((a, b, c))
        right = str(rng.randint(1, 5)) if rng.random() < 0.6 else rng.choice((a, b, c))
        first, second = values[left], values.get(right) if right in values else int(right)
        sign = "-" if first >= second and (first + second > 30 or rng.random() < 0.4) else "+"
        worked = subtracted(first, second) if sign == "-" else added(first, second)
        values[name] = first - second if sign == "-" else first + second
        code.append(f"{name} = {left} {sign} {right}")
        lines.append(f"{start} {number}: {name} = {left} {sign} {right}, so {name}={worked}. {show}: {state()}.")
    asked = rng.choice((a, b, c))
    code.append(f"print({asked})")
    lines.append(closing(rng, f"the program prints {values[asked]}."))
    listed = "\n".join(f"{i}: {line}" for i, line in enumerate(code, 1))
    ask = pick(rng, "What does this program print?", "Run this program by hand.", "What is printed here?")
    return f"{ask}\n{listed}", lines, str(values[asked])


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
    """Count two words in a numbered list; the numbers make each copied word a plain look-up."""
    words = rng.sample(COLORS if rng.random() < 0.5 else ITEMS, 4)
    row = [rng.choice(words) for _ in range(rng.choice((8, 9)))]
    first, second = rng.sample(words, 2)
    counts = {first: 0, second: 0}
    shown = ", ".join(f"{i} {word}" for i, word in enumerate(row, 1))
    lines = [pick(rng, f"We count {first} and {second}.", f"Let us go through the list for {first} and {second}.")]
    for i, word in enumerate(row, 1):
        hit = word in counts
        if hit:
            counts[word] += 1
        note = pick(rng, "yes", "a match") if hit else pick(rng, "no", "skip", "no match")
        lines.append(f"{i} {word}: {note}, {first} {counts[first]}, {second} {counts[second]}.")
    if rng.random() < 0.5:
        asked = f"How many of {first} and {second} are there together?"
        total = counts[first] + counts[second]
        lines.append(closing(rng, f"there are {counts[first]}+{counts[second]}={total}."))
    else:
        asked = f"Count {first} and {second}. How many of {first}?"
        total = counts[first]
        lines.append(closing(rng, f"{first} is there {total} times."))
    return f"{pick(rng, 'Look at this list', 'Here is a list')}: {shown}. {asked}", lines, str(total)


def make_notes(rng: random.Random) -> tuple[str, list[str], str]:
    """Where is it? Notes are quoted one by one, and the place of the item asked for is tracked."""
    items = rng.sample(ITEMS, rng.choice((2, 3)))
    asked, place = items[0], ""
    notes, lines = [], []
    said = pick(rng, "says", "reads")
    for i in range(1, 1 + rng.choice((6, 7))):
        item = asked if i == 1 else rng.choice(items)
        where = rng.choice([p for p in PLACES if p != place])
        note = f"{rng.choice(NAMES)} {rng.choice(('brings', 'takes', 'moves'))} the {item} to the {where}"
        notes.append(f"{i}: {note}.")
        if item == asked:
            place = where
            after = pick(rng, f"So the {asked} is in the {place}.", f"Now the {asked} is in the {place}.")
        else:
            after = f"The {asked} {pick(rng, 'stays', 'is still')} in the {place}."
        lines.append(f"Note {i} {said}: {note}. {after}")
    lines.insert(0, pick(rng, "We read the notes in order.", f"Let us follow the {asked}."))
    lines.append(closing(rng, f"the {asked} is in the {place}."))
    ask = pick(rng, f"Where is the {asked} at the end?", f"Find the {asked}.")
    return ask + " Notes:\n" + "\n".join(notes), lines, place


def make_quote(rng: random.Random) -> tuple[str, list[str], str]:
    """Repeat numbered lines of words as they stand, then give the last word of one of them."""
    pool = [*NAMES, *ITEMS, *COLORS, *PLACES]
    rows = [rng.sample(pool, rng.choice((6, 7, 8))) for _ in range(rng.choice((6, 7)))]
    asked = rng.randint(1, len(rows))
    shown = "\n".join(f"{i}: {' '.join(row)}" for i, row in enumerate(rows, 1))
    lines = [pick(rng, "Here are the lines again.", "We copy the lines first.")]
    start = pick(rng, "Line", "Copy of line")
    lines += [f"{start} {i}: {' '.join(row)}" for i, row in enumerate(rows, 1)]
    word = rows[asked - 1][-1]
    lines.append(closing(rng, f"line {asked} ends with {word}."))
    ask = pick(
        rng, f"Copy all lines. What is the last word of line {asked}?", f"Copy the lines. How does line {asked} end?"
    )
    return f"{ask}\n{shown}", lines, word


def make_table(rng: random.Random) -> tuple[str, list[str], str]:
    """Read a table and add the points of the rows with one colour."""
    names, colors = rng.sample(NAMES, rng.choice((6, 7))), rng.sample(COLORS, 2)
    rows = [(name, rng.choice(colors), rng.randint(2, 16)) for name in names]
    asked, total = rng.choice(colors), 0
    shown = "\n".join(f"| {name} | {color} | {points} |" for name, color, points in rows)
    lines = [pick(rng, f"We add the points of the rows that are {asked}.", f"Let us look for {asked} in each row.")]
    for name, color, points in rows:
        row = f"{pick(rng, 'Row', 'Next,', 'Then')} {name}: {color}, {points}. "
        if color == asked:
            lines.append(row + f"{pick(rng, 'It counts', 'We add it')}: {added(total, points)}.")
            total += points
        else:
            lines.append(row + f"{pick(rng, 'Not', 'This is not')} {asked}, the total stays {total}.")
    lines.append(closing(rng, f"{asked} has {total} points."))
    ask = pick(rng, f"How many points does {asked} have?", f"Add the points of {asked}.")
    return f"| name | color | points |\n{shown}\n{ask}", lines, str(total)


def make_queue(rng: random.Random) -> tuple[str, list[str], str]:
    """People join and leave a line, which is written out after every event."""
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
        elif draw < 0.75:
            event, line = "the first one leaves", line[1:]
        else:
            name = rng.choice(line)
            event, line = f"{name} leaves", [n for n in line if n != name]
        prompt += f" {number}: {event}."
        lines.append(f"{number}: {event}. {pick(rng, '', 'Now ', 'Then ')}{show}: {', '.join(line)}.")
    first = rng.random() < 0.5
    answer = line[0] if first else line[-1]
    where = "first" if first else "last"
    lines.append(closing(rng, f"{answer} is {where} in line."))
    return f"{prompt} {pick(rng, f'Who is {where}?', f'Which person is {where} at the end?')}", lines, answer


def make_python(rng: random.Random) -> tuple[str, list[str], str]:
    """Write a Python function from a description and run it on one list."""
    numbers = [rng.randint(1, 12) for _ in range(rng.choice((4, 5)))]
    limit = rng.randint(3, 8)
    text, test, holds = rng.choice(
        [
            (f"greater than {limit}", f"{{}} > {limit}", lambda v: v > limit),
            (f"less than {limit}", f"{{}} < {limit}", lambda v: v < limit),
            ("even", "{} % 2 == 0", lambda v: v % 2 == 0),
            ("odd", "{} % 2 == 1", lambda v: v % 2 == 1),
        ]
    )
    goal = rng.choice(("sum", "count", "keep"))
    name = f"{goal}_{rng.choice(('numbers', 'values', 'items', 'matching'))}"
    rows, row = rng.choice((("values", "value"), ("numbers", "number"), ("items", "item")))
    out = {"sum": "total", "count": "count", "keep": "result"}[goal]
    does = {"sum": "returns the sum of", "count": "counts", "keep": "returns a list of"}[goal]
    update = {"sum": f"{out} += {row}", "count": f"{out} += 1", "keep": f"{out}.append({row})"}[goal]
    prompt = pick(rng, "Write a Python function", "Please write a function")
    prompt += f" {name} that {does} the numbers that are {text}. Then run it on {numbers}."
    value = [] if goal == "keep" else 0
    lines = [pick(rng, "Here is the function:", "This function does it:"), "```python", f"def {name}({rows}):"]
    if rng.random() < 0.5:
        lines.append(f'    """{does.capitalize()} the numbers that are {text}."""')
    lines += [f"    {out} = {value}", f"    for {row} in {rows}:", f"        if {test.format(row)}:"]
    lines += [f"            {update}", f"    return {out}", "```"]
    lines.append(pick(rng, f"Now we run it on {numbers}.", f"Run on {numbers}:"))
    for v in numbers:
        line = f"{row} {v}: {test.format(v)} is {holds(v)}, "
        if not holds(v):
            lines.append(line + f"{out} {pick(rng, 'stays', 'is still')} {value}.")
            continue
        if goal == "sum":
            worked, value = added(value, v), value + v
        elif goal == "count":
            worked, value = added(value, 1), value + 1
        else:
            worked = value = [*value, v]
        lines.append(line + f"{out} {pick(rng, 'is', 'becomes')} {worked}.")
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
