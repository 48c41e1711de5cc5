package figures

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
)

// table collects the figures and prints them side by side at the end.
var table struct {
	rows []*row
}

type row struct {
	what, unit, goal string
	by               map[string][]float64 // by daemon
}

// figure reports one measured value. goal is the limit for renewd.
func figure(b *testing.B, k kind, what, unit, goal string, v float64) {
	b.Helper()
	b.ReportMetric(v, unit)
	i := slices.IndexFunc(table.rows, func(r *row) bool { return r.what == what && r.unit == unit })
	if i < 0 {
		i = len(table.rows)
		table.rows = append(table.rows, &row{what, unit, goal, make(map[string][]float64)})
	}
	r := table.rows[i]
	r.by[k.name] = append(r.by[k.name], v)
}

func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

// printTable prints a row for each figure; of several runs the median.
func printTable() {
	if len(table.rows) == 0 {
		return
	}
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "figure\tunit\tspire-agent\trenewd\tgoal")
	show := func(v []float64) string {
		if len(v) == 0 {
			return "-"
		}
		slices.Sort(v)
		return fmt.Sprintf("%.4g", v[len(v)/2])
	}
	for _, r := range table.rows {
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\n", r.what, r.unit, show(r.by[spireAgent.name]), show(r.by[renewd.name]), r.goal)
	}
	out.Flush()
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(clientEnv); spec != "" {
		if err := runClient(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	before := load()
	code := m.Run()
	if len(table.rows) > 0 {
		fmt.Printf("\nload average before: %s; after: %s\n\n", before, load())
		printTable()
	}
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}
