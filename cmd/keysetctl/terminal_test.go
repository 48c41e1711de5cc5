package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

// On a terminal a rotation asks before each step, and errors are red. Text that was
// typed before a question does not answer it.
func TestRotateOnATerminal(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before  string // typed before the first question
		answers []string
		code    int
		steps   int
		shown   []string
	}{
		"yes": {"", []string{"y\n", "y\n", "yes\n", "y\n"}, 0, 4,
			[]string{"Prepare a new keyset? It is published, but does not sign. [y/N] ", "This cannot be undone. [y/N] "}},
		"no":             {"", []string{"y\n", "n\n"}, 1, 1, []string{" It then signs instead of ks_", "[y/N] ", "\x1b[31mError:\x1b[0m stopped before this step"}},
		"the end":        {"", []string{"y\n", "\x04"}, 1, 1, []string{"\x1b[31mError:\x1b[0m stopped before this step"}},
		"yes too early":  {"y\ny\ny\ny\n", []string{"n\n"}, 1, 0, nil},
		"no, and thrice": {"n\n", []string{"y\n", "n\nn\nn\n"}, 1, 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			master, slave := openTerminal(t)
			if _, err := io.WriteString(master, tt.before); err != nil {
				t.Fatal(err)
			}
			arrived(t, slave, tt.before)
			s := runbooktest.NewServer(t)
			var out bytes.Buffer
			code := make(chan int, 1)
			go func() {
				code <- run(t.Context(), []string{"rotate"}, func(string) string { return "" }, slave, &out, slave,
					func(context.Context, target) (runbook.Backend, io.Closer, error) { return s, io.NopCloser(nil), nil })
				_ = slave.Close() // reading its master ends with EIO then
			}()
			var shown strings.Builder
			for part := make([]byte, 256); ; {
				n, err := master.Read(part)
				shown.Write(part[:n])
				if asked := strings.Count(shown.String(), "[y/N] "); asked > len(tt.answers) {
					t.Fatalf("asked %d times\n%s", asked, shown.String())
				} else if asked > 0 && strings.HasSuffix(shown.String(), "[y/N] ") {
					if _, err := io.WriteString(master, tt.answers[asked-1]); err != nil {
						t.Fatal(err)
					}
				}
				if err != nil {
					break
				}
			}
			if got := <-code; got != tt.code || len(s.Calls()) != tt.steps {
				t.Errorf("exit %d after %v\n%s", got, s.Calls(), shown.String())
			}
			for _, text := range tt.shown {
				if !strings.Contains(shown.String(), text) {
					t.Errorf("%q is not shown in\n%s", text, shown.String())
				}
			}
		})
	}
}

// arrived returns when the typed lines can be read.
func arrived(t *testing.T, slave *os.File, typed string) {
	t.Helper()
	want := strings.LastIndex(typed, "\n") + 1
	for deadline := time.Now().Add(2 * time.Minute); ; runtime.Gosched() {
		n, err := unix.IoctlGetInt(int(slave.Fd()), unix.TIOCINQ)
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%d bytes of %q have arrived, %v", n, typed, err)
		}
		if n >= want {
			return
		}
	}
}

// An interrupt ends the program while it waits for an answer.
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
