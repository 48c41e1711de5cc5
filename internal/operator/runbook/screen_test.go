package runbook_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hinshun/vt10x"

	"github.com/renewd/renewd/internal/operator/runbook"
)

var update = flag.Bool("update", false, "write the transcripts")

// terminal is an emulated terminal, with two lines of history before the command.
type terminal struct {
	vt10x.Terminal
	columns, rows int
}

func newTerminal(columns, rows int, command string) *terminal {
	t := &terminal{vt10x.New(vt10x.WithSize(columns, rows)), columns, rows}
	_, _ = fmt.Fprintf(t, "$ echo before\r\nbefore\r\n$ %s\r\n", command)
	return t
}

// Write is what a terminal makes of a program's output: a line feed also returns.
func (t *terminal) Write(b []byte) (int, error) {
	if _, err := t.Terminal.Write([]byte(strings.ReplaceAll(strings.ReplaceAll(string(b), "\r\n", "\n"), "\n", "\r\n"))); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (t *terminal) size() (int, int) { return t.columns, t.rows }

// screen returns what a person sees.
func (t *terminal) screen() string {
	lines := strings.Split(t.String(), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n") + "\n"
}

// frames collects screens for a transcript.
type frames struct{ strings.Builder }

func (f *frames) add(title string, t *terminal) {
	fmt.Fprintf(f, "== %s\n%s", title, t.screen())
}

func (f *frames) compare(t *testing.T, name string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(f.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if f.String() != string(want) {
		t.Errorf("%s differs (write it with -update):\n%s", path, f.String())
	}
}

// TestTranscripts shows a wait and a rotation of 50 agents, some of them late for each
// reason, as a person sees them.
func TestTranscripts(t *testing.T) {
	t.Parallel()
	for _, size := range [][2]int{{80, 24}, {120, 40}} {
		columns, rows := size[0], size[1]
		t.Run(fmt.Sprintf("wait %dx%d", columns, rows), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := taintedCrowd(time.Now())
				term := newTerminal(columns, rows, "keysetctl wait "+oldID)
				var out frames
				stop := watch(t, &out, term, "after ", 2*time.Second, 25*time.Second, 100*time.Second, 570*time.Second)
				r, err := runbook.Wait(t.Context(), c, oldID, runbook.WaitOptions{Progress: &runbook.Screen{W: term, Size: term.size}})
				if err != nil {
					t.Fatal(err)
				}
				stop()
				_, _ = fmt.Fprintf(term, "%s\n%s\n$ ", r, strings.Join(r.Remarks, "\n"))
				out.add("the end", term)
				out.compare(t, fmt.Sprintf("wait-%dx%d.txt", columns, rows))
			})
		})
		t.Run(fmt.Sprintf("rotate %dx%d", columns, rows), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(time.Now())
				term := newTerminal(columns, rows, "keysetctl rotate --yes")
				var out frames
				stop := watch(t, &out, term, "after ", time.Second, 25*time.Second, 41*time.Second, 61*time.Second, 85*time.Second)
				screen := &runbook.Screen{W: term, Size: term.size}
				r, err := runbook.Rotate(t.Context(), c, runbook.RotateOptions{Wait: runbook.WaitOptions{Progress: screen}, Report: func(d runbook.StepResult) {
					screen.Line(d.String())
				}})
				if err != nil {
					t.Fatal(err)
				}
				stop()
				_, _ = fmt.Fprintf(term, "The rotation is complete: %s is active.\n$ ", r.Active)
				out.add("the end", term)
				out.compare(t, fmt.Sprintf("rotate-%dx%d.txt", columns, rows))
			})
		})
	}
}

// watch adds a screen at each time. The function that it returns ends it.
func watch(t *testing.T, out *frames, term *terminal, title string, at ...time.Duration) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	begin := time.Now()
	go func() {
		defer close(done)
		for _, d := range at {
			select {
			case <-ctx.Done():
				return
			case <-time.After(d - time.Since(begin) + 100*time.Millisecond):
				synctest.Wait()
				out.add(title+d.String(), term)
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}
