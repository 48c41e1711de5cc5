package runbook_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

func TestList(t *testing.T) {
	t.Parallel()
	issued := time.Date(2025, 10, 15, 9, 23, 41, 0, time.UTC)
	at := issued.Add(24 * time.Hour)
	row := func(id string, state runbook.State, f func(*runbook.Keyset)) runbook.Keyset {
		k := runbook.Keyset{ID: id, State: state, IssuedAt: issued, ExpiresAt: issued.Add(90 * 24 * time.Hour), X509AuthorityID: "a", JWTKeyID: "j"}
		if f != nil {
			f(&k)
		}
		return k
	}
	s := runbook.Status{Deployment: "default", Sequence: 7, Agents: 3, AgentsBehind: 2, Automatic: "on, next: prepare", ClockDoubt: "it shows noon", Keysets: []runbook.Keyset{
		row("ks_abc1234xyz", runbook.Tainted, func(k *runbook.Keyset) {
			k.X509SVIDs, k.X509Safe, k.JWTExpiry = 0, true, at.Add(23*time.Hour+4*time.Minute)
		}),
		row("ks_bcd1234xyz", runbook.Tainted, func(k *runbook.Keyset) { k.X509SVIDs, k.JWTSafe, k.JWTExpiry = 12, true, at }),
		row("ks_cde1234xyz", runbook.Tainted, func(k *runbook.Keyset) {
			k.X509SVIDs, k.X509Safe, k.JWTSafe, k.Unknown = 3, true, true, "Prometheus is down"
		}),
		row("ks_def5678uvw", runbook.Active, func(k *runbook.Keyset) { k.X509SVIDs, k.JWTExpiry = 120345, at.Add(7*24*time.Hour) }),
		row("ks_efg5678uvw", runbook.Prepared, func(k *runbook.Keyset) { k.X509AuthorityID, k.IssuedAt = "", time.Time{} }),
		row("ks_fgh5678uvw", runbook.Prepared, func(k *runbook.Keyset) { k.X509SVIDs, k.JWTState = -1, runbook.Active }),
		row("ks_ghi5678uvw", runbook.Tainted, func(k *runbook.Keyset) { k.X509Safe = true }),
	}}
	var out bytes.Buffer
	if err := runbook.List(&out, s, at); err != nil {
		t.Fatal(err)
	}
	// Scripts rely on the header and the columns up to State.
	want := `Deployment: default
Signing Keys:
Type   Keyset ID      Issued At                      Expires At                     State     Live SVIDs  Safe to remove
X.509  ks_abc1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   0           yes
JWT    ks_abc1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   for 23h4m   no
X.509  ks_bcd1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   12          no
JWT    ks_bcd1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   none        yes
X.509  ks_cde1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   not known   not known
JWT    ks_cde1234xyz  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   not known   not known
X.509  ks_def5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Active    120345      -
JWT    ks_def5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Active    for 7d      -
X.509  ks_efg5678uvw  not known                      2026-01-13 09:23:41 +0000 UTC  Missing   -           -
JWT    ks_efg5678uvw  not known                      2026-01-13 09:23:41 +0000 UTC  Prepared  none        -
X.509  ks_fgh5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Prepared  not known   -
JWT    ks_fgh5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Active    none        -
X.509  ks_ghi5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   0           yes
JWT    ks_ghi5678uvw  2025-10-15 09:23:41 +0000 UTC  2026-01-13 09:23:41 +0000 UTC  Tainted   not known   no
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 121 {
			t.Errorf("wider than 120 columns: %q", line)
		}
	}
	wantRemarks := `2 of 3 agents have not applied trust bundle 7 yet.
The X.509 key of ks_fgh5678uvw is Prepared and its JWT key is Active.
The figures of ks_cde1234xyz are not known: Prometheus is down.
The server's clock is in doubt: it shows noon.
Automatic rotation: on, next: prepare.`
	if got := strings.Join(runbook.Remarks(s, now), "\n"); got != wantRemarks {
		t.Errorf("remarks\n%s\nwant\n%s", got, wantRemarks)
	}
	two := runbook.Remarks(runbook.Status{Agents: 3, Duplicated: []string{"spiffe://example.org/agent/a\x1b"}}, time.Now())
	if len(two) != 1 || !strings.HasPrefix(two[0], "Two processes use the identity of agent spiffe://example.org/agent/a") || strings.Contains(two[0], "\x1b") {
		t.Errorf("duplicated agent: %q", two)
	}
	if got := runbook.Remarks(runbook.Status{Agents: 3}, time.Now()); len(got) != 0 {
		t.Errorf("unexpected remarks %q", got)
	}
}

// If removal is not safe, the error names the agents, the reasons, the expected end
// and the remedy.
func TestRemoveRefuses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		s.JWTExpiry[old] = start.Add(24 * time.Hour)
		s.HoldersAt = func(string, time.Time) []runbook.Holder {
			holders := fleet(start)(old, start)
			for i := range 4 {
				holders = append(holders, runbook.Holder{Agent: fmt.Sprintf("spiffe://example.org/agent/d%d", i), SVIDs: 1, Streams: 2, Reason: "streams"})
			}
			return holders
		}
		_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
		want := "cannot remove " + old + `: it is not safe yet
107 X.509-SVIDs of 7 agents depend on it.
  spiffe://example.org/agent/c: 2 SVIDs, silent since 2000-01-01 00:00:00 +0000 UTC (now), the last expires 2000-01-01 00:01:10 +0000 UTC (in 1m10s)
  spiffe://example.org/agent/b: 1 SVID, behind: it has not applied the taint yet
  spiffe://example.org/agent/a: 100 SVIDs, waiting for its random delay, begins in 20s
  spiffe://example.org/agent/d0: 1 SVID, replaced but not yet read by 2 workloads
  spiffe://example.org/agent/d1: 1 SVID, replaced but not yet read by 2 workloads
  and 2 more
It ends at the latest 2000-01-01 00:06:10 +0000 UTC (in 6m10s), when the SVIDs of silent agents have expired by all clocks.
The last JWT-SVID that ` + old + ` signed expires 2000-01-02 00:00:00 +0000 UTC (in 1d). Removal ends it earlier, at each relying party's next bundle refresh.
Run keysetctl wait ` + old + `, then remove it. With --force it is removed now, and the SVIDs that depend on it are rejected.`
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || err.Error() != want {
			t.Errorf("got\n%v\nwant\n%s", err, want)
		}
		if len(s.Calls()) != 0 {
			t.Errorf("calls %v, want none", s.Calls())
		}
		d, err := runbook.Remove(t.Context(), s, old, true, time.Now())
		if err != nil || d.String() != "Keyset "+old+" removed." || len(d.Remarks) != 3 || !strings.Contains(d.Remarks[1], "(in 1d)") {
			t.Errorf("--force: %+v, %v", d, err)
		}
	})
}

// The server may refuse a keyset that became unsafe after the status. The error has
// the same form.
func TestRemoveServerRefuses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.Before = func(call, _ string) error {
			if call == "remove" {
				s.HoldersAt = fleet(time.Now())
			}
			return nil
		}
		_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok ||
			!strings.Contains(err.Error(), "not safe yet (X.509-SVIDs depend on it)\n") || !strings.Contains(err.Error(), "/agent/c: 2 SVIDs, silent") {
			t.Errorf("%v", err)
		}
	})
}

// Removal is not safe while the figures are not known.
func TestRemoveUnknown(t *testing.T) {
	t.Parallel()
	s, old := tainted(t)
	s.Unknown = "Prometheus is down"
	_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
	if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "The SVIDs that depend on it are not known: Prometheus is down") {
		t.Errorf("%v", err)
	}
	// No X.509-SVID depends on a keyset without an X.509 key.
	gone := &withoutX509{Server: s}
	if _, err := runbook.Remove(t.Context(), gone, old, false, time.Now()); err == nil || len(s.Calls()) != 1 {
		t.Errorf("the server was not called: %v, %v", err, s.Calls())
	}
}

type withoutX509 struct{ *runbooktest.Server }

func (h *withoutX509) Status(ctx context.Context) (runbook.Status, error) {
	s, err := h.Server.Status(ctx)
	for i := range s.Keysets {
		s.Keysets[i].X509AuthorityID = ""
	}
	return s, err
}

// If Status hangs, Remove fails and changes nothing. If Holders hangs, the error has no
// names of agents.
func TestRemoveServerHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		const soon = 30 * time.Second
		_, err := runbook.Remove(t.Context(), &hangingServer{Server: s, since: time.Now().Add(-1)}, old, true, time.Now())
		if err == nil || !strings.Contains(err.Error(), "nothing was changed") || errors.Is(err, runbook.ErrOutcomeUnknown) {
			t.Errorf("got %v", err)
		}
		if len(s.Calls()) != 0 {
			t.Errorf("calls %v, want none", s.Calls())
		}
		s.HoldersAt = fleet(time.Now())
		_, err = runbook.Remove(t.Context(), silentHolders{s}, old, false, time.Now())
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "The agents that hold them are not known") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)); took > 2*soon {
			t.Errorf("both removals took %v", took)
		}
	})
}

// silentHolders never answers Holders.
type silentHolders struct{ *runbooktest.Server }

func (silentHolders) Holders(ctx context.Context, _ string) ([]runbook.Holder, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A mutation without an answer has an unknown outcome, whichever error the Backend
// returns.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{context.DeadlineExceeded, context.Canceled, runbook.ErrOutcomeUnknown} {
		s, old := tainted(t)
		s.After = func(string, string) error { return fmt.Errorf("remove: %w", cause) }
		_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
		if !errors.Is(err, runbook.ErrOutcomeUnknown) || !strings.Contains(runbook.Remedy(err), "Check keysetctl list before you repeat the command.") {
			t.Errorf("%v: %v", cause, err)
		}
		if len(s.Calls()) != 1 {
			t.Errorf("%v: called %v", cause, s.Calls())
		}
	}
	if got := runbook.Remedy(context.DeadlineExceeded); got != "" {
		t.Errorf("remedy of a read that timed out: %q", got)
	}
}

// A duplicated agent is shown with a remedy, and counts until its SVIDs expire.
func TestRemoveDuplicatedAgent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.HoldersAt = func(string, time.Time) []runbook.Holder {
			return []runbook.Holder{{Agent: "spiffe://example.org/agent/a", SVIDs: 107, Reason: "duplicated", LatestExpiry: time.Now().Add(time.Hour), Rate: 20}}
		}
		_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
		if err == nil {
			t.Fatal("removed")
		}
		for _, want := range []string{
			"  spiffe://example.org/agent/a: 107 SVIDs, duplicated: two processes use its identity; evict it, remove data_dir on both nodes and attest each with its own ID\n",
			"It ends at the latest 2000-01-01 01:05:00 +0000 UTC (in 1h5m), when the SVIDs of duplicated agents have expired by all clocks.\n",
		} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got\n%v\nwithout\n%s", err, want)
			}
		}
	})
}
