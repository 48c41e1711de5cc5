package runbook_test

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/operator/runbook"
)

func plan(t rapid.TB, o runbook.PlanOptions) runbook.Plan {
	t.Helper()
	p, err := runbook.NewPlan(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func near(got, want, within float64) bool { return math.Abs(got-want) <= within }

// Small fleets have figures that can be computed by hand.
func TestPlanClosedForms(t *testing.T) {
	t.Parallel()
	p := plan(t, runbook.PlanOptions{Agents: 1, SVIDs: 100})
	for name, figure := range map[string][2]float64{
		"start":  {p.Start.Highest, 0},
		"peak":   {p.Peak.Median, 20},
		"50 %":   {p.T50.Median, 2.5},  // of 101 the 51st
		"99 %":   {p.T99.Median, 4.95}, // the 100th
		"100 %":  {p.T100.Lowest, 5},
		"latest": {p.Limit, 5},
		"mints":  {float64(p.Mints), 101},
	} {
		if !near(figure[0], figure[1], 1e-9) {
			t.Errorf("1 agent, no delay: %s is %v, want %v", name, figure[0], figure[1])
		}
	}
	if want := []int64{20, 20, 20, 20, 20, 1}; !slices.Equal(p.PerSecond, want) {
		t.Errorf("mints in each second %v, want %v", p.PerSecond, want)
	}

	// Without delay all agents renew together.
	p = plan(t, runbook.PlanOptions{Agents: 30, SVIDs: 10, Rate: 5})
	if want := []int64{150, 150, 30}; !slices.Equal(p.PerSecond, want) || p.Peak.Lowest != 150 || !near(p.T100.Highest, 2, 1e-9) {
		t.Errorf("30 agents, no delay: %v, %+v", p.PerSecond, p)
	}

	// Many agents with only the agent SVID: the uniform delay.
	p = plan(t, runbook.PlanOptions{Agents: 20000, MaxDelay: time.Minute})
	if !near(p.T50.Median, 30, 0.5) || !near(p.T99.Median, 59.4, 0.2) || p.T100.Highest >= 60 || p.Limit != 60 || !near(p.Peak.Median, 20000./60+3*math.Sqrt(20000./60), 40) {
		t.Errorf("delay alone: %+v", p)
	}

	// A long wave of many agents: in its middle every agent renews at its rate.
	p = plan(t, runbook.PlanOptions{Agents: 1000, SVIDs: 4000, MaxDelay: time.Minute, Refresh: 5 * time.Second})
	if p.Peak.Median != 20000 || !near(p.T50.Median, 32.5+100, 1) || !near(p.T100.Median, 265, 2) {
		t.Errorf("a long wave: %+v", p)
	}
}

// The plan agrees with a simulation that uses the agents' rate limiter.
func TestPlanSimulated(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		o := runbook.PlanOptions{
			Agents:   rapid.IntRange(1, 12).Draw(t, "agents"),
			SVIDs:    rapid.IntRange(0, 150).Draw(t, "svids"),
			MaxDelay: time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "delay")),
			Refresh:  time.Duration(rapid.Int64Range(0, int64(10*time.Second)).Draw(t, "refresh")),
			Rate:     rapid.SampledFrom([]float64{0.5, 1, 4, 20, 50, 1000}).Draw(t, "rate"),
			Seed:     rapid.Uint64().Draw(t, "seed"),
			Fleets:   1,
		}
		p := plan(t, o)
		var all []time.Duration
		published := time.Unix(0, 0)
		for _, begins := range runbook.Starts(o) {
			limiter := rate.NewLimiter(rate.Limit(o.Rate), 1)
			at := published.Add(begins)
			for range o.SVIDs + 1 {
				at = at.Add(limiter.ReserveN(at, 1).DelayFrom(at))
				all = append(all, at.Sub(published))
			}
		}
		slices.Sort(all)
		last := all[len(all)-1]
		seconds := make([]int64, last/time.Second+1)
		for _, at := range all {
			seconds[at/time.Second]++
		}
		of := func(percent int) float64 { return all[(len(all)*percent+99)/100-1].Seconds() }
		// The limiter computes with floating point: to the microsecond.
		for name, figure := range map[string][2]float64{
			"start": {p.Start.Median, all[0].Seconds()}, "50 %": {p.T50.Median, of(50)},
			"99 %": {p.T99.Median, of(99)}, "100 %": {p.T100.Median, last.Seconds()},
		} {
			if !near(figure[0], figure[1], 1e-6) {
				t.Errorf("%s is %v, simulated %v", name, figure[0], figure[1])
			}
		}
		if p.T100.Median > p.Limit {
			t.Errorf("end after %v, limit %v", p.T100.Median, p.Limit)
		}
		var sum int64
		for i, n := range p.PerSecond {
			sum += n
			simulated := int64(0)
			if i < len(seconds) {
				simulated = seconds[i]
			}
			if diff := n - simulated; diff > int64(o.Agents) || diff < -int64(o.Agents) {
				t.Errorf("%d in second %d, simulated %d", n, i, simulated)
			}
		}
		if sum != p.Mints || sum != int64(len(all)) || slices.Max(p.PerSecond) != int64(p.Peak.Median) {
			t.Errorf("%d mints, %d counted, peak %v", p.Mints, sum, p.Peak)
		}
	})
}

