import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_endpoint import FaultyEndpoint

from speed_core.data import asking, budget, prompts, replies, teacher
from speed_core.data import endpoint as endpoints
from speed_core.data.endpoint_teacher import EndpointTeacher
from speed_core.files import UserError, write_jsonl
from speed_core.generation import generate
from speed_core.models import loading
from speed_core.profile import Teacher
from speed_core.study import generation_stages, synthesis_stages
from speed_core.study.runs import open_run

GOOD = '{"S1":"a b","S2":"a c","S3":"a d"}'


class Endpoint(BaseHTTPRequestHandler):
    """A real HTTP server with the chat-completions interface; `script` holds the next replies."""

    script: list = []
    seen: list = []
    usage: dict | None = None
    refuse: tuple | None = None  # what every request but a probe gets

    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for k, v in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    listed = (200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_GET(self):
        self.reply(*self.listed)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        type(self).authorization = self.headers.get("Authorization")
        text = request["messages"][0]["content"]
        said = self.refuse if self.refuse and text != endpoints.PROBE else (200, GOOD, "stop")
        status, text, reason = self.script.pop(0) if self.script else said
        if reason == "as it is":
            return self.reply(status, text)
        if status != 200:
            return self.reply(status, {"error": {"message": text or "no", "type": "x"}}, [("Retry-After", reason or "0")])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        self.reply(200, body | ({"usage": self.usage} if self.usage else {}))


@pytest.fixture
def endpoint():
    Endpoint.script, Endpoint.seen, Endpoint.refuse = [], [], None
    Endpoint.usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def settings(url, **more):
    values = {"kind": "openai", "judge": "llm", "model": "tiny", "base_url": url, "concurrency": 1} | more
    return Teacher(**values)


def some_prompts(n):
    return [prompts.synthesis("sts", f"Topic {i}", "") for i in range(n)]


def test_every_prompt_ends_in_one_outcome_and_tokens_are_counted(endpoint, tmp_path):
    Endpoint.script += [(200, GOOD, "stop"), (200, GOOD[:20], "length"), (200, "I cannot do that.", "stop"), (200, "{", "stop")]
    t = EndpointTeacher(settings(endpoint, prices=({"model": "tiny", "input": 1.0, "output": 0.0},)))
    entries = asking.ask(t, some_prompts(4), purpose="seed", log=tmp_path / "log.jsonl")
    assert generate.counts(entries) == {"ok": 1, "invalid": 1, "refused": 1, "truncated": 1, "error": 0}
    assert t.ledger.rows["seed"]["calls"] == 4 and t.ledger.rows["seed"]["input_tokens"] == 40


def test_a_rate_limit_and_a_server_error_are_tried_again(endpoint, tmp_path):
    Endpoint.script += [(429, "", ""), (500, "", ""), (200, GOOD, "stop")]
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")
    assert entries[0]["status"] == "ok" and len(Endpoint.seen) == 3


def test_a_bad_request_is_not_tried_again_and_loses_nothing(endpoint, tmp_path):
    Endpoint.script += [(400, "", ""), (200, GOOD, "stop")]
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(2), purpose="seed", log=tmp_path / "l")
    assert sorted(e["status"] for e in entries) == ["error", "ok"] and len(Endpoint.seen) == 2


def test_the_budget_stops_cleanly_and_a_second_run_goes_on(endpoint, tmp_path):
    items = some_prompts(5)
    first = asking.ask(EndpointTeacher(settings(endpoint, max_calls=2)), items, purpose="seed", log=tmp_path / "l")
    assert generate.counts(first)["ok"] == 2 and generate.counts(first)["error"] == 3
    assert "max_calls" in next(e["reason"] for e in first if e["status"] == "error")
    second = asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=tmp_path / "l")
    assert generate.counts(second)["ok"] == 5 and len(Endpoint.seen) == 5


def test_the_llm_judge_sets_aside_a_pair_on_which_it_contradicts_itself(endpoint, tmp_path):
    from speed_core.preference.judge import LlmJudge

    same = '{"reason":"r","best":0,"worst":1}'
    Endpoint.script += [(200, same, "stop"), (200, same, "stop")]
    verdict = LlmJudge(EndpointTeacher(settings(endpoint)), tmp_path / "a").judge(some_prompts(1)[0], ["x", "y"])
    assert verdict.best == verdict.worst and "contradicts" in verdict.reason
    Endpoint.script += [(200, same, "stop"), (200, '{"reason":"r","best":1,"worst":0}', "stop")]
    judge = LlmJudge(EndpointTeacher(settings(endpoint)), tmp_path / "b")
    verdict = judge.judge(some_prompts(1)[0], ["x", "y"])
    assert (verdict.best, verdict.worst) == (0, 1)
    # It named "x" in both orders, once in the first place and once in the second: no bias.
    wanted = {"judged": 1, "agree": 1, "contradict": 0, "unanswered": 0, "unreadable": 0}
    assert judge.audit == wanted | {"first_place_best": 1, "first_place_expected": 1.0}
    assert Endpoint.seen[0]["temperature"] == 0.0
    asked = len(Endpoint.seen)
    again = LlmJudge(EndpointTeacher(settings(endpoint)), tmp_path / "b")
    assert again.judge(some_prompts(1)[0], ["x", "y"]) == verdict and len(Endpoint.seen) == asked, "the log was not read"


