package layout

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

// planted are imports that are not allowed. Those that break one of the first
// five sentences go test sees, too.
var planted = []struct {
	in, imports string
	sentence    bool
}{
	{"internal/agent/node", module + "/internal/server/endpoint", true},
	{"internal/agent/attest/unix", module + "/internal/operator/renewd", true},
	{"cmd/agent", module + "/internal/server", true},
	{"internal/server", module + "/internal/agent/attest", true},
	{"internal/server/seal", module + "/internal/operator/renewd", true},
	{"internal/server/detach/rpc", module + "/renew", true},
	{"cmd/server", module + "/cache", true},
	{"internal/operator/prom", module + "/internal/server/endpoint", true},
	{"internal/operator/spire", module + "/internal/agent/attest", true},
	{"cmd/keysetctl", module + "/cache", true},
	{"internal/clock", module + "/internal/server/endpoint", true},
	{"internal/listen", module + "/bundle", true},
	{"bundle", module + "/internal/clock", true},
	{"cache", "google.golang.org/grpc/codes", true},
	{"renew", module + "/internal/config", true},
	{"renew/wave", "google.golang.org/grpc/codes", true},
	{"metrics", module + "/internal/config", true},
	{"internal/server/ledger", "google.golang.org/grpc/codes", false},
	{"internal/server/rotation", module + "/internal/server/ledger", false},
	{"internal/operator/runbook", module + "/internal/api", false},
	{"internal/agent/svidstore", "google.golang.org/grpc/codes", false},
	{"internal/agent/workload", module + "/internal/agent/upstream", false},
	{"internal/agent/upstream", module + "/renew", false},
	{"internal/socket", module + "/test/runbooktest", false},
}

// allowed are imports that nothing is said against.
var allowed = []struct{ in, imports string }{
	{"internal/agent", module + "/renew"},
	{"internal/agent/upstream", module + "/cache"},
	{"internal/server/admin", module + "/internal/server/detach/rpc"},
	{"internal/server", module + "/renew/wave"},
	{"internal/operator/spire", module + "/renew/wave"},
	{"cmd/server", module + "/internal/operator/renewd"},
	{"cmd/demo", module + "/cache"},
	{"internal/cli", module + "/internal/config"},
	{"test/system", module + "/internal/agent/node"},
}

// TestLinter: the import rules of the linter's configuration, over a module with
// our folders in which every package is empty. What is not allowed is found, and
// nothing else: neither what is allowed nor an import of a test.
func TestLinter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put := func(name, data string) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"go.mod", "go.sum", "tools/go.mod", "tools/go.sum", ".golangci.yml"} {
		put(name, tree.Read(t, root, name))
	}
	for _, p := range tree.Packages(t, "../..") {
		put(path.Join(folderOf(p), "empty.go"), "package empty\n")
	}
	plant := func(in, name, imports string) {
		put(path.Join(in, name), fmt.Sprintf("package empty\n\nimport _ %q\n", imports))
	}
	var want []string
	for _, w := range planted {
		plant(w.in, "planted.go", w.imports)
		plant(w.in, "planted_test.go", w.imports)
		want = append(want, w.in+"/planted.go imports "+w.imports)
	}
	for _, w := range allowed {
		plant(w.in, "allowed.go", w.imports)
	}

	lint := exec.CommandContext(t.Context(), "go", "tool", "-modfile=tools/go.mod", "golangci-lint", "run",
		"--enable-only=depguard", "--output.json.path=stdout", "--output.text.path=stderr", "--show-stats=false", "./...")
	lint.Dir = dir
	lint.Env = append(os.Environ(), "GOLANGCI_LINT_CACHE="+filepath.Join(dir, "cache"))
	var text bytes.Buffer
	lint.Stderr = &text
	out, err := lint.Output()
	if err == nil {
		t.Error("the linter is content")
	}
	var report struct {
		Issues []struct {
			Text string
			Pos  struct{ Filename string }
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, &text)
	}
	var got []string
	for _, i := range report.Issues {
		_, imports, _ := strings.Cut(i.Text, "import '")
		imports, _, _ = strings.Cut(imports, "'")
		got = append(got, i.Pos.Filename+" imports "+imports)
	}
	slices.Sort(want)
	slices.Sort(got)
	got = slices.Compact(got) // two rules may find one import
	if !slices.Equal(want, got) {
		t.Errorf("found\n%s\nwant\n%s\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"), &text)
	}
}
