package attest

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/cache"
)

func TestParseStat(t *testing.T) {
	t.Parallel()
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"
	state := func(state, threads string) string {
		return "42 (sleep)" + strings.NewReplacer(" S ", " "+state+" ", " 17 ", " "+threads+" ").Replace(rest)
	}
	for name, tt := range map[string]struct {
		stat string
		want uint64
		life cache.Life
		ok   bool
	}{
		"plain":                   {"42 (sleep)" + rest, 4711, cache.Running, true},
		"spaces and brackets":     {"42 (a) S 9 (b ) 1)" + rest, 4711, cache.Running, true},
		"line ends in command":    {"42 (a\nb)" + rest + "\n", 4711, cache.Running, true},
		"zombie":                  {state("Z", "1"), 4711, cache.Ended, true},
		"zombie being reaped":     {state("X", "0"), 4711, cache.Ended, true},
		"main thread has ended":   {state("Z", "2"), 4711, cache.Running, true},
		"a command like a zombie": {"42 (x) Z 1)" + rest, 4711, cache.Running, true},
		"stopped":                 {state("T", "3"), 4711, cache.Stopped, true},
		"stopped by a tracer":     {state("t", "1"), 4711, cache.Stopped, true},
		"one thread":              {state("R", "1"), 4711, cache.Running, true},
		"empty":                   {"", 0, cache.Running, false},
		"cut short":               {"42 (sleep) S 1 2", 0, cache.Running, false},
		"no number":               {"42 (sleep)" + strings.Replace(rest, "4711", "x", 1), 0, cache.Running, false},
		"no command":              {"42 sleep" + rest, 0, cache.Running, false},
	} {
		got, life, err := parseStat([]byte(tt.stat))
		if got != tt.want || life != tt.life || (err == nil) != tt.ok {
			t.Errorf("%s: got %d, %v, %v", name, got, life, err)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(stat))
	f.Add("1 (a ) (b) S")
	f.Add(")")
	f.Fuzz(func(t *testing.T, stat string) {
		want, life, err := parseStat([]byte(stat))
		// The result is the same for every name of the command.
		if i := strings.LastIndexByte(stat, ')'); i >= 0 {
			got, lifeToo, again := parseStat([]byte("1 (x) y) z" + stat[i:]))
			if got != want || life != lifeToo || (again == nil) != (err == nil) {
				t.Errorf("%q: %d, %v; with another command: %d, %v", stat, want, err, got, again)
			}
		}
	})
}

// Without a pidfd, the start time distinguishes a process from a later one with the
// same PID.
func TestAliveByStartTime(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := newPeer(cmd.Process.Pid, 0, 0)
	if err := p.recordStartTime(); err != nil {
		t.Fatal(err)
	}
	if err := p.Alive(); err != nil {
		t.Errorf("while it runs: %v", err)
	}
	later := newPeer(cmd.Process.Pid, 0, 0)
	later.startedAt = p.startedAt - 1
	if err := later.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("another start time: %v, want ErrGone", err)
	}
	cmd.Process.Kill()
	waitZombie(t, p)
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("as a zombie: %v, want ErrGone", err)
	}
	cmd.Wait()
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("after it was reaped: %v, want ErrGone", err)
	}
}

// waitZombie waits until a process has exited, without reaping it.
func waitZombie(t *testing.T, p *Peer) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile(p.Proc("stat"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(stat), ") Z ") {
			return
		}
	}
	t.Fatal("the process does not exit")
}

// A process that /proc hides does not count as exited, and the error names the remedy.
func TestHiddenProcess(t *testing.T) {
	t.Parallel()
	p, err := FromPID(os.Getpid(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.proc = t.TempDir() + "/" // as with hidepid=2
	if _, err := p.ReadProc("status", nil, 100); err == nil || errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "hidepid") {
		t.Errorf("ReadProc: %v, want an error that names hidepid", err)
	}
	if _, err := p.OpenExecutable(); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("OpenExecutable: %v, want another error than ErrGone", err)
	}
	for cause, want := range map[error]string{unix.EPERM: "hidepid", unix.EACCES: "hidepid", unix.EIO: "input/output error"} {
		if err := p.procError("read", "status", cause); !errors.Is(err, cause) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %q in it", cause, err, want)
		}
	}
}
