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
    verdict = LlmJudge(teacher.EndpointTeacher(settings(endpoint))).judge(some_prompts(1)[0], ["x", "y"])
    assert (verdict.best, verdict.worst) == (0, 1)
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
