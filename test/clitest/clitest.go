// Package clitest runs the command lines in testdata/script of a program's tests.
package clitest

import (
	"net"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
)

// Run runs the scripts. setup prepares the environment of each; files names variables
// with the path of a file in the folder deploy.
func Run(t *testing.T, files map[string]string, setup func(e *testscript.Env)) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(e *testscript.Env) error {
			// A race-built program otherwise sleeps for a second before it exits.
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			for name, file := range files {
				path, err := filepath.Abs(filepath.Join("..", "..", "deploy", file))
				if err != nil {
					return err
				}
				e.Setenv(name, path)
			}
			setup(e)
			return nil
		},
	})
}

// Serve serves gRPC on a Unix socket whose path it sets as the variable name, until the
// script ends.
func Serve(t *testing.T, e *testscript.Env, name string, register func(grpc.ServiceRegistrar)) {
	e.Setenv(name, filepath.Join(e.WorkDir, name+".sock"))
	l, err := net.Listen("unix", e.Getenv(name))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	register(srv)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	e.Defer(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
