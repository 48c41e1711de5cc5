package attest_test

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// A process is running or stopped until it has exited, reaped or not. A process with
// the same PID and another start time is another one.
func TestLife(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	process := p.Process()
	if process.PID != cmd.Process.Pid || process.Started == 0 {
		t.Fatalf("got %+v, want PID %d and its start time", process, cmd.Process.Pid)
	}
	other := process
	other.Started++
	unknown := cache.Process{PID: process.PID}
	check := func(when string, want cache.Life) {
		t.Helper()
		if got := attest.Life(process); got != want {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
		if got := attest.Life(other); got != cache.Ended {
			t.Errorf("%s: a process that started at another time: %v", when, got)
		}
		if got := attest.Life(unknown); got != cache.Running {
			t.Errorf("%s: a process whose start time is not known: %v", when, got)
		}
	}
	check("while it runs", cache.Running)
	signal := func(sig os.Signal, want cache.Life) {
		t.Helper()
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		// kill(2) returns before every thread of the process has handled the signal.
		for deadline := time.Now().Add(time.Minute); attest.Life(process) != want && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
	}
	signal(syscall.SIGSTOP, cache.Stopped)
	check("while it is stopped", cache.Stopped)
	signal(syscall.SIGCONT, cache.Running)
	check("after it was resumed", cache.Running)
	end()
	waitGone(t, p)
	check("as a zombie", cache.Ended)
	_ = cmd.Wait() // ended
	check("after it was reaped", cache.Ended)
	if p.Process() != process {
		t.Errorf("its identity has changed from %+v to %+v", process, p.Process())
	}
}

// A process whose start time was not read before it exited has none: /proc may show
// that of another process with the same PID.
func TestProcessThatHasEnded(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	end()
	waitGone(t, p)
	_ = cmd.Wait() // ended
	reusePID(t, cmd.Process.Pid)
	if got, want := p.Process(), (cache.Process{PID: cmd.Process.Pid}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
