import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from speed_core import generate, prompts, teacher
from speed_core.artifacts import UserError
from speed_core.profile import Teacher

GOOD = '{"S1":"a b","S2":"a c","S3":"a d"}'


class Endpoint(BaseHTTPRequestHandler):
    """A real HTTP server with the chat-completions interface; `script` holds the next replies."""

    script: list = []
    seen: list = []

    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for k, v in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        status, text, reason = self.script.pop(0) if self.script else (200, GOOD, "stop")
        if status != 200:
            return self.reply(status, {"error": {"message": "no", "type": "x"}}, [("Retry-After", "0")])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.reply(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice], "usage": usage}
        )


@pytest.fixture
def endpoint():
    Endpoint.script, Endpoint.seen = [], []
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
    t = teacher.EndpointTeacher(settings(endpoint, usd_per_million_input=1.0))
    entries = teacher.ask(t, some_prompts(4), purpose="seed", log=tmp_path / "log.jsonl", concurrency=1)
    assert generate.counts(entries) == {"ok": 1, "invalid": 1, "refused": 1, "truncated": 1, "error": 0}
    assert t.ledger.rows["seed"]["calls"] == 4 and t.ledger.rows["seed"]["input_tokens"] == 40


def test_a_rate_limit_and_a_server_error_are_tried_again(endpoint, tmp_path):
    Endpoint.script += [(429, "", ""), (500, "", ""), (200, GOOD, "stop")]
    entries = teacher.ask(
        teacher.EndpointTeacher(settings(endpoint)), some_prompts(1), purpose="seed", log=tmp_path / "l", concurrency=1
    )
    assert entries[0]["status"] == "ok" and len(Endpoint.seen) == 3


def test_a_bad_request_is_not_tried_again_and_loses_nothing(endpoint, tmp_path):
    Endpoint.script += [(400, "", ""), (200, GOOD, "stop")]
    entries = teacher.ask(
        teacher.EndpointTeacher(settings(endpoint)), some_prompts(2), purpose="seed", log=tmp_path / "l", concurrency=1
    )
    assert sorted(e["status"] for e in entries) == ["error", "ok"] and len(Endpoint.seen) == 2


def test_the_budget_stops_cleanly_and_a_second_run_goes_on(endpoint, tmp_path):
    items = some_prompts(5)
    first = teacher.ask(
        teacher.EndpointTeacher(settings(endpoint, max_calls=2)), items, purpose="seed", log=tmp_path / "l", concurrency=1
    )
    assert generate.counts(first)["ok"] == 2 and generate.counts(first)["error"] == 3
    assert "max_calls" in next(e["reason"] for e in first if e["status"] == "error")
    second = teacher.ask(teacher.EndpointTeacher(settings(endpoint)), items, purpose="seed", log=tmp_path / "l", concurrency=1)
    assert generate.counts(second)["ok"] == 5 and len(Endpoint.seen) == 5


def test_the_llm_judge_sets_aside_a_pair_on_which_it_contradicts_itself(endpoint):
    from speed_core.judge import LlmJudge

    same = '{"reason":"r","best":0,"worst":1}'
    Endpoint.script += [(200, same, "stop"), (200, same, "stop")]
    verdict = LlmJudge(teacher.EndpointTeacher(settings(endpoint))).judge(some_prompts(1)[0], ["x", "y"])
    assert verdict.best == verdict.worst and "contradicts" in verdict.reason
    Endpoint.script += [(200, same, "stop"), (200, '{"reason":"r","best":1,"worst":0}', "stop")]
    judge = LlmJudge(teacher.EndpointTeacher(settings(endpoint)))
    verdict = judge.judge(some_prompts(1)[0], ["x", "y"])
    assert (verdict.best, verdict.worst) == (0, 1)
    # It named "x" in both orders, once in the first place and once in the second: no bias.
    wanted = {"judged": 1, "agree": 1, "contradict": 0, "unreadable": 0, "first_place_best": 1, "first_place_expected": 1.0}
    assert judge.audit == wanted
    assert Endpoint.seen[0]["temperature"] == 0.0


def test_a_model_that_is_not_served_and_a_dead_endpoint_are_named(endpoint):
    with pytest.raises(UserError, match="it serves tiny"):
        teacher.EndpointTeacher(settings(endpoint, model="gpt-9")).check()
    with pytest.raises(UserError, match="not reachable"):
        teacher.EndpointTeacher(settings("http://127.0.0.1:9/v1")).check()


