package main

import (
	"context"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/server/seal"
)

// keyNewCommand is "key new".
func keyNewCommand(_ context.Context, call *cli.Call) error {
	file, err := keyFile(call)
	if err != nil {
		return err
	}
	if file == "-" {
		return seal.NewKey(call.Stdout)
	}
	if err := seal.NewFile(file); err != nil {
		return err
	}
	return cli.Printf(call.Stdout, "%s: created; keep a copy elsewhere, the store cannot be read without it\n", file)
}

// keyAddCommand is "key add".
func keyAddCommand(_ context.Context, call *cli.Call) error {
	file, err := keyFile(call)
	if err != nil {
		return err
	}
	if err := seal.AddKey(file); err != nil {
		return err
	}
	return cli.Printf(call.Stdout, "%s: new key added; restart the server to encrypt everything with it\n", file)
}

func keyFile(call *cli.Call) (string, error) {
	file, err := call.Parse("file")
	if err != nil {
		return "", err
	}
	return file[0], nil
}
