// Command demo shows a key rotation without any setup: it runs a signing server, an agent
// and a few workloads that call each other continuously, replaces the signing keys and
// reports whether a workload was affected. "demo -h" prints the usage.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/renewd/renewd/internal/cli"
)

func main() {
	// If its output is closed, as in "demo | head", the demo ends by the failed write. Any
	// connection can raise SIGPIPE.
	signal.Ignore(syscall.SIGPIPE)
	cli.Main(func(ctx context.Context) int { return run(ctx, os.Args[1:], os.Stdout, os.Stderr) }, syscall.SIGHUP)
}
