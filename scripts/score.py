#!/usr/bin/env python3
"""Reference scorer: raw log records -> signs -> the graph's input -> probabilities, from an export bundle alone.

Needs numpy, onnxruntime and xxhash. Written from features.json (docs/FORMATS.md, "Export bundle") and nothing
else of Hearth, so that it checks the exporter and shows what a serving system has to do.

  score.py BUNDLE --check                                golden.jsonl, step by step
  score.py BUNDLE --logs FILE... [--log NAME] [--predictions FILE]     scores records, prints AUC by task as JSON
"""
import argparse
import base64
import gzip
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy
import onnxruntime
import xxhash

ID_BITS = 52
ID_MASK = (1 << ID_BITS) - 1
NAN = math.nan
SPACE = " \t\n\v\f\r"
DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
INTEGER_MIN, INTEGER_MAX = -(1 << 63), (1 << 64) - 1
QUOTE, NEWLINE = b'"'[0], b"\n"[0]
FRAGMENTS_MAX = 64
UNTERMINATED = ()  # fields of a record with a quote that nobody closes

# A text is a str whose bytes that are no UTF-8 are surrogates ("surrogateescape"), so it goes back to the bytes it was.
# A number (docs/EXPRESSIONS.md, "Values") is None where it is missing, an int from -2^63 to 2^64 - 1, or a float that
# is not NaN.


def bytes_of(text):
    return text.encode("utf-8", "surrogateescape")


def text_from(value):
    """A text of features.json or golden.jsonl: a string, or {"base64": ...} where its bytes are no UTF-8."""
    return value if isinstance(value, str) else base64.b64decode(value["base64"]).decode("utf-8", "surrogateescape")


def real(number):
    return NAN if number is None else float(number)


def of_real(value):
    return None if value != value else value


def of_integer(value):
    return value if INTEGER_MIN <= value <= INTEGER_MAX else float(value)


def number_of(text):
    """What Python's float() reads, and no more: no underscores, no digits but ASCII's, no inf; nan is missing."""
    text = text.strip(SPACE)
    negative = text.startswith("-")
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not DECIMAL.fullmatch(digits):
        return None
    if digits.isdigit() and not (negative and int(digits) == 0) and int(digits) <= INTEGER_MAX:  # -0 stays a real
        return of_integer(-int(digits) if negative else int(digits))
    value = float(digits)
    if math.isinf(value):
        return None
    return -value if negative else value


def truth(number):
    return number is not None and number != 0


def natural_of(number):
    """The whole number from 0 that this is, however it was written (7, 7.0, 7e0); None where it is none."""
    if isinstance(number, int):
        return number if number >= 0 else None
    if number is None or not 0 <= number < 2.0**53 or number != math.floor(number):
        return None
    return int(number)


def text_of(number):
    """As an id: integers exactly, a whole real below 2^53 without a point, others in their shortest text."""
    if isinstance(number, int):
        return str(number)
    value = number
    if value == math.floor(value) and abs(value) < 2.0**53:
        return str(int(value))
    sign = "-" if value < 0 else ""
    mantissa, exponent = f"{numpy.format_float_scientific(abs(value), unique=True, trim='-')}".split("e")
    digits, power = mantissa.replace(".", ""), int(exponent)
    scientific = f"{mantissa}e{'-' if power < 0 else '+'}{abs(power):02d}"
    if power >= len(digits) - 1:
        fixed = str(int(abs(value)))
    elif power >= 0:
        fixed = f"{digits[:power + 1]}.{digits[power + 1:]}"
    else:
        fixed = "0." + "0" * (-power - 1) + digits
    return sign + (fixed if len(fixed) <= len(scientific) else scientific)


# --- expressions: text -> a function of get(column) -> text


