package runbook_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

// The gate waits for agents that are just about to apply the trust bundle. Then it names
// the others and how to go on.
func TestGate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(time.Now())
		if _, err := c.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		var out bytes.Buffer
		activate := runbook.Step{Action: runbook.ActActivate, Keyset: newID}
		remarks, err := runbook.Gate(t.Context(), c, activate, runbook.WaitOptions{Progress: &runbook.Screen{W: &out}})
		if err != nil || len(remarks) > 0 || time.Since(start) != 40*time.Second {
			t.Errorf("%v, %v after %v", remarks, err, time.Since(start))
		}
		if first, _, _ := strings.Cut(out.String(), "\n"); first != "42 of 50 agents have not applied trust bundle 7 yet" {
			t.Errorf("shown %q", first)
		}

		c.changed = time.Now().Add(50 * time.Second) // nobody is in time, but the first
		start = time.Now()
		_, err = runbook.Gate(t.Context(), c, activate, runbook.WaitOptions{Interval: 7 * time.Second})
		if _, notSafe := errors.AsType[*runbook.NotSafeError](err); !notSafe || time.Since(start) != runbook.GateTimeout {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
		want := `nothing was changed: it is not safe to activate ks_def5678uvw after 1m
3 of 50 agents have not applied trust bundle 7 yet.
  node-12.rack1.example.org ` + agentID(12) + `: no report since the server started (21m ago), version 0.3.1
  edge-berlin ` + agentID(3) + `: no report since the server started (21m ago), version 0.3.1
  node-17.rack1.example.org ` + agentID(17) + `: bundle not applied, version 0.2.0, reported 5s ago
Their workloads may not be able to verify the SVIDs of the new keyset.
If a node is gone for good: server agent evict ID --gone.
To continue without them: keysetctl activate ks_def5678uvw --force.`
		if err.Error() != want {
			t.Errorf("got\n%v\nwant\n%s", err, want)
		}

		// The server itself rejects what cannot be activated.
		start = time.Now()
		for _, id := range []string{oldID, "ks_nosuch"} {
			if remarks, err := runbook.Gate(t.Context(), c, runbook.Step{Action: runbook.ActActivate, Keyset: id}, runbook.WaitOptions{}); err != nil || remarks != nil || time.Now() != start {
				t.Errorf("%s: %v, %v", id, remarks, err)
			}
		}
	})
}

// unknowable is a server of which nothing becomes known.
type unknowable struct{ *runbooktest.Server }

func (u unknowable) Status(ctx context.Context) (runbook.Status, error) {
	s, err := u.Server.Status(ctx)
	s.AgentsBehind = -1
	for i := range s.Keysets {
		s.Keysets[i].Unknown, s.Keysets[i].Unknowable = "SPIRE does not know what agents hold: give --prometheus", true
	}
	return s, err
}

// What cannot become known ends a wait and a rotation at once. A single step goes on,
// with a remark.
func TestUnknowable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		for _, scope := range []runbook.Scope{runbook.X509, runbook.JWT, runbook.All} {
			_, err := runbook.Wait(t.Context(), unknowable{s}, old, runbook.WaitOptions{For: scope})
			if _, notSafe := errors.AsType[*runbook.NotSafeError](err); !notSafe || err.Error() != "keysetctl wait "+old+" cannot know when the keyset is safe to remove: SPIRE does not know what agents hold: give --prometheus" {
				t.Errorf("wait for %s: %v", scope, err)
			}
		}
		r, err := runbook.Rotate(t.Context(), unknowable{s}, runbook.RotateOptions{})
		if _, notSafe := errors.AsType[*runbook.NotSafeError](err); !notSafe || len(s.Calls()) > 0 || !strings.HasSuffix(err.Error(), "give --prometheus") {
			t.Errorf("rotate: %+v, %v", r, err)
		}
		k, err := s.Deployment.Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		remarks, err := runbook.Gate(t.Context(), unknowable{s}, runbook.Step{Action: runbook.ActActivate, Keyset: k.ID}, runbook.WaitOptions{})
		if err != nil || len(remarks) != 1 || remarks[0] != "It is not known which agents have applied the trust bundle: SPIRE does not know what agents hold: give --prometheus." {
			t.Errorf("gate: %q, %v", remarks, err)
		}
		if time.Now() != start {
			t.Errorf("took %v", time.Since(start))
		}
	})
}

// With Until the wait ends when so many agents no longer depend on the keyset. It is not
// safe then, and the rest is named.
func TestWaitUntil(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := taintedCrowd(time.Now())
		start := time.Now()
		r, err := runbook.Wait(t.Context(), c, oldID, runbook.WaitOptions{Until: 90, Timeout: time.Hour})
		// Until 9 minutes have passed it is not known who holds what was lost in a restore.
		if err != nil || r.Safe || !r.Reached || r.Agents != 50 || len(r.Holders) != 2 || time.Since(start) != 9*time.Minute {
			t.Fatalf("%v after %v: %+v", err, time.Since(start), r)
		}
		if got := r.String(); got != "48 of 50 agents no longer depend on keyset ks_abc1234xyz." {
			t.Error(got)
		}
		if text := strings.Join(r.Remarks, "\n"); !strings.Contains(text, "edge-berlin "+agentID(3)+": 81 SVIDs, no report since the server started (") ||
			!strings.HasSuffix(text, "To remove ks_abc1234xyz without them: keysetctl remove ks_abc1234xyz --force. Their SVIDs are rejected then.") {
			t.Error(text)
		}
	})
}
