// Package deploy checks the files of this directory with the tools that read them.
package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func tool(t *testing.T, name, from string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s (Debian package %s) is not installed", name, from)
	}
	return path
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestUnits(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"renewd-agent", "renewd-server"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkUnit(t, name)
		})
	}
}

func checkUnit(t *testing.T, name string) {
	analyze := tool(t, "systemd-analyze", "systemd")
	// The program is not installed, so use another one.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := bytes.ReplaceAll(read(t, name+".service"), []byte("/usr/local/bin/"+name+" run"), []byte(self+" run"))
	file := filepath.Join(t.TempDir(), name+".service")
	if err := os.WriteFile(file, unit, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", "--recursive-errors=no", file).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err = exec.CommandContext(t.Context(), analyze, "security", "--offline=true", "--no-pager", file).CombinedOutput()
	if err != nil {
		t.Fatalf("systemd-analyze security: %v\n%s", err, out)
	}
	m := regexp.MustCompile(`exposure level for \S+: ([0-9.]+)`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("no exposure level in\n%s", out)
	}
	if level, err := strconv.ParseFloat(string(m[1]), 64); err != nil || level > 2.0 {
		t.Errorf("exposure level %s, want at most 2.0\n%s", m[1], out)
	}
}

// TestServerStartsAfterTheClockIsSet: the unit is ordered after time-sync.target, by which wait
// services such as systemd-time-wait-sync hold up a start until the clock is set.
func TestServerStartsAfterTheClockIsSet(t *testing.T) {
	t.Parallel()
	if !regexp.MustCompile(`(?m)^After=(.* )?time-sync\.target( |$)`).Match(read(t, "renewd-server.service")) {
		t.Error("renewd-server.service is not ordered after time-sync.target")
	}
}

func TestPrometheusExamples(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"prometheus.example.yaml", "prometheus.kubernetes.example.yaml"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkPrometheus(t, name)
		})
	}
}

func checkPrometheus(t *testing.T, name string) {
	promtool := tool(t, "promtool", "prometheus")
	// promtool checks that the files with the CA and the password exist.
	dir := t.TempDir()
	config := strings.NewReplacer(
		"ca_file: /etc/prometheus/renewd-ca.pem", "insecure_skip_verify: true",
		"/etc/prometheus/", dir+"/",
	).Replace(string(read(t, name)))
	for name, data := range map[string]string{"prometheus.yaml": config, "renewd-password": "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), promtool, "check", "config", filepath.Join(dir, "prometheus.yaml")).CombinedOutput()
	if bytes.Contains(out, []byte("field kubernetes_sd_configs not found")) {
		t.Skip("this promtool is built without Kubernetes discovery, as Debian's is")
	}
	if err != nil {
		t.Errorf("promtool check config: %v\n%s", err, out)
	}
}

// The stages of the Dockerfile have the right programs and users, and the agent is the default
// target.
func TestDockerfile(t *testing.T) {
	t.Parallel()
	text := string(read(t, "Dockerfile"))
	stages := regexp.MustCompile(`(?m)^FROM `).Split(text, -1)[1:]
	first := regexp.MustCompile(`^golang:(\S+) AS build\n`).FindStringSubmatch(stages[0])
	goMod := read(t, filepath.Join("..", "go.mod"))
	if first == nil || !bytes.Contains(goMod, []byte("\ngo "+first[1]+".")) && !bytes.Contains(goMod, []byte("\ngo "+first[1]+"\n")) {
		t.Errorf("the first stage does not have the Go version of go.mod: %q", first)
	}
	want := []struct {
		name, user string
		healthy    bool
	}{{"keysetctl", "65532:65532", false}, {"server", "65532:65532", true}, {"agent", "", true}}
	if len(stages) != 1+len(want) {
		t.Fatalf("%d stages", len(stages))
	}
	for i, w := range want {
		stage := stages[1+i]
		user := regexp.MustCompile(`(?m)^USER (.*)$`).FindStringSubmatch(stage + "\nUSER ")[1]
		if !strings.HasPrefix(stage, "scratch AS "+w.name+"\n") || user != w.user ||
			!strings.Contains(stage, "\nENTRYPOINT [\"/"+w.name+"\"]\n") ||
			strings.Contains(stage, "\nHEALTHCHECK ") != w.healthy {
			t.Errorf("stage %d is not %+v:\n%s", 1+i, w, stage)
		}
		if !strings.Contains(stages[0], " ./cmd/"+w.name) || !strings.Contains(stage, "COPY --from=build /out/"+w.name+" ") {
			t.Errorf("%s is not built, or not copied into its stage", w.name)
		}
		if _, err := os.Stat(filepath.Join("..", "cmd", w.name)); err != nil {
			t.Error(err)
		}
	}
}
