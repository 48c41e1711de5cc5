package metrics_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

var update = flag.Bool("update", false, "write the tables of docs/metrics.md")

// TestDocument: the tables of docs/metrics.md are the metrics of the code. After a
// change of a metric: go test ./metrics -run TestDocument -update
func TestDocument(t *testing.T) {
	t.Parallel()
	file := filepath.Join("..", "docs", "metrics.md")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	have := string(text)
	want := table(t, have, "agent", newMetrics(wave).Registry())
	want = table(t, want, "server", newServer(rotation).Registry())
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if have != want {
		t.Errorf("%s is not what the code says; run this test with -update", file)
	}
}

// description is a metric as prometheus.Desc prints it.
var description = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*"), .*variableLabels: \{(.*)\}\}$`)

// table replaces what stands between the markers of a program with the metrics of
// its registry.
func table(t *testing.T, document, program string, registry *prometheus.Registry) string {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	kinds := make(map[string]dto.MetricType)
	for _, f := range families {
		kinds[f.GetName()] = f.GetType()
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		registry.Describe(descs)
		close(descs)
	}()
	rows := make(map[string]string)
	for d := range descs {
		m := description.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("not a description: %s", d)
		}
		name, help := unquote(t, m[1]), unquote(t, m[2])
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue
		}
		kind, known := kinds[name]
		if !known && strings.HasSuffix(name, "_total") {
			kind = dto.MetricType_COUNTER
		} else if !known {
			kind = dto.MetricType_GAUGE
		}
		labels := ""
		if m[3] != "" {
			labels = "`" + strings.ReplaceAll(m[3], ",", "`, `") + "`"
		}
		rows[name] = fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, strings.ToLower(kind.String()), labels, strings.ReplaceAll(help, "|", `\|`))
	}
	begin, end := "<!-- begin "+program+", generated -->\n", "<!-- end "+program+" -->\n"
	before, rest, found := strings.Cut(document, begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("no %q and %q", begin, end)
	}
	var b strings.Builder
	b.WriteString("| metric | type | labels | what it shows |\n|---|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		b.WriteString(rows[name])
	}
	return before + begin + b.String() + end + after
}

func unquote(t *testing.T, quoted string) string {
	t.Helper()
	s, err := strconv.Unquote(quoted)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
