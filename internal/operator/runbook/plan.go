package runbook

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/renewd/renewd/renew/wave"
)

// The defaults of a plan are those of an agent.
const (
	DefaultPlanDelay   = wave.DefaultMaxDelay
	DefaultPlanRate    = wave.DefaultRate
	DefaultPlanRefresh = 5 * time.Second
	defaultFleets      = 20
)

// The limits of a plan keep its computation within seconds.
const (
	maxPlanAgents = 100_000
	maxPlanSVIDs  = 100_000
	maxPlanRate   = 1_000_000
	maxPlanDelay  = 24 * time.Hour
	// maxPlanWork limits the computed seconds of all agents in all fleets. Larger
	// plans use fewer fleets.
	maxPlanWork = 50_000_000
)

// PlanOptions describe a fleet. Agents and SVIDs are required. Only Rate and Fleets
// have defaults for zero.
type PlanOptions struct {
	Agents   int           // at least 1
	SVIDs    int           // X.509-SVIDs of workloads on each agent
	MaxDelay time.Duration // of the random delay
	Rate     float64       // renewals per second of one agent; zero: DefaultPlanRate
	Refresh  time.Duration // interval of an agent's bundle refresh
	Seed     uint64        // of the random fleets
	Fleets   int           // how many are drawn; zero: 20, or fewer if they are large
}

// Plan says what load a taint causes at the server and how long the taint wave takes,
// over several random fleets. It is also the JSON output. Times are seconds after
// the publication of the taint.
//
// An agent sees the taint at its next refresh, waits its delay, renews its agent SVID
// and then one SVID per token. The plan assumes that the server answers at once and
// that no other renewal is due. If answers take L seconds, the wave of an agent takes
// 1+L times as long, see [wave.Pace].
type Plan struct {
	Agents   int     `json:"agents"`
	SVIDs    int     `json:"svids_per_agent"`
	MaxDelay float64 `json:"max_delay_seconds"`
	Rate     float64 `json:"renewals_per_second"`
	Refresh  float64 `json:"refresh_seconds"`
	Seed     uint64  `json:"seed"`
	Fleets   int     `json:"fleets"`

	Mints int64   `json:"mints"`                 // agent SVIDs included
	Start Spread  `json:"start_seconds"`         // the first renewal
	Peak  Spread  `json:"peak_mints_a_second"`   // in the busiest full second
	T50   Spread  `json:"half_done_seconds"`     // 50 % are renewed
	T99   Spread  `json:"ninety_nine_seconds"`   // 99 %
	T100  Spread  `json:"all_done_seconds"`      // the last one
	Limit float64 `json:"at_the_latest_seconds"` // no fleet takes longer

	// PerSecond counts the mints in each second, in the first fleet.
	PerSecond []int64 `json:"mints_in_each_second"`
}

// Spread is the distribution of a figure over the fleets.
type Spread struct {
	Median  float64 `json:"median"`
	Lowest  float64 `json:"lowest"`
	Highest float64 `json:"highest"`
}

// NewPlan computes a plan. The same options give the same plan. It returns an
// [*OptionError] if an option is out of range.
func NewPlan(o PlanOptions) (Plan, error) {
	if o.Rate == 0 {
		o.Rate = DefaultPlanRate
	}
	if err := o.check(); err != nil {
		return Plan{}, err
	}
	f := fleet{svids: int64(o.SVIDs), interval: time.Duration(float64(time.Second) / o.Rate)}
	last := time.Duration(f.svids) * f.interval
	if o.Fleets == 0 {
		o.Fleets = max(1, min(defaultFleets, maxPlanWork/(o.Agents*(int(last/time.Second)+2))))
	}
	p := Plan{
		Agents: o.Agents, SVIDs: o.SVIDs, Rate: o.Rate, Seed: o.Seed, Fleets: o.Fleets,
		MaxDelay: o.MaxDelay.Seconds(), Refresh: o.Refresh.Seconds(),
		Mints: int64(o.Agents) * (f.svids + 1),
		Limit: (o.Refresh + o.MaxDelay + last).Seconds(),
	}
	var start, peak, t50, t99, t100 []float64
	for n := range o.Fleets {
		f.draw(o, uint64(n))
		perSecond := f.perSecond()
		if n == 0 {
			p.PerSecond = perSecond
		}
		start = append(start, f.starts[0].Seconds())
		peak = append(peak, float64(slices.Max(perSecond)))
		t50 = append(t50, f.timeOf(share(p.Mints, 50)).Seconds())
		t99 = append(t99, f.timeOf(share(p.Mints, 99)).Seconds())
		t100 = append(t100, f.timeOf(p.Mints).Seconds())
	}
	p.Start, p.Peak, p.T50, p.T99, p.T100 = spread(start), spread(peak), spread(t50), spread(t99), spread(t100)
	return p, nil
}