def test_without_a_key_the_teacher_says_what_to_do(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        teacher.EndpointTeacher(settings(""))


def test_an_unrecorded_prompt_is_an_error_outcome_not_a_guess(tmp_path):
    entries = teacher.ask(teacher.RecordedTeacher(), some_prompts(1), purpose="seed", log=tmp_path / "l")
    assert entries[0]["status"] == "error" and "no recorded answer" in entries[0]["reason"]


# --- the faulty teacher, and the limits -----------------------------------------------------------


@pytest.fixture
def practice():
    from speed_core.practice import PracticeServer

    server = PracticeServer(faults=0.4, seed=1, hang_seconds=1.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def recorded_prompts(n):
    from speed_core import pipeline
    from speed_core.run_context import open_run

    return pipeline.seed_plan(open_run("smoke", {"seeds": n}))


def test_against_a_teacher_that_fails_in_seven_ways_nothing_is_lost(practice, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(teacher, "wait_exponential_jitter", lambda **_: lambda state: 0.01)
    items = recorded_prompts(48)
    who = settings(practice.url, model="practice-teacher", concurrency=8, timeout_seconds=0.5)
    entries = teacher.ask(teacher.EndpointTeacher(who), items, purpose="seed", log=tmp_path / "log.jsonl", concurrency=8)
    found = generate.counts(entries)
    assert sum(found.values()) == 48 and found["error"] == 0 and found["ok"] > 30
    wanted = [practice.fault(p.digest, 99) for p in items]
    assert found["truncated"] == wanted.count("cut") > 0 and found["invalid"] == wanted.count("malformed") > 0
    assert all(practice.struck[f] > 0 for f in ("429", "500", "hang", "reset", "half body")), practice.struck
    recorded = {r["prompt_digest"]: r["answer"] for r in teacher.recorded_rows("seeds")}
    assert all(e["raw"] == recorded[e["prompt_digest"]] for e in entries if e["status"] == "ok")
    calls = sum(practice.asked.values())
    again = teacher.ask(teacher.EndpointTeacher(who), items, purpose="seed", log=tmp_path / "log.jsonl", concurrency=8)
    assert again == entries and sum(practice.asked.values()) == calls, "an answer was paid for twice"


def test_the_same_seed_gives_the_same_faults():
    from speed_core.practice import PracticeServer

    servers = [PracticeServer(faults=0.5, seed=s) for s in (3, 3, 4)]
    drawn = [[s.fault(str(k), a) for k in range(50) for a in range(4)] for s in servers]
    for s in servers:
        s.server_close()
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 8


def test_a_request_that_the_endpoint_refuses_is_remembered_and_not_asked_again(practice, tmp_path):
    who = settings(practice.url, model="practice-teacher")
    unknown = some_prompts(3)
    practice.faults = 0.0
    for _ in range(2):
        entries = teacher.ask(teacher.EndpointTeacher(who), unknown, purpose="seed", log=tmp_path / "l", concurrency=2)
    assert [e["reason"] for e in entries] == ["BadRequestError 400"] * 3 and sum(practice.asked.values()) == 3


def test_a_budget_of_tokens_stops_cleanly(endpoint, tmp_path):
    who = settings(endpoint, max_tokens=30)
    entries = teacher.ask(teacher.EndpointTeacher(who), some_prompts(5), purpose="seed", log=tmp_path / "l", concurrency=1)
    assert generate.counts(entries)["ok"] == 2 and "max_tokens" in next(e["reason"] for e in entries if e["status"] == "error")


def test_concurrency_halves_on_a_rate_limit_and_grows_back():
    from speed_core.limits import Gate

    gate = Gate(8)
    gate.was_refused(), gate.was_refused()
    assert gate.limit == 2.0
    for _ in range(100):
        gate.went_well()
    assert gate.limit == 8.0


def test_the_pace_never_lets_more_through_in_a_minute_than_it_says():
    from speed_core.limits import Pace

    now = [0.0]
    pace = Pace(3, 1000, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    starts = []
    for tokens in (100, 900, 50, 50, 50, 50, 2000, 10):
        entry = pace.enter(tokens)
        starts.append((entry[0], tokens))
    for t, _ in starts:
        inside = [k for s, k in starts if t <= s < t + 60]
        assert len(inside) <= 3 and (sum(inside) <= 1000 or len(inside) == 1)
    assert now[0] >= 180
