package prom

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/common/model"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// The reasons of holders.
const (
	reasonSilent       = "silent"       // down, missing, or not heard of recently
	reasonUnidentified = "unidentified" // does not say which agent it is
	reasonDuplicated   = "duplicated"   // another one says that it is the same agent
	reasonBehind       = "behind"       // has not seen that the authority is tainted
	reasonRenewing     = "renewing"     // has SVIDs of it to replace
	reasonStreams      = "streams"      // has replaced them, but workloads have not read them yet
)

// component is what an agent's spirl_application_info calls it.
const component = "agent"

// judge says what follows from the targets and their newest scrapes.
func judge(at time.Time, trustDomain string, targets []*target) Figures {
	f := Figures{At: at}
	for _, t := range targets {
		a, known := t.agent(at)
		if known && t.foreign(trustDomain) {
			continue
		}
		i := slices.IndexFunc(f.Agents, func(b Agent) bool { return a.Process != "" && b.Process == a.Process })
		if i < 0 {
			f.Agents = append(f.Agents, a)
		} else {
			f.Agents[i] = f.Agents[i].and(a)
		}
	}
	for i := range f.Agents {
		a := &f.Agents[i]
		a.Duplicated = a.Process != "" && slices.ContainsFunc(f.Agents, func(b Agent) bool {
			return b.Process != "" && b.Process != a.Process && b.ID == a.ID
		})
	}
	slices.SortStableFunc(f.Agents, func(a, b Agent) int { return cmp.Compare(a.Instance, b.Instance) })

	f.Expected = len(f.Agents)
	for _, a := range f.Agents {
		f.X509SVIDs += a.SVIDs
		if reason := a.reason(); reason != "" {
			f.Holding++
			f.Holders = append(f.Holders, runbook.Holder{
				Agent: a.Instance, Version: a.Version, SVIDs: a.SVIDs, Streams: a.Streams, Reason: reason, LastReport: a.LastScrape,
			})
		}
	}
	f.X509Safe = len(f.Holders) == 0
	return f
}

// missNumber adds that there must be so many agents.
func (f *Figures) missNumber(expected int) {
	if n := expected - len(f.Agents); n > 0 {
		f.miss(n, fmt.Sprintf("%d of %d agents that Prometheus does not scrape", n, expected))
	}
}

// missNamed adds that there must be these agents.
func (f *Figures) missNamed(expected []string, targets []*target) {
	there := make(map[string]bool, len(targets))
	for _, t := range targets {
		for id := range t.ids {
			there[id] = true
		}
	}
	for _, id := range slices.Sorted(slices.Values(expected)) {
		if !there[id] {
			f.miss(1, id)
		}
	}
}

func (f *Figures) miss(n int, who string) {
	f.Expected, f.Missing, f.Holding, f.X509Safe = f.Expected+n, f.Missing+n, f.Holding+n, false
	f.Holders = append(f.Holders, runbook.Holder{Agent: who, Reason: reasonSilent})
}

// agent is what the target's newest scrape says, if that is recent.
func (t *target) agent(at time.Time) (a Agent, known bool) {
	a = Agent{Instance: t.instance(), ID: t.id(), LastScrape: t.answered, SVIDs: int(t.held)}
	// A program that does not say what it is may be anything; its figures are
	// not taken for an agent's.
	if !t.recent(at) || t.info == nil {
		return a, false
	}
	settled, seen := t.values[seriesSettled]
	a = Agent{
		Instance: a.Instance, ID: a.ID, Up: true, LastScrape: t.scrape,
		Version:  string(t.info["spirl_app_version"]),
		Sequence: uint64(max(0, t.values[seriesSequence])),
		SVIDs:    int(t.values[seriesHeld]), Pending: int(t.values[seriesPending]), Streams: int(t.values[seriesStreams]),
		Seen: seen, Settled: seen && settled == 1,
	}
	if a.ID != "" && len(t.processes) == 1 {
		a.Process = t.processes[0]
	}
	return a, true
}

// foreign tells whether the target says that it is no agent of the trust
// domain, so that it cannot hold an SVID of its authorities.
func (t *target) foreign(trustDomain string) bool {
	says := func(name model.LabelName) string { return string(t.info[name]) }
	return says("spirl_component") != component || (trustDomain != "" && says("spirl_trust_domain") != trustDomain)
}

// and is the agent by two scrapes of its process: nothing that only one of them
// says is known.
func (a Agent) and(b Agent) Agent {
	if b.LastScrape.After(a.LastScrape) {
		a, b = b, a
	}
	a.Sequence = min(a.Sequence, b.Sequence)
	a.SVIDs, a.Pending, a.Streams = max(a.SVIDs, b.SVIDs), max(a.Pending, b.Pending), max(a.Streams, b.Streams)
	a.Seen, a.Settled = a.Seen && b.Seen, a.Settled && b.Settled
	return a
}

// reason says why the agent could still hold an SVID; empty when it cannot.
func (a Agent) reason() string {
	switch {
	case !a.Up:
		return reasonSilent
	case a.Process == "":
		return reasonUnidentified
	case a.Duplicated:
		return reasonDuplicated
	case !a.Seen:
		return reasonBehind
	case a.Settled && a.SVIDs == 0 && a.Pending == 0 && a.Streams == 0:
		return ""
	case a.Streams > 0 && a.SVIDs == 0 && a.Pending == 0:
		return reasonStreams
	}
	return reasonRenewing
}
