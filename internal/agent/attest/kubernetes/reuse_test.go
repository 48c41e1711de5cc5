package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
)

// A process dies while it is attested, and another process, in another pod, gets its PID.
// At whatever moment that happens, the caller's attestation fails, and the other process has
// its own selectors only. It needs root and a control group file system that can be written.
func TestReusedPID(t *testing.T) {
	if testing.Short() {
		t.Skip("starts 2,000 processes")
	}
	old, young := newGroup(t, webUID, id("c")), newGroup(t, newUID, id("8"))
	list := newKubelet(answers(listOf(t, map[string]string{webUID: "c", newUID: "8"})))
	var onRequest func()
	k := newKubelet(func(w http.ResponseWriter, r *http.Request) {
		if onRequest != nil {
			onRequest()
		}
		list.ServeHTTP(w, r)
	})
	cfg := overTLS(t, k, newAuthority(t), "node-1")
	a, err := kubernetes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { a.Close() }()
	reused := 0
	for round := range 1000 {
		first := start(t, old)
		caller, err := attest.FromPID(first.Process.Pid, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		var second *exec.Cmd
		swap := func() {
			onRequest = nil
			end(first)
			second = startWithPID(t, young, first.Process.Pid)
		}
		attestors := []attest.Attestor{a}
		switch round % 4 {
		case 0: // before the attestor reads
			attestors = []attest.Attestor{sequence{moment(swap), a}}
		case 1: // after it
			attestors = []attest.Attestor{sequence{a, moment(swap)}}
		case 2: // while the kubelet is asked: the attestor has read the control group
			a.Close()
			if a, err = kubernetes.New(cfg); err != nil {
				t.Fatal(err)
			}
			attestors, onRequest = []attest.Attestor{a}, swap
		case 3: // at any time
			done := make(chan struct{})
			go func() { defer close(done); swap() }()
			res, err := attest.Selectors(t.Context(), caller, attestors)
			// While it is exiting, cgroup v1 shows it at the root.
			if got := res.Selectors(); len(got) > 0 && (err != nil || !has(got, "pod-uid:"+webUID) || has(got, "pod-uid:"+newUID)) {
				t.Fatalf("round %d: the process that died has %v", round, got)
			}
			<-done
			attestors = []attest.Attestor{a}
		}
		res, err := attest.Selectors(t.Context(), caller, attestors)
		if !errors.Is(err, attest.ErrGone) || res != nil {
			t.Fatalf("round %d: the caller died: got %v, %v, want ErrGone", round, res, err)
		}
		if second.Process.Pid == first.Process.Pid {
			reused++
		}
		caller.Close()
		heir, err := attest.FromPID(second.Process.Pid, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		res, err = attest.Selectors(t.Context(), heir, []attest.Attestor{a})
		if got := res.Selectors(); err != nil || !has(got, "pod-uid:"+newUID) || has(got, "pod-uid:"+webUID) || has(got, "pod-label:app:c") {
			t.Fatalf("round %d: the process with its PID: %v, %v", round, got, err)
		}
		heir.Close()
		end(second)
	}
	t.Logf("the PID was reused in %d of 1,000 rounds", reused)
	if reused < 900 {
		t.Errorf("the PID was reused in %d of 1,000 rounds only", reused)
	}
}

// moment is an attestor that finds nothing and calls a function.
type moment func()

func (m moment) Name() string { return "moment" }
func (m moment) Attest(context.Context, *attest.Peer) ([]cache.Selector, error) {
	m()
	return nil, nil
}

// sequence is an attestor that calls others in turn.
type sequence []attest.Attestor

func (sequence) Name() string { return "sequence" }
func (s sequence) Attest(ctx context.Context, p *attest.Peer) (all []cache.Selector, failures error) {
	for _, a := range s {
		found, err := a.Attest(ctx, p)
		all, failures = append(all, found...), errors.Join(failures, err)
	}
	return all, failures
}

// newGroup makes a control group of a container below the test's own, and returns its
// file of processes.
func newGroup(t testing.TB, podUID, container string) (procs string) {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	// cgroup v2, or a hierarchy of v1.
	for line := range strings.Lines(string(own)) {
		for _, h := range []struct{ name, dir string }{{"0::", ""}, {":pids:", "pids"}, {":name=systemd:", "systemd"}} {
			_, path, ok := strings.Cut(strings.TrimSpace(line), h.name)
			base := filepath.Join("/sys/fs/cgroup", h.dir, path)
			if _, err := os.Stat(filepath.Join(base, "cgroup.procs")); !ok || err != nil {
				continue
			}
			node, err := os.MkdirTemp(base, "test*.slice")
			if err != nil {
				t.Skipf("no control group can be made: %v", err)
			}
			group := filepath.Join(node, "kubepods", fmt.Sprint("pod", podUID), container)
			if err := os.MkdirAll(group, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				for dir := group; dir != base && os.Remove(dir) == nil; dir = filepath.Dir(dir) {
				}
			})
			return filepath.Join(group, "cgroup.procs")
		}
	}
	t.Skip("no control group file system is mounted where it usually is")
	return ""
}

// start starts a process in a control group.
func start(t testing.TB, procs string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(procs, []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		end(cmd)
		t.Skipf("a process cannot be moved to a control group: %v", err)
	}
	return cmd
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill() // it may have ended
	_ = cmd.Wait()
}

// startWithPID starts a process in a control group with the PID, unless others take it
// each time.
func startWithPID(t *testing.T, procs string, pid int) *exec.Cmd {
	t.Helper()
	for range 20 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Skipf("a PID cannot be reused on purpose: %v", err)
		}
		cmd := start(t, procs)
		if cmd.Process.Pid == pid {
			return cmd
		}
		end(cmd)
	}
	return start(t, procs)
}

// The control group that the kernel shows is the one that is found.
func TestControlGroupOfProcess(t *testing.T) {
	cmd := start(t, newGroup(t, webUID, id("c")))
	defer end(cmd)
	view, err := cgroup.Self()
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.FromPID(cmd.Process.Pid, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if got, err := view.Read(p); err != nil || got != inPod(webUID, "c") {
		t.Errorf("got %+v, %v", got, err)
	}
}
