package main

import (
	"context"
	"flag"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/server/seal"
)

// keyNewCommand is "key new".
func keyNewCommand(_ context.Context, args []string, e cli.Env) error {
	file, err := keyFile("key new", args, e)
	if err != nil {
		return err
	}
	if file == "-" {
		return seal.NewKey(e.Stdout)
	}
	if err := seal.NewFile(file); err != nil {
		return err
	}
	return cli.Printf(e.Stdout, "%s: created; keep a copy elsewhere, the store cannot be read without it\n", file)
}

// keyAddCommand is "key add".
func keyAddCommand(_ context.Context, args []string, e cli.Env) error {
	file, err := keyFile("key add", args, e)
	if err != nil {
		return err
	}
	if err := seal.AddKey(file); err != nil {
		return err
	}
	return cli.Printf(e.Stdout, "%s: new key added; restart the server to encrypt everything with it\n", file)
}

func keyFile(name string, args []string, e cli.Env) (string, error) {
	file, err := parse(flag.NewFlagSet(name, flag.ContinueOnError), args, keyUsage, e, "file")
	if err != nil {
		return "", err
	}
	return file[0], nil
}
