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

// selectorType is that of the demo's selectors: demo:workload:1 for the first
// workload, and demo:idle, which no process has.
const selectorType = "demo"

// fleet is the workloads: processes of this same program.
//
// It is also the agent's workload attestor. The usual one tells workloads
// apart by user, group and program, which are the same for all of these. What
// differs is the process, so this one goes by the process ID, which the kernel
// tells the agent for each connection like everything else about a caller.
type fleet struct {
	fail func(error) // told of a workload that ends by itself

	mu      sync.Mutex
	members []*member
	pids    map[int]int // process ID -> number of the workload, from 1
}

// member is one workload's process.
type member struct {
	cmd    *exec.Cmd
	orders io.WriteCloser
	stderr bytes.Buffer
	done   chan struct{}

	now condition // under fleet.mu
}

// stopTimeout is how long a workload may take to end before it is killed.
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

// workloadSelector is the selector of the n-th workload, without the type.
func workloadSelector(n int) string { return "workload:" + strconv.Itoa(n) }

// start starts one workload and has it connect to the agent.
func (f *fleet) start(socket string) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	m := &member{cmd: exec.Command(program, workloadArg), done: make(chan struct{})}
	m.cmd.Stderr = &m.stderr
	if m.orders, err = m.cmd.StdinPipe(); err != nil {
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
	// It connects only now that the agent can know it.
	return m.tell(order{Socket: socket})
}

// follow takes in what the workload says until it ends.
func (f *fleet) follow(n int, m *member, out io.Reader) {
	defer close(m.done)
	var err error
	for dec := json.NewDecoder(out); err == nil; {
		var c condition
		if err = dec.Decode(&c); err == nil {
			f.mu.Lock()
			m.now = c
			f.mu.Unlock()
		}
	}
	_, _ = io.Copy(io.Discard, out) // so that it can end
	if err := m.cmd.Wait(); err != nil {
		f.fail(fmt.Errorf("workload %d ended: %w: %s", n, err, strings.TrimSpace(m.stderr.String())))
	}
}

func (m *member) tell(o order) error {
	if err := json.NewEncoder(m.orders).Encode(o); err != nil {
		return fmt.Errorf("give a workload an order: %w", err)
	}
	return nil
}

// call has every workload call all the others.
func (f *fleet) call() error {
	conditions := f.conditions()
	var errs []error
	for i, m := range f.members {
		var peers []remote
		for j, c := range conditions {
			if j != i {
				peers = append(peers, remote{ID: c.ID, Address: c.Address})
			}
		}
		errs = append(errs, m.tell(order{Peers: peers}))
	}
	return errors.Join(errs...)
}

// stopCalls has no more calls made, while all still answer.
func (f *fleet) stopCalls() error {
	var errs []error
	for _, m := range f.members {
		errs = append(errs, m.tell(order{Stop: true}))
	}
	return errors.Join(errs...)
}

// conditions is what each workload said last.
func (f *fleet) conditions() []condition {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]condition, len(f.members))
	for i, m := range f.members {
		out[i] = m.now
	}
	return out
}

// count counts the workloads for which ok holds.
func (f *fleet) count(ok func(condition) bool) int {
	n := 0
	for _, c := range f.conditions() {
		if ok(c) {
			n++
		}
	}
	return n
}

// all reports whether ok holds for every workload.
func (f *fleet) all(ok func(condition) bool) bool { return f.count(ok) == len(f.members) }

// total adds the workloads up.
func (f *fleet) total() condition {
	var t condition
	for _, c := range f.conditions() {
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
		m.orders.Close()
	}
	deadline := time.After(stopTimeout)
	for _, m := range f.members {
		select {
		case <-m.done:
		case <-deadline:
			_ = m.cmd.Process.Kill()
			<-m.done
			deadline = time.After(0) // nor do the others get longer
		}
	}
}
