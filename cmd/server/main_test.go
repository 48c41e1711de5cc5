package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"server": main})
}

// TestScripts runs the command lines in testdata/script against operator services: a
// server during a rotation on the socket $ADMIN, one that cannot sign on $SICK, and one
// that rejects everything on $STRICT.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(e *testscript.Env) error {
			// A race-built program otherwise sleeps for a second before it exits.
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			for name, service := range map[string]api.OperatorServer{"ADMIN": newFake(), "SICK": &fake{}, "STRICT": strict{}} {
				e.Setenv(name, filepath.Join(e.WorkDir, name+".sock"))
				serveOperator(t, e, e.Getenv(name), service)
			}
			for name, file := range map[string]string{"EXAMPLE": "server.example.yaml", "ENTRIES": "entries.example.yaml"} {
				path, err := filepath.Abs(filepath.Join("..", "..", "deploy", file))
				if err != nil {
					return err
				}
				e.Setenv(name, path)
			}
			return nil
		},
	})
}

func serveOperator(t *testing.T, e *testscript.Env, path string, service api.OperatorServer) {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	api.RegisterOperatorServer(srv, service)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	e.Defer(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestOutputError: a write to a closed pipe is a failure.
func TestOutputError(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	defer func() { _ = w.Close() }()
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"version"}, noEnv, w, &stderr); code != cli.ExitFailed {
		t.Errorf("exit %d, stderr %q", code, stderr.String())
	}
}

func noEnv(string) string { return "" }
