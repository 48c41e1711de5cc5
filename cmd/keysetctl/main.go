// Command keysetctl lists the keysets of a deployment and runs a keyset rotation,
// step by step or as a whole. See "keysetctl --help".
package main

import (
	"context"
	"os"

	"github.com/renewd/renewd/internal/cli"
)

func main() {
	cli.Main(func(ctx context.Context) int {
		return run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr, dial)
	})
}
