import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.data import records

TEXT = st.text(min_size=1, max_size=60).filter(lambda t: t.strip() and not any(0xD800 <= ord(c) <= 0xDFFF for c in t))


@given(st.text(max_size=300), st.sampled_from(records.KINDS))
@settings(max_examples=2000, deadline=None)
def test_no_string_crashes_the_parser(raw, kind):
    outcome = records.parse(raw, kind)
    assert outcome.status in ("ok", "invalid", "refused") and outcome.raw == raw
    assert (outcome.record is not None) == (outcome.status == "ok")


def to_json(record, kind):
    """The inverse of `records.parse`."""
    values = dict(zip(records.KEYS[kind], (record[f] for f in records.FIELDS), strict=False))
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


@given(TEXT, TEXT, TEXT, st.sampled_from(records.KINDS))
@settings(max_examples=500, deadline=None)
def test_no_accepted_value_is_changed_by_a_character(a, b, c, kind):
    raw = json.dumps(dict(zip(records.KEYS[kind], (a, b, c), strict=False)))
    outcome = records.parse(f"Sure!\n```json\n{raw}\n```", kind)
    if outcome.status == "ok":
        negative = c if len(records.KEYS[kind]) == 3 else None
        assert outcome.record == {"query": a, "positive": b, "negative": negative}
        assert records.parse(to_json(outcome.record, kind), kind).record == outcome.record


def damaged(rng, text):
    """A few random edits: deleted, doubled, replaced or inserted characters of the kind that models get wrong, or a cut."""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(
            ("", '"', "{", "}", "\\", "\n", ",", ":", "```", "'", "\u2028", "\x00", "\ud83d", "null", text[at : at + 9] * 2)
        )
        text = text[:at] + piece + text[at + rng.choice((0, 0, 1, 5)) :]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def test_ten_thousand_damaged_records_neither_crash_the_parser_nor_lose_a_character_of_what_it_accepts():
    import random
    import re

    rng, accepted = random.Random(0), 0
    pieces = ("a b", "naïve", 'say "x"', "{brace}", "back\\slash", "line\nbreak", "tab\t", "emoji 🙂", "'", "1e5", "\u2028", "]")
    for _ in range(10_000):
        kind = rng.choice(records.KINDS)
        values = [" ".join(rng.choices(pieces, k=3)) for _ in records.KEYS[kind]]
        whole = json.dumps(dict(zip(records.KEYS[kind], values, strict=True)), ensure_ascii=rng.random() < 0.5)
        raw = damaged(rng, rng.choice(("", "Sure:\n", "```json\n")) + whole + rng.choice(("", "\n```", " Done {}")))
        outcome = records.parse(raw, kind)
        assert outcome.raw == raw and outcome.status in ("ok", "invalid", "refused")
        if outcome.record is None:
            continue
        accepted += 1
        # Read without our parser: every string literal that stands in the text, with its escapes undone.
        literals = {json.loads(m) for m in re.findall(r'"(?:[^"\\\x00-\x1f]|\\.)*"', raw[raw.index("{") :]) if decodes(m)}
        whole_again = [json.loads(raw[i:j]) for i, j in spans(raw) if decodes(raw[i:j])]
        assert all(v is None or v in literals or any(v in w.values() for w in whole_again) for v in outcome.record.values())
    assert 2000 < accepted < 9000


def decodes(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def spans(raw):
    """Every stretch from an opening to a closing brace."""
    opens = [i for i, c in enumerate(raw) if c == "{"]
    return [(i, j + 1) for i in opens for j, c in enumerate(raw) if c == "}" and j > i]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        ("hello", "no_object"),
        ("{broken", "not_json"),
        ('{"S1":"a","S2":"b"}', "missing_key:S3"),
        ('{"S1":"a","S2":"b","S3":"c","x":"d"}', "unknown_key"),
        ('{"S1":1,"S2":"b","S3":"c"}', "not_a_string:S1"),
        ('{"S1":" ","S2":"b","S3":"c"}', "blank:S1"),
        ('{"S1":"a","S2":"A ","S3":"c"}', "query_equals_positive"),
        ('{"S1":"a","S2":"b","S3":"b"}', "positive_equals_negative"),
    ],
)
def test_each_rule_names_itself(raw, reason):
    outcome = records.parse(raw, "sts")
    assert (outcome.status, outcome.reason) == ("invalid", reason)


def test_a_brace_inside_a_string_does_not_end_the_object():
    raw = '{"S1":"use {x} here","S2":"a\\nb","S3":"c"}'
    assert records.parse(raw, "sts").record["query"] == "use {x} here"
    assert records.parse(raw, "sts").record["positive"] == "a\nb"
    # As released, the whole text is tried as JSON first; behind a fence the first closing brace ends it.
    assert records.released_parser_verdict(raw, "sts") == "kept"
    assert records.parse(f"```json\n{raw}\n```", "sts").status == "ok"
    assert records.released_parser_verdict(f"```json\n{raw}\n```", "sts") == "lost"


def test_text_cut_at_the_token_limit_is_truncated_even_when_it_looks_whole():
    assert records.parse('{"S1":"a","S2":"b","S3":"c"}', "sts", "length").status == "truncated"


def test_a_refusal_is_its_own_class():
    assert records.parse("I'm sorry, but I cannot help with that.", "sts").status == "refused"


