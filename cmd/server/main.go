// Command server is the renewd signing server of a trust domain, and the operator's
// command for its entries, agents and tokens: see the usage text in usage.go or run
// server help. Keysets are rotated with keysetctl.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}
