package admin_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// bubble runs f in a synctest bubble with a serving world of one deployment and a manager's
// connection.
func bubble(t *testing.T, f func(t *testing.T, w *world, r *remote, c *renewd.Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.serveTLS(t)
		f(t, w, r, r.as(t, w, boss))
	})
}

// TestRotation takes all steps of a rotation through the client.
func TestRotation(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("example.org", "default")
		old := d.keysets.Active()
		startedAt := time.Now().UTC()
		end := startedAt.Add(time.Hour)
		for _, entry := range []string{"", "web", "db"} {
			check(t, d.ledger.RecordX509(t.Context(), ledger.Row{Authority: old.X509AuthorityID, Agent: agent("a").String(), Entry: entry, NotAfter: end}))
		}
		check(t, d.ledger.RecordJWT(t.Context(), old.JWTKeyID, end))
		for name, banned := range map[string]bool{"a": false, "b": false, "banned": true} {
			d.attest(t, spireapi.Agent{ID: agent(name), ExpiresAt: end, Banned: banned, Version: "v9", Hostname: "host-" + name, Label: "rack 1"})
		}
		d.attest(t, spireapi.Agent{ID: agent("expired"), ExpiresAt: time.Now().Add(-2 * time.Hour)})
		d.attest(t, spireapi.Agent{ID: agent("renewed"), ExpiresAt: time.Now().Add(-time.Second), NextSerial: "7", NextExpiresAt: end})

		next, err := b.Prepare(t.Context())
		check(t, err)
		if next.ID == "" || next.State != runbook.Prepared || next.X509AuthorityID == "" || next.JWTKeyID == "" || next.ExpiresAt.Sub(next.IssuedAt) != keyset.DefaultLifetime {
			t.Errorf("prepared is %+v", next)
		}
		d.ledger.Applied(agent("b").String(), d.keysets.Bundle().Sequence)
		d.ledger.Applied(agent("renewed").String(), d.keysets.Bundle().Sequence-1)
		s, err := b.Status(t.Context())
		check(t, err)
		if want := (runbook.Status{TrustDomain: "example.org", Deployment: "default", Sequence: 2, Agents: 3, AgentsBehind: 2, Keysets: s.Keysets, ServerStartedAt: startedAt, Evict: "server agent evict ID", EvictGone: "server agent evict ID --gone", Behind: []runbook.Holder{
			{Agent: agent("a").String(), Version: "v9", Hostname: "host-a", Label: "rack 1", Reason: "silent", LatestExpiry: end},
			{Agent: agent("renewed").String(), Reason: "behind", LatestExpiry: end, LastReport: startedAt},
		}}); !reflect.DeepEqual(s, want) {
			t.Errorf("status %+v\n  want %+v", s, want)
		}
		check(t, b.Activate(t.Context(), next.ID))
		if got, want := d.states(t), []string{old.ID + " PREPARED", next.ID + " ACTIVE"}; !slices.Equal(got, want) {
			t.Errorf("keysets %v, want %v", got, want)
		}
		time.Sleep(time.Minute)
		taintedAt := time.Now().UTC()
		check(t, b.Taint(t.Context(), old.ID))

		s, err = b.Status(t.Context())
		check(t, err)
		want := runbook.Keyset{
			ID: old.ID, State: runbook.Tainted, IssuedAt: old.IssuedAt, ExpiresAt: old.ExpiresAt,
			X509AuthorityID: old.X509AuthorityID, JWTKeyID: old.JWTKeyID, SteppedDown: true, TaintedAt: taintedAt,
			X509SVIDs: 3, JWTExpiry: end,
		}
		if !reflect.DeepEqual(s.Keysets[0], want) {
			t.Errorf("the old keyset is %+v\n             want %+v", s.Keysets[0], want)
		}
		holders, err := b.Holders(t.Context(), old.ID)
		check(t, err)
		if want := []runbook.Holder{{Agent: agent("a").String(), Version: "v9", Hostname: "host-a", Label: "rack 1", SVIDs: 3, Reason: "silent", LatestExpiry: end}}; !reflect.DeepEqual(holders, want) {
			t.Errorf("holders %+v\n   want %+v", holders, want)
		}

		// Not safe, then safe after the agent's report.
		err = b.Remove(t.Context(), old.ID, false)
		notSafe, _ := errors.AsType[*runbook.NotSafeError](err)
		text := fmt.Sprintf("keyset %s is not safe to remove: 3 X.509-SVIDs of 1 agent may still be in use, the last of them until %s", old.ID, clock.Text(end))
		if notSafe == nil || notSafe.Keyset != old.ID || err.Error() != text {
			t.Errorf("got %v\nwant %s", err, text)
		}
		_, err = c.RemoveKeyset(t.Context(), &api.RemoveKeysetRequest{KeysetId: old.ID})
		info, _ := status.Convert(err).Details()[0].(*errdetails.ErrorInfo)
		if status.Code(err) != codes.FailedPrecondition || info.GetReason() != "NOT_SAFE" || info.GetDomain() != "renewd" ||
			info.GetMetadata()["svids"] != "3" || info.GetMetadata()["agents"] != "1" {
			t.Errorf("got %v with %v", err, info)
		}
		begins := time.Now().Add(20 * time.Second).UTC()
		check(t, d.ledger.Report(t.Context(), agent("a").String(), ledger.Report{Sequence: 3, Rate: 20, Authorities: []ledger.AuthorityReport{
			{Authority: old.X509AuthorityID, Tainted: true, Pending: 2, Streams: 5, BeginsAt: begins},
		}}))
		holders, err = b.Holders(t.Context(), old.ID)
		check(t, err)
		if want := []runbook.Holder{{
			Agent: agent("a").String(), Version: "v9", Hostname: "host-a", Label: "rack 1", SVIDs: 2, Streams: 5, Reason: "waiting", LatestExpiry: end,
			LastReport: time.Now().UTC(), BeginsAt: begins, Rate: 20,
		}}; !reflect.DeepEqual(holders, want) {
			t.Errorf("holders %+v\n   want %+v", holders, want)
		}
		d.settle(t, old)
		s, err = b.Status(t.Context())
		check(t, err)
		if k := s.Keysets[0]; !k.X509Safe || k.JWTSafe || k.X509SVIDs != 0 {
			t.Errorf("the old keyset is %+v", k)
		}
		// Valid JWT-SVIDs do not prevent the removal.
		check(t, b.Remove(t.Context(), old.ID, false))
		if got, want := d.states(t), []string{next.ID + " ACTIVE"}; !slices.Equal(got, want) {
			t.Errorf("keysets %v, want %v", got, want)
		}
		if latest, _ := d.ledger.JWT(old.JWTKeyID, false); !latest.IsZero() {
			t.Error("the ledger has not forgotten the JWT key")
		}
		var audit []string
		for _, rec := range d.storage.records() {
			audit = append(audit, fmt.Sprint(rec.Actor, " ", rec.Operation, " ", rec.KeysetID, " ", rec.Note))
		}
		by := boss.String()
		if want := []string{
			"server create " + old.ID + " ", by + " prepare " + next.ID + " ", by + " activate " + next.ID + " ",
			by + " taint " + old.ID + " ", by + " remove " + old.ID + " ",
		}; !slices.Equal(audit, want) {
			t.Errorf("audit log:\n%q\nwant\n%q", audit, want)
		}
	})
}

