#!/usr/bin/env bash
# A Prometheus query cannot distinguish an agent that died from one that has finished.
#
# Seen with   Prometheus 2.42 (Debian 12)
# Behaviour   If a target cannot be scraped, Prometheus ends its series with the next scrape, not
#             after the five minutes of an instant query's lookback. A sum over agents drops at
#             once by the value of that agent.
# Operators   If "sum(renewals_pending) == 0" decides that a key can be removed, it becomes true
#             within one scrape interval when agents with pending renewals crash or lose
#             their network. Also require "up == 1" for every expected agent.
# renewd      keysetctl is not safe while Prometheus does not scrape an agent that the server knows
#             (internal/operator/prom, internal/operator/spire; spire.txtar in test/system).
#
# Output seen
#   both agents up: 40 renewals pending, 0 targets down
#   one agent gone: 0 renewals pending, 1 targets down
source "$(dirname "$0")/lib.sh"
need prometheus prometheus
need curl curl
port=$(free_port)
cat >agents.py <<'PY'
import http.server, sys, threading

class Agent(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"renewals_pending %d\n" % self.server.pending
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Agent)
server.pending = int(sys.argv[1])
print(server.server_address[1], flush=True)
server.serve_forever()
PY
background busy.port python3 agents.py 40
background done.port python3 agents.py 0
until_true 10 test -s busy.port -a -s done.port
cat >prometheus.yml <<CONF
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: agents
    static_configs: [{targets: ["127.0.0.1:$(cat busy.port)", "127.0.0.1:$(cat done.port)"]}]
CONF
background prometheus.log prometheus --config.file=prometheus.yml --storage.tsdb.path=tsdb --web.listen-address=127.0.0.1:$port
query() {
	curl -sS --get --data-urlencode "query=$1" "http://127.0.0.1:$port/api/v1/query" |
		json '", ".join(r["value"][1] for r in doc["data"]["result"])'
}
is() { [ "$(query "$1")" = "$2" ]; }
say() { echo "$1: $(query 'sum(renewals_pending)') renewals pending, $(query 'count(up == 0) or vector(0)') targets down"; }
until_true 60 is 'count(up == 1)' 2
say "both agents up" >seen
kill "$(head -n 1 pids)"
until_true 60 is 'count(up == 0)' 1 # at the next scrape, a second later
say "one agent gone" >>seen
expect <<'SEEN'
both agents up: 40 renewals pending, 0 targets down
one agent gone: 0 renewals pending, 1 targets down
SEEN
