package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// selectorType is the type of the demo's selectors: demo:workload:1 for the first workload,
// and demo:idle, which no process has.
const selectorType = "demo"

// fleet runs the workloads, which are processes of this program.
//
// It is also the agent's workload attestor, by process ID: the workloads have the same user,
// group and program, so the unix attestor cannot distinguish them.
type fleet struct {
	fail func(error) // called when a workload ends unexpectedly

	mu      sync.Mutex
	members []*member
	pids    map[int]int // process ID -> number of the workload, from 1
}

// member is one workload's process.
type member struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser // commands
	stderr bytes.Buffer
	done   chan struct{}

	state workloadState // under fleet.mu
}

// stopTimeout is the time after which workloads are killed.
const stopTimeout = 5 * time.Second

// Name implements attest.Attestor.
func (f *fleet) Name() string { return selectorType }

// Attest implements attest.Attestor.
func (f *fleet) Attest(_ context.Context, p *attest.Peer) ([]cache.Selector, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, ok := f.pids[p.PID()]
	if !ok {
		return nil, nil
	}
	return []cache.Selector{{Type: selectorType, Value: workloadSelector(n)}}, nil
}

// workloadSelector returns the selector value of the n-th workload.
func workloadSelector(n int) string { return "workload:" + strconv.Itoa(n) }

// start starts a workload and connects it to the agent.
func (f *fleet) start(socket string) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this executable: %w", err)
	}
	m := &member{cmd: exec.Command(program, workloadArg), done: make(chan struct{})}
	m.cmd.Stderr = &m.stderr
	if m.stdin, err = m.cmd.StdinPipe(); err != nil {
		return fmt.Errorf("start a workload: %w", err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start a workload: %w", err)
	}
	if err := m.cmd.Start(); err != nil {
		return fmt.Errorf("start a workload: %w", err)
	}
	f.mu.Lock()
	f.members = append(f.members, m)
	n := len(f.members)
	if f.pids == nil {
		f.pids = make(map[int]int)
	}
	f.pids[m.cmd.Process.Pid] = n
	f.mu.Unlock()
	go f.follow(n, m, out)
	// Connect only after its PID is known to Attest.
	return m.send(command{Socket: socket})
}

// follow reads the workload's state until it ends.
func (f *fleet) follow(n int, m *member, out io.Reader) {
	defer close(m.done)
	var err error
	for dec := json.NewDecoder(out); err == nil; {
		var c workloadState
		if err = dec.Decode(&c); err == nil {
			f.mu.Lock()
			m.state = c
			f.mu.Unlock()
		}
	}
	_, _ = io.Copy(io.Discard, out) // lets it end
	if err := m.cmd.Wait(); err != nil {
		f.fail(fmt.Errorf("workload %d ended: %w: %s", n, err, strings.TrimSpace(m.stderr.String())))
	}
}

func (m *member) send(c command) error {
	if err := json.NewEncoder(m.stdin).Encode(c); err != nil {
		return fmt.Errorf("send a command to a workload: %w", err)
	}
	return nil
}

// call lets every workload call all others.
func (f *fleet) call() error {
	states := f.states()
	var errs []error
	for i, m := range f.members {
		var peers []remote
		for j, c := range states {
			if j != i {
				peers = append(peers, remote{ID: c.ID, Address: c.Address})
			}
		}
		errs = append(errs, m.send(command{Peers: peers}))
	}
	return errors.Join(errs...)
}

// stopCalls ends the calls. All workloads still answer.
func (f *fleet) stopCalls() error {
	var errs []error
	for _, m := range f.members {
		errs = append(errs, m.send(command{Stop: true}))
	}
	return errors.Join(errs...)
}

// states returns the last state of each workload.
func (f *fleet) states() []workloadState {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]workloadState, len(f.members))
	for i, m := range f.members {
		out[i] = m.state
	}
	return out
}

// count counts the workloads for which ok holds.
func (f *fleet) count(ok func(workloadState) bool) int {
	n := 0
	for _, c := range f.states() {
		if ok(c) {
			n++
		}
	}
	return n
}

// all reports whether ok holds for every workload.
func (f *fleet) all(ok func(workloadState) bool) bool { return f.count(ok) == len(f.members) }

// total returns the totals of all workloads.
func (f *fleet) total() workloadState {
	var t workloadState
	for _, c := range f.states() {
		t.Calls += c.Calls
		t.Failures += c.Failures
		t.JWTChanges += c.JWTChanges
		t.JWTFailures += c.JWTFailures
		t.LongestGap = max(t.LongestGap, c.LongestGap)
		t.FirstFailure = cmp.Or(t.FirstFailure, c.FirstFailure)
	}
	return t
}

// close ends all workloads and waits for them.
func (f *fleet) close() {
	for _, m := range f.members {
		m.stdin.Close()
	}
	deadline := time.After(stopTimeout)
	for _, m := range f.members {
		select {
		case <-m.done:
		case <-deadline:
			_ = m.cmd.Process.Kill()
			<-m.done
			deadline = time.After(0) // for the others as well
		}
	}
}
