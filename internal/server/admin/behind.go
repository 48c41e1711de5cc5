package admin

import (
	"context"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// fetchTime is within how long an agent that says nothing has fetched a trust bundle
// for sure, and one that says something has said so: agents fetch it every few
// seconds and post a status once a minute.
const fetchTime = 3 * time.Minute

// tally is how many agents are attested, not banned and not expired, how many of them
// are behind, and which are duplicated.
type tally struct {
	agents, behind int
	duplicated     []string // IDs, ordered
}

// AgentsBehind returns how many agents of all deployments that are served are behind
// the published trust bundle: the workloads of each verify what any of them signs.
// Automatic rotation and operators wait for the same agents.
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
func (s *Service) count(ctx context.Context, d *Deployment) (n tally, err error) {
	agents, err := d.Server.Agents(ctx)
	if err != nil {
		return n, err
	}
	duplicated := d.Ledger.Duplicated()
	// An agent counts as long as its SVID may be valid by any clock.
	now, sequence := s.config.Clock.AtLeast(), s.config.Published().Sequence
	// By uptime: a step of the clock gives nobody the time to fetch.
	fetched := s.config.Clock.PastFor(s.changed()) >= fetchTime
	for _, a := range agents {
		if a.Banned || !now.Before(ends(a)) {
			continue
		}
		n.agents++
		id := a.ID.String()
		if slices.Contains(duplicated, id) {
			n.duplicated = append(n.duplicated, id)
		}
		c, heard := d.Ledger.Contact(id)
		if behind(a, c, heard, sequence, fetched) {
			n.behind++
		}
	}
	return n, nil
}

// behind reports whether it has to be expected that an agent does not apply the
// published trust bundle yet.
//
// One that tells which bundle it applies is taken at its word. One that told
// before the server was started, and has not since, may be out of reach, and counts.
// One that never tells, as most stock spire-agents, cannot be asked: it is taken to
// apply what it has had the time to fetch.
func behind(a spireapi.Agent, c ledger.Contact, heard bool, sequence uint64, fetched bool) bool {
	switch {
	case c.Reports || c.Sequence > 0:
		return c.Sequence < sequence
	case !heard && a.Version != "":
		return true
	}
	return !fetched
}

// changed is when an authority was last added to the published bundle, or marked.
func (s *Service) changed() time.Time {
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