// TestSafeForJWT: the JWT key is safe when the last JWT-SVID has expired.
func TestSafeForJWT(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("", "")
		old := d.keysets.Active()
		check(t, d.ledger.RecordJWT(t.Context(), old.JWTKeyID, time.Now().Add(10*time.Minute)))
		next, err := d.keysets.Prepare(t.Context())
		check(t, err)
		check(t, d.keysets.Activate(t.Context(), next.ID))
		safe := func() (x509, jwt bool) {
			s, err := r.as(t, w, boss).Backend("", "").Status(t.Context())
			check(t, err)
			return s.Keysets[0].X509Safe, s.Keysets[0].JWTSafe
		}
		if x509, jwt := safe(); x509 || jwt {
			t.Error("safe without a taint")
		}
		check(t, b.Taint(t.Context(), old.ID))
		if x509, jwt := safe(); !x509 || jwt {
			t.Errorf("while a JWT-SVID is valid: X.509 %v, JWT %v", x509, jwt)
		}
		time.Sleep(20 * time.Minute)
		if x509, jwt := safe(); !x509 || !jwt {
			t.Errorf("after it has expired: X.509 %v, JWT %v", x509, jwt)
		}
	})
}

// TestForced: the audit log notes a forced removal and what depended on the keyset.
func TestForced(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("", "")
		old := d.tainted(t)
		held := d.rows.count()
		end := clock.Text(time.Now().Add(time.Hour))
		check(t, b.Remove(t.Context(), old.ID, true))
		last := func() admin.AuditRecord {
			all := d.storage.records()
			return all[len(all)-1]
		}
		if got, want := last().Note, "forced: 2 X.509-SVIDs of 1 agent may still be in use, the last of them until "+end; got != want {
			t.Errorf("the note is %q, want %q", got, want)
		}
		if left := d.rows.count(); held != 2 || left != 0 {
			t.Errorf("the ledger had %d rows and has %d", held, left)
		}
		old = d.tainted(t)
		d.settle(t, old)
		check(t, b.Remove(t.Context(), old.ID, true))
		if got, want := last().Note, "forced, although nothing depended on it"; got != want {
			t.Errorf("the note is %q, want %q", got, want)
		}
	})
}

