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
	reasonSilent       = "silent"       // down, missing, or no recent scrape
	reasonUnidentified = "unidentified" // exports no SPIFFE ID or process ID
	reasonDuplicated   = "duplicated"   // another process exports its SPIFFE ID
	reasonBehind       = "behind"       // has not seen that the authority is tainted
	reasonRenewing     = "renewing"     // has SVIDs to replace
	reasonStreams      = "streams"      // has replaced them, but workloads have not read them
	reasonSettling     = "settling"     // has nothing left, as far as it knows so soon after a restart
)

// component is the label of agents in spirl_application_info.
const component = "agent"

// evaluate returns the figures that follow from the targets and their newest scrapes.
func evaluate(at time.Time, trustDomain string, targets []*target) Figures {
	f := Figures{At: at}
	for _, t := range targets {
		a, known := t.agent(at)
		if known && t.isForeign(trustDomain) {
			continue
		}
		i := slices.IndexFunc(f.Agents, func(b Agent) bool { return a.Process != "" && b.Process == a.Process })
		if i < 0 {
			f.Agents = append(f.Agents, a)
		} else {
			f.Agents[i] = f.Agents[i].merge(a)
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
				Agent: a.Instance, Version: a.Version, Hostname: a.Hostname, SVIDs: a.SVIDs, Streams: a.Streams, Reason: reason, LastReport: a.LastScrape,
			})
		}
	}
	f.X509Safe = len(f.Holders) == 0
	return f
}

// addMissingNumber adds the missing agents if their expected number is known.
func (f *Figures) addMissingNumber(expected int) {
	if n := expected - len(f.Agents); n > 0 {
		f.addMissing(n, fmt.Sprintf("%d of %d agents that Prometheus does not scrape", n, expected))
	}
}

// addMissingIDs adds the missing agents if their expected SPIFFE IDs are known.
func (f *Figures) addMissingIDs(expected []string, targets []*target) {
	present := make(map[string]bool, len(targets))
	for _, t := range targets {
		for id := range t.ids {
			present[id] = true
		}
	}
	for _, id := range slices.Sorted(slices.Values(expected)) {
		if !present[id] {
			f.addMissing(1, id)
		}
	}
}

func (f *Figures) addMissing(n int, agent string) {
	f.Expected, f.Missing, f.Holding, f.X509Safe = f.Expected+n, f.Missing+n, f.Holding+n, false
	f.Holders = append(f.Holders, runbook.Holder{Agent: agent, Reason: reasonSilent})
}

// agent returns the agent of the target. known says that the newest scrape is recent and
// of an application that identifies itself.
func (t *target) agent(at time.Time) (a Agent, known bool) {
	a = Agent{Instance: t.instance(), ID: t.id(), Hostname: t.hostname, LastScrape: t.answered, SVIDs: int(t.held)}
	// Without info the target may be any program.
	if !t.recent(at) || t.info == nil {
		return a, false
	}
	settled, seen := t.values[seriesSettled]
	a = Agent{
		Instance: a.Instance, ID: a.ID, Hostname: a.Hostname, Up: true, LastScrape: t.scrape,
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

// isForeign reports whether the target is no agent of the trust domain, so that it cannot
// hold SVIDs of its authorities.
func (t *target) isForeign(trustDomain string) bool {
	infoLabel := func(name model.LabelName) string { return string(t.info[name]) }
	return infoLabel("spirl_component") != component || (trustDomain != "" && infoLabel("spirl_trust_domain") != trustDomain)
}

// merge returns the agent for two scrapes of its process. Only what both say is known.
func (a Agent) merge(b Agent) Agent {
	if b.LastScrape.After(a.LastScrape) {
		a, b = b, a
	}
	a.Sequence = min(a.Sequence, b.Sequence)
	a.SVIDs, a.Pending, a.Streams = max(a.SVIDs, b.SVIDs), max(a.Pending, b.Pending), max(a.Streams, b.Streams)
	a.Seen, a.Settled = a.Seen && b.Seen, a.Settled && b.Settled
	return a
}

// reason returns why the agent may still hold an SVID. It is empty if it holds none.
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
	case a.SVIDs == 0 && a.Pending == 0:
		return reasonSettling
	}
	return reasonRenewing
}
