package kubernetes

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var record = flag.String("record", "", "folder for the cgroup files and the kubelet's answer, as test data of the attestors")

// pods is what the tests read of the kubelet's answer.
type pods struct {
	Items []struct {
		Metadata struct {
			Name, Namespace, UID string
			Annotations          map[string]string
		}
		Status struct {
			InitContainerStatuses, ContainerStatuses, EphemeralContainerStatuses []containerStatus
		}
	}
}

type containerStatus struct {
	Name, ContainerID string
	State             map[string]any
}

// TestPods runs pods of all kinds. The cgroup of each container's process names pod and
// container, as the kubelet's answer has them.
func TestPods(t *testing.T) {
	c := onNode(t)
	manifest := testdata(t, "pods.yaml")
	c.apply(t, manifest)
	t.Cleanup(func() { c.kubectl(manifest, "delete", "--grace-period=1", "-f", "-") })
	file := filepath.Join(c.dir, "static-pods", "static.yaml")
	if err := os.WriteFile(file, []byte(testdata(t, "static.yaml")), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	c.must(t, "-n", "shop", "rollout", "status", "deployment/web", "--timeout=60s")
	c.must(t, "-n", "shop", "wait", "pod/best-effort", "pod/guaranteed", "--for=condition=Ready", "--timeout=60s")
	c.must(t, "-n", "shop", "wait", "job/once", "--for=condition=Complete", "--timeout=60s")
	c.must(t, "-n", "shop", "debug", "guaranteed", "--image=renewd.test/workload:dev", "--container=debug", "--profile=general")

	want := []string{
		"best-effort/main", "guaranteed/debug", "guaranteed/main", "static-" + nodeName + "/main",
		"web/first", "web/second", "web/sidecar",
	}
	var missing []string
	err := until(time.Minute, "the pods' processes", func() error {
		missing = missing[:0]
		answer := c.must(t, "get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/pods")
		found, err := processes(answer)
		if err != nil {
			return err
		}
		for _, name := range want {
			if found[name] == "" {
				missing = append(missing, name)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("no process of %s", missing)
		}
		return save(answer, found)
	})
	if err != nil {
		t.Error(err)
	}
}

// processes returns the cgroup file of a process of each running container, by POD/CONTAINER
// without what a Deployment appends to a name. It fails if a path lacks the pod's UID.
func processes(answer string) (map[string]string, error) {
	var list pods
	if err := json.Unmarshal([]byte(answer), &list); err != nil {
		return nil, err
	}
	cgroups, err := cgroupFiles()
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for _, pod := range list.Items {
		name := pod.Metadata.Name
		if strings.HasPrefix(name, "web-") {
			name = "web"
		}
		// The cgroup of a static pod is that of the file, and the API has a mirror of it.
		uid := pod.Metadata.UID
		if source := pod.Metadata.Annotations["kubernetes.io/config.hash"]; source != "" {
			uid = source
		}
		s := pod.Status
		for _, status := range append(append(s.InitContainerStatuses, s.ContainerStatuses...), s.EphemeralContainerStatuses...) {
			if _, running := status.State["running"]; !running {
				continue
			}
			_, id, _ := strings.Cut(status.ContainerID, "://")
			for _, text := range cgroups {
				if !strings.Contains(text, id) {
					continue
				}
				for line := range strings.Lines(text) {
					if strings.Contains(line, "kubepods") && !strings.Contains(line, "/pod"+uid+"/"+id) {
						return nil, fmt.Errorf("container %s of pod %s has the cgroup %s", id, uid, line)
					}
				}
				out[name+"/"+status.Name] = text
			}
		}
	}
	return out, nil
}

// cgroupFiles returns /proc/PID/cgroup of every process of the node.
func cgroupFiles() ([]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		// A process may have ended since.
		if text, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cgroup")); err == nil {
			out = append(out, string(text))
		}
	}
	return out, nil
}

// save writes the recordings, if the flag says so.
func save(answer string, cgroups map[string]string) error {
	if *record == "" {
		return nil
	}
	for name, text := range cgroups {
		file := filepath.Join(*record, "cgroup", strings.ReplaceAll(name, "/", "_"))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(*record, "pods.json"), []byte(answer), 0o644)
}

// must runs kubectl as the cluster's administrator.
func (c *cluster) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.kubectl("", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
