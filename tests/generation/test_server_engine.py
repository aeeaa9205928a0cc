"""The engine that asks a server, against one that says what a test wants."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from speed_core.files import UserError
from speed_core.generation import generate
from speed_core.generation.server_engine import ServerEngine


@pytest.mark.parametrize("after", [0, 3])
def test_a_server_that_refuses_every_request_stops_the_stage_and_a_rerun_goes_on(tmp_path, after):
    text = '{"S1": "a b", "S2": "c d", "S3": "e f"}'
    answer = {"id": "1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}  # fmt: skip
    seen, works = [], False

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(200, {"object": "list", "data": []})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(1)
            good = works or len(seen) <= after
            self.reply(200 if good else 400, answer if good else {"error": {"message": "Extra inputs are not permitted"}})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    items = [generate.Request(f"r{i}", f"text {i}", "sts", i) for i in range(20)]

    def ask():
        engine = ServerEngine(f"http://127.0.0.1:{http.server_address[1]}/v1", "tiny", "package:gemma-3-270m", concurrency=1)
        try:
            return generate.generate_all(
                items, model="m", model_id="m", engine=engine, log=tmp_path / "l", decoding=generate.Decoding()
            )
        finally:
            engine.close()

    with pytest.raises(UserError, match="every request is refused by the server .*Extra inputs"):
        ask()
    works = True
    assert {e["status"] for e in ask()} == {"ok"}
    http.shutdown()
