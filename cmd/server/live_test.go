package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/cli"
)

// live is a server that runs in this process, on a store of its own.
type live struct{ socket string }

// newLive starts a server of example.org, which stops with the test.
func newLive(t testing.TB) *live {
	t.Helper()
	dir, err := os.MkdirTemp("", "rn") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &live{filepath.Join(dir, "admin.sock")}
	file := func(name string) string { return filepath.Join(dir, name) }
	config := fmt.Sprintf(`{trust_domain: example.org, data_dir: %s, key_file: %s, admin_socket: %s, metrics: {address: '127.0.0.1:0'},
  deployments: {default: {listen_address: '127.0.0.1:0'}}, log: {level: error}}`, file("data"), file("key"), l.socket)
	if err := os.WriteFile(file("server.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := l.run("", "key", "new", file("key")); code != 0 {
		t.Fatal(out)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		var out bytes.Buffer
		if code := program.Run(ctx, []string{"run", "--config", file("server.yaml")}, cli.Env{Getenv: noEnv, Stdout: &out, Stderr: &out}); code != 0 {
			t.Errorf("the server ended with status %d: %s", code, &out)
		}
	}()
	t.Cleanup(func() { stop(); <-done })
	if out, code := l.run("", "entries", "list", "-admin-socket", l.socket); code != 0 { // waits for the server
		t.Fatal(out)
	}
	return l
}

// run runs a command and returns what it prints, to both streams, and its status.
func (l *live) run(stdin string, args ...string) (out string, code int) {
	var b bytes.Buffer
	code = program.Run(context.Background(), args, cli.Env{Getenv: noEnv, Stdin: strings.NewReader(stdin), Stdout: &b, Stderr: &b})
	return b.String(), code
}

// entries runs a command for entries and returns what it prints to standard output.
func (l *live) entries(stdin string, args ...string) (stdout string, code int) {
	var b bytes.Buffer
	args = append([]string{"entries"}, append(args, "-admin-socket", l.socket)...)
	code = program.Run(context.Background(), args, cli.Env{Getenv: noEnv, Stdin: strings.NewReader(stdin), Stdout: &b, Stderr: io.Discard})
	return b.String(), code
}