// TestSignatureInFlight: a keyset is not safe while a call from before the taint may be signing.
func TestSignatureInFlight(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("", "")
		old := d.keysets.Active()
		end := d.ledger.Begin()
		next, err := b.Prepare(t.Context())
		check(t, err)
		check(t, b.Activate(t.Context(), next.ID))
		check(t, b.Taint(t.Context(), old.ID))
		holders, err := b.Holders(t.Context(), old.ID)
		check(t, err)
		if len(holders) != 1 || holders[0].Reason != "signing" {
			t.Errorf("holders %+v", holders)
		}
		err = b.Remove(t.Context(), old.ID, false)
		if want := "keyset " + old.ID + " is not safe to remove: 1 X.509-SVID may still be in use"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		end()
		check(t, b.Remove(t.Context(), old.ID, false))
	})
}

// TestRefusals: refusals have exactly the texts that scripts rely on, and their codes.
func TestRefusals(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d, b := w.only(), c.Backend("", "")
		tainted := d.tainted(t).ID
		active := d.keysets.Active().ID
		k, err := d.keysets.Prepare(t.Context())
		check(t, err)
		prepared := k.ID
		remove := func(force bool) func(context.Context, string) error {
			return func(ctx context.Context, id string) error { return b.Remove(ctx, id, force) }
		}
		before := d.states(t)
		for _, c := range []struct {
			step func(context.Context, string) error
			id   string
			want string
		}{
			{b.Activate, active, "cannot activate active key set"},
			{b.Activate, tainted, "cannot activate tainted key set"},
			{b.Activate, "ks_none", "key set not found"},
			{b.Taint, active, "cannot taint active key set"},
			{b.Taint, tainted, "cannot taint tainted key set"},
			{b.Taint, "", "key set not found"},
			{remove(false), active, "cannot remove active key set"},
			{remove(false), prepared, "cannot remove prepared key set"},
			{remove(true), active, "cannot remove active key set"},
			{remove(true), prepared, "cannot remove prepared key set"},
			{remove(true), "ks_none", "key set not found"},
		} {
			err := c.step(t.Context(), c.id)
			if err == nil || err.Error() != c.want || errors.Is(err, runbook.ErrOutcomeUnknown) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		}
		if _, err := b.Holders(t.Context(), "ks_none"); err == nil || err.Error() != "key set not found" {
			t.Errorf("holders: %v", err)
		}
		if after := d.states(t); !slices.Equal(before, after) {
			t.Errorf("keysets %v, before %v", after, before)
		}
		for code, id := range map[codes.Code]string{codes.NotFound: "ks_none", codes.FailedPrecondition: active} {
			if _, err := c.TaintKeyset(t.Context(), &api.TaintKeysetRequest{KeysetId: id}); status.Code(err) != code {
				t.Errorf("taint %s: %v, want %v", id, err, code)
			}
		}
	})
}

