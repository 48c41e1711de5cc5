package runbook

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// maxSamples limits the memory of a wait of days: beyond it every second sample goes.
const maxSamples = 4096

// curve is a taint wave as it happens, and as the plan for the same fleet has it.
type curve struct {
	from  time.Time // the taint, or the first look if that is not known
	total int       // SVIDs at the first look
	seen  []sample
	// plan is the planned share of total that is left at each second; it is 1 until the
	// first look. planned is the plan's end. Both are zero if there is no plan.
	plan    []float64
	planned time.Duration
}

type sample struct {
	at   time.Duration // since from
	left int
}

// newCurve starts a curve at the first look. It returns nil if nothing is left or that is
// not known. The plan is for as many agents as hold SVIDs, with as many SVIDs each on
// average. If the wait begins late, only the rest of the plan counts.
func newCurve(k Keyset, holders []Holder, now time.Time) *curve {
	if k.Unknown != "" || k.X509SVIDs <= 0 {
		return nil
	}
	c := &curve{from: k.TaintedAt, total: k.X509SVIDs}
	if c.from.IsZero() || c.from.After(now) {
		c.from = now
	}
	agents, rate := 0, 0.0
	for _, h := range holders {
		if h.Agent != "" {
			agents++
		}
		if h.Rate > 0 && (rate == 0 || h.Rate < rate) {
			rate = h.Rate
		}
	}
	if agents == 0 {
		return c
	}
	// In the plan an agent's own SVID comes on top of those of its workloads.
	p, err := NewPlan(PlanOptions{
		Agents: agents, SVIDs: max(0, (c.total+agents-1)/agents-1), MaxDelay: DefaultPlanDelay, Rate: rate, Refresh: DefaultPlanRefresh, Seed: 1,
	})
	if err != nil { // a fleet beyond the limits of a plan
		return c
	}
	left := make([]float64, len(p.PerSecond)+1)
	rest := p.Mints
	for s, mints := range p.PerSecond {
		left[s] = float64(rest) / float64(p.Mints)
		rest -= mints
	}
	begin := int(now.Sub(c.from) / time.Second)
	if begin >= len(left) || left[begin] == 0 {
		return c // it should be over
	}
	for s := range left {
		c.plan = append(c.plan, min(1, left[s]/left[begin]))
	}
	c.planned = time.Duration(p.T100.Median * float64(time.Second))
	return c
}

// add records what is left now.
func (c *curve) add(left int, now time.Time) {
	if c == nil || left < 0 {
		return
	}
	if len(c.seen) >= maxSamples {
		for i := range maxSamples / 2 {
			c.seen[i] = c.seen[2*i]
		}
		c.seen = c.seen[:maxSamples/2]
	}
	c.seen = append(c.seen, sample{now.Sub(c.from), left})
}

// plotColumns is the most columns of a plot.
const plotColumns = 100

// plot draws what is left by time since the taint: height rows, and one for the axis. It
// returns nothing if there is no curve.
func (c *curve) plot(columns, height int, g glyphs, now time.Time) []string {
	if c == nil || len(c.seen) == 0 {
		return nil
	}
	most := c.total
	for _, s := range c.seen {
		most = max(most, s.left)
	}
	label := len(thousands(int64(most)))
	width := min(columns-label-2, plotColumns)
	if width < plotColumns/4 {
		return nil
	}
	elapsed := now.Sub(c.from)
	span := max(c.planned, elapsed, 10*time.Second)
	rows := make([][]string, height)
	for r := range rows {
		rows[r] = make([]string, width)
	}
	full := len(g.eighths) - 1 // of a cell
	next, left := 0, -1
	for i := range width {
		at := span * time.Duration(i+1) / time.Duration(width)
		for ; next < len(c.seen) && c.seen[next].at <= at; next++ {
			left = c.seen[next].left
		}
		level := 0
		if left > 0 && at < elapsed+span/time.Duration(width) {
			// What is left at all is visible.
			level = max(1, int(math.Round(float64(left)/float64(most)*float64(height*full))))
		}
		planned := -1 // row
		if s := int(at / time.Second); s < len(c.plan) && c.plan[s] > 0 {
			planned = int(math.Ceil(c.plan[s]*float64(c.total)/float64(most)*float64(height))) - 1
		}
		for r := range rows {
			rows[r][i] = g.eighths[min(max(level-r*full, 0), full)]
			if r == planned {
				rows[r][i] = g.plan
			}
		}
	}
	var lines []string
	for r := height - 1; r >= 0; r-- {
		name := ""
		switch r {
		case height - 1:
			name = thousands(int64(most))
		case 0:
			name = "0"
		}
		lines = append(lines, fmt.Sprintf("%*s %s%s", label, name, g.axis, strings.TrimRight(strings.Join(rows[r], ""), " ")))
	}
	legend := g.full + " left"
	if c.planned > 0 {
		legend += "  " + g.plan + " plan"
	}
	end := formatDuration(span)
	begin := "0s  "
	gap := width - cli.Width(begin) - cli.Width(legend) - len(end)
	return append(lines, strings.Repeat(" ", label+2)+begin+legend+strings.Repeat(" ", max(1, gap))+end)
}