def test_a_judge_that_runs_out_of_budget_says_so_and_goes_on_later(endpoint, tmp_path):
    from speed_core.preference.judge import LlmJudge

    items = [(p, ["x", "y"]) for p in some_prompts(3)]
    short = LlmJudge(EndpointTeacher(settings(endpoint, max_calls=4)), tmp_path / "l")
    assert short.ask(items).startswith("2 of 6 unanswered: teacher.max_calls 4 reached")
    short.judge(*items[2])
    assert short.audit["unanswered"] == 1 and short.audit["judged"] == 0
    assert LlmJudge(EndpointTeacher(settings(endpoint)), tmp_path / "l").ask(items) == "" and len(Endpoint.seen) == 6


def test_a_model_that_is_not_listed_is_tried_and_a_dead_endpoint_is_named(endpoint, tmp_path, capsys):
    t = EndpointTeacher(settings(endpoint, model="gpt-9"))
    t.check()
    assert "gpt-9" in (said := capsys.readouterr().out) and "lists (tiny)" in said
    Endpoint.script += [(404, "no model gpt-9", "")]
    with pytest.raises(UserError, match=r"NotFoundError 404: no model gpt-9\); it lists tiny; correct it and run again"):
        asking.ask(t, some_prompts(1), purpose="seed", log=tmp_path / "l")
    with pytest.raises(UserError, match="not reachable"):
        EndpointTeacher(settings("http://127.0.0.1:9/v1")).check()


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, {}), (403, {}), (404, "no list"), (503, "busy"), (200, "<html>hello</html>"), (200, None), (200, {"data": None}),
     (200, {"data": [{"id": "models/tiny"}, {"id": None}, 7]})],
)  # fmt: skip
def test_whatever_a_gateway_lists_the_first_request_decides(endpoint, tmp_path, monkeypatch, status, body):
    monkeypatch.setattr(Endpoint, "listed", (status, body))
    t = EndpointTeacher(settings(endpoint))
    t.check()
    assert asking.ask(t, some_prompts(1), purpose="seed", log=tmp_path / "l")[0]["status"] == "ok"