// OptionError says which option is out of range.
type OptionError struct {
	Option  string // the name of its flag
	Message string
}

// Error implements error.
func (e *OptionError) Error() string { return e.Option + " " + e.Message }

func (o PlanOptions) check() error {
	wrong := func(option, format string, args ...any) error {
		return &OptionError{option, fmt.Sprintf(format, args...)}
	}
	switch {
	case o.Agents < 1 || o.Agents > maxPlanAgents:
		return wrong("agents", "must be from 1 to %d, and is %d", maxPlanAgents, o.Agents)
	case o.SVIDs < 0 || o.SVIDs > maxPlanSVIDs:
		return wrong("svids", "must be from 0 to %d, and is %d", maxPlanSVIDs, o.SVIDs)
	case o.MaxDelay < 0 || o.MaxDelay > maxPlanDelay:
		return wrong("max-delay", "must be from 0s to 24h, and is %v", o.MaxDelay)
	case o.Refresh < 0 || o.Refresh > maxPlanDelay:
		return wrong("refresh", "must be from 0s to 24h, and is %v", o.Refresh)
	case !(o.Rate >= 0.1 && o.Rate <= maxPlanRate): // also rejects NaN
		return wrong("rate", "must be from 0.1 to %d, and is %v", maxPlanRate, o.Rate)
	case o.Fleets < 0:
		return wrong("fleets", "must not be negative, and is %d", o.Fleets)
	}
	return nil
}

// fleet is one draw of all agents. Agent i renews SVID k at starts[i] + k·interval.
// SVID 0 is the agent SVID; svids is the last one.
type fleet struct {
	starts   []time.Duration // sorted
	svids    int64
	interval time.Duration
}

func (f *fleet) draw(o PlanOptions, n uint64) {
	f.starts = f.starts[:0]
	var number [24]byte
	binary.BigEndian.PutUint64(number[:], o.Seed)
	binary.BigEndian.PutUint64(number[8:], n)
	for i := range o.Agents {
		binary.BigEndian.PutUint64(number[16:], uint64(i))
		seed := sha256.Sum256(number[:])
		// The time to the next refresh is uniform as well.
		f.starts = append(f.starts, wave.Delay(seed, "refresh", o.Refresh)+wave.Delay(seed, "authority", o.MaxDelay))
	}
	slices.SortFunc(f.starts, cmp.Compare)
}

// mintsBy counts the mints of an agent until after its start, inclusive.
func (f *fleet) mintsBy(after time.Duration) int64 {
	if after < 0 {
		return 0
	}
	return min(int64(after/f.interval), f.svids) + 1
}

// perSecond counts the mints in each second from the taint to the last one.
func (f *fleet) perSecond() []int64 {
	length := time.Duration(f.svids) * f.interval
	end := f.starts[len(f.starts)-1] + length
	out := make([]int64, end/time.Second+1)
	for _, b := range f.starts {
		before := int64(0)
		end := b.Truncate(time.Second) - 1 // of the second before
		for s := b / time.Second; s <= (b+length)/time.Second; s++ {
			end += time.Second
			n := f.mintsBy(end - b)
			out[s] += n - before
			before = n
		}
	}
	return out
}

// timeOf returns when n mints are done.
func (f *fleet) timeOf(n int64) time.Duration {
	low, high := f.starts[0], f.starts[len(f.starts)-1]+time.Duration(f.svids)*f.interval
	for low < high {
		mid := low + (high-low)/2
		done := int64(0)
		for _, b := range f.starts {
			if b > mid {
				break
			}
			done += f.mintsBy(mid - b)
		}
		if done >= n {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}

// share returns percent of mints, rounded up.
func share(mints, percent int64) int64 { return (mints*percent + 99) / 100 }

func spread(values []float64) Spread {
	slices.Sort(values)
	return Spread{Median: values[len(values)/2], Lowest: values[0], Highest: values[len(values)-1]}
}