class Parser:
    TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<text>'[^']*')|`(?P<quoted>[^`]*)`|"
                       r"(?P<name>[A-Za-z_][A-Za-z0-9_.]*)|(?P<op>\|\||&&|==|!=|<=|>=|[-+*/%<>!(),]))")
    FUNCTIONS = {"min": 2, "max": 2, "abs": 1, "log1p": 1, "floor": 1, "if": 3, "missing": 1}

    def __init__(self, source):
        self.tokens, at = [], 0
        source = source.rstrip()
        while at < len(source):
            match = self.TOKEN.match(source, at)
            if not match:
                raise ValueError(f"expression {source!r}: position {at}")
            self.tokens.append((match.lastgroup, match.group(match.lastgroup)))
            at = match.end()
        self.at = 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, *symbols):
        kind, value = self.peek()
        if kind == "op" and value in symbols:
            self.at += 1
            return value
        return None

    def parse(self):
        node = self.binary(0)
        if self.peek()[0] != "end":
            raise ValueError(f"expression: unexpected {self.peek()[1]!r}")
        return node

    LEVELS = [("||",), ("&&",), ("==", "!=", "<=", ">=", "<", ">"), ("+", "-"), ("*", "/", "%")]

    def binary(self, level):
        if level == len(self.LEVELS):
            return self.unary()
        left = self.binary(level + 1)
        while symbol := self.take(*self.LEVELS[level]):
            left = (symbol, left, self.binary(level + 1))
        return left

    def unary(self):
        if self.take("!"):
            return ("!", self.unary())
        if self.take("-"):
            return ("negate", self.unary())
        kind, value = self.peek()
        self.at += 1
        if kind == "number":
            return ("number", number_of(value))
        if kind == "text":
            return ("text", value[1:-1])
        if kind == "quoted":
            return ("column", value)
        if kind == "op" and value == "(":
            inner = self.binary(0)
            if not self.take(")"):
                raise ValueError("expression: expected )")
            return inner
        if kind != "name":
            raise ValueError(f"expression: unexpected {value!r}")
        if not self.take("("):
            return ("column", value)
        operands = [self.binary(0)]
        while self.take(","):
            operands.append(self.binary(0))
        if not self.take(")") or self.FUNCTIONS.get(value) != len(operands):
            raise ValueError(f"expression: call of {value}")
        return (value, *operands)


COMPARE = {"==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
           ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}  # exact, also between an int and a float


def divide(a, b):
    if b == 0:
        return NAN if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def negate(a):
    return of_integer(-a) if isinstance(a, int) and a != 0 else of_real(-real(a))


def integers(a, b):
    return isinstance(a, int) and isinstance(b, int)