def test_without_a_key_the_teacher_says_what_to_do(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        EndpointTeacher(settings(""))


def test_an_unrecorded_prompt_is_an_error_outcome_not_a_guess(tmp_path):
    entries = asking.ask(teacher.RecordedTeacher(), some_prompts(1), purpose="seed", log=tmp_path / "l")
    assert entries[0]["status"] == "error" and "no recorded answer" in entries[0]["reason"]


# --- the faulty teacher, and the limits -----------------------------------------------------------


@pytest.fixture
def practice():
    server = FaultyEndpoint(faults=0.4, seed=1, hang_seconds=1.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def recorded_prompts(n):
    from speed_core.study import generation_stages
    from speed_core.study.runs import open_run

    return generation_stages.seed_plan(open_run("smoke", {"seeds": n}))


def test_against_a_teacher_that_fails_in_seven_ways_nothing_is_lost(practice, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(endpoints, "back_off", lambda number: 0.01)
    items = recorded_prompts(48)
    who = settings(practice.url, model="practice-teacher", concurrency=8, timeout_seconds=0.5)
    entries = asking.ask(EndpointTeacher(who), items, purpose="seed", log=tmp_path / "log.jsonl")
    found = generate.counts(entries)
    assert sum(found.values()) == 48 and found["error"] == 0 and found["ok"] > 30
    wanted = [practice.fault(p.digest, 99) for p in items]
    assert found["truncated"] == wanted.count("cut") > 0 and found["invalid"] == wanted.count("malformed") > 0
    assert all(practice.struck[f] > 0 for f in ("429", "500", "hang", "reset", "half body")), practice.struck
    recorded = {r["prompt_digest"]: r["answer"] for r in teacher.recorded_rows("seeds")}
    assert all(e["raw"] == recorded[e["prompt_digest"]] for e in entries if e["status"] == "ok")
    calls = sum(practice.asked.values())
    again = asking.ask(EndpointTeacher(who), items, purpose="seed", log=tmp_path / "log.jsonl")
    assert again == entries and sum(practice.asked.values()) == calls, "an answer was paid for twice"


def test_the_same_seed_gives_the_same_faults():
    servers = [FaultyEndpoint(faults=0.5, seed=s) for s in (3, 3, 4)]
    drawn = [[s.fault(str(k), a) for k in range(50) for a in range(4)] for s in servers]
    for s in servers:
        s.server_close()
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 8


def test_a_request_that_the_endpoint_refuses_is_remembered_and_not_asked_again(practice, tmp_path):
    who = settings(practice.url, model="practice-teacher")
    unknown = some_prompts(3)
    practice.faults = 0.0
    for _ in range(2):
        entries = asking.ask(EndpointTeacher(who), unknown, purpose="seed", log=tmp_path / "l")
    assert [e["reason"] for e in entries] == ["BadRequestError 400: this prompt was never recorded"] * 3 and sum(
        practice.asked.values()
    ) == 3


def test_a_budget_of_tokens_stops_cleanly(endpoint, tmp_path):
    items = some_prompts(5)
    first = len(items[0].text) // 4 + 6  # before there is an answer, a prompt counts a token for four characters
    who = settings(endpoint, max_tokens=first + 15, max_output_tokens=5)
    t = EndpointTeacher(who)
    entries = asking.ask(t, items, purpose="seed", log=tmp_path / "l")
    assert generate.counts(entries)["ok"] == min(5, 1 + first // 15)
    short = EndpointTeacher(settings(endpoint, max_tokens=first - 2, max_output_tokens=5))
    entries = asking.ask(short, items, purpose="seed", log=tmp_path / "m")
    assert (
        generate.counts(entries)["error"] == 5
        and "max_tokens" in entries[0]["reason"]
        and f"{first - 1} tokens" in entries[0]["reason"]
    )


def test_concurrency_halves_on_a_rate_limit_and_grows_back():
    from speed_core.data.limits import Gate

    gate = Gate(8)
    gate.was_refused(), gate.was_refused()
    assert gate.limit == 2.0
    for _ in range(100):
        gate.went_well()
    assert gate.limit == 8.0


def test_the_gate_lets_no_more_through_than_its_limit_and_forgets_nobody():
    import asyncio

    from speed_core.data.limits import Gate

    async def many():
        gate, inside, most, done = Gate(3), [0], [0], []

        async def one(i):
            async with gate.slot():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                await asyncio.sleep(0.001)
                (gate.was_refused if i % 5 == 0 else gate.went_well)()
                inside[0] -= 1
                done.append(i)

        await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(60))), 20)
        return most[0], len(done)

    assert asyncio.run(many()) == (3, 60)


def test_the_pace_never_lets_more_through_in_a_minute_than_it_says():
    import asyncio

    from speed_core.data.limits import Pace

    now = [0.0]

    async def sleep(seconds):
        now[0] += seconds

    async def starts():
        pace = Pace(3, 1000, clock=lambda: now[0], sleep=sleep)
        return [((await pace.enter(tokens))[0], tokens) for tokens in (100, 900, 50, 50, 50, 50, 2000, 10)]

    found = asyncio.run(starts())
    for t, _ in found:
        inside = [k for s, k in found if t <= s < t + 60]
        assert len(inside) <= 3 and (sum(inside) <= 1000 or len(inside) == 1)
    assert now[0] >= 180


# --- the budget is hard, and what it cuts short says so -------------------------------------------


@pytest.mark.parametrize("usage", ["counted", "dear", "missing", "null"])
@pytest.mark.parametrize("cap", [{"max_calls": 5}, {"max_tokens": 600}, {"max_usd": 600e-6}])
def test_no_cap_is_exceeded_however_many_calls_are_in_flight_and_however_often_it_is_run(endpoint, tmp_path, cap, usage):
    one_dollar = ({"model": "tiny", "input": 1.0, "output": 1.0},)
    who = settings(endpoint, concurrency=16, max_output_tokens=20, prices=one_dollar, **cap)
    count = lambda a, b: {"prompt_tokens": a, "completion_tokens": b, "total_tokens": a and a + b}  # noqa: E731
    # "dear": more tokens than a quarter of the characters, as in Chinese.
    Endpoint.usage = {"counted": count(100, 20), "dear": count(250, 20), "missing": None, "null": count(None, None)}[usage]
    for _ in range(3):
        t = EndpointTeacher(who)
        entries = asking.ask(t, some_prompts(40), purpose="seed", log=tmp_path / "l")
    spent = t.ledger.rows["seed"]
    assert 2 <= generate.counts(entries)["ok"] == spent["calls"] == len(Endpoint.seen) <= cap.get("max_calls", 40)
    tokens = spent["input_tokens"] + spent["output_tokens"]
    assert 200 < tokens <= cap.get("max_tokens", 4000) and spent["usd"] <= cap.get("max_usd", 1) * (1 + 1e-9)
    assert next(iter(cap)) in asking.unanswered(entries)


def test_a_key_that_expires_stops_the_stage_at_once_and_is_held_against_no_request(endpoint, tmp_path):
    for code, said in ((401, "the key has expired"), (402, "pay first"), (403, "not for you"), (404, "no such path")):
        Endpoint.script = [(200, GOOD, "stop")] * 20 + [(code, said, "")] * 44
        Endpoint.seen = []
        items, log = some_prompts(64), tmp_path / f"{code}"
        with pytest.raises(UserError, match=f"refuses every request .*{code}: {said}.*run again: what was answered is kept"):
            asking.ask(EndpointTeacher(settings(endpoint, concurrency=4)), items, purpose="seed", log=log)
        assert len(log.read_text().splitlines()) == 20 and len(Endpoint.seen) < 30
        Endpoint.script = []
        before = len(Endpoint.seen)
        entries = asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=log)
        assert generate.counts(entries)["ok"] == 64 and len(Endpoint.seen) - before == 44


