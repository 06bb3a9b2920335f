"""A server that answers like vLLM's health routes and has one helper process.

    python fake_server_process.py PORT NAME [good | crash | hang | stubborn]

crash: exits with code 3 after 50 lines. hang: never listens. stubborn: ignores SIGTERM and
holds shared memory. Prints the helper's process id and the memory's name. Not a test.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory

PORT, NAME, MODE = int(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["good"])[0]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers["Authorization"] == f"Bearer {os.environ.get('VLLM_API_KEY', '')}"
        body = json.dumps({"data": [{"id": NAME}]}).encode()
        self.send_response(200 if allowed or self.path == "/health" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        return


if MODE == "crash":
    for line in range(50):
        print("line", line, flush=True)
    raise SystemExit(3)
ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
code = (ignore if MODE == "stubborn" else "") + "import time; time.sleep(600)"
helper = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
print("helper", helper.pid, flush=True)
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    memory = SharedMemory(create=True, size=64)
    print("memory", memory.name, flush=True)
if MODE == "hang":
    time.sleep(600)
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
