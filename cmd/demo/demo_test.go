package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// TestMain lets this test binary run as a workload.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == workloadArg {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}
	if os.Getenv("DEMO_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// fastSettings are those of --svids 30 --max-delay 500ms -o json, with more frequent bundle
// refreshes.
func fastSettings(t *testing.T) settings {
	t.Helper()
	s, err := parse([]string{"--svids", "30", "--max-delay", "500ms", "-o", "json"})
	if err != nil {
		t.Fatal(err)
	}
	s.refresh, s.pause = 200*time.Millisecond, 300*time.Millisecond
	return s
}

// output is a standard error that several goroutines write to.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// checkCleanup checks at the end of the test that no file, process or goroutine is left.
func checkCleanup(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left in the temporary directory: %v (%v)", left, err)
		}
		if left := children(t); len(left) != 0 {
			t.Errorf("processes left: %q", left)
		}
		// Libraries end some goroutines a moment after Close returns.
		for end := time.Now().Add(time.Minute); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), stacks[:runtime.Stack(stacks, true)])
			}
		}
	})
}

// children lists the child processes.
func children(t *testing.T) (found []string) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range stats {
		// proc_pid_stat(5): pid (comm) state ppid ...
		stat, _ := os.ReadFile(name)
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 && fields[1] == fmt.Sprint(os.Getpid()) {
			found = append(found, string(stat))
		}
	}
	return found
}

func decode(t *testing.T, stdout []byte) Report {
	t.Helper()
	var r Report
	dec := json.NewDecoder(bytes.NewReader(stdout))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		t.Fatalf("standard output is no report: %v\n%s", err, stdout)
	}
	if dec.More() {
		t.Errorf("more than one JSON document:\n%s", stdout)
	}
	return r
}

func TestRotation(t *testing.T) {
	checkCleanup(t)
	var stdout bytes.Buffer
	var stderr output
	s := fastSettings(t)
	s.verbose = true // a broken promise is shown with the logs of server and agent
	if code := play(t.Context(), s, &stdout, &stderr); code != cli.ExitOK {
		t.Errorf("exit status %d\n%s%s", code, &stderr, &stdout)
	}
	r := decode(t, stdout.Bytes())
	if !r.OK || len(r.Broken) != 0 || r.SVIDs != 30 || r.Workloads != 5 || r.Failed != 0 || r.LongestGap != 0 || r.Stuck != "" {
		t.Errorf("report: %+v", r)
	}
	if r.Handshakes < 100 {
		t.Errorf("%d handshakes: too few", r.Handshakes)
	}
	if r.Renewals != 31 {
		t.Errorf("%d renewals of 30 SVIDs and the agent SVID", r.Renewals)
	}
	times := []*Seconds{r.Seen, r.FirstRenewal, r.InUse, r.Settled}
	if slices.Contains(times, nil) || !slices.IsSortedFunc(times, func(a, b *Seconds) int { return int((*a - *b) * 1000) }) {
		t.Errorf("not in order or missing: seen %v, first renewal %v, in use %v, settled %v", times[0], times[1], times[2], times[3])
	} else if took := *r.Settled - *r.FirstRenewal; took < 1.4 {
		t.Errorf("31 renewals took %v s: 20 a second would take 1.5", took)
	}
	if !r.JWT.SameDuringTaint || r.JWT.AfterRemoval != "replaced" || r.JWT.Replaced == nil {
		t.Errorf("JWT-SVIDs: %+v", r.JWT)
	}
	if x, j := r.SafeToRemove[0], r.SafeToRemove[1]; !x.Safe || x.After == nil || *x.After != *r.Settled ||
		j.Safe || j.NotBefore == nil || time.Until(*j.NotBefore) < 23*time.Hour {
		t.Errorf("safe to remove: %+v", r.SafeToRemove)
	}
	for _, step := range []string{"PREPARE", "ACTIVATE", "TAINT", "WAIT", "REMOVE"} {
		if !strings.Contains(stderr.String(), step) {
			t.Errorf("no %s in the timeline:\n%s", step, &stderr)
		}
	}
	if strings.ContainsAny(stderr.String(), "\r\x1b") {
		t.Error("control sequences without a terminal")
	}
}

