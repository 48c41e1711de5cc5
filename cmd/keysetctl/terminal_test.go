package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/runbook"
	"github.com/renewd/renewd/internal/runbook/runbooktest"
)

// On a terminal a rotation asks before each step, and Error is red there.
func TestRotateOnATerminal(t *testing.T) {
	t.Parallel()
	for answers, want := range map[string]struct {
		code  int
		steps int
		shown []string
	}{
		"y\ny\nyes\ny\n": {0, 4, []string{"Prepare a new keyset? It is published and does not sign yet. [y/N] ", "This is permanent. [y/N] "}},
		"y\nn\n":         {1, 1, []string{"and ks_", " steps down. [y/N] ", "\x1b[31mError:\x1b[0m stopped as asked"}},
	} {
		master, slave := openTerminal(t)
		if _, err := io.WriteString(master, answers); err != nil {
			t.Fatal(err)
		}
		s := runbooktest.NewServer(t)
		var out bytes.Buffer
		code := run(t.Context(), []string{"rotate"}, func(string) string { return "" }, slave, &out, slave,
			func(context.Context, target) (runbook.Backend, io.Closer, error) { return s, io.NopCloser(nil), nil })
		_ = slave.Close()
		shown, _ := io.ReadAll(master) // ends with EIO when nobody has the terminal open
		if code != want.code || len(s.Calls()) != want.steps {
			t.Errorf("%q: exit %d after %v\n%s", answers, code, s.Calls(), shown)
		}
		for _, text := range want.shown {
			if !strings.Contains(string(shown), text) {
				t.Errorf("%q: %q is not shown in\n%s", answers, text, shown)
			}
		}
	}
}

// An interrupt at a question ends the program, although nobody answers.
func TestInterruptAtAQuestion(t *testing.T) {
	t.Parallel()
	_, slave := openTerminal(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupt signal received"))
	p := &program{stdin: slave, stderr: io.Discard}
	if yes, err := p.asker(ctx, nil)("Go on?"); yes || err == nil || err.Error() != "interrupt signal received" {
		t.Errorf("%v, %v", yes, err)
	}
}

// openTerminal makes a pseudo-terminal (pty(7)).
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close() })
	return master, slave
}