// The same options draw the same fleets; another seed draws others.
func TestPlanSeed(t *testing.T) {
	t.Parallel()
	o := runbook.PlanOptions{Agents: 5, SVIDs: 5, MaxDelay: time.Minute, Refresh: 5 * time.Second, Seed: 1}
	a, b := plan(t, o), plan(t, o)
	o.Seed = 2
	if c := plan(t, o); a.T50 != b.T50 || a.T50 == c.T50 {
		t.Errorf("%v, %v, %v", a.T50, b.T50, c.T50)
	}
	if a.T50.Lowest >= a.T50.Highest || a.Fleets != 20 {
		t.Errorf("all fleets are equal: %+v", a)
	}
}

func TestPlanRefuses(t *testing.T) {
	t.Parallel()
	for option, o := range map[string]runbook.PlanOptions{
		"agents":    {Agents: 0, SVIDs: 1},
		"svids":     {Agents: 1, SVIDs: -1},
		"max-delay": {Agents: 1, MaxDelay: -1},
		"refresh":   {Agents: 1, Refresh: 25 * time.Hour},
		"rate":      {Agents: 1, Rate: math.NaN()},
		"fleets":    {Agents: 1, Fleets: -1},
	} {
		_, err := runbook.NewPlan(o)
		if wrong, ok := errors.AsType[*runbook.OptionError](err); !ok || wrong.Option != option {
			t.Errorf("%s: %v", option, err)
		}
	}
}

func TestPlanPrint(t *testing.T) {
	t.Parallel()
	for _, o := range []runbook.PlanOptions{
		{Agents: 1}, {Agents: 1, SVIDs: 1, Rate: 0.1}, {Agents: 10000, SVIDs: 1000, MaxDelay: time.Minute, Refresh: 5 * time.Second},
	} {
		var out bytes.Buffer
		if err := plan(t, o).Print(&out); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if n := len([]rune(line)); n > 109 {
				t.Errorf("%d columns: %q", n, line)
			}
		}
		for _, want := range []string{"Peak at the server", "99 % renewed after", "assumed: refresh every", "┤"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("no %q in\n%s", want, out.String())
			}
		}
	}
}

func BenchmarkPlan(b *testing.B) {
	for b.Loop() {
		_, err := runbook.NewPlan(runbook.PlanOptions{Agents: 10000, SVIDs: 1000, MaxDelay: time.Minute, Refresh: 5 * time.Second})
		if err != nil {
			b.Fatal(err)
		}
	}
}