// The demo detects an agent that renews faster than promised.
func TestBrokenPromise(t *testing.T) {
	checkCleanup(t)
	s := fastSettings(t)
	s.svids, s.rate, s.json = 120, 1000, false
	var stdout, stderr bytes.Buffer
	if code := play(t.Context(), s, &stdout, &stderr); code != cli.ExitFailed {
		t.Errorf("exit status %d", code)
	}
	if got := stderr.String(); got != "demo: broken promise: rate\n" {
		t.Errorf("standard error: %q", got)
	}
	for _, want := range []string{"BROKEN  rate", "held    no-gap", "1 of 8 promises broken."} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, &stdout)
		}
	}
}

// writer calls a function when a text has been written.
type writer struct {
	bytes.Buffer
	text string
	then func()
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.then()
	}
	return n, err
}

func TestInterrupt(t *testing.T) {
	for _, when := range []string{"has joined", "call each other", "waits"} {
		t.Run(when, func(t *testing.T) {
			checkCleanup(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var stderr bytes.Buffer
			s := fastSettings(t)
			s.json = false
			if code := play(ctx, s, &writer{text: when, then: cancel}, &stderr); code != exitInterrupted {
				t.Errorf("exit status %d, want 130\n%s", code, &stderr)
			}
		})
	}
}

// SIGPIPE of a broken connection does not end the demo. A closed output, as in "demo | head",
// does.
func TestOutputClosed(t *testing.T) {
	checkCleanup(t)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--svids", "5")
	cmd.Env = append(os.Environ(), "DEMO_MAIN=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	until := func(text string) {
		for lines.Scan() {
			if strings.Contains(lines.Text(), text) {
				return
			}
		}
		t.Errorf("ended without %q", text)
	}
	until("has joined")
	if err := cmd.Process.Signal(syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	until("PREPARE")
	out.Close()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
		t.Errorf("exit status %d, want 130\n%s", code, &stderr)
	}
}

// If a workload dies, the demo ends with its error.
func TestWorkloadDies(t *testing.T) {
	checkCleanup(t)
	s := fastSettings(t)
	s.json = false
	out := &writer{text: "PREPARE"}
	out.then = func() {
		out.text = "never written"
		pid := 0
		fmt.Sscan(children(t)[0], &pid)
		if p, err := os.FindProcess(pid); err == nil {
			p.Kill()
		}
	}
	var stderr bytes.Buffer
	if code := play(t.Context(), s, out, &stderr); code != cli.ExitFailed {
		t.Errorf("exit status %d", code)
	}
	if !strings.Contains(stderr.String(), "ended: signal: killed") {
		t.Errorf("standard error: %s", &stderr)
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"-h", cli.ExitOK, "Usage:"},
		{"--svids 4", cli.ExitPermanent, "--svids is 4: use 5"},
		{"--svids 20001", cli.ExitPermanent, "--svids is 20001"},
		{"--svids many", cli.ExitPermanent, `invalid value "many"`},
		{"--max-delay 0", cli.ExitPermanent, "--max-delay is 0s"},
		{"--max-delay 2h", cli.ExitPermanent, "--max-delay is 2h0m0s"},
		{"-o yaml", cli.ExitPermanent, `-o is "yaml": use text or json`},
		{"-x", cli.ExitPermanent, "not defined: -x"},
		{"-\x1b[2J", cli.ExitPermanent, "not defined: -\uFFFD[2J"},
		{"workload now", cli.ExitPermanent, `unexpected argument "workload"`},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(c.args), &stdout, &stderr)
		if out := stdout.String() + stderr.String(); code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("demo %s: exit status %d, want %d, with %q:\n%s", c.args, code, c.code, c.want, out)
		}
	}
}