def test_an_error_that_an_earlier_version_held_against_a_request_is_asked_again(endpoint, tmp_path):
    items = some_prompts(1)
    Endpoint.script = [(400, "no", "")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=tmp_path / "l")[0]
    assert entry.pop("code") == 400
    write_jsonl(tmp_path / "l", [entry | {"reason": "AuthenticationError 401"}])
    assert asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=tmp_path / "l")[0]["status"] == "ok"


def message(content, finish="stop", usage="none", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
    return body if usage == "none" else body | {"usage": usage}


PARTS = [{"type": "text", "text": GOOD[:9]}, {"type": "thinking", "thinking": "{"}, {"type": "text", "text": GOOD[9:]}]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (message(GOOD), "ok", ""),
        (message(PARTS), "ok", ""),
        (message(GOOD, usage={"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}), "ok", ""),
        (message(GOOD, finish="end_turn"), "ok", ""),
        (message(GOOD, finish="max_tokens"), "truncated", "length"),
        (message(GOOD, finish="SAFETY"), "refused", "safety"),
        (message(GOOD, finish="error"), "invalid", "finish_reason:server_error"),
        (message([None, 5, {"type": "text"}, *PARTS]), "ok", ""),
        (message([{"text": GOOD}]), "ok", ""),
        (message({"text": GOOD}), "ok", ""),
        (message(GOOD, usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}), "ok", ""),
        (message(None, finish="content_filter"), "refused", "content_filter"),
        (message(None, refusal="I will not."), "refused", "refusal"),
        (message(GOOD, finish="tool_calls"), "invalid", "finish_reason:tool_calls"),
        (message(GOOD, finish=None), "invalid", "finish_reason:none"),
        (message(7), "invalid", "empty"),
        (message(GOOD) | {"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}, "invalid", "empty"),
        (message(GOOD) | {"choices": []}, "invalid", "finish_reason:no_choices"),
        (message(GOOD.replace('"S1":"', '"S1":"\ud83d ')), "ok", ""),
        (message("x\udc00"), "invalid", "no_object"),
        (message(GOOD, finish="guardrail_intervened"), "refused", "guardrail_intervened"),
        (message("Sorry, I can\u2019t."), "refused", "refusal_text"),
    ],
)
def test_an_answer_of_any_shape_is_one_logged_outcome_and_ends_no_other(endpoint, tmp_path, body, status, reason):
    Endpoint.script = [(200, body, "as it is")]
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(3), purpose="seed", log=tmp_path / "l")
    odd = [e for e in entries if (e["status"], e["reason"]) == (status, reason)]
    assert odd and generate.counts(entries)["ok"] >= 2 and len((tmp_path / "l").read_text().splitlines()) == 3
    assert all(e["new_tokens"] > 0 for e in entries if e["status"] == "ok")


@pytest.mark.parametrize(
    "body",
    [
        None,
        "<html>busy</html>",
        {"error": {"message": "x"}, "choices": []},
        {"choices": None},
        {"choices": {"a": 1}},
        {"choices": [None]},
        [],
        7,
    ],
)
def test_a_reply_that_is_no_answer_is_asked_for_again(endpoint, tmp_path, monkeypatch, body):
    monkeypatch.setattr(endpoints, "back_off", lambda number: 0.01)
    Endpoint.script = [(200, body, "as it is"), (503, "busy", "\u00b2")]
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")
    assert entries[0]["status"] == "ok" and len(Endpoint.seen) == 3


def test_a_content_filter_that_answers_with_400_is_a_refusal(endpoint, tmp_path):
    Endpoint.script = [(400, {"error": {"message": "filtered", "code": "content_filter"}}, "as it is")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["status"] == "refused" and "filtered" in entry["reason"]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Thu, 01 Jan 2026 00:01:30 GMT"}, 90.0),
        ({"Retry-After": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0.0),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"x-ratelimit-reset-requests": "1m30s", "x-ratelimit-reset-tokens": "200ms"}, 90.0),
        ({"x-ratelimit-reset-requests": "8h", "x-ratelimit-remaining-requests": "99", "x-ratelimit-reset-tokens": "6ms"}, 0.006),
        ({"X-RateLimit-Reset": "1767225630000"}, 30.0),
        ({"X-RateLimit-Reset": "1767225630"}, 30.0),
        ({"X-RateLimit-Reset": "12"}, 12.0),
        ({"anthropic-ratelimit-tokens-reset": "2026-01-01T00:00:20Z"}, 20.0),
        ({"x-ratelimit-reset": "2026-01-01T00:00:20+00:00", "x-ratelimit-remaining": "3"}, 0.0),
        ({"x-ms-retry-after-ms": "1500"}, 1.5),
        ({"Retry-After": "\u00b2"}, 0.0),
        ({"Retry-After": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_every_way_to_ask_for_patience_is_understood(headers, seconds):
    assert replies.asked_wait(headers, 1767225600.0) == seconds  # 2026-01-01 00:00:00 UTC


def test_a_window_that_the_server_names_is_waited_for_beyond_eight_tries(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints.Endpoint, "_wait", lambda self, number, asked: 0.0)
    Endpoint.script = [(429, "slow down", "60")] * 12
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")
    assert entries[0]["status"] == "ok" and len(Endpoint.seen) == 13
    # But no longer than the stage may take, and only where one is told.
    for status, asked, minutes, tries in ((429, "60", 60, 61), (429, "60", 20, 21), (429, "0", 60, 8), (500, "60", 60, 8)):
        Endpoint.script, Endpoint.seen = [(status, "busy", asked)] * 99, []
        who = EndpointTeacher(settings(endpoint, max_minutes=float(minutes)))
        entries = asking.ask(who, some_prompts(1), purpose="seed", log=tmp_path / f"{status}{asked}{minutes}")
        assert entries[0]["status"] == "error" and entries[0]["retryable"] and len(Endpoint.seen) == tries


@pytest.mark.parametrize(("concurrency", "cap"), [(1, {"max_calls": 2}), (2, {"max_tokens": 400}), (3, {"max_usd": 400e-6})])
def test_a_call_that_is_tried_again_and_calls_that_wait_for_room_do_not_wait_for_each_other(
    endpoint, tmp_path, monkeypatch, concurrency, cap
):
    monkeypatch.setattr(endpoints, "back_off", lambda number: 0.05)
    one_dollar = ({"model": "tiny", "input": 1.0, "output": 1.0},)
    who = settings(endpoint, concurrency=concurrency, max_output_tokens=20, prices=one_dollar, max_minutes=0.3, **cap)
    Endpoint.script = [(500, "", "")] * 3 + [(429, "", "0")] * 2
    entries = asking.ask(EndpointTeacher(who), some_prompts(5), purpose="seed", log=tmp_path / "l")
    assert generate.counts(entries)["ok"] >= 2 and not any("max_minutes" in e["reason"] for e in entries)


def test_without_a_limit_the_first_answer_comes_alone_and_longer_ones_are_reckoned_with(endpoint, tmp_path):
    who = settings(endpoint, concurrency=4, max_tokens=9000)
    Endpoint.usage = {"prompt_tokens": 100, "completion_tokens": 2000, "total_tokens": 2100}
    t = EndpointTeacher(who)
    asking.ask(t, some_prompts(12), purpose="seed", log=tmp_path / "l")
    assert len(Endpoint.seen) == 4 and t.ledger.total("output_tokens") == 8000


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "API key not valid. Please pass a valid API key."),
        (429, "insufficient_quota"),
        (400, "model_not_found"),
        (403, "Your account has been flagged for suspicious activity"),
        (400, "Arrearage: make sure that your account is in good standing"),
    ],
)
def test_a_wrong_key_is_no_fault_of_the_request_whatever_its_status(endpoint, tmp_path, status, said):
    Endpoint.script = [(status, said, "")] * 4
    with pytest.raises(UserError, match="refuses every request"):
        asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(4), purpose="seed", log=tmp_path / "l")
    assert len(Endpoint.seen) == 1
    Endpoint.script = []
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(4), purpose="seed", log=tmp_path / "l")
    assert generate.counts(entries)["ok"] == 4


