#!/usr/bin/env bash
# A Node.js client that pings too often gets an error about exhausted memory or bandwidth.
#
# Seen with   @grpc/grpc-js 1.14.7 under Node.js, gRPC-Go v1.85.0 as the server
# Behaviour   A gRPC server closes the connection of a client that pings more often than allowed
#             (gRPC-Go by default: once in five minutes). grpc-js ends the open stream with
#             RESOURCE_EXHAUSTED and the text below. Only its own log mentions pings.
# Operators   A Node.js workload with 'grpc.keepalive_time_ms' that retries only UNAVAILABLE loses
#             its Workload API stream permanently. The text suggests a lack of memory; check
#             the client's keepalive instead.
# renewd      allows a ping every ten seconds on its socket, also without a call (internal/agent/workload).
#
# Output seen
#   RESOURCE_EXHAUSTED: Bandwidth exhausted or memory limit exceeded
source "$(dirname "$0")/lib.sh"
need npm npm
need node nodejs
go_module google.golang.org/grpc@v1.85.0
cat >main.go <<'GO'
package main

import (
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	lis, err := net.Listen("unix", os.Args[1])
	if err != nil {
		panic(err)
	}
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	if err := srv.Serve(lis); err != nil {
		panic(err)
	}
}
GO
go build -o server .
background server.log ./server "$work/agent.sock"
until_true 10 test -S agent.sock
npm init -y >/dev/null
npm install --silent --no-audit --no-fund @grpc/grpc-js@1.14.7 >npm.log 2>&1 || { cat npm.log >&2; exit 1; }
cat >client.js <<'JS'
const grpc = require('@grpc/grpc-js');
// A stream that stays open: Watch of the health service.
const client = new grpc.Client('unix://' + process.argv[2], grpc.credentials.createInsecure(), {
  'grpc.keepalive_time_ms': 1000,
});
const bytes = (b) => b;
const stream = client.makeServerStreamRequest('/grpc.health.v1.Health/Watch', bytes, bytes, Buffer.alloc(0));
stream.on('data', () => {});
stream.on('error', (err) => {
  console.log(`${grpc.status[err.code]}: ${err.details}`);
  client.close();
});
JS
timeout 60 node client.js "$work/agent.sock"  2>client.log >seen
expect <<'SEEN'
RESOURCE_EXHAUSTED: Bandwidth exhausted or memory limit exceeded
SEEN
