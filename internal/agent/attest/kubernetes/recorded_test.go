package kubernetes_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
)

// What a real kubelet and the kernel say about the same containers leads from the process
// to its pod and container: see testdata/README.md.
func TestRecorded(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/recorded/*/cgroup/*")
	if err != nil || len(files) != 9 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		pod, container, _ := strings.Cut(filepath.Base(file), "_")
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			shown, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			list, err := os.ReadFile(filepath.Join(filepath.Dir(file), "../pods.json"))
			if err != nil {
				t.Fatal(err)
			}
			found, err := cgroup.View{}.Parse(shown)
			if err != nil || !found.Pod || found.ID == "" || found.PodUID == "" {
				t.Fatalf("got %+v, %v", found, err)
			}
			synctest.Test(t, func(t *testing.T) {
				a := overPipes(t, newKubelet(answers(list)), kubernetes.Config{})
				got, err := a.Selectors(t.Context(), found)
				if err != nil {
					t.Fatal(err)
				}
				if container == "debug" { // an ephemeral container
					if len(got) > 0 {
						t.Errorf("got %v", got)
					}
					return
				}
				for _, want := range []string{"pod-name:" + pod, "pod-uid:" + found.PodUID, "container-name:" + container, "node-name:node-1"} {
					if !slices.Contains(values(t, got), want) {
						t.Errorf("got %q without %s", values(t, got), want)
					}
				}
			})
		})
	}
}