def test_what_a_server_quotes_of_a_prompt_is_not_its_own_word(endpoint, tmp_path):
    said = {"detail": [{"msg": "String should have at most 10 characters", "input": "billing, invalid_api_key, flagged"}]}
    Endpoint.script = [(422, said, "as it is")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["status"] == "error" and entry["code"] == 422


def test_a_limit_of_a_minute_that_speaks_of_billing_is_waited_for(endpoint, tmp_path):
    Endpoint.script = [(429, "You exceeded your current quota, please check your plan and billing details.", "0")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["status"] == "ok" and len(Endpoint.seen) == 2


def test_the_same_refusal_of_the_first_requests_is_held_against_none(endpoint, tmp_path):
    items, log = some_prompts(9), tmp_path / "l"
    Endpoint.script = [(400, "max_tokens: use max_completion_tokens", "")] * 9
    with pytest.raises(UserError, match="refuses every request .*max_completion_tokens"):
        asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=log)
    assert log.read_text() == ""
    # After an answer, or where each has its own reason, it is the request's.
    for first in ([(200, GOOD, "stop")], [(400, f"no {letter}", "") for letter in "abcd"]):
        Endpoint.script = first + [(400, "too long", "")] * 4
        entries = asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=tmp_path / f"{len(first)}")
        refused = [e for e in entries if e["status"] == "error" and not e["retryable"]]
        assert len(refused) == sum(status == 400 for status, _, _ in first) + 4


