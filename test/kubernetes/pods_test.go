package kubernetes

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// process is one of a container in a pod.
type process struct {
	pod, container string
	pid            int
	cgroup         string // its /proc/PID/cgroup
}

// TestPods runs pods of all kinds. The cgroup of each container's process names pod and
// container as the kubelet's answer has them, and our attestor gives it SPIRE's selectors.
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

	var all []process
	err := until(time.Minute, "the pods' processes", func() error {
		answer := c.must(t, "get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/pods")
		found, err := processes(answer)
		if err != nil {
			return err
		}
		// Two of web, with its sidecar, and one each of four more containers.
		if all = found; len(found) < 7 {
			return fmt.Errorf("%d processes: %v", len(found), found)
		}
		return save(answer, found)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("selectors", func(t *testing.T) { c.compareSelectors(t, all) })
}

// processes returns a process of each running container in the namespace of the tests. It fails
// if the path of its cgroup lacks the pod's UID.
func processes(answer string) ([]process, error) {
	var list pods
	if err := json.Unmarshal([]byte(answer), &list); err != nil {
		return nil, err
	}
	cgroups, err := cgroupFiles()
	if err != nil {
		return nil, err
	}
	var out []process
	for _, pod := range list.Items {
		if pod.Metadata.Namespace != "shop" {
			continue
		}
		// The cgroup of a static pod is that of the file, and the API has a mirror of it.
		uid := pod.Metadata.UID
		if source := pod.Metadata.Annotations["kubernetes.io/config.hash"]; source != "" {
			uid = source
		}
		s := pod.Status
		for _, status := range slices.Concat(s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses) {
			_, id, _ := strings.Cut(status.ContainerID, "://")
			if _, running := status.State["running"]; !running || id == "" {
				continue
			}
			for pid, text := range cgroups {
				if !strings.Contains(text, id) {
					continue
				}
				for line := range strings.Lines(text) {
					if strings.Contains(line, "kubepods") && !strings.Contains(line, "/pod"+uid+"/"+id) {
						return nil, fmt.Errorf("container %s of pod %s has the cgroup %s", id, uid, line)
					}
				}
				out = append(out, process{pod.Metadata.Name, status.Name, pid, text})
				break
			}
		}
	}
	return out, nil
}

// cgroupFiles returns /proc/PID/cgroup of every process of the node.
func cgroupFiles() (map[int]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	out := make(map[int]string)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		// A process may have ended since.
		if text, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cgroup")); err == nil {
			out[pid] = string(text)
		}
	}
	return out, nil
}

// save writes the recordings, if the flag says so.
func save(answer string, found []process) error {
	if *record == "" {
		return nil
	}
	for _, p := range found {
		file := filepath.Join(*record, "cgroup", p.pod+"_"+p.container)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(p.cgroup), 0o644); err != nil {
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
