package runbook_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hinshun/vt10x"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
)

var update = flag.Bool("update", false, "write the transcripts")

// terminal is an emulated terminal, with two lines of history before the command.
type terminal struct {
	vt10x.Terminal
	mu            sync.Mutex // guards the following, as a resize comes at any time
	columns, rows int
}

func newTerminal(columns, rows int, command string) *terminal {
	t := &terminal{Terminal: vt10x.New(vt10x.WithSize(columns, rows)), columns: columns, rows: rows}
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

func (t *terminal) size() (int, int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.columns, t.rows
}

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

// A block follows the size of the terminal, and leaves what was there before the command.
func TestResize(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := taintedCrowd(time.Now())
		term := newTerminal(120, 40, "keysetctl wait "+oldID)
		resize := func(columns, rows int) {
			term.mu.Lock()
			term.columns, term.rows = columns, rows
			term.mu.Unlock()
			term.Resize(columns, rows)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := runbook.Wait(ctx, c, oldID, runbook.WaitOptions{Interval: time.Minute, Progress: &runbook.Screen{W: term, Size: term.size}})
			done <- err
		}()
		for _, size := range [][2]int{{120, 40}, {80, 24}, {20, 6}, {200, 60}, {79, 23}} {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			resize(size[0], size[1])
			time.Sleep(time.Second)
			synctest.Wait()
			seen := term.screen()
			if strings.Count(seen, "Step 4 of 5") != 1 || strings.Contains(seen, "·") != (size[1] >= 24) {
				t.Errorf("%v:\n%s", size, seen)
			}
		}
		cancel()
		<-done
		if seen := term.screen(); strings.Contains(seen, "Step") || !strings.HasSuffix(seen, "$ keysetctl wait ks_\n") { // cut when the terminal had 20 columns
			t.Errorf("not erased at the end:\n%s", seen)
		}
	})
}

// A block fits every terminal: no line is wider, none is cut without an ellipsis, and the
// line before it stays. Without UTF-8 all characters are ASCII.
func TestBlockFits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := &named{taintedCrowd(time.Now())}
		time.Sleep(30 * time.Second)
		for _, columns := range []int{1, 2, 7, 19, 20, 40, 79, 80, 119, 120, 200} {
			for _, rows := range []int{1, 2, 5, 10, 24, 60} {
				for _, plain := range []bool{false, true} {
					var out strings.Builder
					screen := &runbook.Screen{W: &out, Size: func() (int, int) { return columns, rows }, Plain: plain}
					_, _ = runbook.Wait(t.Context(), c, oldID, runbook.WaitOptions{Timeout: time.Nanosecond, Progress: screen})
					text := regexp.MustCompile(`\x1b\[[0-9?]*[A-Za-z]`).ReplaceAllString(out.String(), "")
					lines := strings.Split(strings.TrimRight(strings.TrimLeft(text, "\r"), "\r"), "\r\n")
					if len(lines) > max(1, rows-1) {
						t.Fatalf("%dx%d: %d lines", columns, rows, len(lines))
					}
					for _, line := range lines {
						if w := cli.Width(line); w > columns {
							t.Fatalf("%dx%d: %d columns: %q", columns, rows, w, line)
						}
						if i := strings.IndexFunc(line, func(r rune) bool { return r > '~' }); plain && i >= 0 && !strings.Contains(line, "測試") {
							t.Fatalf("%dx%d: %q is not ASCII", columns, rows, line)
						}
					}
				}
			}
		}
	})
}

// named is a crowd with a hostname of wide characters.
type named struct{ *crowd }

func (n *named) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	holders, err := n.crowd.Holders(ctx, id)
	for i := range holders {
		if holders[i].Reason == "duplicated" {
			holders[i].Hostname = strings.Repeat("測試", 20)
		}
	}
	return holders, err
}
