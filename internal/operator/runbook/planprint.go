package runbook

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/guptarohit/asciigraph"

	"github.com/renewd/renewd/internal/cli"
)

const (
	plotWidth  = 72
	plotHeight = 10
)

// Print writes the plan as a table and a plot, in at most 110 columns.
func (p Plan) Print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s of %s, %s to renew after a taint (agent SVIDs included).\n\n",
		thousands(int64(p.Agents))+plural(p.Agents, " agent"), thousands(int64(p.SVIDs))+plural(p.SVIDs, " X.509-SVID")+" each", thousands(p.Mints))
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(name string, s Spread, format func(float64) string) {
		// Right-aligned columns would align the name too: it is padded here.
		_, _ = fmt.Fprintf(table, "%-24s\t%s\t%s\t%s\t\n", name, format(s.Median), format(s.Lowest), format(s.Highest))
	}
	_, _ = fmt.Fprintf(table, "%-24s\tMedian\tLowest\tHighest\t\n", "")
	row("First renewal after", p.Start, seconds)
	row("Peak at the server", p.Peak, func(n float64) string { return thousands(int64(n)) + "/s" })
	row("50 % renewed after", p.T50, seconds)
	row("99 % renewed after", p.T99, seconds)
	row("100 % renewed after", p.T100, seconds)
	if err := cli.Flush(table); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "\nAt the latest after %s. %s\n\n%s\n", seconds(p.Limit), p.assumptions(), p.plot()); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// assumptions describes what the figures are computed from.
func (p Plan) assumptions() string {
	return fmt.Sprintf("%s drawn (seed %d); assumed: refresh every %s, delay up to %s,\n%s renewals per second and agent, a server that answers at once.",
		quantity(p.Fleets, "fleet"), p.Seed, span(p.Refresh), span(p.MaxDelay), strconv.FormatFloat(p.Rate, 'g', -1, 64))
}

// plot draws the mints per second at the server. A column shows the busiest of its
// seconds.
func (p Plan) plot() string {
	// One more second, without mints, shows the end.
	n := len(p.PerSecond) + 1
	series := make([]float64, plotWidth)
	for i := range series {
		from := i * n / plotWidth
		to := max((i+1)*n/plotWidth, from+1)
		for _, mints := range p.PerSecond[from:min(to, n-1)] {
			series[i] = max(series[i], float64(mints))
		}
	}
	return asciigraph.Plot(series,
		asciigraph.Height(min(plotHeight, int(slices.Max(series)))), asciigraph.LowerBound(0), asciigraph.Precision(0),
		asciigraph.YAxisValueFormatter(func(v float64) string { return thousands(int64(math.Round(v))) }),
		asciigraph.XAxisRange(0, float64(n)),
		asciigraph.XAxisValueFormatter(func(v float64) string { return seconds(v) }),
		asciigraph.Caption("mints per second at the server, by time since the taint (first fleet)"))
}

// seconds prints a time to a tenth of a second.
func seconds(s float64) string {
	if s >= 60 {
		return formatDuration(time.Duration(s * float64(time.Second)))
	}
	return strconv.FormatFloat(s, 'f', 1, 64) + "s"
}

func span(s float64) string { return time.Duration(s * float64(time.Second)).String() }

// thousands prints a number in groups of three digits.
func thousands(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
