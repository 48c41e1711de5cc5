package admin

import (
	"context"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// fetchGrace is the time after which an agent that does not report is assumed to apply the
// trust bundle. Agents fetch it every few seconds and post a status once a minute.
const fetchGrace = 3 * time.Minute

// agentCounts counts attested agents, without banned and expired ones, and those of them
// that are behind.
type agentCounts struct {
	agents, behind int
	named          []*api.Holder // the first of those that are behind, ordered by ID
	duplicated     []string      // sorted IDs
}

// maxBehind is how many agents that are behind have a name.
const maxBehind = 100

// AgentsBehind returns how many agents of all deployments except retired ones are behind the
// published trust bundle. Their workloads verify the SVIDs of every deployment.
func (s *Service) AgentsBehind(ctx context.Context) (int, error) {
	behind := 0
	for i := range s.config.Deployments {
		if d := &s.config.Deployments[i]; !d.Retired {
			n, err := s.count(ctx, d)
			if err != nil {
				return 0, err
			}
			behind += n.behind
		}
	}
	return behind, nil
}

// count counts the agents of one deployment.
func (s *Service) count(ctx context.Context, d *Deployment) (n agentCounts, err error) {
	agents, err := d.Server.Agents(ctx)
	if err != nil {
		return n, err
	}
	duplicated := d.Ledger.Duplicated()
	// An agent counts while its agent SVID may be valid by any clock.
	now, sequence := s.config.Clock.AtLeast(), s.config.Published().Sequence
	// Measured in uptime, because a clock step gives agents no time to fetch.
	fetched := s.config.Clock.PastFor(s.bundleChanged()) >= fetchGrace
	for _, a := range agents {
		if a.Banned || !now.Before(clock.Over(latestExpiry(a))) {
			continue
		}
		n.agents++
		id := a.ID.String()
		if slices.Contains(duplicated, id) {
			n.duplicated = append(n.duplicated, id)
		}
		c, known := d.Ledger.Contact(id)
		if !behind(a, c, known, sequence, fetched) {
			continue
		}
		if n.behind++; n.behind <= maxBehind {
			h := &api.Holder{
				AgentId: id, Version: a.Version, Hostname: a.Hostname, Label: a.Label, Reason: ledger.ReasonBehind,
				LatestExpiry: protoTime(latestExpiry(a)), LastReport: protoTime(c.At), AppliedSequence: c.Sequence,
			}
			if !known || now.Sub(c.At) > ledger.Silence {
				h.Reason = ledger.ReasonSilent
			}
			n.named = append(n.named, h)
		}
	}
	return n, nil
}

// behind reports whether an agent may not apply the published trust bundle yet.
//
// If the agent reports its bundle, that decides. If it reported before the server was
// started and not since, it may be unreachable and is behind. Most stock spire-agents do
// not report: they are assumed to apply what they had the time to fetch.
func behind(a spireapi.Agent, c ledger.Contact, known bool, sequence uint64, fetched bool) bool {
	switch {
	case c.Reports || c.Sequence > 0:
		return c.Sequence < sequence
	case !known && a.Version != "":
		return true
	}
	return !fetched
}

// bundleChanged returns when an authority was last added to the published bundle or tainted.
func (s *Service) bundleChanged() time.Time {
	var last time.Time
	for i := range s.config.Deployments {
		for _, k := range s.config.Deployments[i].Keysets.Status().Keysets {
			for _, at := range []time.Time{k.IssuedAt, k.TaintedAt} {
				if at.After(last) {
					last = at
				}
			}
		}
	}
	return last
}
