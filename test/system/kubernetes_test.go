package system_test

import (
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// Processes in the control groups of pods, and a kubelet that lists them, get the
// identities of their pods, containers and labels.
func TestPods(t *testing.T) {
	t.Parallel()
	run(t, "pods.txtar", withPods(t, nil))
}

// Our agent and spire-agent give the same process the same selectors.
func TestPodSelectorsBesideSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-pods.txtar", withPods(t, withSPIRE(t)))
}

// withPods makes control groups of pods and starts a kubelet. A process enters a container by
// writing its PID to $APP, $METRICS (of the pod web), $STATIC (a static pod), $JOB or
// $UNKNOWN (not in the list). $KUBELET is the kubelet's port, $CA verifies it, and $TOKEN is
// the file with its token.
func withPods(t *testing.T, env map[string]string) map[string]string {
	t.Helper()
	if env == nil {
		env = make(map[string]string)
	}
	node, err := os.MkdirTemp(ownControlGroup(t), "test*.slice")
	if err != nil {
		t.Skipf("no control group can be made: %v", err)
	}
	t.Cleanup(func() { os.Remove(node) })
	for name, group := range map[string]string{
		"APP":     "pod2c48913c-b29f-11e7-9350-020968147796/" + strings.Repeat("c", 64),
		"METRICS": "pod2c48913c-b29f-11e7-9350-020968147796/" + strings.Repeat("d", 64),
		"STATIC":  "pod0123456789abcdef0123456789abcdef/" + strings.Repeat("f", 64),
		"JOB":     "poda2830d0d-b0f0-4ff0-81b5-0ee4e299cf80/" + strings.Repeat("0", 64),
		"UNKNOWN": "pod72f7f152-440c-66ac-9084-e0fc1d8a910c/" + strings.Repeat("8", 64),
	} {
		dir := filepath.Join(node, "kubepods", group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for dir := dir; dir != node && os.Remove(dir) == nil; dir = filepath.Dir(dir) {
			}
		})
		env[name] = filepath.Join(dir, "cgroup.procs")
	}
	list, err := os.ReadFile("../../internal/agent/attest/kubernetes/testdata/pods-handwritten.json")
	if err != nil {
		t.Fatal(err)
	}
	kubelet := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/pods" || r.Header.Get("Authorization") != "Bearer token" {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		_, _ = w.Write(list) // the agent may have gone
	}))
	t.Cleanup(kubelet.Close)
	dir := t.TempDir()
	for name, file := range map[string][]byte{
		"CA":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: kubelet.Certificate().Raw}),
		"TOKEN": []byte("token\n"),
	} {
		env[name] = filepath.Join(dir, name)
		if err := os.WriteFile(env[name], file, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env["KUBELET"] = strconv.Itoa(kubelet.Listener.Addr().(*net.TCPAddr).Port)
	return env
}

// ownControlGroup returns the directory of the test's own control group, of cgroup v2 or
// of a hierarchy of v1.
func ownControlGroup(t *testing.T) string {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		for hierarchy, dir := range map[string]string{"0::": "", ":pids:": "pids"} {
			_, path, ok := strings.Cut(strings.TrimSpace(line), hierarchy)
			base := filepath.Join("/sys/fs/cgroup", dir, path)
			if _, err := os.Stat(filepath.Join(base, "cgroup.procs")); ok && err == nil {
				return base
			}
		}
	}
	t.Skip("no control group file system is mounted where it usually is")
	return ""
}

var (
	ourSelector   = regexp.MustCompile(`k8s:[^ "]*`)
	theirSelector = regexp.MustCompile(`"type":"k8s","value":"([^"]*)"`)
)

// alike SPIRE-LOG RENEWD-LOG compares the last selectors of type k8s in two logs, in
// which they are one line.
func alike(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: alike SPIRE-LOG RENEWD-LOG")
	}
	var theirs, ours []string
	for line := range strings.Lines(ts.ReadFile(args[0])) {
		if found := theirSelector.FindAllStringSubmatch(line, -1); found != nil {
			theirs = nil
			for _, f := range found {
				theirs = append(theirs, "k8s:"+f[1])
			}
		}
	}
	for line := range strings.Lines(ts.ReadFile(args[1])) {
		if found := ourSelector.FindAllString(line, -1); found != nil {
			ours = found
		}
	}
	slices.Sort(theirs)
	slices.Sort(ours)
	if len(ours) == 0 || !slices.Equal(ours, theirs) {
		ts.Fatalf("ours:\n%s\ntheirs:\n%s", strings.Join(ours, "\n"), strings.Join(theirs, "\n"))
	}
	ts.Logf("%d selectors are equal:\n%s", len(ours), strings.Join(ours, "\n"))
}