// TestScope: requests find their deployment, or fail.
func TestScope(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "east", "west")
		c := w.serveTLS(t).as(t, w, viewer)
		all, err := c.ListDeployments(t.Context(), &api.ListDeploymentsRequest{})
		check(t, err)
		if all.GetTrustDomain() != "example.org" || !slices.Equal(all.GetDeployments(), []string{"east", "west"}) {
			t.Errorf("deployments %v", all)
		}
		_, err = w.deployments["west"].keysets.Prepare(t.Context())
		check(t, err)
		for _, test := range []struct {
			td, name string
			keysets  int
			code     codes.Code
			text     string
		}{
			{"", "east", 1, codes.OK, ""},
			{"example.org", "west", 2, codes.OK, ""},
			{"", "", 0, codes.InvalidArgument, `there are several deployments, ["east" "west"]: name one of them`},
			{"", "north", 0, codes.NotFound, `there is no deployment "north", only ["east" "west"]`},
			{"example.com", "east", 0, codes.NotFound, `this is the server of trust domain "example.org", not of "example.com"`},
		} {
			resp, err := c.ListKeysets(t.Context(), &api.ListKeysetsRequest{Scope: &api.Scope{TrustDomain: test.td, Deployment: test.name}})
			if len(resp.GetKeysets()) != test.keysets || status.Code(err) != test.code || status.Convert(err).Message() != test.text {
				t.Errorf("%q %q: %v, %v", test.td, test.name, resp, err)
			}
			if err == nil && (resp.GetScope().GetTrustDomain() != "example.org" || resp.GetScope().GetDeployment() != test.name || resp.GetSequence() != 3) {
				t.Errorf("%q %q: %v", test.td, test.name, resp)
			}
			wantBundle := test.code
			if test.td+test.name == "" {
				wantBundle = codes.OK // all deployments have the same
			}
			b, err := c.GetBundle(t.Context(), &api.GetBundleRequest{Scope: &api.Scope{TrustDomain: test.td, Deployment: test.name}})
			if status.Code(err) != wantBundle || err == nil && (b.GetSequence() != 3 || string(b.GetPem()) != string(w.published().PEM())) {
				t.Errorf("bundle for %q %q: %v, %v", test.td, test.name, b, err)
			}
			if _, err := c.Backend(test.td, test.name).Status(t.Context()); test.code != codes.OK && (err == nil || err.Error() != test.text) {
				t.Errorf("%q %q: %v", test.td, test.name, err)
			}
		}
		_, err = c.ListDeployments(t.Context(), &api.ListDeploymentsRequest{TrustDomain: "example.com"})
		if status.Code(err) != codes.NotFound {
			t.Errorf("deployments of another trust domain: %v", err)
		}
	})
}

// TestAutomatic checks the description of automatic rotation's next step.
func TestAutomatic(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 23, 5, 6, 7, 0, time.UTC)
	for _, c := range []struct {
		is   rotation.Preview
		want string
	}{
		{rotation.Preview{Mode: "off"}, ""},
		{rotation.Preview{Mode: "on"}, "on, nothing to do"},
		{rotation.Preview{Mode: "paused", Next: "prepare", At: at}, "paused, next: prepare at 2026-11-23 05:06:07 +0000 UTC"},
		{rotation.Preview{Mode: "on", Next: "remove ks_x", At: at, WaitsFor: "3 agents"}, "on, next: remove ks_x, waits for 3 agents, at the latest on 2026-11-23 05:06:07 +0000 UTC"},
		{rotation.Preview{Mode: "on", Next: "taint ks_x"}, "on, next: taint ks_x"},
		{rotation.Preview{Mode: "on", Next: "taint ks_x", WaitsFor: "a"}, "on, next: taint ks_x, waits for a"},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			d := w.only()
			rules, err := admin.ParseRules(td, []string{boss.String()}, nil)
			check(t, err)
			w.Service, err = admin.New(admin.Config{
				TrustDomain: td, Rules: rules, Published: w.published, Deployments: []admin.Deployment{{
					Name: "default", Keysets: d.keysets, Server: d.server, Ledger: d.ledger, Automatic: func() rotation.Preview { return c.is },
				}},
				Certificate: d.certificate,
			})
			check(t, err)
			b := w.serveTLS(t).as(t, w, boss)
			s, err := b.Backend("", "").Status(t.Context())
			check(t, err)
			if s.Automatic != c.want {
				t.Errorf("%+v is %q, want %q", c.is, s.Automatic, c.want)
			}
		})
	}
}

// TestFigures: the metrics show the same figures, without reading storage.
func TestFigures(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "east", "west")
	d := w.deployments["west"]
	old := d.tainted(t)
	f, err := w.Figures(t.Context(), "west")
	check(t, err)
	if f.Sequence != 4 || len(f.Keysets) != 2 || f.Keysets[0].ID != old.ID || f.Keysets[0].X509SVIDs != 2 || f.Keysets[0].Agents != 1 || f.Keysets[0].X509Safe {
		t.Errorf("figures %+v", f)
	}
	if _, err := w.Figures(t.Context(), "north"); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
}
