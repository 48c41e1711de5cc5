package attest

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestParseStartTime(t *testing.T) {
	t.Parallel()
	rest := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"
	for name, tt := range map[string]struct {
		stat string
		want uint64
		ok   bool
	}{
		"plain":                {"42 (sleep)" + rest, 4711, true},
		"spaces and brackets":  {"42 (a) S 9 (b ) 1)" + rest, 4711, true},
		"line ends in command": {"42 (a\nb)" + rest + "\n", 4711, true},
		"empty":                {"", 0, false},
		"cut short":            {"42 (sleep) S 1 2", 0, false},
		"no number":            {"42 (sleep)" + strings.Replace(rest, "4711", "x", 1), 0, false},
		"no command":           {"42 sleep" + rest, 0, false},
	} {
		got, err := parseStartTime([]byte(tt.stat))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%s: got %d, %v", name, got, err)
		}
	}
}

func FuzzParseStartTime(f *testing.F) {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(stat))
	f.Add("1 (a ) (b) S")
	f.Add(")")
	f.Fuzz(func(t *testing.T, stat string) {
		want, err := parseStartTime([]byte(stat))
		// Whatever the command is called, the result is the same.
		if i := strings.LastIndexByte(stat, ')'); i >= 0 {
			got, again := parseStartTime([]byte("1 (x) y) z" + stat[i:]))
			if got != want || (again == nil) != (err == nil) {
				t.Errorf("%q: %d, %v; with another command: %d, %v", stat, want, err, got, again)
			}
		}
	})
}

// Where there is no pidfd, the start time tells a process from a later one
// with the same PID.
func TestAliveByStartTime(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := newPeer(cmd.Process.Pid, 0, 0)
	if err := p.byStartTime(); err != nil {
		t.Fatal(err)
	}
	if err := p.Alive(); err != nil {
		t.Errorf("while it runs: %v", err)
	}
	later := newPeer(cmd.Process.Pid, 0, 0)
	later.started = p.started - 1
	if err := later.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("another start time: %v, want ErrGone", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("after its end: %v, want ErrGone", err)
	}
}
