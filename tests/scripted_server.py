"""A server of OpenAI's protocol that answers by script, in a process of its own.

`http://127.0.0.1:PORT/NAME.SCRIPT/v1`: each NAME has state of its own. GET `/NAME.SCRIPT/log` gives the bodies that it
got.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOG, LOCK = defaultdict(list), threading.Lock()
KEY = "sk-secret-0123456789"


def text(body: dict) -> str:
    """A response that says what was asked: its seed, and for how many tokens."""
    return f" seed {body.get('seed')}, {body.get('max_tokens')} tokens"


def answer(body: dict, script: str) -> dict:
    chat = "messages" in body
    content = judged(body["messages"][-1]["content"], script) if script.startswith("judge") else text(body)
    choice: dict = {"index": 0, "finish_reason": "stop"}
    if script == "cut":
        choice["finish_reason"] = "length"
    choice |= {"message": {"role": "assistant", "content": content}} if chat else {"text": content}
    if body.get("return_token_ids") and script in ("vllm", "vllm-ids"):
        choice["token_ids"] = [5, 6, 7] if chat else [300 + body["seed"] % 97, 300 + body["seed"] % 89, 2]
    if body.get("logprobs") and script == "vllm":
        logps = [-0.5, -1.25, -0.125]
        choice["logprobs"] = {"content": [{"logprob": p} for p in logps]} if chat else {"token_logprobs": logps}
    if script == "reasoning":
        choice["message"]["reasoning_content"] = "hm"
    if script == "tools":
        choice["message"] |= {"content": None, "tool_calls": [{"id": "x"}]}
    if script == "two":
        return {"choices": [choice, choice]}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}}


def judged(prompt: str, script: str) -> str:
    """A judge of the default templates: `right` likes the response with more of the letter e."""
    if "<response>" in prompt:
        (response,) = re.findall(r"<response>\n(.*?)\n</response>", prompt, re.DOTALL)
        return "No idea." if script == "judge-nonsense" else f"It has some.\nGrade: {min(10, 1 + response.count('e'))}"
    a, b = (re.findall(rf"<response_{x}>\n(.*?)\n</response_{x}>", prompt, re.DOTALL)[0] for x in "ab")
    more = a.count("e") - b.count("e")
    right = "A" if more > 0 else "B" if more else "tie"
    says = {"judge-right": right, "judge-first": "A", "judge-wrong": {"A": "B", "B": "A"}.get(right, "tie")}
    if script == "judge-half" and "z" in a:  # no verdict where a response with z comes first
        return "Verdict: A or maybe B"
    return "I think so." if script == "judge-nonsense" else f"Because.\n\nVerdict: {says.get(script, right)}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name, _, path = self.path[1:].partition("/")
        if path == "log":
            return self.send(200, json.dumps(LOG[name]).encode())
        script = name.partition(".")[2]
        owner = "vllm" if script == "vllm" else "someone"
        ids = {"many": ["a", "b"], "unlisted": []}.get(script, ["scripted"])
        if script == "broken-list":
            return self.send(500, b"no cache folder")
        return self.send(200, json.dumps({"data": [{"id": i, "owned_by": owner} for i in ids]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, _, path = self.path[1:].partition("/")
        script, _, number = name.partition(".")[2].partition("@")  # die@3: after 3 requests
        with LOCK:
            LOG[name].append({"path": path, **body})
            count = len(LOG[name])
        late = count > int(number or 0)
        if script == "slow":
            time.sleep(float(number) / 1000)
        if script in ("429", "500", "400") and (script == "400" or count <= int(number)):
            return self.send(int(script), b'{"error": "by script"}', Retry_After="0.05")
        if script == "wait" and late:
            return self.send(429, b"", Retry_After="4000")
        if script == "key" and self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.send(401, f"bad key: {self.headers.get('Authorization')}".encode())
        if script == "stall" and late:
            time.sleep(60)
        if script == "html" and late:
            return self.send(200, b"<html>Welcome</html>")
        if script == "empty" and late:
            return self.send(200, b"{}")
        content = json.dumps(answer(body, script)).encode()
        if script == "truncated" and late:
            return self.send(200, content[:-20])
        if script == "die" and late:
            self.send(200, content[:20], len(content))
            self.close_connection = True
            return None
        return self.send(200, content)


def repeated(bodies: list[dict]) -> int:
    """How many requests came more than once."""
    return sum(n - 1 for n in Counter(json.dumps(b, sort_keys=True) for b in bodies).values())


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128  # connections that wait to be accepted: 5 refused some of 16 at once
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