def test_refusals_that_differ_only_in_what_is_the_requests_own_are_alike(endpoint, tmp_path):
    Endpoint.script = [
        (400, f"request_id: r{n}: unknown field 'reasoning' beside \"topic {n}\" ({90 + n} characters)", "") for n in range(5)
    ]
    with pytest.raises(UserError, match="refuses every request"):
        asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(4), purpose="seed", log=tmp_path / "l")
    assert (tmp_path / "l").read_text() == ""


def test_another_models_answers_in_the_same_log_are_not_this_ones_budget(endpoint, tmp_path):
    items, log = some_prompts(4), tmp_path / "l"
    asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=log)
    other = EndpointTeacher(settings(endpoint, model="other", max_calls=4))
    assert generate.counts(asking.ask(other, items, purpose="seed", log=log))["ok"] == 4
    single = EndpointTeacher(settings(endpoint))
    for p in items:
        asking.ask(single, [p], purpose="seed", log=log)
    assert single.ledger.rows["seed"]["calls"] == 4


@pytest.mark.parametrize(
    "body", [[{"error": {"message": "too long"}}], {"detail": [{"msg": "too long"}]}, {"message": "too long"}, "too long"]
)
def test_the_servers_own_words_are_found_in_bodies_of_several_shapes(endpoint, tmp_path, body):
    Endpoint.script = [(400, body, "as it is")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["reason"] == "BadRequestError 400: too long"


def test_the_users_name_and_key_in_an_address_are_sent_and_never_shown(endpoint, tmp_path, monkeypatch):
    import base64

    monkeypatch.setenv("SPEED_URL_USERS", "{}")
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    address = endpoint.replace("http://", "http://me:secret-77@")
    run = open_run(
        "smoke", {"teacher.kind": "openai", "teacher.model": "tiny", "teacher.base_url": address, "generation.base_url": address}
    )
    t = EndpointTeacher(run.profile.teacher.model_copy(update={"concurrency": 1}))
    Endpoint.script = [(400, f"key sk-abcdefgh123 at {address} refused", "")]
    entries = asking.ask(t, some_prompts(2), purpose="seed", log=tmp_path / "l")
    assert generate.counts(entries) == {"ok": 1, "invalid": 0, "refused": 0, "truncated": 0, "error": 1}
    assert Endpoint.authorization == f"Basic {base64.b64encode(b'me:secret-77').decode()}"
    seen = (tmp_path / "l").read_text() + t.label + t.endpoint.where + run.profile.model_dump_json()
    assert "secret-77" not in seen and "abcdefgh123" not in seen and endpoint in seen


def test_an_answer_that_is_not_valid_is_asked_for_again_but_not_for_ever(endpoint, tmp_path):
    Endpoint.script += [(200, "{", "stop"), (200, GOOD[:9], "length"), (200, GOOD, "stop")]
    t = EndpointTeacher(settings(endpoint))
    entry = asking.ask(t, some_prompts(1), purpose="seed", log=tmp_path / "l", attempts=3)[0]
    assert (entry["status"], entry["attempt"], len(Endpoint.seen)) == ("ok", 3, 3)
    Endpoint.script += [(200, "{", "stop")] * 9
    log = tmp_path / "m"
    assert asking.ask(t, some_prompts(1), purpose="seed", log=log, attempts=3)[0]["status"] == "invalid"
    assert len(Endpoint.seen) == 6 and len(log.read_text().splitlines()) == 3
    asking.ask(t, some_prompts(1), purpose="seed", log=log, attempts=3)
    assert len(Endpoint.seen) == 6, "attempts that are logged were made again"


def test_the_key_is_in_no_log_and_in_no_message(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-7731")
    Endpoint.script += [(400, "key sk-very-secret-7731 may not", ""), (200, GOOD, "stop"), (401, "wrong sk-very-secret-7731", "")]
    t = EndpointTeacher(settings(endpoint))
    with pytest.raises(UserError, match=r"AuthenticationError 401: wrong \*\*\*.*set OPENAI_API_KEY") as stop:
        asking.ask(t, some_prompts(3), purpose="seed", log=tmp_path / "l")
    said = capsys.readouterr()
    assert [json.loads(row)["status"] for row in (tmp_path / "l").read_text().splitlines()] == ["ok", "error"]
    assert "7731" not in (tmp_path / "l").read_text() + said.out + said.err + t.label + str(stop.value)


def test_a_stage_that_the_budget_cut_short_is_partial_and_taken_only_when_told(practice, tmp_path, monkeypatch):
    from speed_core.study import generation_stages
    from speed_core.study.runs import open_run

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    practice.faults = 0.0
    values = {"teacher.kind": "openai", "teacher.model": "practice-teacher", "teacher.base_url": practice.url}
    generation_stages.brainstorm(open_run("smoke", values))
    before = sum(practice.asked.values())
    short = values | {"teacher.max_calls": 3}
    with pytest.raises(UserError, match="artifact 'seeds' is partial: .*max_calls 3 reached.*accept_partial=true"):
        generation_stages.seed_data(open_run("smoke", short))
    with pytest.raises(UserError, match="is partial"):
        open_run("smoke", short).store.need("seeds")
    told = open_run("smoke", short | {"teacher.accept_partial": True})
    assert generation_stages.seed_data(told).manifest["outcomes"]["ok"] == 3
    assert sum(practice.asked.values()) - before == 3, "accepting what is there asked for more"
    whole = generation_stages.seed_data(open_run("smoke", values))
    unrecorded = whole.manifest["outcomes"]["error"]
    assert not whole.manifest["partial"] and unrecorded + whole.manifest["outcomes"]["ok"] == len(whole.rows())


def test_the_estimate_names_calls_tokens_money_and_time_and_the_cap_that_it_breaks():
    priced = ({"model": "m", "input": 2.0, "output": 4.0},)
    who = Teacher(
        kind="openai", judge="llm", model="m", prices=priced, max_usd=0.5, requests_per_minute=10, max_output_tokens=100
    )
    line = budget.estimate(who, ["x" * 400] * 600)
    assert (
        "600 calls" in line and "120,000 tokens" in line and "0.36 USD" in line and "60.0 min" in line and "max_usd" not in line
    )
    assert "more than teacher.max_usd 0.3" in budget.estimate(who.model_copy(update={"max_usd": 0.3}), ["x" * 400] * 600)
    assert "max_usd stops nothing" in budget.estimate(who.model_copy(update={"prices": ()}), ["x"])


def test_the_first_two_notebooks_run_to_their_end_on_a_teacher_that_cuts_answers_short(practice, tmp_path, monkeypatch):
    from speed_core.runner import batch

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    practice.faults = 0.3
    values = {"teacher.kind": "openai", "teacher.model": "practice-teacher", "teacher.base_url": practice.url}
    reports = batch.run_all("smoke", overrides=values | {"teacher.timeout_seconds": 3}, only=["01", "02"])
    assert [(r.status, r.detail) for r in reports] == [("ok", "")] * 2
    outcomes = json.loads((tmp_path / "runs" / "smoke" / "artifacts" / "seeds" / "manifest.json").read_text())["outcomes"]
    assert 0 < outcomes["ok"] < sum(outcomes.values()), "nothing was lost, so nothing was tested"


def test_table_5_counts_what_an_endpoint_was_asked_the_judge_included(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    who = {"teacher.kind": "openai", "teacher.judge": "llm", "teacher.model": "tiny", "teacher.base_url": endpoint}
    run, planned = open_run("smoke", who), some_prompts(2)
    candidates = [
        {"record": f"{p.id}#{k}", "kind": p.kind, "raw": GOOD, "finish_reason": "stop"} for p in planned for k in (0, 1)
    ]
    with run.store.stage("root", {}) as draft:
        write_jsonl(draft.file("data.jsonl"), [e | {"id": e["record"], "status": "ok", "reason": ""} for e in candidates])
    monkeypatch.setattr(generation_stages, "root_prompts", lambda run: planned)
    generation_stages.preferences(run)
    nothing = {"calls": 0, "input": 0, "output": 0}
    each = {"calls": 4, "input": 40, "output": 20}  # two prompts in both orders, at the endpoint's 10 and 5 tokens
    assert synthesis_stages.teacher_use(run) == {"brainstorm": nothing, "seed": nothing, "preference": each, "revision": nothing}


def test_table_5_counts_recorded_answers_with_the_tokenizer_of_the_generator(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run = open_run("smoke")
    tasks, seeds, use = generation_stages.brainstorm(run), generation_stages.seed_data(run), synthesis_stages.teacher_use(run)
    asked = {p: n["calls"] for p, n in use.items()}
    assert asked == {
        "brainstorm": len(tasks.rows()),
        "seed": run.profile.seeds,
        "preference": 0,
        "revision": len(generation_stages.revision_rows(run)),
    }
    tokenizer = loading.load_tokenizer(run.profile.models.generator)
    written = [len(tokenizer(e["raw"], add_special_tokens=False)["input_ids"]) for e in seeds.rows()]
    assert use["seed"]["output"] == sum(written) < use["seed"]["input"], "a prompt is longer than its answer"


@pytest.mark.parametrize("first", ["<html>", None, {"error": {"message": "upstream"}}])
def test_one_unusable_reply_holds_up_no_other_request(endpoint, tmp_path, first):
    Endpoint.script = [(200, first, "as it is")]
    t = EndpointTeacher(settings(endpoint, concurrency=2, max_minutes=1))
    entries = asking.ask(t, some_prompts(6), purpose="seed", log=tmp_path / "l")
    assert generate.counts(entries)["ok"] == 6


@pytest.mark.parametrize(
    "body",
    [
        [{"error": {"code": 400, "message": "API key expired.", "details": [{"reason": "API_KEY_INVALID"}]}}],
        {"error": {"message": "The model `tiny` has been decommissioned", "code": "model_decommissioned"}},
        {"message": "Invalid model: tiny", "type": "invalid_model", "code": "1500"},
        {"error": {"message": "This organization has been disabled."}},
        {"error": {"message": "a sentence that nobody has foreseen"}},
    ],
)
def test_a_service_that_fails_in_the_middle_stops_the_stage_and_a_rerun_goes_on(endpoint, tmp_path, body):
    items, log = some_prompts(20), tmp_path / "l"
    Endpoint.script = [(200, GOOD, "stop")] * 5 + [(400, body, "as it is")] * 20
    with pytest.raises(UserError, match="refuses every request"):
        asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=log)
    Endpoint.script = []
    entries = asking.ask(EndpointTeacher(settings(endpoint)), items, purpose="seed", log=log)
    assert generate.counts(entries)["ok"] == 20


def test_a_few_refusals_between_answers_are_the_requests_own(endpoint, tmp_path):
    Endpoint.script = [(200, GOOD, "stop"), *[(400, "no", "")] * 3] * 3
    entries = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(12), purpose="seed", log=tmp_path / "l")
    assert sum(e["status"] == "error" and not e["retryable"] for e in entries) == 9


@pytest.mark.parametrize("word", ["content-filter", "contentFilter", "moderation", "blocked", "refused"])
def test_a_text_that_was_held_back_is_refused_whatever_the_servers_word(endpoint, tmp_path, word):
    Endpoint.script = [(200, "", word)]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["status"] == "refused" and entry["reason"] == word.lower()


def test_a_refusal_among_the_parts_of_a_message_is_a_refusal(endpoint, tmp_path):
    Endpoint.script = [(200, [{"type": "refusal", "refusal": "No."}], "stop")]
    entry = asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l")[0]
    assert entry["status"] == "refused" and entry["raw"] == "No."


def test_requests_that_are_refused_alike_one_after_the_other_are_remembered_where_the_server_answers_a_probe(endpoint, tmp_path):
    Endpoint.refuse = (400, "not on this topic", "")
    t = EndpointTeacher(settings(endpoint))
    entries = asking.ask(t, some_prompts(12), purpose="seed", log=tmp_path / "l")
    assert [e["retryable"] for e in entries] == [False] * 12 and len(Endpoint.seen) == 14
    assert t.ledger.rows["seed"]["calls"] == 2  # the probes; a refused request costs nothing


def test_an_answer_is_in_the_log_before_the_refusals_that_it_explains(endpoint, tmp_path):
    Endpoint.script = [(400, "no", ""), (200, GOOD, "stop")]
    asking.ask(EndpointTeacher(settings(endpoint)), some_prompts(2), purpose="seed", log=tmp_path / "l")
    assert [json.loads(line)["status"] for line in (tmp_path / "l").read_text().splitlines()] == ["ok", "error"]


def test_the_body_of_a_reply_is_read_from_its_bytes():
    body = json.dumps({"choices": [{"message": {"content": "é"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    for given in (body, body.encode(), b"\xef\xbb\xbf" + body.encode()):
        assert replies.read(given, "r", 2) == replies.Completion("r", "é", "none", 3, 1, counted=True)
    assert not replies.read('{"choices": [{"message": null, "text": "as before"}]}', "r", 2).counted
    assert replies.read('{"choices": [{"message": null, "text": "as before"}]}', "r", 2).text == "as before"
    with pytest.raises(UnicodeDecodeError):
        replies.read(b'{"choices": [{"text": "\xff"}]}', "r", 2)
    with pytest.raises(replies.NoAnswer, match="no JSON"):
        replies.read("<html>", "r", 2)
