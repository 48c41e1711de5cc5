package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
)

// nodeList is the handwritten list's first pod n times, under UIDs and container IDs of
// their own, with annotations up to some 10 kB each.
func nodeList(t testing.TB, n int) []byte {
	t.Helper()
	var list struct{ Items []json.RawMessage }
	if err := json.Unmarshal(handwritten(t), &list); err != nil {
		t.Fatal(err)
	}
	var pods []string
	for i := range n {
		pod := strings.Replace(string(list.Items[0]), `"managedFields"`, `"annotations": {"example.org/config": "`+strings.Repeat("x", 6000)+`"}, "managedFields"`, 1)
		pod = strings.ReplaceAll(pod, webUID, podUID(i))
		for _, digit := range []string{"a", "b", "c", "d", "e"} {
			pod = strings.ReplaceAll(pod, "containerd://"+id(digit), "containerd://"+containerID(i, digit))
		}
		pods = append(pods, pod)
	}
	return []byte(`{"kind": "PodList", "items": [` + strings.Join(pods, ",") + `]}`)
}

func podUID(i int) string { return fmt.Sprintf("2c48913c-b29f-11e7-9350-%012x", i) }

func containerID(i int, digit string) string { return fmt.Sprintf("%s%04x", id(digit)[:60], i) }

// BenchmarkNode attests 1,000 processes in 20 pods of a node with 110, 50 at a time, and
// reports times and requests. It needs root.
func BenchmarkNode(b *testing.B) {
	const pods, processes, callers = 20, 1000, 50
	var started []*exec.Cmd
	defer func() {
		for _, cmd := range started {
			_ = cmd.Process.Kill() // it may have ended
		}
		for _, cmd := range started {
			_ = cmd.Wait()
		}
	}()
	groups := make([]string, pods)
	for i := range groups {
		groups[i] = newGroup(b, podUID(i), containerID(i, "c"))
	}
	for i := range processes {
		started = append(started, start(b, groups[i%pods]))
	}
	k := newKubelet(answers(nodeList(b, 110)))
	cfg := overTLS(b, k, newAuthority(b), "node-1")
	cfg.PollInterval = 0 // the default
	var took []time.Duration
	for b.Loop() {
		a, err := kubernetes.New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		var mu sync.Mutex
		var done sync.WaitGroup
		next := make(chan int)
		for range callers {
			done.Go(func() {
				for i := range next {
					begin := time.Now()
					p, err := attest.FromPID(started[i].Process.Pid, 0, 0)
					if err != nil {
						b.Error(err)
						continue
					}
					found, err := attest.Selectors(b.Context(), p, []attest.Attestor{a})
					if err != nil || !has(found.Selectors(), "pod-uid:"+podUID(i%pods)) {
						b.Errorf("%v, %v", found, err)
					}
					p.Close()
					mu.Lock()
					took = append(took, time.Since(begin))
					mu.Unlock()
				}
			})
		}
		for i := range processes {
			next <- i
		}
		close(next)
		done.Wait()
		a.Close()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "µs-p99")
	b.ReportMetric(float64(k.requests.Load())/float64(b.N), "requests/op")
}

// BenchmarkPodList reads a list of 110 pods, and reports what of it stays in memory.
func BenchmarkPodList(b *testing.B) {
	body := nodeList(b, 110)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	c := cgroup.Container{ID: containerID(7, "c"), Pod: true, PodUID: podUID(7)}
	for b.Loop() {
		if got, err := kubernetes.Read(body, c); err != nil || len(got) == 0 {
			b.Fatal(got, err)
		}
	}
	kept := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := kept()
	list := kubernetes.Keep(body)
	b.ReportMetric(float64(kept()-before), "B-kept")
	runtime.KeepAlive(list)
	runtime.KeepAlive(body)
}

// BenchmarkAttest attests a process of a known container.
func BenchmarkAttest(b *testing.B) {
	cfg := overTLS(b, newKubelet(answers(nodeList(b, 110))), newAuthority(b), "node-1")
	a, err := kubernetes.New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer a.Close()
	p, err := attest.FromPID(start(b, newGroup(b, podUID(7), containerID(7, "c"))).Process.Pid, uint32(os.Getuid()), 0)
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}
