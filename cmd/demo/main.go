// Command demo shows what renewd is for, with no set-up: it runs a signing
// server, an agent and a few workloads that call each other all the time,
// replaces the signing keys under them, and reports whether anyone noticed.
// See the usage text in run.go or run it with -h.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// With nobody left to read it, as in "demo | head", the demo ends in order:
	// the write fails. The signal says less, any connection can raise it.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // from then on a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