def test_task_lists_are_read_as_json_or_literals_and_never_run():
    assert records.parse_string_list('["a b", "c d"]') == (["a b", "c d"], "")
    assert records.parse_string_list("Here: ['it''s', 'two']")[1] == ""
    assert records.parse_string_list("[__import__('os').getcwd()]") == ([], "not_a_list")
    assert records.parse_string_list("[1, 2]") == ([], "not_strings")


STS = '{"S1":"a b","S2":"a c","S3":"a d"}'
OTHER = '{"S1":"x y","S2":"x z","S3":"x w"}'


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (f"<think>{OTHER}</think>{STS}", "a b"),
        (f"{OTHER} no, better:</think>\n{STS}", "a b"),  # <think> stood in the prompt
        (f"<think>first</think><think>{OTHER}</think>{STS}", "a b"),
        (f"The keys are {{}} as asked. {STS}", "a b"),
        (f'An answer looks like {{"S1": "..."}}: {STS}', "a b"),
        (f"{STS}\n{STS}", "a b"),
        ('{"S1":"what </think> closes","S2":"a c","S3":"a d"}', "what </think> closes"),
        ('{"S1":"what <think> opens","S2":"a c","S3":"a d"}', "what <think> opens"),
        (f"{STS} <think>was that good?", "a b"),
        (f"<thinking>{OTHER}</thinking>{STS}", "a b"),
        (f"<|channel|>analysis<|message|>{OTHER}<|channel|>final<|message|>{STS}", "a b"),
        (f"{STS} {OTHER}", "ambiguous"),
        (f"<think>{STS}</think>", "only_thinking"),
        (f"<think>{STS}", "only_thinking"),
        (f"<Think>{OTHER}</Think>{STS}", "a b"),
        (f"[THINK]{STS}[/THINK] I am done.", "only_thinking"),
        (f"<|begin_of_thought|>{STS}<|end_of_thought|> I am done.", "only_thinking"),
        (f"analysis{OTHER} so it is doneassistantfinal{STS}", "a b"),
        (f"<|START_THINKING|>{OTHER}<|END_THINKING|>{STS}", "a b"),
        (f"\u25c1think\u25b7{OTHER}\u25c1/think\u25b7{STS}", "a b"),
        (f"<seed:think>{STS}</seed:think> I am done.", "only_thinking"),
        (f"<scratchpad>{STS}", "only_thinking"),
        (f"<think>{OTHER}</think> I am done.", "only_thinking"),
        (f"{{}} {STS[:-1]}", "missing_key:S1"),
    ],
)
def test_a_draft_is_never_taken_for_the_answer(raw, found):
    outcome = records.parse(raw, "sts")
    assert (outcome.record["query"] if outcome.record else outcome.reason) == found


@given(st.lists(st.sampled_from(["<think>", "</think>", STS, OTHER, "{}", "{", "}", " so ", '"', "[1]"]), max_size=8))
def test_whatever_stands_around_it_a_record_is_one_of_the_objects_and_not_one_of_two(parts):
    raw = "".join(parts)
    outcome = records.parse(raw, "sts")
    if outcome.status == "ok":
        assert outcome.record["query"] in ("a b", "x y")
        after = raw.rpartition("</think>")[2]
        assert not (STS in after and OTHER in after and "<think>" not in after)
        assert to_json(outcome.record, "sts") in raw


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ('<think>["draft"]</think>["a", "b"]', ["a", "b"]),
        ("<think>['draft']</think>['a', 'b']", ["a", "b"]),
        ('See [1]. ["a", "b"]', ["a", "b"]),
        ("['a [1] b', 'c']", ["a [1] b", "c"]),
        ("""['Find texts tagged ["urgent"]', 'b']""", ['Find texts tagged ["urgent"]', "b"]),
        ("['x', [\"y\"]]", "not_strings"),
        ("['say </think> here', 'b']", ["say </think> here", "b"]),
        ("<think>['a', 'b']", "only_thinking"),
        ('[] then ["a"]', ["a"]),
        ('["a"] ["b"]', "ambiguous"),
        ('["a"] ["a"]', ["a"]),
        ('<think>["a"]', "only_thinking"),
        ("[1, 2]", "not_strings"),
        ("[]", "empty_list"),
        ("['a'", "no_list"),
        ("[a, b]", "not_a_list"),
        ('["\\ud83d"]', "lone_surrogate"),
    ],
)
def test_a_draft_of_a_list_is_never_taken_for_the_answer(raw, found):
    tasks, why = records.parse_string_list(raw)
    assert (why or tasks) == found


def test_what_a_model_learns_from_an_answer_is_its_record_without_the_thinking():
    assert records.own_text(f"<think>{OTHER}</think>\n{STS}", "sts") == STS == records.own_text(f"{{}} {STS}", "sts")
    for raw in (STS, f"```json\n{STS}\n```", f"Sure: {STS}", "no object", '{"S1":"what <thin closes","S2":"b","S3":"c"}'):
        assert records.own_text(raw, "sts") == raw


@pytest.mark.parametrize("word", ["tool_calls", "none", "function_call", "Stop"])
def test_an_unknown_finish_reason_never_counts_as_complete(word):
    assert records.parse(STS, "sts", word).reason == f"finish_reason:{word}" == records.parse_string_list('["a"]', word)[1]
    assert records.parse(STS, "sts", "content_filter").status == "refused" == records.parse("no", "sts", "refusal").status