def compute(op, a, b):
    if op == "+":
        return of_integer(a + b) if integers(a, b) else of_real(real(a) + real(b))
    if op == "-":
        return of_integer(a - b) if integers(a, b) else of_real(real(a) - real(b))
    if op == "*":
        exact = integers(a, b) and -(1 << 127) <= a * b < 1 << 127
        return of_integer(a * b) if exact else of_real(real(a) * real(b))
    if op == "/":
        whole = integers(a, b) and b != 0 and a % b == 0
        return of_integer(a // b) if whole else of_real(divide(real(a), real(b)))
    if integers(a, b) and b != 0:  # %, with the sign of a
        return abs(a) % abs(b) * (-1 if a < 0 else 1)
    a, b = real(a), real(b)
    return None if a != a or b != b or b == 0 or math.isinf(a) else math.fmod(a, b)


def evaluate(node, get):
    op = node[0]
    if op == "number":
        return node[1]
    if op == "column":
        return number_of(get(node[1]))
    if op == "missing":
        return int(get(node[1][1]) == "")
    if op in COMPARE and "text" in (node[1][0], node[2][0]):
        sides = [side[1] if side[0] == "text" else get(side[1]) for side in node[1:]]
        return int(COMPARE[op](*map(bytes_of, sides)))
    if op == "if":
        return evaluate(node[2] if truth(evaluate(node[1], get)) else node[3], get)
    if op in ("||", "&&"):  # one side may decide alone; else what is missing on either side is missing in the whole
        decides, missing = op == "||", False
        for side in node[1:]:
            value = evaluate(side, get)
            if value is not None and truth(value) == decides:
                return int(decides)
            missing |= value is None
        return None if missing else int(not decides)
    values = [evaluate(operand, get) for operand in node[1:]]
    if op in COMPARE:
        return None if None in values else int(COMPARE[op](*values))
    if op == "!":
        return None if values[0] is None else int(not truth(values[0]))
    if op == "negate":
        return negate(values[0])
    if op in ("+", "-", "*", "/", "%"):
        return compute(op, *values)
    if op in ("min", "max"):
        return None if None in values else values[0] if (op == "min") == (values[0] < values[1]) else values[1]
    value = values[0]
    if op == "abs":
        return of_real(abs(real(value))) if not isinstance(value, int) else negate(value) if value < 0 else value
    if op == "log1p":
        value = real(value)
        return math.log1p(value) if value > -1 else -math.inf if value == -1 else None
    if op == "floor":
        return float(math.floor(value)) if isinstance(value, float) and math.isfinite(value) else value
    raise ValueError(f"expression: {op}")


# --- delimited text


def open_text(path):
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if magic == b"\x28\xb5\x2f\xfd":
        return io.BytesIO(subprocess.run(["zstd", "-dcq", path], check=True, stdout=subprocess.PIPE).stdout)
    return open(path, "rb")


def fields_of(record, delimiter):
    """Fields of a record; None or UNTERMINATED where it is bad. A quote counts only at a field's start."""
    fields, at = [], 0
    while True:
        if record[at:at + 1] != '"':
            end = record.find(delimiter, at)
            end = len(record) if end < 0 else end
            fields.append(record[at:end])
            at = end
        else:
            text, at = "", at + 1
            while True:
                close = record.find('"', at)
                if close < 0:
                    return UNTERMINATED
                text += record[at:close]
                at = close + 1
                if record[at:at + 1] != '"':
                    break
                text += '"'
                at += 1
            fields.append(text)
            if at < len(record) and record[at] != delimiter:
                return None
        if at >= len(record):
            return fields
        at += 1


def multiline_end(text, begin, delimiter, limit):
    """Where the record that starts at `begin` ends: a newline inside quotes belongs to it. A quote that nobody closes
    would swallow the file: past `limit` bytes the record ends at the next newline."""
    start, quoted, after, unquoted = range(4)  # of a field: where the next byte stands
    place = start
    for at in range(begin, len(text)):
        byte = text[at]
        if place == quoted and at - begin > limit:
            place = unquoted
        if place == quoted:
            place = after if byte == QUOTE else quoted
        elif byte == NEWLINE:
            return at
        elif byte == delimiter:
            place = start
        elif byte == QUOTE and place != unquoted:
            place = quoted
        else:
            place = unquoted
    return len(text)


def records_of(path, delimiter, multiline, limit):
    """(byte offset, text) of each record that is not empty; None for a text that is longer than `limit` bytes."""
    with open_text(path) as file:
        text = file.read()
    begin = 0
    while begin < len(text):
        end = multiline_end(text, begin, bytes_of(delimiter)[0], limit) if multiline else text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        record = text[begin:end]
        too_long = len(record) > limit
        if record[-1:] == b"\r":
            record = record[:-1]
        if record:
            yield begin, None if too_long else record.decode("utf-8", "surrogateescape")
        begin = end + 1


# --- JSON lines

ELEMENT = "\x1e"  # stands before each element of an array


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def scalar_text(value):
    """None for an array or object."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        if isinstance(value, int) and not INTEGER_MIN <= value <= INTEGER_MAX or value in (math.inf, -math.inf):
            raise ValueError("a number beyond 64 bits")
        return text_of(value)
    return None


def numbers_of(value):
    """Walks all of it: a number that is none makes the record bad wherever it stands."""
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        numbers_of(one)
    if not isinstance(value, (dict, list)):
        scalar_text(value)


def json_columns(value, above, out):
    """path -> value; objects have a place of their own. Of a path that comes twice the later value holds."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            json_columns(inner, above + key + ".", out)
        out[above + key] = inner


def json_fields(record, columns, lists):
    """column -> text, or None where the record is bad."""
    try:
        bytes_of(record).decode()
        value = json.loads(record, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # no half of a pair of surrogates
        numbers_of(value)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found, raw = {}, {}
    json_columns(value, "", found)
    for column in columns:
        inner = found.get(column)
        raw[column] = scalar_text(inner)
        if raw[column] is None:
            elements = list(map(scalar_text, inner)) if isinstance(inner, list) and column in lists else [None]
            if any(element is None or ELEMENT in element for element in elements):
                return None
            raw[column] = "".join(ELEMENT + element for element in elements)
    return raw


def fragments_at(records, first, delimiter):
    """How many records from `first` on lie in a quoted field that the record before them opened."""
    for i in range(first, min(len(records), first + FRAGMENTS_MAX)):
        text = (records[i][1] or "").replace('""', "")
        at = text.find('"')
        if at >= 0:
            return i + 1 - first if text[at + 1:at + 2] in ("", delimiter) else 0
    return 0


# --- from a record to the graph's input


class Scorer:
    def __init__(self, bundle):
        self.bundle = pathlib.Path(bundle)
        self.features = json.loads((self.bundle / "features.json").read_text())
        self.record_bytes_max = self.features.get("record_bytes_max", 1 << 20)  # an older bundle does not say it
        manifest = json.loads((self.bundle / "manifest.json").read_text())
        if "delta" in manifest:
            sys.exit(f"score.py: {bundle} is a delta; merge it with its base first: "
                     "hearth export --apply BASE DELTA --out BUNDLE")
        graph = self.bundle / "triton" / manifest["model"] / str(manifest["version"]) / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.tables = {}
        for table in self.features["tables"]:
            folder = self.bundle / table["folder"]
            if (folder / "keys.npy").exists():
                keys = numpy.load(folder / "keys.npy")
                rows = numpy.load(folder / "values.npy", mmap_mode="r")
            else:
                keys = numpy.fromfile(folder / "key", "<i8").view("<u8")
                rows = numpy.fromfile(folder / "emb_vector", "<f4").reshape(len(keys), table["dim"])
            self.tables[table["name"]] = ({int(key): i for i, key in enumerate(keys)}, rows)
        self.sides = {side["name"]: self.side_table(side) for side in self.features["side_tables"]}
        self.expressions = {}

    def side_table(self, side):
        rows, columns, delimiter = {}, None, text_from(side["delimiter"])
        for _, text in records_of(self.bundle / side["file"], delimiter, True, self.record_bytes_max):
            fields = fields_of(text.removeprefix("\ufeff") if columns is None else text, delimiter)
            if columns is None:
                columns = fields
                key = columns.index(text_from(side["key"]))
            else:
                rows[fields[key]] = fields
        return {"columns": columns, "rows": rows, "log_key": text_from(side["log_key"])}

    def parsed(self, text):
        text = text_from(text)
        if text not in self.expressions:
            self.expressions[text] = Parser(text).parse()
        return self.expressions[text]

    def evaluate(self, text, get):
        return evaluate(self.parsed(text), get)

    def json_columns(self, log):
        """The paths that are read in a record of JSON lines, and those of them that may be arrays."""
        names, lists = [self.sides[table]["log_key"] for table in log["join"]], set()

        def add(node):
            if node[0] == "column":
                names.append(node[1])
            for inner in node[1:]:
                if isinstance(inner, tuple):
                    add(inner)

        for slot in self.features["slots"]:
            if "value" in slot:
                add(self.parsed(slot["value"]))
            else:
                names.append(text_from(slot["column"]))
                lists.update(names[-1:] if slot["kind"] == "LIST" else [])
        tasks = [task for task in self.features["tasks"] if not log["known_task"] or task["name"] in log["known_task"]]
        for text in ([log["where"]] + [dense["value"] for dense in self.features["dense"]] +
                     [task[what] for task in tasks for what in ("label", "mask")]):
            if text:
                add(self.parsed(text))
        own = lambda name: not any(name.startswith(table + ".") for table in log["join"])
        absent = set(map(text_from, log["absent_column"]))
        return {name for name in names if own(name) and name not in absent}, lists

    def getter(self, raw, log):
        """column -> text: the log's own, else a joined side table's, else missing."""
        def get(name):
            if name in raw:
                return raw[name]
            for table in log["join"]:
                side = self.sides[table]
                column = name if name in side["columns"] else name.removeprefix(table + ".")
                if column in side["columns"]:
                    key = raw.get(side["log_key"], "")
                    row = side["rows"].get(key) if key else None
                    return "" if row is None else row[side["columns"].index(column)]
            if name in map(text_from, log["absent_column"]):
                return ""
            raise KeyError(f"no column {name}")
        return get

    def signs(self, slot, get, json_lines):
        """The signs of one slot; None where the record is to be rejected."""
        base = slot["table_number"] << ID_BITS
        missing = [slot["missing_sign"]] if slot["missing"] == "OWN_ROW" else []
        missing_values = set(map(text_from, slot["missing_value"]))
        is_missing = lambda text: text == "" or text in missing_values
        raw = slot["hash"] == "RAW"

        def sign(text):
            return base | (xxhash.xxh3_64_intdigest(bytes_of(text), slot["seed"]) & ID_MASK)

        def raw_id(number):
            """None where there is no such id."""
            value = natural_of(number)
            return None if value is None or value >= ID_MASK else base | value

        if "value" in slot or slot["kind"] == "BUCKET":
            if "value" in slot:
                value = self.evaluate(slot["value"], get)
            else:
                text = get(text_from(slot["column"]))
                value = None if is_missing(text) else number_of(text)
            if not math.isfinite(real(value)):
                return missing
            if slot["kind"] == "BUCKET":
                value = real(value)
                if slot["boundary"]:
                    bucket = sum(1 for boundary in slot["boundary"] if boundary <= value)
                else:
                    bucket = math.floor(math.log2(1 + abs(value))) * (-1 if value < 0 else 1)
                return [base | bucket] if raw else [sign(str(bucket))]
            signs = [raw_id(value) if raw else sign(text_of(value))]
            return None if None in signs else signs
        text = get(text_from(slot["column"]))
        if is_missing(text):
            return missing
        parts = [text]
        if slot["kind"] == "LIST":
            between = text_from(slot["separator"])
            if json_lines and text.startswith(ELEMENT):
                between, text = ELEMENT, text[1:]
            parts = [part for part in text.split(between) if not is_missing(part)]
        signs = [raw_id(number_of(part)) if raw else sign(part) for part in parts]
        if None in signs:
            return None
        return signs[:slot.get("values_max")] or missing

    def dense(self, feature, get):
        value = real(self.evaluate(feature["value"], get))
        if feature["transform"] == "LOG1P":
            value = math.copysign(math.log1p(abs(value)), value)
        elif feature["transform"] == "STANDARD":
            value = divide(value - feature["mean"], feature["deviation"])
        with numpy.errstate(over="ignore"):
            narrow = numpy.float32(value)
        return narrow if numpy.isfinite(narrow) else numpy.float32(feature["missing"])

    def input(self, signs, dense):
        out = numpy.zeros(self.features["width"], numpy.float32)
        for slot in self.features["slots"]:
            index, rows = self.tables[slot["table"]]
            place = out[slot["offset"]:slot["offset"] + slot["dim"]]
            for sign in signs[slot["slot"]]:
                if sign in index:
                    place += rows[index[sign]]
            if slot["pooling"] == "mean" and signs[slot["slot"]]:
                place *= numpy.float32(1) / numpy.float32(len(signs[slot["slot"]]))
        for feature, value in zip(self.features["dense"], dense):
            out[feature["offset"]] = value
        return out

    def prepare(self, raw, log):
        """(signs, dense) of a raw record, or None where it is filtered or rejected."""
        get = self.getter(raw, log)
        if log["where"] and not truth(self.evaluate(log["where"], get)):
            return None
        json_lines = log.get("format") == "JSON_LINES"  # an older bundle does not say it
        signs = {slot["slot"]: self.signs(slot, get, json_lines) for slot in self.features["slots"]}
        if any(of_slot is None for of_slot in signs.values()):
            return None
        return signs, [self.dense(feature, get) for feature in self.features["dense"]]

    def predict(self, inputs):
        names = [task["output"] for task in self.features["tasks"]]
        outputs = self.session.run(names, {"features": numpy.asarray(inputs, numpy.float32)})
        return numpy.concatenate(outputs, 1)  # [records, tasks]

    def labels(self, raw, log):
        """1, 0, or None where unknown, by task."""
        get, labels = self.getter(raw, log), []
        for task in self.features["tasks"]:
            known = not log["known_task"] or task["name"] in log["known_task"]
            value = self.evaluate(task["label"], get) if known else None
            known = value is not None and (not task["mask"] or truth(self.evaluate(task["mask"], get)))
            labels.append(int(truth(value)) if known else None)
        return labels

    def log(self, name):
        for log in self.features["logs"]:
            if not name or log["name"] == name:
                return log
        sys.exit(f"score.py: the bundle knows no log {name}")


def auc(scores, labels):
    """Exact, ties count one half; None where a class is absent."""
    scores, labels = numpy.asarray(scores), numpy.asarray(labels)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = numpy.unique(scores, return_inverse=True, return_counts=True)
    ranks = numpy.cumsum(counts) - (counts - 1) / 2.0
    return float((ranks[inverse][labels == 1].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def check(scorer, log, bound):
    golden = [json.loads(line) for line in (scorer.bundle / "golden.jsonl").read_text().splitlines()]
    worst, faults = {"input": 0.0, "p": 0.0}, 0
    for i, line in enumerate(golden):
        raw = dict(line["raw"], **{text_from(column): text_from(text) for column, text in line.get("raw_bytes", [])})
        prepared = scorer.prepare(raw, log)
        if prepared is None or prepared[0] != line["signs"]:
            faults += 1
            print(f"golden record {i}: raw -> signs differs: {prepared and prepared[0]} != {line['signs']}",
                  file=sys.stderr)
            continue
        own = scorer.input(line["signs"], prepared[1])
        worst["input"] = max(worst["input"], float(numpy.abs(own - numpy.asarray(line["input"])).max(initial=0)))
        own_p = scorer.predict([line["input"]])[0]
        want = [line["p"][task["name"]] for task in scorer.features["tasks"]]
        worst["p"] = max(worst["p"], float(numpy.abs(own_p - want).max()))
    failed = faults > 0 or not golden or worst["input"] > 1e-6 or worst["p"] > bound
    print(json.dumps({"records": len(golden), "sign_faults": faults, "input_difference_max": worst["input"],
                      "p_difference_max": worst["p"]}))
    return 1 if failed else 0


def score(scorer, log, paths, predictions):
    tasks = scorer.features["tasks"]
    inputs, places, all_labels, rejected = [], [], [], 0
    for path in paths:
        columns, delimiter = list(map(text_from, log["column"])), text_from(log["delimiter"])
        header, fragments, multiline = None, 0, log["multiline_records"]
        json_lines = log.get("format") == "JSON_LINES"
        read = scorer.json_columns(log) if json_lines else None
        records = list(records_of(path, delimiter, multiline, scorer.record_bytes_max))
        for i, (offset, text) in enumerate(records):
            bare = text and text.removeprefix("\ufeff")
            if log["header"] and not json_lines and header is None:
                header, columns = bare, fields_of(bare, delimiter)
                continue
            text = bare if offset == 0 else text
            prepared = raw = None
            if fragments > 0:
                fragments -= 1
            elif text is not None and json_lines:
                raw = json_fields(text, *read)
                prepared = raw and scorer.prepare(raw, log)
            elif text is not None and bare != header:
                fields = fields_of(text, delimiter)
                if fields is UNTERMINATED and not multiline:
                    fragments = fragments_at(records, i + 1, delimiter)
                elif fields is not None and len(fields) == len(columns):
                    raw = dict(zip(columns, fields))
                    prepared = scorer.prepare(raw, log)
            if prepared is None:
                rejected += 1
                continue
            inputs.append(scorer.input(*prepared))
            places.append((path, offset))
            all_labels.append(scorer.labels(raw, log))
    batches = [scorer.predict(inputs[i:i + 4096]) for i in range(0, len(inputs), 4096)]
    scores = numpy.concatenate(batches) if batches else numpy.zeros((0, len(tasks)), numpy.float32)
    if predictions:
        with open(predictions, "w", encoding="utf-8", errors="surrogateescape") as out:
            out.write("\t".join(["source", "offset"] +
                                [f"{kind}_{task['name']}" for task in tasks for kind in ("label", "p")]) + "\n")
            for (path, offset), row, labels in zip(places, scores, all_labels):
                cells = [
                    cell for label, p in zip(labels, row)
                    for cell in ("" if label is None else str(label), repr(float(p)))
                ]
                out.write("\t".join([str(path), str(offset)] + cells) + "\n")
    report = {"records": len(inputs), "filtered_or_rejected": rejected, "auc": {}}
    for t, task in enumerate(tasks):
        known = [i for i, labels in enumerate(all_labels) if labels[t] is not None]
        report["auc"][task["name"]] = auc(scores[known, t], [all_labels[i][t] for i in known])
    print(json.dumps(report))
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--check", action="store_true",
                        help="compare each step with golden.jsonl; exit 1 where one differs")
    parser.add_argument("--bound", type=float, default=1e-5, help="for --check: largest difference of a probability")
    parser.add_argument("--logs", nargs="+", default=[])
    parser.add_argument("--log", default="", help="which of the bundle's logs the files are like; default: the first")
    parser.add_argument("--predictions")
    arguments = parser.parse_args()
    scorer = Scorer(arguments.bundle)
    log = scorer.log(arguments.log)
    code = check(scorer, log, arguments.bound) if arguments.check else 0
    if arguments.logs:
        code = score(scorer, log, arguments.logs, arguments.predictions) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
