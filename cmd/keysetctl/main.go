// Command keysetctl is the operator's side of a keyset rotation: it lists
// keysets and carries out the steps of the runbook, one by one or as a whole.
// "keysetctl --help" says which.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // from then on a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr, dial))
}
