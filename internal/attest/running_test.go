package attest_test

import (
	"testing"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/attest"
)

// A process is running until it has ended, reaped or not. One that started at another
// time under its PID is not it.
func TestRunning(t *testing.T) {
	t.Parallel()
	cmd, conn, end := workload(t)
	p, err := attest.FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	process := p.Process()
	if process.PID != cmd.Process.Pid || process.Started == 0 {
		t.Fatalf("got %+v, want PID %d and when it started", process, cmd.Process.Pid)
	}
	other := process
	other.Started++
	unknown := cache.Process{PID: process.PID}
	check := func(when string, alive bool) {
		t.Helper()
		if attest.Running(process) != alive {
			t.Errorf("%s: running %v, want %v", when, !alive, alive)
		}
		if attest.Running(other) {
			t.Errorf("%s: a process that started at another time is running", when)
		}
		if !attest.Running(unknown) {
			t.Errorf("%s: a process whose start time is not known has ended", when)
		}
	}
	check("while it runs", true)
	end()
	waitGone(t, p)
	check("as a zombie", false)
	_ = cmd.Wait() // ended
	check("after it was reaped", false)
	if p.Process() != process {
		t.Errorf("its name has changed from %+v to %+v", process, p.Process())
	}
}

// A process that is looked at for the first time after its end has no start time: by
// then it may be that of another process with the PID.
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
