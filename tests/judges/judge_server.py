"""A real server that speaks as OpenAI-compatible endpoints do, and fails, stalls and talks nonsense as it is told."""

import contextlib
import http.server
import json
import re
import threading
import time

MODEL = "llama"
SECRET = "sk-no-one-may-read-this"


def parts(messages):
    """Prompt and both responses of a question by the default template."""
    texts = re.search(
        r"\[PROMPT\]\n(.*?)\n\[END OF PROMPT\].*\[RESPONSE A\]\n(.*?)\n\[END OF RESPONSE A\]"
        r".*\[RESPONSE B\]\n(.*?)\n\[END OF RESPONSE B\]",
        messages[0]["content"],
        flags=re.DOTALL,
    )
    return texts.groups()


def shorter(messages):
    """Prefers the response of fewer words."""
    _, first, second = parts(messages)
    lengths = len(first.split()), len(second.split())
    return f"I counted.\n{'tie' if lengths[0] == lengths[1] else 'AB'[lengths[0] > lengths[1]]}"


class Server:
    """What the server is told, and what it was asked.

    Attributes:
      answer: a list of messages -> the text that it answers.
      faults: what happens to the next requests in place of an answer, one each: (status, headers, body), or a number of
        seconds for which it stalls.
      key: the only key that it takes; None for any.
      asked: the bodies of all requests.
      keys: their Authorization headers.
      times: when they came, in seconds.
      busy, busiest: requests at this moment, and the most of them at any.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.answer, self.faults, self.key, self.seconds = shorter, [], None, 0.0
        self.asked, self.keys, self.times = [], [], []
        self.busy = self.busiest = 0

    @property
    def questions(self):
        """The texts of all requests about responses, without the trial question."""
        texts = [json.dumps(body["messages"]) for body in self.asked]
        return [text for text in texts if "two plus two" not in text]

    def respond(self, body, key):
        """Status, headers and body for a request."""
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            fault = self.faults.pop(0) if self.faults else None
        try:
            if isinstance(fault, tuple):
                return fault
            time.sleep(fault or self.seconds)
            if self.key is not None and key != f"Bearer {self.key}":
                return 401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}})
            if body["model"] != MODEL:
                return 404, {}, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
            message = {"role": "assistant", "content": self.answer(body["messages"])}
            usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
            return 200, {}, json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})
        finally:
            with self.lock:
                self.busy -= 1


@contextlib.contextmanager
def judge_server():
    """The server, whose `url` is that of the endpoint."""
    told = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                status, headers, content = 404, {}, "no such page"
            else:
                status, headers, content = told.respond(body, self.headers.get("Authorization"))
            with contextlib.suppress(ConnectionError):  # Who asked may have given up.
                self.send_response(status)
                for name, value in ({"Content-Length": len(content.encode())} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.url = f"http://127.0.0.1:{server.server_port}/v1"
        told.name = f"{told.url}#{MODEL}"
        yield told
        server.shutdown()
