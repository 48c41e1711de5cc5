package figures

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// inPod joins cgroups, gets one answer and prints how long that took from the
// connection on, in nanoseconds.
func inPod(path string, cgroups []string) error {
	for _, dir := range cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	begin := time.Now()
	if err := once(context.Background(), path); err != nil {
		return err
	}
	fmt.Println(time.Since(begin).Nanoseconds())
	return nil
}

// kubelet answers with the pods of a node on the read-only port.
type kubelet struct {
	port     int
	requests atomic.Int64
	pods     []container
}

// container is the only one of its pod.
type container struct {
	uid, id string
	cgroups []string // folders
}

// newKubelet starts a kubelet with n pods. The first joined have cgroups, which
// processes can join.
func newKubelet(b *testing.B, n, joined int) *kubelet {
	b.Helper()
	k := new(kubelet)
	for i := range n {
		c := container{uid: podUID(), id: hexOf(32)}
		if i < joined {
			c.cgroups = makeCgroups(b, filepath.Join("kubepods", "burstable", "pod"+c.uid, c.id))
		}
		k.pods = append(k.pods, c)
	}
	answer, err := json.Marshal(podList(k.pods))
	if err != nil {
		b.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	k.port = lis.Addr().(*net.TCPAddr).Port
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/pods") {
			http.NotFound(w, r)
			return
		}
		k.requests.Add(1)
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(lis)
	}()
	b.Cleanup(func() {
		srv.Close()
		<-done
	})
	return k
}

func hexOf(bytes int) string {
	b := make([]byte, bytes)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func podUID() string {
	h := hexOf(16)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// podList is an answer of /pods. Each pod has what such an answer has beside what an
// attestor reads: about 5 KB.
func podList(pods []container) any {
	type m = map[string]any
	var items []any
	for i, c := range pods {
		name := fmt.Sprintf("web-%03d-7d4b9c5f6d-x2x7q", i)
		var env, volumes []any
		for j := range 30 {
			env = append(env, m{"name": fmt.Sprintf("SERVICE_%d_ADDRESS", j), "value": fmt.Sprintf("service-%d.prod.svc.cluster.local:8080", j)})
		}
		for j := range 6 {
			volumes = append(volumes, m{"name": fmt.Sprintf("config-%d", j), "configMap": m{"name": fmt.Sprintf("web-config-%d", j), "defaultMode": 420}})
		}
		items = append(items, m{
			"metadata": m{
				"name": name, "namespace": "prod", "uid": c.uid, "labels": m{"app": fmt.Sprintf("web-%03d", i), "pod-template-hash": "7d4b9c5f6d"},
				"annotations":     m{"kubernetes.io/config.seen": "2026-11-01T10:00:00.000000000Z", "kubernetes.io/config.source": "api"},
				"ownerReferences": []any{m{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d4b9c5f6d", "uid": podUID(), "controller": true}},
			},
			"spec": m{
				"nodeName": "node-1", "serviceAccountName": "web", "volumes": volumes,
				"containers": []any{m{"name": "web", "image": "registry.example.org/web:1.2.3", "env": env}},
			},
			"status": m{
				"phase": "Running", "podIP": "10.0.0.1",
				"containerStatuses": []any{m{
					"name": "web", "containerID": "containerd://" + c.id, "image": "registry.example.org/web:1.2.3",
					"imageID": "registry.example.org/web@sha256:" + hexOf(32), "ready": true, "started": true,
					"state": m{"running": m{"startedAt": "2026-11-01T10:00:01Z"}},
				}},
			},
		})
	}
	return m{"kind": "PodList", "apiVersion": "v1", "metadata": m{}, "items": items}
}

// makeCgroups makes a cgroup in the unified hierarchy or, where the controllers have
// hierarchies of their own, in two of them.
func makeCgroups(b *testing.B, path string) (dirs []string) {
	b.Helper()
	roots := []string{"/sys/fs/cgroup"}
	var st unix.Statfs_t
	if err := unix.Statfs(roots[0], &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		roots = []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/systemd"}
	}
	for _, root := range roots {
		dir := filepath.Join(root, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Skipf("no cgroup can be made: %v", err)
		}
		b.Cleanup(func() {
			for ; dir != root; dir = filepath.Dir(dir) {
				os.Remove(dir)
			}
		})
		dirs = append(dirs, dir)
	}
	return dirs
}

// podEntries returns an entry for each pod of a kubelet.
func podEntries(n int) []spireapi.Entry {
	out := make([]spireapi.Entry, n)
	for i := range out {
		out[i] = spireapi.Entry{
			ID:        fmt.Sprintf("entry-%05d", i),
			SPIFFEID:  spiffeid.RequireFromPath(td, fmt.Sprintf("/ns/prod/sa/web-%03d", i)),
			Selectors: []spireapi.Selector{{Type: "k8s", Value: "ns:prod"}, {Type: "k8s", Value: fmt.Sprintf("pod-label:app:web-%03d", i)}},
		}
	}
	return out
}

// BenchmarkPods measures the first answers of 1,000 new processes in 20 of a node's 110
// pods, eight at a time, what they cost the daemon and the kubelet, and the daemon's
// memory afterwards.
func BenchmarkPods(b *testing.B) {
	const pods, joined, processes, together = 110, 20, 1000, 8
	each(b, func(b *testing.B, k kind) {
		w := newWorld(b, podEntries(pods))
		kubelet := newKubelet(b, pods, joined)
		w.kubelet = kubelet.port
		d := w.start(k, 1000)
		w.waitMints(pods, time.Minute)
		time.Sleep(5 * time.Second)
		before, asked := d.cpu(), kubelet.requests.Load()
		var all []time.Duration
		for len(all) < processes {
			var clients []*client
			for i := range together {
				c := kubelet.pods[(len(all)+i)%joined]
				clients = append(clients, startClient(b, os.Args[0], -1, "pod %s 0 %s", d.socket, strings.Join(c.cgroups, " ")))
			}
			for _, c := range clients {
				all = append(all, time.Duration(c.hearNumber()))
				c.end()
			}
		}
		slices.Sort(all)
		ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
		what := strconv.Itoa(processes) + " new processes in " + strconv.Itoa(joined) + " pods"
		figure(b, k, what+": first answer, median", "p50-ms", "-", ms(all[processes/2]))
		figure(b, k, what+": first answer, 99th percentile", "p99-ms", "-", ms(all[processes*99/100]))
		figure(b, k, what+": processor time", "cpu-ms", "-", ms(d.cpu()-before))
		figure(b, k, what+": requests to the kubelet", "requests", "-", float64(kubelet.requests.Load()-asked))
		figure(b, k, strconv.Itoa(pods)+" pods: RSS", "pods-MB", "-", d.memory("VmRSS")/mb)
	})
}
