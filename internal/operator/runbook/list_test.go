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
	// The header and the columns up to State are the runbook's.
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
	if got := strings.Join(runbook.Remarks(s), "\n"); got != wantRemarks {
		t.Errorf("remarks\n%s\nwant\n%s", got, wantRemarks)
	}
	two := runbook.Remarks(runbook.Status{Agents: 3, Duplicated: []string{"spiffe://example.org/agent/a\x1b"}})
	if len(two) != 1 || !strings.HasPrefix(two[0], "Two processes use the identity of agent spiffe://example.org/agent/a") || strings.Contains(two[0], "\x1b") {
		t.Errorf("an agent that is duplicated: %q", two)
	}
	if got := runbook.Remarks(runbook.Status{Agents: 3}); len(got) != 0 {
		t.Errorf("all is well, and it says %q", got)
	}
}

// What is not safe is refused, and the refusal says everything that there is
// to know: who, why, until when, and what to do.
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
107 X.509-SVIDs of 7 agents hang on it.
  spiffe://example.org/agent/c: 2 SVIDs, silent since 2000-01-01 00:00:00 +0000 UTC (now), the last expires 2000-01-01 00:01:10 +0000 UTC (in 1m10s)
  spiffe://example.org/agent/b: 1 SVID, behind: it has not seen the taint yet
  spiffe://example.org/agent/a: 100 SVIDs, waiting for its random delay, begins in 20s
  spiffe://example.org/agent/d0: 1 SVID, replaced but not yet read by 2 workloads
  spiffe://example.org/agent/d1: 1 SVID, replaced but not yet read by 2 workloads
  and 2 more
It ends at the latest 2000-01-01 00:06:10 +0000 UTC (in 6m10s), when what silent agents hold has expired by all clocks.
JWT-SVIDs that ` + old + ` signed are valid until 2000-01-02 00:00:00 +0000 UTC (in 1d); relying parties reject them as soon as they fetch the trust bundle without it.
Run keysetctl wait ` + old + `, which ends when it is safe, and then remove it. With --force it is removed at once, and what hangs on it fails verification.`
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || err.Error() != want {
			t.Errorf("got\n%v\nwant\n%s", err, want)
		}
		if len(s.Calls()) != 0 {
			t.Errorf("the server was asked all the same: %v", s.Calls())
		}
		d, err := runbook.Remove(t.Context(), s, old, true, time.Now())
		if err != nil || d.String() != "Keyset "+old+" removed." || len(d.Remarks) != 2 || !strings.Contains(d.Remarks[1], "(in 1d)") {
			t.Errorf("--force: %+v, %v", d, err)
		}
	})
}

// The server has the last word: what became unsafe after the look is refused
// by it, and explained the same way.
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
			!strings.Contains(err.Error(), "not safe yet (X.509-SVIDs hang on it)\n") || !strings.Contains(err.Error(), "/agent/c: 2 SVIDs, silent") {
			t.Errorf("%v", err)
		}
	})
}

// Figures that are not known are no reason to remove, and what they would say
// is asked for in vain only once.
func TestRemoveUnknown(t *testing.T) {
	t.Parallel()
	s, old := tainted(t)
	s.Unknown = "Prometheus is down"
	_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
	if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "What hangs on it is not known: Prometheus is down") {
		t.Errorf("%v", err)
	}
	// A keyset that has lost its X.509 key has nothing to lose by it.
	gone := &halfGone{Server: s}
	if _, err := runbook.Remove(t.Context(), gone, old, false, time.Now()); err == nil || len(s.Calls()) != 1 {
		t.Errorf("the server was not asked: %v, %v", err, s.Calls())
	}
}

type halfGone struct{ *runbooktest.Server }

func (h *halfGone) Status(ctx context.Context) (runbook.Status, error) {
	s, err := h.Server.Status(ctx)
	for i := range s.Keysets {
		s.Keysets[i].X509AuthorityID = ""
	}
	return s, err
}

// A server that hangs while it is looked at does not hang a removal: before it,
// nothing was changed, and a refusal goes without the agents' names.
func TestRemoveServerHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		const soon = 30 * time.Second
		_, err := runbook.Remove(t.Context(), &hanging{Server: s, since: time.Now().Add(-1)}, old, true, time.Now())
		if err == nil || !strings.Contains(err.Error(), "nothing was changed") || errors.Is(err, runbook.ErrOutcomeUnknown) {
			t.Errorf("got %v", err)
		}
		if len(s.Calls()) != 0 {
			t.Errorf("called %v", s.Calls())
		}
		s.HoldersAt = fleet(time.Now())
		_, err = runbook.Remove(t.Context(), silentHolders{s}, old, false, time.Now())
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "Which agents hold them is not known") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)); took > 2*soon {
			t.Errorf("the two took %v", took)
		}
	})
}

// silentHolders never says which agents hold anything.
type silentHolders struct{ *runbooktest.Server }

func (silentHolders) Holders(ctx context.Context, _ string) ([]runbook.Holder, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// An answer that never came is an unknown outcome, however the Backend says so.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{context.DeadlineExceeded, context.Canceled, runbook.ErrOutcomeUnknown} {
		s, old := tainted(t)
		s.After = func(string, string) error { return fmt.Errorf("remove: %w", cause) }
		_, err := runbook.Remove(t.Context(), s, old, false, time.Now())
		if !errors.Is(err, runbook.ErrOutcomeUnknown) || !strings.Contains(runbook.Remedy(err), "Run keysetctl list, and retry only if it did not.") {
			t.Errorf("%v: %v", cause, err)
		}
		if len(s.Calls()) != 1 {
			t.Errorf("%v: called %v", cause, s.Calls())
		}
	}
	if got := runbook.Remedy(context.DeadlineExceeded); got != "" {
		t.Errorf("a read that timed out changed nothing, and it says %q", got)
	}
}

// An agent that is duplicated is named with what to do, and ends with its SVIDs.
func TestRemoveWhatAClonedNodeHolds(t *testing.T) {
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
			"  spiffe://example.org/agent/a: 107 SVIDs, duplicated: two processes use its identity; evict it, remove data_dir on both nodes and attest each with an ID of its own\n",
			"It ends at the latest 2000-01-01 01:05:00 +0000 UTC (in 1h5m), when what duplicated agents hold has expired by all clocks.\n",
		} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got\n%v\nwithout\n%s", err, want)
			}
		}
	})
}
