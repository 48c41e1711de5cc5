package runbook_test

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// crowd is a signing server with 50 agents, of which some are late for each reason. What
// they hold is a function of the time since the taint.
type crowd struct {
	keysets  []runbook.Keyset
	changed  time.Time // the last step
	started  time.Time // of the server
	sequence uint64
}

const (
	oldID = "ks_abc1234xyz"
	newID = "ks_def5678uvw"
)

func newCrowd(now time.Time) *crowd {
	return &crowd{started: now.Add(-20 * time.Minute), changed: now, sequence: 6, keysets: []runbook.Keyset{{
		ID: oldID, State: runbook.Active, IssuedAt: now.Add(-76 * 24 * time.Hour), ExpiresAt: now.Add(14 * 24 * time.Hour), X509AuthorityID: "a", JWTKeyID: "j",
	}}}
}

// taintedCrowd is a crowd whose old keyset was just tainted.
func taintedCrowd(now time.Time) *crowd {
	c := newCrowd(now)
	c.keysets[0].State, c.keysets[0].TaintedAt, c.keysets[0].SteppedDown = runbook.Tainted, now, true
	c.keysets = append(c.keysets, runbook.Keyset{ID: newID, State: runbook.Active, X509AuthorityID: "b", JWTKeyID: "k"})
	return c
}

func agentID(i int) string {
	if i%2 == 0 {
		return fmt.Sprintf("spiffe://example.org/spire/agent/join_token/%08x-4a6f-4c1e-9f0b-5d2c7a9e%04x", 0x5f3759df*uint32(i+1), i)
	}
	return fmt.Sprintf("spiffe://example.org/spire/agent/x509pop/%08x%08x%08x%08x%08x", 0x9e3779b9*uint32(i+1), 0x85ebca6b*uint32(i+1), 0xc2b2ae35*uint32(i+1), i, i)
}

// holders returns the agents that hold SVIDs of the old keyset, so long after the taint.
func (c *crowd) holders(now time.Time) []runbook.Holder {
	taint := c.keysets[0].TaintedAt
	since := now.Sub(taint)
	var out []runbook.Holder
	for i := range 50 {
		h := runbook.Holder{
			Agent: agentID(i), Hostname: fmt.Sprintf("node-%02d.rack%d.example.org", i, i/10), Version: "0.3.1", SVIDs: 60 + i*7%50,
			LatestExpiry: taint.Add(4*time.Minute + time.Duration(i)*time.Second), LastReport: now.Add(-time.Duration(1+i%9) * time.Second), Rate: 20,
		}
		late := func(reason string, until time.Duration) {
			if h.Reason = reason; since < until {
				out = append(out, h)
			}
		}
		switch i {
		case 3: // its token has a label
			h.Hostname, h.Label, h.LastReport = "", "edge-berlin", taint.Add(-3*time.Hour)
			late("silent", 10*time.Minute)
		case 11:
			h.LastReport = taint.Add(-7 * time.Minute)
			late("silent", 10*time.Minute)
		case 12:
			h.LastReport = time.Time{}
			late("silent", 4*time.Minute)
		case 17, 18:
			h.Version = "0.2.0"
			late("behind", 7*time.Minute)
		case 21, 22, 23:
			h.SVIDs, h.Streams = 0, i-20
			late("streams", 4*time.Minute)
		case 26:
			h.SVIDs = 0
			late("settling", 3*time.Minute)
		case 31:
			late("duplicated", 9*time.Minute)
		case 36:
			h.Agent, h.Hostname, h.SVIDs = "10.0.7.36:9090", "", 0
			late("unidentified", 5*time.Minute)
		default:
			if since < 5*time.Second {
				h.Reason = "behind"
				out = append(out, h)
				break
			}
			h.BeginsAt = taint.Add(time.Duration(5+i*37%60) * time.Second)
			if h.Reason = "waiting"; !h.BeginsAt.After(now) {
				h.Reason = "renewing"
				h.SVIDs -= int(now.Sub(h.BeginsAt).Seconds() * 20)
			}
			if h.SVIDs > 0 {
				out = append(out, h)
			}
		}
	}
	if since < 9*time.Minute {
		out = append(out, runbook.Holder{Reason: "restored", LastReport: taint.Add(-26 * time.Hour), LatestExpiry: taint.Add(4 * time.Minute)})
	}
	if since < time.Minute {
		out = append(out, runbook.Holder{Reason: "signing", SVIDs: 2})
	}
	return out
}

func (c *crowd) Status(_ context.Context) (runbook.Status, error) {
	now := time.Now()
	s := runbook.Status{TrustDomain: "example.org", Deployment: "default", Sequence: c.sequence, Agents: 50, ServerStartedAt: c.started, Evict: "server agent evict ID", EvictGone: "server agent evict ID --gone"}
	for i := range 50 {
		applied := c.changed.Add(time.Duration(i%6) * time.Second)
		h := runbook.Holder{Agent: agentID(i), Hostname: fmt.Sprintf("node-%02d.rack%d.example.org", i, i/10), Version: "0.3.1", Reason: "behind", LastReport: now.Add(-time.Second)}
		switch i {
		case 3:
			h.Hostname, h.Label, h.Reason, h.LastReport = "", "edge-berlin", "silent", c.started.Add(-3*time.Hour)
			applied = c.changed.Add(40 * time.Second)
		case 12:
			h.Reason, h.LastReport = "silent", time.Time{}
			applied = c.changed.Add(30 * time.Second)
		case 17:
			h.Version = "0.2.0"
			applied = c.changed.Add(20 * time.Second)
		}
		if applied.After(now) {
			s.Behind = append(s.Behind, h)
		}
	}
	s.AgentsBehind = len(s.Behind)
	for _, k := range c.keysets {
		if k.State == runbook.Tainted {
			holders := c.holders(now)
			for _, h := range holders {
				k.X509SVIDs += h.SVIDs
			}
			k.X509Safe, k.JWTSafe = len(holders) == 0, true
		}
		s.Keysets = append(s.Keysets, k)
	}
	return s, nil
}

func (c *crowd) Holders(context.Context, string) ([]runbook.Holder, error) {
	return c.holders(time.Now()), nil
}

func (c *crowd) step(published bool) {
	if published {
		c.changed, c.sequence = time.Now(), c.sequence+1
	}
}

func (c *crowd) Prepare(context.Context) (runbook.Keyset, error) {
	c.keysets = append(c.keysets, runbook.Keyset{ID: newID, State: runbook.Prepared, X509AuthorityID: "b", JWTKeyID: "k", IssuedAt: time.Now()})
	c.step(true)
	return c.keysets[1], nil
}

func (c *crowd) Activate(context.Context, string) error {
	c.keysets[0].State, c.keysets[0].SteppedDown, c.keysets[1].State = runbook.Prepared, true, runbook.Active
	c.step(false)
	return nil
}

func (c *crowd) Taint(context.Context, string) error {
	c.keysets[0].State, c.keysets[0].TaintedAt = runbook.Tainted, time.Now()
	c.step(true)
	return nil
}

func (c *crowd) Remove(context.Context, string, bool) error {
	c.keysets = slices.Delete(c.keysets, 0, 1)
	return nil
}
